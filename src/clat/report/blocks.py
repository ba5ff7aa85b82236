"""What a page is made of: sections with tables, pictures, images and text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from markupsafe import Markup

from clat.evaluation.accuracy import Accuracy


@dataclass(frozen=True)
class Cell:
    """A cell of a table; ``value`` is what it is sorted by and ``note`` stands smaller behind the text."""

    text: str
    value: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table that can be sorted by each column."""

    caption: str
    headings: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    folded: bool = False  # closed until it is asked for
    kind: ClassVar[str] = "table"

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold numbers."""
        return [any(row[place].value is not None for row in self.rows) for place in range(len(self.headings))]


@dataclass(frozen=True)
class Picture:
    """A picture, what it shows in words, and its numbers."""

    svg: Markup
    alt: str
    caption: str
    table: Table


@dataclass(frozen=True)
class Pictures:
    """Pictures side by side where there is room."""

    pictures: tuple[Picture, ...]
    kind: ClassVar[str] = "pictures"


@dataclass(frozen=True)
class Text:
    """Text as a file holds it, line by line."""

    title: str
    lines: tuple[str, ...]
    open: bool = False
    kind: ClassVar[str] = "text"


@dataclass(frozen=True)
class Shown:
    """Images in a row, each a PNG as a data URL with what it is, and the words below them."""

    images: tuple[tuple[str, str], ...]
    words: str


@dataclass(frozen=True)
class Images:
    """Rows of images, side by side where there is room."""

    rows: tuple[Shown, ...]
    caption: str
    kind: ClassVar[str] = "images"


Block = Table | Pictures | Text | Images


@dataclass(frozen=True)
class Section:
    """A part of a page: sentences, then blocks."""

    title: str
    words: tuple[str, ...] = ()
    blocks: tuple[Block, ...] = ()


@dataclass(frozen=True)
class Missing:
    """What is not on the page, and the command that adds it."""

    what: str
    command: str


@dataclass(frozen=True)
class Figure:
    """A number at the top of a page; ``sorted_by`` orders it among those of other pages."""

    label: str
    value: str
    note: str
    sorted_by: float | None = None


@dataclass(frozen=True)
class Page:
    """A whole page, of one run, comparison or set of evaluations.

    Args:
        kind: run, comparison or evaluations
        title: its name or question
        verdict: in one sentence; good: whether it is, None where there is none
        figures: the numbers that come first
        card: what the hub's metadata hold of it
    """

    kind: str
    title: str
    verdict: str = ""
    good: bool | None = None
    figures: tuple[Figure, ...] = ()
    sections: tuple[Section, ...] = ()
    missing: tuple[Missing, ...] = ()
    card: Mapping[str, Any] = field(default_factory=dict)


def side_by_side(pages: Sequence[Page]) -> Table | None:
    """The numbers at the top of the pages of runs, a row for each run; none for fewer than two."""
    pages = [page for page in pages if page.kind == "Run"]
    if len(pages) < 2:
        return None
    labels = list(dict.fromkeys(figure.label for page in pages for figure in page.figures))
    rows = []
    for page in pages:
        own = {each.label: Cell(each.value, each.sorted_by, each.note) for each in page.figures}
        rows.append((words(page.title), *(own.get(label, words("")) for label in labels)))
    return Table("The runs side by side", ("run", *labels), tuple(rows))


def words(text: object) -> Cell:
    return Cell(str(text))


def number(value: float, form: str = "{:,}") -> Cell:
    return Cell(form.format(value), float(value))


def share(accuracy: Accuracy) -> Cell:
    """Percent, with the 95 % interval behind it."""
    low, high = accuracy.interval
    return Cell(f"{100 * accuracy.value:.1f}", accuracy.value, f"[{100 * low:.1f}, {100 * high:.1f}]")


def table(caption: str, headings: str, rows: Sequence[Sequence[Cell]], *, folded: bool = False) -> Table:
    """A table whose headings are separated by ``|``."""
    return Table(caption, tuple(title.strip() for title in headings.split("|")), tuple(map(tuple, rows)), folded)
