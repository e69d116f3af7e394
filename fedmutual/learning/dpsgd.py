"""Training with clipped gradients and noise (DP-SGD, arXiv:1607.00133), and its account: both are Opacus'.

A step takes each image with the same probability (Poisson sampling), clips the norm of each one's gradient,
adds them up, and adds Gaussian noise. The noise is floating-point numbers of a generator that is not made
for cryptography. Against the attacks of arXiv:2112.05307 Opacus adds several of them, but no proof covers
them. It is a baseline for what :mod:`fedmutual.learning.gaussian` proves.
"""

from __future__ import annotations

import functools
import secrets
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedmutual.learning.divergence import as_logits
from fedmutual.learning.placement import place, to_input
from fedmutual.learning.training import Private, Rate

REMEDY = "pip install 'fedmutual[privacy]'"
_ORDERS = [1 + x / 10 for x in range(1, 100)] + [*range(11, 64), 72, 80, 96, 128, 192, 256, 512, 1024]
_AT_ONCE = 64  # images whose gradients are in memory together


@dataclass(frozen=True)
class NoisySteps:
    """What the steps of DP-SGD are.

    Attributes
    ----------
    multiplier : float
        Standard deviation of the noise over ``max_grad_norm``.
    max_grad_norm : float
        Largest norm of an image's gradient; longer ones are scaled to it.
    sample_rate : float
        Probability of each image to be in a step.
    divisor : int
        The sum of a step is divided by it. It says nothing of the number of images.
    """

    multiplier: float
    max_grad_norm: float
    sample_rate: float
    divisor: int


def multiplier_for(epsilon: float, delta: float, sample_rate: float, steps: int) -> float:
    """Return the least noise with which so many steps prove (epsilon, delta).

    Returns
    -------
    float
        Standard deviation over the clipping norm.

    Examples
    --------
    >>> round(multiplier_for(2.0, 1e-3, 0.2, 180), 1)
    2.6
    """
    return _multiplier_for(float(epsilon), float(delta), float(sample_rate), int(steps))


@functools.cache
def _multiplier_for(epsilon: float, delta: float, sample_rate: float, steps: int) -> float:
    _library()
    from opacus.accountants.utils import get_noise_multiplier

    found: float = get_noise_multiplier(
        target_epsilon=epsilon,
        target_delta=delta,
        sample_rate=sample_rate,
        steps=steps,
        accountant="rdp",
        epsilon_tolerance=1e-3 * epsilon,
        alphas=_ORDERS,
    )
    return found


def epsilon_of(spent: Sequence[tuple[float, float, int]], delta: float) -> float:
    """Return the epsilon of several trainings of the same records, composed as Renyi divergences.

    Parameters
    ----------
    spent : Sequence[tuple[float, float, int]]
        Noise multiplier, sample rate and number of steps of each. A release with (discrete) Gaussian noise is
        one step of rate 1.
    delta : float
    """
    _library()
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = list(spent)
    return float(accountant.get_epsilon(delta=delta, alphas=_ORDERS))


def misfit(model: nn.Module) -> str | None:
    """Return which layer has no gradients of single images, with the remedy; None: all have.

    Examples
    --------
    >>> misfit(nn.Sequential(nn.Linear(3, 2)))
    >>> misfit(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))[:59]
    'model: layer 1 (BatchNorm1d) has no gradients of single ima'
    """
    _library()
    from opacus.grad_sample import GradSampleModule
    from opacus.validators import ModuleValidator

    was = model.training
    model.train()
    refused = [
        (name, module)
        for name, module in model.named_modules()
        if not list(module.children())
        and (ModuleValidator.validate(module, strict=False) or GradSampleModule.validate(module))
    ]
    model.train(was)
    if not refused:
        return None
    name, kind = refused[0][0], type(refused[0][1]).__name__
    return (
        f"model: layer {name} ({kind}) has no gradients of single images, which privacy.epsilon clips: "
        "choose a model without batch normalisation (visionnet, squeezenet1_1), or model=pretrained "
        "model.tune=head"
    )


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    private: Private,
    steps: int,
    noise: NoisySteps,
    rate: Rate | None = None,
    augment: Callable[[Tensor, int], Tensor] | None = None,
) -> tuple[float, int]:
    """Take ``steps`` steps of DP-SGD; nothing that is random in it has a seed.

    Parameters
    ----------
    private : Private
        Without prior and class weights, which depend on all images.

    Returns
    -------
    loss : float
        Mean over the images that were sampled, in nats; it is not private.
    images : int
        How many were sampled; this is not private either.
    """
    _library()
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    if private.log_prior is not None or private.class_weights is not None:
        raise ValueError("DP-SGD: a prior or class weights depend on all images")
    device = next(model.parameters()).device
    torch.manual_seed(secrets.randbits(63))  # dropout
    chance = torch.Generator().manual_seed(secrets.randbits(63))
    normal = torch.Generator(device).manual_seed(secrets.randbits(63))
    for module in model.modules():
        if getattr(module, "inplace", False):  # the hooks need what a layer has returned
            module.inplace = False  # type: ignore[assignment]
    model.train()
    hooked = GradSampleModule(model, loss_reduction="mean")
    noisy = DPOptimizer(
        optimizer,
        noise_multiplier=noise.multiplier,
        max_grad_norm=noise.max_grad_norm,
        expected_batch_size=noise.divisor,
        generator=normal,
        secure_mode=True,
    )
    placed = place(private.images, device)
    total, taken = 0.0, 0
    with _hooked(hooked):
        for step in range(steps):
            if rate is not None:
                for group in optimizer.param_groups:
                    group["lr"] = group.get("share", 1.0) * rate((step + 1) / steps)
            sampled = torch.nonzero(torch.rand(len(private.labels), generator=chance) < noise.sample_rate)[
                :, 0
            ]
            pieces = torch.split(sampled, _AT_ONCE)
            for number, index in enumerate(pieces):
                noisy.zero_grad()
                if len(index) == 0:
                    _no_gradients(model)
                else:
                    images = placed.take(index)
                    if augment is not None:
                        images = augment(images, step * (len(private.labels) + 1) + number)
                    loss = private.loss(as_logits(hooked(to_input(images, device)).float()), index.to(device))
                    loss.backward()  # type: ignore[no-untyped-call]
                    _finite(model)
                    total += float(loss.detach()) * len(index)
                    taken += len(index)
                noisy.signal_skip_step(do_skip=number < len(pieces) - 1)
                noisy.step()
        noisy.zero_grad()
    return total / max(taken, 1), taken


@contextmanager
def _hooked(module: Any) -> Iterator[None]:
    """Remove the hooks of Opacus at the end; images need no gradients, whatever torch remarks of it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook is firing")
        try:
            yield
        finally:
            module.to_standard_module()


def _no_gradients(model: nn.Module) -> None:
    """Nobody was sampled: the step is noise alone."""
    for parameter in model.parameters():
        parameter.grad_sample = parameter.new_zeros((0, *parameter.shape))  # type: ignore[attr-defined]


def _finite(model: nn.Module) -> None:
    """An image whose gradient is no number must not make the sum none."""
    for parameter in model.parameters():
        found: Any = getattr(parameter, "grad_sample", None)
        if found is not None:
            parameter.grad_sample = torch.nan_to_num(found, 0.0, 0.0, 0.0)  # type: ignore[attr-defined]


def _library() -> None:
    try:
        import opacus  # noqa: F401
    except ImportError as error:
        raise ImportError(f"privacy.epsilon with this strategy needs Opacus: {REMEDY}") from error
