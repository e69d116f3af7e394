"""Which consensus the clients learn from: a mean, one weighted by competence, or one robust to hostile peers.

The mathematics is in :mod:`fedmutual.learning.consensus`, :mod:`fedmutual.learning.competence` and
:mod:`fedmutual.learning.robust`. A rule of one's own is a subclass of :class:`Rule` with one method.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from fedmutual.learning.competence import certainty, odds_weights
from fedmutual.learning.consensus import (
    Competence,
    Consensus,
    FloatArray,
    Gathered,
    MeanConsensus,
)
from fedmutual.learning.robust import TrimmedConsensus, informative, outlier_scores, suspicion, trust

Predictions = Mapping[str, FloatArray]
Weights = Mapping[str, float]


class Rule(ABC):
    """How the predictions of a round become targets.

    Attributes
    ----------
    is_mean : bool
        The target is a mean of the peers, so that every divergence is defined for it.
    """

    is_mean: ClassVar[bool] = False

    def remember(self, before: Weights, predictions: Predictions) -> dict[str, float]:
        """Suspicion against each client after a round; ``before`` is that of the round before, by name."""
        return {}

    @abstractmethod
    def form(self, gathered: Gathered) -> Consensus:
        """Form the consensus of a round's predictions."""


@dataclass(frozen=True)
class Mean(Rule):
    """Mean of the peers (``consensus=mean``).

    Parameters
    ----------
    include_own : bool
        The client's own prediction counts as one of its peers'.
    """

    is_mean: ClassVar[bool] = True

    include_own: bool = False

    def form(self, gathered: Gathered) -> Consensus:
        """The (weighted) mean of the peers."""
        g = gathered
        return MeanConsensus(
            g.predictions, g.divergence, g.temperature, self.weights(g), self.competence(g), self.include_own
        )

    def weights(self, gathered: Gathered) -> Weights | None:
        """Weight of each client; None: all equal."""
        return None

    def competence(self, gathered: Gathered) -> Competence | None:
        """Weight of each client per sample; None: all equal."""
        return None


@dataclass(frozen=True)
class Validation(Mean):
    """Peers weighted by the odds that they are right on their own validation images.

    Clients report ``validation-recall`` (a list, one number a class) or ``validation-accuracy``.
    """

    def weights(self, gathered: Gathered) -> Weights | None:
        """Odds by balanced validation accuracy."""
        if not gathered.predictions:
            return None
        num_classes = next(iter(gathered.predictions.values())).shape[1]
        return odds_weights({name: gathered.validated[name] for name in gathered.predictions}, num_classes)


@dataclass(frozen=True)
class Confidence(Mean):
    """Peers weighted per sample by their certainty, as in FedAUX (arXiv:2102.02514).

    Parameters
    ----------
    exponent : float
        a of the weight ``(1 - entropy / log C) ** a``.
    """

    exponent: float = 1.0

    def competence(self, gathered: Gathered) -> Competence:
        """Certainty per sample."""
        return certainty(self.exponent)


@dataclass(frozen=True)
class Median(Rule):
    """Coordinate-wise median of all clients: robust to fewer than half of them."""

    def form(self, gathered: Gathered) -> Consensus:
        """The median."""
        return TrimmedConsensus(gathered.predictions, gathered.divergence, None, gathered.temperature)


@dataclass(frozen=True)
class TrimmedMean(Rule):
    """Coordinate-wise trimmed mean of all clients.

    Parameters
    ----------
    trim : int
        Values left out at each end: the number of hostile clients that it is robust to.
    """

    trim: int = 1

    def form(self, gathered: Gathered) -> Consensus:
        """The trimmed mean."""
        return TrimmedConsensus(gathered.predictions, gathered.divergence, self.trim, gathered.temperature)


@dataclass(frozen=True)
class Reputation(Rule):
    """Mean weighted by trust, which falls for clients whose predictions are outliers round after round.

    Parameters
    ----------
    tolerance : float
        A distance of up to so many median distances raises no suspicion.
    margin : float
        Nor does this total variation distance on top, for a client that has had a target before.
    memory : float
        Share of a client's suspicion that is left a round later.
    severity : float
        A client's weight is ``exp(-severity * suspicion)``.
    """

    tolerance: float = 1.0
    margin: float = 0.1
    memory: float = 0.7
    severity: float = 30.0

    def remember(self, before: Weights, predictions: Predictions) -> dict[str, float]:
        """Decayed sum of outlier scores per client; uninformative clients score 0."""
        scores = outlier_scores(informative(predictions), before, self.tolerance, self.margin)
        return suspicion(before, dict.fromkeys(predictions, 0.0) | scores, self.memory)

    def form(self, gathered: Gathered) -> Consensus:
        """Mean over informative clients, weighted by trust."""
        g = gathered
        heard = trust(g.suspicion, informative(g.predictions), self.severity)
        trusted = dict.fromkeys(g.predictions, 0.0) | heard
        return MeanConsensus(g.predictions, g.divergence, g.temperature, trusted, include_own=True)


RULES: dict[str, type[Rule]] = {
    "mean": Mean,
    "confidence": Confidence,
    "validation": Validation,
    "median": Median,
    "trimmed_mean": TrimmedMean,
    "reputation": Reputation,
}


def rule_of(consensus: Rule | str, divergence: str) -> Rule:
    """The rule that a strategy was given, by name or as an object.

    Raises
    ------
    ValueError
        For an unknown name, or a rule for which the divergence is not defined.
    """
    if isinstance(consensus, str):
        if consensus not in RULES:
            raise ValueError(f"consensus: {consensus!r} is none of {', '.join(RULES)}")
        consensus = RULES[consensus]()
    if divergence == "published_code" and not consensus.is_mean:
        raise ValueError("divergence: published_code is defined for a mean of the peers only")
    return consensus
