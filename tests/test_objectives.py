"""One contract over all objectives, and the values of each against a second formula."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clat.errors import InputError
from clat.network import same_bits, snapshot
from clat.objectives import OBJECTIVES, Clat, FastAt, FreeAt, GradAlign, Mart, PgdAt, Score, Trades
from clat.threat import Threat, ascend

VARIANTS = [
    *[(name, make()) for name, make in OBJECTIVES.items()],
    *[
        (f"clat {keys}", Clat(weight=0.5, **keys))
        for keys in (
            {"cross_entropy": "clean", "attack": "feature"},
            {"attack": "feature"},
            {"cross_entropy": "both"},
            {"distance": "mean"},
            {"distance": "relative", "attack": "feature"},
            {"at": "activation"},
        )
    ],
    ("trades, one pass and a detached target", Trades(gradient_through_target=False, second_clean_forward=False)),
    ("score in the form pgd-at", Score(form="pgd-at")),
]
every_objective = pytest.mark.parametrize("objective", [o for _, o in VARIANTS], ids=[name for name, _ in VARIANTS])
PRECISIONS = pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])


def select(model, *names):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(tuple(n + "." for n in names)))


def attack(objective, norm="linf"):
    """A threat model that the objective takes."""
    one_step = isinstance(objective, (FastAt, FreeAt, GradAlign))
    start = "zero" if isinstance(objective, GradAlign) else "uniform"
    return Threat(eps=0.1, step=0.1 if one_step else 0.05, steps=1 if one_step else 3, norm=norm, start=start)


@every_objective
@PRECISIONS
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_contract(objective, bf16, norm, plain, images):
    """Ball, box, mode, buffers, gradients and requires_grad are kept; the same seed costs the same."""
    if norm == "l2" and isinstance(objective, GradAlign):
        pytest.skip("defined for linf")
    objective = replace(objective)
    x, y = images
    select(plain, "first", "second")
    plain.eval()
    plain.first_norm.train()
    threat = attack(objective, norm)
    before, flags = snapshot(plain), [module.training for module in plain.modules()]
    wanted = [parameter.requires_grad for parameter in plain.parameters()]
    costs = []
    for _ in range(2):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
            x_adv = objective.perturb(plain, x, y, threat)
            assert x_adv.dtype == torch.float32
            assert not x_adv.requires_grad
            plain.eval()
            terms = objective.loss(plain, x, x_adv, y)
            plain.first_norm.train()
        costs.append(torch.stack(list(terms.values())).sum())
    assert threat.distance(x_adv, x).max() <= 0.1 + 1e-6
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert [module.training for module in plain.modules()] == flags
    assert [parameter.requires_grad for parameter in plain.parameters()] == wanted
    assert all(parameter.grad is None for parameter in plain.parameters())
    assert all(same_bits(tensor, before[name]) for name, tensor in snapshot(plain).items())
    assert costs[0].dim() == 0
    assert torch.isfinite(costs[0])
    assert torch.equal(costs[0], costs[1])
    assert not any(module._forward_hooks for module in plain.modules())
    costs[0].backward()
    assert plain.second.weight.grad.abs().sum() > 0
    assert plain.last.weight.grad is None


def feature(model, x, at):
    """Outputs of the two convolutions, written out by hand."""
    first = model.first(x)
    second = model.second(torch.relu(model.first_norm(first)))
    if at == "activation":
        return torch.relu(model.first_norm(first)), torch.relu(model.second_norm(second))
    return first, second


@pytest.mark.parametrize("at", ["output", "activation"])
@pytest.mark.parametrize("distance", ["l2", "mean", "relative"])
@pytest.mark.parametrize("cross_entropy", ["clean", "adversarial", "both"])
def test_clat_loss_and_gradient_equal_a_second_formula(plain, images, cross_entropy, distance, at):
    x, y = images
    x_adv = (x + 0.1 * torch.randn_like(x).sign()).clamp(0, 1)
    plain.eval()
    select(plain, "first", "second")
    objective = Clat(weight=0.7, cross_entropy=cross_entropy, distance=distance, at=at)
    terms = objective.loss(plain, x, x_adv, y)
    gradient = torch.autograd.grad(sum(terms.values()), plain.first.weight)[0]

    total = 0
    for clean, attacked in zip(feature(plain, x, at), feature(plain, x_adv, at), strict=True):
        length = (attacked - clean).flatten(1).pow(2).sum(1).sqrt()
        size = clean.flatten(1).pow(2).sum(1).sqrt() if distance == "relative" else 1
        total = total + (length / (clean[0].numel() if distance == "mean" else size)).mean()
    clean_ce, adv_ce = F.cross_entropy(plain(x), y), F.cross_entropy(plain(x_adv), y)
    ce = {"clean": clean_ce, "adversarial": adv_ce, "both": (clean_ce + adv_ce) / 2}[cross_entropy]
    torch.testing.assert_close(terms["cross_entropy"], ce)
    torch.testing.assert_close(terms["criticality"], 0.7 * total)
    torch.testing.assert_close(gradient, torch.autograd.grad(ce + 0.7 * total, plain.first.weight)[0])


def test_clat_gradient_equals_finite_differences(plain, images):
    plain.double().eval()
    select(plain, "first", "second")
    x, y = images[0].double(), images[1]
    x_adv = (x + 0.1 * torch.randn_like(x).sign()).clamp(0, 1)

    def loss():  # double precision: the library computes distances in fp32, so the step cannot be tiny
        return sum(Clat(weight=0.7).loss(plain, x, x_adv, y).values())

    gradient = torch.autograd.grad(loss(), plain.second.weight)[0]
    direction = torch.randn_like(gradient)
    step = 1e-3
    with torch.no_grad():
        plain.second.weight += step * direction
        up = loss()
        plain.second.weight -= 2 * step * direction
        down = loss()
    assert ((up - down) / (2 * step)).item() == pytest.approx((gradient * direction).sum().item(), rel=2e-2)


def test_the_feature_attack_raises_the_feature_distance_of_all_selected_layers(plain, images):
    x, y = images
    plain.eval()
    select(plain, "first", "second")
    threat = Threat(eps=0.1, step=0.03, steps=10)
    objective = Clat(weight=1.0, attack="feature")

    def distance(x_adv):
        return objective.loss(plain, x, x_adv, y)["criticality"].item()

    attacked = distance(objective.perturb(plain, x, y, threat))
    assert attacked > 1.2 * distance(threat.first(x))
    label = ascend(lambda z: F.cross_entropy(plain(z), y, reduction="none"), x, threat, model=plain)
    assert attacked > distance(label)


def test_the_feature_attack_runs_only_as_far_as_the_deepest_selected_layer(plain, images):
    x, y = images
    runs = {"second": 0, "last": 0}
    for name in runs:
        getattr(plain, name).register_forward_hook(lambda *_, name=name: runs.update({name: runs[name] + 1}))
    select(plain, "first")
    objective = Clat(attack="feature")
    objective.perturb(plain, x, y, Threat(steps=5))
    assert runs == {"second": 1, "last": 1}  # on one image, to count the layer's calls
    objective.loss(plain, x, x, y)
    assert runs == {"second": 2, "last": 2}  # the cross-entropy's


def test_a_zero_start_is_refused_for_the_feature_attack(plain, images):
    select(plain, "first")
    with pytest.raises(InputError, match=r"threat\.start"):
        Clat(attack="feature").perturb(plain, *images, Threat(start="zero"))


def test_no_selection_is_refused(plain, images):
    select(plain)
    with pytest.raises(InputError, match="select"):
        Clat(attack="feature").perturb(plain, *images, Threat())


def test_a_negative_weight_is_refused():
    with pytest.raises(InputError, match=r"clat\.weight is -1\.0"):
        Clat(weight=-1)


# The other objectives, each against its formula written out by hand on explicit probabilities


def probabilities(model, x):
    scores = model(x).float().exp()
    return scores / scores.sum(1, keepdim=True)


def by_hand(objective, model, x, x_adv, y):
    p, q = probabilities(model, x), probabilities(model, x_adv)
    target = F.one_hot(y, 3).float()
    kl = (p * (p.log() - q.log())).sum(1)
    match objective:
        case Trades(gradient_through_target=False):
            kl = (p.detach() * (p.detach().log() - q.log())).sum(1)
            return -(target * p.log()).sum(1).mean() + objective.beta * kl.mean()
        case Trades():
            return -(target * p.log()).sum(1).mean() + objective.beta * kl.mean()
        case Mart():
            wrong = torch.stack([max(row[k] for k in range(3) if k != label) for row, label in zip(q, y, strict=True)])
            boosted = -(target * q.log()).sum(1) - (1.0001 - wrong).log()
            return (boosted + objective.beta * (1 - (target * p).sum(1)) * kl).mean()
        case Score(form="pgd-at"):
            b = objective.clip**2 + 2 * (objective.clip / 2) ** 2
            return ((q - target).pow(2).sum(1) - b).clamp_min(0).mean()
        case Score():
            b = objective.clip**2 + 2 * (objective.clip / 2) ** 2
            both = (p - target).pow(2).sum(1) + objective.beta * (q - p).pow(2).sum(1)
            return (both - b).clamp_min(0).mean()
        case GradAlign():
            noise = torch.empty_like(x).uniform_(-0.1, 0.1)
            cosines = []
            for image, other, label in zip(x, x + noise, y, strict=True):
                a, b = (gradient_at(model, z[None], label[None]) for z in (image, other))
                cosines.append((a.detach() * b).sum() / (a.detach().pow(2).sum() * b.pow(2).sum()).sqrt())
            return -(target * q.log()).sum(1).mean() + objective.weight * (1 - sum(cosines) / len(cosines))
        case _:
            return -(target * q.log()).sum(1).mean()


def gradient_at(model, x, y):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(F.nll_loss(probabilities(model, x).log(), y), x, create_graph=True)[0]


def cost(objective, model, x, x_adv, y):
    return sum(objective.loss(model, x, x_adv, y).values())


OTHERS = pytest.mark.parametrize(
    "objective",
    [
        *(PgdAt(), FastAt(), FreeAt(), Trades(beta=4), Mart(beta=3), Score(), Score(clip=0), Score(form="pgd-at")),
        *(Trades(gradient_through_target=False), Trades(second_clean_forward=False), GradAlign(weight=0.7)),
    ],
    ids=repr,
)


@OTHERS
@PRECISIONS
def test_value_and_gradient_equal_a_second_formula(objective, bf16, plain, images):
    x, y = images
    objective = replace(objective)
    plain.eval()
    x_adv = (x + 0.1 * torch.randn_like(x).sign()).clamp(0, 1)
    found = []
    for formula in (cost, by_hand):
        torch.manual_seed(2)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
            value = formula(objective, plain, x, x_adv, y)
        found.append((value.detach(), *torch.autograd.grad(value, [plain.first.weight, plain.last.weight])))
    tolerance = {"rtol": 2e-2, "atol": 2e-3} if bf16 else {"rtol": 1e-4, "atol": 1e-6}
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)
    assert found[0][1].abs().max() > 1e-3


# GradAlign is not here: what it detaches is part of its value's slope.
@pytest.mark.parametrize("objective", [Trades(), Mart(), Score(), Score(form="pgd-at")], ids=repr)
def test_gradient_equals_finite_differences(objective, plain, images):
    plain.double().eval()
    x, y = images[0].double(), images[1]
    x_adv = (x + 0.1 * torch.randn_like(x).sign()).clamp(0, 1)

    def loss():  # the library computes scores in fp32, so the step cannot be tiny
        torch.manual_seed(2)
        return cost(objective, plain, x, x_adv, y)

    gradient = torch.autograd.grad(loss(), plain.last.weight)[0]
    direction, step = gradient.sign(), 1e-3
    plain.last.weight.data += step * direction
    up = loss().item()
    plain.last.weight.data -= 2 * step * direction
    assert (up - loss().item()) / (2 * step) == pytest.approx((gradient * direction).sum().item(), rel=2e-2)


@pytest.mark.parametrize(
    ("objective", "distance"),
    [
        (Trades(), lambda p, q: (p * (p / q).log()).sum(1)),
        (Score(), lambda p, q: (p - q).pow(2).sum(1)),
    ],
    ids=["trades", "score"],
)
def test_the_attack_raises_the_distance_to_the_clean_prediction(objective, distance, plain, images):
    x, y = images
    plain.eval()
    threat = Threat(eps=0.1, step=0.03, steps=10)
    p = probabilities(plain, x)
    attacked = distance(p, probabilities(plain, objective.perturb(plain, x, y, threat))).mean()
    assert attacked > 1.5 * distance(p, probabilities(plain, threat.first(x))).mean()


@pytest.mark.parametrize("objective", [Trades(), Score()])
def test_a_zero_start_is_refused_where_the_attack_has_no_gradient(objective, plain, images):
    with pytest.raises(InputError, match=r"threat\.start"):
        objective.perturb(plain, *images, Threat(start="zero"))


@pytest.mark.parametrize("objective", [FastAt(), FreeAt(), GradAlign()])
def test_several_steps_are_refused_by_one_step_objectives(objective, plain, images):
    with pytest.raises(InputError, match=r"threat\.steps"):
        objective.perturb(plain, *images, Threat())


@pytest.mark.parametrize(
    "make",
    [
        *(lambda: Trades(beta=-1), lambda: Mart(beta=-1), lambda: Score(beta=-1), lambda: Score(clip=1)),
        *(lambda: Score(form="mart"), lambda: FastAt(largest_drop=0), lambda: FreeAt(replays=1)),
        lambda: GradAlign(weight=-1),
    ],
)
def test_values_out_of_range_are_refused(make):
    with pytest.raises(InputError, match=r"must|choose|fewer"):
        make()


@pytest.mark.parametrize(("objective", "passes"), [(Trades(), 3), (Trades(second_clean_forward=False), 2), (Mart(), 2)])
def test_batch_statistics_move_as_often_as_the_authors(objective, passes, plain, images):
    x, y = images
    before = int(plain.first_norm.num_batches_tracked)
    x_adv = objective.perturb(plain, x, y, Threat(start="gaussian", mode="batch"))
    assert int(plain.first_norm.num_batches_tracked) == before
    objective.loss(plain.train(), x, x_adv, y)
    assert int(plain.first_norm.num_batches_tracked) == before + passes


def test_gradalign_moves_batch_statistics_three_times(plain, images):
    x, y = images
    objective, threat = GradAlign(), Threat(eps=0.1, step=0.1, steps=1, start="zero", mode="batch")
    before = int(plain.first_norm.num_batches_tracked)
    objective.loss(plain.train(), x, objective.perturb(plain, x, y, threat), y)
    assert int(plain.first_norm.num_batches_tracked) == before + 3


@every_objective
@PRECISIONS
def test_a_batch_of_one_image_and_a_network_that_is_certain(objective, bf16, plain, images):
    """Probabilities of 0 and 1 give finite values and gradients, also of a single image."""
    objective = replace(objective)
    x, y = images[0][:1], images[1][:1]
    select(plain, "first", "second")
    plain.eval()
    with torch.no_grad():
        plain.last.bias.copy_(torch.tensor([-200.0, 200.0, 0.0]))  # and wrong
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
        value = cost(objective, plain, x, objective.perturb(plain, x, y, attack(objective)), y)
    value.backward()
    assert torch.isfinite(value)
    assert all(torch.isfinite(p.grad).all() for p in plain.parameters() if p.grad is not None)


def test_gradalign_leaves_out_images_without_gradient(plain, images):
    x, y = images
    plain.eval()
    plain.last.weight.data.zero_()  # no image changes the scores
    terms = GradAlign().loss(plain, x, (x + 0.1).clamp(0, 1), y)
    assert terms["alignment"] == 0
    sum(terms.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in plain.parameters())


def test_score_takes_any_number_of_classes(images):
    for classes in (2, 100):
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, classes))
        c = 0.3
        clip = torch.full((classes,), c / (classes - 1))
        clip[1] = 1 - c
        model[1].weight.data.zero_()
        model[1].bias.data.copy_(clip.log())  # exactly at the level of b for label 1
        x, y = images[0], torch.ones(6, dtype=torch.long)
        assert Score(clip=c).loss(model, x, x, y)["squared_error"].item() == pytest.approx(0, abs=1e-6)
        assert Score(clip=c - 0.01).loss(model, x, x, y)["squared_error"] > 1e-4


def test_free_at_moves_weights_and_delta_together_over_replays_and_batches(plain, images):
    """Against the algorithm written out on one delta buffer, with a batch in between that is smaller than delta."""
    threat = Threat(eps=0.1, step=0.1, steps=1, start="zero")
    batches = [(torch.rand(n, 1, 8, 8), torch.arange(n) % 3) for n in (6, 4, 6)]
    plain.eval()
    start = snapshot(plain)

    delta, expected = torch.zeros(6, 1, 8, 8), []
    for x, y in batches:
        for _ in range(2):
            z = (x + delta[: len(x)]).clamp(0, 1).requires_grad_()
            expected.append(z.detach().clone())
            weights = list(plain.parameters())
            gradient, *gradients = torch.autograd.grad(F.cross_entropy(plain(z), y), [z, *weights])
            moved = (z.detach() - x + 0.1 * gradient.sign()).clamp(-0.1, 0.1)
            delta[: len(x)] = (x + moved).clamp(0, 1) - x
            with torch.no_grad():
                for weight, g in zip(weights, gradients, strict=True):
                    weight -= 0.05 * g
    weights = snapshot(plain)

    plain.load_state_dict(start)
    objective, optimizer = FreeAt(replays=2).begin(), torch.optim.SGD(plain.parameters(), lr=0.05)
    for x, y in batches:
        for _ in range(2):
            x_adv = objective.perturb(plain, x, y, threat)
            torch.testing.assert_close(x_adv, expected.pop(0))
            sum(objective.loss(plain, x, x_adv, y).values()).backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(snapshot(plain), weights)
    assert torch.equal(FreeAt(replays=2).begin().perturb(plain, *images, threat), images[0])  # it starts at zero again


def test_free_at_gives_a_larger_batch_new_rows(plain):
    threat = Threat(eps=0.1, step=0.1, steps=1)
    objective = FreeAt()
    for n in (2, 5):
        x, y = torch.rand(n, 1, 8, 8), torch.arange(n) % 3
        x_adv = objective.perturb(plain, x, y, threat)
        sum(objective.loss(plain, x, x_adv, y).values()).backward()
    assert (threat.distance(x_adv, x) > 0.05).all()


class Valley(nn.Module):
    """Of one pixel: class 0 wins everywhere but within 0.07 of 0.6."""

    def forward(self, x):
        margin = 100 * (x.flatten(1) - 0.6).square() - 0.5
        return torch.cat([margin, torch.zeros_like(margin)], dim=1)


def test_the_probe_of_fast_at_breaks_what_its_own_attack_steps_over():
    """From 0.5, the one step of the training attack ends at 0.7, beyond the valley; steps of eps / 4 end in it."""
    model, threat = Valley(), Threat(eps=0.2, step=0.25, steps=1, start="zero")
    x, y = torch.full((8, 1, 1, 1), 0.5), torch.zeros(8, dtype=torch.long)
    x_adv = threat.project(FastAt().perturb(model, x, y, threat), x)
    torch.testing.assert_close(x_adv, torch.full_like(x, 0.7))
    assert (model(x_adv).argmax(1) == y).all()
    assert not FastAt().probe(model, x, y, threat).any()


def test_the_probe_of_fast_at_runs_in_eval_mode_and_leaves_the_network_in_its_own(plain, images):
    x, y = images
    plain.train()
    buffers = {name: buffer.clone() for name, buffer in plain.named_buffers()}
    right = FastAt().probe(plain, x, y, Threat(eps=0.5, step=0.6, steps=1, mode="train"))
    assert right.dtype == torch.bool
    assert right.shape == (6,)
    assert all(module.training for module in plain.modules())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in plain.named_buffers())
