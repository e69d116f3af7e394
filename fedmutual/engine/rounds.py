"""What strategies with rounds share: orders out, reports in, quorum, history, checkpoint, the closing round.

A strategy of this kind fills an order (:meth:`Rounds.order`) and takes the reports of a round
(:meth:`Rounds.take`); everything else is here.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedmutual.data.site import SharedData
from fedmutual.engine.history import Line
from fedmutual.engine.interface import MESSAGE_TYPE
from fedmutual.engine.roster import Roster
from fedmutual.engine.virtual_rounds import VirtualRounds
from fedmutual.results.directory import RunDirectory
from fedmutual.settings import Settings
from fedmutual.wire.codec import FloatArray
from fedmutual.wire.exchange import Exchange, Reply, as_reply, messages_to
from fedmutual.wire.messages import Expected, IndexArray, Order, Report, order_record, read_report

Arrays = Mapping[str, np.ndarray[Any, Any]]
NO_SAMPLES: IndexArray = np.zeros(0, np.int32)

logger = logging.getLogger(__name__)


class Rounds(Strategy):
    """A strategy whose clients all report before the next round begins.

    Parameters
    ----------
    settings : Settings
    shared : SharedData
        The classes, the public set and, where there is one, the unseen set.
    run : str
        Unique name of the run.
    journal : RunDirectory or None
        Where history and checkpoints go; None keeps nothing.

    Attributes
    ----------
    unseen_predictions : dict[str, float32 [u, C]]
        Log-probabilities of the unseen set by client, from the closing reports.
    """

    predicts = True  # clients predict the round's public samples
    wire_dtype = "float16"
    floor = 1e-4

    def __init__(
        self, settings: Settings, shared: SharedData, run: str, journal: RunDirectory | None = None
    ) -> None:
        self.settings = settings
        self.shared = shared
        self.run = run
        self.journal = journal
        self.roster = Roster(settings.exchange.min_clients, settings.participation, settings.seed)
        self.unseen_predictions: dict[str, FloatArray] = {}
        self._rounds_done = 0
        self._clock = VirtualRounds.of(settings.emulation)

    # -----------------------------------------------------------------------------------------------
    # What a strategy of this kind is made of

    def prepare(self, round: int) -> None:
        """Form what the orders of a round have in common, before the first of them is made."""

    @abstractmethod
    def order(self, client: str | None, base: Order) -> Order:
        """Fill in a client's order; ``client`` is None for a node that has not reported yet."""

    def read(self, content: RecordDict, expected: Expected) -> Report:
        """Check a report; what is raised as MessageError rejects it by name."""
        return read_report(content, expected)

    @abstractmethod
    def take(self, round: int, reports: Mapping[str, Report]) -> Line:
        """Use the good reports of a round; returns what all its history lines say besides."""

    def finish(self) -> None:
        """The closing reports are in."""

    def global_weights(self) -> Arrays | None:
        """Weights of the global model at the end of a run; None: the strategy has none."""
        return None

    def state(self) -> tuple[dict[str, Any], Arrays]:
        """What the strategy itself needs to go on after the last round done."""
        return {}, {}

    def restore_state(self, meta: Mapping[str, Any], arrays: Arrays) -> None:
        """Take up what :meth:`state` gave."""

    def participants(self, nodes: list[int]) -> list[int]:
        """Those of the connected nodes that get an order."""
        return nodes

    # -----------------------------------------------------------------------------------------------
    # Flower's interface

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int | None = None,
        timeout: float | None = None,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run all rounds and the closing one; continue after the last one done when restored.

        Parameters
        ----------
        grid : Grid
        num_rounds : int or None
            None: ``settings.rounds``.
        initial_arrays, timeout, train_config, evaluate_config, evaluate_fn
            Flower's, so that strategies can be swapped. Not used: a common start is made from the run's
            seed, and ``settings.exchange`` has the round's time.

        Raises
        ------
        ExchangeError, StrategyError
            If too few clients connect or answer, or two nodes have one name.
        """
        exchange = Exchange(grid, self.settings.exchange)
        rounds = num_rounds or self.settings.rounds
        nobody, nothing = ArrayRecord(), ConfigRecord()
        result = Result()
        connected = len(self.participants(exchange.wait_for_clients(self.settings.num_clients)))
        self.roster.expect(max(connected, self.roster.expected))  # a resumed run keeps its quorum
        self.summary()
        for current in range(self._rounds_done + 1, rounds + 1):
            self.roster.identify(exchange)
            orders = list(self.configure_train(current, nobody, nothing, grid))
            metrics = self._gather(current, exchange.send_and_collect(orders), closing=False)
            result.train_metrics_clientapp[current] = metrics
            self._save(current)
        self.roster.identify(exchange)
        orders = list(self.configure_evaluate(rounds + 1, nobody, nothing, grid))
        metrics = self._gather(rounds + 1, exchange.send_and_collect(orders, everyone=True), closing=True)
        result.evaluate_metrics_clientapp[rounds] = metrics
        self.finish()
        return result

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One order a participating node."""
        return self._orders(server_round, grid, closing=False)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The closing order: what is left to learn, and all measurements."""
        return self._orders(server_round, grid, closing=True)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check and use the reports of a round; the arrays, where there are any, stay in the strategy."""
        return None, self._gather(server_round, [as_reply(m) for m in replies], closing=False)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Check and keep the closing reports."""
        return self._gather(server_round, [as_reply(m) for m in replies], closing=True)

    def summary(self) -> None:
        """Log what will be done."""
        public = self.settings.public
        logger.info(
            "%s: %d clients, %d rounds; public set: %d images, %s, %s, digest %s",
            self.settings.strategy.name, self.roster.expected, self.settings.rounds,
            len(self.shared.public), public.schedule, "labelled" if public.labelled else "unlabelled",
            self.shared.public.digest,
        )  # fmt: skip

    # -----------------------------------------------------------------------------------------------
    # Resume

    def checkpoint(self) -> tuple[dict[str, Any], Arrays]:
        """Everything that :meth:`restore` needs to go on after the last round done."""
        meta, arrays = self.state()
        head = {"run": self.run, "round": self._rounds_done, "roster": self.roster.as_dict()}
        if self._clock is not None:
            head["clock"] = self._clock.as_dict()
        return head | meta, arrays

    def restore(self, meta: Mapping[str, Any], arrays: Arrays) -> None:
        """Continue a run from what :meth:`checkpoint` gave."""
        self.run, self._rounds_done = meta["run"], meta["round"]
        self.roster.restore(meta["roster"])
        if self._clock is not None:
            self._clock.restore(meta["clock"])
        self.restore_state(meta, arrays)

    # -----------------------------------------------------------------------------------------------

    def indices(self, round: int) -> IndexArray:
        """Public samples of a round."""
        settings = self.settings
        return self.shared.public.indices(settings.public, settings.seed, round, settings.rounds)

    def evaluates_unseen(self, round: int) -> bool:
        """Whether the unseen set is measured in a round."""
        every = self.settings.evaluation.unseen_every
        return every > 0 and round % every == 0

    def _orders(self, current: int, grid: Grid, *, closing: bool) -> list[Message]:
        self.prepare(current)
        base = Order(
            run=self.run,
            round=current,
            closing=closing,
            public_digest=self.shared.public.digest,
            classes=self.shared.classes,
            public_indices=self.indices(current) if self.predicts and not closing else NO_SAMPLES,
            target_indices=NO_SAMPLES,
            evaluate_unseen=not closing and self.evaluates_unseen(current),
        )
        nodes = self.participants(self.roster.nodes(grid))
        if not closing:
            nodes = self.roster.taking_part(current, nodes)
        orders = {
            node: order_record(self.order(self.roster.name(node), base), self.wire_dtype) for node in nodes
        }
        return messages_to(orders, MESSAGE_TYPE, self.settings.exchange.round_timeout)

    def _gather(self, current: int, replies: list[Reply], *, closing: bool) -> MetricRecord:
        """Accept the good reports, reject the bad ones by name, and write both down."""
        unseen = self.shared.unseen
        expected = Expected(
            round=current,
            public_digest=self.shared.public.digest,
            num_samples=len(self.indices(current)) if self.predicts and not closing else 0,
            num_classes=len(self.shared.classes),
            wire_dtype=self.wire_dtype,
            floor=self.floor,
            num_unseen=len(unseen) if closing and unseen is not None else None,
        )
        reports = self.roster.receive(replies, lambda c: self.read(c, expected), current, closing)
        figures: Line = {}
        try:
            self.roster.require_quorum(current)
            if closing:
                self.unseen_predictions = {
                    n: r.unseen_predictions for n, r in reports.items() if r.unseen_predictions is not None
                }
            else:
                figures = self.take(current, reports)
                self._rounds_done = current
                if self._clock is not None:
                    self._clock.pass_round(reports)
        finally:
            if self.journal is not None:
                lines = self.roster.lines()
                if self._clock is not None:
                    lines = [line | {"clock": self._clock.now} for line in lines]
                self.journal.append([line if "rejected" in line else line | figures for line in lines])
        return MetricRecord({"clients": len(reports), "rejected": len(replies) - len(reports)})

    def _save(self, current: int) -> None:
        if self.journal is not None:
            meta, arrays = self.checkpoint()
            self.journal.save_checkpoint(meta, dict(arrays))
        logger.info("round %d: %d clients reported", current, self.roster.good)


def below(prefix: str, arrays: Arrays) -> dict[str, np.ndarray[Any, Any]]:
    """Arrays whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): a for name, a in arrays.items() if name.startswith(prefix)}
