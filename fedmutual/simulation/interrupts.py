"""Ctrl-C and termination signals, polled at safe points."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Interrupted(Exception):
    """The run received a stop signal; ``exit_code`` is the shell's code for it (130 for Ctrl-C)."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


class Interrupts:
    """Catch SIGINT, SIGTERM and SIGHUP during a block, and report them on request.

    The signal handler raises no exception, so clean-up is never interrupted.
    """

    def __init__(self) -> None:
        self._received: list[int] = []
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        self._previous = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise :class:`Interrupted` if a signal was received."""
        if self._received:
            raise Interrupted(self._received[0])

    def hurry(self) -> bool:
        """Return whether a second signal was received: end at once."""
        return len(self._received) > 1

    def _note(self, number: int, _: FrameType | None) -> None:
        self._received.append(number)
