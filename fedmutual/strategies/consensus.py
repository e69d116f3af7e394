"""Which consensus the clients learn from: the choices of the settings group ``consensus``.

The mathematics is in :mod:`fedmutual.learning.consensus` and :mod:`fedmutual.learning.robust`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from fedmutual.learning.competence import Agreement, certainty, odds_weights, selection
from fedmutual.learning.consensus import Competence, Consensus, Gathered, MeanConsensus
from fedmutual.learning.robust import TrimmedConsensus, informative, outlier_scores, suspicion, trust
from fedmutual.settings import ConsensusSettings, StrategySettings, setting
from fedmutual.wire.codec import FloatArray

Predictions = Mapping[str, FloatArray]
Weights = Mapping[str, float]
OWN = "a client's own prediction counts as one of its peers'"


@dataclass(kw_only=True)
class Mean(ConsensusSettings):
    """Settings of ``consensus=mean``, and what all kinds of mean have."""

    is_mean: ClassVar[bool] = True

    include_own: bool = setting(OWN)

    def misfit(self, strategy: StrategySettings) -> str | None:
        """The plain mean goes with every strategy: it is the value where there is nothing to choose."""
        return None if type(self) is Mean else super().misfit(strategy)

    def form(self, gathered: Gathered) -> Consensus:
        """The (weighted) mean of the peers."""
        g = gathered
        return MeanConsensus(
            g.predictions, g.divergence, g.temperature, self.weights(g), self.competence(g), self.include_own
        )

    def weights(self, gathered: Gathered) -> Weights | None:
        """What each client is worth; None: all the same."""
        return None

    def competence(self, gathered: Gathered) -> Competence | None:
        """What it is worth sample by sample; None: the same everywhere."""
        return None


@dataclass(kw_only=True)
class Validation(Mean):
    """Settings of ``consensus=validation``."""

    def weights(self, gathered: Gathered) -> Weights | None:
        """The odds that a client is right on its own validation images."""
        if not gathered.predictions:
            return None
        num_classes = next(iter(gathered.predictions.values())).shape[1]
        return odds_weights({name: gathered.validated[name] for name in gathered.predictions}, num_classes)


@dataclass(kw_only=True)
class Confidence(Mean):
    """Settings of ``consensus=confidence``."""

    exponent: float = setting("a of the weight (1 - entropy / log C) ** a of a prediction", above=0)

    def competence(self, gathered: Gathered) -> Competence:
        """How certain a client is of a sample."""
        return certainty(self.exponent)


@dataclass(kw_only=True)
class Selective(Mean):
    """Settings of ``consensus=selective``."""

    threshold: float = setting(
        "a prediction whose largest probability is below this is left out", above=0, maximum=1
    )

    def competence(self, gathered: Gathered) -> Competence:
        """Whether a client knows such images at all."""
        return selection(self.threshold)


@dataclass(kw_only=True)
class Agreeing(Mean):
    """Settings of ``consensus=agreement``."""

    exponent: float = setting("a of the weight (1 - distance from the others) ** a of a prediction", above=0)

    def competence(self, gathered: Gathered) -> Competence | None:
        """How far a client agrees with all others about a sample."""
        return Agreement(gathered.predictions.values(), self.exponent) if gathered.predictions else None


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
        """Outlier scores, added up and fading; against who says nothing there is nothing to hold."""
        scores = outlier_scores(informative(predictions), before, self.tolerance, self.margin)
        return suspicion(before, dict.fromkeys(predictions, 0.0) | scores, self.memory)

    def form(self, gathered: Gathered) -> Consensus:
        """The mean of all who say something, by what is held against them."""
        g = gathered
        heard = trust(g.held_against, informative(g.predictions), self.severity)
        trusted = dict.fromkeys(g.predictions, 0.0) | heard
        return MeanConsensus(g.predictions, g.divergence, g.temperature, trusted, include_own=True)
