"""``strategy=layerwise`` in the image application: the asynchronous baseline of arXiv:2503.05803."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fedmutual.engine.server_model import ServerModel
from fedmutual.methods.base import Method, nothing_predicted
from fedmutual.methods.one_architecture import one_architecture
from fedmutual.methods.schedule import public_schedule
from fedmutual.settings import Settings, setting
from fedmutual.strategies.base import Arrays
from fedmutual.strategies.layerwise import Layerwise, travelling
from fedmutual.wire.orders import Order
from fedmutual.wire.reports import Report

if TYPE_CHECKING:
    from torch import Tensor

    from fedmutual.client.learner import Answer, Learner
    from fedmutual.data.site import SharedData

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class LayerwiseSettings(Method):
    """Settings of ``strategy=layerwise``."""

    deep_every: int = setting(
        "deep (dense) layers are sent in rounds divisible by this, shallow layers in all others", minimum=2
    )
    normalise: bool = setting(
        "true: layer weights are validation accuracies divided by their sum; false: divided by the number of "
        "clients, as in the paper's code, which shrinks the layers"
    )
    server_epochs: int = setting(
        "passes of the server over the round's public samples (only with public.labelled=true)", minimum=0
    )

    part_of_model: ClassVar[bool] = True

    def misfit(self, settings: Settings) -> str | None:
        """Reject different models or initial weights, whose layers cannot be averaged."""
        if not settings.train.common_start:
            return (
                "train.common_start: false, but strategy=layerwise averages some layers and clients keep the "
                "others, which needs equal initial weights: set train.common_start=true"
            )
        return one_architecture(settings)

    def strategy(self, settings: Settings, shared: SharedData) -> Layerwise:
        """Return the strategy of these settings."""
        server, samples = ServerModel(settings, shared), public_schedule(settings, shared)
        trains = settings.public.labelled and self.server_epochs > 0
        if self.server_epochs and not trains:
            logger.warning(
                "strategy.server_epochs: %d, but public.labelled=false: the server does not train",
                self.server_epochs,
            )

        def train(round: int, weights: Arrays) -> Arrays:
            server.load(weights)
            learner = server.learner(server.order(round, samples(round)))
            learner.separate_mutual_step(learner.public(), self.server_epochs)
            return server.weights()

        return Layerwise(
            len(shared.classes),
            server.weights(),
            deep_every=self.deep_every,
            normalise=self.normalise,
            train=train if trains else None,
            measure=server.measure_apart,
        )

    def learn(self, learner: Learner) -> Answer:
        """Train all layers, and evaluate."""
        if learner.order.closing:
            return learner.close()
        learner.local_training()
        learner.measure()
        return nothing_predicted(learner)

    def sends(self, settings: Settings) -> list[str]:
        """Return the weights of some layers."""
        return ["weights of some layers, every round"]

    def weights(self, order: Order, report: Report, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the layers due in this round, after training."""
        if order.closing:
            return {}
        dimensions = {name: values.ndim for name, values in weights.items()}
        return {name: weights[name] for name in travelling(dimensions, order.round, self.deep_every)}
