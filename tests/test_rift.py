"""RiFT: the criticality of a weight, which layer is chosen, and how far the fine-tuned network is blended in."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clat.checkpoint import load_checkpoint, load_tensors
from clat.errors import InputError
from clat.models import build_model
from clat.network import same_bits, snapshot
from clat.objectives import Clean, PgdAt
from clat.threat import Threat, attack_output
from clat.training.recipe import Recipe
from clat.training.train import train
from clat.tuners import Rift, Whole
from clat.tuners.rift import Point, choose, risk, worst_risk
from conftest import dies_before, network, same_tensors

THREAT = Threat(eps=0.1, step=0.05, steps=2)
RECIPE = Recipe(
    objective=Clean(), tuner=Rift(batch=40, passes=2), threat=THREAT, validation_steps=2, epochs=3,
    batch_size=60, holdout=60, lr=0.02, select_by="clean", health=False,
)  # fmt: skip


class Two(nn.Module):
    """One number a layer, so that the highest loss in the ball is found by trying."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(1, 1, bias=False), nn.Linear(1, 2, bias=False)
        self.first.weight.data.fill_(0.8)
        self.second.weight.data.copy_(torch.tensor([[0.5], [-0.7]]))

    def forward(self, x):
        return self.second(self.first(x.flatten(1)))


def test_the_criticality_is_the_highest_loss_on_a_grid_over_the_ball():
    model, x = Two(), torch.rand(40, 1, 1, 1)
    batches = [(x[:20], torch.zeros(20).long()), (x[20:], torch.arange(20) % 2)]

    def loss(name, weight):
        scores = torch.func.functional_call(model, {f"{name}.weight": weight}, (x,))
        return F.cross_entropy(scores, torch.cat([y for _, y in batches])).item()

    first = [loss("first", torch.tensor([[0.8 + 0.2 * 0.8 * t]])) for t in torch.linspace(-1, 1, 41)]
    norm = model.second.weight.norm().item()
    angles = torch.linspace(0, 2 * torch.pi, 361)
    around = [torch.stack([a.cos(), a.sin()]).view(2, 1) * 0.2 * norm for a in angles]
    second = [loss("second", model.second.weight.detach() + delta) for delta in around]
    for name, brute in (("first", first), ("second", second)):
        found = worst_risk(model, f"{name}.weight", batches, radius=0.2, passes=60, step=0.5)
        assert found == pytest.approx(max(brute), abs=2e-4)
        assert found <= max(brute) + 1e-6
    assert risk(model, batches) == pytest.approx(loss("first", model.first.weight.detach()))


def test_the_lowest_is_chosen_and_each_score_is_measured_by_itself(plain, images):
    x, y = images
    torch.manual_seed(5)
    batches = [(attack_output(plain, x, y, THREAT), y)]
    names = ["first", "second", "last"]
    expected = {n: worst_risk(plain, f"{n}.weight", batches, radius=0.1, passes=3, step=1) for n in names}
    torch.manual_seed(5)
    selection = Rift(passes=3).select(plain, x, y, THREAT)
    assert {score.name: score.weakness for score in selection.scores} == expected
    assert selection.layers == (min(expected, key=expected.__getitem__),)
    assert selection.trainable == (f"{selection.layers[0]}.weight",)
    assert all(score.criticality >= 0 for score in selection.scores)


def test_the_normalisations_move_as_asked(plain, images):
    def training(which):
        return Rift(passes=1, norm_statistics=which).select(plain, *images, THREAT).training

    assert training("all") == ("first_norm", "second_norm")
    assert training("frozen") == ()
    assert set(training("selected")) < {"first_norm", "second_norm"}


