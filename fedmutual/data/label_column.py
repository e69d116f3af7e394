"""The label column of a table: which values are classes, which are none, and what cannot be one label."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmutual.data.images import DataError

Labels = tuple[list[str], NDArray[np.int64]]


def labels_of(values: Sequence[Any], names: Sequence[str] | None, where: str) -> Labels:
    """Return class names and labels; -1, null and NaN are unlabelled (-1).

    Parameters
    ----------
    values : sequence
        Of the column.
    names : sequence of str or None
        Of a column that has its own class names; None: the sorted values name the classes.
    where : str
        The column and its split, for messages.

    Raises
    ------
    DataError
        The column has several labels per image, or values that are no classes.
    """
    known = [None if _is_missing(value) else value for value in values]
    several = next((value for value in known if isinstance(value, list | tuple | dict | set)), None)
    if several is not None:
        raise DataError(
            f"data.label_column: {where} has several labels per image, such as {several}: only one class per "
            "image can be learnt; choose a column with one label, or make one of them"
        )
    if names is not None:
        labels = np.asarray([-1 if value is None else int(value) for value in known], dtype=np.int64)
        return list(names), labels
    fraction = next((v for v in known if isinstance(v, float) and not v.is_integer()), None)
    if fraction is not None:
        raise DataError(
            f"data.label_column: {where} has {fraction}, a measurement and no class: choose another column"
        )
    present = sorted({_plain(value) for value in known if value is not None}, key=lambda v: (str(type(v)), v))
    place = {value: position for position, value in enumerate(present)}
    labels = np.asarray([-1 if value is None else place[_plain(value)] for value in known], dtype=np.int64)
    return [str(value) for value in present], labels


def _is_missing(value: Any) -> bool:
    return (
        value is None
        or (isinstance(value, float) and math.isnan(value))
        or (isinstance(value, int | float) and not isinstance(value, bool) and value == -1)
    )


def _plain(value: Any) -> Any:
    """Return 3.0 as 3, and other values as they are."""
    return int(value) if isinstance(value, float) else value
