"""Accuracy against its price, a curve a variant."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

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
}


def write_plots(plan: Plan, outcomes: Sequence[Outcome], folder: Path) -> list[Path]:
    """Draw ``accuracy_by_round``, ``_bytes`` (logarithmic) and ``_seconds``, each as PNG and SVG.

    Of a study whose runs measured nothing on the way (``evaluation.unseen_every=0``) the final points alone
    are drawn.
    """
    files = []
    for price, label in PRICES.items():
        draw = functools.partial(_figure, plan, outcomes, price, label)
        files += save_figure(draw, folder / f"accuracy_by_{price}")
    return files


def _figure(plan: Plan, outcomes: Sequence[Outcome], price: str, label: str) -> Figure | None:
    """One panel a condition: the mean over the seeds, and the range between the lowest and the highest."""
    from matplotlib.figure import Figure

    curves = {
        (condition, variant): found
        for condition in plan.conditions
        for variant in plan.variants
        if (found := _curves(outcomes, condition, variant))
    }
    conditions = [c for c in plan.conditions if any(key[0] == c for key in curves)]
    if not conditions:
        return None
    figure = Figure(figsize=(max(9, 4.5 * len(conditions) + 2.5), 4.6), layout="constrained")
    panels: list[Axes] = list(figure.subplots(1, len(conditions), sharey=True, squeeze=False)[0])
    for axes, condition in zip(panels, conditions, strict=True):
        axes.set_title(condition or "Accuracy on the unseen set")
        axes.set_xlabel(label)
        if price == "bytes":
            axes.set_xscale("log")
        for index, variant in enumerate(plan.variants):
            if (condition, variant) in curves:
                _draw(axes, curves[condition, variant], price, index, variant)
    panels[0].set_ylabel("mean accuracy of the clients (%)")
    handles = {t: h for axes in panels for h, t in zip(*axes.get_legend_handles_labels(), strict=True)}
    shown = [variant for variant in plan.variants if variant in handles]
    figure.legend([handles[v] for v in shown], shown, loc="outside right upper")
    return figure


def _curves(outcomes: Sequence[Outcome], condition: str, variant: str) -> list[Curve]:
    mine = [o for o in outcomes if (o.run.condition, o.run.variant) == (condition, variant)]
    return [outcome.curve for outcome in mine if outcome.curve]


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
