"""Plain averaging of weights."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from flwr.app import Array, ArrayRecord

from fedmutual.strategies.base import StrategyError
from fedmutual.wire.reports import Report


def average(reports: Mapping[str, Report]) -> ArrayRecord:
    """Unweighted mean of the clients' weights.

    Raises
    ------
    StrategyError
        If a client sent none, or weights of another architecture.
    """
    models = {name: report.model for name, report in reports.items()}
    first: ArrayRecord | None = None
    sums: dict[str, np.ndarray] = {}
    for name, model in models.items():
        if model is None:
            raise StrategyError(f"client {name} sent no weights although strategy.average_weights is on")
        arrays = {key: array.numpy() for key, array in model.items()}
        if first is None:
            first, sums = model, {key: array.astype(np.float64) for key, array in arrays.items()}
            continue
        if {key: a.shape for key, a in arrays.items()} != {key: a.shape for key, a in sums.items()}:
            raise StrategyError(f"client {name} has another architecture: weights cannot be averaged")
        for key, array in arrays.items():
            sums[key] += array
    assert first is not None
    return ArrayRecord(
        {key: Array((total / len(models)).astype(first[key].numpy().dtype)) for key, total in sums.items()}
    )
