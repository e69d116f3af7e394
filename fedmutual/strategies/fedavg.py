"""Federated averaging (arXiv:1602.05629), with Flower's own aggregation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

from fedmutual.strategies.base import Arrays, Figures, RoundStrategy, Schedule, below
from fedmutual.strategies.local import with_labelled
from fedmutual.wire.orders import Order
from fedmutual.wire.records import METRICS, MODEL
from fedmutual.wire.reports import Expected, Report, read_report
from fedmutual.wire.weights import read_weights, weights_record

EXAMPLES = "num-examples"
Measure = Callable[[int, Arrays], Figures]


class GlobalStrategy(RoundStrategy):
    """A strategy whose clients' weights make one global model.

    Parameters
    ----------
    num_classes : int
    weights : Mapping[str, array]
        The start of all clients.
    measure : callable or None
        ``(round, weights) -> figures`` of the global model; None: it is not measured.
    **flower
        See :class:`fedmutual.strategies.base.RoundStrategy`.
    """

    def __init__(
        self, num_classes: int, weights: Arrays, *, measure: Measure | None = None, **flower: Any
    ) -> None:
        super().__init__(num_classes, **flower)
        self.weights = weights
        self.measure = measure or (lambda round, weights: {})

    def global_weights(self) -> Arrays:
        """The global model."""
        return self.weights

    def state(self) -> tuple[dict[str, Any], Arrays]:
        """The global model."""
        return {}, {f"model.{name}": values for name, values in self.weights.items()}

    def restore_state(self, meta: Mapping[str, Any], arrays: Arrays) -> None:
        """Continue from what :meth:`state` returned."""
        self.weights = below("model.", arrays)


class FedAvg(GlobalStrategy):
    """Average all weights every round, weighted by numbers of examples.

    Parameters
    ----------
    labelled : callable or None
        The labelled public samples that clients also train on in a round; None: none.
    equal : bool
        All clients count the same; their numbers of examples are not used.
    """

    def __init__(
        self,
        num_classes: int,
        weights: Arrays,
        *,
        labelled: Schedule | None = None,
        equal: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(num_classes, weights, **options)
        self.labelled = labelled
        self.equal = equal

    def order(self, client: str | None, base: Order) -> Order:
        """The global model."""
        model = weights_record(self.weights)
        return replace(with_labelled(base, self.labelled), model=model, evaluate_unseen=False)

    def read(self, content: RecordDict, expected: Expected) -> Report:
        """Reject weights that do not fit the global model; a closing report has none."""
        report = read_report(content, expected)
        if not expected.closing:
            read_weights(report, self.weights)
        return report

    def take(self, round: int, reports: Mapping[str, Report]) -> Figures:
        """Average the weights; report the averaged model's figures for every client."""
        averaged = average_by_examples(reports, self.equal)
        self.weights = {name: averaged[name].numpy().astype(old.dtype) for name, old in self.weights.items()}
        return self.measure(round, self.weights)


def average_by_examples(reports: Mapping[str, Report], equal: bool = False) -> ArrayRecord:
    """Flower's average of the reported weights by numbers of examples, or all equal."""
    records = [
        RecordDict(
            {
                MODEL: report.model or ArrayRecord(),
                METRICS: MetricRecord({EXAMPLES: 1 if equal else report.metrics[EXAMPLES]}),
            }
        )
        for report in reports.values()
    ]
    return aggregate_arrayrecords(records, EXAMPLES)
