"""Local training and the mutual step: one loop, whose steps take private images, public images or both."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedmutual.learning.divergence import as_logits, mutual_loss

NORM_BATCHES = 32


@dataclass(frozen=True)
class Private:
    """A client's own training images.

    Attributes
    ----------
    images : uint8 Tensor [n, 3, H, W]
    labels : int64 Tensor [n]
    log_prior : Tensor [C] or None
        Added to the logits in training only (logit adjustment, arXiv:2007.07314): the client's label
        skew is explained by the prior and does not leak into what it predicts and shares.
    """

    images: Tensor
    labels: Tensor
    log_prior: Tensor | None = None


@dataclass(frozen=True)
class Public:
    """Public images with what the client is taught on them.

    Attributes
    ----------
    images : uint8 Tensor [m, 3, H, W]
    log_target : Tensor [m, C] or None
        None: there are no peers to learn from, only labels. See :mod:`fedmutual.learning.divergence`.
    entropies : Tensor [m] or None
        Only for the peer || own direction.
    labels : int64 Tensor [m] or None
        The true labels, where they are known and used.
    weight : float
        Lambda, the weight of the mean KL.
    """

    images: Tensor
    log_target: Tensor | None
    entropies: Tensor | None
    labels: Tensor | None
    divergence: str
    temperature: float
    weight: float

    def class_shares(self, num_classes: int) -> Tensor:
        """Share of each class in what is taught, [C]: of the labels, or the mean target."""
        if self.labels is not None:
            return torch.bincount(self.labels, minlength=num_classes).float() / len(self.labels)
        assert self.log_target is not None
        return torch.softmax(self.log_target, dim=1).mean(dim=0)

    def loss(self, logits: Tensor, index: Tensor) -> Tensor:
        """``lambda T^2 KL`` on the samples ``index``, plus CE where they are labelled.

        The factor T^2 keeps the gradient's size independent of T (arXiv:1503.02531).
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
        ``fp32``, or ``bf16`` / ``fp16`` for autocast (fp16 with loss scaling).
    batch_size : int
    generator : torch.Generator
        Order of the samples; on the CPU.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        precision: str,
        batch_size: int,
        generator: torch.Generator,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.batch_size = batch_size
        self.generator = generator
        self.device = next(model.parameters()).device
        self._dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")

    def train(self, steps: int, private: Private | None, public: Public | None) -> float:
        """Take ``steps`` steps, each on a private and/or a public batch; return the mean loss in nats.

        Raises
        ------
        ValueError
            If there is nothing to train on, or batch normalisation would see a single image.
        """
        self._refuse_single_images(private, public)
        self.model.train()
        private_batches = self._batches(private)
        public_batches = self._batches(public)
        total = torch.zeros((), device=self.device)
        for _ in range(steps):
            total += self._step(private, next(private_batches), public, next(public_batches))
        return float(total) / max(steps, 1)

    @torch.no_grad()
    def recompute_norm_statistics(self, private: Private | None, public: Public | None) -> None:
        """Set the running statistics of batch normalisation to those of the weights as they are now.

        A running average lags behind weights that took a few hundred steps only (torchvision's MobileNetV3
        keeps 99 % of it a step), and evaluation mode then predicts nonsense. The statistics are averaged
        over up to ``NORM_BATCHES`` batches composed like those of training (Precise-BN, arXiv:2105.07576).
        """
        norms = [m for m in self.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        norms = [norm for norm in norms if norm.track_running_stats]
        if not norms:
            return
        momenta = [norm.momentum for norm in norms]
        self.model.eval()  # no dropout
        for norm in norms:
            norm.train()
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean over the batches
        mixed = torch.Generator().manual_seed(0)  # any order will do, but not class by class
        parts = [part.images for part in (private, public) if part is not None]
        orders = [torch.randperm(len(images), generator=mixed) for images in parts]
        batches = [torch.split(order, self.batch_size) for order in orders]
        for step in range(min(max(map(len, batches)), NORM_BATCHES)):
            chosen = [own[step % len(own)] for own in batches]
            images = torch.cat([part[index] for part, index in zip(parts, chosen, strict=True)])
            if len(images) > 1:  # the variance of one image is none
                with self._autocast():
                    self.model(to_input(images, self.device))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum

    def _refuse_single_images(self, private: Private | None, public: Public | None) -> None:
        parts = [part for part in (private, public) if part is not None and len(part.images)]
        smallest = sum(min(b - a for a, b in _cuts(len(part.images), self.batch_size)) for part in parts)
        normalises = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.model.modules())
        if smallest == 1 and normalises:
            raise ValueError(
                "batch normalisation cannot train on one image at a time: raise train.batch_size, give this "
                "client more images, or a model without batch normalisation (visionnet, squeezenet1_1)"
            )

    def steps_for(self, samples: int, epochs: int) -> int:
        """Steps that ``epochs`` passes over ``samples`` images take."""
        return epochs * len(_cuts(samples, self.batch_size))

    def _step(
        self, private: Private | None, private_index: Tensor, public: Public | None, public_index: Tensor
    ) -> Tensor:
        parts = [
            part.images[index]
            for part, index in ((private, private_index), (public, public_index))
            if part is not None
        ]
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            outputs = self.model(to_input(torch.cat(parts), self.device))
        logits = as_logits(outputs.float())
        loss = torch.zeros((), device=self.device)
        if private is not None:
            own = logits[: len(private_index)]
            corrected = own if private.log_prior is None else own + private.log_prior
            loss = loss + F.cross_entropy(corrected, private.labels[private_index])
        if public is not None:
            loss = loss + public.loss(logits[len(private_index) :], public_index)
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self._scaler.step(self.optimizer)
        self._scaler.update()
        return loss.detach()

    def _autocast(self) -> Any:
        if self._dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self._dtype)

    def _batches(self, part: Private | Public | None) -> Iterator[Tensor]:
        """Endless batches of positions: a fresh seeded permutation each epoch; empty ones for no part."""
        if part is None:
            yield from itertools.repeat(torch.zeros(0, dtype=torch.int64))
            return
        if len(part.images) == 0:
            raise ValueError(f"no {type(part).__name__.lower()} images to train on")
        while True:
            order = torch.randperm(len(part.images), generator=self.generator)
            for start, stop in _cuts(len(order), self.batch_size):
                yield order[start:stop]


