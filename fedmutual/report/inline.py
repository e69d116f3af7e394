"""Charts inside the report's page: SVG that takes the page's colours and font."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np
from markupsafe import Markup

from fedmutual.report.plots import BLACK, COLOURS, GRID, STYLE, round_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes

logger = logging.getLogger(__name__)

Draw = Callable[["Axes"], None]
MARKERS = "●■▲"  # as fedmutual.report.plots draws them
MEAN = ("k", "╌")
# A colour is a variable of the page's style sheet, which has one value for light and one for dark.
_VARIABLES = {GRID: "grid", BLACK: "k"} | {colour: f"c{index}" for index, colour in enumerate(COLOURS)}
_STYLE: Any = {
    "svg.fonttype": "none",
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "axes.grid.axis": "y",
    "axes.labelpad": 7,
    "axes.formatter.useoffset": False,
}


def look(position: int) -> tuple[str, str]:
    """The page's class of the n-th line's colour, and its marker as a character."""
    return f"c{position % len(COLOURS)}", MARKERS[position // len(COLOURS) % len(MARKERS)]


def legend(names: Sequence[str]) -> list[dict[str, Any]]:
    """Name and look of every line, in order."""
    return [{"name": name, "look": look(position)} for position, name in enumerate(names)]


def panel(
    whose: str, title: str, note: str, missing: str, draw: Draw, end: int | None = None
) -> dict[str, Any]:
    """What the template shows of a chart; ``missing`` if ``draw`` draws nothing."""
    try:
        svg = inline_chart(draw, f"{title} over the rounds, {whose}", end)
    except Exception as error:  # whatever matplotlib makes of the figures
        logger.warning("the chart %r of %s is left out: %s", title, whose, error)
        svg, missing = None, f"This could not be drawn: {error}."
    return {"title": title, "note": note if svg else missing, "svg": svg or ""}


def inline_chart(draw: Draw, label: str, end: int | None = None) -> Markup | None:
    """Draw a chart as SVG inside the page: in the page's colours and font, with each point's value.

    Parameters
    ----------
    draw : callable
        Draws on the axes.
    label : str
        What a screen reader says; it differs from chart to chart of a page.
    end : int | None
        Position of the closing reports.

    Returns
    -------
    Markup | None
        None if nothing was drawn.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE | _STYLE | {"svg.hashsalt": label}):  # so that the ids differ, too
        figure = Figure(figsize=(460 / 72, 270 / 72), frameon=False)
        axes = figure.add_axes((0.1, 0.16, 0.88, 0.79), frameon=False)
        draw(axes)
        if not axes.lines:
            return None
        round_axis(axes, end)
        for number, line in enumerate(axes.lines):
            line.set_gid(f"line-{number}")
        buffer = io.StringIO()
        figure.savefig(buffer, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")), format="svg")
    root = ElementTree.fromstring(buffer.getvalue())
    for number, line in enumerate(axes.lines):
        points = np.column_stack(line.get_data())[:: line.get_markevery()]
        dots = root.findall(f".//*[@id='line-{number}']//{{*}}use")
        for dot, (x, y) in zip(dots, points[np.isfinite(points).all(1)], strict=False):
            ElementTree.SubElement(dot, "title").text = f"{line.get_label()}, round {x:g}: {y:.4g}"
    for definitions in root.findall("{*}defs"):  # a style for all, and edges beyond which nothing is drawn
        root.remove(definitions)
    for element in root.iter():
        _adapt(element)
    root.attrib = {"viewBox": root.get("viewBox", ""), "role": "img", "aria-label": label}
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _adapt(element: ElementTree.Element) -> None:
    """Leave out what a page does not need, and name the page's colours."""
    element.tag, element.tail = element.tag.rpartition("}")[2], None
    attributes = {name.rpartition("}")[2]: " ".join(value.split()) for name, value in element.items()}
    for name in ("clip-path", "transform", "id" if element.tag == "g" else ""):
        attributes.pop(name, None)
    style = attributes.get("style", "")
    if element.tag == "text":  # its font and colour are the page's
        attributes["style"] = style[style.find("text-anchor") :]
    elif style:
        for colour, variable in _VARIABLES.items():
            style = style.replace(colour, f"var(--{variable})")
        attributes["style"] = style
    element.attrib = attributes
