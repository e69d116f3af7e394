"""A pretrained backbone with a new head: what is frozen of it, and what learns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from fedmutual.backbones.network import Normalise, bare_network, divided


class Head(nn.Module):
    """A linear layer on features that are centred and scaled.

    Parameters
    ----------
    features : int
        F.
    num_classes : int
        C.

    Notes
    -----
    Input float [N, F], output logits [N, C]. It starts at 0: every class is as probable.
    """

    def __init__(self, features: int, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, num_classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.centre: Tensor
        self.spread: Tensor
        self.register_buffer("centre", torch.zeros(features))
        self.register_buffer("spread", torch.ones(features))

    def fit_scale(self, features: Tensor) -> None:
        """Take the centre and the spread of features, float [n, F]."""
        wide = features.double()
        self.centre = wide.mean(dim=0).float()
        # a feature that hardly moves must not be blown up on other images
        spread = wide.std(dim=0, correction=0)
        self.spread = (spread + 0.05 * spread.mean() + 1e-6).float()

    def forward(self, features: Tensor) -> Tensor:
        """Logits [N, C] of features [N, F]."""
        scores: Tensor = self.linear(self.scaled(features))
        return scores

    def scaled(self, features: Tensor) -> Tensor:
        """Return features [N, F] centred and scaled."""
        return (features - self.centre) / self.spread


class Pretrained(nn.Module):
    """A backbone and a head. The weights are random: they are loaded by who builds it.

    Parameters
    ----------
    num_classes : int
        C.
    architecture : str
        ``timm:<model>`` or ``torchvision:<model>``.
    image_size : int
        S, side length of the pictures in pixels.
    mean, std : 3 floats
        Of the normalisation.
    tune : str
        ``head``, ``last`` or ``all``: which part is :attr:`trunk`, frozen, and which is :attr:`top`.
    network : nn.Module or None
        The backbone's network, if it is built already.

    Attributes
    ----------
    trunk : nn.Sequential
        Pictures to what is cached: features [N, F], or maps [N, K, h, w].
    top : Top
        That to logits.

    Notes
    -----
    Input float [N, 3, S, S] in [0, 1], output logits [N, C].

    Raises
    ------
    ValueError
        There is no such architecture, or it cannot be divided so.
    """

    def __init__(
        self,
        num_classes: int,
        architecture: str,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        tune: str = "head",
        network: nn.Module | None = None,
    ) -> None:
        super().__init__()
        network = network or bare_network(architecture)
        frozen, tuned = divided(network, tune)
        features = _num_features(network, image_size)
        self.trunk = nn.Sequential(Normalise(mean, std), frozen)
        self.top = Top(tuned, Head(features, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, C] of pictures [N, 3, S, S] in [0, 1]."""
        return cast(Tensor, self.top(self.trunk(images)))


class Top(nn.Module):
    """What is tuned: stages of a backbone, or none, and the head."""

    def __init__(self, stages: nn.Module, head: Head) -> None:
        super().__init__()
        self.stages = stages
        self.head = head

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits [N, C] of what the trunk returns."""
        return cast(Tensor, self.head(self.stages(inputs)))


@torch.no_grad()
def _num_features(network: nn.Module, image_size: int) -> int:
    was = network.training
    network.eval()
    found = network(torch.zeros(1, 3, image_size, image_size))
    network.train(was)
    if not isinstance(found, Tensor) or found.ndim != 2:
        raise ValueError(f"model.backbone: {type(network).__name__} returns no features [N, F]")
    return int(found.shape[1])
