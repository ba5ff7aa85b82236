"""One validation for Python, recipe files and flags: values against the annotations of what takes them."""

import difflib
import math
import re
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from fractions import Fraction
from functools import cache
from inspect import isabstract
from numbers import Integral, Real
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from clat.errors import InputError
from clat.text import plain

T = TypeVar("T")

LONGEST = 60  # characters of a value in a message
LARGEST = 2**63 - 1  # of a whole number
LARGEST_SEED = 2**32 - 1  # a run multiplies its seed by about 10^9 and stays within 64 bits

_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")  # YAML 1.1 reads 1e-3 as text


def shown(value: object) -> str:
    """A value as it is shown in messages: its repr, on one line, shortened."""
    try:
        text = plain(repr(value))
    except ValueError:  # a whole number of more digits than Python writes out
        text = "a huge number"
    return text if len(text) <= LONGEST else text[:LONGEST] + "..."


def nearest(word: object, known: Iterable[str]) -> str:
    """The most similar known word, as the end of a message: `` Did you mean sgd?`` or nothing."""
    spelled = {name.lower(): name for name in known}
    found = difflib.get_close_matches(str(word)[:LONGEST].lower(), spelled, n=1)
    return f" Did you mean {spelled[found[0]]}?" if found else ""


def check_word(name: str, value: object, known: Iterable[str]) -> None:
    """Raises InputError, with the nearest known word, unless the value is one of the known ones."""
    known = list(known)
    if not isinstance(value, str) or value not in known:
        raise InputError(f"{name} is {shown(value)}; choose one of {', '.join(known)}.{nearest(value, known)}")


def check_fields(block: Any, prefix: str = "") -> None:
    """Checks the fields of a dataclass against their annotations; whole and decimal numbers become int and float.

    Args:
        prefix: what stands before a field's name in messages, such as ``threat.``
    Raises:
        InputError: the first field that does not fit
    """
    for name, annotation in annotations(type(block)).items():
        value = getattr(block, name)
        fitted = fit(prefix + name, value, annotation)
        if fitted is not value:
            object.__setattr__(block, name, fitted)


def check_seed(name: str, value: int) -> None:
    """Raises InputError unless the random numbers of a run can be drawn from the value."""
    if not _is_whole(value) or abs(value) > LARGEST_SEED:
        raise InputError(f"{name} is {shown(value)}; give a whole number of at most {LARGEST_SEED}.")


def check_least(least: float, *, prefix: str = "", **values: float | None) -> None:
    """Raises InputError if a value is given and below ``least``, or is not whole where ``least`` is an int.

    Args:
        values: by the name that stands in the message, after ``prefix``
    """
    for name, value in values.items():
        if value is None:
            continue
        if not (_is_whole(value) if isinstance(least, int) else isinstance(value, Real)) or value < least:
            whole = "a whole number of " if isinstance(least, int) and not _is_whole(value) else ""
            raise InputError(f"{prefix}{name} is {shown(value)}; it must be {whole}{least:g} or more.")


def fraction(value: float | str) -> float:
    """A number given as a number or as text such as ``8/255``. Raises InputError if it is neither."""
    try:
        # Not all by Fraction, which writes 1e999999999 out.
        number = float(Fraction(value)) if isinstance(value, str) and "/" in value else float(value)
    except (ValueError, TypeError, ZeroDivisionError, OverflowError):
        number = math.nan
    if not math.isfinite(number) or isinstance(value, bool):
        raise InputError(f"{shown(value)} is not a number; write it like 0.03 or 8/255.")
    return number


def check_k(k: object, name: str = "k") -> None:
    """Raises InputError unless k is an int of 1 or more, or a float above 0 and up to 1.0, which is all layers."""
    count = isinstance(k, int) and not isinstance(k, bool) and k >= 1
    share = isinstance(k, float) and 0 < k <= 1
    if not count and not share:
        raise InputError(
            f"{name} is {shown(k)}; give a whole number of layers from 1 on, or a share above 0 and up to 1.0 (all)."
        )


def annotations(owner: Any) -> dict[str, Any]:
    """The annotations of a dataclass's fields, or of a function's parameters, by name."""
    return _annotations(owner)


@cache
def _annotations(owner: Any) -> dict[str, Any]:
    hints = get_type_hints(owner)
    return {field.name: hints[field.name] for field in fields(owner)} if is_dataclass(owner) else hints


def block_of(annotation: Any) -> type | None:
    """The dataclass that an annotation takes, alone or optional; None if it takes none."""
    return next((kind for kind in _kinds(annotation) if isinstance(kind, type) and is_dataclass(kind)), None)


def entry_of(annotation: Any) -> Any:
    """The annotation of a list's entries; the annotation itself if it is not a list."""
    lists = [kind for kind in _kinds(annotation) if get_origin(kind) in (list, tuple)]
    return get_args(lists[0])[0] if lists else annotation


