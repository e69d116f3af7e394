"""The optimisers of local training, with a short start-up time."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


def make_optimizer(
    name: str,
    parameters: Iterable[nn.Parameter] | list[dict[str, Any]],
    learning_rate: float,
    momentum: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    """Return Adam, AdamW or SGD by name, for parameters or groups of them with their own ``lr``."""
    if name == "sgd":
        lean = _without_compiler(torch.optim.SGD)
        return lean(parameters, lr=learning_rate, momentum=momentum, weight_decay=weight_decay)
    chosen = _without_compiler({"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name])
    # eps of Keras, as in the paper's experiment
    return chosen(parameters, lr=learning_rate, weight_decay=weight_decay, eps=1e-7)


@functools.cache
def _without_compiler(kind: type[torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    """Return the same optimiser without its import of torch's compiler, which it imports only to disable.

    In deployment every order runs in its own process, and the import takes 1.2 s. Some methods check an
    attribute before the import (torch/_compile.py); the wrapper of ``step`` always imports
    (torch/optim/optimizer.py), around the same arithmetic without gradients.
    """
    for _, method in inspect.getmembers(torch.optim.Optimizer, inspect.isfunction):
        plain = getattr(method, "__wrapped__", None)
        if plain is not None and method.__code__.co_qualname.startswith("_disable_dynamo"):
            setattr(plain, "__dynamo_disable", plain)
    step = inspect.unwrap(kind.step)
    return type(kind.__name__, (kind,), {"step": torch.no_grad()(step)})
