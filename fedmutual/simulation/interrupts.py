"""Ctrl-C and termination as something that is asked for, not something that strikes anywhere."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Interrupted(Exception):
    """The run was asked to stop; ``exit_code`` is the shell's for that signal (130 for Ctrl-C)."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


class Interrupts:
    """Take SIGINT, SIGTERM and SIGHUP while the block runs and report them when asked.

    No exception is raised from within the handler, so that cleaning up is never torn apart.
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
        """Raise :class:`Interrupted` when a signal came."""
        if self._received:
            raise Interrupted(self._received[0])

    def hurry(self) -> bool:
        """Whether a second signal came: end at once."""
        return len(self._received) > 1

    def _note(self, number: int, _: FrameType | None) -> None:
        self._received.append(number)
