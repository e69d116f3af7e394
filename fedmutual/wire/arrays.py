"""An array that a message holds: its header is read before anything is allocated for it."""

from __future__ import annotations

import math
from io import BytesIO
from typing import Any, cast

import numpy as np
from flwr.app import Array

from fedmutual.logs import brief
from fedmutual.wire.codec import MessageError


def unpacked(
    what: str,
    array: Array,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    expected: str = "not",
    remedy: str = "install the same fedmutual version on both",
) -> np.ndarray[Any, Any]:
    """Unpack an array of this shape and type; nothing is allocated for what does not fit.

    Parameters
    ----------
    what : str
        Its name in error messages.
    array : Array
    shape : tuple[int, ...]
    dtype : np.dtype
    expected, remedy : str
        Words of the error message: what ``shape`` is, and what to do.

    Raises
    ------
    MessageError
        It is serialised differently, or its header or length is not that of such an array.
    """
    if array.stype != "numpy.ndarray":
        raise MessageError(f"{what} is serialised as {brief(array.stype)}, not as numpy.ndarray")
    found, kind, start = _header(what, array.data)
    for its_shape, its_type in ((tuple(array.shape), array.dtype), (found, kind.name)):
        if (its_shape, its_type) != (shape, dtype.name):
            raise MessageError(
                f"{what} is {brief(its_type)} {brief(its_shape)}, {expected} {dtype} {shape}: {remedy}"
            )
    size = math.prod(shape) * dtype.itemsize
    if len(array.data) - start != size:
        raise MessageError(f"{what} has {len(array.data) - start} bytes, not {size}")
    return cast("np.ndarray[Any, Any]", np.load(BytesIO(array.data), allow_pickle=False))


def _header(what: str, data: bytes) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Shape, type and length of the header of an array in NumPy's file format."""
    file = BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read(file)
    except Exception as error:  # whatever a stranger sends instead of an array
        raise MessageError(f"{what} is no array: {brief(error)}") from error
    return shape, dtype, file.tell()
