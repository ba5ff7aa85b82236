"""Planted failures, each of which trust must find and name, and sound networks, on which it must keep quiet."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clat import InputError, trust
from clat.attacks import apgd_ce
from clat.checkpoint import save_checkpoint
from clat.cli.main import main
from clat.compute import native_precision
from clat.data.dataset import Dataset, to_unit
from clat.data.loading import load_data
from clat.evaluation.trust import Verdict
from clat.evaluation.trust.attack_checks import beaten_by
from clat.evaluation.trust.battery import CHECKS, NEEDED
from clat.evaluation.trust.check import Check, grade
from clat.layers import find_layers
from clat.models import MODELS, build_model
from clat.models.spec import OPTIONS
from clat.network import same_bits, snapshot
from clat.threat import Threat, ascend

MEAN, STD = 0.29, 0.33  # of the pixels
EARLY = CHECKS[: [check.id for check in CHECKS].index("square")]


class Do(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def normalise(x: Tensor) -> Tensor:
    return (x - MEAN) / STD


def network() -> nn.Sequential:
    return nn.Sequential(
        Do(normalise),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def half_size(split: str, images: int) -> Dataset:
    data = load_data(split=split)
    small = F.avg_pool2d(data.pixels[:images].float(), 2).round().to(torch.uint8)
    return replace(data, pixels=small, labels=data.labels[:images])


def trained(model: nn.Sequential, data: Dataset, threat: Threat | None, epochs: int, lr: float = 0.1) -> nn.Sequential:
    """Trained on clean images, or on those of an attack."""
    torch.manual_seed(0)
    for module in model:
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    x, y, size = to_unit(data.pixels), data.labels, 64
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * (len(x) // size))
    for _ in range(epochs):
        for part in torch.randperm(len(x))[: len(x) // size * size].split(size):
            images, labels = x[part], y[part]
            if threat is not None:
                cost = lambda z, labels=labels: F.cross_entropy(model(z), labels, reduction="none")
                images = ascend(cost, images, threat, model=model)
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@pytest.fixture(scope="module")
def training() -> Dataset:
    return half_size("train", 1500)


@pytest.fixture(scope="module")
def test_images() -> Dataset:
    return half_size("test", 400)


@pytest.fixture(scope="module")
def undefended(training) -> nn.Sequential:
    return trained(network(), training, None, 3)


@pytest.fixture(scope="module")
def pgd_at(training) -> nn.Sequential:
    return trained(network(), training, Threat(eps=0.1, step=0.03, steps=5), 3)


def failed(verdict: Verdict) -> set[str]:
    return {finding.check for finding in verdict.findings if finding.status == "fail"}


def finding(verdict: Verdict, check: str):
    return next(found for found in verdict.findings if found.check == check)


# Sound networks


def test_no_false_alarm_on_a_pgd_at_network(pgd_at, undefended, test_images):
    verdict = trust(pgd_at, test_images, 0.1, base=undefended, limit=100)
    assert failed(verdict) == set(), verdict.text
    assert verdict.ok
    skipped = [found.check for found in verdict.findings if found.status == "skipped"]
    assert skipped == ([] if native_precision("cpu") == "bf16" else ["precision"])
    ran = len(CHECKS) - len(skipped)
    assert re.match(rf"no sign of masking found by {ran} checks \({len(skipped)} skipped\)", verdict.text)
    assert "verified" not in verdict.text
    assert verdict.robust.correct < verdict.clean.correct - 10  # the attacks do attack
    json.dumps(verdict.to_json(), allow_nan=False)


def test_a_network_that_is_merely_not_robust_passes(undefended, test_images):
    verdict = trust(undefended, test_images, 0.1, limit=100)
    assert verdict.ok, verdict.text
    assert verdict.robust.value < 0.3


def test_the_l2_ball(pgd_at, test_images):
    verdict = trust(pgd_at, test_images, 1.0, "l2", limit=50)
    assert verdict.ok, verdict.text
    assert finding(verdict, "square").measured == "pyautoattack's l2 Square does not take images of 14 pixels"
    assert verdict.robust.correct < verdict.clean.correct


# Planted failures


class Awake(nn.Dropout):
    """A dropout layer that eval() does not reach."""

    def train(self, mode: bool = True) -> nn.Module:
        return super().train(True)


class Counter(nn.Module):
    """Keeps a running mean in eval mode, too."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.lerp_(x.mean().reshape(1), 0.5)
        return x


def resized(x: Tensor) -> Tensor:
    size = int(torch.randint(10, 15, ()))
    left = int(torch.randint(0, 15 - size, ()))
    return F.pad(F.interpolate(x, size=(size, size)), (left, 14 - size - left) * 2)


