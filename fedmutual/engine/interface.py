"""What the server asks of a strategy besides Flower's own interface."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from flwr.serverapp import Grid

from fedmutual.wire.codec import FloatArray

MESSAGE_TYPE = "train.round"  # every order of every strategy; client_app.py registers its handler


class RunnableStrategy(Protocol):
    """A strategy that the server can run, and continue from a checkpoint.

    Attributes
    ----------
    unseen_predictions : dict[str, float32 [u, C]]
        Log-probabilities of the unseen set by client, from the closing reports; the ensemble is their mean.
    """

    unseen_predictions: dict[str, FloatArray]

    def start(self, grid: Grid) -> object:
        """Run all rounds and the closing one."""

    def global_weights(self) -> Mapping[str, np.ndarray[Any, Any]] | None:
        """Weights of the global model at the end of a run; None: the strategy has none."""

    def restore(self, meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Continue a run from its checkpoint."""
