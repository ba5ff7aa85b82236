"""A matplotlib figure as SVG that takes its colours from the page, in light and in dark."""

import io
from typing import Any
from xml.etree import ElementTree

from markupsafe import Markup

from clat.report.blocks import Picture, Table

SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"

# What pictures are drawn with: name -> colour on white, colour on black. The series are Okabe and Ito's, which
# colour-blind readers can tell apart; the first is the accent of the page, too.
COLOURS = {
    "ink": ("#1c1e21", "#e7e8ea"),
    "soft": ("#5a616b", "#a3a9b3"),
    "line": ("#e2e4e8", "#33373d"),
    "series-1": ("#0072b2", "#5cb3ec"),
    "series-2": ("#d55e00", "#f08c3c"),
    "series-3": ("#009e73", "#2cc295"),
    "series-4": ("#b0548c", "#e29cc4"),
    "series-5": ("#b98300", "#f0bc3f"),
    "series-6": ("#3a8fbf", "#8fd0f7"),
    "series-7": ("#3c4046", "#c9ccd1"),
}
INK, SOFT, LINE = (COLOURS[name][0] for name in ("ink", "soft", "line"))
SERIES = tuple(pair[0] for name, pair in COLOURS.items() if name.startswith("series"))
ACCENT = SERIES[0]

# Text stays text, and no name is read as a formula.
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "clat",
    "text.parse_math": False,
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
}


def picture(figure: Any, name: str, alt: str, caption: str, table: Table) -> Picture:
    """The figure with its words and numbers, for a page on which ``name`` is unique."""
    return Picture(Markup(inline(figure, name, alt)), alt, caption, table)


def inline(figure: Any, name: str, alt: str) -> str:
    """The figure as an ``svg`` element for a page that defines the colours (``--ink`` and the others).

    Args:
        name: unique on the page; ids begin with it
        alt: what the picture shows, for those who do not see it
    """
    import matplotlib as mpl

    held = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(held, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    root = ElementTree.fromstring(held.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style"):
                parent.remove(child)
    for element in root.iter():
        _adapt(element, name)
    root.attrib.pop("height")
    root.set("width", root.attrib.pop("width"))
    root.set("role", "img")
    root.set("aria-label", alt)
    return ElementTree.tostring(root, encoding="unicode")


def alone(shown: Picture) -> str:
    """A picture as a file of its own, which follows the reader's colour scheme; ``desc`` says what it shows."""
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    root = ElementTree.fromstring(shown.svg)
    style = ElementTree.Element(f"{{{SVG}}}style")
    style.text = f"svg{{{_names(0)}font-family:system-ui,sans-serif;stroke-linejoin:round}}"
    style.text += f"@media (prefers-color-scheme:dark){{svg{{{_names(1)}}}}}"
    description = ElementTree.Element(f"{{{SVG}}}desc")
    description.text = shown.alt
    root[:0] = [description, style]
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def _names(scheme: int) -> str:
    return "".join(f"--{name}:{pair[scheme]};" for name, pair in COLOURS.items())


def _adapt(element: ElementTree.Element, name: str) -> None:
    """Colours by name, ids of this picture's own, the page's font."""
    for key, value in list(element.attrib.items()):
        if key == "id":
            element.set(key, f"{name}-{value}")
        elif key == f"{{{XLINK}}}href":
            element.set(key, value.replace("#", f"#{name}-", 1))
        elif "url(#" in value:
            element.set(key, value.replace("url(#", f"url(#{name}-"))
        elif key == "style":
            kept = [part for part in value.split(";") if not part.strip().startswith("font-family")]
            element.set(key, _coloured(";".join(kept)))


def _coloured(style: str) -> str:
    for name, (light, _) in COLOURS.items():
        style = style.replace(light, f"var(--{name})")
    return style