def purified(x: Tensor) -> Tensor:
    with torch.enable_grad():
        z = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad((z[..., 1:] - z[..., :-1]).square().sum(), z)
    return x - 0.01 * gradient


def quantised(x: Tensor) -> Tensor:
    return (7 * x).round() / 7


def dropped(x: Tensor) -> Tensor:
    return F.dropout(x, 0.3, training=True)


class Remembering(nn.Module):
    """Repeats the answer for an image near one it has seen, while the gradient stays that of the network."""

    def __init__(self, network: nn.Module, copyable: bool = True):
        super().__init__()
        self.network, self.radius = network, 0.25
        memory: list = []
        self.seen = memory if copyable else None
        self.elsewhere = (lambda: memory) if not copyable else None

    def forward(self, x: Tensor) -> Tensor:
        seen = self.elsewhere() if self.seen is None else self.seen
        scores = self.network(x)
        answers = []
        for image, score in zip(x.detach(), scores, strict=True):
            near = ((kept, answer) for kept, answer in seen if (kept - image).abs().max() <= self.radius)
            found = next(near, None)
            if found is None:
                seen.append((image, score.detach()))
            answers.append(score if found is None else score + (found[1] - score).detach())
        return torch.stack(answers)


PLANTED = {
    "random resizing": (lambda m: [Do(resized), *m], {"deterministic"}, "0 (Do)"),
    "dropout that ignores eval": (lambda m: [*m[:-1], Awake(0.3), m[-1]], {"deterministic", "mode"}, "8 (Awake)"),
    "functional dropout": (lambda m: [*m[:-1], Do(dropped), m[-1]], {"deterministic"}, "8 (Do)"),
    "probabilities": (lambda m: [*m, nn.Softmax(1)], {"logits"}, "probabilities"),
    "argmax": (
        lambda m: [*m, Do(lambda scores: F.one_hot(scores.argmax(1), 10))],
        {"logits", "gradients"},
        "Gradient attacks cannot see through this network",
    ),
    "normalised outside": (lambda m: m[1:], {"normalisation"}, "normalised to mean and std of the data"),
    "normalised twice": (lambda m: [Do(lambda x: 2 * x - 1), *m], {"normalisation"}, "seems to normalise twice"),
    "no backward pass": (lambda m: [Do(torch.detach), *m], {"gradients"}, "the backward pass fails"),
    "infinite slope": (lambda m: [Do(lambda x: x.sqrt().square()), *m], {"gradients"}, "cross-entropy 0 zero"),
    "optimises at inference": (lambda m: [Do(purified), *m], {"static"}, "calls autograd 1 times"),
    "moving buffer": (lambda m: [Counter(), *m], {"mode"}, "0.mean"),
    "batch statistics": (
        lambda m: [m[0], nn.BatchNorm2d(1, affine=False, track_running_stats=False), *m[1:]],
        {"batch"},
        "in a batch of 100",
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_failure_is_named_and_no_other(name, pgd_at, test_images):
    plant, checks, says = PLANTED[name]
    verdict = trust(nn.Sequential(*plant(list(pgd_at))).eval(), test_images, 0.1, limit=100, checks=EARLY)
    assert failed(verdict) == checks, verdict.text
    assert any(says in found.measured for found in verdict.findings if found.status == "fail")
    assert not verdict.ok
    assert all(f"({check})" in verdict.text for check in checks)
    opening = "the evaluation is not valid, because" if "normalisation" in checks else "robustness is overstated"
    assert verdict.text.startswith(opening)


@pytest.mark.parametrize("copyable", [True, False])
def test_a_network_that_repeats_its_answer_near_what_it_has_seen(copyable, pgd_at, test_images):
    stateful = Remembering(pgd_at, copyable=copyable).eval()
    few = [check for check in CHECKS if check.id in ("clean-accuracy", "batch", "state", "gradients", "attack")]
    verdict = trust(stateful, test_images, 0.1, limit=30, checks=few)
    assert failed(verdict) == {"state"}, verdict.text
    assert verdict.robust == verdict.clean  # every attack fails
    evidence = finding(verdict, "state").evidence
    assert evidence["changed" if copyable else "repeated"] > 5
    assert "depend on what it saw before, or repeat themselves around an image (state)" in verdict.text


def test_a_quantising_front(undefended, test_images):
    masked = nn.Sequential(Do(quantised), undefended)
    verdict = trust(masked, test_images, 0.1, base=undefended, limit=100)
    assert {"gradients", "square", "transfer", "large-eps"} <= failed(verdict)
    assert finding(verdict, "gradients").evidence["margin"]["zero"] == verdict.clean.correct
    after_pgd = verdict.clean.correct - finding(verdict, "attack").evidence["broken"]
    assert verdict.robust.correct < after_pgd - 20  # Square and transfer broke the rest


def test_saturating_logits(undefended, test_images):
    saturated = nn.Sequential(undefended, Do(lambda scores: 1000 * scores))
    verdict = trust(saturated, test_images, 0.1, limit=100, checks=EARLY)
    assert failed(verdict) == {"gradients", "loss-gap"}
    evidence = finding(verdict, "gradients").evidence
    assert evidence["cross-entropy"]["zero"] > 50
    assert evidence["margin"]["zero"] == 0


def test_catastrophic_overfitting(training):
    wide = [layer for n in (196, 256) for layer in (nn.Linear(n, 256), nn.BatchNorm1d(256), nn.ReLU())]
    model = nn.Sequential(Do(normalise), nn.Flatten(), *wide, nn.Linear(256, 10))
    few = training.subset(torch.arange(128))
    verdict = trust(trained(model, few, Threat(eps=0.3, step=0.3, steps=1, start="zero"), 150), few, 0.3, limit=100)
    assert failed(verdict) == {"catastrophic-overfitting"}, verdict.text
    assert "FGSM overstates" in verdict.text
    evidence = finding(verdict, "catastrophic-overfitting").evidence
    assert evidence["after_fgsm"] > evidence["after_pgd"] + 30


def test_chance_level(test_images):
    verdict = trust(network().eval(), test_images, 0.1, limit=50, checks=CHECKS[:1])
    assert failed(verdict) == {"clean-accuracy"}
    assert verdict.robust is None  # nothing attacked it


# Budget, records and refusals


def test_what_does_not_fit_the_budget_is_skipped_and_said(pgd_at, test_images):
    dear = [replace(check, passes=1e9) if check.id in ("square", "steps") else check for check in CHECKS]
    dear = [check for check in dear if check.id in ("gradients", "attack", "loss-gap", "square", "steps", "optimised")]
    verdict = trust(pgd_at, test_images, 0.1, limit=20, checks=dear)
    assert verdict.text.startswith("not enough was checked: clean-accuracy, ")  # left out
    assert "large-eps, steps skipped; raise the budget" in verdict.text
    assert not verdict.ok
    assert re.fullmatch(r"needs [\d.]+ min, (10\.0|9\.9) min left", finding(verdict, "square").measured)
    assert finding(verdict, "optimised").measured == "needs steps, which did not run"


def test_a_budget_too_short_for_any_attack_is_refused(pgd_at, test_images):
    with pytest.raises(InputError, match="raise budget or lower limit"):
        trust(pgd_at, test_images, 0.1, limit=100, budget=0)


def test_it_leaves_no_trace_and_repeats(pgd_at, test_images):
    before, mode = snapshot(pgd_at), pgd_at.training
    torch.manual_seed(3)
    first = trust(pgd_at, test_images, 0.1, limit=20, checks=EARLY, seed=1)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), drawn)
    second = trust(pgd_at, test_images, 0.1, limit=20, checks=EARLY, seed=1)
    assert [found.evidence for found in first.findings] == [found.evidence for found in second.findings]
    assert pgd_at.training == mode
    assert all(parameter.requires_grad for parameter in pgd_at.parameters())
    assert all(same_bits(tensor, before[name]) for name, tensor in snapshot(pgd_at).items())


