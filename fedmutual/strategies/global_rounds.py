"""Strategies with rounds whose clients' weights make one global model at the server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedmutual.data.site import SharedData
from fedmutual.engine.rounds import Arrays, Rounds, below
from fedmutual.engine.server_model import ServerModel
from fedmutual.results.directory import RunDirectory
from fedmutual.settings import Settings


class GlobalRounds(Rounds):
    """Keep the global model, which begins as the clients do.

    Attributes
    ----------
    server : ServerModel
        Trains and measures it.
    weights : dict[str, array]
        What it is.
    """

    predicts = False

    def __init__(
        self, settings: Settings, shared: SharedData, run: str, journal: RunDirectory | None = None
    ) -> None:
        super().__init__(settings, shared, run, journal)
        self.server = ServerModel(settings, shared)
        self.weights: Arrays = self.server.weights()

    def global_weights(self) -> Arrays:
        """The global model."""
        return self.weights

    def state(self) -> tuple[dict[str, Any], Arrays]:
        """The global model."""
        return {}, {f"model.{name}": values for name, values in self.weights.items()}

    def restore_state(self, meta: Mapping[str, Any], arrays: Arrays) -> None:
        """Take up what :meth:`state` gave."""
        self.weights = below("model.", arrays)
