"""Transfer between networks, against networks whose accuracies are known beforehand."""

import json

import pytest
import torch
from torch import nn

from clat.attacks import activation, pgd_threat, restarts
from clat.checkpoint import save_checkpoint
from clat.cli import main as cli
from clat.data.dataset import Dataset
from clat.errors import InputError
from clat.evaluation.transfer import transfer
from clat.models import build_model

EPS = 8 / 255


class Half(nn.Module):
    """Class 1 if the mean of one half of the image is above a half; ``hard`` decides by a sign, without a gradient."""

    def __init__(self, left: bool, hard: bool = False):
        super().__init__()
        self.left, self.hard = left, hard

    def forward(self, x):
        half = x[..., : x.shape[-1] // 2] if self.left else x[..., x.shape[-1] // 2 :]
        bright = half.mean((1, 2, 3)) - 0.5
        bright = bright.sign() if self.hard else bright
        return torch.stack([-bright, bright], 1)


@pytest.fixture
def levels() -> Dataset:
    """Even grey; 127.5 is the threshold. Label 1 is bright; the last image is misclassified clean."""
    grey = torch.tensor([100, 118, 121, 124, 131, 133, 140, 200], dtype=torch.uint8)
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 0])
    return Dataset(grey.view(-1, 1, 1, 1).repeat(1, 1, 16, 16), labels, ("dark", "bright"), "levels", "test")


def test_counts_in_closed_form(levels):
    """An attack on one half leaves the other at the random start, whose mean is within 3 grey levels of the image."""
    found = transfer({"left": Half(True), "right": Half(False)}, levels, batch_size=3)
    assert [accuracy.correct for accuracy in found.clean] == [7, 7]
    assert [[accuracy.correct for accuracy in row] for row in found.attacked] == [[3, 7], [7, 3]]  # 100, 118 and 140
    assert found.clean[0].n == found.attacked[0][1].n == 8
    assert found.stronger == []
    assert (found.eps, found.norm, found.attack) == (EPS, "linf", "PGD-20")


@pytest.mark.filterwarnings("ignore:The scores have a gradient of exactly zero")
def test_masked_gradients_show_as_a_stronger_transfer(levels):
    found = transfer({"open": Half(True), "masked": Half(True, hard=True)}, levels)
    assert [[accuracy.correct for accuracy in row] for row in found.attacked] == [[3, 3], [7, 7]]
    assert found.stronger == [("open", "masked")]
    assert json.loads(json.dumps(found.to_json()))["stronger"] == [["open", "masked"]]


def test_the_same_seed_gives_the_same_and_an_attack_a_network_is_used(plain, tiny, blobs):
    models = {"plain": plain, "tiny": tiny}
    attacks = [activation(layer, blobs, EPS, steps=2) for layer in ("second", "network.layer3.0.conv1")]
    first, second = (transfer(models, blobs.sample(30), attacks) for _ in range(2))
    assert (first.clean, first.attacked) == (second.clean, second.attacked)
    assert [settings["layer"] for settings in first.settings] == ["second", "network.layer3.0.conv1"]
    one, other = first.measured.networks
    assert one.weights != other.weights


def test_what_does_not_go_together_is_refused(plain, tiny, blobs, levels):
    both = {"plain": plain, "tiny": tiny}
    with pytest.raises(InputError, match="at least two"):
        transfer({"plain": plain}, blobs)
    with pytest.raises(InputError, match="tiny: The network has 3 outputs, but levels has 2 classes"):
        transfer({"half": Half(True), "tiny": tiny}, levels)
    with pytest.raises(InputError, match="colour: The network takes images with 3 channels"):
        transfer({"plain": plain, "colour": build_model("rn18", 3, channels=3, width=8)}, blobs)
    with pytest.raises(InputError, match="2 networks and 3 attacks"):
        transfer(both, blobs, restarts(pgd_threat(EPS, 1), 3))
    with pytest.raises(InputError, match="different balls"):
        transfer(both, blobs, [*restarts(pgd_threat(EPS, 1)), *restarts(pgd_threat(0.1, 1))])


def test_the_command(tmp_path, capsys):
    names = [str(tmp_path / name) for name in ("a.safetensors", "b.safetensors")]
    for name in names:
        save_checkpoint(name, build_model("rn18", 10, channels=1, width=8))
    rest = ["--data", "fashion-mnist-mini", "--limit", "20", "--steps", "2"]
    out = tmp_path / "transfer.json"
    assert cli.main(["transfer", *names, *rest, "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["networks"] == names
    assert all(f"({cell['correct']})" in printed for row in [found["clean"], *found["attacked"]] for cell in row)
    assert {cell["n"] for row in found["attacked"] for cell in row} == {20}

    layer = ["--attack", "activation", "--layer", "network.layer3.0.conv1"]
    assert cli.main(["transfer", *names, *rest, *layer, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["attack"] == "Activation-2"

    for arguments, says in (
        ([names[0], *rest], "at least two"),
        ([names[0], names[0], *rest], "named twice"),
        ([*names, *rest, "--attack", "activation"], "--layer NAME goes with"),
        ([*names, *rest, "--layer", "network.conv1"], "--layer NAME goes with"),
        ([*names, *rest, "--attack", "activation", "--layer", "conv99"], "no layer 'conv99'"),
        ([*names, *rest, "--limit", "0"], "1 or more"),
    ):
        assert cli.main(["transfer", *arguments]) == 2
        error = capsys.readouterr().err
        assert says in error
        assert error.count("\n") == 1
