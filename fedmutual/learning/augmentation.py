"""Random changes of training images, seeded by the step that sees them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Augmentation:
    """Transforms of a client's training images in a round.

    The random numbers are torch's, seeded for each batch: a batch that is computed again, after a lack of
    memory or a kill, is the same one. Nothing else that draws from torch's generators is disturbed, so a
    network with dropout learns alike with any transforms.

    Parameters
    ----------
    transform : callable
        From one image to one image, both uint8 Tensor [3, H, W].
    seed : int
        Of the client and round.
    """

    def __init__(self, transform: Callable[[Tensor], Tensor], seed: int) -> None:
        self._transform = transform
        self._seed = seed

    def __call__(self, images: Tensor, batch: int) -> Tensor:
        """Return changed images of a batch, uint8 [n, 3, H, W], in the same memory format.

        Raises
        ------
        ValueError
            The transforms change the images' shape or type.
        """
        devices = [images.device] if images.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed((self._seed + batch) % 2**63)
            changed = torch.stack([self._transform(image) for image in images])
        if changed.shape != images.shape or changed.dtype != images.dtype:
            raise ValueError(
                f"augment.transforms: an image is {changed.dtype} {list(changed.shape[1:])} after them, not "
                f"{images.dtype} {list(images.shape[1:])}: end with a transform that restores size and type"
            )
        return changed.contiguous(memory_format=torch.channels_last)
