"""``summary.json``: what came of a run, assembled from its history."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedmutual.settings.described import installed_versions, without_paths

STATUSES = ("completed", "failed", "stopped")
MEASURES = (
    "accuracy",
    "balanced_accuracy",
    "auroc",
    "f1",
    "ece",
    "recall",
)  # the last one a list, a figure a class
DIRECTIONS = ("uplink_bytes", "downlink_bytes", "evaluation_bytes")

Record = Mapping[str, Any]
_KINDS: dict[str, Any] = {
    "strategy": str,
    "rounds": int,
    "rounds_completed": int,
    "seed": int,
    "status": str,
    "reason": str,
    "clients": dict,
    "unseen": dict | None,
    "traffic": dict,
    "seconds": dict,
    "versions": dict,
    "warnings": list,
    "rejected": list,
    "config": dict,
}


def build_summary(
    *,
    settings: Mapping[str, Any],
    status: str,
    reason: str = "",
    history: Sequence[Record],
    ensemble: Mapping[str, Any] | None = None,
    global_model: Mapping[str, Any] | None = None,
    public_digest: str | None = None,
    public_data_bytes: int = 0,
    seconds: Mapping[str, float] | None = None,
    warnings: Sequence[str] = (),
    versions: Mapping[str, str] | None = None,
    date: str | None = None,
) -> dict[str, Any]:
    """Assemble the summary of a run; its keys are a contract that others read.

    Parameters
    ----------
    settings : Mapping[str, Any]
        ``settings.as_container(settings)``.
    status : str
        "completed", "failed" or "stopped".
    history : Sequence[Mapping[str, Any]]
        All lines of ``history.jsonl``. A client's figures are those of its last line that has them; one
        without a closing line is marked ``"finished": false``.
    ensemble : Mapping[str, Any] | None
        The mean-logit ensemble of the clients on the unseen set: accuracy, balanced_accuracy, auroc,
        num_examples; None: not measured.
    global_model : Mapping[str, Any] | None
        Folder (in the results), architecture and figures on the unseen set of the model that is the run's
        own and no client's; None: the strategy has none.
    public_data_bytes : int
        Bytes of public images that the server sent, all clients.
    seconds : Mapping[str, float] | None
        total, startup, training; what is missing is 0.
    date : str | None
        When the run, or its last part, began, ISO 8601 with the time zone; None: not known.

    Raises
    ------
    ValueError
        ``status`` is none of the three.
    """
    if status not in STATUSES:
        raise ValueError(f"status {status!r} is none of {', '.join(STATUSES)}")
    hostile = hostile_clients(settings)
    clients = _clients(history)
    for name in hostile & clients.keys():
        clients[name]["hostile"] = True
    honest = {name: client for name, client in clients.items() if name not in hostile}
    return {
        "strategy": settings["strategy"]["name"],
        "experiment": settings.get("experiment_name"),
        "date": date,
        "seed": settings["seed"],
        "rounds": settings["rounds"],
        "rounds_completed": _rounds_completed(history),
        "status": status,
        "reason": reason,
        "clients": clients,
        "unseen": _unseen(history, honest, ensemble),
        "global_model": None if global_model is None else dict(global_model),
        "traffic": {**_bytes(history), "public_data_bytes": public_data_bytes},
        "seconds": {"total": 0.0, "startup": 0.0, "training": 0.0, **(seconds or {})},
        "public_digest": public_digest,
        "versions": dict(versions or installed_versions()),
        "warnings": list(warnings),
        "rejected": _rejections(history),
        "config": without_paths(settings),
    }


def summary_problem(summary: Any) -> str | None:
    """Say what keeps ``summary`` from being one that a run has written; None if nothing does."""
    if not isinstance(summary, dict):
        return "it is no object"
    for key, kind in _KINDS.items():
        if not isinstance(summary.get(key), kind):
            return f"{key} is missing or of another kind"
    figures = [summary["unseen"], summary["traffic"], summary["seconds"], *summary["clients"].values()]
    if not all(isinstance(part, dict) for part in figures if part is not None):
        return "its figures are of another kind"
    needed = [(summary["traffic"], way) for way in DIRECTIONS[:2]]
    needed += [(client, way) for client in summary["clients"].values() for way in DIRECTIONS[:2]]
    for part, key in [*needed, (summary["seconds"], "total")]:
        if part is None or not isinstance(part.get(key), int | float):
            return f"{key} is missing or no number"
    for part in figures:
        for key, value in (part or {}).items():
            if key not in ("model", "config", "private_digest") and isinstance(value, str | dict):
                return f"{key} is no number"
    together = summary.get("global_model")
    if together is not None and not (isinstance(together, dict) and isinstance(together.get("model"), str)):
        return "global_model is of another kind"
    if not all(isinstance(line, dict) for line in summary["rejected"]):
        return "rejected is no list of reports"
    return None


def hostile_clients(settings: Mapping[str, Any]) -> set[str]:
    """Names of the emulated hostile clients, which no figure of the whole run counts."""
    return set(settings.get("attack", {}).get("clients", []))


def natural_key(name: str) -> tuple[tuple[bool, int, str], ...]:
    """Sort key under which "client-2" comes before "client-10"."""
    return tuple(_part_key(part) for part in re.findall(r"[0-9]+|[^0-9]+", name))


def _part_key(part: str) -> tuple[bool, int, str]:
    """Numbers by their length, then by their digits: Python refuses to read one of thousands of digits."""
    if not part.isdecimal():
        return True, 0, part
    digits = part.lstrip("0")
    return False, len(digits), f"{digits} {part}"


def _clients(history: Sequence[Record]) -> dict[str, dict[str, Any]]:
    names = sorted({line["client"] for line in history if line.get("client") is not None}, key=natural_key)
    return {name: _client([line for line in history if line.get("client") == name]) for name in names}


def _rounds_completed(history: Sequence[Record]) -> int:
    accepted = (line for line in history if not line.get("closing") and not line.get("rejected"))
    return max((line["round"] for line in accepted), default=0)


def _rejections(history: Sequence[Record]) -> list[dict[str, Any]]:
    rejected = [line for line in history if line.get("rejected")]
    keys = ("client", "node_id", "round")
    return [{key: line.get(key) for key in keys} | {"reason": line["rejected"]} for line in rejected]


def _client(lines: Sequence[Record]) -> dict[str, Any]:
    accepted = [line for line in lines if not line.get("rejected")]
    figures: dict[str, Any] = {key: _last(accepted, key).get(key) for key in ("model", "num_examples")}
    for group in ("unseen", "validation"):
        # all of a group from one line, so that they belong together
        line = _last(accepted, f"{group}_accuracy")
        figures |= {f"{group}_{measure}": line.get(f"{group}_{measure}") for measure in MEASURES}
    return {
        **figures,
        "private_digest": _last(accepted, "private_digest").get("private_digest"),
        **_bytes(lines),
        "rejected": len(lines) - len(accepted),
        "finished": any(line.get("closing") for line in accepted),
    }


def _last(lines: Sequence[Record], key: str) -> Record:
    """The line of the latest round that has a value for ``key``; empty when none has."""
    having = [line for line in lines if line.get(key) is not None]
    return sorted(having, key=lambda line: int(line["round"]))[-1] if having else {}


def _unseen(
    history: Sequence[Record], clients: Mapping[str, Record], ensemble: Record | None
) -> dict[str, Any] | None:
    measured = [c["unseen_accuracy"] for c in clients.values() if c["unseen_accuracy"] is not None]
    if not measured and ensemble is None:
        return None
    together = ensemble or {}
    closing = [line for line in history if line.get("closing")] or list(history)
    sizes = [line["unseen_num_examples"] for line in closing if line.get("unseen_num_examples") is not None]
    unseen: dict[str, Any] = {
        "mean_accuracy": mean(measured),
        "worst_accuracy": min(measured, default=None),
        "ensemble_accuracy": together.get("accuracy"),
        "num_examples": together.get("num_examples") or max(sizes, default=None),
    }
    extra = {
        key: together[key]
        for key in ("balanced_accuracy", "auroc", "f1", "ece")
        if together.get(key) is not None
    }
    return unseen | {f"ensemble_{key}": value for key, value in extra.items()}


def mean(values: Iterable[float]) -> float | None:
    """Arithmetic mean with one rounding, so that it does not depend on the order; None of nothing."""
    numbers = list(values)
    if not numbers:
        return None
    try:
        return math.fsum(numbers) / len(numbers)
    except OverflowError:  # figures near the largest there is, whose sum is beyond it
        return math.fsum(number / len(numbers) for number in numbers)


def _bytes(lines: Sequence[Record]) -> dict[str, int]:
    return {key: sum(line.get(key) or 0 for line in lines) for key in DIRECTIONS}
