"""The common part of ``strategy=fedmd``, ``dsfl`` and ``cfd`` in the image application."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fedmutual.learning.ring import Summed
from fedmutual.methods.base import PREDICTIONS, Method
from fedmutual.methods.schedule import predictions
from fedmutual.settings import Settings, setting
from fedmutual.wire.codec import WIRE_DTYPES

if TYPE_CHECKING:
    from fedmutual.client.learner import Answer, Learner
    from fedmutual.data.site import SharedData


@dataclass(kw_only=True)
class DigestSettings(Method):
    """Settings shared by these strategies."""

    digest_epochs: int = setting(
        "passes per round over the public samples, with the consensus as target", minimum=1
    )
    probability_floor: float = setting("minimum of shared probabilities", above=0, maximum=0.1)
    wire_dtype: str = setting("number format of predictions in messages", choices=WIRE_DTYPES)

    takes_secagg: ClassVar[bool] = True
    fills_public: ClassVar[bool] = True
    means_of_scores: ClassVar[bool] = True  # the consensus is made of mean scores; false: mean probabilities
    revisits_last: ClassVar[bool] = False  # true: a round ends with local training; false: with the consensus

    def summed(self, settings: Settings) -> Summed:
        """Return the sum that the consensus is made of."""
        return Summed(log_odds=self.means_of_scores, floor=self.probability_floor)

    def sends(self, settings: Settings) -> list[str]:
        """Return predictions."""
        return [PREDICTIONS]

    def options(self, settings: Settings, shared: SharedData) -> dict[str, Any]:
        """Return the arguments that these strategies share."""
        return {
            **predictions(settings, shared),
            "wire_dtype": self.wire_dtype,
            "probability_floor": self.probability_floor,
        }

    def learn(self, learner: Learner) -> Answer:
        """Train on the previous round's consensus, train on the private images, predict."""
        if len(learner.order.target_indices):
            learner.separate_mutual_step(learner.public(), self.digest_epochs)
        if learner.order.closing:
            if self.revisits_last:
                learner.local_training()
            return learner.close()
        learner.local_training()
        return learner.report()
