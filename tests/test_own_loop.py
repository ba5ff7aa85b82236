"""CLAT in a loop of one's own."""

import json

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from clat import CLAT, InputError, IntegrityError
from clat.network import same_bits, snapshot
from clat.objectives import Clat


def test_a_users_loop(tiny, blobs):
    x, y = blobs.pixels[:48].float() / 255, blobs.labels[:48]
    tuner = CLAT(tiny, k=2, eps="8/255", steps=3, cross_entropy="adversarial")
    before = snapshot(tiny)
    chosen = set()
    for epoch in range(4):
        if epoch % 2 == 0:
            parameters = tuner.select(x, y)
            optimizer = torch.optim.SGD(parameters, lr=0.05)
            chosen.update(tuner.layers)
        tiny.train()  # a habit of every loop; frozen BatchNorm must stand still all the same
        for start in range(0, 48, 16):
            loss = tuner.loss(x[start : start + 16], y[start : start + 16])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        tuner.verify()
    moved = {name for name, tensor in snapshot(tiny).items() if not same_bits(tensor, before[name])}
    assert moved == {f"{name}.weight" for name in chosen}
    assert {layer.name for layer in tuner.status() if layer.state == "trained"} == set(tuner.layers)
    assert len(tuner.scores) == 21


def test_the_loss_is_equation_9(plain, images):
    x, y = images
    tuner = CLAT(plain, k=2, steps=2, weight=0.3)
    tuner.select(x, y)
    torch.manual_seed(1)
    loss = tuner.loss(x, y)
    torch.manual_seed(1)
    objective = Clat(weight=0.3)
    plain.eval()
    terms = objective.loss(plain, x, objective.perturb(plain, x, y, tuner.threat), y)
    torch.testing.assert_close(loss, sum(terms.values()))


def test_the_step_keeps_the_papers_share_of_eps(plain):
    assert CLAT(plain).threat.step == pytest.approx(0.007)
    assert CLAT(plain, eps="8/255").threat.step == pytest.approx(8 / 255 * 7 / 30)
    assert CLAT(plain, eps="8/255", step="2/255").threat.step == pytest.approx(2 / 255)


def test_the_check_notices_a_frozen_tensor_that_moved(plain, images):
    tuner = CLAT(plain, steps=1)
    torch.optim.SGD(tuner.select(*images), lr=0.1)
    for layer in (plain.first, plain.second, plain.last):
        layer.weight.data += 1
    with pytest.raises(IntegrityError, match="is frozen but changed"):
        tuner.verify()


