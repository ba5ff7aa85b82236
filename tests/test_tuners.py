"""Algorithm 1: when layers are selected, which, and what trains then."""

import copy

import pytest
import torch
from torch import nn

from clat.criticality import layer_criticality
from clat.errors import InputError
from clat.network import same_bits, snapshot
from clat.threat import Threat, attack_output
from clat.tuners import TUNERS, ConvLora, Critical, Rift, Selection, Whole
from clat.tuners.convlora import merge
from clat.tuners.order import top

THREAT = Threat(steps=2)
SMALL = {"rift": Rift(passes=2)}


@pytest.mark.parametrize("name", TUNERS)
def test_contract(name, plain, images):
    """Selecting changes nothing; applying sets requires_grad on exactly the trainable parameters; JSON is faithful."""
    plain.train()
    before, tuner = snapshot(plain), SMALL.get(name, TUNERS[name]())
    selection = tuner.select(plain, *images, THREAT, epoch=3)
    assert plain.training
    assert all(parameter.requires_grad for parameter in plain.parameters())
    assert all(same_bits(tensor, before[key]) for key, tensor in snapshot(plain).items())
    expected = plain.eval()(images[0])
    tuner.begin(plain, selection)
    assert torch.equal(plain(images[0]), expected)
    selection.apply(plain)
    assert {key for key, parameter in plain.named_parameters() if parameter.requires_grad} == set(selection.trainable)
    assert tuner.due(1)
    assert Selection.from_json(selection.to_json()) == selection


@pytest.mark.parametrize(
    ("every", "epochs"), [(10, [1, 11, 21]), (1, list(range(1, 26))), (0, [1]), (7, [1, 8, 15, 22])]
)
def test_selection_is_due_as_in_line_3(every, epochs):
    tuner = Critical(every=every)
    assert [epoch for epoch in range(1, 26) if tuner.due(epoch)] == epochs


def test_the_most_critical_layers_are_selected(tiny):
    x, y = torch.rand(8, 1, 16, 16), torch.arange(8) % 3
    torch.manual_seed(5)
    expected = top(layer_criticality(tiny, x, attack_output(tiny, x, y, THREAT)), 3)
    torch.manual_seed(5)
    selection = Critical(k=3).select(tiny, x, y, THREAT)
    assert list(selection.layers) == expected
    assert set(selection.trainable) == {f"{name}.weight" for name in expected}
    assert len(selection.scores) == 21


def test_lowest_and_random_are_controls_of_the_same_size(tiny):
    x, y = torch.rand(8, 1, 16, 16), torch.arange(8) % 3

    def chosen(ranking, **keys):
        torch.manual_seed(5)
        return Critical(k=5, ranking=ranking).select(tiny, x, y, THREAT, **keys).layers

    assert not set(chosen("lowest")) & set(chosen("criticality"))
    assert chosen("random", epoch=1) == chosen("random", epoch=1)
    assert len({chosen("random", epoch=epoch) for epoch in range(1, 8)}) > 4
    assert all("shortcut" not in name and "linear" not in name for name in chosen("random"))


def test_the_layers_own_normalisation_trains_and_moves_only_if_asked(plain, images):
    def select(**keys):
        return Critical(k=2, **keys).select(plain, *images, THREAT)

    assert set(select().trainable) == {"first.weight", "first.bias", "second.weight", "second.bias"}
    assert select().training == ()
    assert {"first_norm.weight", "second_norm.bias"} <= set(select(norm_affine=True).trainable)
    assert select(norm_statistics="selected").training == ("first_norm", "second_norm")
    one = Critical(k=1, norm_statistics="all").select(plain, *images, THREAT)
    assert one.training == ("first_norm", "second_norm")
    assert len(one.layers) == 1


def test_modes_hold_whatever_the_caller_set_and_are_put_back(plain, images):
    selection = Critical(k=2, norm_statistics="selected").select(plain, *images, THREAT)
    plain.train()
    with selection.mode(plain):
        assert plain.first_norm.training
        assert not plain.first.training
    assert plain.first.training
    with Whole().select(plain.eval(), *images, THREAT).mode(plain):
        assert all(module.training for module in plain.modules())
    assert not plain.training


@pytest.mark.parametrize("keys", [{"k": 0}, {"k": -1}, {"every": -1}, {"batch": 0}])
def test_values_out_of_range_are_refused(keys):
    with pytest.raises(InputError, match="critical"):
        Critical(**keys)


@pytest.mark.parametrize("name", ["critical", "rift", "convlora"])
def test_what_was_frozen_before_stays_frozen_and_is_said(name, plain, images):
    plain.first.requires_grad_(False)
    plain.first_norm.requires_grad_(False)
    tuner = SMALL.get(name, TUNERS[name]())
    for _ in range(2):  # what the first selection froze may be selected by the second
        with pytest.warns(UserWarning, match="1 layers are frozen already .* stay so: first"):
            selection = tuner.select(plain, *images, THREAT)
        assert "first" not in selection.layers
        assert not any(key.startswith("first") for key in selection.trainable)
        if name == "convlora":
            break
        selection.apply(plain)
    plain.first.requires_grad_(True)
    assert "first" in {*Critical(k=2).select(plain, *images, THREAT).layers}


