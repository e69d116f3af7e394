"""All curves of a run, drawn with matplotlib, and the pictures that the run leaves.

Matplotlib is imported when a plot is drawn: the rest of the program starts without it. Figures are made
without pyplot, so no display and no global state are involved.
"""

from __future__ import annotations

import functools
import io
import logging
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedmutual.files.atomic import atomic_write
from fedmutual.logs import shown
from fedmutual.report.curves import (
    MOST_LINES,
    Curve,
    Curves,
    Record,
    Seeds,
    carried_on,
    closing_round,
    curves_of,
    over_clients,
    saw,
    traffic,
)
from fedmutual.results.diagnostics import reports_by_client

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

# Okabe and Ito's palette, told apart with every common colour blindness; black is kept for the mean.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c7a00")
MARKERS = ("o", "s", "^")
GRID, BLACK = "#e4e4e4", "#000000"
_STEPS = [digit * 10**power for power in range(9) for digit in (1, 2, 5)]  # rounds between two ticks
STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.hashsalt": "fedmutual",  # equal runs give equal files
    "text.parse_math": False,  # a dollar sign in a name is one
}


def write_plots(history: Sequence[Record], output_dir: Path) -> None:
    """Draw what the history has figures for, each as PNG and SVG; one that fails is named in the log.

    Parameters
    ----------
    history : Sequence[Mapping[str, Any]]
        History lines; keys may be absent or None. Rejected reports are left out.
    output_dir : Path
        Folder of the run; ``accuracy``, ``collaboration`` and ``traffic`` are written there.
    """
    figures = {"accuracy": accuracy_figure, "collaboration": collaboration_figure, "traffic": traffic_figure}
    for name, draw in figures.items():
        try:
            save_figure(functools.partial(draw, history), output_dir / name)
        except Exception as error:  # whatever matplotlib makes of the figures; and a full disk
            logger.debug("the picture %s", name, exc_info=True)
            logger.warning("%s is not drawn: %s", output_dir / name, error)


