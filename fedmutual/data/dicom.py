"""DICOM files as pictures, through pydicom (``pip install 'fedmutual[dicom]'``)."""

from __future__ import annotations

from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from fedmutual.data.depth import STATED

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = frozenset((".dcm", ".dicom"))
_PREAMBLE, _MAGIC = 128, b"DICM"


def is_dicom(source: str | Path | IO[bytes]) -> bool:
    """Return whether a file starts as DICOM files do; the position of an open one is kept."""
    if isinstance(source, str | Path):
        with open(source, "rb") as file:
            return is_dicom(file)
    start = source.tell()
    head = source.read(_PREAMBLE + len(_MAGIC))
    source.seek(start)
    return head[_PREAMBLE:] == _MAGIC


def open_dicom(source: str | Path | IO[bytes], max_megapixels: float) -> Image.Image:
    """Return the picture in a DICOM file: grey values in their own unit (mode F), or RGB.

    The modality's rescaling is applied (Hounsfield units), and MONOCHROME1 is inverted. The file's first
    window, else the range of its stored bits, is what a picture without ``data.window`` is scaled from.

    Raises
    ------
    ValueError
        pydicom is missing, the file has no or several pictures, or too many pixels.
    """
    try:
        import pydicom
        from pydicom.pixels.processing import apply_rescale
    except ImportError as error:
        raise ValueError("DICOM needs pydicom: pip install 'fedmutual[dicom]'") from error
    from PIL import Image

    file = pydicom.dcmread(source, force=False)
    frames, rows, columns = (int(file.get(key) or least) for key, least in _SIZES)
    if frames != 1 or rows * columns == 0:
        raise ValueError(f"a DICOM file with {frames} frames of {columns} x {rows} pixels, not one picture")
    if rows * columns / 1e6 > max_megapixels:
        raise ValueError(
            f"{columns} x {rows} pixels are {rows * columns / 1e6:.4g} megapixels, more than "
            f"max_megapixels={max_megapixels:g}"
        )
    if int(file.get("SamplesPerPixel") or 1) == 3:
        return Image.fromarray(_colours(file))
    values = np.asarray(apply_rescale(file.pixel_array, file), dtype=np.float32)
    low, high = _stated(file)
    if file.get("PhotometricInterpretation") == "MONOCHROME1":
        values = np.float32(low + high) - values
    picture = Image.fromarray(values)
    picture.info[STATED] = (low, high)
    return picture


_SIZES = (("NumberOfFrames", 1), ("Rows", 0), ("Columns", 0))


def _colours(file: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
    pixels = np.asarray(file.pixel_array)  # pydicom converts YCbCr to RGB
    if pixels.dtype != np.uint8:
        raise ValueError(f"DICOM colours of {pixels.dtype}: save it with 8 bits a colour")
    return pixels


def _stated(file: Any) -> tuple[float, float]:
    """Return the file's first window, else the range of its stored bits, in the rescaled unit."""
    centre, width = _first(file.get("WindowCenter")), _first(file.get("WindowWidth"))
    if centre is not None and width is not None and width > 1:
        return centre - 0.5 - (width - 1) / 2, centre - 0.5 + (width - 1) / 2
    bits, signed = int(file.BitsStored), int(file.get("PixelRepresentation") or 0)
    slope, intercept = float(file.get("RescaleSlope", 1)), float(file.get("RescaleIntercept", 0))
    ends = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    low, high = sorted(slope * end + intercept for end in ends)
    return low, high


def _first(value: Any) -> float | None:
    if value is None or value == "":
        return None
    return (
        float(value[0]) if isinstance(value, list | tuple) or hasattr(value, "__getitem__") else float(value)
    )
