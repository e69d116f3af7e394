"""A client's moving average of its own weights over its steps: a better teacher than the newest weights."""

from __future__ import annotations

import copy

import torch
from torch import nn


class MovingAverage:
    """Exponential moving average of a model's weights (Mean Teacher, arXiv:1703.01780).

    Parameters
    ----------
    model : nn.Module
        Copied; buffers, such as the statistics of batch normalisation, are those of the model.
    decay : float
        What is left of the average after a step. The first steps decay faster, ``(1 + n) / (10 + n)`` after
        n, so that the initial weights are soon forgotten.
    steps : int
        Steps that are in it.
    """

    def __init__(self, model: nn.Module, decay: float, steps: int = 0) -> None:
        self.model = copy.deepcopy(model)
        self.steps = steps
        self._decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights after a step."""
        self.steps += 1
        decay = min(self._decay, (1 + self.steps) / (10 + self.steps))
        for average, newest in zip(self.model.parameters(), model.parameters(), strict=True):
            average.lerp_(newest, 1 - decay)
        for kept, new in zip(self.model.buffers(), model.buffers(), strict=True):
            kept.copy_(new)
