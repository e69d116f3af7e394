"""``strategy=mutual_async`` in the image application: mutual learning without rounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fedmutual.methods.arrivals import ArrivalSettings
from fedmutual.methods.mutual import MutualSettings
from fedmutual.settings import Settings, setting
from fedmutual.strategies.mutual_async import MutualAsync

if TYPE_CHECKING:
    from fedmutual.data.site import SharedData


@dataclass(kw_only=True)
class MutualAsyncSettings(ArrivalSettings, MutualSettings):
    """Settings of ``strategy=mutual_async``: those of ``mutual`` and of runs without rounds."""

    takes_secagg: ClassVar[bool] = False  # nor is there a round whose predictions could be added up
    takes_views: ClassVar[bool] = False  # without rounds, clients have no common view at a time
    fills_public: ClassVar[bool] = False  # nor is there a last round

    staleness_limit: int | None = setting(
        "number of a client's own reports for which a peer's predictions are used; null: no limit",
        minimum=1,
    )

    def misfit(self, settings: Settings) -> str | None:
        """Reject public schedules whose predictions are of different samples."""
        schedule = settings.public.schedule
        if schedule != "static":
            return (
                f"public.schedule: {schedule}, but strategy=mutual_async has no rounds, and predictions of "
                "different samples cannot be averaged: use public=static"
            )
        return None

    def strategy(self, settings: Settings, shared: SharedData) -> MutualAsync:  # type: ignore[override]
        """Return the strategy of these settings."""
        return MutualAsync(len(shared.public), len(shared.classes), **self.options(settings))
