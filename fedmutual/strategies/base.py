"""A strategy with rounds: what an algorithm says of itself, and Flower's interface made of that.

An algorithm fills in each client's order (:meth:`RoundStrategy.order`) and uses a round's reports
(:meth:`RoundStrategy.take`). From these two follow Flower's five hooks here, so that
``Strategy.start`` drives it in any Flower app, and fedmutual's own engine (:mod:`fedmutual.engine.rounds`),
which adds deadlines, resending, resume, names and a byte ledger.
"""

from __future__ import annotations

import logging
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords

from fedmutual.wire.orders import Order, order_record
from fedmutual.wire.records import FLOOR, METRICS, NO_SAMPLES, IndexArray
from fedmutual.wire.reports import Expected, Report, read_report
from fedmutual.wire.weights import weights_record

Arrays = Mapping[str, np.ndarray[Any, Any]]
Figures = dict[str, Any]
Aggregate = Callable[[list[RecordDict], str], MetricRecord]
Schedule = Callable[[int], IndexArray]

WAIT_SECONDS = 1.0

logger = logging.getLogger(__name__)


class RoundStrategy(Strategy):
    """A Flower strategy whose clients answer orders with reports.

    Parameters
    ----------
    num_classes : int
        C, at least 2.
    fraction_train, fraction_evaluate : float
        Share of the connected nodes that train, or evaluate, in a round; 0: nobody.
    min_train_nodes, min_evaluate_nodes : int
        At least so many take part; a round waits until they are connected.
    min_available_nodes : int
        So many nodes must be connected before a round begins.
    weighted_by_key : str
        Metric that weights the clients' metrics in their mean.
    train_metrics_aggr_fn, evaluate_metrics_aggr_fn : callable or None
        ``(records, weighted_by_key) -> MetricRecord``. None: the weighted mean of the metrics that all
        clients report.
    seed : int
        Of the choice of nodes and samples.
    """

    exchanges_predictions = False
    own_metrics: tuple[str, ...] = ()  # names that clients of the application may report besides its own
    wire_dtype = "float16"
    keeps_half = False  # keep what travels in float16 in float16; the strategy computes in float32 or better
    floor = FLOOR

    def __init__(
        self,
        num_classes: int,
        *,
        fraction_train: float = 1.0,
        fraction_evaluate: float = 1.0,
        min_train_nodes: int = 2,
        min_evaluate_nodes: int = 2,
        min_available_nodes: int = 2,
        weighted_by_key: str = "num-examples",
        train_metrics_aggr_fn: Aggregate | None = None,
        evaluate_metrics_aggr_fn: Aggregate | None = None,
        seed: int = 0,
    ) -> None:
        at_least("num_classes", num_classes, 2)
        for name, share in (("fraction_train", fraction_train), ("fraction_evaluate", fraction_evaluate)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name}: {share} is not between 0 and 1")
        at_least("min_train_nodes", min_train_nodes, 0)
        at_least("min_evaluate_nodes", min_evaluate_nodes, 0)
        at_least("min_available_nodes", min_available_nodes, 0)
        self.num_classes = num_classes
        self.fraction_train = fraction_train
        self.fraction_evaluate = fraction_evaluate
        self.min_train_nodes = min_train_nodes
        self.min_evaluate_nodes = min_evaluate_nodes
        self.min_available_nodes = min_available_nodes
        self.weighted_by_key = weighted_by_key
        self.train_metrics_aggr_fn = train_metrics_aggr_fn
        self.evaluate_metrics_aggr_fn = evaluate_metrics_aggr_fn
        self.seed = seed
        self.rejected: dict[str, str] = {}

    # -----------------------------------------------------------------------------------------------
    # The algorithm

    def indices(self, round: int) -> IndexArray:
        """Public samples that the clients predict in a round, int32 [n]."""
        return NO_SAMPLES

    @property
    def numbers(self) -> int:
        """Whole numbers of each client that secure aggregation adds up, once; 0: it adds up predictions."""
        return 0

    def prepare(self, round: int) -> None:
        """Compute what all orders of a round share; called once before :meth:`order`."""

    @abstractmethod
    def order(self, client: str | None, base: Order) -> Order:
        """Fill in a client's order.

        Parameters
        ----------
        client : str or None
            The client's key, the same as in :meth:`take`. In the application its name, None until it has
            reported; in Flower's own loop the node id as a string, never None.
        base : Order
            With the round, its public samples and, at the end of a run of the engine, ``closing``.
        """

    def read(self, content: RecordDict, expected: Expected) -> Report:
        """Read and check a report; MessageError rejects it."""
        return read_report(content, expected)

    @abstractmethod
    def take(self, round: int, reports: Mapping[str, Report]) -> Figures:
        """Use a round's accepted reports, by client.

        Returns
        -------
        dict
            What the engine adds to each line of the round's history.
        """

    def arrays(self) -> ArrayRecord | None:
        """What ``evaluate_fn`` gets after a round, and ``Result.arrays`` holds at the end."""
        weights = self.global_weights()
        if weights is None:
            return None
        return weights_record(weights)

    def global_weights(self) -> Arrays | None:
        """Weights of the global model; None: the strategy has none."""
        return None

    def participants(self, nodes: Mapping[int, str | None]) -> list[int]:
        """Which of the connected nodes get an order at all; ``nodes`` maps node ids to names."""
        return list(nodes)

    def state(self) -> tuple[dict[str, Any], Arrays]:
        """What the strategy needs to continue after the last round: JSON values, and arrays by name."""
        return {}, {}

    def restore_state(self, meta: Mapping[str, Any], arrays: Arrays) -> None:
        """Continue from what :meth:`state` returned."""

    def describe(self) -> str:
        """The strategy and its settings in one line."""
        return type(self).__name__

    # -----------------------------------------------------------------------------------------------
    # Flower's hooks

    def summary(self) -> None:
        """Log the strategy's settings."""
        logger.info("%s", self.describe())

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Order a round of learning from a share of the nodes.

        Parameters
        ----------
        arrays : ArrayRecord
            Not sent.
        config : ConfigRecord
            Passed on to the clients as ``Order.config``, with ``server-round``.
        """
        if self.fraction_train == 0:
            return []
        nodes = self._sample(grid, self.fraction_train, self.min_train_nodes, f"train {server_round}")
        self.prepare(server_round)
        base = self._base(server_round, config, self.indices(server_round))
        return [self._message(self.order(str(node), base), node, MessageType.TRAIN) for node in nodes]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check the reports, use the good ones, and average their metrics.

        A client that failed, or whose report is bad, is named in the log and in :attr:`rejected`; the round
        goes on without it.
        """
        expected = self.expected(server_round)
        good = self._accepted(server_round, replies, lambda content: self.read(content, expected))
        if not good:
            return None, None
        reports = {client: report for client, (_, report) in good.items()}
        self.take(server_round, reports)
        records = [content for content, _ in good.values()]
        return self.arrays(), self._averaged(records, self.train_metrics_aggr_fn)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask a share of the nodes to evaluate their models as they are."""
        if self.fraction_evaluate == 0:
            return []
        nodes = self._sample(
            grid, self.fraction_evaluate, self.min_evaluate_nodes, f"evaluate {server_round}"
        )
        base = self._base(server_round, config, NO_SAMPLES)
        return [self._message(base, node, MessageType.EVALUATE) for node in nodes]

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Average the clients' metrics. A reply needs a MetricRecord and no more."""
        good = self._accepted(server_round, replies, lambda content: content)
        return self._averaged([content for content, _ in good.values()], self.evaluate_metrics_aggr_fn)

    # -----------------------------------------------------------------------------------------------

    def expected(self, round: int) -> Expected:
        """What a report of a round must look like."""
        count = len(self.indices(round)) if self.exchanges_predictions else 0
        return Expected(round, count, self.num_classes, self.wire_dtype, self.floor, half=self.keeps_half)

    def _base(self, round: int, config: ConfigRecord, indices: IndexArray) -> Order:
        return Order(
            round=round,
            num_classes=self.num_classes,
            indices=indices,
            wire_dtype=self.wire_dtype,
            floor=self.floor,
            config={**config, "server-round": round},
        )

    @staticmethod
    def _message(order: Order, node: int, message_type: str) -> Message:
        return Message(order_record(order), node, message_type)

    def _sample(self, grid: Grid, share: float, at_least: int, purpose: str) -> list[int]:
        """A seeded choice among the connected nodes, after enough of them have connected."""
        while True:
            nodes = sorted(grid.get_node_ids())
            size = max(int(len(nodes) * share), at_least)
            if len(nodes) >= max(size, self.min_available_nodes):
                break
            logger.info(
                "waiting for nodes: %d of %d connected", len(nodes), max(size, self.min_available_nodes)
            )
            time.sleep(WAIT_SECONDS)
        nodes = self.participants(dict.fromkeys(nodes))
        if size >= len(nodes):
            return nodes
        chosen = np.random.default_rng([self.seed, *purpose.encode()]).choice(len(nodes), size, replace=False)
        return [nodes[i] for i in sorted(chosen)]

    def _accepted(
        self, round: int, replies: Iterable[Message], read: Callable[[RecordDict], Any]
    ) -> dict[str, tuple[RecordDict, Any]]:
        """The good replies by node: their metrics, and what was read. The others are named in the log."""
        good: dict[str, tuple[RecordDict, Any]] = {}
        self.rejected = {}
        for message in sorted(replies, key=lambda message: message.metadata.src_node_id):
            node = str(message.metadata.src_node_id)
            try:
                if message.has_error():
                    raise ValueError(message.error.reason or f"Flower error {message.error.code}")
                report = read(message.content)
                good[node] = RecordDict({METRICS: self._metrics(message.content)}), report
            except Exception as error:  # whatever a reply raises, it must not end the run
                self.rejected[node] = f"{error}" if isinstance(error, ValueError) else repr(error)
                logger.warning("round %d: node %s rejected: %s", round, node, self.rejected[node])
        return good

    def _metrics(self, content: RecordDict) -> MetricRecord:
        """The one MetricRecord of a reply, which must have the weight.

        Raises
        ------
        ValueError
            Naming what is missing, or the first value that is not finite.
        """
        records = list(content.metric_records.values())
        if len(records) != 1:
            raise ValueError(f"{len(records)} MetricRecords, not one")
        (record,) = records
        weight = record.get(self.weighted_by_key)
        if not isinstance(weight, int | float) or weight < 0:
            raise ValueError(f"{self.weighted_by_key}: {weight!r} is no weight (weighted_by_key)")
        for name, value in record.items():
            if not np.isfinite(np.asarray(value, np.float64)).all():
                raise ValueError(f"{name}: {value} is not finite")
        return record

    def _averaged(self, records: list[RecordDict], custom: Aggregate | None) -> MetricRecord | None:
        if not records:
            return None
        if custom is not None:
            return custom(records, self.weighted_by_key)
        metrics = [cast(MetricRecord, record[METRICS]) for record in records]
        if sum(cast(float, m[self.weighted_by_key]) for m in metrics) == 0:
            return MetricRecord()
        shapes = [{name: np.shape(value) for name, value in m.items()} for m in metrics]
        common = [name for name, shape in shapes[0].items() if all(s.get(name) == shape for s in shapes)]
        same = [RecordDict({METRICS: MetricRecord({name: m[name] for name in common})}) for m in metrics]
        return aggregate_metricrecords(same, self.weighted_by_key)


def at_least(name: str, value: Any, minimum: int) -> None:
    """Refuse what is no whole number, or too small.

    Raises
    ------
    ValueError
        Naming the argument.
    """
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name}: {value!r} is no whole number of at least {minimum}")


def one_of(name: str, value: object, choices: Sequence[str]) -> None:
    """Refuse an unknown choice.

    Raises
    ------
    ValueError
        Naming the argument and the choices.
    """
    if value not in choices:
        raise ValueError(f"{name}: {value!r} is none of {', '.join(choices)}")


def below(prefix: str, arrays: Arrays) -> dict[str, np.ndarray[Any, Any]]:
    """Arrays whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): a for name, a in arrays.items() if name.startswith(prefix)}
