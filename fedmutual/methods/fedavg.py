"""``strategy=fedavg`` (arXiv:1602.05629) and ``strategy=fedprox`` (arXiv:1812.06127) in the application."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedmutual.engine.server_model import ServerModel
from fedmutual.methods.base import nothing_predicted
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
        "mu of FedProx: the pull of a client's weights, in its private steps, to those it was sent", minimum=0
    )

    def misfit(self, settings: Settings) -> str | None:
        """Weights can only be averaged between equal models."""
        return one_architecture(settings) or super().misfit(settings)

    def strategy(self, settings: Settings, shared: SharedData) -> FedAvg:
        """Make the strategy from the settings."""
        server = ServerModel(settings, shared)
        return FedAvg(
            len(shared.classes),
            server.weights(),
            measure=server.measure_weights,
            labelled=self.labelled(settings, shared),
        )

    def learn(self, learner: Learner) -> Answer:
        """Measure the global model on the client's own held-out images as it came, then train it."""
        from fedmutual.learning.proximal import proximal

        if learner.order.closing:
            return learner.close()
        learner.validate()
        with proximal(learner.optimizer, self.proximal):
            self.train(learner)
        return nothing_predicted(learner)

    def weights(self, order: Order, report: Report, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """All of them, where they were trained: at the end they are the server's own."""
        return {} if order.closing else weights
