"""Distributed mutual learning as a Flower strategy (arXiv:2503.05803).

Every client predicts the same public samples; the server returns to each the mean of its peers'
predictions; no weight travels. The order of round r + 1 brings the targets of round r, so that a client and
round cost one message.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fedmutual.learning import DIVERGENCES
from fedmutual.learning.competence import validated
from fedmutual.learning.consensus import Consensus, Gathered, log_softmax
from fedmutual.strategies.base import Arrays, Figures, at_least, below, one_of
from fedmutual.strategies.consensus import Rule, rule_of
from fedmutual.strategies.predictions import PredictionStrategy
from fedmutual.wire.codec import FloatArray
from fedmutual.wire.orders import Order
from fedmutual.wire.records import NO_SAMPLES, IndexArray
from fedmutual.wire.reports import Report


class MutualLearning(PredictionStrategy):
    """Gather predictions, return leave-one-out targets.

    Parameters
    ----------
    num_samples, num_classes : int
        N public samples, C classes.
    consensus : Rule or str
        How the peers' predictions become one target: an object of :mod:`fedmutual.strategies.consensus`, or
        its name: ``mean``, ``confidence``, ``validation``, ``median``, ``trimmed_mean``, ``reputation``.
    divergence : str
        ``peer_own``: KL(peer || own) (arXiv:1706.00384); ``own_peer``: KL(own || peer), the paper's;
        ``published_code``: what the paper's code computes, two classes only.
    temperature : float
        Softens every distribution in the mutual loss.
    kl_weight : float
        Lambda, the weight of the mean KL; 0: no mutual learning.
    burn_in : int
        First rounds without the mutual loss.
    staleness_limit : int or None
        A peer that did not report keeps teaching with its newest predictions for so many rounds
        (``schedule="static"`` only, else they are of other samples); None: forever.
    labelled : bool
        Clients know the public labels, so that an order names its samples also without a target.
    same_views : bool
        The public samples look the same in every round, so that old predictions still hold.
    **options
        ``schedule``, ``per_round``, ``wire_dtype``, ``probability_floor``, see
        :class:`fedmutual.strategies.predictions.PredictionStrategy`, and Flower's, see
        :class:`fedmutual.strategies.base.RoundStrategy`.

    Raises
    ------
    ValueError
        Naming the argument that is wrong.
    """

    def __init__(
        self,
        num_samples: int,
        num_classes: int,
        *,
        consensus: Rule | str = "mean",
        divergence: str = "peer_own",
        temperature: float = 1.0,
        kl_weight: float = 1.0,
        burn_in: int = 0,
        staleness_limit: int | None = 16,
        labelled: bool = False,
        same_views: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(num_samples, num_classes, **options)
        self.loss = MutualLoss(divergence, temperature, kl_weight, burn_in)
        self.loss.check(num_classes)
        if staleness_limit is not None:
            at_least("staleness_limit", staleness_limit, 0)
        self.rule = rule_of(consensus, divergence)
        self.staleness_limit = staleness_limit
        self.labelled = labelled
        self.same_views = same_views
        self.keeps_half = self.wire_dtype == "float16"
        self._predictions: dict[str, npt.NDArray[np.floating]] = {}
        self._predicted: IndexArray = NO_SAMPLES
        self._validated: dict[str, float | None] = {}  # balanced accuracies, of those that predicted
        self._spoken: dict[str, int] = {}  # round of each client's predictions
        self._suspicion: dict[str, float] = {}
        self._consensus: Consensus | None = None

    def prepare(self, round: int) -> None:
        """Form the sum over all clients once."""
        self._consensus = self.rule.form(
            Gathered(
                self._predictions,
                self.loss.divergence,
                self.loss.temperature,
                self._validated,
                self._suspicion,
            )
        )

    def order(self, client: str | None, base: Order) -> Order:
        """This round's public samples, and the client's target of the round before."""
        weight = self.loss.weight(base.round - 1)
        target = self._consensus.target(client) if self._consensus and weight > 0 else None
        # known labels of the public samples are trained on also where there are no peers
        taught = target is not None or self.labelled
        return replace(
            self.loss.described(base),
            target_indices=self._predicted if taught else NO_SAMPLES,
            log_targets=target.log_probabilities if target else None,
            target_entropies=target.entropies if target else None,
            kl_weight=weight,
        )

    def take(self, round: int, reports: Mapping[str, Report]) -> Figures:
        """Keep the round's predictions, and those of absent peers that are not yet stale."""
        indices, before, limit = self.indices(round), self._predicted, self.staleness_limit
        new = {name: report.predictions for name, report in reports.items()}
        same = self.same_views and np.array_equal(indices[: len(before)], before)
        kept = [
            n for n, spoken in self._spoken.items() if same and (limit is None or round - spoken <= limit)
        ]
        if len(before) < len(indices) and not set(kept) <= set(new):
            # views were added, and somebody who missed them speaks of the others only
            indices, new = before, {name: log_p[: len(before)] for name, log_p in new.items()}
        self._predicted = indices
        self._predictions = {name: self._predictions[name] for name in kept} | new
        self._spoken = {name: self._spoken[name] for name in kept} | dict.fromkeys(new, round)
        measured = {name: validated(report.metrics) for name, report in reports.items()}
        self._validated = {name: self._validated[name] for name in kept} | measured
        self._suspicion = self.rule.remember(self._suspicion, self._predictions)
        return {}

    def consensus_of_all(self) -> FloatArray | None:
        """The consensus of all clients on the last round's samples."""
        self.prepare(0)
        target = self._consensus.target(None) if self._consensus and self._predictions else None
        return None if target is None else log_softmax(target.log_probabilities)

    @property
    def predicted(self) -> IndexArray:
        """Public samples that the last round's predictions are of."""
        return self._predicted

    def state(self) -> tuple[dict[str, Any], Arrays]:
        """The newest predictions, and what they are of."""
        arrays: dict[str, np.ndarray[Any, Any]] = {
            f"predictions.{k}": v for k, v in self._predictions.items()
        }
        arrays["predicted"] = self._predicted
        return {
            "validated": self._validated,
            "spoken": self._spoken,
            "suspicion": self._suspicion,
        }, arrays

    def restore_state(self, meta: Mapping[str, Any], arrays: Arrays) -> None:
        """Continue from what :meth:`state` returned."""
        self._validated, self._spoken = dict(meta["validated"]), dict(meta["spoken"])
        self._suspicion = dict(meta["suspicion"])
        self._predicted = arrays["predicted"]
        self._predictions = below("predictions.", arrays)

    def describe(self) -> str:
        """The strategy and its settings in one line."""
        return (
            f"MutualLearning: divergence {self.loss.divergence}, T={self.loss.temperature:g}, "
            f"lambda={self.loss.kl_weight:g}, consensus {type(self.rule).__name__}"
        )


