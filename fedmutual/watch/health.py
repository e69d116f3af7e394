"""Tell a hung SuperNode from a working one, by what can be seen of it from outside.

Flower's own health check only says that the HTTP thread answers. It does in all of these cases, in which the
SuperNode does nothing for good:

* a client process was killed while it handed over its reply: the main thread waits for the rest of it;
* the main thread has ended, after a request that Flower does not repeat (a TLS time-out);
* its SuperExec has ended, so that no client process is started.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

CLIENT, SUPEREXEC = "flwr-clientapp", "flower-superexec"
PATIENCE = 120.0  # seconds; Flower itself needs up to a minute to notice that a client process is dead
SUPEREXEC_SECONDS = 10.0
# a main thread that waits for a client process wakes up twice a second; in an upload it does so less often
BEATS_PER_SECOND = 0.8
CLIENTS = 2  # of one SuperNode at a time: it handles one order, and the process of the last one may be ending

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_BUSY = ("Received successfully", "Sending: ")
_IDLE = ("Sent successfully", "Failed to send message", "Failed to receive message", "Ignoring reply message")


@dataclass(frozen=True)
class Process:
    """A running process that the watched one started.

    Attributes
    ----------
    pid : int
    name : str
        Base name of its program.
    started : float
        Unix time.
    """

    pid: int
    name: str
    started: float


@dataclass(frozen=True)
class Look:
    """What is seen of the watched process at one time.

    Attributes
    ----------
    now : float
        Seconds on a clock that never goes back.
    beats : int or None
        How often its main thread has gone to sleep; None where the system does not say.
    processes : sequence of Process
        What it has started and what those have started, without a client's own workers.
    """

    now: float
    beats: int | None
    processes: Sequence[Process]

    def running(self, name: str) -> list[Process]:
        """Processes that run a program, oldest first."""
        return sorted((p for p in self.processes if p.name == name), key=lambda p: p.started)


class Health:
    """What is known of one watched process since its start.

    Parameters
    ----------
    patience : float
        Seconds for which something must be wrong before it counts.
    """

    def __init__(self, patience: float = PATIENCE) -> None:
        self._patience = patience
        self._busy_since: float | None = None  # with an order, and without a client process
        self._busy_beats: int | None = None  # at the first look since then
        self._beats: int | None = None
        self._beat_at: float | None = None
        self._superexec_seen = False
        self._superexec_at = 0.0

    def read(self, line: str, now: float) -> None:
        """Take note of a line of the watched process's log."""
        text = _COLOUR.sub("", line)
        if any(mark in text for mark in _BUSY):
            self._busy_since, self._busy_beats = now, None
        elif any(mark in text for mark in _IDLE):
            self._busy_since = None

    def problem(self, look: Look) -> str:
        """Return why the process must be restarted; empty where it works."""
        return self._superexec(look) or self._order(look) or self._main_thread(look)

    def _order(self, look: Look) -> str:
        if self._busy_since is None or not self._superexec_seen:
            return ""  # with --isolation process, its client processes are somewhere else
        if look.running(CLIENT) or self._busy_beats is None:
            self._busy_since, self._busy_beats = look.now, look.beats
        since = look.now - self._busy_since
        if since < self._patience or self._uploads(look, since):
            return ""
        return f"it holds an order, but for {since:.0f} s it has had no client process"

    def _uploads(self, look: Look, seconds: float) -> bool:
        """Whether the main thread waits for something else than a client process: a long upload."""
        if look.beats is None or self._busy_beats is None:
            return False
        return look.beats - self._busy_beats < BEATS_PER_SECOND * seconds

    def _superexec(self, look: Look) -> str:
        if look.running(SUPEREXEC) or not self._superexec_seen:
            self._superexec_seen = self._superexec_seen or bool(look.running(SUPEREXEC))
            self._superexec_at = look.now
        gone = look.now - self._superexec_at
        return "its SuperExec has ended" if gone >= SUPEREXEC_SECONDS else ""

    def _main_thread(self, look: Look) -> str:
        if self._beat_at is None or look.beats is None or look.beats != self._beats:
            self._beats, self._beat_at = look.beats, look.now
        still = look.now - self._beat_at
        return f"its main thread has not moved for {still:.0f} s" if still >= self._patience else ""


def superfluous(look: Look) -> list[Process]:
    """Client processes that nobody waits for any more, oldest first.

    Flower starts another one when it takes a process for dead, and then refuses the reply of the old one.
    """
    return look.running(CLIENT)[:-CLIENTS]
