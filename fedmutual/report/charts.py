"""Line charts as inline SVG: they take the page's colours, so that light and dark need one drawing only."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from fedmutual.report.curves import MOST_LINES, Curve, Curves, carried_on, over_clients

WIDTH, HEIGHT = 460, 270
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 8, 34
COLOURS = 7  # classes c0 to c6 of the page's style
DASHES = ("", "7 3", "2 3")  # tell lines of one colour apart
ALL = "k"  # the class of what stands for all clients
MEAN_DASHES = "5 4"


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes
    ----------
    name : str
        What hovering over a point says.
    curve : Curve
    look : str
        Class of its colour: c0 to c6, or k for what stands for all.
    dash : str
        SVG's ``stroke-dasharray``; empty: solid.
    teeth : bool
        Draw the way from before to after each mutual step (r to r + 1/2) thick, the rest dotted.
    """

    name: str
    curve: Curve
    look: str
    dash: str = ""
    teeth: bool = False


@dataclass(frozen=True)
class Band:
    """The space between two curves."""

    low: Curve
    high: Curve
    opacity: float


def look(position: int) -> tuple[str, str]:
    """Colour class and dashes of the n-th line; neither repeats before ``COLOURS * len(DASHES)`` lines."""
    return f"c{position % COLOURS}", DASHES[position // COLOURS % len(DASHES)]


def client_chart(
    curves: Curves, clients: Sequence[str], label: str, *, end: int | None = None, teeth: bool = False
) -> Markup | None:
    """Draw a line a client, or the median and quantiles where there are too many to follow.

    Parameters
    ----------
    clients : Sequence[str]
        All clients of the run, in the order of their colours.
    label : str
        Of the vertical axis, with its unit.
    end : int | None
        Position of the closing message, which has no round of its own.
    teeth : bool
        The curves are those of :func:`fedmutual.report.curves.saw`.

    Returns
    -------
    Markup | None
        None where no curve has a point.
    """
    curves = {name: curve for name, curve in curves.items() if curve}
    if not curves:
        return None
    if len(curves) > MOST_LINES:
        at = curves if teeth else carried_on(curves)
        low, lower, median, upper, high = (
            over_clients(at, functools.partial(np.quantile, q=q)) for q in (0, 0.25, 0.5, 0.75, 1)
        )
        lines = [Line("median of the clients", median, ALL, teeth=teeth)]
        return line_chart(lines, label, [Band(low, high, 0.12), Band(lower, upper, 0.25)], end)
    lines = []
    for position, client in enumerate(clients):
        colour, dash = look(position)
        if client in curves:
            lines.append(Line(client, curves[client], colour, dash, teeth))
    if len(lines) > 1 and not teeth:
        lines.append(Line("mean of the clients", over_clients(carried_on(curves), np.mean), ALL, MEAN_DASHES))
    return line_chart(lines, label, end=end)


def line_chart(
    lines: Sequence[Line], label: str, bands: Sequence[Band] = (), end: int | None = None
) -> Markup:
    """Draw lines over the rounds; every line has a point, all values are finite."""
    points = [point for line in lines for point in line.curve.items()]
    points += [point for band in bands for curve in (band.low, band.high) for point in curve.items()]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    frame = _Frame.around(xs, ys, 100.0 if label == "%" else math.inf)
    parts = [*_grid(frame, end), *(_band(frame, band) for band in bands)]
    for line in lines:
        parts += _teeth(frame, line) if line.teeth else _line(frame, line)
    head = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)} over the rounds">'
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 2}" text-anchor="middle">round</text>'
    )
    return Markup(head + "".join(parts) + "</svg>")


