"""The public samples of each round, from the settings."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from fedmutual.settings import Settings
from fedmutual.wire.records import IndexArray

if TYPE_CHECKING:
    from fedmutual.data.site import SharedData
    from fedmutual.strategies.base import Schedule


def public_schedule(settings: Settings, shared: SharedData) -> Schedule:
    """Return the function from a round to its public samples."""

    @cache
    def indices(round: int) -> IndexArray:
        return shared.public.indices(settings.public, settings.seed, round, settings.rounds)

    return indices


def predictions(settings: Settings, shared: SharedData) -> dict[str, Any]:
    """Return the arguments about the public set for strategies that exchange predictions."""
    return {
        "num_samples": len(shared.public),
        "num_classes": len(shared.classes),
        "schedule": public_schedule(settings, shared),
        "seed": settings.seed,
    }
