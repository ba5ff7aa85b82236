"""Blocks that are computed again for the gradient give the same weights, bit for bit, and keep less memory."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from clat import Recipe, build_model, train
from clat.errors import InputError
from clat.network import same_bits, tensors
from clat.objectives import Clat, Clean, FreeAt, GradAlign, Mart, PgdAt, Trades
from clat.threat import Threat
from clat.training.own_loop import OwnLoop
from clat.training.recompute import blocks_of
from clat.tuners import ConvLora, Critical, Whole
from conftest import network

RECIPE = Recipe(
    threat=Threat(eps=0.1, step=0.05, steps=2), epochs=1, batch_size=12, holdout=12, images=24, validation_steps=0,
    health=False, lr=0.05,
)  # fmt: skip
ONE_STEP = Threat(eps=0.1, step=0.1, steps=1, start="zero")


def trained(recipe, model, blobs, out):
    torch.manual_seed(0)
    train(recipe, model, blobs, out=out, device="cpu")
    return tensors(model)


@pytest.mark.parametrize(
    "keys",
    [
        {"objective": PgdAt()},
        {"objective": PgdAt(), "precision": "bf16"},
        {"objective": PgdAt(), "threat": replace(RECIPE.threat, mode="train")},
        {"objective": Clean()},
        {"objective": Trades()},
        {"objective": Mart()},
        {"objective": FreeAt(replays=2), "threat": replace(ONE_STEP, start="uniform")},
        {"objective": GradAlign(), "threat": ONE_STEP},
        {"objective": Clat(weight=0.1), "tuner": Critical(k=2, batch=8)},
        {"objective": Clat(weight=0.1, at="activation", cross_entropy="both"), "tuner": Critical(k=2, batch=8)},
        {"objective": Clat(weight=0.1, attack="latent"), "tuner": Critical(k=1, batch=8)},
        {"objective": Clat(weight=0.1, attack="label", teacher=0.5), "tuner": Critical(batch=8)},
        {"objective": PgdAt(), "tuner": ConvLora(rank=2)},
    ],
    ids=lambda keys: "-".join([keys["objective"].name, *(key for key in keys if key != "objective")]),
)
def test_the_numbers_are_the_same(keys, blobs, tmp_path):
    recipe = replace(RECIPE, **keys)
    usual = trained(recipe, network(), blobs, tmp_path / "usual")
    again = trained(replace(recipe, recompute=True), network(), blobs, tmp_path / "again")
    assert all(same_bits(tensor, again[name]) for name, tensor in usual.items())


def kept(model: nn.Module, recompute: bool) -> int:
    """Bytes that autograd keeps of the training pass of a batch."""
    x, y, sizes = torch.rand(4, 3, 32, 32), torch.arange(4) % 3, []
    method = OwnLoop(model, PgdAt(), Whole(), Threat(steps=1), recompute=recompute)
    method.select(x, y)

    def pack(tensor):
        sizes.append(0 if isinstance(tensor, nn.Parameter) else tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        method.terms(x, x, y)
    return sum(sizes)


@pytest.mark.parametrize(
    ("name", "blocks", "share"),
    [
        ("rn18,width=8", 8, 0.5),
        ("timm/resnet18", 8, 0.5),
        ("timm/vit_tiny_patch16_224,img_size=32", 12, 0.2),
        ("timm/convnext_atto", 12, 0.3),
        ("timm/mobilenetv3_small_050", 12, 0.3),
    ],
)
def test_blocks_are_found_in_usual_networks_and_keep_less(name, blocks, share):
    kind, *options = name.split(",")
    model = build_model(kind, 3, **{key: int(value) for key, value in (option.split("=") for option in options)})
    assert len(blocks_of(model)) == blocks
    assert kept(model, True) < share * kept(model, False)


def test_what_cannot_be_recomputed_is_refused(plain):
    with pytest.raises(InputError, match="Plain is no sequence of blocks"):
        OwnLoop(plain, PgdAt(), Whole(), Threat(), recompute=True)
    with pytest.raises(InputError, match="recompute works without compile"):
        Recipe(recompute=True, compile=True)
