"""A run with rounds: orders out, reports in, quorum, history, checkpoint, the closing round.

The engine drives a :class:`fedmutual.strategies.base.RoundStrategy`. It extends Flower's own loop with client
names, deadlines, resending, resume and byte counts.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from flwr.app import Message
from flwr.serverapp import Grid

from fedmutual.data.site import SharedData
from fedmutual.engine.frozen import with_frozen
from fedmutual.engine.history import Line
from fedmutual.engine.names import Names
from fedmutual.engine.recording import record_reports, recorder_of
from fedmutual.engine.roster import Roster
from fedmutual.engine.secure_sum import SUM, SecureSum, SumOnce
from fedmutual.engine.virtual_rounds import VirtualRounds
from fedmutual.results.directory import RunDirectory
from fedmutual.results.progress import Progress
from fedmutual.settings import Settings
from fedmutual.strategies.base import RoundStrategy
from fedmutual.wire.codec import FloatArray
from fedmutual.wire.exchange import Exchange, Reply, messages_to
from fedmutual.wire.orders import Order, order_record
from fedmutual.wire.patience import Patience
from fedmutual.wire.records import MESSAGE_TYPE, NO_SAMPLES
from fedmutual.wire.reports import Expected, Report, claimed_accuracy

Arrays = Mapping[str, np.ndarray[Any, Any]]

logger = logging.getLogger(__name__)


class Rounds:
    """Drive a strategy whose clients all report before the next round begins.

    Parameters
    ----------
    strategy : RoundStrategy
    settings : Settings
    shared : SharedData
        The classes, the public set and, if there is one, the unseen set.
    run : str
        Unique name of the run.
    journal : RunDirectory or None
        Stores history and checkpoints; None: keep nothing.

    Attributes
    ----------
    unseen_predictions : dict[str, float32 [u, C]]
        Log-probabilities of the unseen set by client, from the closing reports.
    joint : float32 [u, C] or None
        The ensemble's, where the clients' own are hidden (privacy.secagg).
    """

    def __init__(
        self,
        strategy: RoundStrategy,
        settings: Settings,
        shared: SharedData,
        run: str,
        journal: RunDirectory | None = None,
    ) -> None:
        self.strategy = strategy
        self.settings = settings
        self.shared = shared
        self.run = run
        self.journal = journal
        self.roster = Roster(
            settings.exchange.min_clients, settings.participation, settings.seed, Names(settings.clients)
        )
        self.unseen_predictions: dict[str, FloatArray] = {}
        self.joint: FloatArray | None = None
        self._rounds_done = 0
        self._progress = Progress(None if journal is None else journal.path, settings.rounds)
        self._validation: list[float] = []  # accuracies of the last round, for the log
        self._patience = Patience(settings.exchange.round_timeout)
        self._clock = VirtualRounds.of(settings.emulation)
        self._recorder = recorder_of(settings, journal)
        self._secure: SecureSum | SumOnce | None = None  # privacy.secagg
        if settings.privacy.secagg:
            summed = settings.strategy.summed(settings)
            self._secure = (
                SumOnce(strategy.numbers, settings, shared)
                if summed is None
                else SecureSum(summed, settings, shared)
            )

    def start(self, grid: Grid) -> None:
        """Run all rounds and the closing one; a restored run continues after its last round.

        Raises
        ------
        ExchangeError
            Too few clients connect or answer.
        """
        exchange = Exchange(grid, self.settings.exchange)
        exchange.wait_for_clients(self.settings.num_clients)
        connected = len(self._participants(self.roster.nodes(grid)))
        self._patience = exchange.patience
        self.roster.expect(max(connected, self.roster.expected))  # a resumed run keeps its quorum
        self._log_start()
        if self._secure is not None:
            self.roster.identify(exchange)
            self._secure.introduce(exchange, self.roster, self.run)
        rounds = self.settings.rounds
        exchange.name_of = self.roster.name
        for current in range(self._rounds_done + 1, rounds + 1):
            self.roster.identify(exchange)
            self._show(exchange, current, closing=False)
            orders = self._orders(current, grid, closing=False)
            self._gather(current, exchange.send_and_collect(orders), closing=False)
            self._save(current)
        self.roster.identify(exchange)
        self._show(exchange, rounds + 1, closing=True)
        orders = self._orders(rounds + 1, grid, closing=True)
        self._gather(
            rounds + 1,
            exchange.send_and_collect(orders, True, self.settings.strategy.closing_rounds),
            closing=True,
        )

    def global_weights(self) -> Arrays | None:
        """The global model's weights at the end of a run; None if the strategy has none."""
        return self.strategy.global_weights()

    # -----------------------------------------------------------------------------------------------
    # Resume

    def checkpoint(self) -> tuple[dict[str, Any], Arrays]:
        """Return the state with which :meth:`restore` continues after the last completed round."""
        meta, arrays = self.strategy.state()
        head = {"run": self.run, "round": self._rounds_done, "roster": self.roster.as_dict()}
        if self._clock is not None:
            head["clock"] = self._clock.as_dict()
        if self._secure is not None:
            head["secagg"] = self._secure.as_dict()
        return head | meta, arrays

    def restore(self, meta: Mapping[str, Any], arrays: Arrays) -> None:
        """Continue a run from the result of :meth:`checkpoint`."""
        self.run, self._rounds_done = meta["run"], meta["round"]
        self.roster.restore(meta["roster"])
        if self._clock is not None:
            self._clock.restore(meta["clock"])
        if self._secure is not None:
            self._secure.restore(meta["secagg"])
        self.strategy.restore_state(meta, arrays)

    # -----------------------------------------------------------------------------------------------

    def _show(self, exchange: Exchange, current: int, closing: bool) -> None:
        """Say in the log and in ``progress.json`` what the round waits for."""

        def watch(open: list[int], answered: int) -> None:
            names = {node: self.roster.name(node) for node in open}
            self._progress.note(current, names, answered, closing)

        name = "closing round" if closing else f"round {current}"
        exchange.label, exchange.watch = partial(headline, name), watch

    def _orders(self, current: int, grid: Grid, *, closing: bool) -> list[Message]:
        strategy = self.strategy
        strategy.prepare(current)
        base = Order(
            run=self.run,
            round=current,
            closing=closing,
            public_digest=self.shared.public.digest,
            classes=self.shared.classes,
            num_classes=len(self.shared.classes),
            indices=NO_SAMPLES if closing else strategy.indices(current),
            wire_dtype=strategy.wire_dtype,
            floor=strategy.floor,
            evaluate_unseen=not closing and self.settings.evaluation.unseen_in(current),
        )
        nodes = self._participants(self.roster.nodes(grid))
        if not closing:
            nodes = self.roster.taking_part(current, nodes)
        named = {node: self._order(self.roster.name(node), base) for node in nodes}
        orders = {node: order_record(with_frozen(order, self.settings)) for node, order in named.items()}
        rounds = self.settings.strategy.closing_rounds if closing else 1
        return messages_to(orders, MESSAGE_TYPE, rounds * self._patience.seconds)

    def _order(self, client: str | None, base: Order) -> Order:
        order = self.strategy.order(client, base)
        return order if self._secure is None else self._secure.ordered(client, order)

    def _participants(self, nodes: list[int]) -> list[int]:
        return self.strategy.participants({node: self.roster.name(node) for node in nodes})

    def _gather(self, current: int, replies: list[Reply], *, closing: bool) -> None:
        """Accept valid reports, reject invalid ones, and record both."""
        unseen, strategy = self.shared.unseen, self.strategy
        samples = 0 if closing else len(strategy.indices(current))
        masked = None if self._secure is None else self._secure.masked_bytes(samples, closing=closing)
        expected = Expected(
            round=current,
            public_digest=self.shared.public.digest,
            num_samples=samples,
            num_classes=len(self.shared.classes),
            wire_dtype=strategy.wire_dtype,
            half=strategy.keeps_half,
            floor=strategy.floor,
            closing=closing,
            own_metrics=strategy.own_metrics,
            num_unseen=len(unseen) if closing and unseen is not None else None,
            masked_bytes=masked,
        )
        reports = self.roster.receive(replies, lambda c: strategy.read(c, expected), current, closing)
        figures: Line = {}
        try:
            self.roster.require_quorum(current)
            if closing:
                self.unseen_predictions = {
                    n: r.unseen_predictions for n, r in reports.items() if r.unseen_predictions is not None
                }
                if self._secure is not None:
                    self.joint = self._secure.ensemble(reports, strategy.floor)
                if self._recorder is not None:
                    hidden = {} if self.joint is None else {SUM: self.joint}
                    self._recorder.close(self.unseen_predictions or hidden)
            else:
                found = (report.metrics.get("validation-accuracy") for report in reports.values())
                self._validation = [float(value) for value in found if isinstance(value, int | float)]
                figures = self._take(current, reports)
                self._rounds_done = current
                if self._clock is not None:
                    self._clock.pass_round(reports)
        finally:
            if self.journal is not None:
                lines = self.roster.lines()
                if self._clock is not None:
                    lines = [line | {"clock": self._clock.now} for line in lines]
                self.journal.append([line if "rejected" in line else line | figures for line in lines])

    def _take(self, current: int, reports: Mapping[str, Report]) -> Line:
        """Let the strategy use the reports, or the one that stands for their sum."""
        known = reports if self._secure is None else self._secure.add_up(current, reports)
        figures = self.strategy.take(current, known) if known or self._secure is None else {}
        if self._recorder is not None:
            record_reports(self._recorder, current, self.strategy.indices(current), known)
        return figures

    def _save(self, current: int) -> None:
        if self.journal is not None:
            meta, arrays = self.checkpoint()
            self.journal.save_checkpoint(meta, dict(arrays))
        known = self._validation
        validation = f"; validation {sum(known) / len(known):.3f}, worst {min(known):.3f}" if known else ""
        logger.info("round %d: %d clients reported%s", current, self.roster.good, validation)

    def _log_start(self) -> None:
        public, shown = self.settings.public, self.shared.public
        views = f" and {shown.views} views of them in the last round" if shown.views else ""
        logger.info(
            "%s: %d clients, %d rounds; public set: %d images%s, %s, %s, digest %s",
            self.settings.strategy.name, self.roster.expected, self.settings.rounds,
            len(shown), views, public.schedule, "labelled" if public.labelled else "unlabelled",
            shown.digest,
        )  # fmt: skip
        self.strategy.summary()


def headline(round: str, good: Sequence[Reply]) -> str:
    """Return what is known of a round that is not over: its name, and the mean validation accuracy so far."""
    found = [claimed_accuracy(reply.content) for reply in good if reply.content is not None]
    known = [value for value in found if value is not None]
    validation = f"validation {sum(known) / len(known):.3f}; " if known else ""
    return f"{round}: {validation}"
