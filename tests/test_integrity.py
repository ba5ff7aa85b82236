"""What is frozen stands still bit for bit, what is selected moves, and every breach names its tensor."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from clat.network import fingerprint, same_bits, snapshot
from clat.training.integrity import IntegrityError, status, status_since, verify
from clat.tuners import Selection

SELECTION = Selection(epoch=1, layers=("second",), trainable=("second.weight", "second.bias"))


def test_a_kept_promise_passes(plain):
    before = snapshot(plain)
    plain.second.weight.data += 1
    verify(plain, SELECTION, before)


@pytest.mark.parametrize("name", ["first.weight", "first_norm.bias", "second_norm.running_var", "last.bias"])
def test_a_frozen_tensor_that_changes_in_one_bit_is_named(plain, name):
    before = snapshot(plain)
    plain.second.weight.data += 1
    tensor = dict(plain.named_parameters()) | dict(plain.named_buffers())
    flat = tensor[name].data.view(-1)
    flat[-1] = torch.nextafter(flat[-1], torch.tensor(torch.inf))
    with pytest.raises(IntegrityError, match=f"{name} is frozen but changed"):
        verify(plain, SELECTION, before)


def test_a_selected_weight_that_stands_still_is_named(plain):
    with pytest.raises(IntegrityError, match=r"second\.weight is selected but did not move"):
        verify(plain, SELECTION, snapshot(plain))


def test_nan_and_signed_zero_are_compared_by_their_bits():
    assert same_bits(torch.tensor([float("nan")]), torch.tensor([float("nan")]))
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(torch.zeros(2), torch.zeros(2, dtype=torch.float64))


def test_status_of_a_network(plain):
    SELECTION.apply(plain)
    assert {layer.name: layer.state for layer in status(plain)} == {
        "first": "frozen",
        "second": "trained",
        "last": "frozen",
    }
    plain.first.bias.requires_grad_(True)
    irregular = status(plain)[0]
    assert irregular.state == "irregular"
    assert irregular.reason == "bias trains but weight is frozen"


def test_status_since_the_start_of_a_run(plain):
    start = {name: fingerprint(tensor) for name, tensor in snapshot(plain).items()}
    plain.second.weight.data += 1
    assert [layer.state for layer in status_since(plain, start, [SELECTION])] == ["frozen", "trained", "frozen"]
    plain.last.bias.data += 1
    moved = status_since(plain, start, [SELECTION])[2]
    assert moved.state == "irregular"
    assert "last.bias" in moved.reason
    still = status_since(plain, start, [Selection(epoch=1, layers=("first",), trainable=("first.weight",))])[0]
    assert still.state == "irregular"
    assert "did not move" in still.reason


def test_a_tied_weight_is_judged_by_its_first_name():
    model = nn.Sequential(OrderedDict(one=nn.Linear(2, 2), two=nn.Linear(2, 2), three=nn.Linear(2, 2)))
    model.three.weight = model.one.weight
    start = {name: fingerprint(tensor) for name, tensor in snapshot(model).items()}
    assert "three.weight" not in start
    assert {layer.state for layer in status_since(model, start, [])} == {"frozen"}
    model.one.weight.data += 1
    selection = Selection(epoch=1, layers=("one",), trainable=("one.weight", "one.bias"))
    assert [layer.state for layer in status_since(model, start, [selection])] == ["trained", "frozen", "trained"]
    reasons = [layer.reason for layer in status_since(model, start, [])]
    assert reasons == ["never selected, but one.weight moved", "", "never selected, but one.weight moved"]
