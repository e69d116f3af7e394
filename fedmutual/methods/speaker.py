"""``strategy=speaker`` in the image application: private sums make a speaker, the clients listen."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np

from fedmutual.data.partition import Stream
from fedmutual.learning.gaussian import multiplier_for, multiplier_of_sum, noisy, scale_of
from fedmutual.learning.hog import CELLS, hog
from fedmutual.learning.speaker import FeatureMap, entries, sensitivity, sums
from fedmutual.methods.base import Method, nothing_predicted
from fedmutual.methods.one_architecture import one_architecture
from fedmutual.methods.schedule import public_schedule
from fedmutual.settings import Settings, SettingsError, setting
from fedmutual.settings.pretrained import tunes_head
from fedmutual.strategies.speaker import AXES, CENTRE, MAP, SUMS, WEIGHTS, Speaker

if TYPE_CHECKING:
    from torch import Tensor

    from fedmutual.client.budget import BudgetLedger
    from fedmutual.client.learner import Answer, Learner
    from fedmutual.data.images import ImageSet
    from fedmutual.data.site import SharedData

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class SpeakerSettings(Method):
    """Settings of ``strategy=speaker``."""

    features: str = setting(
        "what the speaker sees of an image: backbone: the features of model=pretrained model.tune=head, the "
        "same at all sites; hog: histograms of gradients and colours of the pixels, for which the sites' "
        "models may be any, each another one",
        choices=("backbone", "hog"),
    )
    axes: int | None = setting(
        "number of principal axes of the public images that the speaker sees; null: 45 times the square root "
        "of privacy.epsilon, at least 16 and at most 128",
        minimum=1,
        maximum=512,
    )
    ridge: float = setting(
        "penalty of the ridge regression without noise, as a share of an axis' mean square", minimum=0
    )
    sharpness: float = setting(
        "standard deviation of the speaker's scores (logits) over the public samples; its outputs, which are "
        "small where there is much noise, are scaled to it",
        above=0,
    )
    kl_weight: float = setting("lambda, weight of KL(speaker || own); 0: nobody listens", minimum=0)
    public_epochs: int = setting("minimum passes per round over the public samples", minimum=1)

    takes_dp: ClassVar[bool] = True
    takes_secagg: ClassVar[bool] = True
    loads_model: ClassVar[bool] = False

    def misfit(self, settings: Settings) -> str | None:
        """Reject a model that is no head on frozen features, and what would send more than the sums."""
        if self.features == "backbone" and not tunes_head(settings.model):
            return (
                "strategy=speaker adds up frozen features: set model=pretrained model.tune=head, or, for any "
                "model, strategy.features=hog"
            )
        if self.features == "hog" and getattr(settings.data, "image_size", 2 * CELLS) < 2 * CELLS:
            return f"data.image_size: strategy.features=hog needs images of {2 * CELLS} pixels a side"
        if settings.public.labelled:
            return "public.labelled: strategy=speaker teaches with the speaker's predictions: set it to false"
        if settings.privacy.secagg and settings.rounds < 2:
            return (
                "rounds: the sums of strategy=speaker take one, and the listeners need more: set at least 2"
            )
        if isinstance(settings.partition, Stream):
            return "partition: stream gives new images in every round, strategy=speaker sums them once"
        return one_architecture(settings) if self.features == "backbone" else None

    def strategy(self, settings: Settings, shared: SharedData) -> Speaker:
        """Return the strategy of these settings."""
        public, unseen = self.features_of(shared.public.images), shared.unseen
        chosen = self.axes or default_axes(settings.privacy.epsilon)
        return Speaker(
            len(shared.classes),
            FeatureMap.of_public(public, chosen),
            public,
            schedule=public_schedule(settings, shared),
            multiplier=noise_multiplier(settings),
            colluding=settings.privacy.colluding if settings.privacy.secagg else None,
            kl_weight=self.kl_weight,
            ridge=self.ridge,
            sharpness=self.sharpness,
            unseen=None if unseen is None else (self.features_of(unseen), unseen.labels),
        )

    def features_of(self, images: ImageSet, indices: Any = slice(None)) -> np.ndarray[Any, Any]:
        """Return the features [n, F] of images: of each from this image alone."""
        return images.seen[indices] if self.features == "backbone" else hog(images.images[indices])

    def sends(self) -> list[str]:
        """Return the sums."""
        return [
            "sums of products of image features and labels, once; with noise where privacy.epsilon is set"
        ]

    def facts(self, settings: Settings, client: str) -> dict[str, Any]:
        """Return what the client's releases have spent, from its ledger."""
        spent = None if settings.privacy.epsilon is None else _ledger(settings, client).spent()
        return {} if spent is None else {"privacy": vars(spent)}

    def learn(self, learner: Learner) -> Answer:
        """Send the noisy sums if they are asked for; train, with the speaker where it helps."""
        order = learner.order
        if order.closing:
            return learner.close()
        given = {} if order.model is None else order.model.to_torch_state_dict()
        sent: Mapping[str, Tensor] = {}
        if AXES in given:
            sent = _release(learner, given, self)
        if self.kl_weight > 0 and WEIGHTS in given and _listens(learner, given, self):
            learner.mixed_training(learner.public(), self.public_epochs)
        else:
            learner.local_training()
        learner.measure()
        return replace(nothing_predicted(learner), sent=sent)


