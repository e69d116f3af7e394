"""Which consensus the clients learn from: the choices of the settings group ``consensus``.

The mathematics is in :mod:`fedmutual.learning.consensus` and :mod:`fedmutual.learning.robust`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from fedmutual.distributions import FloatArray
from fedmutual.learning.consensus import Consensus, Gathered, MeanConsensus
from fedmutual.learning.robust import TrimmedConsensus, outlier_scores, suspicion, trust
from fedmutual.settings import ConsensusSettings, setting

Predictions = Mapping[str, FloatArray]
Weights = Mapping[str, float]
OWN = "a client's own prediction counts as one of its peers'"


@dataclass(kw_only=True)
class Mean(ConsensusSettings):
    """Settings of ``consensus=mean``."""

    is_mean: ClassVar[bool] = True

    include_own: bool = setting(OWN)

    def form(self, gathered: Gathered) -> Consensus:
        """The (weighted) mean of the peers."""
        return MeanConsensus.of(gathered, include_own=self.include_own)


@dataclass(kw_only=True)
class Confidence(ConsensusSettings):
    """Settings of ``consensus=confidence``."""

    is_mean: ClassVar[bool] = True

    include_own: bool = setting(OWN)
    exponent: float = setting("a of the weight (1 - entropy / log C) ** a of a prediction", above=0)

    def form(self, gathered: Gathered) -> Consensus:
        """The mean of the peers, weighted sample by sample."""
        return MeanConsensus.of(gathered, self.exponent, self.include_own)


@dataclass(kw_only=True)
class Median(ConsensusSettings):
    """Settings of ``consensus=median``: there are none."""

    def form(self, gathered: Gathered) -> Consensus:
        """The coordinate-wise median of all."""
        return TrimmedConsensus(gathered.predictions, gathered.divergence, None, gathered.temperature)


@dataclass(kw_only=True)
class TrimmedMean(ConsensusSettings):
    """Settings of ``consensus=trimmed_mean``."""

    trim: int = setting("values left out at each end: hostile clients that it holds against", minimum=1)

    def form(self, gathered: Gathered) -> Consensus:
        """The coordinate-wise trimmed mean of all."""
        return TrimmedConsensus(gathered.predictions, gathered.divergence, self.trim, gathered.temperature)


@dataclass(kw_only=True)
class Reputation(ConsensusSettings):
    """Settings of ``consensus=reputation``."""

    tolerance: float = setting("so many times the median distance is held against nobody", minimum=0)
    margin: float = setting(
        "nor, on top, this total variation distance, against a client that has been taught before",
        minimum=0,
        maximum=1,
    )
    memory: float = setting(
        "share of what was held against a client that is left a round later", minimum=0, maximum=1
    )
    severity: float = setting("a client's weight is exp(-severity * what is held against it)", above=0)

    def remember(self, before: Weights, predictions: Predictions) -> dict[str, float]:
        """Outlier scores, added up and fading."""
        scores = outlier_scores(predictions, before, self.tolerance, self.margin)
        return suspicion(before, scores, self.memory)

    def form(self, gathered: Gathered) -> Consensus:
        """The mean of all by what is held against them."""
        trusted = trust(gathered.held_against, gathered.predictions, self.severity)
        return MeanConsensus.of(replace(gathered, weights=trusted), include_own=True)
