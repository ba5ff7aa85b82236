"""A comparison's file, in YAML: where it is, what it says at a scale, and what is refused."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from clat.compare.plan import Arm, Comparison, Evaluation, Keys, Side
from clat.compare.recipes import resolved
from clat.compare.schema import check_model, entries_of, mapping, whole_list
from clat.errors import InputError
from clat.files import parse_yaml, read_text, shipped
from clat.inputs import fraction, nearest, shown
from clat.text import plain
from clat.training.recipe_files import laid_over, recipe_path

BASE = "base"  # the name that arms call the base by
FULL = "full"  # the scale of a file without one of its ``scales``
CHECKPOINTS = ("best", "last", "averaged")
TIERS = ("quick", "apgd-ce", "standard", "full")
IMAGES = ("held-out", "unused", "test")  # held out of training; neither trained on nor held out; the test split


def comparison_path(name: str) -> Path:
    """The file of a comparison given by path or by the name of one that ships with clat.

    Raises:
        InputError: there is none
    """
    with suppress(OSError):  # too long a name, a loop of links, a folder without access
        if Path(name).is_file():
            return Path(name)
    known = shipped("comparisons")
    if name in known:
        return known[name]
    names = ", ".join(sorted(known))
    raise InputError(f"There is no comparison {shown(name)}; give a YAML file or one of {names}.{nearest(name, known)}")


def load_comparison(
    name: str, scale: str | None = None, *, model: str | None = None, seeds: list[int] | None = None
) -> Comparison:
    """The comparison in a file, or that ships under a name.

    Args:
        scale: one of the file's ``scales``, whose entries are laid over the others; full, or none, for the file itself
        model: the network in place of the base's; only here may it be a factory
        seeds: in place of the file's
    Raises:
        InputError: no such file, or one that does not say a whole comparison
    """
    path = comparison_path(name)
    file = f"The comparison {plain(path)}"
    content = mapping(parse_yaml(read_text(path, "comparison"), path, "comparison"), file)
    scales = mapping(content.pop("scales", {}), f"scales of {file}")
    if scale not in (None, FULL):
        if scale not in scales:
            known = [*scales, FULL]
            raise InputError(f"{file} has no scale {shown(scale)}; it has {', '.join(known)}.{nearest(scale, known)}")
        content = laid_over(content, mapping(scales[scale], f"Scale {scale} of {file}"))
    if seeds is not None:
        content["seeds"] = seeds
    return comparison(content, file, folder=path.parent, model=model)


def comparison(
    content: Any, file: str = "The comparison", *, folder: Path | None = None, model: str | None = None
) -> Comparison:
    """The comparison that a file's content says, without scales. Raises InputError, which begins with ``file``.

    Args:
        folder: where recipes given by file are looked for, beside the working directory
        model: the network in place of the base's
    """
    required = {"question": str, "base": dict, "arms": dict, "contrasts": list}
    others = {"keys": dict, "evaluation": (dict, list), "seeds": list, "networks": dict, "notes": list,
              "printed": dict, "then": list}  # fmt: skip
    entries = entries_of(content, file, required, others)
    if "networks" in entries and model is not None:
        raise InputError(f"{file} names several networks; --model goes with a file that has one.")
    arms: list[Arm] = []
    contrasts: list[tuple[Side, Side]] = []
    for prefix, each in _by_network(entries, file):
        own = _arms(each, prefix, file, folder, model)
        arms += own
        contrasts += [_contrast(pair, prefix, own, file) for pair in each["contrasts"]]
    return Comparison(
        question=entries["question"],
        arms=tuple(arms),
        evaluations=_evaluations(entries.get("evaluation", {}), file),
        contrasts=tuple(contrasts),
        seeds=whole_list(entries.get("seeds", [0, 1, 2]), f"{file}: seeds are"),
        notes=tuple(map(str, entries.get("notes", []))),
        printed=entries.get("printed"),
        then=tuple(map(str, entries.get("then", []))),
    )


def _by_network(entries: Keys, file: str) -> list[tuple[str, Keys]]:
    """The entries for each network, with what its arms' names begin with; one without any if there is one network."""
    if "networks" not in entries:
        return [("", entries)]
    found = []
    for name, content in entries["networks"].items():
        where = f"{file}: network {shown(name)}"
        own = entries_of(content, where, {"model": str}, {"keys": dict, "base": dict, "arms": dict, "contrasts": list})
        own["base"] = laid_over({"model": own.pop("model")}, own.get("base", {}))
        found.append((f"{name}-", laid_over(entries, own)))
    if not found:
        raise InputError(f"{file}: networks names none; leave it out, or name some.")
    return found


def _arms(entries: Keys, prefix: str, file: str, folder: Path | None, model: str | None) -> list[Arm]:
    """The base and the other arms of one network."""
    shared = entries.get("keys", {})
    base = entries_of(
        entries["base"], f"{file}: base", {"recipe": (str, list)}, {"model": str, "keys": dict, "at": list}
    )
    if model is None and "model" not in base:
        raise InputError(f"{file}: base: model is missing; name a network there, or give --model.")
    named = base.pop("model", None)
    if model is None:
        model = check_model(named, f"{file}: base")
    if BASE in entries["arms"]:
        raise InputError(f"{file}: an arm is called base, which is the base's name; call it otherwise.")
    arms = {BASE: _arm(BASE, base, shared, file, folder, prefix, model)}
    for name, content in entries["arms"].items():
        if content is not None:  # null takes an arm away at a scale or for a network
            arms[name] = _arm(name, content, shared, file, folder, prefix, model)
    found = list(arms.values())
    _check_starts(found, prefix, file)
    return found


