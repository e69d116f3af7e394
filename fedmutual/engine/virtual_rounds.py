"""The virtual clock of strategies with rounds: nobody is faster than the slowest client of the round."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from fedmutual.results.summary import natural_key
from fedmutual.settings import EmulationSettings


class VirtualRounds:
    """Time as it would pass if an update took ``speed * nominal_seconds`` (``emulation``).

    Speeds are dealt out as in runs without rounds: in order of the names to the clients of the first round,
    then to others as they come.

    Attributes
    ----------
    now : float
        Seconds since the start, at the end of the last round.

    >>> clock = VirtualRounds(EmulationSettings(clock="virtual", speeds=[1, 8], nominal_seconds=0.5))
    >>> clock.pass_round(["b", "a"])
    >>> clock.now
    4.0
    >>> clock.pass_round(["a"])
    >>> clock.now
    4.5
    """

    def __init__(self, emulation: EmulationSettings) -> None:
        self.now = 0.0
        self._emulation = emulation
        self._speeds: dict[str, float] = {}

    @classmethod
    def of(cls, emulation: EmulationSettings) -> VirtualRounds | None:
        """The clock of a run; None where time is the machine's."""
        unequal = emulation.clock == "auto" and set(emulation.speeds) != {1}
        return cls(emulation) if unequal or emulation.clock == "virtual" else None

    def pass_round(self, clients: Collection[str]) -> None:
        """A round is over to which these clients have reported."""
        dealt = self._emulation.speeds
        for name in sorted(clients, key=natural_key):
            self._speeds.setdefault(name, float(dealt[len(self._speeds) % len(dealt)]))
        slowest = max(self._speeds[name] for name in clients)
        self.now += slowest * self._emulation.nominal_seconds

    def as_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"now": self.now, "speeds": self._speeds}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Take up a checkpoint's time."""
        self.now, self._speeds = saved["now"], dict(saved["speeds"])
