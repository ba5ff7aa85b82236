"""A comparison as its file says it: the question, the arms and where they start, the evaluation and the contrasts."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clat.errors import InputError
from clat.files import parse_yaml, read_text
from clat.text import plain
from clat.threat import fraction
from clat.training.recipe import recipe_path

Keys = dict[str, Any]  # of a recipe, as in its YAML

BASE = "base"  # the name that arms call the base by
CHECKPOINTS = ("best", "last")
TIERS = ("quick", "standard", "full")
IMAGES = ("holdout", "unused", "test")  # held out of training; neither trained on nor held out; the test split


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One recipe with changed keys.

    Args:
        name: unique in its comparison
        recipe: a recipe's name or file
        keys: laid over the recipe, without the seed
        start: the arm that it goes on from, ``base`` among them; None from random weights
        checkpoint: of that arm: best or last
    """

    name: str
    recipe: str
    keys: Keys
    start: str | None = None
    checkpoint: str = "best"

    def settings(self, seed: int) -> Keys:
        """All keys of the run with this seed, the recipe's own among them."""
        path = recipe_path(self.recipe)
        own = _mapping(parse_yaml(read_text(path, "recipe"), path, "recipe"), f"The recipe {plain(path)}")
        return _laid(_laid(own, self.keys), {"seed": seed})


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How every arm is measured.

    Args:
        tier: of the attack: quick, standard or full
        eps: radius of the attack, in pixels of [0, 1]
        images: how many
        of: which: holdout, unused (of the training split) or test
    """

    tier: str = "standard"
    eps: float = 8 / 255
    images: int = 1000
    of: str = "holdout"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What a file in ``comparisons/`` says, at one scale.

    Args:
        question: what it should answer
        model: the network of every arm, as ``--model`` takes it
        arms: the base first, then the others in the file's order
        contrasts: pairs of arms that are tested against one another, fixed before anything runs
        seeds: each arm is trained with each
    """

    question: str
    model: str
    arms: tuple[Arm, ...]
    evaluation: Evaluation
    contrasts: tuple[tuple[str, str], ...]
    seeds: tuple[int, ...]

    def arm(self, name: str) -> Arm:
        """Raises InputError if there is none of that name."""
        for arm in self.arms:
            if arm.name == name:
                return arm
        raise InputError(f"There is no arm {plain(name)!r}; choose one of {', '.join(arm.name for arm in self.arms)}.")

    def runs(self) -> Iterator[tuple[Arm, int]]:
        """Every training run, arm and seed, each after the one that it goes on from."""
        for seed in self.seeds:
            done: set[str | None] = {None}
            left = list(self.arms)
            while left:
                ready = next(arm for arm in left if arm.start in done)
                left.remove(ready)
                done.add(ready.name)
                yield ready, seed


def comparison_path(name: str) -> Path:
    """The file of a comparison given by path or by the name of one that ships with clat.

    Raises:
        InputError: there is none
    """
    package = Path(__file__).parents[1]
    folders = (package / "comparisons", package.parents[1] / "comparisons")  # installed; in a checkout
    shipped = {str(p.relative_to(folder).with_suffix("")): p for folder in folders for p in folder.rglob("*.yaml")}
    if Path(name).is_file():
        return Path(name)
    if name in shipped:
        return shipped[name]
    raise InputError(
        f"There is no comparison {plain(name)!r}; give a YAML file or one of {', '.join(sorted(shipped))}."
    )


def load_comparison(name: str, scale: str | None = None) -> Comparison:
    """The comparison in a file, or that ships under a name.

    Args:
        scale: one of the file's ``scales``, whose entries are laid over the others
    Raises:
        InputError: no such file, or one that does not say a whole comparison
    """
    path = comparison_path(name)
    file = f"The comparison {plain(path)}"
    content = _mapping(parse_yaml(read_text(path, "comparison"), path, "comparison"), file)
    scales = _mapping(content.pop("scales", {}), f"scales of {file}")
    if scale is not None:
        if scale not in scales:
            raise InputError(f"{file} has no scale {plain(scale)!r}; it has {', '.join(scales) or 'none'}.")
        content = _laid(content, _mapping(scales[scale], f"Scale {scale} of {file}"))
    return comparison(content, file)


def comparison(content: Any, file: str = "The comparison") -> Comparison:
    """The comparison that a file's content says, without scales. Raises InputError, which begins with ``file``."""
    required = {"question": str, "base": dict, "arms": dict, "contrasts": list}
    entries = _entries(content, file, required, {"keys": dict, "evaluation": dict, "seeds": list})
    shared = entries.get("keys", {})
    base = _entries(entries["base"], f"{file}: base", {"model": str, "recipe": str}, {"keys": dict})
    arms = [_arm(BASE, {key: value for key, value in base.items() if key != "model"}, shared, file)]
    arms += [_arm(name, arm, shared, file) for name, arm in entries["arms"].items()]
    names = [arm.name for arm in arms]
    if names.count(BASE) > 1:
        raise InputError(f"{file}: an arm is called base, which is the base's name; call it otherwise.")
    _check_starts(arms, file)
    return Comparison(
        question=entries["question"],
        model=base["model"],
        arms=tuple(arms),
        evaluation=_evaluation(entries.get("evaluation", {}), file),
        contrasts=tuple(_contrast(pair, names, file) for pair in entries["contrasts"]),
        seeds=_seeds(entries.get("seeds", [0, 1, 2]), file),
    )


