"""The virtual clock of strategies with rounds: a round takes as long as its slowest client."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from fedmutual.results.summary import natural_key
from fedmutual.settings import EmulationSettings


class VirtualRounds:
    """A virtual clock on which an update takes ``speed * nominal_seconds`` (``emulation``).

    Speeds are assigned as in runs without rounds: to the clients of the first round in order of their names,
    then to others as they join.

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
        """Return the virtual clock of a run; None with the wall clock."""
        unequal = emulation.clock == "auto" and set(emulation.speeds) != {1}
        return cls(emulation) if unequal or emulation.clock == "virtual" else None

    def pass_round(self, clients: Collection[str]) -> None:
        """Advance the clock by a round in which these clients reported."""
        dealt = self._emulation.speeds
        for name in sorted(clients, key=natural_key):
            self._speeds.setdefault(name, float(dealt[len(self._speeds) % len(dealt)]))
        slowest = max(self._speeds[name] for name in clients)
        self.now += slowest * self._emulation.nominal_seconds

    def as_dict(self) -> dict[str, Any]:
        """Return the state for the checkpoint."""
        return {"now": self.now, "speeds": self._speeds}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Restore the clock from a checkpoint."""
        self.now, self._speeds = saved["now"], dict(saved["speeds"])
