"""The logger interface, the available loggers, and how they receive a run's figures.

All loggers receive the lines of ``history.jsonl`` once they are on disk. A logger that fails is dropped for
the rest of the run with a warning; it never stops a run.
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

# name in `tracking.loggers` -> class, imported module, pip requirement
LOGGERS = {
    "tensorboard": ("fedmutual.tracking.tensorboard.TensorBoard", "tensorboard", "tensorboard"),
    "mlflow": ("fedmutual.tracking.mlflow.MLflow", "mlflow", "'fedmutual[mlflow]'"),
    "wandb": ("fedmutual.tracking.wandb.WeightsAndBiases", "wandb", "'fedmutual[wandb]'"),
}
_NOT_FIGURES = ("round", "node_id", "client", "closing", "rejected")
_GROUPS = {"validation": "validation", "unseen": "unseen", "kl": "kl", "train": "train"}


class Tracker(Protocol):
    """A logger of one run, created from the settings, the run's folder and the history so far."""

    def __init__(self, settings: Settings, folder: Path, history: Sequence[Record]) -> None: ...

    def log(self, lines: Sequence[Record]) -> None:
        """Log new lines of the history."""

    def close(self, summary: Record) -> None:
        """End the run; ``summary`` is the content of ``summary.json``."""


def missing_logger(settings: Settings) -> str | None:
    """Return which chosen logger is not installed, key first, else None; does not import them."""
    for name in settings.tracking.loggers:
        _, module, install = LOGGERS[name]
        if importlib.util.find_spec(module) is None:
            return f"tracking.loggers: {name} is not installed: pip install {install}, or leave it out"
    return None


class Tracking:
    """All chosen loggers of a run as one; check with :func:`missing_logger` that they are installed."""

    def __init__(self, settings: Settings, folder: Path, history: Sequence[Record]) -> None:
        self._trackers: dict[str, Tracker] = {}
        for name in settings.tracking.loggers:
            self._guarded(name, partial(self._open, name, settings, folder, history))

    def log(self, lines: Sequence[Record]) -> None:
        """Pass new history lines to every logger."""
        for name, tracker in list(self._trackers.items()):
            self._guarded(name, partial(tracker.log, lines))

    def close(self, summary: Record) -> None:
        """End the run in every logger."""
        for name, tracker in list(self._trackers.items()):
            self._guarded(name, partial(tracker.close, summary))
        self._trackers.clear()

    def _open(self, name: str, settings: Settings, folder: Path, history: Sequence[Record]) -> None:
        self._trackers[name] = _load(name)(settings, folder, history)

    def _guarded(self, name: str, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # for example a full disk or an unreachable server: training continues
            self._trackers.pop(name, None)
            logger.warning(
                "%s failed and gets no more of this run: %s: %s", name, type(error).__name__, error
            )


def figures(line: Record) -> dict[str, float]:
    """Return the numbers of a history line as ``group/name``; empty for a rejected report.

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
    """The mean over clients of each client's latest figure."""

    def __init__(self) -> None:
        self._last: dict[str, dict[str, float]] = {}

    def add(self, lines: Sequence[Record]) -> dict[str, float]:
        """Add new lines; return the means of the figures in them."""
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
