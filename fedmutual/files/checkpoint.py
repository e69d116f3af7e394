"""One file that holds everything a resume needs: JSON metadata and arrays, with a checksum.

The file is an ordinary safetensors file. Its predecessor is kept as ``<stem>.previous<suffix>`` and takes
over when the current one is damaged.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from fedmutual.files.atomic import atomic_write
from fedmutual.files.disk import sync

logger = logging.getLogger(__name__)

Arrays = dict[str, np.ndarray[Any, Any]]


class CheckpointError(RuntimeError):
    """There is no checkpoint, or none that can be read; the message names the file."""


def save_checkpoint(path: Path, meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Write ``meta`` and ``arrays`` to ``path`` atomically; what was there becomes the previous generation.

    Parameters
    ----------
    path : Path
        Usually ends in ``.safetensors``.
    meta : Mapping[str, Any]
        Anything that JSON holds exactly (floats survive bit for bit, also NaN and infinities).
    arrays : Mapping[str, np.ndarray]
        Any shapes; dtypes bool, int8 to int64, uint8 to uint64, float16, float32, float64.

    Raises
    ------
    TypeError
        ``meta`` holds something that is no JSON, or an array has another dtype.
    WriteError
        The disk is full, say; both generations are as they were.
    """
    atomic_write(path, _pack(meta, arrays), keep=previous_path(path))


def step_back(path: Path) -> None:
    """Make the previous generation the current one, which is lost."""
    os.replace(previous_path(path), path)
    sync(path.parent)


def load_checkpoint(path: Path) -> tuple[dict[str, Any], Arrays]:
    """Return what :func:`save_checkpoint` was given, from the newest generation that is intact.

    When that is the previous one, a warning says so and it takes the place of the damaged file, so that the
    next save does not push it out.

    Raises
    ------
    CheckpointError
        Neither generation is there, or neither can be read.
    """
    previous = previous_path(path)
    try:
        return read_generation(path)
    except CheckpointError as error:
        if not previous.exists():
            raise
        problem = error
    try:
        content = read_generation(previous)
    except CheckpointError as error:
        raise CheckpointError(f"{problem}; the previous generation is no better: {error}") from error
    logger.warning("%s; continuing from the previous generation %s", problem, previous.name)
    step_back(path)
    return content


def has_checkpoint(path: Path) -> bool:
    """Whether any generation of the checkpoint is there."""
    return path.exists() or previous_path(path).exists()


def previous_path(path: Path) -> Path:
    """Where the generation before ``path`` is kept."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def _pack(meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray[Any, Any]]) -> bytes:
    text = json.dumps(meta)
    # safetensors writes the memory as it lies: it must be C-ordered and little-endian
    plain = {
        name: np.require(array, dtype=array.dtype.newbyteorder("<"), requirements="C")
        for name, array in arrays.items()
    }
    for name, array in plain.items():
        if array.dtype.kind not in "biuf":
            raise TypeError(f"checkpoint array {name!r}: dtype {array.dtype} cannot be saved")
    try:
        return safetensors.numpy.save(plain, {"meta": text, "sha256": _checksum(text, plain)})
    except (SafetensorError, KeyError) as error:
        raise TypeError(f"checkpoint arrays cannot be saved: {error!r}") from error


def read_generation(path: Path) -> tuple[dict[str, Any], Arrays]:
    """Read this one file; :class:`CheckpointError` if it is missing or damaged."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            arrays: Arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no checkpoint is there") from error
    except (OSError, SafetensorError, ValueError, TypeError, AttributeError) as error:  # a flipped bit
        raise CheckpointError(f"{path} is damaged: {error}") from error
    text = header.get("meta", "")
    if header.get("sha256") != _checksum(text, arrays):
        raise CheckpointError(f"{path} is damaged: its checksum does not match its content")
    return json.loads(text), arrays


def _checksum(meta: str, arrays: Mapping[str, np.ndarray[Any, Any]]) -> str:
    digest = hashlib.sha256(meta.encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"\0{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
