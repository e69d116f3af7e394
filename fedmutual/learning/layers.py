"""Split of a model into shallow and deep layers, and the weighted sum of layers (arXiv:1903.07424).

Numpy only. Weights are arrays by ``state_dict`` name, ``<module>.<parameter>``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Weights = Mapping[str, Array]


def split_layers(dimensions: Mapping[str, int]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the array names of the shallow and of the deep layers, buffers included.

    A module with a matrix (linear, attention, embedding) is deep; all others (convolution, normalisation) are
    shallow. If one side would be empty (SqueezeNet has no linear layer, a perceptron has only linear layers),
    only the last module is deep.

    Parameters
    ----------
    dimensions : Mapping[str, int]
        Number of dimensions of every array, in the order of ``state_dict``.

    Raises
    ------
    ValueError
        All arrays belong to one module.

    >>> split_layers({"conv.weight": 4, "conv.bias": 1, "head.weight": 2, "head.bias": 1})
    (('conv.weight', 'conv.bias'), ('head.weight', 'head.bias'))
    """
    modules = {name: name.rpartition(".")[0] for name in dimensions}
    every = list(dict.fromkeys(modules.values()))
    deep = {modules[name] for name, count in dimensions.items() if count == 2}
    if len(every) < 2:
        raise ValueError("the model has one layer only, which cannot be split: choose another model")
    if len(deep) in (0, len(every)):
        deep = {every[-1]}
    shallow = tuple(name for name, module in modules.items() if module not in deep)
    return shallow, tuple(name for name in modules if name not in shallow)


def accuracy_shares(accuracies: Mapping[str, float], normalise: bool) -> dict[str, float]:
    """Return each client's share: its validation accuracy divided by the sum of all, or by K.

    Divided by K, as in the paper's published code, the shares sum to the mean accuracy, so the weights
    shrink. If all accuracies are 0, the normalised shares are equal.

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
    """Return ``sum_i share_i w_i``, in float64, rounded once; integer arrays (counters) take the maximum.

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