def test_a_check_of_ones_own_is_one_entry(undefended, test_images):
    own = Check(
        id="longer",
        title="more steps of another attack break nothing",
        threshold="fail if significantly more than 0.2 points",
        source="ours",
        flaw="another attack breaks more",
        run=beaten_by(lambda s: apgd_ce(s.threat.radius, s.threat.norm, steps=3, seed=s.seed)),
        passes=4,
    )
    verdict = trust(undefended, test_images, 0.1, limit=50, checks=[own])  # no attack ran before it
    assert failed(verdict) == {"longer"}
    assert finding(verdict, "longer").evidence["broken"] > 10


def changed(check: str, **limits: float) -> list[Check]:
    """The checks up to this one, which has other limits."""
    until = CHECKS[: [each.id for each in CHECKS].index(check) + 1]
    return [*until[:-1], replace(until[-1], limits={**until[-1].limits, **limits})]


@pytest.mark.parametrize(
    ("check", "limits", "status", "words"),
    [
        ("clean-accuracy", {"times": 9.9}, "fail", "fail at or below 9.9 times chance"),
        ("logits", {"within": 1e3}, "fail", "sum to 1, each within 1000"),
        ("batch", {"apart": -1}, "fail", "differ by over -1 (l2)"),
        ("state", {"repeats": -1}, "fail", "if over -1 % repeat"),
        ("attack", {"outside": -9}, "fail", "leaves the ball by -9"),
    ],
)
def test_one_number_is_the_threshold_and_its_words(check, limits, status, words, undefended, test_images):
    plain, other = (
        finding(trust(undefended, test_images, 0.1, limit=20, checks=checks), check)
        for checks in (changed(check), changed(check, **limits))
    )
    assert plain.status == "pass"
    assert words not in plain.threshold
    assert other.status == status
    assert words in other.threshold


