"""Rankings beside criticality: each against its definition, and alignment's held-out images."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clat.data.dataset import to_unit
from clat.errors import InputError
from clat.network import same_bits, snapshot
from clat.objectives import PgdAt
from clat.threat import Threat, attack_output
from clat.training.own_loop import CLAT
from clat.training.recipe import Recipe
from clat.training.train import train
from clat.tuners import Critical
from clat.tuners.rankings import Attacked, rank_layers

THREAT = Threat(eps=0.1, step=0.05, steps=3)
MEASURED = ("relative", "loss", "alignment", "gradient")


def attacked(model, x, y):
    return Attacked(x, attack_output(model, x, y, THREAT), y)


def values(model, batch, ranking, **keys):
    return {score.name: score.criticality for score in rank_layers(model, batch, ranking, **keys)}


def test_relative_is_the_change_as_a_share_of_the_features_length(plain, images):
    batch = attacked(plain.eval(), *images)
    clean, moved = (plain.first(x).flatten(1) for x in (batch.x, batch.x_adv))
    expected = ((moved - clean).norm(dim=1) / clean.norm(dim=1)).mean().item()
    assert values(plain, batch, "relative")["first"] == pytest.approx(expected, rel=1e-5)
    before = values(plain, batch, "relative")
    plain.first.weight.data *= 7
    plain.first.bias.data *= 7
    assert values(plain, batch, "relative")["first"] == pytest.approx(before["first"], rel=1e-4)


def test_loss_is_its_rise_with_one_output_replaced(plain, images):
    batch = attacked(plain.eval(), *images)

    def rest(feature):
        return plain.last(torch.relu(plain.second_norm(feature)).mean((2, 3)))

    def second(x):
        return plain.second(torch.relu(plain.first_norm(plain.first(x))))

    with torch.no_grad():
        clean, both = F.cross_entropy(plain(batch.x), batch.y), F.cross_entropy(plain(batch.x_adv), batch.y)
        behind = F.cross_entropy(rest(second(batch.x_adv)), batch.y)
    found = values(plain, batch, "loss")
    assert found["second"] == pytest.approx((behind - clean).item(), rel=1e-4)
    assert found["last"] == pytest.approx((both - clean).item(), rel=1e-4)  # whose output is the network's


class Attention(nn.Module):
    """Sequence-first attention over rows, then a layer that runs twice, past which its input is carried."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.twice = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        rows = x[:, 0].transpose(0, 1)
        rows = self.attention(rows, rows, rows)[0]
        rows = rows + self.twice(torch.relu(self.twice(rows)))
        return self.head(rows.mean(0))


def test_loss_takes_each_call_by_itself_and_attention_as_one_layer(images):
    model = Attention().eval()
    batch = attacked(model, *images)

    def scores(x, x_adv, number):
        """The network with the outputs of one call exchanged, in plain code."""
        clean, moved = x[:, 0].transpose(0, 1), x_adv[:, 0].transpose(0, 1)
        rows, other = model.attention(clean, clean, clean)[0], model.attention(moved, moved, moved)[0]
        if number == 0:
            rows = other
        first, other_first = model.twice(rows), model.twice(other)
        first = other_first if number == 1 else first
        second = model.twice(torch.relu(other_first if number == 2 else first))
        return model.head((rows + second).mean(0))

    rises = [score.criticality for score in rank_layers(model, batch, "loss")]
    assert [score.name for score in rank_layers(model, batch, "loss")] == ["attention", "twice", "twice", "head"]
    with torch.no_grad():
        clean = F.cross_entropy(model(batch.x), batch.y)
        expected = [(F.cross_entropy(scores(batch.x, batch.x_adv, i), batch.y) - clean).item() for i in range(3)]
    torch.testing.assert_close(rises[:3], expected, rtol=1e-4, atol=1e-6)


def gradients(model, batch):
    """By plain autograd on a copy, name -> gradient over the layer's parameters as one vector."""
    model = copy.deepcopy(model).eval().requires_grad_(True)
    F.cross_entropy(model(batch.x_adv), batch.y).backward()
    return {
        name: torch.cat([p.grad.flatten() for p in getattr(model, name).parameters()])
        for name in ("first", "second", "last")
    }


