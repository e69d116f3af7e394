"""``strategy=speaker`` in the image application: noisy releases make a speaker, the clients listen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from fedmutual.data.partition import Stream
from fedmutual.learning.hog import CELLS
from fedmutual.learning.speaker import FeatureMap
from fedmutual.methods.base import Method, nothing_predicted
from fedmutual.methods.one_architecture import one_architecture
from fedmutual.methods.release import features_of, ledger_of, noise_multiplier
from fedmutual.methods.schedule import public_schedule
from fedmutual.settings import Settings, setting
from fedmutual.settings.pretrained import tunes_head
from fedmutual.strategies.listeners import AXES, WEIGHTS, Listeners
from fedmutual.strategies.own_speakers import OwnSpeakers
from fedmutual.strategies.speaker import Speaker

if TYPE_CHECKING:
    from torch import Tensor

    from fedmutual.client.learner import Answer, Learner
    from fedmutual.data.site import SharedData


@dataclass(kw_only=True)
class SpeakerSettings(Method):
    """Settings of ``strategy=speaker``."""

    features: str = setting(
        "what the speaker sees of an image: backbone: the features of model=pretrained model.tune=head, the "
        "same at all sites; hog: histograms of gradients and colours of the pixels, for which the sites' "
        "models may be any, each another one; hog_mirrored: their mean over an image and its mirror image, "
        "for tasks in which both are of one class",
        choices=("backbone", "hog", "hog_mirrored"),
    )
    axes: int | None = setting(
        "number of principal axes of the public images that the speaker sees; null: 45 times the square root "
        "of privacy.epsilon, at least 16 and at most 128",
        minimum=1,
        maximum=512,
    )
    ridge: float = setting(
        "penalty of the regression without noise, as a share of an axis' mean square", minimum=0
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
        """Reject a model that is no head on frozen features, and what would send more than one release."""
        if self.features == "backbone" and not tunes_head(settings.model):
            return (
                "strategy=speaker adds up frozen features: set model=pretrained model.tune=head, or, for any "
                "model, strategy.features=hog"
            )
        if self.features != "backbone" and getattr(settings.data, "image_size", 2 * CELLS) < 2 * CELLS:
            least = 2 * CELLS
            return f"data.image_size: strategy.features={self.features} needs images of {least} pixels a side"
        if settings.public.labelled:
            return "public.labelled: strategy=speaker teaches with the speaker's predictions: set it to false"
        if settings.privacy.secagg and _own(settings):
            return (
                "privacy.speaker: own does not go with privacy.secagg, which would save none of its noise: "
                "what each site's speaker says needs all of it. Set privacy.speaker=joint"
            )
        if settings.privacy.secagg and settings.rounds < 2:
            return (
                "rounds: the sums of strategy=speaker take one, and the listeners need more: set at least 2"
            )
        if isinstance(settings.partition, Stream):
            return "partition: stream gives new images in every round, strategy=speaker sums them once"
        return one_architecture(settings) if self.features == "backbone" else None

    def strategy(self, settings: Settings, shared: SharedData) -> Listeners:
        """Return the strategy of these settings."""
        public, unseen = features_of(self.features, shared.public.images), shared.unseen
        chosen = self.axes or default_axes(settings.privacy.epsilon)
        common = (len(shared.classes), FeatureMap.of_public(public, chosen), public)
        listeners: dict[str, Any] = {
            "schedule": public_schedule(settings, shared),
            "multiplier": noise_multiplier(settings),
            "kl_weight": self.kl_weight,
            "sharpness": self.sharpness,
            "unseen": None if unseen is None else (features_of(self.features, unseen), unseen.labels),
        }
        if _own(settings):
            return OwnSpeakers(*common, **listeners)
        colluding = settings.privacy.colluding if settings.privacy.secagg else None
        return Speaker(*common, colluding=colluding, ridge=self.ridge, **listeners)

    def sends(self, settings: Settings) -> list[str]:
        """Return the release of the chosen speaker."""
        what = (
            "scores of the public images by a small model made for it, and class counts"
            if _own(settings)
            else "sums of products of image features and labels"
        )
        return [f"{what}, once; with noise where privacy.epsilon is set"]

    def facts(self, settings: Settings, client: str) -> dict[str, Any]:
        """Return what the client's releases have spent, from its ledger."""
        spent = None if settings.privacy.epsilon is None else ledger_of(settings, client).spent()
        return {} if spent is None else {"privacy": vars(spent)}

    def learn(self, learner: Learner) -> Answer:
        """Send the release if it is asked for; train, with the speaker where it helps."""
        from fedmutual.methods.listening import listens

        order = learner.order
        if order.closing:
            return learner.close()
        given = {} if order.model is None else order.model.to_torch_state_dict()
        sent = self._released(learner, given) if AXES in given else {}
        if self.kl_weight > 0 and WEIGHTS in given and listens(learner, given, self.features):
            learner.mixed_training(learner.public(), self.public_epochs)
        else:
            learner.local_training()
        learner.measure()
        return replace(nothing_predicted(learner), sent=sent)

    def _released(self, learner: Learner, given: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if _own(learner.settings):
            from fedmutual.methods.own_speaker import own_speaker_said

            return own_speaker_said(learner, given, self.features, self.ridge)
        from fedmutual.methods.joint_speaker import released_sums

        return released_sums(learner, given, self.features)


def default_axes(epsilon: float | None) -> int:
    """Return the number of axes for an epsilon: more noise, fewer numbers to estimate.

    Chosen on splits of the photographs' training pool and of CIFAR-10's training images (docs/privacy.md).

    >>> [default_axes(epsilon) for epsilon in (0.1, 0.25, 0.5, 2, 8, None)]
    [16, 22, 32, 64, 127, 128]
    """
    return 128 if epsilon is None else round(min(max(45 * math.sqrt(epsilon), 16), 128))


def _own(settings: Settings) -> bool:
    return settings.privacy.speaker == "own"
