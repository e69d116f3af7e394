"""The server's own model, for strategies with a global model; initialised like the clients' models."""

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
from fedmutual.wire.orders import Order
from fedmutual.wire.records import NO_SAMPLES, IndexArray

if TYPE_CHECKING:
    from torch import nn

    from fedmutual.client.learner import Learner

logger = logging.getLogger(__name__)

Arrays = dict[str, np.ndarray[Any, Any]]
NAME = "server"


class ServerModel:
    """A model at the server, trained on the public set and evaluated on the unseen set.

    Parameters
    ----------
    settings : Settings
        Uses ``model`` (without ``per_client``) and ``device``.
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
        from fedmutual.models.learnt import build_learnt

        self.settings = settings
        empty = np.zeros(0, np.int64)
        no_images = shared.public.images.subset(empty)
        self._site = SiteData(shared.classes, no_images, shared.public, shared.unseen, (empty,), (empty,))
        seed = derived_seed(settings.seed, "model", settings.model.target)
        model, self.arguments = build_learnt(settings, shared, seed)
        self.model: nn.Module = model.to(choose_device(settings.device))
        if weights is None:
            warm_start(settings, shared, self.model)
        else:
            self.load(weights)

    def weights(self) -> Arrays:
        """Return the weights by name."""
        return {name: value.detach().cpu().numpy().copy() for name, value in self.model.state_dict().items()}

    def load(self, weights: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Load weights."""
        import torch

        from fedmutual.models.build import load_weights

        load_weights(self.model, {name: torch.from_numpy(np.array(v)) for name, v in weights.items()})

    def learner(self, order: Order) -> Learner:
        """Return a Learner for the server's model with a new optimiser."""
        from fedmutual.client.learner import Learner, new_optimizer

        optimizer = new_optimizer(self.settings, self.model, order.round)
        return Learner(self.settings, self._site, self.model, optimizer, order, NAME)

    def order(self, round: int, indices: IndexArray, closing: bool = False) -> Order:
        """Return the server's order to itself, for its own model."""
        return Order(
            run="server",
            round=round,
            closing=closing,
            public_digest=self._site.public.digest,
            num_classes=len(self._site.classes),
            classes=self._site.classes,
            indices=indices,
            target_indices=indices,
        )

    def measure(self, round: int) -> Line:
        """Return metrics on the unseen set (or the run's subset of it), named as in the history.

        Empty in rounds without evaluation on the unseen set (``evaluation.unseen_every``).
        """
        if not self.settings.evaluation.unseen_in(round):
            return {}
        learner = self.learner(self.order(round, NO_SAMPLES))
        learner.evaluate_unseen(self.settings.evaluation.unseen_limit)
        return figures(learner.metrics)

    def measured(self, round: int) -> Line:
        """Return the same metrics with the prefix ``global_``, for clients with other models."""
        return {f"global_{name}": value for name, value in self.measure(round).items()}

    def measure_weights(self, round: int, weights: Mapping[str, np.ndarray[Any, Any]]) -> Line:
        """Load weights and :meth:`measure` them."""
        if not self.settings.evaluation.unseen_in(round):
            return {}
        self.load(weights)
        return self.measure(round)

    def measure_apart(self, round: int, weights: Mapping[str, np.ndarray[Any, Any]]) -> Line:
        """Load weights and return them :meth:`measured`."""
        self.load(weights)
        return self.measured(round)

    def leave(self, journal: RunDirectory) -> dict[str, Any]:
        """Evaluate the model on the whole unseen set, and save it in a run's results.

        Returns
        -------
        dict
            The entry ``global_model`` of ``summary.json``.
        """
        from fedmutual.models.learnt import name_of, whole_weights

        order = self.order(self.settings.rounds + 1, NO_SAMPLES, closing=True)
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
        weights = whole_weights(self.settings, self.arguments, self.model.state_dict())
        folder = journal.write_global_model(weights, card)
        logger.info("the global model is in %s", folder)
        return {"folder": folder.name, "model": name_of(self.settings.model, self.model), **metrics}


def initial_weights(settings: Settings, shared: SharedData) -> Arrays:
    """Return the clients' common start, from the run's seed (and the warm-start fold, if any)."""
    from fedmutual.client.learner import derived_seed, warm_start
    from fedmutual.models.learnt import build_learnt

    seed = derived_seed(settings.seed, "model", settings.model.target)
    model, _ = build_learnt(settings, shared, seed)
    warm_start(settings, shared, model)
    return {name: values.detach().numpy().copy() for name, values in model.state_dict().items()}