def test_whole_leaves_frozen_what_was_frozen(plain, images):
    plain.first.requires_grad_(False)
    selection = Whole().select(plain, *images, THREAT)
    assert set(selection.trainable) == {key for key, _ in plain.named_parameters() if not key.startswith("first.")}
    selection.apply(plain)
    assert not plain.first.weight.requires_grad


def test_what_clat_froze_is_selected_again_also_in_a_copy_and_after_convlora(plain, images):
    def free(model):
        return len(Critical(k=2).select(model, *images, THREAT).layers)

    Critical(k=1).select(plain, *images, THREAT).apply(plain)
    assert free(plain) == free(copy.deepcopy(plain)) == 2
    tuner = ConvLora()
    selection = tuner.select(plain, *images, THREAT)
    tuner.begin(plain, selection)
    selection.apply(plain)
    merge(plain)
    assert free(plain) == 2


@pytest.mark.parametrize("name", TUNERS)
def test_nothing_left_to_train_is_refused(name, plain, images):
    plain.requires_grad_(False)
    with pytest.raises(InputError, match=r"none is left to select|nothing would train"):
        SMALL.get(name, TUNERS[name]()).select(plain, *images, THREAT).apply(plain)
    with pytest.raises(InputError, match="nothing would train"):
        Selection(epoch=1, layers=("first",), trainable=()).apply(plain)


def test_tied_weights_in_the_other_tuners(images):
    model = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 3, padding=1), nn.Flatten(), nn.Linear(64, 3))
    model[1].weight = model[0].weight
    model[3].requires_grad_(False)
    with pytest.warns(UserWarning, match="frozen"):
        selection = Rift(passes=1).select(model, *images, THREAT)
    assert selection.layers == ("0", "1")
    assert selection.trainable == ("0.weight",)
    model[3].requires_grad_(True)
    with pytest.raises(InputError, match="0 and 1 share one weight"):
        ConvLora().select(model, *images, THREAT)


def test_more_layers_than_there_are_is_refused(plain, images):
    with pytest.raises(InputError, match="from 1 to 2"):
        Critical(k=3).select(plain, *images, THREAT)


def test_layers_may_be_listed_in_place_of_a_ranking(tiny):
    x, y = torch.rand(8, 1, 16, 16), torch.arange(8) % 3
    names = ["layer4.0.shortcut.0", "network.conv1", "linear", "conv1"]
    selection = Critical(k=7, ranking="lowest", layers=names).select(tiny, x, y, THREAT)
    assert selection.layers == ("network.layer4.0.shortcut.0", "network.conv1", "network.linear")
    assert {name.rpartition(".")[0] for name in selection.trainable} == set(selection.layers)
    assert len(selection.scores) == 21
    one = Critical(layers=["layer1.0.conv2"]).select(tiny, x, y, THREAT)
    assert one.trainable == ("network.layer1.0.conv2.weight",)


def test_layers_are_left_out_or_let_in_by_pattern(tiny):
    x, y = torch.rand(8, 1, 16, 16), torch.arange(8) % 3

    def chosen(**keys):
        torch.manual_seed(5)
        return Critical(**{"k": 1.0, **keys}).select(tiny, x, y, THREAT)

    every = chosen().layers
    assert chosen(exclude=["layer[34].*", "network.conv1"]).layers == tuple(
        name for name in every if not name.startswith(("network.layer3", "network.layer4", "network.conv1"))
    )
    second = chosen(include=["*.conv2"])
    assert second.layers == tuple(name for name in every if name.endswith(".conv2"))
    assert len(second.scores) == 21  # all are ranked
    assert chosen(include=["*.conv2"], exclude=["layer1.*"], k=2, ranking="lowest").layers == tuple(
        [name for name in second.layers if "layer1" not in name][:-3:-1]
    )
    for keys, says in (
        (
            {"exclude": ["*.se.*"]},
            r"critical\.exclude has '\*\.se\.\*', which matches no layer of the network; near it",
        ),
        ({"include": ["*.cov1"]}, r"'\*\.cov1', .*near it are (network\.)?(conv1|\S+\.conv1)"),
        ({"include": ["*.conv1"], "exclude": ["*conv1"]}, "leave no layer to select"),
        ({"include": ["linear"]}, "leave no layer to select"),  # the head is one only where critical.head says so
        ({"include": ["*.conv2"], "k": 9}, "from 1 to 8"),
    ):
        with pytest.raises(InputError, match=says):
            chosen(**keys)
    assert chosen(include=["linear"], head=True).layers == ("network.linear",)
    with pytest.raises(InputError, match=r"leave critical\.include and critical\.exclude out"):
        Critical(layers=["conv1"], exclude=["*.conv2"])


def test_listed_layers_that_cannot_train_are_refused(plain, images):
    with pytest.raises(InputError, match=r"no layer 'frist'; clat layers lists them: first, .*Did you mean first\?"):
        Critical(layers=["last", "frist"]).select(plain, *images, THREAT)
    with pytest.raises(InputError, match=r"critical\.layers is 'first'; it must be a list"):
        Critical(layers="first")
    plain.first.requires_grad_(False)
    with pytest.raises(InputError, match=r"critical\.layers names first, which is frozen"):
        Critical(layers=["last", "first"]).select(plain, *images, THREAT)
    selection = Critical(layers=["last"]).select(plain, *images, THREAT)
    selection.apply(plain)
    assert Critical(layers=["second"]).select(plain, *images, THREAT).layers == ("second",)
