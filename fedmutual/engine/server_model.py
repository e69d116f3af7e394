"""The server's own model: for strategies that have a global one. Started as the clients' are."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fedmutual.data.site import SharedData, SiteData
from fedmutual.engine.history import Line, figures
from fedmutual.models.card import model_card
from fedmutual.results.directory import RunDirectory
from fedmutual.settings import Settings
from fedmutual.wire.messages import Order

if TYPE_CHECKING:
    from torch import nn

    from fedmutual.client.learner import Learner
    from fedmutual.engine.rounds import Rounds

logger = logging.getLogger(__name__)

Arrays = dict[str, np.ndarray[Any, Any]]
NAME = "server"


class ServerModel:
    """A model at the server, which can be trained on the public set and measured on the unseen one.

    Parameters
    ----------
    settings : Settings
        Its ``model`` without ``per_client``, and its ``device``.
    shared : SharedData
    weights : Mapping[str, np.ndarray] or None
        None: the common start.
    """

    def __init__(
        self,
        settings: Settings,
        shared: SharedData,
        weights: Mapping[str, np.ndarray[Any, Any]] | None = None,
    ) -> None:
        from fedmutual.client.learner import derived_seed, warm_start
        from fedmutual.learning.device import choose_device
        from fedmutual.models.build import build_model

        self.settings = settings
        nobody = np.zeros(0, np.int64)
        no_images = shared.public.images.subset(nobody)
        self._site = SiteData(shared.classes, no_images, shared.public, shared.unseen, (nobody,), (nobody,))
        seed = derived_seed(settings.seed, "model", settings.model.target)
        model, self.arguments = build_model(
            settings.model, len(shared.classes), settings.data.image_size, seed
        )
        self.model: nn.Module = model.to(choose_device(settings.device))
        if weights is None:
            warm_start(settings, shared, self.model)
        else:
            self.load(weights)

    def weights(self) -> Arrays:
        """Its weights, by name."""
        return {name: value.detach().cpu().numpy().copy() for name, value in self.model.state_dict().items()}

    def load(self, weights: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Take over weights."""
        import torch

        from fedmutual.models.build import load_weights

        load_weights(self.model, {name: torch.from_numpy(np.array(v)) for name, v in weights.items()})

    def learner(self, order: Order) -> Learner:
        """Somebody who trains it as an order says, with a fresh optimiser."""
        from fedmutual.client.learner import Learner, new_optimizer

        optimizer = new_optimizer(self.settings, self.model, order.round)
        return Learner(self.settings, self._site, self.model, optimizer, order, NAME)

    def measure(self, order: Order) -> Line:
        """Quality on the unseen set (or the run's subset of it), as a client's history line says it."""
        learner = self.learner(order)
        learner.evaluate_unseen(self.settings.evaluation.unseen_limit)
        return figures(learner.metrics)

    def leave(self, journal: RunDirectory) -> dict[str, Any]:
        """Measure it on the whole unseen set, and write it into a run's results.

        Returns
        -------
        dict
            ``global_model`` of ``summary.json``.
        """
        nobody = np.zeros(0, np.int32)
        order = Order(
            run=journal.path.name,
            round=self.settings.rounds + 1,
            closing=True,
            public_digest=self._site.public.digest,
            classes=self._site.classes,
            public_indices=nobody,
            target_indices=nobody,
        )
        learner = self.learner(order)
        learner.evaluate_unseen(None)
        metrics = figures(learner.metrics)
        card = model_card(
            self.settings,
            self._site,
            self.arguments,
            metrics,
            client="global model",
            shared=True,
            rounds=self.settings.rounds,
        )
        folder = journal.write_global_model(self.model.state_dict(), card)
        logger.info("the global model is in %s", folder)
        return {"folder": folder.name, "model": type(self.model).__name__, **metrics}

    def measured(self, order: Order) -> Line:
        """The same for clients that have other models: as what every history line says besides."""
        return {f"global_{name}": value for name, value in self.measure(order).items()}


def server_order(strategy: Rounds, round: int) -> Order:
    """What the server orders itself to do with its own model in a round."""
    indices = strategy.indices(round)
    return Order(
        run=strategy.run,
        round=round,
        closing=False,
        public_digest=strategy.shared.public.digest,
        classes=strategy.shared.classes,
        public_indices=indices,
        target_indices=indices,
    )
