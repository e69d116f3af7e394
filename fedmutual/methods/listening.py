"""Whether a client of ``strategy=speaker`` listens to the speaker in a round."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fedmutual.learning.speaker import FeatureMap
from fedmutual.methods.release import features_of, ledger_of
from fedmutual.strategies.listeners import AXES, CENTRE, MAP, WEIGHTS

if TYPE_CHECKING:
    from torch import Tensor

    from fedmutual.client.learner import Learner

_CHANCE = 0.025  # a client listens unless its own model's lead over the speaker is less probable by chance

logger = logging.getLogger(__name__)


def listens(learner: Learner, given: Mapping[str, Tensor], features: str) -> bool:
    """Whether the speaker helps, or cannot be tried: the map is not known that its weights are of."""
    if learner.settings.privacy.epsilon is None:
        return True
    ledger = ledger_of(learner.settings, learner.client)
    found = ledger.find(map=given[MAP].numpy().tobytes().hex())
    return found is None or helps(learner, found, given[WEIGHTS].numpy(), features)


def helps(
    learner: Learner,
    taken: Mapping[str, np.ndarray[Any, Any]],
    weights: np.ndarray[Any, Any],
    features: str,
) -> bool:
    """Whether the speaker is no worse than this client's own model on its own validation images.

    A client that lacks a class among them cannot say, and listens. Nothing of the comparison leaves it.
    """
    site, order = learner.site, learner.order
    indices = site.validation_indices(min(order.round, learner.settings.rounds))
    labels = site.private.labels[indices]
    if len(np.unique(labels)) < len(site.classes):
        return True
    phi = FeatureMap(taken[CENTRE], taken[AXES]).unit(features_of(features, site.private, indices))
    spoken = (phi @ weights).argmax(axis=1) == labels
    own = learner.on_private(indices).argmax(axis=1) == labels
    better = by_chance(int((own & ~spoken).sum()), int((spoken & ~own).sum())) < _CHANCE
    if better:
        logger.info(
            "%s, round %d: does not listen to the speaker, which is right on %.1f %% of its own validation "
            "images, its own model on %.1f %%",
            learner.client,
            order.round,
            100 * spoken.mean(),
            100 * own.mean(),
        )
    return not better


def by_chance(wins: int, losses: int) -> float:
    """Return the probability of as many wins or more by tosses of a coin (a sign test).

    >>> by_chance(3, 0), by_chance(2, 2)
    (0.125, 0.6875)
    """
    tosses = wins + losses
    return float(sum(math.comb(tosses, k) for k in range(wins, tosses + 1)) / 2**tosses)
