"""The layers in the order of a measure, and the first k of them."""

from clat.criticality import LayerScore
from clat.errors import InputError
from clat.inputs import check_k


def ranked(scores: list[LayerScore], *, head: bool = False) -> list[LayerScore]:
    """The layers that can be selected, most critical first.

    Projection shortcuts are left out, and so is the classification head (the last layer to run) unless ``head`` is
    set: with the 1/N of Eq. 5 its few outputs put it first in every network, yet no table of the paper lists it.
    """
    counted = [score for score in scores if score.index is not None]
    last = counted[-1].name if len(counted) > 1 and not head else None
    return sorted((score for score in counted if score.name != last), key=lambda score: -score.criticality)


def top(scores: list[LayerScore], k: int | float, *, head: bool = False) -> list[str]:
    """The names of the k most critical layers, most critical first (Algorithm 1, line 9).

    Args:
        k: how many layers (an int), or which share of them (a float up to 1.0, rounded, at least one layer)
        head: let the classification head be selected too
    """
    names = list(dict.fromkeys(score.name for score in ranked(scores, head=head)))
    return names[: layer_count(k, len(names))]


def layer_count(k: int | float, layers: int) -> int:
    """k as a number of layers: an int is one, a float is a share of them, rounded, at least one layer.

    Raises:
        InputError: k is neither, or there are not so many layers
    """
    check_k(k)
    count = max(1, round(k * layers)) if isinstance(k, float) else k
    if count > layers:
        raise InputError(f"k is {k}; give a number of layers from 1 to {layers}, or a share such as 0.05.")
    return count