@dataclass(frozen=True)
class MutualLoss:
    """Which mutual loss the clients add, and how strongly in which round.

    Parameters
    ----------
    divergence, temperature, kl_weight, burn_in
        See :class:`MutualLearning`.
    """

    divergence: str
    temperature: float
    kl_weight: float
    burn_in: int

    def check(self, num_classes: int) -> None:
        """Refuse what is no loss.

        Raises
        ------
        ValueError
            Naming the argument.
        """
        one_of("divergence", self.divergence, DIVERGENCES)
        if not self.temperature > 0:
            raise ValueError(f"temperature: {self.temperature} is not above 0")
        if not self.kl_weight >= 0:
            raise ValueError(f"kl_weight: {self.kl_weight} is below 0")
        at_least("burn_in", self.burn_in, 0)
        if self.divergence == "published_code" and num_classes != 2:
            raise ValueError("divergence: published_code is defined for two classes only")
        if self.divergence == "published_code" and self.temperature != 1:
            raise ValueError("temperature: published_code is defined at 1 only")

    def weight(self, round: int) -> float:
        """Lambda of the targets of a round: 0 during the burn-in."""
        return self.kl_weight if round > self.burn_in else 0.0

    def described(self, order: Order) -> Order:
        """The order with this loss."""
        return replace(order, divergence=self.divergence, temperature=self.temperature)
