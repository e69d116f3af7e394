"""Distributed mutual learning without rounds: who is ready learns from the newest predictions of the others.

Nobody waits for the slowest. Stale peers are acceptable teachers (codistillation, arXiv:1804.03235); how
stale, ``staleness_limit`` says. All predictions must be of the same samples, so the public set is static.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from fedmutual.data.site import SharedData
from fedmutual.engine.arriving import Arrays, Arriving, ArrivingSettings
from fedmutual.engine.history import Line, balanced_accuracy
from fedmutual.engine.participants import Participant
from fedmutual.engine.roster import StrategyError
from fedmutual.learning.consensus import Consensus, Gathered, Target
from fedmutual.results.directory import RunDirectory
from fedmutual.settings import Settings, setting
from fedmutual.strategies.mutual import MutualSettings
from fedmutual.wire.codec import FloatArray
from fedmutual.wire.messages import IndexArray, Order, Report


@dataclass(kw_only=True)
class MutualAsyncSettings(MutualSettings, ArrivingSettings):
    """Settings of ``strategy=mutual_async``: those of ``mutual``, and those of a run without rounds."""

    takes_views: ClassVar[bool] = False  # without rounds there is no view that all see at a time

    staleness_limit: int | None = setting(
        "a peer's predictions teach a client for so many of that client's own reports; null: for ever",
        minimum=1,
    )

    def check(self) -> str | None:
        """No weights."""
        if self.average_weights:
            return "average_weights: true, but strategy=mutual_async never exchanges weights: see fedasync"
        return super().check()

    def misfit(self, settings: Settings) -> str | None:
        """Predictions of different samples cannot be averaged."""
        schedule = settings.public.schedule
        if schedule != "static":
            return (
                f"public.schedule: {schedule}, but strategy=mutual_async has no rounds, and predictions of "
                "different samples cannot be averaged: use public=static"
            )
        return None

    def build(  # type: ignore[override]  # its learn and pack are those of rounds, its server is not
        self, settings: Settings, shared: SharedData, run: str, journal: RunDirectory | None
    ) -> MutualAsync:
        """Make the strategy of a run."""
        return MutualAsync(settings, shared, run, journal)


class MutualAsync(Arriving):
    """Keep every client's newest predictions; a target is made when its client is ready."""

    def __init__(
        self, settings: Settings, shared: SharedData, run: str, journal: RunDirectory | None = None
    ) -> None:
        super().__init__(settings, shared, run, journal)
        self.options: MutualAsyncSettings = settings.strategy
        if self.options.divergence == "published_code" and len(shared.classes) != 2:
            raise StrategyError("strategy.divergence=published_code is defined for two classes only")
        self._indices: IndexArray = shared.public.indices(settings.public, settings.seed, 1, settings.rounds)
        self._predictions: dict[str, FloatArray] = {}
        self._validated: dict[str, float | None] = {}
        self._held_against: dict[str, float] = {}
        self._heard: dict[
            str, dict[str, int]
        ] = {}  # by peer: everyone's delivered reports when it last spoke
        self._targets: dict[str, Target | None] = {}  # of the present orders
        self._ages: dict[str, dict[str, int]] = {}  # of the predictions that those were made from

    def begin(self) -> None:
        """Nobody has predicted anything."""

    def prepare(self, client: Participant) -> None:
        """The target is fixed now: the newest predictions of every peer that is not too stale."""
        self._targets[client.name] = self._target(client)
        taught = self._targets[client.name] is not None
        self._ages[client.name] = self._teachers(client) if taught else {}

    def order(self, client: Participant) -> Order:
        """The public samples, and the target on them."""
        return self._order(client, self._targets[client.name], self._indices)

    def closing_order(self, client: Participant) -> Order:
        """A last target, of what the peers know now."""
        order = self._order(client, self._target(client), np.zeros(0, np.int32))
        return replace(order, evaluate_unseen=False)

    def take(self, client: Participant, report: Report) -> Line:
        """Newer predictions take the place of older ones."""
        self._predictions[client.name] = report.predictions
        self._validated[client.name] = balanced_accuracy(report.metrics)
        self._held_against = self.settings.consensus.remember(self._held_against, self._predictions)
        counts = {name: other.delivered for name, other in self.participants.by_name.items()}
        self._heard[client.name] = {**counts, client.name: client.delivered + 1}
        return {"peer_staleness": self._ages[client.name]}

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
            "held_against": self._held_against,
        }
        return meta, arrays

    def restore_state(self, meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Take up what :meth:`state` gave."""
        self._heard, self._validated = dict(meta["heard"]), dict(meta["validated"])
        self._predictions = {
            name.removeprefix("predictions."): values
            for name, values in arrays.items()
            if name.startswith("predictions.")
        }
        self._ages, self._held_against = dict(meta["ages"]), dict(meta["held_against"])
        for name in self._ages:
            values = arrays.get(f"target.{name}")
            self._targets[name] = None if values is None else Target(values, arrays.get(f"entropies.{name}"))

    def _target(self, client: Participant) -> Target | None:
        if self.options.weight(client.update - 1) == 0:
            return None
        options = self.options
        heard = [name for name in (*self._teachers(client), client.name) if name in self._predictions]
        fresh = {name: self._predictions[name] for name in heard}
        gathered = Gathered(
            fresh, options.divergence, options.temperature, self._validated, self._held_against
        )
        consensus: Consensus = self.settings.consensus.form(gathered)
        return consensus.target(client.name)

    def _teachers(self, client: Participant) -> dict[str, int]:
        """Reports that the client has delivered since each of its peers spoke; without the too stale ones."""
        limit = self.options.staleness_limit
        ages = {
            peer: client.delivered - heard.get(client.name, 0)
            for peer, heard in self._heard.items()
            if peer != client.name
        }
        return {peer: age for peer, age in ages.items() if limit is None or age <= limit}

    def _order(self, client: Participant, target: Target | None, predict: IndexArray) -> Order:
        # known labels of the public samples are trained on also where there is nothing to hear from peers
        taught = target is not None or (self.settings.public.labelled and client.update > 1)
        return replace(
            self._base(client),
            public_indices=predict,
            target_indices=self._indices if taught else np.zeros(0, np.int32),
            targets=target.log_probabilities if target else None,
            target_entropies=target.entropies if target else None,
            kl_weight=self.options.weight(client.update - 1),
        )
