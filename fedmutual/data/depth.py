"""Grey pictures of more than 8 bits: the range of values that becomes black to white."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL import Image

Window = tuple[float, float]

STATED = "value range"  # in the `info` of a picture whose decoder knows the range
_FULL = (0.0, 65535.0)  # of the 16-bit formats: PNG, PPM
_BITS, _SMALLEST, _LARGEST, _FORMAT = 258, 280, 281, 339  # tags of TIFF 6.0
_UNSIGNED = 1


def is_deep(picture: Image.Image) -> bool:
    """Return whether a picture has one channel of more than 8 bits."""
    return picture.mode == "F" or picture.mode.startswith("I")


def window_problem(window: Sequence[float] | None) -> str | None:
    """Say why values are no window; None if they are one or there is none."""
    if window is None:
        return None
    if len(window) != 2 or not all(map(math.isfinite, window)) or not window[0] < window[1]:
        return f"window: {list(window)} is not [LOW,HIGH] with LOW below HIGH, such as [0,4095]"
    return None


def as_window(values: Any) -> Window | None:
    """Return checked settings, or a list from a model's card, as a window."""
    return None if values is None else (float(values[0]), float(values[1]))


def value_range(picture: Image.Image, window: Window | None) -> Window:
    """Return the values of a deep picture that become 0 and 255.

    That is the given window, else what the file states: of TIFF, its tags (BitsPerSample, SampleFormat,
    MinSampleValue, MaxSampleValue); of DICOM, its own window or its stored bits; of PNG and PPM, 16 bits.

    Raises
    ------
    ValueError
        The file does not state a range.
    """
    if window is not None:
        return window
    if STATED in picture.info:
        low, high = picture.info[STATED]
        return float(low), float(high)
    if picture.format == "TIFF":
        stated = _stated_by_tags(picture.tag_v2)  # type: ignore[attr-defined]
    else:
        stated = None if picture.mode == "F" else _FULL
    if stated is None:
        low, high = extremes(picture)
        raise ValueError(
            f"values {low:g} to {high:g} of an unknown range: set data.window=[LOW,HIGH] to the values that "
            f"become black and white, such as [{low:g},{high:g}], the same at all sites"
        )
    return stated


def extremes(picture: Image.Image) -> Window:
    """Return the smallest and largest finite value of a deep picture."""
    values = np.asarray(picture)
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)


def eight_bits(band: Image.Image, window: Window) -> Image.Image:
    """Scale a deep picture from the window to 0 to 255; what is outside is clipped, NaN is black."""
    from PIL import Image

    low, high = window
    values: NDArray[np.float64] = np.nan_to_num(np.asarray(band, dtype=np.float64), nan=low)
    scaled = np.clip((values - low) / ((high - low) / 255), 0, 255)
    return Image.fromarray(scaled.round().astype(np.uint8))


def _stated_by_tags(tags: Any) -> Window | None:
    smallest, largest = _first(tags.get(_SMALLEST)), _first(tags.get(_LARGEST))
    if largest is not None and largest > (smallest or 0):
        return float(smallest or 0), float(largest)
    bits, kind = _first(tags.get(_BITS)), _first(tags.get(_FORMAT))
    if bits is not None and bits <= 16 and kind in (None, _UNSIGNED):
        return 0.0, float(2**bits - 1)
    return None


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) and value else value
