"""What both speakers of ``strategy=speaker`` need at a site: features, the map, the noise, and the ledger."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fedmutual.learning.gaussian import multiplier_for
from fedmutual.learning.hog import hog, mirrored_hog
from fedmutual.learning.speaker import FeatureMap
from fedmutual.settings import Settings, SettingsError
from fedmutual.strategies.listeners import AXES, CENTRE

if TYPE_CHECKING:
    from torch import Tensor

    from fedmutual.client.budget import Asked, BudgetLedger
    from fedmutual.client.learner import Learner
    from fedmutual.data.images import ImageSet

logger = logging.getLogger(__name__)


def features_of(kind: str, images: ImageSet, indices: Any = slice(None)) -> np.ndarray[Any, Any]:
    """Return the features [n, F] of images (``strategy.features``): of each from this image alone."""
    if kind == "backbone":
        found: np.ndarray[Any, Any] = images.seen[indices]
        return found
    return hog(images.images[indices]) if kind == "hog" else mirrored_hog(images.images[indices])


def noise_multiplier(settings: Settings) -> float:
    """Return the noise of a site's release over its sensitivity; 0 without privacy."""
    privacy = settings.privacy
    return 0.0 if privacy.epsilon is None else multiplier_for(privacy.epsilon, privacy.delta)


def map_of(given: Mapping[str, Tensor], features: int) -> FeatureMap:
    """Return the map of an order, after checking that it is one of this client's features.

    Raises
    ------
    SettingsError
        It is not.
    """
    centre, axes = (given[name].numpy() for name in (CENTRE, AXES))
    fits = centre.shape == (features,) and axes.ndim == 2 and axes.shape[1] == features
    if not fits or not 1 <= len(axes) <= 512 or not np.isfinite(axes).all() or not np.isfinite(centre).all():
        raise SettingsError(
            f"model: the run's feature map does not fit {features} features: give this site the run's model"
        )
    return FeatureMap(centre, axes)


def asked_of(learner: Learner, taken: FeatureMap, multiplier: float, **about: Any) -> Asked:
    """Return a release of all of a client's images for its ledger.

    Of all: which are trained on, and which are held out, depends on how many there are, and so on each.
    """
    from fedmutual.client.budget import Asked

    site, private, delta = learner.site, learner.site.private, learner.settings.privacy.delta
    if delta * len(private) > 1:
        logger.warning(
            "%s: privacy.delta=%g is above 1 over the number of its images: it should be below it",
            learner.client,
            delta,
        )
    told = {
        "map": taken.digest.tobytes().hex(),
        "classes": list(site.classes),
        "labels": hashlib.blake2b(private.labels.tobytes(), digest_size=16).hexdigest(),
    }
    return Asked(multiplier, delta, f"pixels {private.images.shape[1:]}", {**told, **about})


def ledger_of(settings: Settings, client: str) -> BudgetLedger:
    """Return a client's ledger."""
    from fedmutual.client.budget import BudgetLedger
    from fedmutual.results.directory import states_dir

    return BudgetLedger(states_dir(settings.state_dir), client)