def default_axes(epsilon: float | None) -> int:
    """Return the number of axes for an epsilon: more noise, fewer numbers to estimate.

    Chosen on splits of the photographs' training pool and of CIFAR-10's training images (docs/privacy.md).

    >>> [default_axes(epsilon) for epsilon in (0.1, 0.25, 0.5, 2, 8, None)]
    [16, 22, 32, 64, 127, 128]
    """
    return 128 if epsilon is None else round(min(max(45 * math.sqrt(epsilon), 16), 128))


def noise_multiplier(settings: Settings) -> float:
    """Return the noise of a release over its sensitivity; 0 without privacy."""
    privacy = settings.privacy
    return 0.0 if privacy.epsilon is None else multiplier_for(privacy.epsilon, privacy.delta)


def _release(learner: Learner, given: Mapping[str, Tensor], method: SpeakerSettings) -> Mapping[str, Tensor]:
    """Return the noisy sums over all of the client's images, from its ledger if they were made before.

    Of all: which are trained on, and which are held out, depends on how many there are, and so on each.
    """
    import torch

    from fedmutual.client.budget import Asked

    settings, site, private = learner.settings, learner.site, learner.site.private
    privacy = settings.privacy
    cohort = learner.order.cohort
    if privacy.secagg and (cohort is None or learner.client not in cohort.names):
        return {}  # nobody's masks would cancel this client's
    taken = _map(given, method.features_of(site.public.images, slice(1)).shape[1])
    classes = len(site.classes)
    gram = privacy.epsilon is None

    def exact() -> np.ndarray[Any, Any]:
        return sums(taken.unit(method.features_of(private)), private.labels, classes, gram=gram)

    if gram:
        return {SUMS: torch.from_numpy(exact())}
    widest, numbers, shares = sensitivity(taken.size, classes), entries(taken.size, classes), _shares(learner)
    scale = scale_of(noise_multiplier(settings), widest, shares)

    def draw() -> dict[str, np.ndarray[Any, Any]]:
        return {SUMS: noisy(exact(), scale), **taken.arrays()}

    about = {
        "map": taken.digest.tobytes().hex(),
        "classes": list(site.classes),
        "labels": hashlib.blake2b(private.labels.tobytes(), digest_size=16).hexdigest(),
    }
    if cohort is not None:  # two sums with the same noise would differ by what a single site has sent
        about["cohort"] = cohort.digest(learner.order.run, 0).hex()
    spends = multiplier_of_sum(scale, widest, shares, numbers)
    asked = Asked(spends, privacy.delta, f"pixels {private.images.shape[1:]}", about)
    _warn_of_delta(privacy.delta, len(private), learner.client)
    ledger = _ledger(settings, learner.client)
    budget = privacy.budget or cast(float, privacy.epsilon)
    once = None if cohort is None else "cohort"  # else peers' fresh noise could be set off against a replay
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


def _warn_of_delta(delta: float, images: int, client: str) -> None:
    if delta * images > 1:
        logger.warning(
            "%s: privacy.delta=%g is above 1 over the number of its images: it should be below it",
            client,
            delta,
        )


def _listens(learner: Learner, given: Mapping[str, Tensor], method: SpeakerSettings) -> bool:
    """Whether the speaker helps, or cannot be tried: the map is not known that its weights are of."""
    if learner.settings.privacy.epsilon is None:
        return True
    ledger = _ledger(learner.settings, learner.client)
    found = ledger.find(map=given[MAP].numpy().tobytes().hex())
    return found is None or helps(learner, found, given[WEIGHTS].numpy(), method)


def helps(
    learner: Learner,
    taken: Mapping[str, np.ndarray[Any, Any]],
    weights: np.ndarray[Any, Any],
    method: SpeakerSettings,
) -> bool:
    """Whether the speaker is no worse than this client's own model on its own validation images.

    A client that lacks a class among them cannot say, and listens. Nothing of the comparison leaves it.
    """
    from fedmutual.learning.evaluation import CHANCE, by_chance

    site, order = learner.site, learner.order
    indices = site.validation_indices(min(order.round, learner.settings.rounds))
    labels = site.private.labels[indices]
    if len(np.unique(labels)) < len(site.classes):
        return True
    phi = FeatureMap(taken[CENTRE], taken[AXES]).unit(method.features_of(site.private, indices))
    spoken = (phi @ weights).argmax(axis=1) == labels
    own = learner.on_private(indices).argmax(axis=1) == labels
    better = by_chance(int((own & ~spoken).sum()), int((spoken & ~own).sum())) < CHANCE
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


def _map(given: Mapping[str, Tensor], features: int) -> FeatureMap:
    """Return the map of an order, after checking that it is one of this client's features."""
    centre, axes = (given[name].numpy() for name in (CENTRE, AXES))
    fits = centre.shape == (features,) and axes.ndim == 2 and axes.shape[1] == features
    if not fits or not 1 <= len(axes) <= 512 or not np.isfinite(axes).all() or not np.isfinite(centre).all():
        raise SettingsError(
            f"model: the run's feature map does not fit {features} features: give this site the run's model"
        )
    return FeatureMap(centre, axes)


def _ledger(settings: Settings, client: str) -> BudgetLedger:
    from fedmutual.client.budget import BudgetLedger
    from fedmutual.results.directory import states_dir

    return BudgetLedger(states_dir(settings.state_dir), client)
