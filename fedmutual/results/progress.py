"""What a run is doing at present, in ``progress.json`` of its folder, for ``fedmutual status``."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from fedmutual.files.atomic import atomic_write
from fedmutual.files.disk import WriteError

PROGRESS = "progress.json"
SECONDS = 1.0  # between two writes at least

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Present:
    """The present round.

    Attributes
    ----------
    round : int
        Without rounds: how many reports have arrived.
    rounds : int
        How many there will be.
    closing : bool
        It is the closing one, after the last round.
    waiting : dict[str, str]
        Node id -> name of the client that is waited for; empty where the name is not known yet.
    answered : int
        Good replies so far.
    since : float
        When it began, Unix time.
    """

    round: int
    rounds: int
    closing: bool
    waiting: dict[str, str]
    answered: int
    since: float


class Progress:
    """Writes the present round down, at most once a second; a full disk does not end a run.

    Parameters
    ----------
    folder : Path or None
        The run's folder; None: nothing is written.
    rounds : int
    clock : callable
        Returns Unix time.
    """

    def __init__(self, folder: Path | None, rounds: int, clock: Callable[[], float] = time.time) -> None:
        self._file = None if folder is None else folder / PROGRESS
        self._rounds = rounds
        self._clock = clock
        self._written = 0.0
        self._last: Present | None = None
        self._begun: tuple[int, float] = (-1, 0.0)

    def note(
        self, round: int, waiting: Mapping[int, str | None], answered: int, closing: bool = False
    ) -> None:
        """Say how far the round is.

        Parameters
        ----------
        waiting : Mapping[int, str or None]
            Node -> client that has not answered.
        """
        now = self._clock()
        if self._file is None or now - self._written < SECONDS:
            return
        if self._begun[0] != round:
            self._begun = (round, now)
        names = {str(node): name or "" for node, name in waiting.items()}
        present = Present(round, self._rounds, closing, names, answered, self._begun[1])
        if present == self._last:
            return
        self._written, self._last = now, present
        try:
            atomic_write(self._file, json.dumps(asdict(present)).encode())
        except WriteError as error:
            logger.warning("%s", error)
            self._file = None


def read_progress(folder: Path) -> Present | None:
    """Return what a run has written last; None where there is nothing that can be read."""
    try:
        return Present(**json.loads((folder / PROGRESS).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
