"""The transforms that ``augment`` names, from torchvision.transforms.v2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fedmutual.settings import AugmentSettings


def transform_of(settings: AugmentSettings, size: int) -> Callable[[Tensor], Tensor]:
    """Return the transform of one image, uint8 [3, size, size]; not for ``none``.

    Raises
    ------
    ValueError
        A transform cannot be made; the message names it.
    """
    from torchvision.transforms import v2  # takes seconds, and most runs need none

    if settings.name == "custom":
        made: list[Any] = [_made(values) for values in settings.transforms]
    else:
        made = [v2.RandomHorizontalFlip(), v2.RandomCrop(size, padding=size // 8, padding_mode="reflect")]
        if settings.name == "randaugment":
            made.append(v2.RandAugment())
    together: Callable[[Tensor], Tensor] = v2.Compose(made)
    return together


def _made(values: Any) -> Any:
    from hydra.utils import instantiate

    try:
        return instantiate(values)
    except Exception as error:  # whatever a constructor raises
        raise ValueError(f"augment.transforms: {values} cannot be made: {error}") from error