def _cuts(samples: int, batch_size: int) -> list[tuple[int, int]]:
    """Batch boundaries; a last batch of one joins the one before it, since batch norm cannot train on one.

    >>> _cuts(65, 32)
    [(0, 32), (32, 65)]
    """
    starts = list(range(0, samples, batch_size))
    if len(starts) > 1 and samples - starts[-1] == 1:
        starts.pop()
    return list(itertools.pairwise([*starts, samples]))


def to_input(images: Tensor, device: torch.device) -> Tensor:
    """Scale uint8 images [n, 3, H, W] to float in [0, 1] on ``device``, in channels-last memory."""
    return (
        images.to(device, non_blocking=True)
        .to(torch.float32)
        .div_(255)
        .contiguous(memory_format=torch.channels_last)
    )


def log_prior(labels: Tensor, num_classes: int, taught: Tensor | None = None) -> Tensor:
    """Log of the class shares that a client trains on in a round, [C].

    Parameters
    ----------
    labels : int64 Tensor [n]
        Of its private images.
    num_classes : int
        C.
    taught : Tensor [C] or None
        Class shares of the public targets that it trains on at the same time; private and public batches
        are of one size, so both count half.

    Notes
    -----
    A class of neither part gets the least finite number. Added to the logits, that takes the class out of
    the softmax (restricted softmax): local data push it neither down nor up. A client with a single class
    so has no local gradient before it has targets, and does not drift into a constant.

    >>> log_prior(torch.tensor([0, 0, 1]), 2).exp()
    tensor([0.6667, 0.3333])
    """
    shares = torch.bincount(labels, minlength=num_classes).float() / len(labels)
    if taught is not None:
        shares = (shares + taught.to(shares.device)) / 2
    return shares.log().clamp(min=torch.finfo(torch.float32).min / 2)


def make_optimizer(
    name: str, parameters: Iterator[nn.Parameter], learning_rate: float, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Adam, AdamW or SGD by name."""
    if name == "sgd":
        lean = _without_compiler(torch.optim.SGD)
        return lean(parameters, lr=learning_rate, momentum=momentum, weight_decay=weight_decay)
    chosen = _without_compiler({"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name])
    # eps as in Keras, whose Adam the paper's experiment used
    return chosen(parameters, lr=learning_rate, weight_decay=weight_decay, eps=1e-7)


@functools.cache
def _without_compiler(kind: type[torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    """The same optimiser, which does not import torch's compiler only to tell it to stay away.

    In deployment every order has a process of its own, and that import takes 1.2 s of it. Some methods look
    an answer up in an attribute before they import anything (torch/_compile.py); ``step`` is wrapped in one
    that always does (torch/optim/optimizer.py), around the same arithmetic without gradients.
    """
    for _, method in inspect.getmembers(torch.optim.Optimizer, inspect.isfunction):
        plain = getattr(method, "__wrapped__", None)
        if plain is not None and method.__code__.co_qualname.startswith("_disable_dynamo"):
            setattr(plain, "__dynamo_disable", plain)  # noqa: B010 (torch reads it by this name)
    step = inspect.unwrap(kind.step)
    return type(kind.__name__, (kind,), {"step": torch.no_grad()(step)})