def fit(name: str, value: Any, annotation: Any) -> Any:
    """The value in the type of its annotation. Raises InputError, naming it, if it does not fit."""
    kinds = _kinds(annotation)
    if value is None and type(None) in kinds:
        return None
    if float in kinds and int not in kinds and _is_whole(value):
        _check_size(name, value)
        return float(value)
    for kind in kinds:
        if get_origin(kind) is Callable and callable(value):
            return value
        if kind is int and _is_whole(value):
            _check_size(name, value)
            return int(value)
        if kind is float and _is_decimal(value) and math.isfinite(value):
            return float(value)
        if kind in (bool, str) and isinstance(value, kind):
            return value
        if get_origin(kind) is Literal and isinstance(value, str) and value in get_args(kind):
            return value
        if get_origin(kind) is tuple and isinstance(value, (tuple, list)):
            return tuple(fit(name, entry, get_args(kind)[0]) for entry in value)
        if get_origin(kind) is list and isinstance(value, (tuple, list)):
            return [fit(name, entry, get_args(kind)[0]) for entry in value]
        if isinstance(kind, type) and (is_dataclass(kind) or isabstract(kind)) and isinstance(value, kind):
            return value
    words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    if words:
        check_word(name, value, [*words, *(["true", "false"] if bool in kinds else [])])
    wanted = " or ".join(dict.fromkeys(_described(kind) for kind in kinds))
    raise InputError(f"{name} is {shown(value)}; it must be {wanted}.")


def build(owner: type[T], values: Any, name: str = "") -> T:
    """A dataclass made of what a recipe file or flags give: mappings, lists, texts and numbers.

    Args:
        name: the block's own name in messages; none for the outermost
    Raises:
        InputError: an unknown key, a key that is missing, or a value that does not fit
    """
    if not isinstance(values, Mapping):
        raise InputError(f"{name} is {shown(values)}; it must be {_described(owner)}.")
    prefix = f"{name}." if name else ""
    known = annotations(owner)
    check_keys(values, known, name)
    for field in fields(owner):  # type: ignore[arg-type]
        if field.name not in values and not _has_default(field):
            raise InputError(f"{prefix}{field.name} is missing; give it a value.")
    return owner(**{key: built(prefix + key, value, known[key]) for key, value in values.items()})


def check_keys(values: Mapping[Any, Any], known: Iterable[str], name: str = "") -> None:
    """Raises InputError, with the nearest known key, if one is unknown."""
    for key in values:
        if key not in known:
            raise InputError(f"{name or 'A recipe'} has no key {shown(key)}.{nearest(key, known)}")


def from_text(text: str, annotation: Any, parse: Any) -> Any:
    """The value of a flag's text: the text itself for text options, else what YAML makes of it. A list of texts may be
    written with commas alone, as in ``*.se.*,*.mlp.*``, where YAML would take the star for something else.

    Args:
        parse: reads YAML and raises ValueError for anything else; such text stays text and is refused later
    """
    kinds = _kinds(annotation)
    is_text = str in kinds or any(get_origin(kind) is Literal for kind in kinds)
    if is_text and bool not in kinds:
        return None if text == "null" and type(None) in kinds else text
    try:
        value = parse(text)
    except ValueError:
        value = text
    texts = any(get_origin(kind) in (list, tuple) and get_args(kind)[0] is str for kind in kinds)
    if texts and isinstance(value, str):
        return [part.strip() for part in text.strip("[] ").split(",")]
    return text if is_text and isinstance(value, str) else _number(value, annotation)


def built(name: str, value: Any, annotation: Any) -> Any:
    """A value that a recipe file or flags give, with what is a block of keys made into its dataclass."""
    block = block_of(annotation)
    if block is not None and not (value is None and type(None) in _kinds(annotation)):
        return value if isinstance(value, block) else build(block, value, name)
    return _number(value, annotation)


def _number(value: Any, annotation: Any) -> Any:
    """A number that YAML took for text, such as 1e-3, as a number where one is wanted."""
    kinds = _kinds(annotation)
    if float in kinds and str not in kinds and isinstance(value, str) and _EXPONENT.fullmatch(value):
        return float(value)
    return value


def _kinds(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_decimal(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, Integral)


def _check_size(name: str, value: Any) -> None:
    if not -LARGEST <= value <= LARGEST:
        raise InputError(f"{name} is {shown(value)}; it must fit in 64 bits.")


def _has_default(field: Any) -> bool:
    return field.default is not MISSING or field.default_factory is not MISSING


def _described(kind: Any) -> str:
    """An annotation in words."""
    plain_words = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}
    if kind is type(None):
        return "null"
    if get_origin(kind) in (tuple, list):
        return f"a list, each entry {_described(get_args(kind)[0])}"
    if isinstance(kind, type) and is_dataclass(kind):
        return f"a block of keys ({', '.join(annotations(kind))}), in Python {kind.__name__}(...)"
    return plain_words.get(kind, str(kind))


def named(text: str) -> tuple[str, dict[str, Any]]:
    """A name with options after commas: ``rn18,width=16`` is ("rn18", {"width": 16}). Commas inside [] are kept."""
    name, *options = re.split(r",(?![^\[\]]*\])", text)
    pairs = [option.partition("=") for option in options]
    if not all(key and equals for key, equals, _ in pairs):
        raise InputError(f"Options are written key=value after commas, e.g. rn18,width=16; got {text!r}.")
    try:
        return name, {key: yaml.safe_load(value) for key, _, value in pairs}
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"An option's value in {shown(text)} cannot be read; write it like width=16.") from error
