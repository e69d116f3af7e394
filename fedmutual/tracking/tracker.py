"""What a logger is, which there are, and how they hear of a run.

All of them hear the same: the lines of ``history.jsonl``, after they are on the disk. A logger that breaks is
left out of the rest of the run with a warning; it never ends one.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from fedmutual.settings import Settings

logger = logging.getLogger(__name__)

Record = Mapping[str, Any]

# name in `tracking.loggers` -> the class, what it imports, what installs that
LOGGERS = {
    "tensorboard": ("fedmutual.tracking.tensorboard.TensorBoard", "tensorboard", "tensorboard"),
    "mlflow": ("fedmutual.tracking.mlflow.MLflow", "mlflow", "'fedmutual[mlflow]'"),
    "wandb": ("fedmutual.tracking.wandb.WeightsAndBiases", "wandb", "'fedmutual[wandb]'"),
}
_NOT_FIGURES = ("round", "node_id", "client", "closing", "rejected")
_GROUPS = {"validation": "validation", "unseen": "unseen", "kl": "kl", "train": "train"}


class Tracker(Protocol):
    """A logger of one run, made with the settings, the run's folder, and what history it has so far."""

    def __init__(self, settings: Settings, folder: Path, history: Sequence[Record]) -> None: ...

    def log(self, lines: Sequence[Record]) -> None:
        """Take new lines of the history."""

    def close(self, summary: Record) -> None:
        """The run is over; ``summary`` is what ``summary.json`` will hold."""


def missing_logger(settings: Settings) -> str | None:
    """Say which chosen logger is not installed, key first; None where all are. Imports none of them."""
    for name in settings.tracking.loggers:
        _, module, install = LOGGERS[name]
        if importlib.util.find_spec(module) is None:
            return f"tracking.loggers: {name} is not installed: pip install {install}, or leave it out"
    return None


class Tracking:
    """The chosen loggers of a run as one; :func:`missing_logger` says beforehand which is not installed."""

    def __init__(self, settings: Settings, folder: Path, history: Sequence[Record]) -> None:
        self._trackers: dict[str, Tracker] = {}
        for name in settings.tracking.loggers:
            self._guarded(name, partial(self._open, name, settings, folder, history))

    def log(self, lines: Sequence[Record]) -> None:
        """Hand new history lines to every logger."""
        for name, tracker in list(self._trackers.items()):
            self._guarded(name, partial(tracker.log, lines))

    def close(self, summary: Record) -> None:
        """Tell every logger that the run is over."""
        for name, tracker in list(self._trackers.items()):
            self._guarded(name, partial(tracker.close, summary))
        self._trackers.clear()

    def _open(self, name: str, settings: Settings, folder: Path, history: Sequence[Record]) -> None:
        self._trackers[name] = _load(name)(settings, folder, history)

    def _guarded(self, name: str, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # a full disk, a server that is away: learning goes on
            self._trackers.pop(name, None)
            logger.warning("%s hears no more of this run: %s: %s", name, type(error).__name__, error)


def figures(line: Record) -> dict[str, float]:
    """Return the numbers of a history line under ``group/name``; none for a report that was rejected.

    Examples
    --------
    >>> figures({"round": 2, "client": "a", "kl_before": 0.5, "validation_accuracy": 1, "uplink_bytes": 8})
    {'kl/before': 0.5, 'validation/accuracy': 1.0, 'traffic/uplink_bytes': 8.0}
    """
    if line.get("rejected"):
        return {}
    return {
        _tag(key): float(value)
        for key, value in line.items()
        if key not in _NOT_FIGURES
        and isinstance(value, (int, float))
        and not isinstance(value, bool)
        and math.isfinite(value)
    }


class LatestMeans:
    """The mean over the clients of the last figure that each one had."""

    def __init__(self) -> None:
        self._last: dict[str, dict[str, float]] = {}

    def add(self, lines: Sequence[Record]) -> dict[str, float]:
        """Take new lines; return the means of the figures that are in them."""
        changed: set[str] = set()
        for line in lines:
            for name, value in figures(line).items():
                self._last.setdefault(name, {})[str(line.get("client"))] = value
                changed.add(name)
        return {
            name: math.fsum(self._last[name].values()) / len(self._last[name]) for name in sorted(changed)
        }


def _tag(key: str) -> str:
    if key.endswith("_bytes"):
        return f"traffic/{key}"
    if key.endswith("seconds"):
        return f"seconds/{key.removesuffix('_seconds')}" if key != "seconds" else "seconds/client"
    group, _, name = key.partition("_")
    return f"{_GROUPS[group]}/{name}" if group in _GROUPS and name else f"other/{key}"


def _load(name: str) -> type[Tracker]:
    module, _, attribute = LOGGERS[name][0].rpartition(".")
    found: type[Tracker] = getattr(importlib.import_module(module), attribute)
    return found
