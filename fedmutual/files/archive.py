"""Arrays and JSON values in one ``.npz``, read without unpickling anything."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[Any]]


class ArchiveError(ValueError):
    """A file is no such archive, or is damaged; the message is the reason, in one line."""


def pack(meta: Mapping[str, Any], arrays: Arrays) -> bytes:
    """Return the content of an archive; no array is named ``meta``."""
    buffer = io.BytesIO()
    text = np.frombuffer(json.dumps(meta).encode(), np.uint8)
    np.savez_compressed(buffer, meta=text, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def unpack(file: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Read what :func:`pack` has made.

    Raises
    ------
    ArchiveError
    """
    try:
        with np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        return dict(json.loads(arrays.pop("meta").tobytes())), arrays
    except Exception as error:  # a damaged archive raises those of zlib, struct and zipfile, too
        raise ArchiveError(" ".join(str(error).split())) from error
