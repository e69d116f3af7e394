"""Several runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from fedmutual.report.curves import Curves, carried_on, cumulated, curves_of, over_clients
from fedmutual.report.inline import legend, look, panel
from fedmutual.report.plots import draw_lines
from fedmutual.report.recorded import RecordedRun
from fedmutual.report.sections import seconds
from fedmutual.report.tables import WAYS, human_bytes, percent
from fedmutual.report.verdict import verdicts
from fedmutual.results.diagnostics import reports_by_client
from fedmutual.results.summary import mean
from fedmutual.settings.described import flat

ABSENT = "-"


def comparison_context(runs: Sequence[RecordedRun]) -> dict[str, Any]:
    """What the template shows of several runs together."""

    def means(key: str, scale: float, shift: float = 0.0) -> Curves:
        curves = {run.name: curves_of(reports_by_client(run.history), key, scale, shift) for run in runs}
        return {name: over_clients(carried_on(of), np.mean) for name, of in curves.items()}

    sent = {run.name: cumulated(run.history, "uplink_bytes", 1000) for run in runs}
    note = "Mean of the clients, in per cent; the last point is the closing measurement."
    missing = "None of the runs has figures for this."
    charts = [
        ("Unseen accuracy", note, means("unseen_accuracy", 100)),
        ("Validation accuracy", note, means("validation_accuracy", 100)),
        ("KL over rounds", "Mean of the clients, in nats.", means("kl_before", 1, -1)),
        ("Sent by the clients", "All clients since the start, in kB.", sent),
    ]
    return {
        "verdicts": verdicts(runs),
        "legend": legend([run.name for run in runs]),
        "rows": [_row(position, run) for position, run in enumerate(runs)],
        "differences": differences(runs),
        "charts": [
            panel("all runs", title, note, missing, partial(draw_lines, curves=curves))
            for title, note, curves in charts
        ],
    }


def differences(runs: Sequence[RecordedRun]) -> list[tuple[str, list[str]]]:
    """Settings that are not the same in all runs: dotted key, and each run's value."""
    configs = [flat(run.summary["config"]) for run in runs]
    keys = list(dict.fromkeys(key for config in configs for key in config))
    rows = [(key, [_text(config.get(key, ABSENT)) for config in configs]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _text(value: Any) -> str:
    return "null" if value is None else str(value)


def _row(position: int, run: RecordedRun) -> dict[str, Any]:
    summary, unseen = run.summary, run.summary["unseen"] or {}
    known = [c["validation_accuracy"] for c in summary["clients"].values()]
    validation = mean(value for value in known if value is not None)
    accuracies = [validation, *(unseen.get(f"{name}_accuracy") for name in ("mean", "worst", "ensemble"))]
    cells = [len(summary["clients"]), *map(percent, accuracies)]
    cells += [human_bytes(summary["traffic"][way]) for way in WAYS]
    return {
        "name": run.name,
        "look": look(position),
        "strategy": summary["strategy"],
        "status": summary["status"],
        "cells": [*cells, seconds(summary["seconds"]["total"])],
    }
