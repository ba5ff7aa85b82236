"""What a page can be of: a run folder, a comparison, or records of evaluations."""

from collections.abc import Callable
from pathlib import Path

from clat.compare.run import RESULT
from clat.errors import InputError
from clat.report.blocks import Page
from clat.report.comparison import comparison_page, read_comparison
from clat.report.examples import Examined
from clat.report.reading import Load, Told, told
from clat.report.records import RECORD, records_in
from clat.report.robustness import Network, accuracies, sweeps, trust
from clat.report.run import run_page
from clat.text import plain
from clat.training.runs import Run

Examine = Callable[[Told], Examined]


def page_of(
    source: str, load: Load, *, base: str | None = None, examine: Examine | None = None, place: int = 1
) -> Page:
    """The page of a run folder, a comparison's folder or result, a record, or a folder of records.

    Args:
        load: opens a checkpoint
        base: a run to show beside it; default the one that it started from
        examine: attacks images for the page of a run
        place: of the source on the page
    Raises:
        InputError: none of these, or one that is damaged
    """
    path = Path(source)
    if is_run(source):
        run = told(source, load, base=base)
        return run_page(run, examine(run) if examine else None, place=place)
    if path.is_file() and RECORD.fullmatch(path.name):
        return _records_page([path], source, place)
    if path.is_file() and path.suffix == ".json":
        return comparison_page(*read_comparison(path), place=place)
    if (path / RESULT).is_file():
        return comparison_page(*read_comparison(path / RESULT), place=place)
    if path.is_dir() and any(RECORD.fullmatch(each.name) for each in path.iterdir()):
        return _records_page([path], source, place)
    raise InputError(
        f"{plain(source)} is no run folder, no comparison and no record of an evaluation; give a folder that clat "
        "train, finetune or compare wrote, or the evaluations in one."
    )


def is_run(source: str) -> bool:
    return Run(Path(source)).exists


def _records_page(places: list[Path], title: str, place: int) -> Page:
    """Evaluations without the run that they belong to."""
    records = records_in(places)
    first = [each.checkpoint for each in records.evaluations] + [name for name, _ in records.verdicts]
    network = Network("network", records, first[0] if first else "")
    key = f"records{place}"
    sections = (accuracies(network, key), trust(network), sweeps(network, key))
    verdict = records.verdicts[0][1] if records.verdicts else None
    return Page(
        kind="Evaluations",
        title=title,
        verdict=f"{verdict.text[0].upper()}{verdict.text[1:]}." if verdict else "",
        good=verdict.ok if verdict else None,
        sections=tuple(section for section in sections if section is not None),
    )
