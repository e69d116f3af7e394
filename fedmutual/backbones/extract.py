"""Compute features of pictures with all cores, or the GPU, a chunk at a time, resumed after a kill."""

from __future__ import annotations

import io
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedmutual.backbones.augment import augmented
from fedmutual.backbones.network import Normalise, divided, load_backbone
from fedmutual.backbones.trunk import Tell, Trunk
from fedmutual.files.atomic import atomic_write
from fedmutual.files.disk import make_private
from fedmutual.learning.device import choose_device
from fedmutual.learning.placement import to_input

CHUNK = 512  # pictures
BATCH = 64
TELL_SECONDS = 5.0

logger = logging.getLogger(__name__)


def extract(
    pixels: NDArray[np.uint8],
    hashes: NDArray[np.uint8],
    trunk: Trunk,
    device: str,
    parts: Path,
    tell: Tell | None = None,
) -> None:
    """Write the chunks of features that are not in the folder ``parts`` yet.

    Parameters
    ----------
    pixels : uint8 array [n, S, S, 3]
    hashes : uint8 array [n, 16]
        Of each picture's pixels.
    device : str
        As the setting says it.
    tell : callable or None
        Told the progress; None: the log is.
    """
    make_private(parts)
    where = choose_device(device)
    starts = range(0, max(len(pixels), 1), CHUNK)
    missing = [start for start in starts if not _is_whole(_chunk(parts, start))]
    passes = max(trunk.views, 1)
    done = len(pixels) - sum(len(pixels[start : start + CHUNK]) for start in missing)
    if done:
        logger.info("features: %d of %d images were computed before", done, len(pixels))
    tell = tell or _log_progress(done)
    network = _network(trunk).to(where).to(memory_format=torch.channels_last)
    with ThreadPoolExecutor(_cores(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for start in missing:
            rows = slice(start, start + CHUNK)

            def forward(view: int, rows: slice = rows) -> NDArray[Any]:
                pictures = _pictures(pixels[rows], hashes[rows], trunk, view)
                return _forward(network, pictures, trunk, where, pool)

            found = [forward(view) for view in range(passes)]
            content = io.BytesIO()
            np.save(content, np.stack(found, axis=1) if trunk.views else found[0])
            atomic_write(_chunk(parts, start), content.getvalue())
            done += len(pixels[rows])
            tell(done, len(pixels))


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


def _log_progress(first: int) -> Tell:
    """Return a function that tells the log now and then, after ``first`` images that were done before."""
    begun = told = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told >= TELL_SECONDS or done >= total:
            told = now
            speed = (done - first) / max(now - begun, 1e-9)
            logger.info("features: %d of %d images, %.0f a second", done, total, speed)

    return tell


def _cores() -> int:
    """Every core that this process may use: the other clients of a simulation wait for the features."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
