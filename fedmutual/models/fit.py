"""Try a new model on a batch of pictures, so that one that cannot take them is refused in words."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

LARGEST = 512  # pixels; sizes up to this one are tried for the remedy
_BATCH = 2

_fitting: set[str] = set()  # what has been tried in this process


def require_fit(model: nn.Module, target: str, arguments: dict[str, Any], image_size: int) -> None:
    """Refuse a model that cannot take pictures of a size; one of a kind is tried once a process.

    Raises
    ------
    ValueError
        With the model, the size, and the smallest size that it takes.
    """
    key = f"{target} {arguments} {image_size}"
    if key in _fitting:
        return
    error = _error(model, image_size)
    if error is None:
        _fitting.add(key)
        return
    what = f"model: {target} cannot take pictures of {image_size}x{image_size} pixels"
    said = str(error).splitlines()[0].rstrip(".")
    smallest = None if "image_size" in arguments else _smallest(model, image_size)
    remedy = (
        f"set data.image_size={smallest} or larger, or choose another model"
        if smallest is not None
        else f"it must take float [{_BATCH}, 3, {image_size}, {image_size}]; choose another model or size"
    )
    raise ValueError(f"{what} ({said}): {remedy}") from error


def _error(model: nn.Module, size: int) -> Exception | None:
    """Return what torch says of a batch of this size; None: the model takes it."""
    training = model.training
    model.eval()  # nothing of it changes
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model(torch.zeros(_BATCH, 3, size, size))
    except Exception as error:  # others are the model's own business: it must be trained first, say
        unfit = isinstance(error, RuntimeError) and not isinstance(error, NotImplementedError)
        return error if unfit else None
    finally:
        model.train(training)
    return None


def _smallest(model: nn.Module, size: int) -> int | None:
    """Return the smallest larger size that the model takes; None: none up to ``LARGEST``."""
    refused, taken = size, size
    while _error(model, taken) is not None:
        if taken >= LARGEST:
            return None
        refused, taken = taken, min(2 * taken, LARGEST)
    while taken - refused > 1:
        middle = (refused + taken) // 2
        refused, taken = (refused, middle) if _error(model, middle) is None else (middle, taken)
    return taken
