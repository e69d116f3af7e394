"""Several runs side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fedmutual.report.charts import Line, legend, line_chart, look
from fedmutual.report.curves import Curve, carried_on, cumulated, curves_of, over_clients
from fedmutual.report.recorded import RecordedRun
from fedmutual.report.sections import seconds
from fedmutual.report.tables import human_bytes, percent
from fedmutual.results.diagnostics import reports_by_client
from fedmutual.results.summary import mean
from fedmutual.settings.described import flat

ABSENT = "-"


def comparison_context(runs: Sequence[RecordedRun]) -> dict[str, Any]:
    """What the template shows of several runs together."""
    return {
        "legend": legend([run.name for run in runs]),
        "rows": [_row(position, run) for position, run in enumerate(runs)],
        "differences": differences(runs),
        "charts": [
            _chart(runs, "Unseen accuracy", "%", _mean_of("unseen_accuracy", 100)),
            _chart(runs, "Validation accuracy", "%", _mean_of("validation_accuracy", 100)),
            _chart(runs, "KL over rounds", "nats", _mean_of("kl_before", 1, -1)),
            _chart(runs, "Sent by the clients", "kB", _uplink),
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
    summary = run.summary
    unseen, traffic = summary.get("unseen") or {}, summary["traffic"]
    known = [c.get("validation_accuracy") for c in summary["clients"].values()]
    validation = mean([value for value in known if value is not None])
    return {
        "name": run.name,
        "look": look(position)[0],
        "strategy": summary["strategy"],
        "status": summary["status"],
        "clients": len(summary["clients"]),
        "figures": [
            percent(validation),
            *(percent(unseen.get(f"{name}_accuracy")) for name in ("mean", "worst", "ensemble")),
        ],
        "up": human_bytes(traffic["uplink_bytes"]),
        "down": human_bytes(traffic["downlink_bytes"]),
        "time": seconds(summary["seconds"]["total"]),
    }


def _chart(
    runs: Sequence[RecordedRun], title: str, label: str, of: Callable[[RecordedRun], Curve]
) -> dict[str, Any]:
    lines = []
    for position, run in enumerate(runs):
        curve = of(run)
        if curve:
            lines.append(Line(run.name, curve, *look(position)))
    drawn = line_chart(lines, label) if lines else None
    note = (
        "All clients since the start, in kB."
        if of is _uplink
        else "Mean of the clients; the last point is the closing measurement."
    )
    if label == "nats":
        note = "Mean of the clients, in nats."
    return {"title": title, "note": note, "svg": drawn, "missing": "None of the runs has figures for this."}


def _mean_of(key: str, scale: float, shift: float = 0.0) -> Callable[[RecordedRun], Curve]:
    def of(run: RecordedRun) -> Curve:
        curves = curves_of(reports_by_client(run.history), key, scale, shift)
        return over_clients(carried_on(curves), np.mean)

    return of


def _uplink(run: RecordedRun) -> Curve:
    return {x: y / 1000 for x, y in cumulated(run.history, "uplink_bytes").items()}
