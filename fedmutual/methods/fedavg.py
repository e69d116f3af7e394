"""``strategy=fedavg`` (arXiv:1602.05629) and ``strategy=fedprox`` (arXiv:1812.06127) in the application."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fedmutual.engine.server_model import ServerModel
from fedmutual.methods.base import WEIGHTS, nothing_predicted
from fedmutual.methods.noisy_training import require_gradients, train_noisily, unproven
from fedmutual.methods.one_architecture import one_architecture
from fedmutual.methods.private_training import PrivateTrainingSettings
from fedmutual.settings import Settings, setting
from fedmutual.strategies.fedavg import FedAvg
from fedmutual.wire.orders import Order
from fedmutual.wire.reports import Report

if TYPE_CHECKING:
    from torch import Tensor

    from fedmutual.client.learner import Answer, Learner
    from fedmutual.data.site import SharedData


@dataclass(kw_only=True)
class FedAvgSettings(PrivateTrainingSettings):
    """Settings of ``strategy=fedavg`` and ``strategy=fedprox``."""

    proximal: float = setting(
        "mu of FedProx: weight of the proximal term towards the received weights, in private steps", minimum=0
    )

    takes_dp: ClassVar[bool] = True
    dp_library: ClassVar[str] = "opacus"

    def misfit(self, settings: Settings) -> str | None:
        """Reject clients with different models, whose weights cannot be averaged."""
        return one_architecture(settings) or super().misfit(settings) or unproven(settings)

    def strategy(self, settings: Settings, shared: SharedData) -> FedAvg:
        """Return the strategy of these settings."""
        server = ServerModel(settings, shared)
        private = settings.privacy.epsilon is not None
        if private:
            require_gradients(server.model)
        return FedAvg(
            len(shared.classes),
            server.weights(),
            measure=server.measure_weights,
            labelled=self.labelled(settings, shared),
            equal=private,
        )

    def learn(self, learner: Learner) -> Answer:
        """Evaluate the received global model on the client's own held-out images, then train it."""
        from fedmutual.learning.proximal import proximal

        if learner.order.closing:
            return learner.close()
        learner.validate()
        with proximal(learner.optimizer, self.proximal):
            if learner.settings.privacy.epsilon is None:
                self.train(learner)
            else:
                train_noisily(learner)
        return nothing_predicted(learner)

    def sends(self, settings: Settings) -> list[str]:
        """Return weights."""
        if settings.privacy.epsilon is None:
            return [WEIGHTS]
        return [f"{WEIGHTS}, trained with clipped gradients and noise"]

    def facts(self, settings: Settings, client: str) -> dict[str, Any]:
        """Return what the client's training has spent, from its ledger."""
        if settings.privacy.epsilon is None:
            return {}
        from fedmutual.methods.release import ledger_of

        return {"privacy": {**vars(ledger_of(settings, client).spent()), "noisy_model": True}}

    def weights(self, order: Order, report: Report, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return all weights after training; none in the closing round, where they are the server's own."""
        return {} if order.closing else weights
