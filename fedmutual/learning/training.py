"""Local training and the mutual step: one loop over private images, public images or both."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedmutual.learning.divergence import as_logits, mutual_loss
from fedmutual.learning.ema import MovingAverage
from fedmutual.learning.placement import Placed, place, to_input
from fedmutual.learning.precision import resolve

NORM_BATCHES = 32
_MOST_PIECES = 4096  # micro-batches of a step, for the numbers of augmented ones
Part = TypeVar("Part")
Rate = Callable[[float], float]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Private:
    """A client's own training images.

    Attributes
    ----------
    images : uint8 Tensor [n, 3, H, W]
    labels : int64 Tensor [n]
    log_prior : Tensor [C] or None
        Added to the logits in training only (logit adjustment, arXiv:2007.07314). The prior absorbs the
        client's label skew, so that it does not leak into the shared predictions.
    class_weights : Tensor [C] or None
        See :func:`balanced_weights`.
    focal_gamma : float
        See :func:`focal_loss`; 0: cross entropy.
    """

    images: Tensor
    labels: Tensor
    log_prior: Tensor | None = None
    class_weights: Tensor | None = None
    focal_gamma: float = 0.0

    def loss(self, logits: Tensor, index: Tensor) -> Tensor:
        """Return the mean loss of the samples ``index``, in nats: cross entropy, weighted or focal."""
        if self.log_prior is not None:
            logits = logits + self.log_prior
        if self.focal_gamma == 0:
            return F.cross_entropy(logits, self.labels[index], self.class_weights)
        return focal_loss(logits, self.labels[index], self.focal_gamma, self.class_weights)


@dataclass(frozen=True)
class Public:
    """Public images with their targets.

    Attributes
    ----------
    images : uint8 Tensor [m, 3, H, W]
    log_target : Tensor [m, C] or None
        None: labels only, no peers. See :mod:`fedmutual.learning.divergence`.
    entropies : Tensor [m] or None
        Only for the peer || own direction.
    labels : int64 Tensor [m] or None
        The true labels, if known and used.
    weight : float
        Lambda, the weight of the mean KL.
    batch_size : int or None
        Images a step; None: the trainer's.
    """

    images: Tensor
    log_target: Tensor | None
    entropies: Tensor | None
    labels: Tensor | None
    divergence: str
    temperature: float
    weight: float
    batch_size: int | None = None

    def sharpened(self, power: float) -> Public:
        """Return it with each target as ``q ** power / sum(q ** power)``, whose entropy is lower above 1."""
        if self.log_target is None or power == 1:
            return self
        target = torch.log_softmax(power * self.log_target, dim=1)
        entropies = None if self.entropies is None else -(target.exp() * target).sum(dim=1)
        return replace(self, log_target=target, entropies=entropies)

    def class_shares(self, num_classes: int) -> Tensor:
        """Return the class shares of the targets, [C]: of the labels, or of the mean target."""
        if self.labels is not None:
            return torch.bincount(self.labels, minlength=num_classes).float() / len(self.labels)
        assert self.log_target is not None
        return torch.softmax(self.log_target, dim=1).mean(dim=0)

    def loss(self, logits: Tensor, index: Tensor) -> Tensor:
        """Return ``lambda T^2 KL`` on the samples ``index``, plus CE if they are labelled.

        The factor T^2 keeps the gradient's scale independent of T (arXiv:1503.02531).
        """
        loss = logits.new_zeros(())
        if self.log_target is not None:
            entropies = None if self.entropies is None else self.entropies[index]
            target = self.log_target[index]
            divergence = mutual_loss(self.divergence, logits, target, entropies, self.temperature)
            loss = loss + self.weight * self.temperature**2 * divergence
        if self.labels is not None:
            loss = loss + F.cross_entropy(logits, self.labels[index])
        return loss


class Trainer:
    """A model, its optimiser and the arithmetic they run in.

    Parameters
    ----------
    model : nn.Module
        Already on ``device``.
    optimizer : torch.optim.Optimizer
    precision : str
        ``fp32``, or ``bf16`` / ``fp16`` for autocast (fp16 with loss scaling); ``auto``: see
        :func:`fedmutual.learning.precision.resolve`.
    batch_size : int
    generator : torch.Generator
        Order of the samples; on the CPU.
    average : MovingAverage or None
        Updated after every step.
    rate : callable or None
        Returns the step size for the share of this training's steps that are done; None: it stays. A group
        of parameters takes its own ``share`` of it, if it has one.
    clip_norm : float or None
        Largest norm of a gradient.
    augment : callable or None
        Changes a batch of private images, uint8 [n, 3, H, W], given its number.

    Attributes
    ----------
    images : int
        Number of images trained on so far; an image counts every time.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        precision: str,
        batch_size: int,
        generator: torch.Generator,
        average: MovingAverage | None = None,
        rate: Rate | None = None,
        clip_norm: float | None = None,
        augment: Callable[[Tensor, int], Tensor] | None = None,
    ) -> None:
        self.model = model
        self._rate = rate
        self._clip_norm = clip_norm
        self._augment = augment
        self._steps = 0  # taken so far
        self.images = 0
        self.average = average
        self.optimizer = optimizer
        self.batch_size = batch_size
        self.generator = generator
        self.device = next(model.parameters()).device
        precision = resolve(precision, self.device)
        self._dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self._placed: dict[int, Placed] = {}
        self._pieces = 1  # micro-batches per step; increased when a batch exceeds the device's memory

    def train(self, steps: int, private: Private | None, public: Public | None) -> float:
        """Take ``steps`` steps, each on a private and/or a public batch; return the mean loss in nats.

        Raises
        ------
        ValueError
            No training images, or batches of one image with batch normalisation.
        """
        self._refuse_single_images(private, public)
        self.model.train()
        private_batches = self._batches(private)
        public_batches = self._batches(public)
        self._placed = {id(p): place(p.images, self.device) for p in (private, public) if p is not None}
        total = torch.zeros((), device=self.device)
        for step in range(steps):
            if self._rate is not None:
                for group in self.optimizer.param_groups:
                    group["lr"] = group.get("share", 1.0) * self._rate((step + 1) / steps)
            own, shared = next(private_batches), next(public_batches)
            total += self._step(private, own, public, shared)
            self.images += len(own) + len(shared)
        self._placed.clear()
        return float(total) / max(steps, 1)

    @torch.no_grad()
    def recompute_norm_statistics(self, private: Private | None, public: Public | None) -> None:
        """Recompute the batch-norm statistics for the weights that predict (Precise-BN, arXiv:2105.07576).

        After a few hundred steps the running average still lags behind the weights (torchvision's MobileNetV3
        keeps 99 % of it per step), and predictions in evaluation mode are useless. The statistics are
        averaged over up to ``NORM_BATCHES`` batches, composed as in training.
        """
        predictor = self.model if self.average is None else self.average.model
        norms = [norm for norm in _norms(predictor) if norm.track_running_stats]
        if not norms:
            return
        momenta = [norm.momentum for norm in norms]
        predictor.eval()  # no dropout
        for norm in norms:
            norm.train()
            norm.reset_running_stats()
            norm.momentum = None  # plain mean over the batches
        mixed = torch.Generator().manual_seed(0)  # any order works except one sorted by class
        parts = [part.images for part in (private, public) if part is not None]
        orders = [torch.randperm(len(images), generator=mixed) for images in parts]
        sizes = [self._batch_size(part) for part in (private, public) if part is not None]
        batches = [torch.split(order, size) for order, size in zip(orders, sizes, strict=True)]
        for step in range(min(max(map(len, batches)), NORM_BATCHES)):
            chosen = [own[step % len(own)] for own in batches]
            images = torch.cat([part[index] for part, index in zip(parts, chosen, strict=True)])
            if len(images) > 1:  # one image has no variance
                with self._autocast():
                    predictor(to_input(images, self.device))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum

    def _refuse_single_images(self, private: Private | None, public: Public | None) -> None:
        parts = [part for part in (private, public) if part is not None and len(part.images)]
        smallest = sum(
            min(b - a for a, b in _cuts(len(part.images), self._batch_size(part))) for part in parts
        )
        if smallest == 1 and _norms(self.model):
            raise ValueError(
                "batch normalisation cannot train on one image at a time: raise train.batch_size, give this "
                "client more images, or use a model without batch normalisation (visionnet, squeezenet1_1)"
            )

    def steps_for(self, samples: int, epochs: int) -> int:
        """Return the number of steps in ``epochs`` passes over ``samples`` images."""
        return epochs * len(_cuts(samples, self.batch_size))

    def mixed(
        self, private: int, public: Public, local_epochs: int, public_epochs: int | None, min_steps: int
    ) -> tuple[int, Public]:
        """Return the steps of a round of mixed training, and the public samples with the size of their batch.

        Parameters
        ----------
        private : int
            Number of private images.
        public_epochs : int or None
            Minimum passes over the public samples; None: as many public images a step as private ones, and
            no more steps for them.
        """
        steps = max(min_steps, self.steps_for(private, local_epochs))
        if public_epochs is None:
            return steps, replace(public, batch_size=self.mean_batch(private))
        return max(steps, self.steps_for(len(public.images), public_epochs)), public

    def mean_batch(self, samples: int) -> int:
        """Return the mean size of a batch of ``samples`` images, rounded up; at least 2 for batch norm."""
        batches = len(_cuts(samples, self.batch_size))
        return min(max(math.ceil(samples / max(batches, 1)), 2), self.batch_size)

    def _batch_size(self, part: Private | Public) -> int:
        own = part.batch_size if isinstance(part, Public) else None
        return own or self.batch_size

    def _step(
        self, private: Private | None, private_index: Tensor, public: Public | None, public_index: Tensor
    ) -> Tensor:
        """Take one optimiser step; if memory runs out, double the number of micro-batches from now on.

        The micro-batches' gradients are summed, weighted by their share of the batch. The sum equals the
        whole batch's gradient up to rounding, unless the model normalises over the batch.
        """
        own = _Half(private, self._placed.get(id(private)), private_index)
        shared = _Half(public, self._placed.get(id(public)), public_index)
        while True:
            self.optimizer.zero_grad(set_to_none=True)
            try:
                loss = self._gradients(own, shared)
                break
            except torch.OutOfMemoryError as error:
                problem = str(error).splitlines()[0]
            # outside the handler, whose traceback keeps the activations alive
            self._halve(max(len(private_index), len(public_index)), problem)
        if self._clip_norm is not None:
            self._scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self._clip_norm)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self._steps += 1
        if self.average is not None:
            self.average.update(self.model)
        return loss

    def _gradients(self, private: _Half[Private], public: _Half[Public]) -> Tensor:
        total = torch.zeros((), device=self.device)
        pieces = zip(private.cut(self._pieces), public.cut(self._pieces), strict=True)
        for piece, (own, shared) in enumerate(pieces):
            images = [half.images() for half in (own, shared) if half.part is not None and len(half.index)]
            if self._augment is not None and own.part is not None and len(own.index):
                images[0] = self._augment(images[0], self._steps * _MOST_PIECES + piece)
            if not images:
                continue
            with self._autocast():
                outputs = self.model(to_input(torch.cat(images), self.device))
            logits = as_logits(outputs.float())
            loss = torch.zeros((), device=self.device)
            if own.part is not None and len(own.index):
                loss = loss + own.share * own.part.loss(logits[: len(own.index)], own.index)
            if shared.part is not None and len(shared.index):
                loss = loss + shared.share * shared.part.loss(logits[len(own.index) :], shared.index)
            self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total

    def _halve(self, largest: int, problem: str) -> None:
        """Double the number of micro-batches, with a warning."""
        if self._pieces >= largest:
            raise RuntimeError(
                f"{self.device} has no memory for a single image of a batch ({problem}): choose a smaller "
                "model or data.image_size, or device=cpu for this node"
            )
        self._pieces *= 2
        logger.warning(
            "%s is out of memory: every batch is now split into %d micro-batches with summed gradients%s",
            self.device,
            self._pieces,
            " (batch normalisation now uses one micro-batch at a time: results differ)"
            if _norms(self.model)
            else "",
        )
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _autocast(self) -> Any:
        if self._dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self._dtype)

    def _batches(self, part: Private | Public | None) -> Iterator[Tensor]:
        """Yield batches of positions without end, newly shuffled each epoch; empty if ``part`` is None."""
        if part is None:
            yield from itertools.repeat(torch.zeros(0, dtype=torch.int64))
            return
        if len(part.images) == 0:
            raise ValueError(f"no {type(part).__name__.lower()} images to train on")
        while True:
            order = torch.randperm(len(part.images), generator=self.generator)
            for start, stop in _cuts(len(order), self._batch_size(part)):
                yield order[start:stop]


