"""``strategy=local`` in the image application: no exchange, the baseline for collaboration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fedmutual.methods.base import nothing_predicted
from fedmutual.methods.private_training import PrivateTrainingSettings
from fedmutual.settings import Settings
from fedmutual.strategies.local import Local

if TYPE_CHECKING:
    from fedmutual.client.learner import Answer, Learner
    from fedmutual.data.site import SharedData


@dataclass(kw_only=True)
class LocalSettings(PrivateTrainingSettings):
    """Settings of ``strategy=local``."""

    needs_peers: ClassVar[bool] = False

    def strategy(self, settings: Settings, shared: SharedData) -> Local:
        """Return the strategy of these settings."""
        return Local(len(shared.classes), labelled=self.labelled(settings, shared))

    def learn(self, learner: Learner) -> Answer:
        """Train, and evaluate."""
        if learner.order.closing:
            return learner.close()
        self.train(learner)
        learner.measure()
        return nothing_predicted(learner)
