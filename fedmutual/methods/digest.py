"""What ``strategy=fedmd``, ``dsfl`` and ``cfd`` share in the image application."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fedmutual.methods.base import Method
from fedmutual.methods.schedule import predictions
from fedmutual.settings import Settings, setting
from fedmutual.wire.codec import WIRE_DTYPES

if TYPE_CHECKING:
    from fedmutual.client.learner import Answer, Learner
    from fedmutual.data.site import SharedData


@dataclass(kw_only=True)
class DigestSettings(Method):
    """Settings that these methods share."""

    digest_epochs: int = setting("passes over the public samples a round, towards the consensus", minimum=1)
    probability_floor: float = setting("shared probabilities are raised to this", above=0, maximum=0.1)
    wire_dtype: str = setting("type in which predictions travel", choices=WIRE_DTYPES)

    revisits_last: ClassVar[bool] = False  # a round ends with local training; else with the consensus

    def options(self, settings: Settings, shared: SharedData) -> dict[str, Any]:
        """What all these strategies are made from."""
        return {
            **predictions(settings, shared),
            "wire_dtype": self.wire_dtype,
            "probability_floor": self.probability_floor,
        }

    def learn(self, learner: Learner) -> Answer:
        """Digest the consensus of the round before, learn from the private images, predict."""
        if len(learner.order.target_indices):
            learner.separate_mutual_step(learner.public(), self.digest_epochs)
        if learner.order.closing:
            if self.revisits_last:
                learner.local_training()
            return learner.close()
        learner.local_training()
        return learner.report()