@dataclass(frozen=True)
class _Half(Generic[Part]):
    """The private or the public half of a batch, or a micro-batch of it, with its share of the half."""

    part: Part | None
    placed: Placed | None
    index: Tensor
    share: float = 1.0

    def cut(self, pieces: int) -> list[_Half[Part]]:
        """Split into micro-batches of about equal size; some are empty if there are few images."""
        if pieces == 1:
            return [self]
        parts = torch.tensor_split(self.index, pieces)
        total = max(len(self.index), 1)
        return [_Half(self.part, self.placed, index, len(index) / total) for index in parts]

    def images(self) -> Tensor:
        """Return its images, uint8 [n, 3, H, W], on the device (the copy may still run)."""
        assert self.placed is not None
        return self.placed.take(self.index)


def _norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Return the layers that normalise over a batch."""
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def _cuts(samples: int, batch_size: int) -> list[tuple[int, int]]:
    """Return batch boundaries; a last batch of one image joins the previous one, as batch norm needs two.

    >>> _cuts(65, 32)
    [(0, 32), (32, 65)]
    """
    starts = list(range(0, samples, batch_size))
    if len(starts) > 1 and samples - starts[-1] == 1:
        starts.pop()
    return list(itertools.pairwise([*starts, samples]))


def focal_loss(logits: Tensor, labels: Tensor, gamma: float, weights: Tensor | None = None) -> Tensor:
    """Return the mean of ``(1 - p)^gamma (-log p)`` over samples, in nats (arXiv:1708.02002).

    Parameters
    ----------
    logits : Tensor [n, C]
    labels : int64 Tensor [n]
    gamma : float
        0: cross entropy.
    weights : Tensor [C] or None
        Weights of the classes; the mean is weighted as in torch's cross entropy.
    """
    log_p = F.log_softmax(logits, dim=1).gather(1, labels[:, None])[:, 0]
    losses = (1 - log_p.exp()).clamp(min=1e-6) ** gamma * -log_p
    if weights is None:
        return losses.mean()
    chosen = weights[labels]
    return (chosen * losses).sum() / chosen.sum()


def balanced_weights(labels: Tensor, num_classes: int) -> Tensor:
    """Return weights with which every class of the labels counts the same, [C]; 0 for one without labels.

    >>> balanced_weights(torch.tensor([0, 0, 0, 1]), 3)
    tensor([0.6667, 2.0000, 0.0000])
    """
    counts = torch.bincount(labels, minlength=num_classes).float()
    weights = counts.sum() / (counts * (counts > 0).sum())
    return weights.where(counts > 0, 0.0)


def log_prior(
    labels: Tensor, num_classes: int, taught: Tensor | None = None, smoothing: float = 0.0
) -> Tensor:
    """Return the log of the class shares of a client's training data in a round, [C].

    Parameters
    ----------
    labels : int64 Tensor [n]
        Labels of its private images.
    num_classes : int
        C.
    taught : Tensor [C] or None
        Class shares of the public targets in mixed training; private and public batches have the same size,
        so each counts half.
    smoothing : float
        Added to the count of each class.

    Notes
    -----
    Without smoothing, a class in neither part gets the smallest finite number. Added to the logits, it takes
    the class out of the softmax (restricted softmax), so local data do not change its logit. A client with a
    single class therefore has no local gradient before it has targets, and does not collapse to a constant.

    >>> log_prior(torch.tensor([0, 0, 1]), 2).exp()
    tensor([0.6667, 0.3333])
    """
    counts = torch.bincount(labels, minlength=num_classes).float() + smoothing
    shares = counts / counts.sum()
    if taught is not None:
        shares = (shares + taught.to(shares.device)) / 2
    return shares.log().clamp(min=torch.finfo(torch.float32).min / 2)
