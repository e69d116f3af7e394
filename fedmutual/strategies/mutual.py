"""Distributed mutual learning as a Flower strategy (arXiv:2503.05803).

Every client predicts the same public samples; the server returns to each the mean of its peers'
predictions; no weight travels. The rounds are pipelined: the order that opens round r + 1 brings the
targets of round r, so that a client and round cost one message, and a closing one at the end.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedmutual.data.site import SharedData
from fedmutual.distributions import WIRE_DTYPES, FloatArray
from fedmutual.exchange import Exchange, Reply, as_reply, messages_to
from fedmutual.learning.competence import log_odds_weights
from fedmutual.learning.consensus import MeanConsensus
from fedmutual.messages import (
    Expected,
    IndexArray,
    Order,
    Report,
    order_record,
    read_report,
    report_record,
)
from fedmutual.results import RunDirectory
from fedmutual.settings import Settings, StrategySettings, setting
from fedmutual.strategies.averaging import average
from fedmutual.strategies.history import balanced_accuracy
from fedmutual.strategies.interface import MESSAGE_TYPE
from fedmutual.strategies.roster import Roster, StrategyError

if TYPE_CHECKING:
    from torch import Tensor

    from fedmutual.learner import Answer, Learner

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class MutualSettings(StrategySettings):
    """Settings of ``strategy=mutual``."""

    phase: str = setting(
        "mixed: every step takes a private and a public batch; separate: the public samples after the "
        "private ones, as in the paper",
        choices=("mixed", "separate"),
    )
    divergence: str = setting(
        "own_peer: KL(own || peer), the paper; peer_own: KL(peer || own), arXiv:1706.00384; "
        "published_code: what the paper's code computes, no divergence, two classes only",
        choices=("own_peer", "peer_own", "published_code"),
    )
    temperature: float = setting("softens every distribution in the mutual loss", above=0)
    peer_weights: str = setting(
        "equal; validation: a peer counts by its balanced accuracy on its own validation images, one at "
        "chance not at all (for different architectures; no use where clients lack classes)",
        choices=("equal", "validation"),
    )
    kl_weight: float = setting("lambda, the weight of the mean KL; 0: no mutual learning", minimum=0)
    burn_in: int = setting("first rounds whose mutual step is left out", minimum=0)
    ramp: int = setting("rounds over which lambda then grows to kl_weight", minimum=0)
    public_epochs: int = setting(
        "phase=mixed: a round takes at least so many passes over the public samples", minimum=1
    )
    mutual_epochs: int = setting("phase=separate: passes over the public samples", minimum=1)
    probability_floor: float = setting(
        "shared probabilities are raised to this: bounds what one peer can pull", above=0, maximum=0.1
    )
    wire_dtype: str = setting("type in which predictions travel", choices=WIRE_DTYPES)
    average_weights: bool = setting("ablation: also send and average all weights every round")

    def check(self) -> str | None:
        """The published code's divergence has no temperature."""
        if self.divergence == "published_code" and self.temperature != 1:
            return f"temperature: {self.temperature:g}, but divergence=published_code is defined at 1 only"
        return None

    def build(
        self, settings: Settings, shared: SharedData, run: str, journal: RunDirectory | None
    ) -> MutualLearning:
        """Make the strategy of a run."""
        return MutualLearning(settings, shared, run, journal)

    def learn(self, learner: Learner) -> Answer:
        """In the paper's order: mutual step of the round before, local training, predictions."""
        order = learner.order
        mutual = len(order.target_indices) > 0  # with a target, or at least with labels
        public = learner.public(self.divergence, self.temperature) if mutual else None
        if public and self.phase == "separate":
            learner.separate_mutual_step(public, self.mutual_epochs)
        elif public and order.closing:  # no private training follows that a public phase could harm
            learner.separate_mutual_step(public, self.public_epochs)
        if order.closing:
            return learner.close()
        if public and self.phase == "mixed":
            learner.mixed_training(public, self.public_epochs)
        else:
            learner.local_training()
        return learner.report()

    def pack(self, report: Report, weights: Mapping[str, Tensor]) -> RecordDict:
        """Predictions and measurements; weights only for the ablation."""
        if self.average_weights:
            report = replace(report, model=ArrayRecord(dict(weights)))
        return report_record(report, self.wire_dtype, self.probability_floor)

    def weight(self, round: int) -> float:
        """Lambda of the mutual step that belongs to a round: 0 during the burn-in, then a linear ramp."""
        since = round - self.burn_in
        return 0.0 if since <= 0 else self.kl_weight * min(1.0, since / (self.ramp + 1))


