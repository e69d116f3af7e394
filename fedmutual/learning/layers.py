"""Shallow and deep layers, and the weighted sum of those that clients send (arXiv:1903.07424).

Numpy only. Weights are arrays by their names in ``state_dict``, which are ``<module>.<parameter>``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Weights = Mapping[str, Array]


def split_layers(dimensions: Mapping[str, int]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the shallow and of the deep layers' arrays, buffers included.

    A module that holds a matrix (linear, attention, embedding) is deep; every other one (convolution,
    normalisation) is shallow. Where that leaves one side empty (SqueezeNet has no linear layer, a
    perceptron no other), the last module alone is deep.

    Parameters
    ----------
    dimensions : Mapping[str, int]
        Number of dimensions of every array, in the order of ``state_dict``.

    Raises
    ------
    ValueError
        If all arrays belong to one module.

    >>> split_layers({"conv.weight": 4, "conv.bias": 1, "head.weight": 2, "head.bias": 1})
    (('conv.weight', 'conv.bias'), ('head.weight', 'head.bias'))
    """
    modules = {name: name.rpartition(".")[0] for name in dimensions}
    every = list(dict.fromkeys(modules.values()))
    deep = {modules[name] for name, count in dimensions.items() if count == 2}
    if len(every) < 2:
        raise ValueError("the model has one layer only, and none to tell it from: choose another model")
    if len(deep) in (0, len(every)):
        deep = {every[-1]}
    shallow = tuple(name for name, module in modules.items() if module not in deep)
    return shallow, tuple(name for name in modules if name not in shallow)


def accuracy_shares(accuracies: Mapping[str, float], normalise: bool) -> dict[str, float]:
    """How much each client's layers count: its validation accuracy over the sum of all, or over K.

    Over K, as in the paper's published code, the shares add up to the mean accuracy, and the layers shrink.
    Where all accuracies are 0, the normalised shares are equal.

    >>> accuracy_shares({"a": 0.75, "b": 0.25}, normalise=True)
    {'a': 0.75, 'b': 0.25}
    >>> accuracy_shares({"a": 0.75, "b": 0.25}, normalise=False)
    {'a': 0.375, 'b': 0.125}
    """
    total = math.fsum(accuracies.values())
    if normalise and total == 0:
        return dict.fromkeys(accuracies, 1 / len(accuracies))
    by = total if normalise else len(accuracies)
    return {name: accuracy / by for name, accuracy in accuracies.items()}


def weighted_sum(weights: Mapping[str, Weights], shares: Mapping[str, float]) -> dict[str, Array]:
    """``sum_i share_i w_i``, in float64 and rounded once; of integer arrays (counters) the largest holds.

    >>> two = {"a": {"w": np.float32([1])}, "b": {"w": np.float32([3])}}
    >>> float(weighted_sum(two, {"a": 0.25, "b": 0.75})["w"][0])
    2.5
    """
    first, *_ = weights.values()
    return {name: _summed({client: own[name] for client, own in weights.items()}, shares) for name in first}


def _summed(arrays: Mapping[str, Array], shares: Mapping[str, float]) -> Array:
    values = list(arrays.values())
    if not np.issubdtype(values[0].dtype, np.floating):
        return np.asarray(np.maximum.reduce(values))
    total = sum(shares[client] * array.astype(np.float64) for client, array in arrays.items())
    return np.asarray(total, values[0].dtype)
