"""One client's work in one round: mutual step, local training, predictions, evaluation."""

from __future__ import annotations

import copy
import hashlib
import logging
import math
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from fedmutual.client.disclosure import VALIDATED
from fedmutual.client.transforms import transform_of
from fedmutual.data.images import ImageSet
from fedmutual.data.site import SharedData, SiteData
from fedmutual.data.views import mixed_views
from fedmutual.learning import dpsgd, evaluation
from fedmutual.learning.augmentation import Augmentation
from fedmutual.learning.divergence import mutual_loss
from fedmutual.learning.ema import MovingAverage
from fedmutual.learning.optimizers import make_optimizer
from fedmutual.learning.training import Private, Public, Rate, Trainer, balanced_weights, log_prior
from fedmutual.models.learnt import parameter_groups
from fedmutual.settings import Settings
from fedmutual.settings.pretrained import prior_smoothing
from fedmutual.wire.codec import FloatArray
from fedmutual.wire.metrics import TRAINED
from fedmutual.wire.orders import Order
from fedmutual.wire.records import Metrics
from fedmutual.wire.reports import Report

Weights = tuple[dict[str, Tensor], dict[str, Tensor] | None]  # the model's, and their EMA's if there is one

logger = logging.getLogger(__name__)


def derived_seed(*parts: object) -> int:
    """Return a 63-bit seed from any printable values; the same in every process."""
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


@dataclass(frozen=True)
class Answer:
    """A client's answer to an order, without its metrics.

    Attributes
    ----------
    predictions : float32 [n, C]
        Log-probabilities of the order's public samples.
    unseen_predictions : float32 [u, C] or None
    sent : Mapping[str, Tensor]
        What is sent in place of weights; empty: what :meth:`fedmutual.methods.base.Method.weights` says.
    """

    predictions: FloatArray
    unseen_predictions: FloatArray | None = None
    sent: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass
