"""The proximal term of FedProx (arXiv:1812.06127) and FedAsync (arXiv:1903.03934)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def proximal(optimizer: torch.optim.Optimizer, rho: float) -> Iterator[None]:
    """Minimise ``f(x) + rho / 2 ||x - x_0||^2`` in this block, where x_0 are the weights at its start.

    The term's gradient ``rho (x - x_0)`` is added before every step, after fp16 gradients are unscaled. The
    measured loss is f alone.
    """
    if rho == 0:
        yield
        return
    start = [(p, p.detach().clone()) for group in optimizer.param_groups for p in group["params"]]

    def pull(*_: Any) -> None:
        with torch.no_grad():
            for parameter, anchor in start:
                if parameter.grad is not None:
                    parameter.grad.add_(parameter - anchor, alpha=rho)

    hook = optimizer.register_step_pre_hook(pull)
    try:
        yield
    finally:
        hook.remove()
