"""Weights on the wire: between arrays by name and what a message holds, and whether they fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord

from fedmutual.wire.codec import MessageError
from fedmutual.wire.reports import Report

Arrays = dict[str, np.ndarray[Any, Any]]


def weights_record(weights: Mapping[str, np.ndarray[Any, Any]]) -> ArrayRecord:
    """Pack weights."""
    return ArrayRecord({name: Array(np.ascontiguousarray(values)) for name, values in weights.items()})


def read_weights(report: Report, like: Mapping[str, np.ndarray[Any, Any]]) -> Arrays:
    """Unpack the weights of a report and check them against the server's.

    Raises
    ------
    MessageError
        If there are none, they are another architecture's, or not finite.
    """
    if report.model is None:
        raise MessageError("model: the report holds no weights")
    weights = {name: array.numpy() for name, array in report.model.items()}
    if weights.keys() != like.keys():
        raise MessageError(f"model: {report.architecture} has other layers than the server's model")
    for name, values in weights.items():
        if (values.shape, values.dtype) != (like[name].shape, like[name].dtype):
            raise MessageError(
                f"model: {name} is {values.dtype} {values.shape}, the server's {like[name].dtype} "
                f"{like[name].shape}: give this site the run's model"
            )
        if np.issubdtype(values.dtype, np.floating) and not np.isfinite(values).all():
            raise MessageError(f"model: {name} is not finite (did the training diverge?)")
    return weights
