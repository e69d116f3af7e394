"""Weights on the wire: between arrays by name and what a message holds, and whether they fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord

from fedmutual.wire.arrays import unpacked
from fedmutual.wire.codec import MessageError
from fedmutual.wire.reports import Report

Arrays = dict[str, np.ndarray[Any, Any]]


LARGEST_WEIGHT = 1e10  # finite weights above this are absurd: float32 sums of squares overflow


def weights_record(weights: Mapping[str, np.ndarray[Any, Any]]) -> ArrayRecord:
    """Pack weights."""
    return ArrayRecord({name: Array(np.asarray(values, order="C")) for name, values in weights.items()})


def read_weights(report: Report, like: Mapping[str, np.ndarray[Any, Any]]) -> Arrays:
    """Unpack the weights of a report and check them against the server's.

    Raises
    ------
    MessageError
        If there are none, they are another architecture's, or not finite.
    """
    if report.model is None:
        raise MessageError("model: the report holds no weights")
    if report.model.keys() != like.keys():
        raise MessageError(f"model: {report.architecture} has other layers than the server's model")
    return {
        name: read_array(name, array, like[name].shape, like[name].dtype)
        for name, array in report.model.items()
    }


def declared(model: ArrayRecord) -> tuple[tuple[str, tuple[int, ...], np.dtype[Any]], ...]:
    """Name, shape and type of each array, as its sender declares them."""
    return tuple((name, tuple(array.shape), np.dtype(array.dtype)) for name, array in model.items())


def read_array(name: str, array: Array, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """Unpack one array, after its header was checked: nothing is allocated for what does not fit.

    Raises
    ------
    MessageError
        Naming the array and what is wrong with it.
    """
    values = unpacked(f"model: {name}", array, shape, dtype, "the server's", "give this site the run's model")
    if np.issubdtype(dtype, np.floating) and not (np.abs(values) <= LARGEST_WEIGHT).all():
        raise MessageError(
            f"model: {name} is not finite, or above {LARGEST_WEIGHT:g} (did the training diverge?)"
        )
    return values
