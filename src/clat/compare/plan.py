"""A comparison as a value: the question, the arms and where they start, the evaluation and the contrasts."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from clat.errors import InputError
from clat.inputs import nearest, shown
from clat.training.recipe_files import laid_over

Keys = dict[str, Any]  # of a recipe, as in its YAML


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One recipe with changed keys.

    Args:
        name: unique in its comparison
        recipe: a recipe's name or file, or several that are laid over one another
        keys: of the recipe with the arm's laid over, without the seed
        model: the network, as ``--model`` takes it
        start: the arm that it starts from, ``base`` among them; None from random weights
        checkpoint: of that arm: best, last or averaged
        evaluated: the checkpoints that are measured
    """

    name: str
    recipe: str
    keys: Keys
    model: str
    start: str | None = None
    checkpoint: str = "best"
    evaluated: tuple[str, ...] = ("best", "last")

    def settings(self, seed: int) -> Keys:
        """All keys of the run with this seed that differ from a recipe's defaults."""
        return laid_over(self.keys, {"seed": seed})


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How every arm is measured.

    Args:
        tier: of the attack: quick, standard, full, or apgd-ce for that attack alone
        eps: radius of the attack, in pixels of [0, 1]
        images: how many; None for all
        of: which: held-out, unused (of the training split) or test
        steps, starts: of the quick tier's PGD
        precision: fp32 or bf16
    """

    tier: str = "standard"
    eps: float = 8 / 255
    images: int | None = 1000
    of: str = "held-out"
    steps: int = 20
    starts: int = 1
    precision: str = "fp32"


@dataclass(frozen=True)
class Side:
    """One side of a contrast: an arm at a checkpoint."""

    arm: str
    checkpoint: str

    def __str__(self) -> str:
        return f"{self.arm}/{self.checkpoint}"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A comparison's file at one scale.

    Args:
        question: what it should answer
        arms: the base first, then the others in the file's order; of several networks, one network after the other
        evaluations: the contrasts are tested on the first
        contrasts: pairs that are tested against one another, fixed before anything runs
        seeds: each arm is trained with each
        notes: what a reader has to know, such as where a paper contradicts itself
        printed: figures that a paper prints, by the names that it gives its rows
        then: commands that answer the rest of the question from the run folders
    """

    question: str
    arms: tuple[Arm, ...]
    evaluations: tuple[Evaluation, ...]
    contrasts: tuple[tuple[Side, Side], ...]
    seeds: tuple[int, ...]
    notes: tuple[str, ...] = ()
    printed: Mapping[str, Any] | None = None
    then: tuple[str, ...] = ()

    def arm(self, name: str) -> Arm:
        """Raises InputError if there is none of that name."""
        for arm in self.arms:
            if arm.name == name:
                return arm
        names = [arm.name for arm in self.arms]
        raise InputError(f"There is no arm {shown(name)}; choose one of {', '.join(names)}.{nearest(name, names)}")

    def runs(self) -> Iterator[tuple[Arm, int]]:
        """Every training run, arm and seed, each after the one that it starts from."""
        for seed in self.seeds:
            done: set[str | None] = {None}
            left = list(self.arms)
            while left:
                ready = next(arm for arm in left if arm.start in done)
                left.remove(ready)
                done.add(ready.name)
                yield ready, seed

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Comparison":
        """The reverse of ``to_json``, after a file."""
        arms = tuple(Arm(**{**arm, "evaluated": tuple(arm["evaluated"])}) for arm in content["arms"])
        return cls(
            **{
                **content,
                "arms": arms,
                "evaluations": tuple(Evaluation(**each) for each in content["evaluations"]),
                "contrasts": tuple((Side(**first), Side(**second)) for first, second in content["contrasts"]),
                **{key: tuple(content[key]) for key in ("seeds", "notes", "then")},
            }
        )
