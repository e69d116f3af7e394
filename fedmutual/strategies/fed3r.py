"""Fed3R (arXiv:2406.01116): a ridge regression on frozen features, from sums of the clients' statistics.

One round gives the same head as if all images lay in one place, however the labels are distributed. Rounds
after it can fine-tune the head by federated averaging.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import RecordDict

from fedmutual.learning.ridge import solve
from fedmutual.strategies.base import Arrays, Figures
from fedmutual.strategies.fedavg import FedAvg
from fedmutual.wire.codec import MessageError
from fedmutual.wire.reports import Expected, Report, read_report
from fedmutual.wire.weights import read_weights

GRAM, MOMENT = "gram", "moment"


class Fed3R(FedAvg):
    """Add up statistics in round 1, solve, and fine-tune if wanted.

    Parameters
    ----------
    num_classes : int
        C.
    weights : Mapping[str, array]
        The start of all clients' heads, with ``linear.weight`` [C, F] and ``linear.bias`` [C].
    ridge : float
        See :func:`fedmutual.learning.ridge.solve`.
    temperature : float
        The regression's outputs are divided by it to become logits; they lie in about 0 to 1.
    fine_tune : bool
        Average the heads in the rounds after the first; False: these rounds change nothing.
    **options
        See :class:`fedmutual.strategies.fedavg.FedAvg`.
    """

    def __init__(
        self,
        num_classes: int,
        weights: Arrays,
        *,
        ridge: float = 0.1,
        temperature: float = 0.1,
        fine_tune: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(num_classes, weights, **options)
        if not ridge >= 0 or not temperature > 0:
            raise ValueError(f"ridge: {ridge} is below 0, or temperature: {temperature} is not above 0")
        self.ridge = ridge
        self.temperature = temperature
        self.fine_tune = fine_tune

    def read(self, content: RecordDict, expected: Expected) -> Report:
        """Reject statistics, or a fine-tuned head, that do not fit the head."""
        report = read_report(content, expected)
        if expected.closing:
            return report
        if expected.round == 1:
            found = read_weights(report, self._like())
            if found[GRAM][_diagonal(len(found[MOMENT]))].min() < 0:
                raise MessageError("model: gram has a negative square on its diagonal")
        elif self.fine_tune:
            read_weights(report, self.weights)
        return report

    def take(self, round: int, reports: Mapping[str, Report]) -> Figures:
        """Solve for the head, or average the fine-tuned heads."""
        if round > 1:
            return super().take(round, reports) if self.fine_tune else self.measure(round, self.weights)
        like = self._like()
        total = {name: np.zeros(values.shape) for name, values in like.items()}
        for report in reports.values():
            for name, values in read_weights(report, like).items():
                total[name] += values
        weights, constants = solve(total[GRAM], total[MOMENT], self.ridge)
        solved = {"linear.weight": weights, "linear.bias": constants}
        self.weights = {
            **self.weights,
            **{k: (v / self.temperature).astype(self.weights[k].dtype) for k, v in solved.items()},
        }
        return self.measure(round, self.weights)

    def describe(self) -> str:
        """The strategy and its settings in one line."""
        tuned = ", then federated averaging" if self.fine_tune else ""
        return f"Fed3R: ridge {self.ridge:g}, temperature {self.temperature:g}{tuned}"

    def _like(self) -> dict[str, np.ndarray[Any, Any]]:
        classes, features = self.weights["linear.weight"].shape
        packed = (features + 1) * (features + 2) // 2
        return {
            GRAM: np.zeros(packed, np.float32),
            MOMENT: np.zeros((features + 1, classes), np.float32),
        }


def _diagonal(size: int) -> np.ndarray[Any, Any]:
    """Return where the diagonal lies in an upper triangle that is packed row by row."""
    rows = np.arange(size)
    return rows * size - rows * (rows - 1) // 2
