"""What is done for speed changes no result, for any of the paper's networks."""

import importlib
import io
import json
import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

from clat.batchnorm import fixed_norms
from clat.compute import autocast, choose, in_words, layout_of
from clat.errors import InputError
from clat.features import observe, record
from clat.layers import trace
from clat.models import build_model
from clat.objectives import Clat
from clat.threat import Threat, ascend
from clat.training.train import train
from conftest import network
from test_train import CLAT

SMALL = {
    "rn18": {"width": 8},
    "rn50": {"width": 8},
    "dn121": {"growth": 8, "blocks": (2, 2, 3, 1)},
    "vgg19": {"width": 8, "hidden": 8, "dropout": 0.0},
    "preactrn18": {"width": 8},
    "wrn34-10": {"depth": 10, "width": 1},
    "wrn70-16": {"depth": 16, "width": 1, "padding": "asymmetric", "activation": "silu"},
    "rawrn70-16": {"blocks": (2, 1, 1), "widths": (8, 16, 24), "stem": 8},
}
THREAT = Threat(eps=0.1, step=0.05, steps=2)


def ready(name: str) -> tuple[nn.Module, list[str]]:
    """A network with its own statistics (else VGG's features fade to rounding), two layers in the middle training."""
    torch.manual_seed(0)
    model = build_model(name, 10, **SMALL[name])
    model.train()
    with torch.no_grad():
        for _ in range(20):
            model(torch.rand(8, 3, 32, 32))
    names = [call.name for call in trace(model.eval(), torch.rand(1, 3, 32, 32)) if call.index]
    chosen = [names[len(names) // 3], names[len(names) // 2]]
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter_name.startswith(tuple(f"{layer}." for layer in chosen)))
    return model, chosen


def plain_distance(model: nn.Module, chosen: list[str], x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Eq. 7, each pass through the whole network."""
    return sum(
        (second - first).flatten(1).norm(dim=1)
        for first, second in zip(features(model, chosen, x), features(model, chosen, z), strict=True)
    )


def features(model: nn.Module, chosen: list[str], x: torch.Tensor) -> list[torch.Tensor]:
    found = []
    handles = [
        model.get_submodule(layer).register_forward_hook(lambda _m, _i, output: found.append(output.clone()))
        for layer in chosen
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return found


def flat(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.cat([part.flatten() for part in parts])


def close(first: torch.Tensor, second: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return bool((first - second).norm() <= tolerance * second.norm())


@pytest.mark.parametrize("name", SMALL)
def test_the_cut_off_pass_has_the_loss_and_gradients_of_the_whole_one(name):
    model, chosen = ready(name)
    x, y = torch.rand(4, 3, 32, 32), torch.arange(4)
    z = THREAT.first(x)
    objective = Clat(attack="feature", weight=0.5)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    fast = sum(objective.loss(model, x, z, y).values())
    slow = F.cross_entropy(model(z), y) + 0.5 * plain_distance(model, chosen, x, z).mean()
    assert close(fast, slow)
    assert close(*(flat(torch.autograd.grad(loss, trained)) for loss in (fast, slow)))


@pytest.mark.parametrize("name", SMALL)
def test_the_cut_off_attack_climbs_as_the_whole_one(name):
    model, chosen = ready(name)
    x, y = torch.rand(4, 3, 32, 32), torch.arange(4)
    objective = Clat(attack="feature")
    found = []
    for _ in range(2):  # the first pass for the clean features runs to the end, the second one stops
        torch.manual_seed(1)
        found.append(objective.perturb(model, x, y, THREAT))
        objective.loss(model, x, found[0], y)
    torch.manual_seed(1)
    slow = ascend(lambda z: plain_distance(model, chosen, x, z), x, THREAT, model=model)
    assert torch.equal(*found)
    # A sign may turn over where a gradient is all but zero.
    assert ((found[0] - slow).abs() > 1e-6).float().mean() < 1e-3


@pytest.mark.parametrize("name", SMALL)
def test_channels_last_has_the_loss_and_gradients_of_the_default_layout(name):
    x, y = torch.rand(4, 3, 32, 32), torch.arange(4)
    found = []
    model, _ = ready(name)
    model.requires_grad_(True)
    for layout in (torch.channels_last, torch.contiguous_format):
        model.to(memory_format=layout)
        z = x.clone().requires_grad_()
        loss = F.cross_entropy(model(z), y)
        found.append([loss, *torch.autograd.grad(loss, [z, *model.parameters()], allow_unused=True)])
    pairs = [(a, b) for a, b in zip(*found, strict=True) if b is not None]
    assert len(pairs) > 10
    assert close(*pairs[0])
    assert close(*(flat(side) for side in zip(*pairs[1:], strict=True)))


@pytest.mark.parametrize("name", SMALL)
def test_fixed_norms_have_the_loss_and_gradient_of_batch_norm(name):
    model, _ = ready(name)
    y, found = torch.arange(4), []
    x = torch.rand(4, 3, 32, 32)
    for context in (fixed_norms(model), nullcontext()):
        z = x.clone().requires_grad_()
        with context:
            loss = F.cross_entropy(model(z), y)
            found.append((loss, *torch.autograd.grad(loss, z)))
    assert all(close(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_are_followed_through_fixed_norms(precision):
    model, chosen = ready("rn18")
    x = torch.rand(2, 3, 32, 32)
    modules = {layer: model.get_submodule(layer) for layer in chosen}
    with autocast("cpu", precision):
        _, plain = record(model, x, modules, at="activation")
        with fixed_norms(model):
            _, fixed = record(model, x, modules, at="activation")
            _, raw = record(model, x, modules)
    assert all(close(fixed[number], plain[number]) for number in plain)
    assert not any(close(raw[number], plain[number]) for number in plain)


def test_fixed_norms_keep_no_features_and_go_away():
    norm = nn.BatchNorm2d(3).eval().requires_grad_(False)
    x = torch.rand(2, 3, 4, 4, requires_grad=True)

    def kept() -> set[torch.Size]:
        sizes = set()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.add(t.shape), t)[1], lambda t: t):
            norm(x * 2)
        return sizes

    assert x.shape in kept()
    with fixed_norms(norm):
        assert x.shape not in kept()
    assert "forward" not in vars(norm)


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(3),  # in train mode
        nn.BatchNorm2d(3, track_running_stats=False).eval(),
        nn.SyncBatchNorm(3).eval(),
    ],
)
def test_other_norms_are_left_alone(norm):
    with fixed_norms(norm):
        assert "forward" not in vars(norm)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_fixed_norms_have_the_precision_of_batch_norm(dtype, precision):
    norm = nn.BatchNorm2d(16).eval().requires_grad_(False)
    for tensor in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
        nn.init.uniform_(tensor, 0.1, 3)
    x = torch.randn(4, 16, 8, 8).to(dtype)
    found, kept = [], []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.shape), t)[1], lambda t: t)
    for context in (nullcontext(), fixed_norms(norm)):
        kept.clear()
        z = x.clone().requires_grad_()
        with context, autocast("cpu", precision), hooks:
            output = norm(z)
        (gradient,) = torch.autograd.grad((output.float() * torch.linspace(0, 1, 64).view(8, 8)).sum(), z)
        found.append((output, gradient))
    assert x.shape not in kept
    for usual, fixed in zip(*found, strict=True):
        assert usual.dtype == fixed.dtype == dtype
        assert close(fixed.float(), usual.float(), torch.finfo(dtype).eps)


def test_a_norm_stored_in_bf16_is_fixed_in_fp32():
    norm = nn.BatchNorm2d(16).eval().bfloat16()
    nn.init.uniform_(norm.running_var, 0.1, 3)
    x = torch.randn(4, 16, 8, 8).bfloat16()
    usual = norm(x)
    with fixed_norms(norm):
        assert norm(x).dtype == torch.bfloat16
        assert close(norm(x).float(), usual.float(), 1e-3)


@pytest.mark.parametrize("name", SMALL)
def test_an_attack_in_bf16_keeps_half_the_bytes_of_one_in_fp32(name):
    model, _ = ready(name)
    model.requires_grad_(False)
    y, kept = torch.arange(4), {}

    def bytes_kept(precision: str) -> int:
        kept.clear()
        x = torch.rand(4, 3, 32, 32, requires_grad=True)
        keep = lambda t: (kept.update({t.untyped_storage().data_ptr(): t}), t)[1]
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t)
        with fixed_norms(model), autocast("cpu", precision), hooks:
            F.cross_entropy(model(x), y)
        own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
        features = [t for pointer, t in kept.items() if pointer not in own and t.dim() == 4 and len(t) == 4]
        return sum(t.untyped_storage().nbytes() for t in features)

    assert bytes_kept("bf16") <= 0.6 * bytes_kept("fp32")


def test_features_are_observed_in_a_compiled_network():
    model, chosen = ready("rn18")
    x = torch.rand(2, 3, 32, 32)
    model.compile(backend="eager")
    with torch.no_grad():
        scores = model(x)  # compiles
    found = []
    modules = {layer: model.get_submodule(layer) for layer in chosen}
    assert torch.equal(observe(model, x, modules, lambda number, _: found.append(number)), scores)
    assert found == [0, 1]
    assert len(trace(torch.compile(model, backend="eager"), x)) == 21  # three of them shortcuts


def test_a_compiled_run_trains_as_an_uncompiled_one(blobs, tmp_path, monkeypatch):
    compiled = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda model: compiled(model, backend="aot_eager"))
    runs = []
    for compile in (True, False):
        model = network()
        recipe = replace(CLAT, epochs=2, compile=compile)
        runs.append(train(recipe, model, blobs, out=tmp_path / str(compile)))
        assert model._compiled_call_impl is None
    first, second = ([entry["loss"] for entry in run.metrics] for run in runs)
    assert first == pytest.approx(second, rel=1e-3)


class Viewing(nn.Module):
    """Flattens its features in a way that channels-last forbids."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.line = nn.Linear(4 * 36, 3)

    def forward(self, x):
        return self.line(self.conv(x).view(len(x), -1))


class Fickle(nn.Module):
    """Scores by the layout of its kernels."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)

    def forward(self, x):
        return self.conv(x).mean((2, 3)) * self.conv.weight.stride(1)


class Deep(nn.Sequential):
    """Has a parameter of five dimensions, which torch refuses to store channels-last."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 3))
        self.volume = nn.Parameter(torch.zeros(1, 2, 2, 2, 2))


BATCH = torch.rand(8, 3, 8, 8)


class Narrow(nn.Sequential):
    """Its gradients corrupt memory where oneDNN computes them channels-last."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 1, stride=2), nn.Flatten(), nn.Linear(4 * 16, 3))


def simple() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 3))


@pytest.mark.parametrize("native", ["fp32", "bf16"])
def test_auto_is_settled_by_the_device_and_by_nothing_else(monkeypatch, native):
    monkeypatch.setattr("clat.compute.native_precision", lambda _: native)
    monkeypatch.setattr("time.perf_counter", lambda: pytest.fail("timed"))
    for _ in range(3):
        model = simple()
        assert choose(model, BATCH) == (native, "channels-last")
        assert layout_of(model) == "channels-last"
    assert choose(model, BATCH, "bf16", "contiguous") == ("bf16", "contiguous")
    assert layout_of(model) == "contiguous"
    assert choose(model, BATCH, "fp32", "auto") == ("fp32", "channels-last")


@pytest.mark.parametrize("network", [Viewing, Fickle, Deep, Narrow])
def test_a_layout_that_the_network_does_not_bear_is_not_chosen(network):
    model = network()
    assert choose(model, BATCH, "fp32") == ("fp32", "contiguous")
    assert layout_of(model) == "contiguous"


@pytest.mark.parametrize("network", [Viewing, Fickle, Deep, Narrow])
def test_a_layout_that_is_asked_for_and_not_borne_is_said(network):
    with pytest.raises(InputError, match="leave it auto"):
        choose(network(), BATCH, layout="channels-last")


def test_a_narrow_network_is_built_and_trained_in_the_layout_that_computes_its_gradients():
    model = build_model("rn18", 10, width=4).train()
    F.cross_entropy(model(torch.rand(2, 3, 32, 32)), torch.arange(2)).backward()  # channels-last, the process dies
    assert choose(model, torch.rand(2, 3, 32, 32))[1] == layout_of(model) == "contiguous"
    assert layout_of(build_model("rn18", 10, width=16)) == "channels-last"


def test_a_network_that_draws_in_its_forward_pass_bears_a_layout():
    model = simple()
    model.register_forward_hook(lambda _m, _i, output: output + torch.rand_like(output))
    assert choose(model, BATCH)[1] == "channels-last"


def test_the_choice_leaves_network_and_random_numbers_alone():
    model = build_model("rn18", 3, width=8).train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    choose(model, BATCH)
    assert torch.equal(torch.rand(1), expected)
    assert model.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("settled", "asked", "words"),
    [
        (("fp32", "channels-last"), "auto", "channels-last (--precision fp32 --layout channels-last)"),
        (("bf16", "contiguous"), "contiguous", "bf16, contiguous (--precision bf16 --layout contiguous)"),
        (("fp32", "contiguous"), "auto", "does not work in channels-last (--precision fp32"),
    ],
)
def test_what_was_chosen_is_said_with_the_flags_that_repeat_it(settled, asked, words):
    assert words in in_words(torch.device("cpu"), *settled, asked)


def wide() -> nn.Module:
    """A network that works in channels-last with vectors of 16 numbers too."""
    return build_model("rn18", 3, channels=1, width=16).to(memory_format=torch.contiguous_format)


def test_a_run_keeps_what_was_settled_and_gives_the_network_back_in_its_own_layout(blobs, tmp_path, monkeypatch):
    monkeypatch.setattr("clat.compute.native_precision", lambda _: "fp32")
    model = wide()
    printed = io.StringIO()
    run = train(replace(CLAT, epochs=1), model, blobs, out=tmp_path / "run", console=Console(file=printed, width=200))
    assert (run.recipe["precision"], run.recipe["layout"]) == ("fp32", "channels-last")
    assert layout_of(model) == "contiguous"
    assert "computes in fp32, channels-last (--precision fp32 --layout channels-last)" in printed.getvalue()
    monkeypatch.setattr("clat.compute.native_precision", lambda _: "bf16")
    recipe = run.folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("layout: channels-last", "layout: contiguous"))
    resumed = train(replace(CLAT, epochs=1), wide(), blobs, out=tmp_path / "run", resume=True)
    assert (resumed.recipe["precision"], resumed.recipe["layout"]) == ("fp32", "contiguous")


@pytest.fixture
def bench(monkeypatch):
    """The modules of bench/, by name."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "bench"))
    return importlib.import_module


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_floors_run_in_the_precision_and_layout_of_their_contestants(precision, layout, bench, monkeypatch):
    steps = bench("steps")
    pixels, y = steps.images(2, "cpu")
    seen, kernels = set(), nn.Conv2d._conv_forward

    def watched(conv, x, weight, bias):
        output = kernels(conv, x, weight, bias)
        seen.add((output.dtype, conv.kernel_size == (1, 1) or weight.is_contiguous(memory_format=layout)))
        return output

    monkeypatch.setattr(nn.Conv2d, "_conv_forward", watched)
    made = lambda: steps.network("rn18", "cpu", width=8).to(memory_format=layout)
    keys = {"steps": 1, "precision": precision}
    for contestant in (
        steps.ours(replace(steps.PGD_AT, precision=precision), made(), pixels, y),
        steps.ours(replace(steps.FEATURE, precision=precision), made(), pixels, y, (11,)),
        steps.pgd_at_floor(made(), pixels, y, **keys),
        steps.clat_floor(made(), pixels, y, (11,), feature=True, **keys),
        steps.clat_floor(made(), pixels, y, (11,), feature=False, **keys),
    ):
        seen.clear()
        contestant()
        assert seen == {({"fp32": torch.float32, "bf16": torch.bfloat16}[precision], True)}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_clat_keeps_little_more_than_half_of_what_pgd_at_keeps(bench, precision):
    # of smaller batches the weights are a large part
    kept = bench("memory").kept_memory(16, precision, "cpu", width=8)["bytes"]
    assert max(kept["clat feature"], kept["clat label"]) <= 0.6 * kept["pgd-at"]


def test_the_bench_runs(bench, tmp_path):
    """Slow (10 s alone): real steps of seven contestants; make bench itself takes half an hour."""
    run, times = bench("run"), bench("times")
    small = {"device": "cpu", "batch": 4, "repeats": 2, "width": 8}
    parts = {
        "steps rn18": lambda: times.steps_and_floors("rn18", **small),
        "by depth": lambda: times.by_depth((2, 11), **small),
    }
    target = tmp_path / "bench.json"
    found = run.run(parts, target, "cpu")
    row = found["parts"]["steps rn18"]
    assert {len(seconds) for seconds in row["seconds"].values()} == {2}
    assert 0 < row["clat feature / pgd-at"]["low"] <= row["clat feature / pgd-at"]["high"]
    assert 0 < times.convolutions("cpu", 4, width=8)["share"] < 1
    assert 2**20 < bench("memory").in_own_process("criticality", 4) < 2**30
    parts["steps rn18"] = lambda: pytest.fail("measured twice")
    assert run.run(parts, target, "cpu") == found


def test_the_bench_says_how_long_a_step_waits_for_images(bench, monkeypatch):
    """A slow disk is noticed: each image takes 50 ms more, and nothing reads ahead without workers."""
    from clat.data import decoding

    loading, steps = bench("loading"), bench("steps")
    monkeypatch.setattr(loading, "PHOTO", (48, 64))
    small, fast = "timm/mobilenetv3_small_050", steps.Training(steps.PgdAt(), steps.Whole(), steps.Threat(steps=1))
    usual = loading.waiting(small, fast, "cpu", batch=4, steps=3, workers=0, size=32)
    assert len(usual["seconds"]) == len(usual["waited"]) == 3
    real = decoding.opened
    monkeypatch.setattr(decoding, "opened", lambda entry: time.sleep(0.05) or real(entry))
    slow = loading.waiting(small, fast, "cpu", batch=4, steps=3, workers=0, size=32)
    assert min(slow["waited"]) > 0.2
    assert 0 < usual["share"] < slow["share"] < 1


def test_the_bench_measures_what_its_page_shows(bench):
    """Each part of ``bench/run.py`` is in the committed results, and no other."""
    run, results = bench("run"), Path(__file__).parents[1] / "results"
    for name, parts in {"bench": run.parts("cpu"), "memory": run.memory_parts("cpu")}.items():
        assert set(json.loads((results / f"{name}.json").read_text())["parts"]) == set(parts)


PEERS = {
    "torchattacks": "torchattacks",
    "foolbox": "foolbox",
    "adversarial-robustness-toolbox": "art",
}  # the package and its module


@pytest.mark.parametrize(("package", "module"), PEERS.items())
def test_a_step_with_another_library_attacks_and_trains(package, module, bench):
    """The attacked batch that it trains on is in the ball and costs more than the clean one; the weights move."""
    pytest.importorskip(module, reason=f"{package} is not installed: make bench installs it")
    steps, libraries = bench("steps"), bench("libraries")
    assert set(libraries.PEERS) == set(PEERS)
    model = steps.network("rn18", "cpu", width=8).to(memory_format=torch.contiguous_format)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    pixels, y = steps.images(8, "cpu")
    trained_on = []
    model.register_forward_hook(lambda net, given, _: trained_on.append(given[0].detach()) if net.training else None)
    libraries.PEERS[package](model, pixels, y)()
    assert trained_on
    x, z = pixels.float() / 255, trained_on[-1]
    order = (x.flatten(1)[:, None] - z.flatten(1)[None]).abs().amax(2).argmin(0)  # ART shuffles the batch
    distance = (z - x[order]).abs().amax()
    assert 0.9 * steps.EPS < distance < steps.EPS + 1e-5
    assert all(not torch.equal(tensor, before[name]) for name, tensor in model.named_parameters())


@pytest.mark.parametrize(("package", "module"), PEERS.items())
def test_the_peers_part_times_each_library_beside_this_one(package, module, bench, monkeypatch):
    pytest.importorskip(module, reason=f"{package} is not installed: make bench installs it")
    times = bench("times")
    monkeypatch.setattr(times, "PEERS", {package: times.PEERS[package]})
    row = times.peers("cpu", 4, 2, width=8)
    assert set(row["seconds"]) == {"clat", "clat fp32", package}
    assert {len(seconds) for seconds in row["seconds"].values()} == {2}
    found = row[f"{package} / clat"]
    ratios = [a / b for a, b in zip(row["seconds"][package], row["seconds"]["clat"], strict=True)]
    assert found["low"] == pytest.approx(min(ratios), abs=1e-3)
    assert found["high"] == pytest.approx(max(ratios), abs=1e-3)
    assert set(row["versions"]) == {package}
