"""A speaker made of noisy sums, and listeners: differential privacy for every record of every site.

A site sends once what :mod:`fedmutual.learning.speaker` adds up over its images, with noise; with secure
aggregation under masks, each site then with its share of the noise. The server solves a ridge regression: the
speaker. From then on every order has the speaker's predictions of public samples, from which the sites' own
models learn: the listeners. These never leave, so they need no noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import numpy as np
from flwr.app import RecordDict

from fedmutual.learning.consensus import log_softmax
from fedmutual.learning.gaussian import scale_of
from fedmutual.learning.speaker import GRID, FeatureMap, Matrix, divided, entries, sensitivity, solve
from fedmutual.strategies.base import Arrays, Figures, RoundStrategy, Schedule, below
from fedmutual.wire.codec import FloatArray
from fedmutual.wire.metrics import EXAMPLES
from fedmutual.wire.orders import Order
from fedmutual.wire.reports import Expected, Report, read_report
from fedmutual.wire.weights import read_weights, weights_record

SUMS = "sums"
CENTRE, AXES = "centre", "axes"
WEIGHTS, MAP = "weights", "map"


class Speaker(RoundStrategy):
    """Add up noisy sums, solve, and let the clients listen.

    Parameters
    ----------
    num_classes : int
        C.
    feature_map : FeatureMap
        Sent to every client that has not answered with its sums yet.
    public : float [N, F]
        The public samples' features.
    schedule : callable
        Public samples that the clients learn from in a round.
    kl_weight : float
        Lambda, the weight of KL(speaker || listener) in the listeners' loss.
    multiplier : float
        Standard deviation of the noise over the sensitivity; 0: no noise, nothing is proven.
    colluding : int or None
        The sums come added up, as one report, and their noise has that many shares more than are needed.
        None: each client's sums come alone, with all the noise.
    ridge : float
        See :func:`fedmutual.learning.speaker.solve`.
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
        colluding: int | None = None,
        kl_weight: float = 3.0,
        ridge: float = 0.01,
        sharpness: float = 6.0,
        unseen: tuple[Matrix, np.ndarray[Any, Any]] | None = None,
        **flower: Any,
    ) -> None:
        super().__init__(num_classes, **flower)
        if not sharpness > 0 or not min(kl_weight, multiplier, ridge) >= 0:
            raise ValueError("kl_weight, multiplier, ridge: at least 0; sharpness: above 0")
        self.schedule = schedule
        self.kl_weight = kl_weight
        self.multiplier = multiplier
        self.ridge = ridge
        self.colluding = colluding
        self.sharpness = sharpness
        self.weights: Matrix | None = None
        self._features, self._unseen_features = public, unseen
        self._use(feature_map)
        self._sums: dict[str, np.ndarray[Any, Any]] = {}
        self._added = 0  # clients whose sums these are

    @property
    def numbers(self) -> int:
        """How many numbers a client's sums have."""
        return entries(self.map.size, self.num_classes, gram=not self.multiplier)

    def order(self, client: str | None, base: Order) -> Order:
        """The feature map, until the client has sent its sums; then the speaker and its predictions."""
        if base.closing:
            return base
        waiting = client not in self._sums and (self.colluding is None or not self._sums)
        if self.weights is None or waiting:
            return replace(base, model=weights_record(self.map.arrays()))
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
        """Reject sums that do not fit the feature map."""
        report = read_report(content, expected)
        if report.model is not None:
            read_weights(report, self._like())
        return report

    def take(self, round: int, reports: Mapping[str, Report]) -> Figures:
        """Add what is new to the sums, and solve."""
        new = {name: report for name, report in reports.items() if report.model is not None}
        self._sums |= {name: read_weights(report, self._like())[SUMS] for name, report in new.items()}
        if new:
            counts = [int(cast(int, report.metrics[EXAMPLES])) for report in new.values()]
            self._added = len(self._sums) if self.colluding is None else counts[0]
            self._solve()
        return self._measured()

    def state(self) -> tuple[dict[str, Any], Arrays]:
        """The sums by client, and the map that they are of."""
        arrays = {f"{SUMS}.{name}": said for name, said in self._sums.items()}
        return {"added": self._added}, {**arrays, **self.map.arrays()}

    def restore_state(self, meta: Mapping[str, Any], arrays: Arrays) -> None:
        """Continue from what :meth:`state` returned."""
        self._sums, self._added = below(f"{SUMS}.", arrays), meta["added"]
        self._use(FeatureMap(arrays[CENTRE], arrays[AXES]))  # another machine's has other last bits
        if self._sums:
            self._solve()

    def describe(self) -> str:
        """The strategy and its settings in one line."""
        noise = f"noise {self.multiplier:.3g} times the sensitivity" if self.multiplier else "NO NOISE"
        noise += "" if self.colluding is None else ", sums added up under masks"
        return f"Speaker: {len(self.map.axes)} axes, ridge {self.ridge:g}, {noise}"

    def _use(self, feature_map: FeatureMap) -> None:
        self.map = feature_map
        self._public = feature_map.unit(self._features)
        tested = self._unseen_features
        self._unseen = None if tested is None else (feature_map.unit(tested[0]), tested[1])

    def _solve(self) -> None:
        total = np.stack(list(self._sums.values())).sum(axis=0)
        shares = 1 if self.colluding is None else max(self._added - self.colluding, 1)
        each = scale_of(self.multiplier, sensitivity(self.map.size, self.num_classes), shares) / GRID
        public = self._public.T @ self._public / len(self._public)
        found = divided(total, self.map.size, self.num_classes)
        self.weights = solve(found, public, each * math.sqrt(self._added), self.ridge)

    def _like(self) -> dict[str, np.ndarray[Any, Any]]:
        return {SUMS: np.zeros(self.numbers, np.int64)}

    def _measured(self) -> Figures:
        if self._unseen is None or self.weights is None:
            return {}
        phi, labels = self._unseen
        return {"speaker_accuracy": float((self.said(phi).argmax(axis=1) == labels).mean())}
