"""EMA of a client's weights over its steps: a better teacher than the newest weights."""

from __future__ import annotations

import copy

import torch
from torch import nn


class MovingAverage:
    """Exponential moving average of a model's weights (Mean Teacher, arXiv:1703.01780).

    Parameters
    ----------
    model : nn.Module
        It is copied. Buffers, such as batch-norm statistics, follow the model without averaging.
    decay : float
        Decay per step. Step n uses at most ``(1 + n) / (10 + n)``, so that the initial weights fade quickly.
    steps : int
        Steps averaged so far.
    """

    def __init__(self, model: nn.Module, decay: float, steps: int = 0) -> None:
        self.model = copy.deepcopy(model)
        self.steps = steps
        self._decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Add the weights after a step."""
        self.steps += 1
        decay = min(self._decay, (1 + self.steps) / (10 + self.steps))
        for average, newest in zip(self.model.parameters(), model.parameters(), strict=True):
            average.lerp_(newest, 1 - decay)
        for kept, new in zip(self.model.buffers(), model.buffers(), strict=True):
            kept.copy_(new)