class Learner:
    """A client's model, optimiser and data, for one order.

    Attributes
    ----------
    model : nn.Module
        On the training device.
    optimizer : torch.optim.Optimizer
        For local and mixed training; a separate mutual step uses a new one.
    order : Order
    client : str
        Client name; with the run's seed and the round, it seeds the order of the samples.
    average : MovingAverage or None
        EMA of the model's weights; if present, it makes the predictions.
    """

    settings: Settings
    site: SiteData
    model: nn.Module
    optimizer: torch.optim.Optimizer
    order: Order
    client: str
    average: MovingAverage | None = None
    metrics: Metrics = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._known: dict[tuple[int, bytes], Tensor] = {}  # predictions of the current weights
        self._views: dict[int, ImageSet] = {}  # by round
        self._generator = torch.Generator().manual_seed(self._seed("samples"))
        torch.manual_seed(self._seed("dropout"))

    def remember(self, report: Report) -> None:
        """Reuse the previous round's predictions while the model is unchanged."""
        if report.round == self.order.round - 1 and len(report.predictions) == len(self.order.target_indices):
            key = self._key(*self._taught())
            self._known[key] = torch.from_numpy(report.predictions)

    def separate_mutual_step(self, public: Public, epochs: int) -> None:
        """Train on the previous round's public samples only, with a new optimiser (as in the paper).

        It starts at the full learning rate, regardless of the schedule.
        """
        trainer = self._trainer(new_optimizer(self.settings, self.model))
        steps = trainer.steps_for(len(public.images), epochs)
        self._measured_mutual(trainer, steps, None, public)

    def mixed_training(self, public: Public, public_epochs: int | None, min_steps: int = 1) -> None:
        """Train on a private and a public batch per step; the larger set gives the number of steps.

        Parameters
        ----------
        public : Public
        public_epochs : int or None
            Minimum passes over the public samples; None: as many public images a step as private ones, and
            no more steps for them.
        min_steps : int
            Minimum steps.
        """
        trainer = self._trainer(self.optimizer, step_rate(self.settings, self.order.round))
        self._mix(trainer, public, public_epochs, min_steps)

    def consolidate(
        self, public: Public, public_epochs: int | None, min_steps: int, rounds: int, weight: float
    ) -> None:
        """Train as in ``rounds`` rounds, with a new optimiser whose step size decays to a hundredth.

        Parameters
        ----------
        public : Public
        public_epochs, min_steps : int
            Minimum passes over the public samples and minimum steps in each of the rounds; see
            :meth:`mixed_training`.
        rounds : int
        weight : float
            Factor of the mean KL's weight.
        """
        public = replace(public, weight=weight * public.weight)
        trainer = self._trainer(new_optimizer(self.settings, self.model), self._settling)
        self._mix(trainer, public, public_epochs, min_steps, rounds)

    def alone_if_better(self, start: Weights, rounds: int) -> None:
        """Train from ``start`` on the private images alone; keep that model if it is better, else this one.

        Better: right on more of the client's own validation images than chance explains, and no worse in
        balanced accuracy. A client that lacks a class among them cannot say, and keeps this model.

        Parameters
        ----------
        start : Weights
        rounds : int
            Whose local training it does, with a new optimiser whose step size decays to a hundredth.
        """
        indices = self.site.validation_indices(min(self.order.round, self.settings.rounds))
        labels = torch.from_numpy(self.site.private.labels[indices])
        if len(np.unique(labels)) < len(self.site.classes):
            return
        together, said = self.weights(), self._predict(self.site.private, indices)
        self._load(start)
        private = self._private()
        trainer = self._trainer(new_optimizer(self.settings, self.model), self._settling)
        epochs = rounds * self.settings.train.local_epochs
        self._train(trainer, trainer.steps_for(len(private.images), epochs), private, None)
        alone = self._predict(self.site.private, indices)
        if evaluation.is_better(alone, said, labels):
            logger.info(
                "%s: keeps the model that it trained alone at the end: %.1f %% of its own validation images "
                "instead of %.1f %%",
                self.client,
                100 * evaluation.accuracy(alone, labels),
                100 * evaluation.accuracy(said, labels),
            )
        else:
            self._load(together)

    def weights(self) -> Weights:
        """Return a copy of the model's weights, and of their EMA's."""
        average = None if self.average is None else self.average.model.state_dict()
        return copy.deepcopy((self.model.state_dict(), average))

    def local_training(self) -> None:
        """Train on the private images only."""
        private = self._private()
        trainer = self._trainer(self.optimizer, step_rate(self.settings, self.order.round))
        steps = trainer.steps_for(len(private.images), self.settings.train.local_epochs)
        self.metrics["train-loss"] = self._train(trainer, steps, private, None)

    def noisy_training(self, noise: dpsgd.NoisySteps, steps: int) -> None:
        """Train on all private images by DP-SGD; the views, samples and noise have no seed.

        On all, without prior and class weights: these, and which images are held out, depend on all of them.
        """
        private = self.site.private
        gamma = self.settings.train.focal_gamma
        images = self._viewed(np.arange(len(private)), secrets.randbits(63))
        own = Private(images, torch.from_numpy(private.labels).to(self._device), focal_gamma=gamma)
        rate = step_rate(self.settings, self.order.round)
        augment = self._augmentation(secrets.randbits(63))
        self._known.clear()
        with _timed(self.metrics, "train-seconds"):
            loss, taken = dpsgd.train(self.model, self.optimizer, own, steps, noise, rate, augment)
        self.metrics["train-loss"] = loss
        self.metrics[TRAINED] = taken

    def report(self) -> Answer:
        """Predict the order's public samples in evaluation mode, and evaluate as the order asks."""
        predictions = self.predictions()
        self.measure()
        return Answer(predictions)

    def measure(self) -> None:
        """Evaluate the model on the client's held-out images, and on the unseen set if the order asks."""
        self.validate()
        if self.order.evaluate_unseen:
            self.evaluate_unseen(self.settings.evaluation.unseen_limit)

    def close(self) -> Answer:
        """Answer the closing order: full evaluation, on the whole unseen set."""
        self.validate()
        return Answer(np.zeros((0, len(self.order.classes)), np.float32), self.evaluate_unseen(None))

    def predictions(self) -> FloatArray:
        """Return log-probabilities of the order's public samples, [n, C], in evaluation mode."""
        return self._predict(*self._shown(self.order.round, self.order.indices)).numpy()

    def on_private(self, indices: np.ndarray) -> FloatArray:
        """Return log-probabilities [n, C] of private images, in evaluation mode. They stay at the client."""
        return self._predict(self.site.private, indices).numpy()

    def private(self) -> Private:
        """Return the round's private training images."""
        return self._private()

    def public(self) -> Public:
        """Return the order's target samples with their targets, and their labels if known."""
        order = self.order
        images, indices = self._taught()
        labels = None
        if self.settings.public.labelled:
            labels = torch.from_numpy(images.labels[indices]).to(self._device)
        entropies = order.target_entropies
        return Public(
            images=_images(images, indices),
            log_target=None
            if order.log_targets is None
            else torch.from_numpy(order.log_targets).to(self._device),
            entropies=None if entropies is None else torch.from_numpy(entropies).to(self._device),
            labels=labels,
            divergence=order.divergence,
            temperature=order.temperature,
            weight=order.kl_weight,
        )

    def validate(self) -> None:
        """Evaluate the model on the client's own held-out images."""
        indices = self.site.validation_indices(min(self.order.round, self.settings.rounds))
        if len(indices) == 0:
            return
        labels = torch.from_numpy(self.site.private.labels[indices])
        log_p = self._predict(self.site.private, indices)
        self._count_validated(indices)
        self.metrics["validation-loss"] = evaluation.cross_entropy(log_p, labels)
        self._add_quality("validation", log_p, labels)

    def evaluate_unseen(self, limit: int | None) -> FloatArray | None:
        """Evaluate the model on the unseen set, or on a seeded subset; return predictions [u, C]."""
        unseen = self.site.unseen
        if unseen is None:
            return None
        indices = np.arange(len(unseen))
        if limit is not None and limit < len(unseen):
            chosen = np.random.default_rng(derived_seed(self.settings.seed, "unseen"))
            indices = np.sort(chosen.choice(len(unseen), limit, replace=False))
        log_p = self._predict(unseen, indices)
        self._add_quality("unseen", log_p, torch.from_numpy(unseen.labels[indices]))
        return log_p.numpy()

    # -----------------------------------------------------------------------------------------------

    def _measured_mutual(
        self, trainer: Trainer, steps: int, private: Private | None, public: Public
    ) -> float:
        """Train; measure KL to the peers and validation metrics before and after."""
        self._measure_kl("kl-before", public)
        loss = self._train(trainer, steps, private, public)
        self._measure_kl("kl-after", public)
        indices = self.site.validation_indices(max(self.order.round - 1, 1))
        if len(indices):
            self._count_validated(indices)
            labels = torch.from_numpy(self.site.private.labels[indices])
            log_p = self._predict(self.site.private, indices)
            self.metrics["loss-after"] = evaluation.cross_entropy(log_p, labels)
            self.metrics["accuracy-after"] = evaluation.accuracy(log_p, labels)
        return loss

    def _train(self, trainer: Trainer, steps: int, private: Private | None, public: Public | None) -> float:
        self._known.clear()
        with _timed(self.metrics, "train-seconds"):
            loss = trainer.train(steps, private, public)
            if self.settings.train.recompute_norm:
                trainer.recompute_norm_statistics(private, public)
        trained = self.metrics.get(TRAINED, 0)
        assert isinstance(trained, int)
        self.metrics[TRAINED] = trained + trainer.images
        return loss

    def _mix(
        self, trainer: Trainer, public: Public, public_epochs: int | None, min_steps: int, rounds: int = 1
    ) -> None:
        """Take the mixed steps of ``rounds`` rounds; the larger set gives their number."""
        private = self._private(public)
        epochs = self.settings.train.local_epochs
        steps, public = trainer.mixed(len(private.images), public, epochs, public_epochs, min_steps)
        self.metrics["train-loss"] = self._measured_mutual(trainer, rounds * steps, private, public)

    def _load(self, weights: Weights) -> None:
        self._known.clear()
        self.model.load_state_dict(weights[0])
        if self.average is not None and weights[1] is not None:
            self.average.model.load_state_dict(weights[1])

    def _settling(self, done: float) -> float:
        return self.settings.optimizer.learning_rate * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)

    def _measure_kl(self, name: str, public: Public) -> None:
        if public.log_target is None:
            return
        log_p = self._predict(*self._taught())
        entropies = None if public.entropies is None else public.entropies.cpu()
        target = public.log_target.cpu()
        kl = mutual_loss(public.divergence, log_p, target, entropies, public.temperature)
        self.metrics[name] = float(kl)

    def _private(self, public: Public | None = None) -> Private:
        """Return the round's private images; in mixed training the prior covers private and public parts."""
        indices = self.site.train_indices(min(self.order.round, self.settings.rounds))
        labels = torch.from_numpy(self.site.private.labels[indices])
        prior = None
        if self.settings.train.prior_correction:
            taught = None if public is None else public.class_shares(len(self.site.classes))
            smoothing = prior_smoothing(self.settings)
            prior = log_prior(labels, len(self.site.classes), taught, smoothing).to(self._device)
        self.metrics["num-examples"] = len(indices)
        weights = None
        if self.settings.train.class_weights == "balanced":
            weights = balanced_weights(labels, len(self.site.classes)).to(self._device)
        gamma = self.settings.train.focal_gamma
        return Private(self._viewed(indices), labels.to(self._device), prior, weights, gamma)

    def _viewed(self, indices: np.ndarray, seed: int | None = None) -> Tensor:
        """Return the private images; where they have augmented views, one of each, new in every round."""
        private = self.site.private
        images = _images(private, indices)
        if private.augmented is None:
            return images
        views = private.augmented.array
        rng = np.random.default_rng(self._seed("views") if seed is None else seed)
        chosen = rng.integers(0, 1 + views.shape[1], len(indices))  # 0: the plain one
        other = np.flatnonzero(chosen)
        images[torch.from_numpy(other)] = _tensor(views[indices[other], chosen[other] - 1])
        return images

    def _taught(self) -> tuple[ImageSet, np.ndarray]:
        """Return the public images of the order's targets: the previous round's, in its views."""
        return self._shown(self.order.round - 1, self.order.target_indices)

    def _shown(self, round: int, indices: np.ndarray) -> tuple[ImageSet, np.ndarray]:
        """Return a round's views of the public samples ``indices``: images, and positions in them."""
        images = self.site.public.images
        if len(indices) and indices.max() >= len(images):
            images = self.site.public.filled
        if self.settings.public.views == "plain":
            return images, indices
        if round not in self._views:
            self._views[round] = mixed_views(images.subset(indices), self.settings.seed, round)
        return self._views[round], np.arange(len(indices))

    @property
    def predictor(self) -> nn.Module:
        """Return the network that predicts and is saved: the EMA if there is one, else the model."""
        return self.model if self.average is None else self.average.model

    def _trainer(self, optimizer: torch.optim.Optimizer, rate: Rate | None = None) -> Trainer:
        size, precision = self.settings.train.batch_size, self.settings.precision
        clip = self.settings.optimizer.clip_norm
        own = (self._generator, self.average, rate, clip, self._augmentation())
        return Trainer(self.model, optimizer, precision, size, *own)

    def _augmentation(self, seed: int | None = None) -> Augmentation | None:
        if self.settings.augment.name == "none":
            return None
        transform = transform_of(self.settings.augment, self.site.private.seen.shape[1])
        return Augmentation(transform, self._seed("augmentation") if seed is None else seed)

    def _predict(self, images: ImageSet, indices: np.ndarray) -> Tensor:
        """Return log-probabilities [n, C], cached while the model is unchanged."""
        key = self._key(images, indices)
        if key not in self._known:
            size = self.settings.evaluation.batch_size
            self._known[key] = evaluation.predict(self.predictor, _images(images, indices), size)
        return self._known[key]

    @staticmethod
    def _key(images: ImageSet, indices: np.ndarray) -> tuple[int, bytes]:
        return id(images), indices.astype(np.int64).tobytes()

    def _add_quality(self, split: str, log_p: Tensor, labels: Tensor) -> None:
        for name, value in evaluation.quality(log_p, labels, ranked=self.order.closing).items():
            if name != "balanced_accuracy":  # the mean recall, which the server computes itself
                self.metrics[f"{split}-{name}"] = value

    def _count_validated(self, indices: np.ndarray) -> None:
        """Note on how many images the round's validation figures are at least (see client/disclosure.py)."""
        known = self.metrics.get(VALIDATED, len(indices))
        assert isinstance(known, int)
        self.metrics[VALIDATED] = min(known, len(indices))

    def _seed(self, purpose: str) -> int:
        return derived_seed(self.settings.seed, self.client, self.order.round, purpose)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device


