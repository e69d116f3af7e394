"""Distributed mutual learning as a Flower strategy (arXiv:2503.05803).

Every client predicts the same public samples; the server returns to each the mean of its peers'
predictions; no weight travels. The rounds are pipelined: the order that opens round r + 1 brings the
targets of round r, so that a client and round cost one message, and a closing one at the end.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from flwr.app import Array, ArrayRecord, RecordDict

from fedmutual.data.site import SharedData
from fedmutual.engine.history import Line, balanced_accuracy
from fedmutual.engine.roster import StrategyError
from fedmutual.engine.rounds import NO_SAMPLES, Arrays, Rounds, below
from fedmutual.learning.consensus import Consensus, Gathered
from fedmutual.results.directory import RunDirectory
from fedmutual.settings import Settings, StrategySettings, setting
from fedmutual.strategies.averaging import average
from fedmutual.wire.codec import WIRE_DTYPES, FloatArray
from fedmutual.wire.messages import IndexArray, Order, Report, report_record

if TYPE_CHECKING:
    from torch import Tensor

    from fedmutual.client.learner import Answer, Learner

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
    staleness_limit: int | None = setting(
        "a peer that did not report goes on teaching with its newest predictions for so many rounds "
        "(public=static public.views=plain; else they are of other images); null: for ever",
        minimum=0,
    )
    average_weights: bool = setting("ablation: also send and average all weights every round")

    takes_consensus: ClassVar[bool] = True
    takes_views: ClassVar[bool] = True

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


class MutualLearning(Rounds):
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
        Where history and checkpoints go; None keeps nothing.
    """

    def __init__(
        self, settings: Settings, shared: SharedData, run: str, journal: RunDirectory | None = None
    ) -> None:
        super().__init__(settings, shared, run, journal)
        self.options: MutualSettings = settings.strategy
        self.wire_dtype = self.options.wire_dtype
        self.floor = self.options.probability_floor
        self._predictions: dict[str, FloatArray] = {}
        self._predicted: IndexArray = NO_SAMPLES
        self._validated: dict[str, float | None] = {}  # balanced accuracies, of those that predicted
        self._model: ArrayRecord | None = None
        self._spoken: dict[str, int] = {}  # round of each client's predictions
        self._held_against: dict[str, float] = {}
        self._consensus: Consensus | None = None
        if self.options.divergence == "published_code" and len(shared.classes) != 2:
            raise StrategyError("strategy.divergence=published_code is defined for two classes only")

    def prepare(self, round: int) -> None:
        """Form the sum over all clients once."""
        options = self.options
        gathered = Gathered(
            self._predictions, options.divergence, options.temperature, self._validated, self._held_against
        )
        self._consensus = self.settings.consensus.form(gathered)

    def order(self, client: str | None, base: Order) -> Order:
        """This round's public samples, and the client's target of the round before."""
        weight = self.options.weight(base.round - 1)
        target = self._consensus.target(client) if self._consensus and weight > 0 else None
        # known labels of the public samples are trained on also where there is nothing to hear from peers
        taught = target is not None or self.settings.public.labelled
        return replace(
            base,
            target_indices=self._predicted if taught else NO_SAMPLES,
            targets=target.log_probabilities if target else None,
            target_entropies=target.entropies if target else None,
            kl_weight=weight,
            model=self._model,
        )

    def take(self, round: int, reports: Mapping[str, Report]) -> Line:
        """Keep the predictions of the round, and those of peers that did not report while they hold."""
        indices = self.indices(round)
        limit = self.options.staleness_limit
        same = np.array_equal(indices, self._predicted) and self.settings.public.views == "plain"
        kept = [
            n for n, spoken in self._spoken.items() if same and (limit is None or round - spoken <= limit)
        ]
        new = {name: report.predictions for name, report in reports.items()}
        self._predicted = indices
        self._predictions = {name: self._predictions[name] for name in kept} | new
        self._spoken = {name: self._spoken[name] for name in kept} | dict.fromkeys(new, round)
        measured = {name: balanced_accuracy(report.metrics) for name, report in reports.items()}
        self._validated = {name: self._validated[name] for name in kept} | measured
        self._held_against = self.settings.consensus.remember(self._held_against, self._predictions)
        self._model = average(reports) if self.options.average_weights else None
        return {}

    def state(self) -> tuple[dict[str, Any], Arrays]:
        """The newest predictions, and what they are of."""
        arrays: dict[str, np.ndarray[Any, Any]] = {
            f"predictions.{k}": v for k, v in self._predictions.items()
        }
        arrays["predicted"] = self._predicted
        if self._model is not None:
            arrays |= {f"model.{k}": v.numpy() for k, v in self._model.items()}
        meta = {"validated": self._validated, "spoken": self._spoken, "held_against": self._held_against}
        return meta, arrays

    def restore_state(self, meta: Mapping[str, Any], arrays: Arrays) -> None:
        """Take up what :meth:`state` gave."""
        self._validated, self._spoken = dict(meta["validated"]), dict(meta["spoken"])
        self._held_against = dict(meta["held_against"])
        self._predicted = arrays["predicted"]
        self._predictions = below("predictions.", arrays)
        model = {name: Array(values) for name, values in below("model.", arrays).items()}
        self._model = ArrayRecord(model) if model else None

    def summary(self) -> None:
        """Log what will be done."""
        options = self.options
        super().summary()
        logger.info(
            "%s phase, divergence %s, T=%g, lambda=%g",
            options.phase,
            options.divergence,
            options.temperature,
            options.kl_weight,
        )