@dataclass(frozen=True)
class _Frame:
    """From figures to positions on the drawing."""

    left: float
    right: float
    bottom: float
    top: float
    step: float

    @classmethod
    def around(cls, xs: Sequence[float], ys: Sequence[float], most: float) -> _Frame:
        """Room for all points, but none below 0 or above ``most`` where no point is there."""
        low, high = min(ys), max(ys)
        margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        step = _nice_step((high - low + 2 * margin) / 5)
        bottom = math.floor((low - margin) / step) * step
        top = math.ceil((high + margin) / step) * step
        if low >= 0:
            bottom = max(bottom, 0.0)
        if high <= most:
            top = min(top, most)
        pad = 0.25 if max(xs) > min(xs) else 0.5
        return cls(min(xs) - pad, max(xs) + pad, bottom, top, step)

    def x(self, value: float) -> float:
        return LEFT + (value - self.left) / (self.right - self.left) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.bottom) / (self.top - self.bottom) * (HEIGHT - TOP - BOTTOM)

    def path(self, points: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)


def _nice_step(least: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is not below ``least``."""
    power = 10.0 ** math.floor(math.log10(least))
    return next((digit * power for digit in (1, 2, 5, 10) if digit * power >= least * (1 - 1e-9)), 10 * power)


def _grid(frame: _Frame, end: int | None) -> Iterator[str]:
    decimals = max(0, -math.floor(math.log10(frame.step) + 1e-9))
    for position in range(round((frame.top - frame.bottom) / frame.step) + 1):
        value = frame.bottom + position * frame.step
        y = f"{frame.y(value):.1f}"
        text = f"{value:.{decimals}f}" if decimals < 5 else f"{value:.1e}"
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>'
        yield f'<text x="{LEFT - 6}" y="{y}" dy=".35em" text-anchor="end">{text}</text>'
    first, last = math.ceil(frame.left), math.floor(frame.right)
    step = max(1, round(_nice_step((last - first) / 10))) if last > first else 1
    ticks = {x: str(x) for x in range(first, last + 1) if x % step == 0}
    if end is not None:  # a tick so near to "end" would be written over
        ticks = {x: text for x, text in ticks.items() if end - x >= 0.6 * step} | {end: "end"}
    for x, text in ticks.items():
        yield f'<text x="{frame.x(x):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{text}</text>'


def _band(frame: _Frame, band: Band) -> str:
    edge = [*sorted(band.low.items()), *sorted(band.high.items(), reverse=True)]
    return f'<polygon class="band {ALL}" opacity="{band.opacity}" points="{frame.path(edge)}"/>'


def _line(frame: _Frame, line: Line) -> Iterator[str]:
    points = sorted(line.curve.items())
    dash = f' stroke-dasharray="{line.dash}"' if line.dash else ""
    yield f'<polyline class="{line.look}"{dash} points="{frame.path(points)}"/>'
    yield from _dots(frame, line, points)


def _teeth(frame: _Frame, line: Line) -> Iterator[str]:
    points = sorted(line.curve.items())
    yield f'<polyline class="{line.look} thin" stroke-dasharray="2 3" points="{frame.path(points)}"/>'
    for x, y in points:
        if x % 1 == 0 and x + 0.5 in line.curve:
            step = [(x, y), (x + 0.5, line.curve[x + 0.5])]
            yield f'<polyline class="{line.look} thick" points="{frame.path(step)}"/>'
    yield from _dots(frame, line, points)


def _dots(frame: _Frame, line: Line, points: Sequence[tuple[float, float]]) -> Iterator[str]:
    if len(points) > 60:  # a line of its own accord; thousands of points would weigh more than the rest
        return
    for x, y in points:
        said = f"{escape(line.name)}, {_where(x, line.teeth)}: {y:.4g}"
        yield (
            f'<circle class="{line.look}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="2.6">'
            f"<title>{said}</title></circle>"
        )


def _where(x: float, teeth: bool) -> str:
    if not teeth:
        return f"round {x:g}"
    return f"{'before' if x % 1 == 0 else 'after'} the mutual step of round {math.floor(x)}"


def legend(names: Sequence[str]) -> list[dict[str, Any]]:
    """Name, colour class and dashes of every line, in order."""
    return [
        {"name": name, "look": look(position)[0], "dash": look(position)[1]}
        for position, name in enumerate(names)
    ]
