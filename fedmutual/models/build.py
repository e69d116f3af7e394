"""Build a client's model from its settings."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from hydra.utils import get_object
from torch import Tensor, nn

from fedmutual.settings import ModelSettings


def build_model(
    settings: ModelSettings, num_classes: int, image_size: int, seed: int
) -> tuple[nn.Module, dict[str, Any]]:
    """Build ``settings.target(**arguments)`` with seeded initial weights; the global RNG is left as it was.

    Two classes get one output, the log-odds of class 1, where 1 is the model's own default, else two.
    ``image_size`` is passed where the model takes it.

    Returns
    -------
    model : nn.Module
    arguments : dict
        All arguments that were passed, which rebuild the architecture.

    Raises
    ------
    ValueError
        If the target cannot be imported or called, naming the setting.
    """
    try:
        factory = get_object(settings.target)
    except Exception as error:  # whatever importing foreign code may raise
        raise ValueError(f"model._target_: cannot import {settings.target}: {error}") from error
    known = inspect.signature(factory).parameters
    # a head of one output suits only models made for it: SqueezeNet's, say, cannot be negative
    one_output = num_classes == 2 and "num_classes" in known and known["num_classes"].default == 1
    arguments = {"num_classes": 1 if one_output else num_classes, **settings.arguments}
    if "image_size" in known:
        arguments.setdefault("image_size", image_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = factory(**arguments)
        except (TypeError, ValueError) as error:
            raise ValueError(f"model: {settings.target}({arguments}): {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"model._target_: {settings.target} makes no torch.nn.Module")
    return model, arguments


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load weights that were kept outside torch.

    ``state_dict`` carries the layers' format versions beside the weights, and files do not; a model that
    asks for them (MNASNet) would refuse its own weights. They are of this version.

    Raises
    ------
    RuntimeError
        If the weights are another architecture's.
    """
    versioned = OrderedDict(weights)
    versioned._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]
    model.load_state_dict(versioned)