def warm_start(settings: Settings, site: SiteData | SharedData, model: nn.Module) -> None:
    """Train the common start on the shared labelled fold; each client computes the same weights itself.

    The seed does not depend on the client, so no weights are sent.
    """
    fold = site.public.warm_start
    if fold is None or settings.train.warm_start_epochs == 0:
        return
    device = next(model.parameters()).device
    seed = derived_seed(settings.seed, "warm start")
    torch.manual_seed(seed)
    private = Private(_images(fold, np.arange(len(fold))), torch.from_numpy(fold.labels).to(device))
    generator = torch.Generator().manual_seed(seed)
    optimizer = new_optimizer(settings, model)
    trainer = Trainer(model, optimizer, settings.precision, settings.train.batch_size, generator)
    trainer.train(trainer.steps_for(len(fold), settings.train.warm_start_epochs), private, None)


def new_optimizer(settings: Settings, model: nn.Module, round: int = 1) -> torch.optim.Optimizer:
    """Return the settings' optimiser for a round, without state."""
    chosen = settings.optimizer
    rate = learning_rate(settings, round)
    groups = parameter_groups(settings, model)
    for group in groups:
        group["lr"] = group["share"] * rate
    return make_optimizer(chosen.name, groups, rate, chosen.momentum, chosen.weight_decay)


