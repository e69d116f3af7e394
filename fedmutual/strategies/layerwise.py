"""The asynchronous baseline of arXiv:2503.05803: shallow layers travel often, deep ones every third round.

After arXiv:1903.07424, but in lock-step, as the paper runs it: no report is stale. Layers are weighted by
validation accuracy, and the server continues to train the global model on the round's public samples. Every
client keeps its own copy of the layers that did not travel, so clients differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from statistics import fmean
from typing import Any

from flwr.app import RecordDict

from fedmutual.learning.layers import accuracy_shares, split_layers, weighted_sum
from fedmutual.strategies.base import Arrays, Figures, at_least
from fedmutual.strategies.fedavg import GlobalStrategy
from fedmutual.wire.orders import Order
from fedmutual.wire.reports import Expected, Report, read_report
from fedmutual.wire.weights import read_weights, weights_record

ACCURACY = "validation-accuracy"
Train = Callable[[int, Arrays], Arrays]


class Layerwise(GlobalStrategy):
    """Average the layers of the round, train the global model, and return these layers of it.

    Parameters
    ----------
    num_classes : int
    weights : Mapping[str, array]
        The start of all clients.
    deep_every : int
        Deep layers travel in rounds divisible by this, shallow ones in all others.
    normalise : bool
        Weight layers by validation accuracy over the sum of accuracies; False: over the number of clients,
        as the paper's code does, so that weights shrink.
    train : callable or None
        ``(round, weights) -> weights``: the server's own training; None: it does not train.
    **options
        See :class:`fedmutual.strategies.fedavg.GlobalStrategy`.
    """

    def __init__(
        self,
        num_classes: int,
        weights: Arrays,
        *,
        deep_every: int = 3,
        normalise: bool = True,
        train: Train | None = None,
        **options: Any,
    ) -> None:
        super().__init__(num_classes, weights, **options)
        at_least("deep_every", deep_every, 2)
        self.deep_every = deep_every
        self.normalise = normalise
        self.train = train

    def order(self, client: str | None, base: Order) -> Order:
        """The global model's layers of the round before; every client has the common start already."""
        if base.round == 1:
            return base
        return replace(base, model=weights_record(self._layers(base.round - 1)))

    def read(self, content: RecordDict, expected: Expected) -> Report:
        """Reject layers that do not fit the global model; a closing report has none."""
        report = read_report(content, expected)
        if not expected.closing:
            read_weights(report, self._layers(expected.round))
        return report

    def take(self, round: int, reports: Mapping[str, Report]) -> Figures:
        """Add up the layers weighted by accuracy, then train."""
        like = self._layers(round)
        received = {name: read_weights(report, like) for name, report in reports.items()}
        shares = accuracy_shares(accuracies(reports), self.normalise)
        self.weights = {**self.weights, **weighted_sum(received, shares)}
        if self.train is not None:
            self.weights = self.train(round, self.weights)
        return self.measure(round, self.weights)

    def _layers(self, round: int) -> Arrays:
        dimensions = {name: values.ndim for name, values in self.weights.items()}
        return {name: self.weights[name] for name in travelling(dimensions, round, self.deep_every)}


def travelling(dimensions: Mapping[str, int], round: int, deep_every: int) -> tuple[str, ...]:
    """Names of the arrays that travel in a round; ``dimensions`` are those of all arrays of the model."""
    shallow, deep = split_layers(dimensions)
    return shallow if round % deep_every else deep


def accuracies(reports: Mapping[str, Report]) -> dict[str, float]:
    """Validation accuracies; a client too small to have one gets the mean of the others."""
    reported = {name: report.metrics.get(ACCURACY) for name, report in reports.items()}
    measured = {name: value for name, value in reported.items() if isinstance(value, int | float)}
    rest = fmean(measured.values()) if measured else 1.0
    return {name: measured.get(name, rest) for name in reports}
