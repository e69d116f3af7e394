"""What came of one run, read from its folder: final figures, and how accuracy grew with its price."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedmutual.compare.plan import PlannedRun
from fedmutual.results import directory
from fedmutual.results.diagnostics import number
from fedmutual.results.errors import ResultsError
from fedmutual.results.summary import mean

logger = logging.getLogger(__name__)

Record = Mapping[str, Any]
MEASURES = ("mean", "worst", "ensemble")


@dataclass(frozen=True)
class Point:
    """The clients at one moment of a run.

    Attributes
    ----------
    round : int
    accuracy : float
        Mean over the clients of what each last measured on the unseen set.
    bytes : float
        Payload that a client has sent and received so far, mean over the clients.
    seconds : float
        Since the start, as a federation would take whose clients learn side by side: of each round, the
        client that took longest; where the strategy keeps a clock of its own (history key ``clock``), that.
    """

    round: int
    accuracy: float
    bytes: float
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """One run of a study, done or failed.

    Attributes
    ----------
    failure : str
        Why there are no figures; empty where there are.
    mean, worst, ensemble : float or None
        Final accuracy on the whole unseen set; None where the run has none.
    up, down : float
        Bytes a client and round (without rounds: a report), the closing message included.
    seconds : float
        Of learning, as :class:`Point` counts them.
    global_model : float or None
        Final accuracy of the model that is the run's own; None: the strategy has none.
    image_passes : float or None
        Images that a client trained on, private and public, each time counted: mean over the clients. None:
        they did not say.
    virtual : bool
        The seconds are those of a virtual clock.
    """

    run: PlannedRun
    failure: str = ""
    mean: float | None = None
    worst: float | None = None
    ensemble: float | None = None
    up: float = 0.0
    down: float = 0.0
    seconds: float = 0.0
    curve: tuple[Point, ...] = field(default=())
    global_model: float | None = None
    image_passes: float | None = None
    virtual: bool = False

    def price(self, threshold: float) -> Point | None:
        """The first moment at which the clients were, in the mean, as accurate as this; None: never."""
        return next((point for point in self.curve if point.accuracy >= threshold), None)


def read_outcome(run: PlannedRun, path: Path, reason: str = "") -> Outcome:
    """Read a run's folder; ``reason`` is why it ended, for a run that could not say it itself."""
    summary = read_summary(path)
    if summary is None or summary["status"] != "completed":
        return Outcome(run, failure=(summary or {}).get("reason") or reason or "it left no summary.json")
    unseen = summary["unseen"] or {}
    try:
        history = directory.read_history(path)
    except ResultsError as error:
        return Outcome(run, failure=str(error))
    # clients x rounds, but without rounds nobody reports equally often
    messages = max(1, sum(not line["closing"] and not line.get("rejected") for line in history))
    return Outcome(
        run,
        mean=unseen.get("mean_accuracy"),
        worst=unseen.get("worst_accuracy"),
        ensemble=unseen.get("ensemble_accuracy"),
        global_model=(summary.get("global_model") or {}).get("unseen_accuracy"),
        up=summary["traffic"]["uplink_bytes"] / messages,
        down=summary["traffic"]["downlink_bytes"] / messages,
        seconds=_moments(history)[-1][1] if history else 0.0,
        image_passes=_image_passes(history),
        virtual=_is_virtual(history, summary["config"]),
        curve=tuple(curve(history)),
    )


def _is_virtual(history: Sequence[Record], config: Mapping[str, Any]) -> bool:
    """Whether the seconds are those of an emulated clock; a study's runs have no other one in their lines."""
    emulation = config.get("emulation") or {}
    return any(line.get("clock") is not None for line in history) and emulation.get("clock") != "wall"


def read_summary(path: Path) -> dict[str, Any] | None:
    """The summary of a run; None where it left none, or a damaged one: the run then is not done."""
    try:
        return directory.read_summary(path)
    except ResultsError as error:
        logger.warning("%s", error)
        return None


def curve(history: Sequence[Record]) -> list[Point]:
    """A point after every round (of an asynchronous run: every arrival) that measured the unseen set.

    The first point comes when every client has measured it; a client's last measurement holds on.
    """
    clients = {line["client"] for line in history if number(line, "unseen_accuracy") is not None}
    last: dict[str, float] = {}
    points: list[Point] = []
    sent = 0.0
    for lines, seconds in _moments(history):
        sent += sum(_payload(line) for line in lines)
        measured = {
            line["client"]: value for line in lines if (value := number(line, "unseen_accuracy")) is not None
        }
        last |= measured
        if measured and len(last) == len(clients):
            accuracy = mean(last.values())
            assert accuracy is not None
            points.append(Point(lines[-1]["round"], accuracy, sent / len(clients), seconds))
    return points


def _moments(history: Sequence[Record]) -> list[tuple[list[Record], float]]:
    """Lines that belong together, and the seconds from the start to their end."""
    moments: list[tuple[list[Record], float]] = []
    elapsed = 0.0
    for _, group in itertools.groupby(history, key=lambda line: (line["round"], line.get("clock"))):
        lines = list(group)
        clock = number(lines[-1], "clock")
        slowest = max((number(line, "seconds") or 0.0 for line in lines), default=0.0)
        elapsed = elapsed + slowest if clock is None else clock
        moments.append((lines, elapsed))
    return moments


def _image_passes(history: Sequence[Record]) -> float | None:
    trained = [
        (line["client"], value) for line in history if (value := number(line, "trained_images")) is not None
    ]
    return sum(value for _, value in trained) / len({client for client, _ in trained}) if trained else None


def _payload(line: Record) -> float:
    return sum(number(line, key) or 0.0 for key in ("uplink_bytes", "downlink_bytes"))
