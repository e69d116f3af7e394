"""``strategy=fedasync`` (arXiv:1903.03934) and ``strategy=fedbuff`` (arXiv:2106.06639) in the application."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedmutual.learning.mixing import STALENESS, Staleness
from fedmutual.methods.arrivals import ArrivalSettings
from fedmutual.methods.base import WEIGHTS, nothing_predicted
from fedmutual.methods.one_architecture import one_architecture
from fedmutual.settings import Settings, setting
from fedmutual.strategies.fedasync import FedAsync
from fedmutual.wire.orders import Order
from fedmutual.wire.reports import Report

if TYPE_CHECKING:
    from torch import Tensor

    from fedmutual.client.learner import Answer, Learner
    from fedmutual.data.site import SharedData


@dataclass(kw_only=True)
class FedAsyncSettings(ArrivalSettings):
    """Settings of ``strategy=fedasync`` and ``strategy=fedbuff``."""

    alpha: float = setting(
        "weight of an arriving model without staleness; buffer_size > 1: the server's step size",
        above=0,
        maximum=1,
    )
    staleness: str = setting("weight of a stale model, s(t - tau)", choices=STALENESS)
    staleness_a: float = setting("a of polynomial and hinge", above=0)
    staleness_b: float = setting("b of hinge: up to this staleness a model has full weight", minimum=0)
    proximal: float = setting("rho, weight of the proximal term towards the received weights", minimum=0)
    buffer_size: int = setting("1: FedAsync; more: FedBuff with this many deltas per version", minimum=1)

    def misfit(self, settings: Settings) -> str | None:
        """Reject clients with different models, whose weights cannot be mixed."""
        return one_architecture(settings)

    def strategy(self, settings: Settings, shared: SharedData) -> FedAsync:
        """Return the strategy of these settings."""
        from fedmutual.engine.server_model import initial_weights

        return FedAsync(
            initial_weights(settings, shared),
            alpha=self.alpha,
            staleness=Staleness(self.staleness, self.staleness_a, self.staleness_b),
            buffer_size=self.buffer_size,
        )

    def learn(self, learner: Learner) -> Answer:
        """Evaluate the received global model, then train it on the private images."""
        from fedmutual.learning.proximal import proximal

        if learner.order.closing:
            return learner.close()
        learner.validate()
        if learner.order.evaluate_unseen:
            learner.evaluate_unseen(learner.settings.evaluation.unseen_limit)
        with proximal(learner.optimizer, self.proximal):
            learner.local_training()
        return nothing_predicted(learner)

    def sends(self, settings: Settings) -> list[str]:
        """Return weights."""
        return [WEIGHTS]

    def weights(self, order: Order, report: Report, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return all weights after training; none in the closing round, where they are the server's own."""
        return {} if order.closing else weights