class MutualLearning(Strategy):
    """Gather predictions, return leave-one-out targets.

    Parameters
    ----------
    settings : Settings
        With :class:`MutualSettings` as ``settings.strategy``.
    shared : SharedData
        The classes, the public set and, where there is one, the unseen set.
    run : str
        Unique name of the run.
    journal : RunDirectory or None
        Where history and checkpoints go; None keeps them in ``history`` only.
    """

    def __init__(
        self, settings: Settings, shared: SharedData, run: str, journal: RunDirectory | None = None
    ) -> None:
        self.settings = settings
        self.options: MutualSettings = settings.strategy
        self.shared = shared
        self.run = run
        self.journal = journal
        self.roster = Roster(settings.exchange.min_clients)
        self.unseen_predictions: dict[str, FloatArray] = {}
        self._predictions: dict[str, FloatArray] = {}
        self._predicted: IndexArray = np.zeros(0, np.int32)
        self._validated: dict[str, float | None] = {}  # balanced accuracies, of those that predicted
        self._model: ArrayRecord | None = None
        self._rounds_done = 0
        if self.options.divergence == "published_code" and len(shared.classes) != 2:
            raise StrategyError("strategy.divergence=published_code is defined for two classes only")

    # -----------------------------------------------------------------------------------------------
    # The rounds

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
            Flower's, so that strategies can be swapped. Not used: there is no global model, and
            ``settings.exchange`` has the round's time.

        Raises
        ------
        ExchangeError, StrategyError
            If too few clients connect or answer, or two nodes have one name.
        """
        exchange = Exchange(grid, self.settings.exchange)
        rounds = num_rounds or self.settings.rounds
        nobody, nothing = ArrayRecord(), ConfigRecord()
        result = Result()
        connected = len(exchange.wait_for_clients(self.settings.num_clients))
        self.roster.expect(max(connected, self.roster.expected))  # a resumed run keeps its quorum
        self.summary()
        for current in range(self._rounds_done + 1, rounds + 1):
            self.roster.identify(exchange)
            orders = list(self.configure_train(current, nobody, nothing, grid))
            replies = exchange.send_and_collect(orders)
            metrics = self._gather(current, replies, closing=False)
            result.train_metrics_clientapp[current] = metrics
            self._save(current)
        self.roster.identify(exchange)
        orders = list(self.configure_evaluate(rounds + 1, nobody, nothing, grid))
        metrics = self._gather(rounds + 1, exchange.send_and_collect(orders, everyone=True), closing=True)
        result.evaluate_metrics_clientapp[rounds] = metrics
        return result

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One order a connected node: this round's public indices, and its target of the round before."""
        every = self.settings.evaluation.unseen_every
        return self._orders(server_round, grid, evaluate_unseen=every > 0 and server_round % every == 0)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The closing order: the last target, and all measurements."""
        return self._orders(server_round, grid, closing=True)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check and keep the predictions of a round; there are never aggregated arrays."""
        return None, self._gather(server_round, [as_reply(m) for m in replies], closing=False)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Check and keep the closing reports."""
        return self._gather(server_round, [as_reply(m) for m in replies], closing=True)

    def summary(self) -> None:
        """Log what will be done."""
        options, public = self.options, self.settings.public
        logger.info(
            "mutual learning: %d clients, %d rounds, %s phase, divergence %s, T=%g, lambda=%g; "
            "public set: %d images, %s, %s, digest %s",
            self.roster.expected, self.settings.rounds, options.phase, options.divergence,
            options.temperature, options.kl_weight, len(self.shared.public), public.schedule,
            "labelled" if public.labelled else "unlabelled", self.shared.public.digest,
        )  # fmt: skip

    # -----------------------------------------------------------------------------------------------
    # Resume

    def checkpoint(self) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
        """Everything that :meth:`restore` needs to go on after the last round done."""
        arrays: dict[str, np.ndarray[Any, Any]] = {
            f"predictions.{k}": v for k, v in self._predictions.items()
        }
        arrays["predicted"] = self._predicted
        if self._model is not None:
            arrays |= {f"model.{k}": v.numpy() for k, v in self._model.items()}
        return {
            "run": self.run,
            "round": self._rounds_done,
            "roster": self.roster.as_dict(),
            "validated": self._validated,
        }, arrays

    def restore(self, meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Continue a run from what :meth:`checkpoint` gave."""
        from flwr.app import Array

        self.run, self._rounds_done = meta["run"], meta["round"]
        self.roster.restore(meta["roster"])
        self._validated = meta["validated"]
        self._predicted = arrays["predicted"]
        self._predictions = _below("predictions.", arrays)
        model = {name: Array(values) for name, values in _below("model.", arrays).items()}
        self._model = ArrayRecord(model) if model else None

    # -----------------------------------------------------------------------------------------------

    def _orders(
        self, current: int, grid: Grid, *, closing: bool = False, evaluate_unseen: bool = False
    ) -> list[Message]:
        weights = None
        if self.options.peer_weights == "validation":
            weights = log_odds_weights(self._validated, len(self.shared.classes))
        consensus = MeanConsensus(
            self._predictions, self.options.divergence, self.options.temperature, weights
        )
        weight = self.options.weight(current - 1)
        indices = np.zeros(0, np.int32) if closing else self._indices(current)
        # known labels of the public samples are trained on also where there is nothing to hear from peers
        labelled = self.settings.public.labelled
        orders = {}
        for node in self.roster.nodes(grid):
            target = consensus.target(self.roster.name(node)) if weight > 0 else None
            order = Order(
                run=self.run,
                round=current,
                closing=closing,
                public_digest=self.shared.public.digest,
                classes=self.shared.classes,
                public_indices=indices,
                target_indices=self._predicted if target or labelled else np.zeros(0, np.int32),
                targets=target.log_probabilities if target else None,
                target_entropies=target.entropies if target else None,
                kl_weight=weight,
                evaluate_unseen=evaluate_unseen,
                model=self._model,
            )
            orders[node] = order_record(order, self.options.wire_dtype)
        return messages_to(orders, MESSAGE_TYPE, self.settings.exchange.round_timeout)

    def _indices(self, current: int) -> IndexArray:
        settings = self.settings
        return self.shared.public.indices(settings.public, settings.seed, current, settings.rounds)

    def _gather(self, current: int, replies: list[Reply], *, closing: bool) -> MetricRecord:
        """Accept the good reports, reject the bad ones by name, and write both down."""
        unseen = self.shared.unseen
        expected = Expected(
            round=current,
            public_digest=self.shared.public.digest,
            num_samples=0 if closing else len(self._indices(current)),
            num_classes=len(self.shared.classes),
            wire_dtype=self.options.wire_dtype,
            floor=self.options.probability_floor,
            num_unseen=len(unseen) if closing and unseen is not None else None,
        )
        reports = self.roster.receive(replies, lambda c: read_report(c, expected), current, closing)
        if self.journal is not None:
            self.journal.append(self.roster.lines())
        self.roster.require_quorum(current)
        if closing:
            self.unseen_predictions = {
                name: r.unseen_predictions for name, r in reports.items() if r.unseen_predictions is not None
            }
        else:
            self._predicted = self._indices(current)
            self._predictions = {name: report.predictions for name, report in reports.items()}
            self._validated = {name: balanced_accuracy(r.metrics) for name, r in reports.items()}
            self._model = average(reports) if self.options.average_weights else None
            self._rounds_done = current
        return MetricRecord({"clients": len(reports), "rejected": len(replies) - len(reports)})

    def _save(self, current: int) -> None:
        if self.journal is not None:
            self.journal.save_checkpoint(*self.checkpoint())
        logger.info("round %d: %d clients reported", current, len(self._predictions))


def _below(prefix: str, arrays: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    return {name.removeprefix(prefix): a for name, a in arrays.items() if name.startswith(prefix)}
