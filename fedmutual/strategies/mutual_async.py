"""Distributed mutual learning without rounds: each client trains on its peers' latest predictions.

Nobody waits for the slowest. Stale peers are acceptable teachers (codistillation, arXiv:1804.03235); how
stale, ``staleness_limit`` says. All predictions must be of the same samples, so the public set is static.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fedmutual.learning.competence import validated
from fedmutual.learning.consensus import Gathered, Target
from fedmutual.strategies.arrivals import Arrays, ArrivalStrategy, Delivered, Figures
from fedmutual.strategies.base import below
from fedmutual.strategies.consensus import Rule, rule_of
from fedmutual.strategies.mutual import MutualLoss
from fedmutual.wire.orders import Order
from fedmutual.wire.records import FLOOR, NO_SAMPLES, IndexArray
from fedmutual.wire.reports import Report


class MutualAsync(ArrivalStrategy):
    """Keep every client's newest predictions; a target is formed when its client is ready.

    Parameters
    ----------
    num_samples, num_classes : int
    staleness_limit : int or None
        A peer's predictions teach a client for so many of that client's own reports; None: forever.
    consensus, divergence, temperature, kl_weight, burn_in, labelled
        See :class:`fedmutual.strategies.mutual.MutualLearning`; rounds are a client's own updates.
    wire_dtype, probability_floor
        See :class:`fedmutual.strategies.predictions.PredictionStrategy`.
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
        staleness_limit: int | None = None,
        labelled: bool = False,
        wire_dtype: str = "float16",
        probability_floor: float = FLOOR,
    ) -> None:
        self.loss = MutualLoss(divergence, temperature, kl_weight, burn_in)
        self.loss.check(num_classes)
        self.rule = rule_of(consensus, divergence)
        self.staleness_limit = staleness_limit
        self.labelled = labelled
        self.wire_dtype = wire_dtype
        self.floor = probability_floor
        self._indices: IndexArray = np.arange(num_samples, dtype=np.int32)
        self.keeps_half = self.wire_dtype == "float16"
        self._predictions: dict[str, npt.NDArray[np.floating]] = {}
        self._validated: dict[str, float | None] = {}
        self._suspicion: dict[str, float] = {}
        # by peer: everyone's delivered reports when it last reported
        self._heard: dict[str, dict[str, int]] = {}
        self._targets: dict[str, Target | None] = {}  # of the present orders
        self._ages: dict[str, dict[str, int]] = {}  # of the predictions that those were made from

    def indices(self) -> IndexArray:
        """All public samples."""
        return self._indices

    def prepare(self, client: str, update: int, delivered: Delivered) -> None:
        """Form the target now, from the newest predictions of every peer that is not too stale."""
        self._targets[client] = self._target(client, update, delivered)
        taught = self._targets[client] is not None
        self._ages[client] = self._teachers(client, delivered) if taught else {}

    def order(self, client: str, base: Order) -> Order:
        """The public samples, and the target on them."""
        return self._order(base, self._targets[client], self._indices)

    def closing_order(self, client: str, base: Order, delivered: Delivered) -> Order:
        """A last target, from the newest predictions."""
        target = self._target(client, base.round, delivered)
        return replace(self._order(base, target, NO_SAMPLES), evaluate_unseen=False)

    def take(self, client: str, report: Report, delivered: Delivered) -> Figures:
        """Replace the client's predictions."""
        self._predictions[client] = report.predictions
        self._validated[client] = validated(report.metrics)
        self._suspicion = self.rule.remember(self._suspicion, self._predictions)
        self._heard[client] = {**delivered, client: delivered[client] + 1}
        return {"peer_staleness": self._ages[client]}

    def state(self) -> tuple[dict[str, Any], Arrays]:
        """Predictions, when they came, and the targets of the orders under way."""
        arrays: Arrays = {f"predictions.{name}": values for name, values in self._predictions.items()}
        arrays["predicted"] = self._indices  # what they are of, for the report
        for name, target in self._targets.items():
            if target is not None:
                arrays[f"target.{name}"] = target.log_probabilities
                if target.entropies is not None:
                    arrays[f"entropies.{name}"] = target.entropies
        meta = {
            "heard": self._heard,
            "validated": self._validated,
            "ages": self._ages,
            "suspicion": self._suspicion,
        }
        return meta, arrays

    def restore_state(self, meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Continue from what :meth:`state` returned."""
        self._heard, self._validated = dict(meta["heard"]), dict(meta["validated"])
        self._predictions = below("predictions.", arrays)
        self._ages, self._suspicion = dict(meta["ages"]), dict(meta["suspicion"])
        for name in self._ages:
            values = arrays.get(f"target.{name}")
            self._targets[name] = None if values is None else Target(values, arrays.get(f"entropies.{name}"))

    def _target(self, client: str, update: int, delivered: Delivered) -> Target | None:
        if self.loss.weight(update - 1) == 0:
            return None
        heard = [name for name in (*self._teachers(client, delivered), client) if name in self._predictions]
        fresh = {name: self._predictions[name] for name in heard}
        loss = self.loss
        gathered = Gathered(fresh, loss.divergence, loss.temperature, self._validated, self._suspicion)
        return self.rule.form(gathered).target(client)

    def _teachers(self, client: str, delivered: Delivered) -> dict[str, int]:
        """Age of each peer's predictions, in the client's own delivered reports; stale peers are left out."""
        limit = self.staleness_limit
        ages = {
            peer: delivered[client] - heard.get(client, 0)
            for peer, heard in self._heard.items()
            if peer != client
        }
        return {peer: age for peer, age in ages.items() if limit is None or age <= limit}

    def _order(self, base: Order, target: Target | None, predict: IndexArray) -> Order:
        # known labels of the public samples are trained on also where there are no peers
        taught = target is not None or (self.labelled and base.round > 1)
        return replace(
            self.loss.described(base),
            indices=predict,
            target_indices=self._indices if taught else NO_SAMPLES,
            log_targets=target.log_probabilities if target else None,
            target_entropies=target.entropies if target else None,
            kl_weight=self.loss.weight(base.round - 1),
        )
