"""``privacy.speaker=own`` at a site: a noisy model of its own images scores the public ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fedmutual.learning.gaussian import noisy, scale_of
from fedmutual.learning.own_speaker import class_sums, sensitivity, solve_own
from fedmutual.learning.speaker import GRID
from fedmutual.methods.release import asked_of, features_of, ledger_of, map_of, noise_multiplier
from fedmutual.strategies.own_speakers import COUNTS, SAID
from fedmutual.strategies.speaker import SUMS

if TYPE_CHECKING:
    from torch import Tensor

    from fedmutual.client.learner import Learner


def own_speaker_said(
    learner: Learner, given: Mapping[str, Tensor], features: str, ridge: float
) -> Mapping[str, Tensor]:
    """Return the scores of all public images by the client's own speaker, and its noisy counts.

    The noisy sums that it is made of come from the client's ledger if they were made before.
    """
    import torch

    settings, site, private = learner.settings, learner.site, learner.site.private
    public = features_of(features, site.public.images)
    taken = map_of(given, public.shape[1])
    shown, classes = taken.unit(public), len(site.classes)
    widest = sensitivity(taken.size)

    def exact() -> np.ndarray[Any, Any]:
        return class_sums(taken.unit(features_of(features, private)), private.labels, classes)

    scale = 0.0
    if settings.privacy.epsilon is None:
        sums = exact()
    else:
        scale = scale_of(noise_multiplier(settings), widest)
        asked = asked_of(learner, taken, scale / widest, speaker="own")
        budget = settings.privacy.budget or settings.privacy.epsilon

        def draw() -> dict[str, np.ndarray[Any, Any]]:
            return {SUMS: noisy(exact(), scale), **taken.arrays()}

        ledger = ledger_of(settings, learner.client)
        sums = ledger.release(asked, private.pixel_hashes(), budget, draw)[SUMS]
    weights, counts = solve_own(sums, classes, shown, scale / GRID, ridge)
    return {
        SAID: torch.from_numpy((shown @ weights).astype(np.float32)),
        COUNTS: torch.from_numpy(counts.astype(np.float32)),
    }
