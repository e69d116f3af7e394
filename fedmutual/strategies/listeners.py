"""A speaker made of what the sites have released once, and listeners.

From when the server has a speaker, every order has the speaker's predictions of public samples, from which
the sites' own models learn: the listeners. These never leave, so they need no noise. How the speaker is made
is a subclass's: :class:`fedmutual.strategies.speaker.Speaker` and
:class:`fedmutual.strategies.own_speakers.OwnSpeakers`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from flwr.app import RecordDict

from fedmutual.learning.consensus import log_softmax
from fedmutual.learning.speaker import FeatureMap, Matrix
from fedmutual.strategies.base import Arrays, Figures, RoundStrategy, Schedule
from fedmutual.wire.codec import FloatArray
from fedmutual.wire.orders import Order
from fedmutual.wire.reports import Expected, Report, read_report
from fedmutual.wire.weights import read_weights, weights_record

CENTRE, AXES = "centre", "axes"
WEIGHTS, MAP = "weights", "map"


class Listeners(RoundStrategy):
    """Ask each client for its release once, and let all listen to the speaker that is made of them.

    Parameters
    ----------
    num_classes : int
        C.
    feature_map : FeatureMap
        Sent to every client that has not answered with its release yet.
    public : float [N, F]
        The public samples' features.
    schedule : callable
        Public samples that the clients learn from in a round.
    kl_weight : float
        Lambda, the weight of KL(speaker || listener) in the listeners' loss.
    multiplier : float
        Standard deviation of the noise over the sensitivity; 0: no noise, nothing is proven.
    sharpness : float
        Standard deviation of the speaker's scores (logits) over the public samples.
    unseen : (float [u, F], int [u]) or None
        Features and labels of a test set that the speaker is measured on.
    **flower
        See :class:`fedmutual.strategies.base.RoundStrategy`.
    """

    def __init__(
        self,
        num_classes: int,
        feature_map: FeatureMap,
        public: Matrix,
        *,
        schedule: Schedule,
        multiplier: float,
        kl_weight: float = 3.0,
        sharpness: float = 6.0,
        unseen: tuple[Matrix, np.ndarray[Any, Any]] | None = None,
        **flower: Any,
    ) -> None:
        super().__init__(num_classes, **flower)
        if not sharpness > 0 or not min(kl_weight, multiplier) >= 0:
            raise ValueError("kl_weight, multiplier: at least 0; sharpness: above 0")
        self.schedule = schedule
        self.kl_weight = kl_weight
        self.multiplier = multiplier
        self.sharpness = sharpness
        self.weights: Matrix | None = None
        self._features, self._unseen_features = public, unseen
        self._use(feature_map)

    # -----------------------------------------------------------------------------------------------
    # How the speaker is made

    @abstractmethod
    def waits_for(self, client: str | None) -> bool:
        """Whether the client's release is still missing."""

    @abstractmethod
    def like(self) -> dict[str, np.ndarray[Any, Any]]:
        """Arrays of the names, shapes and types that a release has."""

    @abstractmethod
    def add(self, releases: Mapping[str, Arrays], reports: Mapping[str, Report]) -> None:
        """Take new releases, by client, and make the speaker's weights [k, C] of all."""

    # -----------------------------------------------------------------------------------------------

    def order(self, client: str | None, base: Order) -> Order:
        """The feature map, until the client has sent its release; then the speaker and its predictions."""
        if base.closing:
            return base
        if self.waits_for(client):
            return replace(base, model=weights_record(self.map.arrays()))
        if self.weights is None:
            return base
        indices = self.schedule(base.round)
        said = self.said(self._public[indices])
        return replace(
            base,
            target_indices=indices,
            log_targets=said,
            target_entropies=np.asarray(-(np.exp(said) * said).sum(axis=1), np.float32),
            divergence="peer_own",
            kl_weight=self.kl_weight,
            model=weights_record({WEIGHTS: self.weights.astype(np.float32), MAP: self.map.digest}),
        )

    def said(self, phi: Matrix) -> FloatArray:
        """The speaker's log-probabilities [n, C]: with noise its outputs are small, so they are scaled."""
        assert self.weights is not None
        spread = max(float((self._public @ self.weights).std()), 1e-12)
        scores = (phi @ self.weights * (self.sharpness / spread)).astype(np.float32)
        return np.maximum(log_softmax(scores), np.float32(math.log(self.floor)))

    def read(self, content: RecordDict, expected: Expected) -> Report:
        """Reject a release that does not fit the feature map."""
        report = read_report(content, expected)
        if report.model is not None:
            read_weights(report, self.like())
        return report

    def take(self, round: int, reports: Mapping[str, Report]) -> Figures:
        """Take the new releases, and measure the speaker."""
        new = {name: report for name, report in reports.items() if report.model is not None}
        if new:
            self.add({name: read_weights(report, self.like()) for name, report in new.items()}, new)
        return self._measured()

    def _use(self, feature_map: FeatureMap) -> None:
        self.map = feature_map
        self._public = feature_map.unit(self._features)
        tested = self._unseen_features
        self._unseen = None if tested is None else (feature_map.unit(tested[0]), tested[1])

    def _measured(self) -> Figures:
        if self._unseen is None or self.weights is None:
            return {}
        phi, labels = self._unseen
        return {"speaker_accuracy": float((self.said(phi).argmax(axis=1) == labels).mean())}
