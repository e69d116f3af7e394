"""The common part of strategies without rounds in the image application."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedmutual.engine.arriving import Arriving
from fedmutual.methods.base import Method
from fedmutual.settings import Settings, setting

if TYPE_CHECKING:
    from fedmutual.data.site import SharedData
    from fedmutual.results.directory import RunDirectory


@dataclass(kw_only=True)
class ArrivalSettings(Method):
    """Settings of a run without rounds."""

    updates: int | None = setting(
        "the run ends after this many reports; null: rounds times clients", minimum=1
    )
    seconds: float | None = setting(
        "the run ends after this many seconds of its clock; null: no limit", above=0
    )

    def engine(
        self, settings: Settings, shared: SharedData, run: str, journal: RunDirectory | None
    ) -> Arriving:
        """Return the engine that drives the strategy: the server's side of a run."""
        strategy = self.strategy(settings, shared)
        return Arriving(strategy, settings, shared, run, journal, updates=self.updates, seconds=self.seconds)
