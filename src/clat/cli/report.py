"""The command report: a page of runs, comparisons and evaluations."""

from pathlib import Path

from torch import nn

from clat.cli.attacking import opened
from clat.cli.shared import checkpoint_named, console, is_beside_the_first, network_named
from clat.errors import InputError
from clat.report.examples import Examined, examine
from clat.report.page import check_place, write_page
from clat.report.reading import Told
from clat.report.source import is_run, page_of
from clat.text import plain
from clat.threat import Threat

IMAGES = 512


def report(
    sources: list[str],
    *,
    out: str,
    data: str | None = None,
    split: str = "test",
    base: str | None = None,
    model: str | None = None,
    limit: int = IMAGES,
    seed: int = 0,
    device: str | None = None,
) -> None:
    """Makes one page to look at, or a model card, of runs, comparisons and evaluations.

    The page is one HTML file that needs nothing from elsewhere. It shows what is recorded and says which command adds
    the rest.

    Args:
        sources: run folders, folders or results of comparisons, records of evaluations
        out: the file to write: page.html, or card.md for a model card
        data: attack images of this data with PGD-20, for examples, the confusion and the criticality after training; a
            Hugging Face name, folder or parquet file, as for evaluate
        split: split of the data
        base: a run to show beside the runs; default the one that each started from, if it is still there
        model: the network of weights that cannot or do not name it, such as your file.py:factory
        limit: attack this many images, drawn at random by the seed
        seed: draws the images and the attack's start
        device: cpu, cuda, cuda:1 or mps; default the fastest kind of device here
    """
    if is_beside_the_first():
        return
    check_place(Path(out))
    if data is not None and not any(map(is_run, sources)):
        raise InputError("--data attacks the network of a run, and there is none among the sources; leave it out.")

    def load(path: Path) -> nn.Module:
        return checkpoint_named(str(path), model)[0]

    def attack(run: Told) -> Examined:
        assert data is not None
        before = str(run.base.file) if run.base else None
        found = opened([str(run.file)], data, split, model, device, base=before)
        network = found.models[str(run.file)]
        start = network_named(before, found.data, model) if before else None
        threat = Threat(**{key: run.recipe["threat"][key] for key in ("eps", "norm")})
        chosen = found.data.sample(limit, seed)
        return examine(network, chosen, threat.radius, threat.norm, base=start, seed=seed, device=found.place)

    pages = [
        page_of(source, load, base=base, examine=attack if data else None, place=place)
        for place, source in enumerate(sources, 1)
    ]
    size = write_page(pages, Path(out))
    for page in pages:
        for each in page.missing:
            said = f"{each.what}: {each.command}" if each.command else each.what
            console.print(plain(f"Not shown: {said}"), highlight=False, soft_wrap=True, style="dim")
    console.print(plain(f"Written: {out} ({size / 1024:,.0f} KiB)"), highlight=False, soft_wrap=True)
