"""Build a client's model from its settings."""

from __future__ import annotations

import inspect
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import Any

import torch
from hydra.utils import get_object
from torch import Tensor, nn

from fedmutual.models.fit import require_fit
from fedmutual.settings import ModelSettings

_TENSORS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # of torch.load


def build_model(
    settings: ModelSettings, num_classes: int, image_size: int, seed: int
) -> tuple[nn.Module, dict[str, Any]]:
    """Build ``settings.target(**arguments)`` with seeded initial weights; the global RNG is unchanged.

    For two classes the model has one output (the log-odds of class 1) if 1 is its default, else two.
    ``image_size`` is passed if the model accepts it.

    Returns
    -------
    model : nn.Module
    arguments : dict
        All arguments passed; they rebuild the architecture.

    Raises
    ------
    ValueError
        The target cannot be imported or called, or the model cannot take such pictures; the message names the
        setting.
    """
    try:
        factory = get_object(settings.target)
    except Exception as error:  # importing foreign code can raise anything
        raise ValueError(f"model._target_: cannot import {settings.target}: {error}") from error
    known = inspect.signature(factory).parameters
    # not every model works with one output: SqueezeNet's, for example, cannot be negative
    one_output = num_classes == 2 and "num_classes" in known and known["num_classes"].default == 1
    arguments = {"num_classes": 1 if one_output else num_classes, **settings.arguments}
    if "image_size" in known:
        arguments.setdefault("image_size", image_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            with _tensors_only():
                model = factory(**arguments)
        except (TypeError, ValueError, UnpicklingError) as error:
            raise ValueError(f"model: {settings.target}({arguments}): {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"model._target_: {settings.target} does not create a torch.nn.Module")
    require_fit(model, settings.target, arguments, image_size)
    return model, arguments


@contextmanager
def _tensors_only() -> Iterator[None]:
    """Let ``torch.load`` read tensors only, whoever calls it: torchvision would unpickle its weights."""
    if _TENSORS_ONLY in os.environ:
        yield
        return
    os.environ[_TENSORS_ONLY] = "1"
    try:
        yield
    finally:
        os.environ.pop(_TENSORS_ONLY, None)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load weights from files or messages, which lack torch's format versions.

    ``state_dict`` also holds the layers' format versions; a model that checks them (MNASNet) would reject its
    own weights without them. The current versions are used.

    Raises
    ------
    RuntimeError
        The weights are of another architecture.
    """
    versioned = OrderedDict(weights)
    versioned._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]
    model.load_state_dict(versioned)