def _arm(name: Any, content: Any, shared: Keys, file: str) -> Arm:
    if not isinstance(name, str) or not name or not name.replace("-", "").replace("_", "").isalnum():
        raise InputError(f"{file}: an arm is called {plain(name)!r}; use letters, digits and dashes.")
    where = f"{file}: arm {name}"
    arm = _entries(content, where, {"recipe": str}, {"keys": dict, "from": str})
    keys = _laid(shared, arm.get("keys", {}))
    if "seed" in keys:
        raise InputError(f"{where}: its keys hold a seed; list the seeds of all arms under seeds.")
    recipe_path(arm["recipe"])  # there is one
    if "from" not in arm:
        return Arm(name=name, recipe=arm["recipe"], keys=keys)
    start, _, checkpoint = arm["from"].partition("/")
    if checkpoint not in CHECKPOINTS:
        raise InputError(f"{where}: from is {plain(arm['from'])!r}; write the arm and the checkpoint, like base/best.")
    return Arm(name=name, recipe=arm["recipe"], keys=keys, start=start, checkpoint=checkpoint)


def _check_starts(arms: list[Arm], file: str) -> None:
    starts = {arm.name: arm.start for arm in arms}
    for arm in arms:
        name: str | None = arm.name
        for _ in starts:
            if name is not None and name not in starts:
                raise InputError(
                    f"{file}: an arm goes on from {plain(name)!r}, which is no arm; write from: base/best."
                )
            name = starts[name] if name is not None else None
        if name is not None:
            raise InputError(f"{file}: arm {arm.name} goes on from itself, over {starts[arm.name]}; break the circle.")


def _evaluation(content: Any, file: str) -> Evaluation:
    where = f"{file}: evaluation"
    entries = _entries(content, where, {}, {"tier": str, "eps": (str, float, int), "images": int, "of": str})
    found = Evaluation(**{**entries, **({"eps": fraction(entries["eps"])} if "eps" in entries else {})})
    for key, value, known in (("tier", found.tier, TIERS), ("of", found.of, IMAGES)):
        if value not in known:
            raise InputError(f"{where}: {key} is {plain(value)!r}; choose one of {', '.join(known)}.")
    if found.images < 1:
        raise InputError(f"{where}: images is {found.images}; give 1 or more.")
    if not 0 < found.eps <= 1:
        raise InputError(f"{where}: eps is {found.eps}; give a radius in pixels of [0, 1], like 8/255.")
    return found


def _contrast(pair: Any, names: list[str], file: str) -> tuple[str, str]:
    if not (isinstance(pair, list) and len(pair) == 2 and all(name in names for name in pair) and pair[0] != pair[1]):
        raise InputError(f"{file}: a contrast is {plain(pair)}; name two of {', '.join(names)}.")
    return pair[0], pair[1]


def _seeds(seeds: list[Any], file: str) -> tuple[int, ...]:
    if not seeds or any(type(seed) is not int or seed < 0 for seed in seeds) or len(set(seeds)) < len(seeds):
        raise InputError(f"{file}: seeds are {plain(seeds)}; list whole numbers from 0 up, each once.")
    return tuple(seeds)


def _entries(content: Any, where: str, required: Mapping[str, Any], others: Mapping[str, Any]) -> Keys:
    """The mapping, if it has all required keys, no unknown ones, and values of these types."""
    entries, known = _mapping(content, where), {**required, **others}
    for key in required:
        if key not in entries:
            raise InputError(f"{where}: {key} is missing; a file in comparisons/ shows what belongs there.")
    for key, value in entries.items():
        if key not in known:
            raise InputError(f"{where}: {plain(key)!r} is unknown; choose from {', '.join(known)}.")
        if not isinstance(value, known[key]) or isinstance(value, bool):
            words = {str: "a text", dict: "keys and values", list: "a list", int: "a whole number"}
            raise InputError(f"{where}: {key} must be {words.get(known[key], 'a number')}; it is {plain(value)!r}.")
    return entries


def _mapping(content: Any, where: str) -> Keys:
    if not isinstance(content, dict):
        raise InputError(f"{where} must hold keys and values.")
    return dict(content)


def _laid(below: Mapping[str, Any], above: Mapping[str, Any]) -> Keys:
    """The entries of both, those of ``above`` where both have one; sections are laid over one another likewise."""
    both = dict(below)
    for key, value in above.items():
        under = below.get(key)
        both[key] = _laid(under, value) if isinstance(under, dict) and isinstance(value, dict) else value
    return both
