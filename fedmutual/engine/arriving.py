"""A run without rounds: client names, each client's update count, history, checkpoint, closing.

The engine drives a :class:`fedmutual.strategies.arrivals.ArrivalStrategy`; the loop is in
:mod:`fedmutual.engine.asynchronous`. The ``round`` of an order is the client's own update count, by which
it recognises a repeated order; the ``round`` of a history line is the number of the arrival.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, RecordDict
from flwr.serverapp import Grid

from fedmutual.data.site import SharedData
from fedmutual.engine.asynchronous import AsynchronousLoop
from fedmutual.engine.frozen import with_frozen
from fedmutual.engine.history import History, Line
from fedmutual.engine.names import Names, connected
from fedmutual.engine.participants import Participant, Participants
from fedmutual.engine.recording import record_reports, recorder_of
from fedmutual.engine.roster import IDENTIFY, IDENTIFY_SECONDS
from fedmutual.engine.timing import Dispatch, Timing, VirtualTiming, WallTiming
from fedmutual.results.directory import RunDirectory
from fedmutual.results.progress import Progress
from fedmutual.results.summary import natural_key
from fedmutual.settings import Settings
from fedmutual.strategies.arrivals import Arrays, ArrivalStrategy
from fedmutual.wire.codec import FloatArray, MessageError
from fedmutual.wire.exchange import Exchange, ExchangeError, Reply, messages_to, quorum
from fedmutual.wire.orders import Order, order_record
from fedmutual.wire.patience import Patience
from fedmutual.wire.records import MESSAGE_TYPE
from fedmutual.wire.reports import Expected, Report, attempt, read_report

logger = logging.getLogger(__name__)


class Arriving:
    """Drive a strategy whose clients report whenever they are ready.

    Parameters
    ----------
    strategy : ArrivalStrategy
    settings : Settings
    shared : SharedData
    run : str
        Unique name of the run.
    journal : RunDirectory or None
        Stores history and checkpoints.
    updates : int or None
        The run ends after this many reports; None: rounds times clients.
    seconds : float or None
        The run ends after this many seconds of its clock; None: no limit.
    """

    def __init__(
        self,
        strategy: ArrivalStrategy,
        settings: Settings,
        shared: SharedData,
        run: str,
        journal: RunDirectory | None = None,
        *,
        updates: int | None = None,
        seconds: float | None = None,
    ) -> None:
        self.strategy = strategy
        self.settings = settings
        self.shared = shared
        self.run = run
        self.journal = journal
        self.unseen_predictions: dict[str, FloatArray] = {}
        self.joint: FloatArray | None = None  # only of a sum of rounds
        self.arrivals = 0
        self.delivered = 0
        self.participants = Participants(settings.emulation.speeds, Names(settings.clients))
        self._updates = updates
        self._seconds = seconds
        self._expected = 0
        self._now = 0.0
        self._history = History()
        self._again: set[str] = set()  # in flight when the server died
        self._grid: Grid | None = None
        self._patience = Patience(settings.exchange.round_timeout)
        self._recorder = recorder_of(settings, journal)
        self._progress = Progress(None if journal is None else journal.path, settings.rounds)

    def global_weights(self) -> Arrays | None:
        """The global model's weights at the end of a run; None if the strategy has none."""
        return self.strategy.global_weights()

    # -----------------------------------------------------------------------------------------------
    # The run

    def start(self, grid: Grid) -> None:
        """Run until the number of updates or the time limit is reached, then evaluate.

        Raises
        ------
        ExchangeError
            Too few clients take part.
        """
        exchange = Exchange(grid, self.settings.exchange)
        nodes = exchange.wait_for_clients(self.settings.num_clients)
        self._expected = max(len(nodes), self._expected)
        self._grid = grid
        self.participants.expect(nodes)
        timing = self._timing(grid)
        logger.info(
            "%s: %d clients, %s clock, until %d reports",
            self.settings.strategy.name, self._expected, timing.name, self._budget,
        )  # fmt: skip
        loop = AsynchronousLoop(grid, self.settings.exchange, self, timing, self._expected)
        exchange.patience = self._patience = loop.patience
        loop.run()
        self._close(exchange)

    def dispatch(self, node: int, now: float) -> Dispatch | None:
        """Ask an unknown node for its name; give a known node its order, repeated until it is answered."""
        client = self.participants.at(node)
        if client is None and self.participants.named(node):
            return None
        if client is None:
            (question,) = messages_to(
                {node: RecordDict({"identify": ConfigRecord()})}, IDENTIFY, IDENTIFY_SECONDS
            )
            return Dispatch(question, ((), node), speed=0.0)
        again = client.name in self._again
        if not self.participants.complete or (self._enough(now) and not again):
            return None
        if not client.under_way:
            self.strategy.prepare(client.name, client.update, self._delivered)
            client.under_way, client.sent = True, now
        self._again.discard(client.name)
        content = order_record(self._order(client))
        (message,) = messages_to({node: content}, MESSAGE_TYPE, self._patience.first)
        label = natural_key(client.name)
        return Dispatch(message, (label, node), client.speed, client.sent if again else None)

    def arrived(self, reply: Reply, now: float) -> bool:
        """Accept or reject a report; write history line and checkpoint before anything is sent."""
        client = self.participants.at(reply.node_id)
        if client is None:
            assert self._grid is not None
            return self.participants.identified(reply, connected(self._grid))
        late = self._enough(now)
        self.arrivals, self._now = self.arrivals + 1, now
        report, reason, extra = self._checked(client, reply, late)
        line = self._history.line(reply, client.name, report, reason, self.arrivals, closing=False)
        line |= {"update": client.update, "clock": now} | extra
        if report is None:
            logger.warning("arrival %d: %s rejected: %s", self.arrivals, client.name, reason)
        if reply.content is not None:  # even if rejected: a resend would be identical
            client.under_way, client.update = False, client.update + 1
        self._save([line])
        return report is not None

    def over(self, now: float) -> bool:
        """Return whether the report or time limit is reached and no order must be resent."""
        waiting = self._again & self.participants.reachable()
        return self._enough(now) and self.participants.complete and not waiting

    # -----------------------------------------------------------------------------------------------
    # Resume

    def checkpoint(self) -> tuple[dict[str, Any], Arrays]:
        """Return the state for :meth:`restore`, orders in flight included."""
        meta, arrays = self.strategy.state()
        return {
            "run": self.run,
            "round": self.arrivals,
            "delivered": self.delivered,
            "clock": self._now,
            "expected": self._expected,
            "last": self._history.last,
            "participants": self.participants.as_dict(),
            "strategy": meta,
        }, arrays

    def restore(self, meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Continue a run from the result of :meth:`checkpoint`."""
        self.run, self.arrivals, self.delivered = meta["run"], meta["round"], meta["delivered"]
        self._now, self._expected = meta["clock"], meta["expected"]
        self._history = History(meta["last"])
        self.participants.restore(meta["participants"])
        self._again = {client.name for client in self.participants.by_name.values() if client.under_way}
        self.strategy.restore_state(meta["strategy"], arrays)

    # -----------------------------------------------------------------------------------------------

    @property
    def _under_way(self) -> dict[int, str | None]:
        """Node -> client of the open orders."""
        present = self.participants.reachable_nodes()
        return {node: client.name for node, client in present.items() if client.under_way}

    @property
    def _budget(self) -> int:
        return self._updates or self.settings.rounds * self._expected

    def _enough(self, now: float) -> bool:
        limit = self._seconds
        return self.delivered >= self._budget or (limit is not None and now >= limit)

    def _timing(self, grid: Grid) -> Timing:
        emulation = self.settings.emulation
        alone = emulation.clock == "auto" and getattr(grid, "takes_turns", False)
        if alone or emulation.clock == "virtual":
            return VirtualTiming(emulation.nominal_seconds, self._now)
        return WallTiming(start=self._now)

    def _checked(self, client: Participant, reply: Reply, late: bool) -> tuple[Report | None, str, Line]:
        if reply.content is None:
            return None, reply.error, {}
        order = self._order(client)
        report, reason = attempt(partial(self._read, client=client, order=order), reply.content)
        if report is None:
            return None, reason, {}
        try:
            if late:  # in flight when the run ended: recorded, but not used
                return report, "", {"late": True}
            extra = self.strategy.take(client.name, report, self._delivered)
        except Exception as error:  # what a report makes of the strategy must not end the run either
            return None, str(error) if isinstance(error, MessageError) else f"malformed: {error!r}", {}
        if self._recorder is not None:
            record_reports(self._recorder, self.arrivals, order.indices, {client.name: report}, client.update)
        client.delivered += 1
        self.delivered += 1
        return report, "", extra

    def _read(self, content: RecordDict, client: Participant, order: Order) -> Report:
        report = read_report(content, self._report_to(order))
        if report.client != client.name:
            raise MessageError(f"client: the report is {report.client}'s, but this node is {client.name}")
        return report

    @property
    def _delivered(self) -> dict[str, int]:
        """Return the number of accepted reports per client."""
        return {name: client.delivered for name, client in self.participants.by_name.items()}

    def _order(self, client: Participant) -> Order:
        return with_frozen(self.strategy.order(client.name, self._base(client)), self.settings)

    def _close(self, exchange: Exchange) -> None:
        """Send the closing order to all clients at once."""
        asked = self.participants.nodes(sorted(exchange.grid.get_node_ids()))
        delivered, closing_order = self._delivered, self.strategy.closing_order
        orders = {
            n: with_frozen(closing_order(c.name, self._base(c), delivered), self.settings)
            for n, c in asked.items()
        }
        # an open order already has this update number: the closing order gets a later one
        numbers = {n: client.update + client.under_way for n, client in asked.items()}
        orders = {node: replace(order, round=numbers[node], closing=True) for node, order in orders.items()}
        contents = {node: order_record(order) for node, order in orders.items()}
        rounds = self.settings.strategy.closing_rounds
        messages = messages_to(contents, MESSAGE_TYPE, rounds * self._patience.seconds)
        replies = exchange.send_and_collect(messages, everyone=True, rounds=rounds)
        self.arrivals += 1
        lines = []
        for reply in sorted(replies, key=lambda reply: natural_key(asked[reply.node_id].name)):
            client, order = asked[reply.node_id], orders[reply.node_id]
            report, reason = None, reply.error
            if reply.content is not None:
                report, reason = attempt(partial(self._read, client=client, order=order), reply.content)
            if report is not None and report.unseen_predictions is not None:
                self.unseen_predictions[client.name] = report.unseen_predictions
            line = self._history.line(reply, client.name, report, reason, self.arrivals, closing=True)
            lines.append(line | {"update": order.round, "clock": self._now})
        if self.journal is not None:
            self.journal.append(lines)
        if self._recorder is not None:
            self._recorder.close(self.unseen_predictions)
        good = sum("rejected" not in line for line in lines)
        needed = quorum(self.settings.exchange.min_clients, self._expected)
        if good < needed:
            reasons = [f"{line['client']}: {line['rejected']}" for line in lines if "rejected" in line]
            raise ExchangeError(
                f"closing: {good} good reports, {needed} are needed (exchange.min_clients). "
                + " | ".join(reasons)
            )

    def _save(self, lines: list[Line]) -> None:
        if self.journal is not None:
            self.journal.append(lines)
            self.journal.save_checkpoint(*self.checkpoint())
            self._progress.note(self.arrivals, self._under_way, self.delivered)

    def _base(self, client: Participant) -> Order:
        """Return a basic order, to which the strategy adds its work."""
        return Order(
            run=self.run,
            round=client.update,
            closing=False,
            public_digest=self.shared.public.digest,
            classes=self.shared.classes,
            num_classes=len(self.shared.classes),
            wire_dtype=self.strategy.wire_dtype,
            floor=self.strategy.floor,
            evaluate_unseen=self.settings.evaluation.unseen_in(client.update),
        )

    def _report_to(self, order: Order) -> Expected:
        """Return the expected form of the report to an order."""
        unseen = self.shared.unseen
        return Expected(
            round=order.round,
            public_digest=self.shared.public.digest,
            num_samples=len(order.indices),
            num_classes=order.num_classes,
            wire_dtype=order.wire_dtype,
            half=self.strategy.keeps_half,
            floor=order.floor,
            closing=order.closing,
            own_metrics=self.strategy.own_metrics,
            num_unseen=len(unseen) if order.closing and unseen is not None else None,
        )
