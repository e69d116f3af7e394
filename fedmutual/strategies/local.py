"""No exchange: every client learns alone. What collaboration has to beat."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flwr.app import RecordDict

from fedmutual.data.site import SharedData
from fedmutual.engine.history import Line
from fedmutual.engine.rounds import Rounds
from fedmutual.results.directory import RunDirectory
from fedmutual.settings import Settings
from fedmutual.strategies.private_training import PrivateTrainingSettings, nothing_predicted
from fedmutual.wire.messages import Order, Report, report_record

if TYPE_CHECKING:
    from torch import Tensor

    from fedmutual.client.learner import Answer, Learner


@dataclass(kw_only=True)
class LocalSettings(PrivateTrainingSettings):
    """Settings of ``strategy=local``."""

    def build(self, settings: Settings, shared: SharedData, run: str, journal: RunDirectory | None) -> Local:
        """Make the strategy of a run."""
        return Local(settings, shared, run, journal)

    def learn(self, learner: Learner) -> Answer:
        """Train, and measure."""
        if learner.order.closing:
            return learner.close()
        self.train(learner)
        learner.measure()
        return nothing_predicted(learner)

    def pack(self, report: Report, weights: Mapping[str, Tensor]) -> RecordDict:
        """Measurements only."""
        return report_record(report, Rounds.wire_dtype, Rounds.floor)


class Local(Rounds):
    """Keep the clients in step, and write down what they measure."""

    predicts = False

    def order(self, client: str | None, base: Order) -> Order:
        """Train for a round."""
        options: LocalSettings = self.settings.strategy
        return options.taught(base, self.indices(base.round))

    def take(self, round: int, reports: Mapping[str, Report]) -> Line:
        """Nothing is exchanged."""
        return {}
