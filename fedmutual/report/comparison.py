"""Several runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from fedmutual.report.curves import Curve, Seeds, carried_on, cumulated, curves_of, over_clients
from fedmutual.report.inline import legend, look, panel
from fedmutual.report.plots import draw_seeds
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

    groups = repetitions(runs)

    def means(key: str, scale: float, shift: float = 0.0) -> Seeds:
        def curve(run: RecordedRun) -> Curve:
            curves = curves_of(reports_by_client(run.history), key, scale, shift)
            return over_clients(carried_on(curves), np.mean)

        return {name: [curve(run) for run in seeds] for name, seeds in groups.items()}

    sent = {
        name: [cumulated(run.history, "uplink_bytes", 1000) for run in seeds]
        for name, seeds in groups.items()
    }
    band = " Line and band: mean and range over the seeds." if len(groups) < len(runs) else ""
    note = f"Mean of the clients, in per cent; the last point is the closing measurement.{band}"
    missing = "None of the runs has figures for this."
    charts = [
        ("Unseen accuracy", note, means("unseen_accuracy", 100)),
        ("Validation accuracy", note, means("validation_accuracy", 100)),
        ("KL over rounds", f"Mean of the clients, in nats.{band}", means("kl_before", 1, -1)),
        ("Sent by the clients", f"All clients since the start, in kB.{band}", sent),
    ]
    return {
        "verdicts": verdicts(runs),
        "legend": legend(list(groups)),
        "rows": [
            _row(position, run)
            for run in runs
            for position, seeds in enumerate(groups.values())
            if any(run is seed for seed in seeds)
        ],
        "differences": differences(runs),
        "charts": [
            panel("all runs", title, note, missing, partial(draw_seeds, curves=curves))
            for title, note, curves in charts
        ],
    }


def repetitions(runs: Sequence[RecordedRun]) -> dict[str, list[RecordedRun]]:
    """Put runs that differ in their seed only together, each group under a name of its own.

    A group of several seeds is named by its strategy, and by the settings that tell it from the others; a run
    of its own by its own name.
    """
    groups: dict[str, list[RecordedRun]] = {}
    for run in runs:
        config = {key: value for key, value in flat(run.summary["config"]).items() if key != "seed"}
        groups.setdefault(repr(sorted(config.items(), key=str)), []).append(run)
    firsts = [seeds[0] for seeds in groups.values()]
    told_by_name = ("seed", "strategy.")  # the strategy's name is said anyway
    differing = [key for key, _ in differences(firsts) if not key.startswith(told_by_name)]
    named: dict[str, list[RecordedRun]] = {}
    for seeds in groups.values():
        name = seeds[0].name
        if len(seeds) > 1:
            config = flat(seeds[0].summary["config"])
            told = [seeds[0].summary["strategy"]]
            told += [f"{key}={_text(config.get(key, ABSENT))}" for key in differing[:3]]
            name = f"{', '.join(told)} ({len(seeds)} seeds)"
        while name in named:
            name += "'"
        named[name] = seeds
    return named


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