def test_every_limit_stands_in_the_words_of_its_check():
    for check in CHECKS:
        for name in check.limits:
            assert "1234.5" in replace(check, limits={**check.limits, name: 1234.5}).words, (check.id, name)


@pytest.mark.parametrize(
    ("count", "n", "tolerance", "status"),
    [
        (0, 200, 0.002, "pass"),
        (2, 200, 0.002, "warn"),
        (3, 200, 0.002, "fail"),
        (2, 20, 0.002, "warn"),  # significant, but two images
        (2, 1000, 0.002, "pass"),
        (5, 1000, 0.002, "warn"),
        (6, 1000, 0.002, "fail"),
        (4, 200, 0.005, "fail"),
        (28, 10_000, 0.002, "warn"),
        (9_000, 10_000, 0.002, "fail"),
    ],
)
def test_counts_are_graded_by_the_binomial_test(count, n, tolerance, status):
    # scipy 1.17, binomtest(k, n, tolerance, "greater").pvalue: 0.0078 at 3 of 200, 0.0525 at 5 of 1,000
    assert grade(count, n, tolerance) == status


# The command and the page


def quantised_factory(classes: int, channels: int) -> nn.Module:  # noqa: ARG001
    return nn.Sequential(Do(quantised), network())


def sound_factory(classes: int, channels: int) -> nn.Module:  # noqa: ARG001
    return network()


@pytest.mark.parametrize(("factory", "code"), [("sound_factory", 0), ("quantised_factory", 1)])
def test_the_command(factory, code, undefended, test_images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("clat.cli.shared.load_data", lambda source, split: test_images)
    monkeypatch.setitem(MODELS, factory, globals()[factory])  # a file may name a network of the library
    monkeypatch.setitem(OPTIONS, factory, {})
    model = build_model(factory, 10, channels=1)
    target = model.network if code == 0 else model.network[1]
    target.load_state_dict(undefended.state_dict())
    path, out = str(tmp_path / "net.safetensors"), tmp_path / "trust.json"
    save_checkpoint(path, model)
    arguments = ["trust", path, "--data", "x", "--eps", "0.1", "--limit", "20", "--budget", "5", "--base", path]
    assert main([*arguments, "--json", str(out)]) == code
    printed = capsys.readouterr().out
    verdict = json.loads(out.read_text())
    assert verdict["ok"] is (code == 0)
    assert "Verdict: " + verdict["text"] in " ".join(printed.split())
    assert all(check.id in printed for check in CHECKS)
    assert all(len(line) <= 120 for line in printed.splitlines() if "clat report" not in line)  # a command to copy
    assert [found["check"] for found in verdict["findings"]] == [check.id for check in CHECKS]


def test_bad_input_to_the_command(capsys):
    assert main(["trust", "nowhere", "--data", "fashion-mnist-mini"]) == 2
    assert "There is no model 'nowhere'" in capsys.readouterr().err


def test_checks_come_after_what_they_need():
    seen: set[str] = set()
    for check in CHECKS:
        assert check.id not in seen
        assert set(check.needs) <= seen, check.id
        seen.add(check.id)


def test_the_documents_show_the_words_of_every_check():
    text = (Path(__file__).parents[1] / "docs/trust.md").read_text()
    for check in CHECKS:
        assert "{" not in check.words
        assert f"| `{check.id}` | {check.title} | {check.words} | {check.source} |" in text
    assert set(NEEDED) < {check.id for check in CHECKS}
    assert f"A verdict needs these checks:\n\n<!-- made by make docs: needed checks -->\n`{NEEDED[0]}`" in text


def test_the_adaptive_attack_goes_through_the_layers_that_are_named(pgd_at, test_images):
    known = list(find_layers(pgd_at, test_images.pixels[:1] / 255))
    checks = [check for check in CHECKS if check.id in ("gradients", "attack", "loss-gap", "adaptive")]
    for wanted in ((), known[2:4]):
        verdict = trust(pgd_at, test_images, 0.1, layers=wanted, limit=40, checks=checks)
        settings = next(f for f in verdict.findings if f.check == "adaptive").evidence["settings"]
        assert set(settings["layers"]) <= set(known)
        assert not wanted or settings["layers"] == wanted
    with pytest.raises(InputError, match="no layer 'nope'"):
        trust(pgd_at, test_images, 0.1, layers=["nope"])
