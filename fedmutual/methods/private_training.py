"""Local training of the baselines: own images, and optionally public labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedmutual.methods.base import Method
from fedmutual.methods.schedule import public_schedule
from fedmutual.settings import Settings, setting

if TYPE_CHECKING:
    from fedmutual.client.learner import Learner
    from fedmutual.data.site import SharedData
    from fedmutual.strategies.base import Schedule


@dataclass(kw_only=True)
class PrivateTrainingSettings(Method):
    """Settings of a baseline's local training."""

    equal_data: bool = setting(
        "clients also train on the labels of the round's public samples, as those of mutual learning do "
        "(public.labelled=true)"
    )
    phase: str = setting(
        "equal_data: mixed: every step uses a private and a public batch; separate: public samples after the "
        "private ones, as in the paper",
        choices=("mixed", "separate"),
    )
    public_epochs: int = setting("equal_data: minimum passes per round over the public samples", minimum=1)

    def misfit(self, settings: Settings) -> str | None:
        """Reject equal data without public labels."""
        if self.equal_data and not settings.public.labelled:
            return (
                "strategy.equal_data: true, but public.labelled=false: mutual clients then see no public "
                "labels either; set public.labelled=true, or strategy.equal_data=false"
            )
        return None

    def labelled(self, settings: Settings, shared: SharedData) -> Schedule | None:
        """Return the schedule of labelled public samples for training; None without equal data."""
        return public_schedule(settings, shared) if self.equal_data else None

    def train(self, learner: Learner) -> None:
        """Train on the private images, and on the order's labelled public samples."""
        if len(learner.order.target_indices) == 0:
            learner.local_training()
            return
        public = learner.public()
        if self.phase == "mixed":
            learner.mixed_training(public, self.public_epochs)
        else:
            learner.local_training()
            learner.separate_mutual_step(public, self.public_epochs)
