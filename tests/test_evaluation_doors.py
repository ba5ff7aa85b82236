"""What evaluations refuse, what they read from records, where they run, and what they print."""

import io
import json
import os
import sys
import warnings

import pytest
import torch
from rich.console import Console
from torch import nn

from clat import CLAT, InputError, evaluate
from clat.attacks import apgd_ce, pgd_threat, square, tier
from clat.checkpoint import save_checkpoint
from clat.cli import main as cli
from clat.cli import shared
from clat.cli.attacking import assumed, showing
from clat.cli.shared import device_named
from clat.cli.tables import Name, apart, layer_table, status_table, sweep_table, transfer_table, trust_table
from clat.compute import find_device, placed
from clat.data.dataset import Dataset
from clat.evaluation.cost import pass_seconds
from clat.evaluation.evaluate import Progress
from clat.evaluation.fits import check_fits
from clat.evaluation.measured import Measured
from clat.evaluation.sweep import sweep
from clat.evaluation.transfer import transfer
from clat.evaluation.trust import trust
from clat.files import digest_of
from clat.layer_names import named_layers
from clat.models import Normalized, build_model
from clat.network import NoGradientError
from clat.report.pictures import draw_curves
from clat.structure import structure_digest
from clat.training.integrity import LayerStatus

HOSTILE = "a[/x]b\x1b[31m\nc"


class Seen(nn.Module):
    """Three scores of the mean pixel; ``option`` decides what is done to it first."""

    def __init__(self, option: str = "same"):
        super().__init__()
        self.option = option
        self.last = nn.Linear(3, 3, bias=False)
        nn.init.eye_(self.last.weight)

    def forward(self, x):
        bars = torch.stack([x[:, 0, 4 * i : 4 * i + 4].mean((1, 2)) for i in range(3)], 1)
        if self.option == "turned":
            bars = bars.roll(1, 1)
        if self.option == "nan":
            bars = bars * float("nan")
        if self.option == "nan away from the data":  # what is attacked leaves the grey levels of uint8 images
            off = (255 * x - (255 * x).round()).abs().amax((1, 2, 3)) > 0.01
            bars = torch.where(off[:, None], torch.nan, bars)
        if self.option == "argmax":
            return nn.functional.one_hot(self.last(bars).argmax(1), 3)
        if self.option == "no_grad":
            with torch.no_grad():
                return self.last(bars)
        if self.option == "inference_mode":
            with torch.inference_mode():
                return self.last(bars)
        if self.option == "integers":
            return self.last(bars).mul(100).long()
        if self.option == "softmax":
            return self.last(bars).softmax(1)
        if self.option == "raises":
            raise ValueError("what [/x] is this?")
        if self.option == "half of the batch":
            return self.last(bars)[: len(bars) // 2]
        return self.last(bars)


@pytest.fixture
def few(blobs) -> Dataset:
    return blobs.subset(torch.arange(24))


# Records


def test_networks_of_equal_weights_and_other_options_have_records_of_their_own(few, tmp_path):
    same, turned = (Normalized(Seen(option), [0.0], [1.0]) for option in ("same", "turned"))
    first = evaluate(same, few, pgd_threat(0.1, 2), record=tmp_path)
    second = evaluate(turned, few, pgd_threat(0.1, 2), record=tmp_path)
    assert first.measured.networks[0].weights == second.measured.networks[0].weights
    assert (first.clean.correct, second.clean.correct) == (24, 0)
    assert second.from_record == ""
    assert len(list(tmp_path.iterdir())) == 2


def test_a_spec_and_a_version_are_part_of_a_records_identity(few, tmp_path, monkeypatch):
    model = Normalized(Seen(), [0.0], [1.0])
    for width in (1, 2):
        model.spec = {"name": "seen", "width": width}
        evaluate(model, few, pgd_threat(0.1, 1), record=tmp_path)
    monkeypatch.setattr(sys.modules["clat.evaluation.measured"], "version", lambda _: "99")
    assert evaluate(model, few, pgd_threat(0.1, 1), record=tmp_path).from_record == ""
    assert len(list(tmp_path.iterdir())) == 3


def scaled(factor: float) -> nn.Module:
    class Scaled(nn.Module):
        def forward(self, x):
            return factor * x

    return Scaled()


def test_the_structure_tells_options_code_and_captured_values_apart():
    def made(function):
        module = nn.Module()
        module.function = function
        return module

    networks = [
        nn.Conv2d(1, 1, 3),
        nn.Conv2d(1, 1, 3, stride=2),
        nn.GELU(),
        nn.GELU("tanh"),
        made(lambda x: x + 1),
        made(lambda x: x + 2),
        made(lambda x, by=3: x * by),
        made(lambda x, by=4: x * by),
        scaled(2.0),
        scaled(3.0),
    ]
    digests = [structure_digest(network) for network in networks]
    assert len(set(digests)) == len(digests)
    assert structure_digest(scaled(2.0)) == digests[-2]
    assert structure_digest(networks[0].train()) == structure_digest(networks[0].eval())


def only(folder):
    (file,) = folder.iterdir()
    return file, json.loads(file.read_text())


def forged(content: dict) -> str:
    """With the digest that fits, as who reads the code can make it."""
    return json.dumps({**content, "digest": digest_of({k: v for k, v in content.items() if k != "digest"})})


def test_a_record_edited_to_all_robust_is_not_believed(few, tmp_path):
    model = Seen()
    truth = evaluate(model, few, pgd_threat(0.3, 5), record=tmp_path)
    assert truth.robust.correct < 24
    file, content = only(tmp_path)
    content["state"]["outcomes"] = [0] * 24
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"its digest does not match; remove it, or keep records in another folder"):
        evaluate(model, few, pgd_threat(0.3, 5), record=tmp_path)
    del content["digest"]  # as clat wrote them before
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match="not the record of an evaluation; remove it"):
        evaluate(model, few, pgd_threat(0.3, 5), record=tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s["outcomes"].pop(),
        lambda s: s["outcomes"].__setitem__(0, 2),
        lambda s: s["outcomes"].__setitem__(0, -2),
        lambda s: s["outcomes"].__setitem__(0, 0.5),
        lambda s: s["outcomes"].__setitem__(0, True),
        lambda s: s.update(done=[99]),
        lambda s: s.update(done=[-1]),
        lambda s: s.update(done=[1, 1]),
        lambda s: s.update(done=[0]),  # and yet images are broken
        lambda s: s.update(seconds=["long"]),
        lambda s: s.update(seconds=[-1.0]),
        lambda s: s.update(outcomes="000"),
        lambda s: s["identity"].update(eps=0.001),
        lambda s: s["identity"]["attacks"][0].update(seed=5),
        lambda s: s["identity"]["measured"].update(precision="bf16"),
        lambda s: s.pop("identity"),
    ],
)
def test_an_impossible_record_is_refused_whatever_its_digest(change, few, tmp_path):
    model = Seen()
    evaluate(model, few, pgd_threat(0.3, 5), record=tmp_path)
    file, content = only(tmp_path)
    change(content["state"])
    file.write_text(forged(content))
    with pytest.raises(InputError, match="not a valid record of this evaluation; remove it"):
        evaluate(model, few, pgd_threat(0.3, 5), record=tmp_path)