def test_the_best_blend_gains_most_within_the_drop():
    start, gain, loses = Point(0.0, 0.80, 0.500), Point(0.3, 0.83, 0.499), Point(0.6, 0.86, 0.498)
    assert choose([start, gain, loses], 0.001) == gain  # one image of a thousand
    assert choose([start, gain, loses], 0.01) == loses
    assert choose([start, Point(0.1, 0.8, 0.5), Point(0.2, 0.79, 0.6)], 0.001) == start
    assert choose([start, Point(0.1, 0.8, 0.51)], 0.001).alpha == 0.1


def test_the_end_blends_parameters_and_buffers_and_stays_at_the_best(plain):
    start = snapshot(plain)
    plain.second.weight.data += 1
    plain.first_norm.running_mean += 1
    plain.first_norm.num_batches_tracked += 7
    seen = []

    def measure():
        alpha = (plain.second.weight - start["second.weight"]).mean().item()
        seen.append(round(alpha, 4))
        return alpha, 0.5 if alpha < 0.45 else 0.4  # the cleanest that keeps its robustness is at 0.4

    found = Rift().end(plain, start, measure)
    assert seen == pytest.approx([i / 10 for i in range(11)], abs=1e-4)
    assert found["alpha"] == 0.4
    assert found["clean"] == pytest.approx(0.4, abs=1e-4)
    assert [point["alpha"] for point in found["points"]] == [i / 10 for i in range(11)]
    assert torch.allclose(plain.second.weight - start["second.weight"], torch.tensor(0.4), atol=1e-6)
    assert torch.allclose(plain.first_norm.running_mean - start["first_norm.running_mean"], torch.tensor(0.4))
    assert plain.first_norm.num_batches_tracked == start["first_norm.num_batches_tracked"]
    assert same_bits(plain.first.weight, start["first.weight"])


def test_a_run_ends_with_the_blend_as_its_best_and_records_it(blobs, tmp_path):
    base = train(replace(RECIPE, objective=PgdAt(), tuner=Whole()), network(), blobs, out=tmp_path / "b")
    model, _ = load_checkpoint(base.last)
    before = snapshot(model)
    run = train(replace(RECIPE, epochs=1), model, blobs, out=tmp_path / "run")
    end, (best, facts) = run.result["end"], load_tensors(run.best)
    last, _ = load_tensors(run.last)
    assert run.result["best"]["clean"] == end["clean"] >= end["points"][0]["clean"]
    assert end["robust"] >= end["points"][0]["robust"] - 0.001
    assert facts["end"] == end
    assert facts["validation"]["robust"] == end["robust"]
    name = run.selections[0].trainable[0]
    assert not same_bits(before[name], last[name])
    moved = {key for key in last if key.endswith("running_mean") and not same_bits(before[key], last[key])}
    assert len(moved) == 20
    assert all(same_bits(tensor, best[key]) for key, tensor in model.state_dict().items())
    assert torch.allclose(best[name], before[name] + end["alpha"] * (last[name] - before[name]), atol=1e-6)


@pytest.mark.parametrize("moment", ["optimizer-2", "result"])
def test_a_killed_run_ends_bit_identical(moment, blobs, tmp_path):
    whole = train(RECIPE, network(), blobs, out=tmp_path / "whole")
    with dies_before(moment):
        train(RECIPE, network(), blobs, out=tmp_path / "killed")
    other = build_model("rn18", 3, channels=1, width=8, mean=[0.3], std=[0.2])
    with pytest.raises(InputError, match="began with other weights"):
        train(RECIPE, other, blobs, out=tmp_path / "killed", resume=True)
    killed = train(RECIPE, network(), blobs, out=tmp_path / "killed", resume=True)
    assert killed.result["end"] == whole.result["end"]
    for path, other in ((whole.last, killed.last), (whole.best, killed.best)):
        assert same_tensors(path, other)


@pytest.mark.parametrize("keys", [{"batch": 0}, {"passes": 0}, {"radius": 0}, {"step": -1}, {"largest_drop": 2}])
def test_values_out_of_range_are_refused(keys):
    with pytest.raises(InputError, match=f"rift.{next(iter(keys))}"):
        Rift(**keys)
