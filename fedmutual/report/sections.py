"""The sections of the report on one run: figures into what the template shows.

A section whose data are missing is a sentence that says why.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from fedmutual.report.charts import ALL, MEAN_DASHES, Line, client_chart, legend, line_chart, look
from fedmutual.report.curves import MOST_LINES, Curves, cumulated, curves_of, saw
from fedmutual.report.opinions import agreement_context, confusion_context, disputed_context
from fedmutual.report.recorded import RecordedRun
from fedmutual.report.tables import human_bytes, percent
from fedmutual.results.diagnostics import reports_by_client
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
        "title": _title(summary),
        "status": summary["status"],
        "reason": summary.get("reason", ""),
        "tiles": _tiles(summary),
        "warnings": summary.get("warnings", []),
        "rejected": summary.get("rejected", []),
        "table": _table(summary),
        "legend": _legend(clients),
        "charts": _charts(run.history, clients),
        "confusion": confusion_context(run),
        "agreement": agreement_context(run.evidence),
        "disputed": disputed_context(run.evidence),
        "settings": _settings(summary["config"]),
        "command": shlex.join(["fedmutual", "run", *_portable(run.overrides)]),
        "versions": summary.get("versions", {}),
        "digest": summary.get("public_digest"),
    }


def seconds(duration: float) -> str:
    """A duration for people: 48 s, 3 min 05 s, 2 h 07 min."""
    whole = round(duration)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _legend(clients: Sequence[str]) -> list[Context]:
    if len(clients) > MOST_LINES:
        return [
            {
                "name": "median of the clients (shaded: all of them, and the middle half)",
                "look": ALL,
                "dash": "",
            }
        ]
    mean_line = {"name": "mean of the clients", "look": ALL, "dash": MEAN_DASHES}
    return [*legend(clients), *([mean_line] if len(clients) > 1 else [])]


def _title(summary: Mapping[str, Any]) -> str:
    experiment = f", experiment {summary['experiment']}" if summary.get("experiment") else ""
    return f"{summary['strategy']}{experiment}"


def _tiles(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    unseen, clients = summary.get("unseen"), summary["clients"].values()
    done, rounds = summary.get("rounds_completed", summary["rounds"]), summary["rounds"]
    tiles = [("rounds", str(rounds) if done >= rounds else f"{done} of {rounds}"), ("seed", summary["seed"])]
    if unseen:
        names = (("mean", "unseen, mean"), ("worst", "unseen, worst"), ("ensemble", "unseen, ensemble"))
        tiles += [(label, f"{percent(unseen.get(f'{name}_accuracy'))} %") for name, label in names]
    else:
        known = [c["validation_accuracy"] for c in clients if c.get("validation_accuracy") is not None]
        tiles += [("validation, mean", f"{percent(mean(known))} %")]
    traffic = summary["traffic"]
    tiles += [
        ("sent by clients", human_bytes(traffic["uplink_bytes"])),
        ("sent to clients", human_bytes(traffic["downlink_bytes"])),
        ("time", seconds(summary["seconds"]["total"])),
    ]
    return tiles


def _table(summary: Mapping[str, Any]) -> Context:
    keys = ("validation_accuracy", "unseen_accuracy", "unseen_balanced_accuracy", "unseen_auroc")
    rows = []
    for position, (name, client) in enumerate(summary["clients"].items()):
        rows.append(
            {
                "name": name,
                "look": look(position)[0] if len(summary["clients"]) <= MOST_LINES else "",
                "model": client.get("model") or "-",
                "images": "-" if client.get("num_examples") is None else f"{client['num_examples']:,}",
                "figures": [percent(client.get(key)) for key in keys],
                "up": human_bytes(client["uplink_bytes"]),
                "down": human_bytes(client["downlink_bytes"]),
                "finished": client.get("finished", True),
            }
        )
    columns = [[c[k] for c in summary["clients"].values() if c.get(k) is not None] for k in keys]
    unseen = summary.get("unseen") or {}
    together = [None, *(unseen.get(f"ensemble_{key}") for key in ("accuracy", "balanced_accuracy", "auroc"))]
    feet = [("mean", [percent(mean(column)) for column in columns], "", "")]
    feet.append(("worst", [percent(min(column, default=None)) for column in columns], "", ""))
    if together[1] is not None:
        feet.append(("ensemble", [percent(value) for value in together], "", ""))
    if summary.get("global_model"):
        feet.append(("global model", [percent(summary["global_model"].get(key)) for key in keys], "", ""))
    traffic = summary["traffic"]
    up, down = (human_bytes(traffic[key]) for key in ("uplink_bytes", "downlink_bytes"))
    feet.append(("total", [""] * len(keys), up, down))
    return {"rows": rows, "feet": feet, "unseen": unseen.get("num_examples")}


def _charts(history: Sequence[Record], clients: Sequence[str]) -> list[Context]:
    lines = reports_by_client(history)
    end = max((line["round"] for line in history if line.get("closing")), default=None)
    spikes = "Thick: the mutual step, before and after. Dotted: the local training that follows."

    def chart(title: str, note: str, curves: Curves, label: str, missing: str, end: int | None) -> Context:
        drawn = client_chart(curves, clients, label, end=end, teeth=title.startswith("Collaboration"))
        return {"title": title, "note": note, "svg": drawn, "missing": missing}

    return [
        chart(
            "Unseen accuracy",
            "On the shared unseen set, in per cent; during the run on a part of it.",
            curves_of(lines, "unseen_accuracy", 100), "%",
            "There is no unseen set, or it was not measured.", end,
        ),
        chart(
            "Validation accuracy",
            "On each client's own held-out images, in per cent.",
            curves_of(lines, "validation_accuracy", 100), "%", NOTHING, end,
        ),
        chart(
            "Collaboration: loss",
            f"Validation loss in nats. {spikes}",
            saw(lines, "loss_before", "loss_after"), "nats", NO_STEP, None,
        ),
        chart(
            "Collaboration: accuracy",
            f"Validation accuracy in per cent. {spikes}",
            saw(lines, "accuracy_before", "accuracy_after", 100), "%", NO_STEP, None,
        ),
        chart(
            "Collaboration: KL to the peers",
            f"In nats, on the public samples. {spikes}",
            saw(lines, "kl_before", "kl_after"), "nats", NO_STEP, None,
        ),
        chart(
            "KL over rounds",
            "How far each client's predictions of a round are from its peers', in nats.",
            curves_of(lines, "kl_before", shift=-1.0), "nats", NO_STEP, None,
        ),
        chart(
            "Training loss",
            "Of the last training of a round, in nats.",
            curves_of(lines, "train_loss"), "nats", NOTHING, None,
        ),
        _traffic(history, end),
    ]  # fmt: skip


def _traffic(history: Sequence[Record], end: int | None) -> Context:
    totals = {key: cumulated(history, f"{key}_bytes") for key in ("uplink", "downlink")}
    top = max((max(curve.values()) for curve in totals.values() if curve), default=0.0)
    if top <= 0:
        return {"title": "Traffic", "note": "", "svg": None, "missing": "Nothing has been sent."}
    power, unit = next(((p, u) for p, u in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if top >= p), (1.0, "B"))
    scaled = {key: {x: y / power for x, y in curve.items()} for key, curve in totals.items()}
    lines = [
        Line("clients to server", scaled["uplink"], ALL),
        Line("server to clients", scaled["downlink"], ALL, "7 3"),
    ]
    note = f"All clients since the start, in {unit}. Solid: clients to server; dashed: server to clients."
    return {"title": "Traffic", "note": note, "svg": line_chart(lines, unit, end=end), "missing": ""}


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