def save_figure(draw: Callable[[], Figure | None], stem: Path) -> None:
    """Write a figure as ``<stem>.png`` and ``<stem>.svg``; equal figures give equal files."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure = draw()
        for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
            if figure is not None:
                buffer = io.BytesIO()
                figure.savefig(buffer, format=suffix[1:], dpi=150, metadata=metadata)
                atomic_write(stem.with_name(stem.name + suffix), buffer.getvalue())


def accuracy_figure(history: Sequence[Record]) -> Figure | None:
    """Accuracy per client and round on the unseen set (thick) and on its own validation images (thin).

    Mean and quantiles take every client's last known accuracy: in an asynchronous run no two report together.
    """
    lines = reports_by_client(history)
    unseen, validation = (curves_of(lines, f"{kind}_accuracy", 100) for kind in ("unseen", "validation"))
    if not unseen and not validation:
        return None
    figure, (axes,) = _figure(1, "Accuracy per client")
    both = unseen and validation
    axes.set_ylabel("accuracy (%)" if both else f"{'unseen' if unseen else 'validation'} accuracy (%)")
    draw_clients(axes, unseen or validation, list(lines))
    if both:
        middle = over_clients(carried_on(validation), np.median)
        thin = [validation.get(client, {}) for client in lines] if len(lines) <= MOST_LINES else [middle]
        for index, curve in enumerate(thin):
            draw_line(axes, curve, index, linewidth=0.9, markersize=0, alpha=0.6)
        axes.plot([], [], color="#777777", linewidth=2.2, label="thick: unseen set")
        axes.plot([], [], color="#777777", linewidth=0.9, label="thin: own validation images")
    round_axis(axes, closing_round(history))
    _legend(axes)
    return figure


def collaboration_figure(history: Sequence[Record]) -> Figure | None:
    """Local validation loss and KL to the peers before and after every mutual step.

    The report of round r + 1 holds the mutual step of round r: it is drawn from r to r + 1/2, the local
    training that follows from there to r + 1. A spike at the halves is what collaboration costs a client.
    """
    lines = reports_by_client(history)
    labels = {"loss": "validation loss\n(nats)", "kl": "KL to the peers\n(nats)"}
    panels = {label: teeth for key, label in labels.items() if (teeth := saw(lines, key))}
    if not panels:
        return None
    figure, all_axes = _figure(len(panels), "Before and after every mutual step")
    for axes, (label, teeth) in zip(all_axes, panels.items(), strict=True):
        axes.set_ylabel(label)
        draw_clients(axes, teeth, list(lines), teeth=True)
    round_axis(all_axes[-1])
    all_axes[-1].set_xlabel("round (solid, r to r + ½: mutual step; dotted, on to r + 1: local training)")
    _legend(all_axes[0])
    return figure


def traffic_figure(history: Sequence[Record]) -> Figure | None:
    """Payload of all clients since the start, each way."""
    curves, unit = traffic(history)
    if not curves:
        return None
    figure, (axes,) = _figure(1, "Traffic of all clients since the start")
    draw_traffic(axes, curves)
    axes.set_ylabel(f"payload ({unit})")
    round_axis(axes, closing_round(history))
    _legend(axes)
    return figure


def draw_traffic(axes: Axes, curves: Curves) -> None:
    """Solid: clients to server; dashed: server to clients."""
    for index, (way, curve) in enumerate(curves.items()):
        draw_line(axes, curve, index, label=way, linestyle=("-", "--")[index])
    axes.set_ylim(bottom=0)


def draw_clients(axes: Axes, curves: Curves, clients: Sequence[str], teeth: bool = False) -> None:
    """Draw one line per client and the mean; of more than ``MOST_LINES`` clients, median and quantiles.

    Parameters
    ----------
    clients : Sequence[str]
        All clients of the run, in the order of their colours.
    teeth : bool
        The curves are those of :func:`fedmutual.report.curves.saw`, for which no mean is drawn.
    """
    draw = _steps if teeth else draw_line
    if len(curves) > MOST_LINES:
        draw(axes, _bands(axes, curves if teeth else carried_on(curves)), 0, label="median of the clients")
        return
    for index, client in enumerate(clients):
        draw(axes, curves.get(client, {}), index, label=client)
    if len(curves) > 1 and not teeth:
        mean = over_clients(carried_on(curves), np.mean)
        axes.plot(*_xy(mean), color=BLACK, linewidth=2.2, linestyle="--", label="mean", zorder=4)


def draw_seeds(axes: Axes, curves: Seeds) -> None:
    """Draw a line per name, in the order of the colours: of several repetitions their mean, in a band."""
    for index, (name, seeds) in enumerate(curves.items()):
        positions = sorted(set.intersection(*(set(curve) for curve in seeds)))
        values = np.array([[curve[x] for x in positions] for curve in seeds])
        if not positions:
            continue
        draw_line(axes, dict(zip(positions, values.mean(0).tolist(), strict=True)), index, label=name)
        if len(seeds) > 1:
            edges = values.min(0), values.max(0)
            colour = COLOURS[index % len(COLOURS)]
            axes.fill_between(positions, *edges, color=colour, linewidth=0, alpha=0.18)


def draw_line(axes: Axes, curve: Curve, index: int, **style: Any) -> None:
    """Draw the n-th line, in its colour and with its markers."""
    looks: dict[str, Any] = {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index // len(COLOURS) % len(MARKERS)],
    }
    looks |= {"linewidth": 2.0, "markersize": 5, "markevery": 1 + len(curve) // 40}
    if "label" in style:  # one line of text; matplotlib hides what begins with an underscore
        style["label"] = re.sub("^_", " _", shown(style["label"]))
    if curve:
        axes.plot(*_xy(curve), **looks | style)


def _steps(axes: Axes, teeth: Curve, index: int, label: str) -> None:
    """Solid from before to after each mutual step, dotted in between."""
    draw_line(axes, teeth, index, linewidth=1.0, linestyle=":", markersize=0)
    gaps = {x + 0.75: math.nan for x in teeth if x % 1 == 0}
    draw_line(axes, teeth | gaps, index, label=label, markersize=4)


def _bands(axes: Axes, curves: Curves) -> Curve:
    """Shade the range and the quartiles over the clients; return the median."""
    low, lower, median, upper, high = (
        over_clients(curves, functools.partial(np.quantile, q=q)) for q in (0, 0.25, 0.5, 0.75, 1)
    )
    for bottom, top, alpha, label in (
        (low, high, 0.12, f"all {len(curves)} clients"),
        (lower, upper, 0.28, "the middle half"),
    ):
        edges = (list(bottom.values()), list(top.values()))
        axes.fill_between(list(median), *edges, color=COLOURS[0], linewidth=0, alpha=alpha, label=label)
    return median


def _xy(curve: Curve) -> tuple[list[float], list[float]]:
    xs = sorted(curve)
    return xs, [curve[x] for x in xs]


def _figure(panels: int, title: str) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.6 if panels == 1 else 6.4), layout="constrained")
    all_axes = list(figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0])
    all_axes[0].set_title(title)
    return figure, all_axes


def round_axis(axes: Axes, end: int | None = None) -> None:
    """Label about ten whole rounds; the closing message, which has no round of its own, is "end"."""
    axes.set_xlabel("round")
    low, high = math.ceil(axes.dataLim.x0), math.floor(axes.dataLim.x1)
    step = next(s for s in _STEPS if (high - low) / s <= 12)
    ticks = {x: str(x) for x in range(math.ceil(low / step) * step, high + 1, step)}
    if end is not None:  # a tick this close to "end" would be written over
        ticks = {x: text for x, text in ticks.items() if end - x >= 0.6 * step} | {end: "end"}
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set_xlim(axes.dataLim.x0 - 0.3, axes.dataLim.x1 + 0.3)


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0)
