"""``privacy.speaker=joint`` at a site: noisy sums, which the server adds up and solves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from fedmutual.learning.gaussian import multiplier_of_sum, noisy, scale_of
from fedmutual.learning.speaker import entries, sensitivity, sums
from fedmutual.methods.release import asked_of, features_of, ledger_of, map_of, noise_multiplier
from fedmutual.settings import SettingsError
from fedmutual.strategies.speaker import SUMS

if TYPE_CHECKING:
    from torch import Tensor

    from fedmutual.client.learner import Learner


def released_sums(learner: Learner, given: Mapping[str, Tensor], features: str) -> Mapping[str, Tensor]:
    """Return the noisy sums over all of the client's images, from its ledger if they were made before."""
    import torch

    settings, site, private = learner.settings, learner.site, learner.site.private
    privacy = settings.privacy
    cohort = learner.order.cohort
    if privacy.secagg and (cohort is None or learner.client not in cohort.names):
        return {}  # nobody's masks would cancel this client's
    taken = map_of(given, features_of(features, site.public.images, slice(1)).shape[1])
    classes = len(site.classes)
    gram = privacy.epsilon is None

    def exact() -> np.ndarray[Any, Any]:
        return sums(taken.unit(features_of(features, private)), private.labels, classes, gram=gram)

    if gram:
        return {SUMS: torch.from_numpy(exact())}
    widest, numbers, shares = sensitivity(taken.size, classes), entries(taken.size, classes), _shares(learner)
    scale = scale_of(noise_multiplier(settings), widest, shares)

    def draw() -> dict[str, np.ndarray[Any, Any]]:
        return {SUMS: noisy(exact(), scale), **taken.arrays()}

    # two sums with the same noise would differ by what a single site has sent
    about = {} if cohort is None else {"cohort": cohort.digest(learner.order.run, 0).hex()}
    asked = asked_of(learner, taken, multiplier_of_sum(scale, widest, shares, numbers), **about)
    budget = privacy.budget or cast(float, privacy.epsilon)
    once = None if cohort is None else "cohort"  # else peers' fresh noise could be set off against a replay
    ledger = ledger_of(settings, learner.client)
    released = ledger.release(asked, private.pixel_hashes(), budget, draw, once)
    return {SUMS: torch.from_numpy(np.array(released[SUMS]))}


def _shares(learner: Learner) -> int:
    """Return how many sites' noise the sum has at least, for one who knows that of the colluding ones.

    Raises
    ------
    SettingsError
        All others of the cohort may collude.
    """
    cohort, colluding = learner.order.cohort, learner.settings.privacy.colluding
    if cohort is None:
        return 1
    if len(cohort.names) <= colluding:
        raise SettingsError(
            f"privacy.colluding: {colluding} of {len(cohort.names)} sites leave nobody whose noise is secret"
        )
    return len(cohort.names) - colluding
