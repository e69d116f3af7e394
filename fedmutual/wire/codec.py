"""Predicted distributions as bytes, and every check on the bytes that arrive."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedmutual.told import Told

WIRE_DTYPES = ("float16", "float32", "int8", "label")

FloatArray = npt.NDArray[np.float32]


class MessageError(Told, ValueError):
    """What arrived is not what the protocol allows; the message says what was wrong and what to do."""


def encode(log_probabilities: npt.NDArray[np.floating], wire_dtype: str, floor: float) -> bytes:
    """Log-probabilities [n, C] as bytes; two classes travel as n log-odds of class 1.

    ``int8`` divides the range up to ``-log(floor)`` into steps of ``-log(floor) / 127``: 0.07
    nats for a floor of 1e-4. ``label`` sends the most probable class only: one bit a sample for two classes,
    one byte for up to 256, else two.

    Raises
    ------
    MessageError
        If a value is not finite: int8 has no NaN and would send a zero for it.
    """
    if not np.isfinite(log_probabilities).all():
        raise MessageError(
            "predictions: a value is not finite (did the training diverge? lower optimizer.learning_rate)"
        )
    if wire_dtype == "label":
        return _labels_as_bytes(log_probabilities)
    limit = -np.log(floor)
    values = log_probabilities.astype(np.float32)
    if values.shape[1] == 2:
        values = np.clip(values[:, 1] - values[:, 0], -limit, limit)
    else:
        values = np.maximum(values, -limit)
    if wire_dtype == "int8":
        return bytes(np.rint(values * (127 / limit)).astype(np.int8).tobytes())
    return bytes(values.astype(np.dtype(wire_dtype).newbyteorder("<")).tobytes())


def decode(
    data: bytes,
    num_samples: int,
    num_classes: int,
    wire_dtype: str,
    floor: float,
    name: str = "predictions",
    dtype: npt.DTypeLike = np.float32,
) -> npt.NDArray[np.floating]:
    """Inverse of :func:`encode`: checked and normalised log-probabilities, ``dtype`` [n, C] in C order.

    ``name`` is what an error calls them. They are computed in float32 and rounded to ``dtype`` at the end.

    Raises
    ------
    MessageError
        For a wrong size, a value that is not finite or out of range, or rows that are no distribution.
    """
    if wire_dtype == "label":
        return _from_labels(data, num_samples, num_classes, floor, name).astype(dtype, copy=False)
    limit = float(-np.log(floor))
    columns = 1 if num_classes == 2 else num_classes
    sent = np.dtype(wire_dtype).newbyteorder("<")
    if len(data) != num_samples * columns * sent.itemsize:
        raise MessageError(f"{name}: {len(data)} bytes, not {num_samples} x {columns} values of {wire_dtype}")
    # in Fortran order NumPy reduces whole columns; in C order one short row at a time
    values = np.frombuffer(data, sent).reshape(num_samples, columns).astype(np.float32, order="F")
    if wire_dtype == "int8":
        values *= np.float32(limit / 127)
    _check_range(values, limit, limit if columns == 1 else 0.0, name, floor)
    if columns == 1:
        values = _log_probabilities_of_two(values[:, 0])
    else:
        total = np.exp(values).sum(axis=1)
        slack = 0.02 + num_classes * floor + (limit / 127 if wire_dtype == "int8" else 0.0)
        if values.size and np.abs(total - 1).max() > slack:
            raise MessageError(f"{name}: a row sums to {total[np.abs(total - 1).argmax()]:.3g}, not to 1")
        values -= np.log(total)[:, None]  # no row exceeds 0 by much, so that exp cannot overflow
    return np.ascontiguousarray(values).astype(dtype, copy=False)


def _check_range(values: FloatArray, limit: float, upper: float, name: str, floor: float) -> None:
    """Refuse what is not finite or not in ``[-limit, upper]``, with a little tolerance for rounding."""
    if not values.size:
        return
    low, high = values.min(), values.max()  # NaN if a value is NaN
    if not (np.isfinite(low) and np.isfinite(high)):
        raise MessageError(f"{name}: a value is not finite")
    tolerance = 1e-2 * limit
    if low < -limit - tolerance or high > upper + tolerance:
        raise MessageError(
            f"{name}: values from {low:.3g} to {high:.3g}, "
            f"outside [{-limit:.3g}, {upper:.3g}] (strategy.probability_floor={floor:g})"
        )


def _labels_as_bytes(log_probabilities: npt.NDArray[np.floating]) -> bytes:
    labels, num_classes = log_probabilities.argmax(axis=1), log_probabilities.shape[1]
    if num_classes == 2:
        return bytes(np.packbits(labels.astype(np.uint8)).tobytes())
    return bytes(labels.astype("u1" if num_classes <= 256 else "<u2").tobytes())


def _from_labels(data: bytes, num_samples: int, num_classes: int, floor: float, name: str) -> FloatArray:
    """The label gets all probability but what the floor leaves to the other classes."""
    itemsize = 1 if num_classes <= 256 else 2
    expected = -(-num_samples // 8) if num_classes == 2 else num_samples * itemsize
    if len(data) != expected:
        raise MessageError(f"{name}: {len(data)} bytes, not the {expected} of {num_samples} labels")
    if num_classes == 2:
        labels = np.unpackbits(np.frombuffer(data, np.uint8), count=num_samples).astype(np.int64)
    else:
        labels = np.frombuffer(data, "u1" if itemsize == 1 else "<u2").astype(np.int64)
    if labels.size and labels.max() >= num_classes:
        raise MessageError(f"{name}: label {labels.max()}, but there are {num_classes} classes")
    log_p = np.full((num_samples, num_classes), np.log(floor), np.float32)
    log_p[np.arange(num_samples), labels] = np.log1p(-floor * (num_classes - 1))
    return log_p


def _log_probabilities_of_two(log_odds: FloatArray) -> FloatArray:
    """Log-probabilities [n, 2] from the log-odds [n] of class 1."""
    scores = np.zeros((len(log_odds), 2), np.float32, order="F")
    scores[:, 1] = log_odds
    scores -= np.maximum(log_odds, 0)[:, None]
    scores -= np.log(np.exp(scores).sum(axis=1, keepdims=True))
    return scores