def _arm(name: Any, content: Any, shared: Keys, file: str, folder: Path | None, prefix: str, model: str) -> Arm:
    full = f"{prefix}{name}"
    if not isinstance(name, str) or not name or not full.replace("-", "").replace("_", "").isalnum():
        raise InputError(f"{file}: an arm is called {shown(full)}; use letters, digits and dashes.")
    where = f"{file}: arm {full}"
    arm = entries_of(content, where, {"recipe": (str, list)}, {"keys": dict, "from": str, "at": list})
    keys = laid_over(shared, arm.get("keys", {}))
    if "seed" in keys:
        raise InputError(f"{where}: its keys hold a seed; list the seeds of all arms under seeds.")
    recipes = arm["recipe"] if isinstance(arm["recipe"], list) else [arm["recipe"]]
    own: Keys = {}
    for recipe in recipes:
        own = laid_over(own, _recipe(recipe, where, folder))
    checkpoints = arm.get("at", ["best", "last"])
    if (
        not checkpoints
        or any(each not in CHECKPOINTS for each in checkpoints)
        or len(set(checkpoints)) < len(checkpoints)
    ):
        raise InputError(f"{where}: at is {shown(checkpoints)}; list some of {', '.join(CHECKPOINTS)}.")
    made: dict[str, Any] = {"name": full, "keys": laid_over(own, keys), "model": model}
    made["recipe"] = " + ".join(recipes)
    try:
        resolved(made["keys"])
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    made["evaluated"] = tuple(checkpoints)
    if "from" not in arm:
        return Arm(**made)
    start, _, checkpoint = arm["from"].partition("/")
    if checkpoint not in CHECKPOINTS:
        raise InputError(f"{where}: from is {shown(arm['from'])}; write the arm and the checkpoint, like base/best.")
    return Arm(**made, start=f"{prefix}{start}", checkpoint=checkpoint)


def _recipe(name: Any, where: str, folder: Path | None) -> Keys:
    if not isinstance(name, str):
        raise InputError(f"{where}: a recipe is {shown(name)}; give the name or file of one, or a list of such.")
    beside = folder / name if folder is not None else None
    path = beside if beside is not None and beside.is_file() else recipe_path(name)
    return mapping(parse_yaml(read_text(path, "recipe"), path, "recipe"), f"The recipe {plain(path)}")


def _check_starts(arms: list[Arm], prefix: str, file: str) -> None:
    starts = {arm.name: arm.start for arm in arms}
    for arm in arms:
        name: str | None = arm.name
        for _ in starts:
            if name is not None and name not in starts:
                wanted = shown(name.removeprefix(prefix))
                raise InputError(f"{file}: an arm goes on from {wanted}, which is no arm; write from: base/best.")
            name = starts[name] if name is not None else None
        if name is not None:
            raise InputError(f"{file}: arm {arm.name} goes on from itself, over {starts[arm.name]}; break the circle.")


def _evaluations(content: Any, file: str) -> tuple[Evaluation, ...]:
    several = content if isinstance(content, list) else [content]
    if not several:
        raise InputError(f"{file}: evaluation lists none; leave it out, or say one.")
    return tuple(_evaluation(each, file) for each in several)


def _evaluation(content: Any, file: str) -> Evaluation:
    where = f"{file}: evaluation"
    number = (str, float, int)
    known = {"tier": str, "eps": number, "images": (int, str), "of": str, "steps": int, "starts": int, "precision": str}
    entries = entries_of(content, where, {}, known)
    if "eps" in entries:
        entries["eps"] = fraction(entries["eps"])
    if entries.get("images") == "all":
        entries["images"] = None
    found = Evaluation(**entries)
    words = {"tier": TIERS, "of": IMAGES, "precision": ("fp32", "bf16")}
    for key, options in words.items():
        if (value := getattr(found, key)) not in options:
            raise InputError(f"{where}: {key} is {shown(value)}; choose one of {', '.join(options)}.")
    for key in ("images", "steps", "starts"):
        if (value := getattr(found, key)) is not None and (not isinstance(value, int) or value < 1):
            raise InputError(f"{where}: {key} is {shown(value)}; give a whole number of 1 or more.")
    if not 0 < found.eps <= 1:
        raise InputError(f"{where}: eps is {found.eps}; give a radius in pixels of [0, 1], like 8/255.")
    return found


def _contrast(pair: Any, prefix: str, arms: list[Arm], file: str) -> tuple[Side, Side]:
    names = {arm.name.removeprefix(prefix): arm for arm in arms}
    sides = [side.partition("/") for side in pair if isinstance(side, str)] if isinstance(pair, list) else []
    if len(sides) != 2 or any(name not in names for name, _, _ in sides) or sides[0] == sides[1]:
        raise InputError(f"{file}: a contrast is {shown(pair)}; name two of {', '.join(names)}, like [clat, pgd-at].")
    found = []
    for name, _, checkpoint in sides:
        arm = names[name]
        checkpoint = checkpoint or arm.evaluated[0]
        if checkpoint not in arm.evaluated:
            raise InputError(
                f"{file}: a contrast is {shown(pair)}, but arm {arm.name} is measured at {', '.join(arm.evaluated)}."
            )
        found.append(Side(arm.name, checkpoint))
    return found[0], found[1]
