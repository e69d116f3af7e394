"""The sections of the report on one run: figures into what the template shows.

A section whose data are missing is a sentence that says why.
"""

from __future__ import annotations

import functools
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from fedmutual.report.curves import MOST_LINES, closing_round, curves_of, saw, traffic
from fedmutual.report.inline import MEAN, Draw, legend, look, panel
from fedmutual.report.leaks import leak_rows
from fedmutual.report.opinions import (
    agreement_context,
    confusion_context,
    disputed_context,
    mistakes_context,
    recall_context,
)
from fedmutual.report.plots import draw_clients, draw_traffic
from fedmutual.report.recorded import RecordedRun
from fedmutual.report.tables import MEASURES, WAYS, client_rows, human_bytes, percent, total_rows
from fedmutual.report.verdict import run_verdict
from fedmutual.results.diagnostics import lacking, reports_by_client
from fedmutual.results.directory import Record
from fedmutual.results.summary import mean
from fedmutual.settings.described import flat, without_paths

Context = dict[str, Any]

NOTHING = "No client has reported a figure for this."
NO_STEP = "No mutual step was measured: the strategy has none, or the run ended before the first."


def run_context(run: RecordedRun) -> Context:
    """Everything that the template shows of a run."""
    summary = run.summary
    clients = list(summary["clients"])
    return {
        "name": run.name,
        "summary": summary,
        "verdict": run_verdict(summary),
        "tiles": _tiles(summary),
        "table": _table(summary),
        "lacking": lacking(run.history),
        "legend": _legend(clients),
        "charts": _charts(run.name, run.history, clients),
        "date": (summary.get("date") or "").replace("T", " "),
        "confusion": confusion_context(run),
        "recall": recall_context(run),
        "agreement": agreement_context(run.evidence),
        "mistakes": mistakes_context(run.evidence),
        "disputed": disputed_context(run.evidence),
        "leaks": _leaks(run),
        "settings": _settings(summary["config"]),
        "command": shlex.join(["fedmutual", "run", *_portable(run.overrides)]),
    }


def seconds(duration: float) -> str:
    """A duration for people: 48 s, 3 min 05 s, 2 h 07 min."""
    whole = round(duration)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _leaks(run: RecordedRun) -> Context:
    if run.audit is None:
        return {"note": "Not measured: `fedmutual audit` does it, for a run with privacy.record=true."}
    return {
        "note": "Attacks on what it received, measured by `fedmutual audit`.",
        "rows": leak_rows(run.audit),
    }


def _legend(clients: Sequence[str]) -> list[Context]:
    if len(clients) > MOST_LINES:
        name = "median of the clients (shaded: all of them, and the middle half)"
        return [{"name": name, "look": look(0)}]
    mean_line = {"name": "mean of the clients", "look": MEAN}
    return [*legend(clients), *([mean_line] if len(clients) > 1 else [])]


def _tiles(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    unseen, clients = summary.get("unseen"), summary["clients"].values()
    done, rounds = summary["rounds_completed"], summary["rounds"]
    tiles = [("rounds", str(rounds) if done >= rounds else f"{done} of {rounds}"), ("seed", summary["seed"])]
    if unseen:
        names = (("mean", "unseen, mean"), ("worst", "unseen, worst"), ("ensemble", "unseen, ensemble"))
        tiles += [(label, f"{percent(unseen.get(f'{name}_accuracy'))} %") for name, label in names]
    else:
        known = [c["validation_accuracy"] for c in clients if c.get("validation_accuracy") is not None]
        tiles += [("validation, mean", f"{percent(mean(known))} %")]
    sent = [human_bytes(summary["traffic"][way]) for way in WAYS]
    tiles += zip(("sent by clients", "sent to clients"), sent, strict=True)
    return [*tiles, ("time", seconds(summary["seconds"]["total"]))]


def _table(summary: Mapping[str, Any]) -> Context:
    measures = (*MEASURES, "unseen_auroc")
    rows = client_rows(summary, measures)
    looks = [look(position) if len(rows) <= MOST_LINES else None for position in range(len(rows))]
    unseen = (summary.get("unseen") or {}).get("num_examples")
    feet = total_rows(summary, measures)
    return {"rows": list(zip(looks, rows, strict=True)), "feet": feet, "unseen": unseen}


def _charts(name: str, history: Sequence[Record], clients: Sequence[str]) -> list[Context]:
    lines, end = reports_by_client(history), closing_round(history)
    sent, unit = traffic(history)
    spikes = "Solid, from r to r + ½: the mutual step. Dotted: the local training that follows."
    draw = functools.partial(draw_clients, clients=clients)

    def lone(key: str, scale: float = 1.0, shift: float = 0.0) -> Draw:
        return functools.partial(draw, curves=curves_of(lines, key, scale, shift))

    def step(key: str, scale: float = 1.0) -> Draw:
        return functools.partial(draw, curves=saw(lines, key, scale), teeth=True)

    on_unseen = "On the shared unseen set, in per cent; during the run on a part of it."
    no_unseen = "There is no unseen set, or it was not measured."
    on_own = "On each client's own held-out images, in per cent."
    loss, accuracy = f"Validation loss in nats. {spikes}", f"Validation accuracy in per cent. {spikes}"
    to_peers = f"In nats, on the public samples. {spikes}"
    over_rounds = "How far each client's predictions of a round are from its peers', in nats."
    training = "Of the last training of a round, in nats."
    ways = f"All clients since the start, in {unit}. Solid: clients to server; dashed: server to clients."
    charts: list[tuple[str, str, str, Draw, int | None]] = [
        ("Unseen accuracy", on_unseen, no_unseen, lone("unseen_accuracy", 100), end),
        ("Validation accuracy", on_own, NOTHING, lone("validation_accuracy", 100), end),
        ("Collaboration: loss", loss, NO_STEP, step("loss"), None),
        ("Collaboration: accuracy", accuracy, NO_STEP, step("accuracy", 100), None),
        ("Collaboration: KL to the peers", to_peers, NO_STEP, step("kl"), None),
        ("KL over rounds", over_rounds, NO_STEP, lone("kl_before", shift=-1.0), None),
        ("Training loss", training, NOTHING, lone("train_loss"), None),
        ("Traffic", ways, "Nothing has been sent.", functools.partial(draw_traffic, curves=sent), end),
    ]
    return [panel(name, *chart) for chart in charts]


def _settings(config: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    groups: dict[str, list[tuple[str, str]]] = {"run": []}
    for key, value in flat(config).items():
        group, _, name = key.partition(".")
        groups.setdefault(group if name else "run", []).append((key, "null" if value is None else str(value)))
    return list(groups.items())


def _portable(overrides: Sequence[str]) -> list[str]:
    """The overrides that mean the same elsewhere: folders of this machine do not."""
    pairs = [(override, override.partition("=")[2].strip("'\"")) for override in overrides]
    return [override for override, value in pairs if without_paths([value])]
