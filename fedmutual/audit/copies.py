"""Models that a server has, or can make itself: clients' weights, and copies distilled from predictions."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedmutual.audit.truth import RecordedTruth
from fedmutual.client.learner import derived_seed, new_optimizer
from fedmutual.data.images import ImageSet
from fedmutual.data.views import mixed_views
from fedmutual.learning.device import choose_device
from fedmutual.learning.evaluation import predict
from fedmutual.learning.training import Public, Trainer
from fedmutual.models.build import load_weights
from fedmutual.models.learnt import build_learnt
from fedmutual.results.received import Heard

STEPS = 600

Floats = NDArray[np.float32]
Scores = NDArray[np.float64]


def models_of(truth: RecordedTruth) -> tuple[dict[str, nn.Module], str]:
    """Return a model for each client, and what it is; none where nothing that was received makes one."""
    whole = _from_weights(truth)
    if whole:
        return whole, "weights"
    known = _predictions(truth)
    return {name: _copy(truth, name, parts) for name, parts in known.items()}, "copy"


def heard_from(truth: RecordedTruth, models: Mapping[str, nn.Module]) -> tuple[Heard, ...]:
    """Return what models predict of the public images, as if their clients had sent it."""
    images = truth.shared.public.images
    said = {name: predicted(truth, model, images) for name, model in models.items()}
    indices = np.arange(len(images), dtype=np.int32)
    return (Heard(truth.settings.rounds, indices, said, 1),) if said else ()


def predicted(truth: RecordedTruth, model: nn.Module, images: ImageSet) -> Floats:
    """Return a model's log-probabilities [n, C]."""
    size = truth.settings.evaluation.batch_size
    return np.asarray(predict(model, _inputs(images), max(size, 256)).numpy(), np.float32)


def _from_weights(truth: RecordedTruth) -> dict[str, nn.Module]:
    found = {}
    for name, weights in truth.received.weights.items():
        model = _start(truth)
        if model.state_dict().keys() != weights.keys():
            return {}  # some layers only, or what makes no model
        load_weights(model, {layer: torch.from_numpy(np.array(values)) for layer, values in weights.items()})
        found[name] = model
    return found


def _predictions(truth: RecordedTruth) -> dict[str, list[tuple[ImageSet, Floats]]]:
    """Return images and predictions by client: the newest of public images, and those of unseen ones."""
    settings, public = truth.settings, truth.shared.public.filled
    found: dict[str, list[tuple[ImageSet, Floats]]] = {}
    covered: dict[str, set[int]] = {}
    for heard in reversed(truth.received.rounds):
        for name, values in heard.predictions.items():
            known = covered.setdefault(name, set())
            new = np.array([i for i, own in enumerate(heard.indices) if int(own) not in known], np.int64)
            if len(new) == 0:
                continue
            shown = public.subset(heard.indices)
            if settings.public.views != "plain":
                shown = mixed_views(shown, settings.seed, heard.view)
            found.setdefault(name, []).append((shown.subset(new), values[new]))
            known |= {int(i) for i in heard.indices[new]}
    released = settings.privacy.epsilon is not None  # what a simulation measures besides leaves no site
    if truth.shared.unseen is not None and not released:
        for name, values in truth.received.unseen.items():
            found.setdefault(name, []).append((truth.shared.unseen, values))
    return found


def _copy(truth: RecordedTruth, name: str, parts: list[tuple[ImageSet, Floats]]) -> nn.Module:
    """Train a copy from the common start, which the server knows, to predict what the client predicted."""
    settings = truth.settings
    model = _start(truth)
    log_target = torch.from_numpy(np.concatenate([values for _, values in parts])).to(_device(model))
    public = Public(
        images=torch.cat([_inputs(images) for images, _ in parts]),
        log_target=log_target,
        entropies=-(log_target.exp() * log_target).sum(dim=1),
        labels=None,
        divergence="peer_own",
        temperature=1.0,
        weight=1.0,
    )
    seed = derived_seed(settings.seed, name, "audit")
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    optimizer = new_optimizer(settings, model)
    trainer = Trainer(model, optimizer, settings.precision, settings.train.batch_size, generator)
    trainer.train(STEPS, None, public)
    if settings.train.recompute_norm:
        trainer.recompute_norm_statistics(None, public)
    return model


def _start(truth: RecordedTruth) -> nn.Module:
    settings = truth.settings
    seed = derived_seed(settings.seed, "model", settings.model.target)
    model, _ = build_learnt(settings, truth.shared, seed)
    return model.to(choose_device(settings.device))


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _inputs(images: ImageSet) -> Tensor:
    """Return what the model takes of images, as a client does."""
    found = torch.from_numpy(np.array(images.seen))
    return found.permute(0, 3, 1, 2) if found.ndim == 4 else found


def odds_on(truth: RecordedTruth, models: Mapping[str, nn.Module]) -> dict[str, dict[str, Scores]]:
    """Return the log-odds of each site's private images: by site, then by model."""
    from fedmutual.audit.membership import log_odds

    return {
        client: {
            name: log_odds(predicted(truth, model, site.private), site.private.labels)
            for name, model in models.items()
        }
        for client, site in truth.sites.items()
    }
