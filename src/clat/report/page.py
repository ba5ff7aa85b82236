"""Renders pages as one HTML file or as Markdown."""

import base64
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from clat.errors import InputError
from clat.files import write_text
from clat.report.blocks import Page, side_by_side
from clat.report.svg import COLOURS
from clat.text import plain

KINDS = (".html", ".md")
LARGEST = 3 * 2**20  # bytes


def check_place(out: Path) -> None:
    """Raises InputError unless the file's name says HTML or Markdown."""
    if out.suffix.lower() not in KINDS:
        raise InputError(f"{plain(out)} is no name for a page; end it with .html, or with .md for a model card.")


def write_page(pages: Sequence[Page], out: Path) -> int:
    """Writes the page, and returns its bytes.

    Raises:
        InputError: a suffix of neither kind, a page that is too large, or a place that cannot be written
    """
    check_place(out)
    text = html(pages) if out.suffix.lower() == ".html" else markdown(pages)
    size = len(text.encode())
    if size > LARGEST:
        raise InputError(f"The page would have {size:,} bytes, more than {LARGEST:,}; report fewer runs at a time.")
    write_text(out, text)
    return size


def html(pages: Sequence[Page]) -> str:
    """One file without anything from elsewhere; its one script runs because its hash is named."""
    environment = _environment(autoescape=True, finalize=_visible)
    source = environment.loader.get_source(environment, "page.js")[0] if environment.loader else ""
    digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode("ascii")
    style = environment.loader.get_source(environment, "page.css")[0] if environment.loader else ""
    return environment.get_template("page.html").render(
        pages=pages,
        overview=side_by_side(pages),
        script=Markup(source),
        digest=Markup(digest),
        style=Markup(style),
        colours=COLOURS,
    )


def markdown(pages: Sequence[Page]) -> str:
    """A model card: metadata of the first page as YAML, then all pages, with numbers in place of pictures."""
    environment = _environment(autoescape=False, finalize=_marked)
    card = yaml.safe_dump(dict(pages[0].card), sort_keys=False, allow_unicode=True) if pages[0].card else ""
    names = {
        "pages": pages,
        "overview": side_by_side(pages),
        "card": Markup(card),
        "verbatim": _verbatim,
        "escaped": _escaped,
    }
    text = environment.get_template("card.md").render(**names)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _environment(**options: Any) -> Environment:
    return Environment(
        loader=PackageLoader("clat.report"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        **options,
    )


def _visible(value: Any) -> Any:
    """Control characters written out; what is escaped already stays."""
    return value if isinstance(value, (Markup, int, float)) or value is None else plain(value)


def _marked(value: Any) -> Any:
    """Text that Markdown takes as it stands; what is markup already stays."""
    if isinstance(value, Markup):
        return str(value)
    text = plain(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#~$!])", r"\\\1", text)


def _verbatim(line: str) -> Markup:
    """A line of a block of code."""
    return Markup(plain(line))


def _escaped(text: str) -> Markup:
    """Text inside HTML in Markdown."""
    return Markup.escape(plain(text))
