"""Methods that teach everyone one consensus, one's own prediction included: digest it, then learn locally.

What FedMD, DS-FL and CFD share; each has its own file with its consensus.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from flwr.app import RecordDict

from fedmutual.data.site import SharedData
from fedmutual.engine.history import Line
from fedmutual.engine.rounds import NO_SAMPLES, Arrays, Rounds
from fedmutual.learning.consensus import as_target
from fedmutual.results.directory import RunDirectory
from fedmutual.settings import Settings, StrategySettings, setting
from fedmutual.wire.codec import WIRE_DTYPES, FloatArray
from fedmutual.wire.messages import IndexArray, Order, Report, report_record

if TYPE_CHECKING:
    from torch import Tensor

    from fedmutual.client.learner import Answer, Learner


@dataclass(kw_only=True)
class DigestSettings(StrategySettings):
    """Settings that these methods share."""

    digest_epochs: int = setting("passes over the public samples a round, towards the consensus", minimum=1)
    probability_floor: float = setting("shared probabilities are raised to this", above=0, maximum=0.1)
    wire_dtype: str = setting("type in which predictions travel", choices=WIRE_DTYPES)

    revisits_last: ClassVar[bool]  # a round ends with local training; else with the consensus

    @abstractmethod
    def consensus(self, predictions: FloatArray) -> FloatArray:
        """Log-probabilities [N, C] that everyone is taught, from those of all clients [K, N, C]."""

    def build(self, settings: Settings, shared: SharedData, run: str, journal: RunDirectory | None) -> Digest:
        """Make the strategy of a run."""
        return Digest(settings, shared, run, journal)

    def learn(self, learner: Learner) -> Answer:
        """Digest the consensus of the round before, learn from the private images, predict."""
        if len(learner.order.target_indices):
            learner.separate_mutual_step(learner.public("peer_own", 1.0), self.digest_epochs)
        if learner.order.closing:
            if self.revisits_last:
                learner.local_training()
            return learner.close()
        learner.local_training()
        return learner.report()

    def pack(self, report: Report, weights: Mapping[str, Tensor]) -> RecordDict:
        """Predictions and measurements."""
        return report_record(report, self.wire_dtype, self.probability_floor)


class Digest(Rounds):
    """Gather predictions, return one consensus of all."""

    def __init__(
        self, settings: Settings, shared: SharedData, run: str, journal: RunDirectory | None = None
    ) -> None:
        super().__init__(settings, shared, run, journal)
        self.options: DigestSettings = settings.strategy
        self.wire_dtype, self.floor = self.options.wire_dtype, self.options.probability_floor
        self._consensus: FloatArray | None = None
        self._predicted: IndexArray = NO_SAMPLES

    def order(self, client: str | None, base: Order) -> Order:
        """This round's public samples, and the consensus of the round before."""
        return taught_to_all(base, self._predicted, self._consensus)

    def take(self, round: int, reports: Mapping[str, Report]) -> Line:
        """Form the consensus."""
        self._predicted = self.indices(round)
        self._consensus = self.options.consensus(np.stack([r.predictions for r in reports.values()]))
        return {}

    def state(self) -> tuple[dict[str, Any], Arrays]:
        """The consensus, and what it is of."""
        arrays = {} if self._consensus is None else {"consensus": self._consensus}
        return {}, {**arrays, "predicted": self._predicted}

    def restore_state(self, meta: Mapping[str, Any], arrays: Arrays) -> None:
        """Take up what :meth:`state` gave."""
        self._consensus, self._predicted = arrays.get("consensus"), arrays["predicted"]


def taught_to_all(base: Order, predicted: IndexArray, log_probabilities: FloatArray | None) -> Order:
    """An order with one target for everyone."""
    if log_probabilities is None:
        return base
    target = as_target(log_probabilities)
    return replace(
        base,
        target_indices=predicted,
        targets=target.log_probabilities,
        target_entropies=target.entropies,
        kl_weight=1.0,
    )
