"""Distributed mutual learning on Flower: a strategy for any Flower app, and an application on images.

The names below are the public interface; they are imported when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fedmutual.api import Run, RunError, load_model, run
    from fedmutual.learning.aggregation import entropy_reduction, mean_of_probabilities, mean_of_scores
    from fedmutual.learning.consensus import MeanConsensus, Target
    from fedmutual.learning.divergence import mutual_loss, own_peer, peer_own
    from fedmutual.learning.robust import TrimmedConsensus
    from fedmutual.strategies.cfd import CFD
    from fedmutual.strategies.consensus import (
        Confidence,
        Mean,
        Median,
        Reputation,
        Rule,
        TrimmedMean,
        Validation,
    )
    from fedmutual.strategies.dsfl import DSFL
    from fedmutual.strategies.feddf import FedDF
    from fedmutual.strategies.fedmd import FedMD
    from fedmutual.strategies.mutual import MutualLearning
    from fedmutual.strategies.predictions import PredictionStrategy
    from fedmutual.wire.codec import MessageError
    from fedmutual.wire.orders import Order

_HOMES = {
    "fedmutual.api": ("Run", "RunError", "load_model", "run"),
    "fedmutual.learning.aggregation": ("entropy_reduction", "mean_of_probabilities", "mean_of_scores"),
    "fedmutual.learning.consensus": ("MeanConsensus", "Target"),
    "fedmutual.learning.divergence": ("mutual_loss", "own_peer", "peer_own"),
    "fedmutual.learning.robust": ("TrimmedConsensus",),
    "fedmutual.strategies.cfd": ("CFD",),
    "fedmutual.strategies.consensus": (
        "Confidence",
        "Mean",
        "Median",
        "Reputation",
        "Rule",
        "TrimmedMean",
        "Validation",
    ),
    "fedmutual.strategies.dsfl": ("DSFL",),
    "fedmutual.strategies.feddf": ("FedDF",),
    "fedmutual.strategies.fedmd": ("FedMD",),
    "fedmutual.strategies.mutual": ("MutualLearning",),
    "fedmutual.strategies.predictions": ("PredictionStrategy",),
    "fedmutual.wire.codec": ("MessageError",),
    "fedmutual.wire.orders": ("Order",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "CFD",
    "DSFL",
    "Confidence",
    "FedDF",
    "FedMD",
    "Mean",
    "MeanConsensus",
    "Median",
    "MessageError",
    "MutualLearning",
    "Order",
    "PredictionStrategy",
    "Reputation",
    "Rule",
    "Run",
    "RunError",
    "Target",
    "TrimmedConsensus",
    "TrimmedMean",
    "Validation",
    "entropy_reduction",
    "load_model",
    "mean_of_probabilities",
    "mean_of_scores",
    "mutual_loss",
    "own_peer",
    "peer_own",
    "run",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
