"""Federated averaging (arXiv:1602.05629) with Flower's own aggregation, and FedProx (arXiv:1812.06127)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

from fedmutual.data.site import SharedData
from fedmutual.engine.history import Line
from fedmutual.engine.rounds import Rounds
from fedmutual.engine.server_model import server_order
from fedmutual.results.directory import RunDirectory
from fedmutual.settings import Settings, setting
from fedmutual.strategies.global_rounds import GlobalRounds
from fedmutual.strategies.private_training import PrivateTrainingSettings, nothing_predicted
from fedmutual.wire.messages import METRICS, MODEL, Expected, Order, Report, read_report, report_record
from fedmutual.wire.weights import one_architecture, read_weights, weights_record

if TYPE_CHECKING:
    from torch import Tensor

    from fedmutual.client.learner import Answer, Learner

EXAMPLES = "num-examples"


@dataclass(kw_only=True)
class FedAvgSettings(PrivateTrainingSettings):
    """Settings of ``strategy=fedavg`` and ``strategy=fedprox``."""

    proximal: float = setting(
        "mu of FedProx: the pull of a client's weights, in its private steps, to those it was sent", minimum=0
    )

    def misfit(self, settings: Settings) -> str | None:
        """Weights can only be averaged between equal models."""
        return one_architecture(settings) or super().misfit(settings)

    def build(self, settings: Settings, shared: SharedData, run: str, journal: RunDirectory | None) -> FedAvg:
        """Make the strategy of a run."""
        return FedAvg(settings, shared, run, journal)

    def learn(self, learner: Learner) -> Answer:
        """Measure the global model on the client's own held-out images as it came, then train it."""
        from fedmutual.learning.proximal import proximal

        if learner.order.closing:
            return learner.close()
        learner.validate()
        with proximal(learner.optimizer, self.proximal):
            self.train(learner)
        return nothing_predicted(learner)

    def pack(self, report: Report, weights: Mapping[str, Tensor]) -> RecordDict:
        """The weights, where they were trained: at the end they are the server's own."""
        if "train-loss" in report.metrics:
            report = replace(report, model=ArrayRecord({name: w.cpu() for name, w in weights.items()}))
        return report_record(report, Rounds.wire_dtype, Rounds.floor)


class FedAvg(GlobalRounds):
    """Average all weights every round, by numbers of examples; the server measures the average itself."""

    def order(self, client: str | None, base: Order) -> Order:
        """The global model."""
        options: FedAvgSettings = self.settings.strategy
        model = weights_record(self.weights)
        return replace(options.taught(base, self.indices(base.round)), model=model, evaluate_unseen=False)

    def read(self, content: RecordDict, expected: Expected) -> Report:
        """Weights that do not fit the global model are rejected; a closing report has none."""
        report = read_report(content, expected)
        if expected.num_unseen is None and self._rounds_done < self.settings.rounds:
            read_weights(report, self.weights)
        return report

    def take(self, round: int, reports: Mapping[str, Report]) -> Line:
        """Average; what the unseen set says of the average is the round's figure of every client."""
        averaged = average_by_examples(reports)
        self.weights = {name: averaged[name].numpy().astype(old.dtype) for name, old in self.weights.items()}
        if not self.evaluates_unseen(round):
            return {}
        self.server.load(self.weights)
        return self.server.measure(server_order(self, round))


def average_by_examples(reports: Mapping[str, Report]) -> ArrayRecord:
    """Flower's weighted average of the reported weights, in the order of the reports."""
    records = [
        RecordDict(
            {
                MODEL: report.model or ArrayRecord(),
                METRICS: MetricRecord({EXAMPLES: report.metrics[EXAMPLES]}),
            }
        )
        for report in reports.values()
    ]
    return aggregate_arrayrecords(records, EXAMPLES)