def learning_rate(settings: Settings, round: int) -> float:
    """Return the step size of a round (from 1); the closing message uses the last round's."""
    highest = settings.optimizer.learning_rate
    if settings.optimizer.schedule != "cosine" or settings.rounds == 1:
        return highest
    done = min(round - 1, settings.rounds - 1) / (settings.rounds - 1)
    return highest * _cosine(done)


def step_rate(settings: Settings, round: int) -> Rate | None:
    """Return the step size of a round's training by the share of its steps that are done; None: it stays.

    The share of the run's steps follows from the round, so that a repeated or resumed round has the same.
    """
    chosen = settings.optimizer
    if chosen.schedule in ("constant", "cosine") and chosen.warmup == 0:
        return None
    base = learning_rate(settings, round)
    before = (min(round, settings.rounds) - 1) / settings.rounds

    def rate(done: float) -> float:
        share = before + done / settings.rounds
        factor = {"cosine_steps": _cosine, "decay": _decay}.get(chosen.schedule, lambda _: 1.0)(share)
        return base * factor * (min(share / chosen.warmup, 1.0) if chosen.warmup else 1.0)

    return rate


def _cosine(done: float) -> float:
    return 0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2


def _decay(done: float) -> float:
    return 1.0 if done <= 0.5 else 0.1 if done <= 0.75 else 0.01


def _images(images: ImageSet, indices: np.ndarray) -> Tensor:
    """Return what the model takes: mostly uint8 [n, 3, H, W], channels-last in memory as on disk."""
    return _tensor(images.seen[indices])


def _tensor(rows: np.ndarray) -> Tensor:
    found = torch.from_numpy(rows)
    return found.permute(0, 3, 1, 2) if found.ndim == 4 else found


class _timed:
    """Context manager that adds a block's seconds to a metric."""

    def __init__(self, metrics: Metrics, name: str) -> None:
        self._metrics, self._name = metrics, name

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        seconds = self._metrics.get(self._name, 0.0)
        assert isinstance(seconds, int | float)
        self._metrics[self._name] = seconds + time.perf_counter() - self._start
