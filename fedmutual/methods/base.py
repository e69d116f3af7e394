"""Base class of a strategy's image-application half: settings, engine, client side."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fedmutual.engine.rounds import Rounds
from fedmutual.settings import Settings, StrategySettings
from fedmutual.strategies.base import RoundStrategy
from fedmutual.wire.orders import Order
from fedmutual.wire.reports import Report

if TYPE_CHECKING:
    from torch import Tensor

    from fedmutual.client.learner import Answer, Learner
    from fedmutual.data.site import SharedData
    from fedmutual.engine.arriving import Arriving
    from fedmutual.learning.ring import Summed
    from fedmutual.results.directory import RunDirectory


# what leaves a site, as `fedmutual doctor` says it
PREDICTIONS = "predictions of the public images, every round"
WEIGHTS = "all weights that learn, every round"


@dataclass(kw_only=True)
class Method(StrategySettings):
    """A strategy's settings; ``_target_`` in ``conf/strategy/*.yaml`` names the subclass."""

    whole_pool: ClassVar[bool] = False  # a client gets the private images of all clients
    part_of_model: ClassVar[bool] = False  # orders contain only some layers; the client keeps the others
    loads_model: ClassVar[bool] = True  # an order's arrays are the client's weights

    @abstractmethod
    def strategy(self, settings: Settings, shared: SharedData) -> Any:
        """Return the strategy of these settings."""

    def engine(
        self, settings: Settings, shared: SharedData, run: str, journal: RunDirectory | None
    ) -> Rounds | Arriving:
        """Return the engine that drives the strategy: the server's side of a run."""
        strategy: RoundStrategy = self.strategy(settings, shared)
        return Rounds(strategy, settings, shared, run, journal)

    def summed(self, settings: Settings) -> Summed | None:
        """Return what secure aggregation adds up; None if the strategy needs more than a sum."""
        return None

    def sends(self, settings: Settings) -> list[str]:
        """Return what leaves a site beside its figures, in words."""
        return []

    def facts(self, settings: Settings, client: str) -> dict[str, Any]:
        """Return what a client's model card says of it besides; it stays at the site."""
        return {}

    @abstractmethod
    def learn(self, learner: Learner) -> Answer:
        """Carry out the learner's order: the client's side."""

    def weights(self, order: Order, report: Report, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the weights to send with the report; by default none."""
        return {}


def nothing_predicted(learner: Learner) -> Answer:
    """Return an answer without predictions."""
    from fedmutual.client.learner import Answer

    return Answer(np.zeros((0, learner.order.num_classes), np.float32))