def test_gradient_and_alignment_follow_their_definitions_whatever_is_frozen(plain, images):
    batch, unseen = attacked(plain, *images), attacked(plain, torch.rand(5, 1, 8, 8), torch.arange(5) % 3)
    seen, other = gradients(plain, batch), gradients(plain, unseen)
    plain.train()
    plain.second.requires_grad_(False)
    before = snapshot(plain)
    length, share = values(plain, batch, "gradient"), values(plain, batch, "alignment", unseen=unseen)
    for name, gradient in seen.items():
        assert length[name] == pytest.approx(gradient.square().mean().sqrt().item(), rel=1e-4)
        expected = (gradient @ other[name] / gradient.square().sum()).item()
        assert share[name] == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert all(same_bits(tensor, before[name]) for name, tensor in snapshot(plain).items())
    assert plain.training
    assert [name for name, p in plain.named_parameters() if not p.requires_grad] == ["second.weight", "second.bias"]
    assert all(parameter.grad is None for parameter in plain.parameters())
    assert list(values(plain, batch, "alignment", unseen=batch).values()) == pytest.approx([1, 1, 1])


def test_alignment_without_other_images_is_refused(plain, images):
    with pytest.raises(InputError, match="give some as unseen"):
        Critical(ranking="alignment").select(plain, *images, THREAT)
    clat = CLAT(plain, ranking="alignment", threat=THREAT)
    with pytest.raises(InputError, match="give some as unseen"):
        clat.select(*images)
    with pytest.raises(InputError, match="2 images but labels"):
        clat.select(*images, unseen=(torch.rand(2, 1, 8, 8), torch.arange(3)))
    clat.select(*images, unseen=(torch.rand(2, 1, 8, 8), torch.arange(2)))
    assert clat.layers[0] in ("first", "second")


def test_a_measure_that_is_not_finite_is_refused(plain, images):
    batch = attacked(plain, *images)
    plain.last.weight.data[0, 0] = torch.inf
    with pytest.raises(InputError, match="not finite"):
        rank_layers(plain, batch, "gradient")


@pytest.mark.parametrize("ranking", MEASURED)
def test_the_highest_measure_is_selected(ranking, tiny):
    x, y, unseen = torch.rand(8, 1, 16, 16), torch.arange(8) % 3, (torch.rand(8, 1, 16, 16), torch.arange(8) % 3)
    selection = Critical(k=3, ranking=ranking).select(tiny, x, y, THREAT, unseen=unseen)
    counted = [score for score in selection.scores if score.index is not None and score.name != "network.linear"]
    best = sorted(counted, key=lambda score: -score.criticality)[:3]
    assert list(selection.layers) == [score.name for score in best]


def test_the_loop_gives_alignment_held_out_images_only(blobs, plain, tmp_path, monkeypatch):
    given = []
    choose = Critical.select

    def spy(self, model, x, y, threat, **keys):
        given.append((x, keys.get("unseen")))
        return choose(self, model, x, y, threat, **keys)

    monkeypatch.setattr(Critical, "select", spy)
    recipe = Recipe(
        objective=PgdAt(),
        tuner=Critical(ranking="alignment", every=1, batch=16),
        threat=THREAT,
        epochs=2,
        lr=0.01,
        holdout=60,
        images=100,
        health=False,
    )
    run = train(recipe, plain, blobs, out=tmp_path / "run")
    training, held = ({image.numpy().tobytes() for image in to_unit(part.pixels)} for part in blobs.hold_out(60, 0))
    for x, (unseen, labels) in given:
        assert len(x) == len(unseen) == len(labels) == 16
        assert {image.numpy().tobytes() for image in x} <= training
        assert {image.numpy().tobytes() for image in unseen} <= held
    assert not torch.equal(given[0][1][0], given[1][1][0])  # others at the next selection
    assert len(run.selections) == 2
    given.clear()
    train(replace(recipe, tuner=Critical(ranking="loss", batch=16), epochs=1), plain, blobs, out=tmp_path / "other")
    assert [unseen for _, unseen in given] == [None]
