"""Features of pictures: computed once, by all cores or the GPU, a chunk at a time, and resumed after a kill.

A chunk is a file of ``<cache>/partial/<key>/``, written atomically; all of them become one entry of the cache
of images (:mod:`fedmutual.data.cache`), which is verified as pixels are.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedmutual.backbones.augment import augmented
from fedmutual.backbones.network import Normalise, divided, load_backbone
from fedmutual.backbones.weights import Backbone
from fedmutual.data.cache import allocated, cached
from fedmutual.data.images import ImageSet
from fedmutual.files.atomic import atomic_write
from fedmutual.files.disk import make_private
from fedmutual.learning.placement import to_input

FORMAT = 1  # increase it when the same pictures get other features
CHUNK = 512  # pictures
BATCH = 64
TELL_SECONDS = 5.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trunk:
    """What makes features of pictures.

    Attributes
    ----------
    backbone : Backbone
    tune : str
        ``head``: features, float32 [n, F]; ``last``: the last stage's inputs, float16 [n, h, w, K].
    views : int
        Augmented views to compute instead of the plain pictures; 0: the plain pictures.
    """

    backbone: Backbone
    tune: str
    views: int = 0

    def key(self, hashes: NDArray[np.uint8]) -> str:
        """Return the cache key of the features of pictures with these hashes."""
        backbone = self.backbone
        what = [FORMAT, backbone.digest, backbone.architecture, backbone.picture.size, backbone.mean]
        what += [backbone.std, self.tune, self.views, hashes.shape]
        state = hashlib.blake2b(json.dumps(what).encode(), digest_size=16)
        state.update(hashes.tobytes())
        return f"features-{state.hexdigest()}"


def features(images: ImageSet, trunk: Trunk, cache_dir: Path, device: torch.device) -> NDArray[Any]:
    """Return the features of pictures from the cache; compute them first if they are not there.

    Parameters
    ----------
    images : ImageSet
        Pictures of the backbone's size.

    Returns
    -------
    array [n, ...], or [n, views, ...] with augmented views
        Memory-mapped; see :class:`Trunk`.
    """
    hashes = images.pixel_hashes()
    key = trunk.key(hashes)

    def build(folder: Path) -> Mapping[str, NDArray[np.generic]]:
        parts = cache_dir / "partial" / key
        _compute(images.images, hashes, trunk, device, parts)
        _join(sorted(parts.glob("*.npy")), folder)
        shutil.rmtree(parts)
        return {}

    return cast("NDArray[Any]", cached(cache_dir, key, build).images)


def _compute(
    pixels: NDArray[np.uint8], hashes: NDArray[np.uint8], trunk: Trunk, device: torch.device, parts: Path
) -> None:
    """Write the chunks that are not there yet."""
    make_private(parts)
    starts = range(0, max(len(pixels), 1), CHUNK)
    missing = [start for start in starts if not _is_whole(_chunk(parts, start))]
    passes = max(trunk.views, 1)
    done = len(pixels) - sum(len(pixels[start : start + CHUNK]) for start in missing)
    if done:
        logger.info("features: %d of %d images were computed before", done, len(pixels))
    tell = _progress(len(pixels), done)
    network = _network(trunk).to(device).to(memory_format=torch.channels_last)
    with ThreadPoolExecutor(_cores(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for start in missing:
            rows = slice(start, start + CHUNK)

            def forward(view: int, rows: slice = rows) -> NDArray[Any]:
                pictures = _pictures(pixels[rows], hashes[rows], trunk, view)
                return _forward(network, pictures, trunk, device, pool)

            found = [forward(view) for view in range(passes)]
            content = io.BytesIO()
            np.save(content, np.stack(found, axis=1) if trunk.views else found[0])
            atomic_write(_chunk(parts, start), content.getvalue())
            tell(len(pixels[rows]))


def _network(trunk: Trunk) -> nn.Module:
    backbone = trunk.backbone
    frozen, _ = divided(load_backbone(backbone), trunk.tune)
    return nn.Sequential(Normalise(backbone.mean, backbone.std), frozen).eval()


def _pictures(
    pixels: NDArray[np.uint8], hashes: NDArray[np.uint8], trunk: Trunk, view: int
) -> NDArray[np.uint8]:
    if trunk.views and len(pixels):
        return augmented(pixels, hashes, view + 1)
    return np.array(pixels)


def _forward(
    network: nn.Module,
    pixels: NDArray[np.uint8],
    trunk: Trunk,
    device: torch.device,
    pool: ThreadPoolExecutor,
) -> NDArray[Any]:
    """Compute a batch a thread: threads that shared a batch would wait for each other after every layer."""
    if len(pixels) == 0:  # the shape of what there is none of
        size = trunk.backbone.picture.size
        return _forward(network, np.zeros((1, size, size, 3), np.uint8), trunk, device, pool)[:0]

    @torch.inference_mode()
    def batch(images: Tensor) -> Tensor:
        found: Tensor = network(to_input(images, device)).cpu()
        return found

    batches = torch.split(torch.from_numpy(pixels).permute(0, 3, 1, 2), BATCH)
    found = torch.cat(list(pool.map(batch, batches)))
    if found.ndim == 4:
        return found.permute(0, 2, 3, 1).to(torch.float16).contiguous().numpy()
    return found.numpy()


def _chunk(parts: Path, start: int) -> Path:
    return parts / f"{start:09d}.npy"


def _is_whole(path: Path) -> bool:
    try:
        np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError):
        return False
    return True


def _join(chunks: list[Path], folder: Path) -> None:
    arrays = [np.load(chunk, mmap_mode="r", allow_pickle=False) for chunk in chunks]
    joined = allocated(folder, (sum(map(len, arrays)), *arrays[0].shape[1:]), arrays[0].dtype)
    if joined.size:
        np.concatenate(arrays, out=joined)


def _progress(total: int, done: int) -> Callable[[int], None]:
    """Return a function that counts images and tells the log now and then."""
    begun = told = time.monotonic()
    first = done

    def tell(images: int) -> None:
        nonlocal done, told
        done += images
        now = time.monotonic()
        if now - told >= TELL_SECONDS or done >= total:
            told = now
            speed = (done - first) / max(now - begun, 1e-9)
            logger.info("features: %d of %d images, %.0f a second", done, total, speed)

    return tell


def _cores() -> int:
    """Every core that this process may use: the other clients of a simulation wait for the features."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
