"""Local training with DP-SGD (``privacy.epsilon`` of strategies that average weights), and its ledger."""

from __future__ import annotations

import hashlib
import logging
import math
from typing import TYPE_CHECKING, Any

from fedmutual.data.partition import Stream
from fedmutual.settings import Settings, SettingsError

if TYPE_CHECKING:
    from torch import nn

    from fedmutual.client.learner import Learner
    from fedmutual.learning.dpsgd import NoisySteps

logger = logging.getLogger(__name__)


def unproven(settings: Settings) -> str | None:
    """Return the setting that DP-SGD does not go with, key first."""
    if settings.privacy.epsilon is None:
        return None
    if isinstance(settings.partition, Stream):
        return "partition: stream gives new images in every round, privacy.epsilon accounts for the same ones"
    if settings.train.class_weights != "none":
        return "train.class_weights: balanced tells private class counts: set none with privacy.epsilon"
    if settings.precision not in ("fp32", "auto"):
        return "precision: gradients of single images are clipped in fp32: set precision=fp32"
    if settings.optimizer.clip_norm is not None:
        return "optimizer.clip_norm: privacy.max_grad_norm clips each image's gradient: set it to null"
    if settings.strategy.equal_data:
        return "strategy.equal_data: with privacy.epsilon only private images are trained on: set it to false"
    return None


def steps_of_round(settings: Settings) -> int:
    """Return the number of steps of a round: no number of images is in it."""
    return math.ceil(settings.train.local_epochs / settings.privacy.sample_rate)


def noise_of(settings: Settings) -> NoisySteps:
    """Return the noise that all rounds together need for privacy.epsilon."""
    from fedmutual.learning.dpsgd import NoisySteps, multiplier_for

    privacy = settings.privacy
    assert privacy.epsilon is not None
    steps = settings.rounds * steps_of_round(settings)
    multiplier = multiplier_for(privacy.epsilon, privacy.delta, privacy.sample_rate, steps)
    return NoisySteps(multiplier, privacy.max_grad_norm, privacy.sample_rate, settings.train.batch_size)


def require_gradients(model: nn.Module) -> None:
    """Refuse a model whose layers mix the images of a batch.

    Raises
    ------
    SettingsError
        It names the layer.
    """
    from fedmutual.learning.dpsgd import misfit

    problem = misfit(model)
    if problem is not None:
        raise SettingsError(problem)


def train_noisily(learner: Learner) -> None:
    """Train for the order's round with noise, on all private images; or load what that round has left before.

    All rounds are charged to the ledger before the first. A round's weights are on the disk before they are
    sent, and a round that has them is not trained again, whatever it is asked for.

    Raises
    ------
    BudgetError
        The budget is used up, or the round was trained and its weights are no longer kept.
    SettingsError
        The model has no gradients of single images, or there is no such round.
    """
    from fedmutual.client.budget import Asked
    from fedmutual.methods.release import ledger_of
    from fedmutual.models.build import load_weights

    settings, site, order = learner.settings, learner.site, learner.order
    privacy, private = settings.privacy, site.private
    assert privacy.epsilon is not None
    require_gradients(learner.model)
    if not 1 <= order.round <= settings.rounds:
        raise SettingsError(f"rounds: {settings.rounds} are accounted for, and this order is for another")
    noise, steps = noise_of(settings), steps_of_round(settings)
    about: dict[str, Any] = {
        "run": order.run,
        "classes": list(site.classes),
        "labels": hashlib.blake2b(private.labels.tobytes(), digest_size=16).hexdigest(),
        "max_grad_norm": noise.max_grad_norm,
        "rounds": settings.rounds,
        "steps": steps,
    }
    asked = Asked(
        noise.multiplier,
        privacy.delta,
        f"pixels {private.images.shape[1:]}",
        about,
        noise.sample_rate,
        settings.rounds * steps,
    )
    if privacy.delta * len(private) > 1 and order.round == 1:
        logger.warning(
            "%s: privacy.delta=%g is above 1 over the number of its images: it should be below it",
            learner.client,
            privacy.delta,
        )
    budget = privacy.budget or privacy.epsilon
    rounds = ledger_of(settings, learner.client).rounds(asked, private.pixel_hashes(), budget)
    before = rounds.find(order.round)
    if before is not None:
        import torch

        load_weights(
            learner.model, {name: torch.from_numpy(values.copy()) for name, values in before.items()}
        )
        return
    learner.noisy_training(noise, steps)
    rounds.keep(order.round, {k: v.detach().cpu().numpy() for k, v in learner.model.state_dict().items()})
