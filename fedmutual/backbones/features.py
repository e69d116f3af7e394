"""Features of pictures in the cache: looked up without torch, computed where they are missing.

They are one entry of the cache of images (:mod:`fedmutual.data.cache`), which is verified as pixels are.
Until all are computed, chunks of them lie in ``<cache>/partial/<key>/``.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from fedmutual.backbones.trunk import Tell, Trunk
from fedmutual.data.cache import allocated, cached
from fedmutual.data.images import ImageSet


def features(
    images: ImageSet, trunk: Trunk, cache_dir: Path, device: str, tell: Tell | None = None
) -> NDArray[Any]:
    """Return the features of pictures from the cache; compute them first if they are not there.

    Parameters
    ----------
    images : ImageSet
        Pictures of the backbone's size.
    device : str
        As the setting says it.
    tell : callable or None
        Told the progress; None: the log is.

    Returns
    -------
    array [n, ...], or [n, views, ...] with augmented views
        Memory-mapped; see :class:`Trunk`.
    """
    hashes = images.pixel_hashes()
    key = trunk.key(hashes)

    def build(folder: Path) -> Mapping[str, NDArray[np.generic]]:
        from fedmutual.backbones.extract import extract  # torch

        parts = cache_dir / "partial" / key
        extract(images.images, hashes, trunk, device, parts, tell)
        _join(sorted(parts.glob("*.npy")), folder)
        shutil.rmtree(parts)
        return {}

    return cast("NDArray[Any]", cached(cache_dir, key, build).images)


def _join(chunks: list[Path], folder: Path) -> None:
    arrays = [np.load(chunk, mmap_mode="r", allow_pickle=False) for chunk in chunks]
    joined = allocated(folder, (sum(map(len, arrays)), *arrays[0].shape[1:]), arrays[0].dtype)
    if joined.size:
        np.concatenate(arrays, out=joined)