def test_the_check_suggests_eval_where_a_pass_of_ones_own_moved_a_buffer(plain, images):
    tuner = CLAT(plain, steps=1)
    optimizer = torch.optim.SGD(tuner.select(*images), lr=0.1)
    steps(tuner, optimizer, *images, 1)
    plain.train()(images[0])
    with pytest.raises(IntegrityError, match=r"norm\..* is frozen but changed .*call model.eval\(\)"):
        tuner.verify()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m, x, y: CLAT(m, lamda=1), "no option 'lamda'"),
        (lambda m, x, y: CLAT(m, k=0), "critical.k"),
        (lambda m, x, y: CLAT(m, eps=8), "8/255"),
        (lambda m, x, y: CLAT(m).loss(x, y), "call select"),
        (lambda m, x, y: CLAT(m).select(x * 255, y), "divide by 255"),
        (lambda m, x, y: CLAT(m).select(x, y[:2]), "one label an image"),
        (lambda m, x, y: CLAT(m).select(x, y + 9), "labels"),
        (lambda m, x, y: CLAT(m).select(x.numpy(), y), "Images must be a float tensor"),
        (lambda m, x, y: CLAT(m).select((x * 255).byte(), y), "divide uint8 pixels by 255"),
        (lambda m, x, y: CLAT(m).select(x, y.float()), "whole numbers"),
        (lambda m, x, y: CLAT(m).select(x, y.tolist()), "tensor of whole numbers.*list"),
        (lambda m, x, y: CLAT(m).select(x, None), "NoneType"),
        (lambda m, x, y: CLAT(m).load_state_dict({}), "no state"),
        (lambda m, x, y: CLAT(m).load_state_dict({"seed": 0, "selections": 1, "selection": {"layers": 3}}), "no state"),
        (lambda m, x, y: CLAT(m).load_state_dict([1]), "no state"),
        (lambda m, x, y: CLAT(DistributedDataParallel.__new__(DistributedDataParallel)), "bare network"),
        (lambda m, x, y: CLAT(nn.Flatten()).select(x, y), "nothing to train"),
    ],
)
def test_bad_input_is_refused(plain, images, call, says):
    with pytest.raises(InputError, match=says):
        call(plain, *images)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda x, y: (x * 255, y), "divide by 255"),
        (lambda x, y: (x - 0.5, y), "not in \\[0, 1\\]"),
        (lambda x, y: (x * float("nan"), y), "NaN"),
        (lambda x, y: ((x * 255).byte(), y), "divide uint8"),
        (lambda x, y: (x.numpy(), y), "float tensor"),
        (lambda x, y: (x[0], y), "float tensor"),
        (lambda x, y: (x[:0], y[:0]), "no images"),
        (lambda x, y: (x, y + 3), "labels run from 3 to 5"),
        (lambda x, y: (x, y - 1), "labels run from -1"),
        (lambda x, y: (x, y.double()), "whole numbers"),
        (lambda x, y: (x, y.bool()), "whole numbers"),
        (lambda x, y: (x, y.numpy()), "ndarray"),
        (lambda x, y: (x, None), "NoneType"),
        (lambda x, y: (x, y[:2]), "one label an image"),
    ],
)
def test_the_loss_checks_what_select_checks(plain, images, spoil, says):
    tuner = CLAT(plain, steps=1)
    tuner.select(*images)
    with pytest.raises(InputError, match=says):
        tuner.loss(*spoil(*images))
    with pytest.raises(InputError, match=says):
        tuner.select(*spoil(*images))
    assert tuner.selections == 1


def test_labels_of_any_integers_and_float64_images_give_the_same_loss(plain, images):
    x, y = images
    tuner = CLAT(plain, k=2, steps=2)
    tuner.select(x, y)

    def loss(x, y):
        torch.manual_seed(3)
        return tuner.loss(x, y)

    expected = loss(x, y)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        assert torch.equal(loss(x, y.to(dtype)), expected)
    assert torch.equal(loss(x.double(), y), expected)
    plain.double()
    assert loss(x.double(), y).dtype == torch.float32  # scores are compared in fp32
    assert next(plain.parameters()).grad is None


