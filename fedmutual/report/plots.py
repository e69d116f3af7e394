"""Plots of a run: accuracy, what collaboration does to each client, traffic.

Matplotlib is imported when a plot is drawn: the rest of the program starts without it. Figures are made
without pyplot, so no display and no global state are involved.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedmutual.files.atomic import atomic_write
from fedmutual.report.curves import (
    MOST_LINES,
    Curve,
    Curves,
    Record,
    carried_on,
    cumulated,
    curves_of,
    over_clients,
    saw,
)
from fedmutual.results.diagnostics import reports_by_client

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart with every common colour blindness; black is kept for the mean.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C7A00")
MARKERS = ("o", "s", "^")
_STEPS = [digit * 10**power for power in range(9) for digit in (1, 2, 5)]  # rounds between two ticks
STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.hashsalt": "fedmutual",  # equal runs give equal files
}


def write_plots(history: Sequence[Record], output_dir: Path) -> list[Path]:
    """Draw what the history has figures for and return the files, each as PNG and SVG.

    Parameters
    ----------
    history : Sequence[Mapping[str, Any]]
        History lines; keys may be absent or None. Rejected reports are left out.
    output_dir : Path
        Folder of the run; ``accuracy``, ``collaboration`` and ``traffic`` are written there.
    """
    import matplotlib

    files = []
    for name, draw in (
        ("accuracy", accuracy_figure),
        ("collaboration", collaboration_figure),
        ("traffic", traffic_figure),
    ):
        with matplotlib.rc_context(STYLE):
            figure = draw(history)
            files += save_figure(figure, output_dir / name) if figure is not None else []
    return files


def accuracy_figure(history: Sequence[Record]) -> Figure | None:
    """Accuracy per client and round on the unseen set (thick) and on its own validation images (thin).

    Mean and quantiles take every client's last known accuracy: in an asynchronous run no two report together.
    """
    lines = reports_by_client(history)
    unseen, validation = (
        curves_of(lines, "unseen_accuracy", 100),
        curves_of(lines, "validation_accuracy", 100),
    )
    if not unseen and not validation:
        return None
    figure, (axes,) = _figure(1, "Accuracy per client")
    both = unseen and validation
    axes.set_ylabel("accuracy (%)" if both else f"{'unseen' if unseen else 'validation'} accuracy (%)")
    if len(lines) > MOST_LINES:
        _accuracy_bands(axes, unseen, validation)
    else:
        for index, client in enumerate(lines):
            main = (unseen or validation).get(client, {})
            _line(axes, main, index, label=client, linewidth=2.0, markersize=5)
            if unseen:
                _line(axes, validation.get(client, {}), index, linewidth=0.9, markersize=0, alpha=0.6)
        if len(lines) > 1:
            mean = over_clients(carried_on(unseen or validation), np.mean)
            axes.plot(*_xy(mean), color="black", linewidth=2.2, linestyle="--", label="mean", zorder=4)
        if both:
            axes.plot([], [], color="#777777", linewidth=2.2, label="thick: unseen set")
            axes.plot([], [], color="#777777", linewidth=0.9, label="thin: own validation images")
    _round_axis(axes, history)
    return figure


def collaboration_figure(history: Sequence[Record]) -> Figure | None:
    """Local validation loss and KL to the peers before and after every mutual step.

    The report of round r + 1 holds the mutual step of round r: it is drawn from r to r + 1/2, the local
    training that follows from there to r + 1. A spike at the halves is what collaboration costs a client.
    """
    lines = reports_by_client(history)
    loss, kl = saw(lines, "loss_before", "loss_after"), saw(lines, "kl_before", "kl_after")
    panels = [
        (teeth, label)
        for teeth, label in ((loss, "validation loss\n(nats)"), (kl, "KL to the peers\n(nats)"))
        if teeth
    ]
    if not panels:
        return None
    figure, all_axes = _figure(len(panels), "Before and after every mutual step")
    for axes, (teeth, label) in zip(all_axes, panels, strict=True):
        axes.set_ylabel(label)
        if len(teeth) > MOST_LINES:
            _steps(axes, _bands(axes, teeth), 0, "median")
        else:
            for index, client in enumerate(lines):
                _steps(axes, teeth.get(client, {}), index, client)
    axes = all_axes[-1]
    _round_axis(axes, [])
    axes.set_xlabel("round (solid, r to r + ½: mutual step; dotted, on to r + 1: local training)")
    return figure


def traffic_figure(history: Sequence[Record]) -> Figure | None:
    """Payload of all clients since the start, each way."""
    scale, unit = 1.0, "bytes"
    totals = {key: cumulated(history, f"{key}_bytes") for key in ("uplink", "downlink")}
    top = max((max(curve.values()) for curve in totals.values() if curve), default=0.0)
    if top <= 0:
        return None
    for power, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if top >= power:
            scale, unit = power, name
            break
    figure, (axes,) = _figure(1, "Traffic of all clients since the start")
    looks = (("uplink", "clients to server", "-"), ("downlink", "server to clients", "--"))
    for index, (key, label, dashes) in enumerate(looks):
        scaled = {x: y / scale for x, y in totals[key].items()}
        _line(axes, scaled, index, label=label, linewidth=2.2, markersize=4, linestyle=dashes)
    axes.set_ylabel(f"payload ({unit})")
    axes.set_ylim(bottom=0)
    _round_axis(axes, history)
    return figure


def _line(axes: Axes, curve: Curve, index: int, **style: Any) -> None:
    if curve:
        marker = MARKERS[index // len(COLOURS) % len(MARKERS)]
        axes.plot(*_xy(curve), color=COLOURS[index % len(COLOURS)], marker=marker, **style)


def _steps(axes: Axes, teeth: Curve, index: int, client: str) -> None:
    """Solid from before to after each mutual step, dotted in between."""
    _line(axes, teeth, index, linewidth=1.0, linestyle=":", markersize=0)
    for index_of_step, x in enumerate(x for x in teeth if x % 1 == 0):
        step = {x: teeth[x], x + 0.5: teeth[x + 0.5]}
        _line(axes, step, index, linewidth=2.0, markersize=4, label=None if index_of_step else client)


def _accuracy_bands(axes: Axes, unseen: Curves, validation: Curves) -> None:
    label = "unseen set" if unseen else "own validation images"
    middle = _bands(axes, carried_on(unseen or validation))
    _line(axes, middle, 0, label=f"median, {label}", linewidth=2.2, markersize=4)
    if unseen and validation:
        other = over_clients(carried_on(validation), np.median)
        axes.plot(*_xy(other), color=COLOURS[5], linewidth=1.2, label="median, own validation images")


def _bands(axes: Axes, curves: Curves) -> Curve:
    """Shade the range and the quartiles over the clients; return the median."""
    low, lower, median, upper, high = (
        over_clients(curves, functools.partial(np.quantile, q=q)) for q in (0, 0.25, 0.5, 0.75, 1)
    )
    colour, x = COLOURS[0], list(median)
    for bottom, top, alpha, label in (
        (low, high, 0.12, f"all {len(curves)} clients"),
        (lower, upper, 0.28, "the middle half"),
    ):
        edges = (list(bottom.values()), list(top.values()))
        axes.fill_between(x, *edges, color=colour, linewidth=0, alpha=alpha, label=label)
    return median


def _xy(curve: Curve) -> tuple[list[float], list[float]]:
    xs = sorted(curve)
    return xs, [curve[x] for x in xs]


def _figure(panels: int, title: str) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.6 if panels == 1 else 6.4), layout="constrained")
    grid = figure.subplots(panels, 1, sharex=True, squeeze=False)
    all_axes = [row[0] for row in grid]
    all_axes[0].set_title(title)
    return figure, all_axes


def _round_axis(axes: Axes, history: Sequence[Record]) -> None:
    """Ticks at about ten whole rounds; the closing message, which has no round of its own, is "end"."""
    axes.set_xlabel("round")
    low, high = math.ceil(axes.dataLim.x0), math.floor(axes.dataLim.x1)
    end = max((line["round"] for line in history if line.get("closing")), default=None)
    step = next(s for s in _STEPS if (high - low) / s <= 12)
    ticks = [x for x in range(low, high + 1) if x % step == 0]
    labels = [str(x) for x in ticks]
    if end is not None:
        # a tick so near to "end" would be written over
        kept = [x for x in ticks if end - x >= 0.6 * step]
        ticks, labels = [*kept, end], [*map(str, kept), "end"]
    axes.set_xticks(ticks, labels)
    axes.set_xlim(axes.dataLim.x0 - 0.3, axes.dataLim.x1 + 0.3)
    first = axes.figure.axes[0]
    if first.get_legend_handles_labels()[0]:
        first.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0)


def save_figure(figure: Figure, stem: Path) -> list[Path]:
    """Write a figure as ``<stem>.png`` and ``<stem>.svg``; equal figures give equal files."""
    files = []
    for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=suffix[1:], dpi=150, metadata=metadata)
        file = stem.with_name(stem.name + suffix)
        atomic_write(file, buffer.getvalue())
        files.append(file)
    return files