def test_what_is_read_from_a_record_is_said(few, tmp_path):
    def interrupt(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(Seen(), few, pgd_threat(0.1, 1), batch_size=10, record=tmp_path, progress=interrupt)
    part = evaluate(Seen(), few, pgd_threat(0.1, 1), batch_size=10, record=tmp_path)
    file, _ = only(tmp_path)
    assert part.from_record == f"continued from the record {file}, with 10 attacked images"
    again = evaluate(Seen(), few, pgd_threat(0.1, 1), batch_size=10, record=tmp_path)
    assert again.from_record == f"read from the record {file}; nothing was attacked again"
    assert again == part
    swept = [sweep(Seen(), few, "eps", [0, 0.1], record=tmp_path / "sweep") for _ in range(2)]
    assert [len(curve.from_record) for curve in swept] == [0, 1]


def test_only_the_first_process_keeps_records(few, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    evaluate(Seen(), few, pgd_threat(0.1, 1), record=tmp_path)
    assert not list(tmp_path.iterdir())


# Devices


def test_networks_stay_where_they_are(few, monkeypatch):
    moves = []
    monkeypatch.setattr(nn.Module, "to", lambda self, *to: moves.append(to) or self)
    model = nn.Sequential(nn.Conv2d(1, 3, 12), nn.Flatten())
    evaluate(model, few, pgd_threat(0.1, 1))
    sweep(model, few, "eps", [0.1])
    transfer({"a": model, "b": Seen()}, few, tier("quick", 0.1, 3, steps=1, starts=1).attacks[0])
    pass_seconds(model, few)
    trust(model, few, limit=4, checks=[])
    assert moves == []


def test_a_network_is_moved_for_the_call_and_put_back():
    model, other, bare = nn.Linear(2, 2), nn.Linear(2, 2, device="meta"), nn.ReLU()
    moves = []
    model.to = lambda device: moves.append(str(device))
    with placed([other, model, bare], None) as place:
        assert place.type == "meta"
        assert moves == ["meta"]
    assert moves == ["meta", "cpu"]
    moves.clear()
    with pytest.raises(RuntimeError), placed([model], "meta"):
        raise RuntimeError
    assert moves == ["meta", "cpu"]
    with placed([bare], None) as place:
        assert place.type == "cpu"
    split = nn.Sequential(nn.Linear(2, 2), other)
    with placed([split], None) as place:
        assert place.type == "cpu"
    with pytest.raises(InputError, match="on several devices"), placed([split], "meta"):
        pass


@pytest.mark.parametrize("name", ["cuda:99", "cuda:-1", "gpu", "cpu:1", "", "\x1b[31m", "cpu,cuda"])
def test_a_device_that_is_not_here_is_refused(name):
    with pytest.raises(InputError, match="here are cpu"):
        find_device(name)
    with pytest.raises(InputError, match="choose cpu, cuda, cuda:1 or mps"):
        device_named("meta")
    assert device_named("cpu").type == "cpu"


# Networks that attacks cannot follow


BLIND = ["argmax", "no_grad", "inference_mode", "integers"]


@pytest.mark.parametrize("option", BLIND)
def test_a_network_without_a_gradient_is_named_and_can_be_attacked_without(option, few):
    model = Seen(option)
    for attack in (pgd_threat(0.1, 1), [apgd_ce(0.1, steps=2)], tier("full", 0.1, 3).attacks):
        with pytest.raises(NoGradientError, match=r"Gradient attacks cannot see through this network.*--tier blackbox"):
            evaluate(model, few, attack)
    with pytest.raises(NoGradientError):
        sweep(model, few, "steps", [1])
    with pytest.raises(NoGradientError):
        transfer({"a": model, "b": Seen()}, few)
    assert evaluate(model, few, [square(0.4, queries=50)]).robust.correct < 24
    assert pass_seconds(model, few) > 0
    (only_one,) = tier("blackbox", 0.1, 3).attacks
    assert only_one.name == "Square"


@pytest.mark.parametrize("option", ["nan", "nan away from the data"])
@pytest.mark.parametrize(
    "attack", [pgd_threat(0.1, 3), [apgd_ce(0.1, steps=3)], [square(0.1, queries=9)]], ids=("pgd", "apgd", "square")
)
def test_scores_that_are_not_finite_are_no_accuracy(option, attack, few):
    model = Seen(option)
    with pytest.raises(InputError, match="not finite"):
        evaluate(model, few, attack)
    if not isinstance(attack, list):
        with pytest.raises(InputError, match="not finite"):
            sweep(model, few, "eps", [0, 0.1])
        with pytest.raises(InputError, match="not finite"):
            transfer({"a": model, "b": Seen()}, few)


def test_what_a_network_raises_or_returns_is_named(few):
    with pytest.raises(InputError, match=r"raised ValueError: what \[/x\] is this\? on images of shape 2x1x12x12"):
        check_fits(Seen("raises"), few, "cpu")
    for run in (evaluate, trust):
        with pytest.raises(InputError, match="returned 1 rows of class scores for 2 images"):
            run(Seen("half of the batch"), few)
    with pytest.raises(InputError, match="b: The network raised ValueError"):
        transfer({"a": Seen(), "b": Seen("raises")}, few)
    for keys in ({"batch_size": 0}, {"batch_size": 1.5}, {"batch_size": True}):
        with pytest.raises(InputError):
            evaluate(Seen(), few, pgd_threat(0.1, 1), **keys)


def test_probabilities_in_place_of_logits_are_warned_of(few):
    soft = Seen("softmax")
    for run in (
        lambda: evaluate(soft, few, pgd_threat(0.1, 1)),
        lambda: sweep(soft, few, "eps", [0, 0.1]),
        lambda: transfer({"a": soft, "b": Seen()}, few, pgd_threat(0.1, 1)),
        lambda: CLAT(soft, k=1).select(few.pixels.float() / 255, few.labels),
    ):
        with pytest.warns(UserWarning, match="probabilities, not logits.*before the softmax"):
            run()


@pytest.mark.parametrize("hidden", ["rounded", "a threshold"])
def test_a_gradient_that_is_zero_is_warned_of(hidden, few):
    class Hidden(Seen):
        def forward(self, x):
            return super().forward((x * 8).round() / 8 if hidden == "rounded" else (x > 0.5).to(x) + 0 * x)

    with pytest.warns(UserWarning, match="gradient of exactly zero.*see clat trust"):
        evaluate(Hidden(), few, pgd_threat(0.1, 1))


def test_commands_print_a_warning_of_clat_once_and_leave_others_as_they_are(few, capsys):
    def warn_twice():
        with shared.sentences_for_warnings():
            check_fits(Seen("softmax"), few, "cpu")
            check_fits(Seen("softmax"), few, "cpu")
            warnings.warn("another's", stacklevel=1)

    with pytest.warns(UserWarning, match="another's"):
        warn_twice()
    said = capsys.readouterr().err
    assert said.startswith("Warning: The network returns probabilities, not logits.")
    assert said.count("\n") == 1


# The commands


@pytest.fixture
def checkpoint(tmp_path):
    """In a folder whose name is markup, an escape sequence and a line break."""
    path = tmp_path / HOSTILE / "best.safetensors"
    path.parent.mkdir(parents=True)
    save_checkpoint(path, build_model("rn18", 10, channels=1, width=2))
    return str(path)


@pytest.fixture
def data(monkeypatch):
    real = shared.load_data

    def few(source, split="train", **options):
        found = real(source, split, **options)
        classes = (HOSTILE, *found.classes[1:])
        return Dataset(found.pixels[:12], found.labels[:12], classes, HOSTILE, found.split)

    monkeypatch.setattr(shared, "load_data", few)
    return ["--data", "fashion-mnist-mini", "--device", "cpu"]


def commands(network: str) -> dict[str, list[str]]:
    return {
        "evaluate": ["evaluate", network, "--limit", "4", "--steps", "1", "--starts", "1", "--workers", "0"],
        "sweep": ["sweep", network, "--limit", "4", "--over_eps", "0.1", "--over_steps", "none", "--steps", "1"],
        "trust": ["trust", network, "--limit", "2", "--budget", "0.05", "--batch-size", "2"],
        "layers": ["layers", network, "--batch", "2", "--steps", "1"],
    }


@pytest.mark.parametrize("command", ["evaluate", "sweep", "trust", "layers", "transfer"])
def test_nothing_from_a_file_or_a_name_is_markup_or_steers_the_terminal(command, checkpoint, data, tmp_path, capsys):
    call = commands(checkpoint).get(command)
    if command == "transfer":
        other = tmp_path / "other[/y]" / "best.safetensors"
        other.parent.mkdir(parents=True)
        save_checkpoint(other, build_model("rn18", 10, channels=1, width=2))
        call = ["transfer", checkpoint, str(other), "--limit", "4", "--steps", "1", "--batch_size", "2"]
    code = cli.main([*call, *data])
    printed = capsys.readouterr()
    assert code == (1 if command == "trust" else 0), printed.err
    assert "\x1b" not in printed.out
    said = " ".join(printed.out.split())
    assert "Device cpu, precision fp32, split " in said
    assert "10 classes (a[/x]b\\x1b[31m\\x0ac," in said
    if command == "trust":
        assert said.startswith("Verdict: ")
        assert "threshold" not in said
    if command == "evaluate":
        assert cli.main([*call, *data]) == 0
        assert "Read from the record" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["evaluate", "sweep", "trust", "layers"])
def test_a_device_that_is_not_here_and_a_process_beside_the_first(command, checkpoint, data, capsys, monkeypatch):
    call = [*commands(checkpoint)[command], *data[:2]]
    assert cli.main([*call, "--device", "cuda:77"]) == 2
    assert "The device cuda:77 is not here" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(shared, "_first", False)
    assert cli.main(call) == 0
    printed = capsys.readouterr()
    assert printed.err == "clat: process 1 ends; evaluations run in the first one alone.\n"
    assert printed.out == ""
    assert not os.path.exists(os.path.join(os.path.dirname(checkpoint), "evaluations"))


# Tables at 80 columns


def lines(table) -> list[str]:
    console = Console(width=80, markup=True, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return capture.get().splitlines()


def test_names_are_folded_from_the_left():
    table = layer_table(
        [
            {"rank": 1, "index": 11, "name": f"network.{'stages.' * 9}layer4.1.conv2", "criticality": 1.0, "note": "",
             "weakness": 0.1, "parameters": 12_345_678},
            {"rank": 2, "index": 1, "name": "network.conv[/x]\x1b", "criticality": 1.0, "note": "",
             "weakness": 0.1, "parameters": 12},
        ],
        13_000_000,
        HOSTILE,
    )  # fmt: skip
    shown = lines(table)
    assert len(shown) == 4
    assert shown[0].rstrip() == "a[/x]b\\x1b[31m\\x0ac"
    assert "ges.layer4.1.conv2 " in shown[2]
    assert " ..." in shown[2]
    assert "network" not in "".join(shown)
    assert "conv[/x]\\x1b" in shown[3]
    assert lines(Name("x" * 200)) == ["..." + "x" * 77]


def test_the_bar_of_an_attack_shows_any_name():
    terminal = io.StringIO()
    with showing(Console(file=terminal, force_terminal=True, width=120)) as progress:
        progress(Progress(HOSTILE, 1, 1, 2, 3, 0))
    assert "a[/x]b\\x1b[31m\\x0ac (1 of 1)" in terminal.getvalue()


def test_the_picture_shows_any_name(few, tmp_path):
    draw_curves([{r"a[/x]$\b$": sweep(Seen(), few, "eps", [0, 0.1])}], tmp_path / "curve.svg")
    assert r"<!-- a[/x]$\b$ -->" in (tmp_path / "curve.svg").read_text()


def test_a_layer_may_be_named_as_tables_show_it(tiny, few):
    found = named_layers(tiny, few.pixels[:1] / 255, ["layer3.0.conv1", "network.conv1"])
    assert list(found) == ["network.layer3.0.conv1", "network.conv1"]
    with pytest.raises(InputError, match="no layer 'layer9'"):
        named_layers(tiny, few.pixels[:1] / 255, ["layer9"])


def test_networks_are_told_apart_in_a_narrow_table(few):
    names = [f"/some/long/folder/of/runs/{name}/best.safetensors" for name in ("one", "two[/x]", "three", "four")]
    assert [name.text for name in apart(names)] == ["one", "two[/x]", "three", "four"]
    assert [name.text for name in apart(["a/x", "a"])] == ["a/x", "a"]
    assert [name.text for name in apart(names[:1])] == names[:1]
    found = transfer({name: Seen() for name in names}, few, tier("quick", 0.1, 3, steps=1, starts=1).attacks[0])
    curve = sweep(Seen(), few, "eps", [0, 0.1])
    for table in (transfer_table(found), sweep_table(dict.fromkeys(names, curve))):
        shown = lines(table)
        assert max(map(len, shown)) <= 80
        assert all(name in shown[0] for name in ("one", "two[/x]", "three", "four"))
        assert f"{100 * found.clean[0].value:.2f} % ({found.clean[0].correct})" in shown[1]
        assert "[" in shown[2]


def test_a_verdict_and_a_status_fit(few, tmp_path):
    verdict = trust(nn.Sequential(nn.Conv2d(1, 3, 12), nn.Flatten()), few, limit=4, checks=[])
    assert verdict.text.startswith("not enough was checked: clean-accuracy, ")
    assert not verdict.ok
    for thresholds in (False, True):
        assert all(len(line) <= 80 for line in lines(trust_table(verdict, HOSTILE, thresholds=thresholds)))

    class Run:
        folder, epoch, selections = tmp_path / HOSTILE, 3, ()

    layer = LayerStatus(f"network.{'a.' * 40}conv2", "irregular", 12_345_678, "never selected, but it [/x] moved")
    shown = lines(status_table([layer], Run()))
    assert all(len(line) <= 80 for line in shown)
    assert "a.a.conv2 " in " ".join(shown)
    assert "[/x]" in "".join(shown)


def test_long_lists_of_classes_are_cut(few):
    many = Dataset(few.pixels, few.labels, tuple(map(str, range(100))), "d", "test")
    measured = Measured.of([Seen()], many, seed=0, batch_size=9, device="cpu")
    assert assumed(measured, many).endswith("100 classes (0, 1, 2, ...)")
