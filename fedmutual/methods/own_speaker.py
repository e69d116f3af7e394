"""``privacy.speaker=own`` at a site: a noisy regression on its own images predicts the public ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fedmutual.learning.gaussian import noisy
from fedmutual.learning.own_speaker import STEPS, Noises, fit, log_said
from fedmutual.methods.release import asked_of, features_of, ledger_of, map_of, noise_multiplier
from fedmutual.strategies.listeners import WEIGHTS
from fedmutual.strategies.own_speakers import COUNTS, SAID

if TYPE_CHECKING:
    from torch import Tensor

    from fedmutual.client.learner import Learner


def own_speaker_said(
    learner: Learner, given: Mapping[str, Tensor], features: str, ridge: float
) -> Mapping[str, Tensor]:
    """Return the predictions of all public images by the client's own speaker, and its noisy counts.

    The speaker comes from the client's ledger if it was made before.
    """
    import torch

    settings, site, private = learner.settings, learner.site, learner.site.private
    public = features_of(features, site.public.images)
    taken = map_of(given, public.shape[1])
    shown, classes = taken.unit(public), len(site.classes)
    noises = Noises.of(noise_multiplier(settings), taken.size, classes)

    def draw() -> dict[str, np.ndarray[Any, Any]]:
        weights, counts = fit(
            taken.unit(features_of(features, private)),
            private.labels,
            shown.T @ shown / len(shown),
            noises,
            noisy,
            num_classes=classes,
            share=ridge,
        )
        return {WEIGHTS: weights, COUNTS: counts, **taken.arrays()}

    if settings.privacy.epsilon is None:
        released: Mapping[str, np.ndarray[Any, Any]] = draw()
    else:
        multiplier = noises.together(taken.size, classes)
        asked = asked_of(learner, taken, multiplier, speaker="own", steps=STEPS, ridge=ridge)
        budget = settings.privacy.budget or settings.privacy.epsilon
        ledger = ledger_of(settings, learner.client)
        released = ledger.release(asked, private.pixel_hashes(), budget, draw)
    counts = released[COUNTS].astype(np.float32)
    return {
        SAID: torch.from_numpy(log_said(shown, released[WEIGHTS])),
        COUNTS: torch.from_numpy(counts),
    }