def steps(tuner, optimizer, x, y, count):
    for _ in range(count):
        loss = tuner.loss(x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_a_resumed_loop_goes_on_as_if_it_had_never_stopped(plain, images, tmp_path):
    def loop():
        return CLAT(plain, k=1, steps=2, ranking="random", seed=4)

    tuner = loop()
    for _ in range(2):
        optimizer = torch.optim.SGD(tuner.select(*images), lr=0.1, momentum=0.9)
        steps(tuner, optimizer, *images, 2)
    torch.save(
        {"model": plain.state_dict(), "clat": tuner.state_dict(), "optimizer": optimizer.state_dict(),
         "random": torch.get_rng_state()},
        tmp_path / "stopped.pt",
    )  # fmt: skip

    def end(tuner, optimizer):
        steps(tuner, optimizer, *images, 2)
        tuner.verify()
        layers = tuner.layers
        optimizer = torch.optim.SGD(tuner.select(*images), lr=0.1)
        steps(tuner, optimizer, *images, 2)
        return layers, tuner.layers, tuner.scores, snapshot(plain)

    expected = end(tuner, optimizer)
    stored = torch.load(tmp_path / "stopped.pt", weights_only=True)
    plain.load_state_dict(stored["model"])
    for parameter in plain.parameters():
        parameter.requires_grad_(True)  # as a network made again has it
    again = loop()
    state = json.loads(json.dumps(stored["clat"]))  # nothing but numbers, texts and lists
    optimizer = torch.optim.SGD(again.load_state_dict(state), lr=0.1, momentum=0.9)
    optimizer.load_state_dict(stored["optimizer"])
    torch.set_rng_state(stored["random"])
    found = end(again, optimizer)
    assert found[:3] == expected[:3]
    assert all(same_bits(tensor, found[3][name]) for name, tensor in expected[3].items())


def test_the_state_of_another_network_is_refused(plain, tiny, images):
    tuner = CLAT(plain, steps=1)
    assert CLAT(tiny).load_state_dict(tuner.state_dict()) == []  # nothing was selected yet
    tuner.select(*images)
    with pytest.raises(InputError, match="another network"):
        CLAT(tiny).load_state_dict(tuner.state_dict())


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("ignore")
def test_ddp_wraps_after_each_selection(plain, images):
    """Select on the bare network, then wrap: the gradients are those of the bare loop and go through the wrapper."""
    x, y = images
    tuner = CLAT(plain, k=1, steps=2, ranking="random")
    for _ in range(2):
        parameters = tuner.select(x, y)
        wrapped = DistributedDataParallel(plain, broadcast_buffers=False)
        reduced = []
        wrapped.register_comm_hook(None, lambda _, bucket, seen=reduced: count(bucket, seen))
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        for _ in range(2):
            torch.manual_seed(1)
            expected = torch.autograd.grad(tuner.loss(x, y), parameters)
            torch.manual_seed(1)
            tuner.loss(x, y, through=wrapped).backward()
            assert all(torch.equal(p.grad, gradient) for p, gradient in zip(parameters, expected, strict=True))
            optimizer.step()
            optimizer.zero_grad()
        assert sum(reduced) == 2 * sum(parameter.numel() for parameter in parameters)
        tuner.verify()
    tuner.select(x, y)
    with pytest.raises(InputError, match="wrap the network again"):
        tuner.loss(x, y, through=wrapped)
    with pytest.raises(InputError, match="does not hold the network"):
        tuner.loss(x, y, through=nn.Identity())
    with pytest.raises(InputError, match="bare network"):
        CLAT(wrapped)


def count(bucket, seen):
    seen.append(bucket.buffer().numel())
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def test_names_under_compile_begin_with_the_wrapper(plain, images):
    tuner = CLAT(torch.compile(plain), k=2, steps=0)  # compiles nothing
    tuner.select(*images)
    assert set(tuner.layers) == {"_orig_mod.first", "_orig_mod.second"}


class Tied(nn.Module):
    """Two convolutions that share a weight, each with its own bias."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.second = (nn.Conv2d(1, 1, 3, padding=1) for _ in range(3))
        self.second.weight = self.first.weight
        self.last = nn.Linear(16, 3)

    def forward(self, x):
        return self.last(self.second(self.middle(torch.relu(self.first(x)))).flatten(1))


@pytest.mark.parametrize("ranking", ["criticality", "lowest", "random"])
def test_tied_weights_are_one_layer_and_train_by_either_name(ranking):
    x, y = torch.rand(6, 1, 4, 4), torch.arange(6) % 3
    seen = set()
    for seed in range(4):
        model = Tied()
        tuner = CLAT(model, k=1, steps=1, ranking=ranking, seed=seed)
        parameters = tuner.select(x, y)
        seen.add(tuner.layers)
        if tuner.layers == ("middle",):
            assert {id(p) for p in parameters} == {id(p) for p in model.middle.parameters()}
            continue
        assert set(tuner.layers) == {"first", "second"}
        assert tuner.selection.trainable == ("first.weight", "first.bias", "second.bias")
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        steps(tuner, optimizer, x, y, 1)
        tuner.verify()
        assert {layer.name for layer in tuner.status() if layer.state == "trained"} == {"first", "second"}
        with pytest.raises(InputError, match="from 1 to 2"):
            CLAT(model, k=3, steps=1).select(x, y)
    assert ranking != "random" or len(seen) > 1
