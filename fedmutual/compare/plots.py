"""Accuracy against its price, a curve a variant."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedmutual.compare.outcome import Outcome, Point
from fedmutual.compare.plan import Plan
from fedmutual.report.plots import COLOURS, draw_line, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = tuple[Point, ...]
PRICES = {
    "round": "round",
    "bytes": "payload of a client so far, both ways (bytes)",
    "seconds": "seconds, clients side by side",
    "virtual": "seconds of the emulated clock",
}


def write_plots(plan: Plan, outcomes: Sequence[Outcome], folder: Path) -> None:
    """Draw ``accuracy_by_round``, ``_bytes`` (logarithmic) and ``_seconds``, each as PNG and SVG.

    Measured and virtual seconds are never in one plot: where a study has both, the virtual ones are in
    ``accuracy_by_virtual_seconds``.

    Of a study whose runs measured nothing on the way (``evaluation.unseen_every=0``) the final points alone
    are drawn.
    """
    for price in ("round", "bytes"):
        save_figure(functools.partial(_figure, plan, outcomes, price), folder / f"accuracy_by_{price}")
    measured = [outcome for outcome in outcomes if not outcome.virtual]
    virtual = [outcome for outcome in outcomes if outcome.virtual]
    mixed = any(outcome.curve for outcome in measured) and any(outcome.curve for outcome in virtual)
    for seconds, name in ((measured, "seconds"), (virtual, "virtual_seconds" if mixed else "seconds")):
        if any(outcome.curve for outcome in seconds):
            draw = functools.partial(_figure, plan, seconds, "seconds")
            save_figure(draw, folder / f"accuracy_by_{name}")


def _figure(plan: Plan, outcomes: Sequence[Outcome], price: str) -> Figure | None:
    """One panel a condition: the mean over the seeds, and the range between the lowest and the highest."""
    from matplotlib.figure import Figure

    curves: dict[str, dict[str, list[Curve]]] = {}
    for outcome in outcomes:
        if outcome.curve:
            variants = curves.setdefault(outcome.run.condition, {})
            variants.setdefault(outcome.run.variant, []).append(outcome.curve)
    if not curves:
        return None
    figure = Figure(figsize=(max(9, 4.5 * len(curves) + 2.5), 4.6), layout="constrained")
    panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    handles: dict[str, Any] = {}
    for axes, condition in zip(panels, filter(curves.__contains__, plan.conditions), strict=True):
        axes.set_title(condition or "Accuracy on the unseen set")
        axes.set_xlabel(PRICES["virtual" if price == "seconds" and outcomes[0].virtual else price])
        axes.set_xscale("log" if price == "bytes" else "linear")
        for index, variant in enumerate(plan.variants):
            if variant in curves[condition]:
                _draw(axes, curves[condition][variant], price, index, variant)
        handles |= {str(text): handle for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    panels[0].set_ylabel("mean accuracy of the clients (%)")
    figure.legend(list(handles.values()), list(handles), loc="outside right upper")
    return figure


def _draw(axes: Axes, curves: Sequence[Curve], price: str, index: int, label: str) -> None:
    """Seeds are put together point by point; of seeds with different numbers of points, the first ones."""
    points = min(len(curve) for curve in curves)
    accuracy = 100 * np.array([[point.accuracy for point in curve[:points]] for curve in curves])
    position = np.array([[getattr(point, price) for point in curve[:points]] for curve in curves]).mean(0)
    mean = dict(zip(position, accuracy.mean(0), strict=True))
    draw_line(axes, mean, index, label=label, linewidth=1.8, markersize=4)
    if len(curves) > 1:
        low, high = accuracy.min(0), accuracy.max(0)
        axes.fill_between(position, low, high, color=COLOURS[index % len(COLOURS)], alpha=0.15, linewidth=0)
