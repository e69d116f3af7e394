"""The asynchronous baseline of arXiv:2503.05803: shallow layers travel often, deep ones every third round.

After arXiv:1903.07424, but in lock-step, as the paper runs it: nobody is stale. What arrives is weighted by
validation accuracy, and the server goes on training the global model on the round's public samples. Every
client keeps its own copy of the layers that did not travel, so clients differ.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, ClassVar

from flwr.app import ArrayRecord, RecordDict

from fedmutual.data.site import SharedData
from fedmutual.engine.history import Line
from fedmutual.engine.rounds import Arrays, Rounds
from fedmutual.engine.server_model import server_order
from fedmutual.learning.layers import accuracy_shares, split_layers, weighted_sum
from fedmutual.results.directory import RunDirectory
from fedmutual.settings import Settings, StrategySettings, setting
from fedmutual.strategies.global_rounds import GlobalRounds
from fedmutual.strategies.private_training import nothing_predicted
from fedmutual.wire.messages import Expected, Order, Report, read_report, report_record
from fedmutual.wire.weights import one_architecture, read_weights, weights_record

if TYPE_CHECKING:
    from torch import Tensor

    from fedmutual.client.learner import Answer, Learner

logger = logging.getLogger(__name__)

ACCURACY = "validation-accuracy"


@dataclass(kw_only=True)
class LayerwiseSettings(StrategySettings):
    """Settings of ``strategy=layerwise``."""

    deep_every: int = setting(
        "deep layers (dense ones) travel in rounds divisible by this, shallow ones in all others", minimum=2
    )
    normalise: bool = setting(
        "true: layers are weighted by validation accuracy over the sum of accuracies; false: over the number "
        "of clients, as the paper's code does, so that they shrink"
    )
    server_epochs: int = setting(
        "passes of the server over the round's public samples (public.labelled=true; else none)", minimum=0
    )

    part_of_model: ClassVar[bool] = True

    def misfit(self, settings: Settings) -> str | None:
        """Layers can only be averaged between equal models that have one start."""
        if not settings.train.common_start:
            return (
                "train.common_start: false, but strategy=layerwise averages layers of clients that keep the "
                "rest of their models: they need one start; set train.common_start=true"
            )
        return one_architecture(settings)

    def build(
        self, settings: Settings, shared: SharedData, run: str, journal: RunDirectory | None
    ) -> Layerwise:
        """Make the strategy of a run."""
        return Layerwise(settings, shared, run, journal)

    def learn(self, learner: Learner) -> Answer:
        """Train all layers, and measure."""
        if learner.order.closing:
            return learner.close()
        learner.local_training()
        learner.measure()
        return nothing_predicted(learner)

    def pack(self, report: Report, weights: Mapping[str, Tensor]) -> RecordDict:
        """The layers whose round it is, where they were trained."""
        if "train-loss" in report.metrics:
            names = self.travelling({name: w.ndim for name, w in weights.items()}, report.round)
            report = replace(report, model=ArrayRecord({name: weights[name].cpu() for name in names}))
        return report_record(report, Rounds.wire_dtype, Rounds.floor)

    def travelling(self, dimensions: Mapping[str, int], round: int) -> tuple[str, ...]:
        """Names of the arrays that travel in a round."""
        shallow, deep = split_layers(dimensions)
        return shallow if round % self.deep_every else deep


class Layerwise(GlobalRounds):
    """Average the layers of the round, train the global model, and return these layers of it."""

    def __init__(
        self, settings: Settings, shared: SharedData, run: str, journal: RunDirectory | None = None
    ) -> None:
        super().__init__(settings, shared, run, journal)
        self.options: LayerwiseSettings = settings.strategy

    def order(self, client: str | None, base: Order) -> Order:
        """The global model's layers of the round before; everyone has the common start already."""
        if base.round == 1:
            return base
        return replace(base, model=weights_record(self._layers(base.round - 1)))

    def read(self, content: RecordDict, expected: Expected) -> Report:
        """Layers that do not fit the global model are rejected; a closing report has none."""
        report = read_report(content, expected)
        if expected.round <= self.settings.rounds:
            read_weights(report, self._layers(expected.round))
        return report

    def take(self, round: int, reports: Mapping[str, Report]) -> Line:
        """Weight by accuracy, add up, and train on public labels."""
        like = self._layers(round)
        received = {name: read_weights(report, like) for name, report in reports.items()}
        shares = accuracy_shares(self._accuracies(reports), self.options.normalise)
        self.weights = {**self.weights, **weighted_sum(received, shares)}
        self.server.load(self.weights)
        order = server_order(self, round)
        if self.settings.public.labelled and self.options.server_epochs:
            learner = self.server.learner(order)
            learner.separate_mutual_step(learner.public("own_peer", 1.0), self.options.server_epochs)
            self.weights = self.server.weights()
        return self.server.measured(order) if self.evaluates_unseen(round) else {}

    def summary(self) -> None:
        """Say also where the server cannot train."""
        super().summary()
        if self.options.server_epochs and not self.settings.public.labelled:
            logger.warning(
                "strategy.server_epochs: %d, but public.labelled=false: the server does not train",
                self.options.server_epochs,
            )

    def _layers(self, round: int) -> Arrays:
        dimensions = {name: values.ndim for name, values in self.weights.items()}
        return {name: self.weights[name] for name in self.options.travelling(dimensions, round)}

    def _accuracies(self, reports: Mapping[str, Report]) -> dict[str, float]:
        """Validation accuracies; a client too small to have one counts like the mean of the others."""
        measured = {
            n: report.metrics[ACCURACY] for n, report in reports.items() if ACCURACY in report.metrics
        }
        accuracies = {name: value for name, value in measured.items() if isinstance(value, int | float)}
        rest = fmean(accuracies.values()) if accuracies else 1.0
        return {name: accuracies.get(name, rest) for name in reports}
