"""Small image sets and settings for the tests of the data layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from fedmutual.data.images import ImageData, ImageSet
from fedmutual.settings import PublicSettings


def image_set(labels: Sequence[int], groups: Sequence[str] | None = None, seed: int = 0) -> ImageSet:
    """Random 8x8 pictures with these labels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (len(labels), 8, 8, 3)).astype(np.uint8)
    return ImageSet(
        images=pixels,
        labels=np.asarray(labels, dtype=np.int64),
        groups=None if groups is None else tuple(groups),
        names=tuple(f"image-{seed}-{i}" for i in range(len(labels))),
    )


class Source:
    """A data source that holds what it is given."""

    def __init__(
        self, pool: ImageSet, public: ImageSet | None = None, classes: Sequence[str] = ("a", "b")
    ) -> None:
        self.data = ImageData(classes=tuple(classes), pool=pool, public=public, unseen=None)

    def load(self, cache_dir: Path) -> ImageData:
        return self.data


def public_settings(**changes: Any) -> PublicSettings:
    values = {"schedule": "static", "size": None, "per_round": None, "views": "plain"}
    return PublicSettings(**{**values, "fill": 0, "labelled": False, "distribute": False, **changes})


def run_settings(data: Any, partition: Any, cache_dir: Path, **changes: Any) -> Any:
    """What the data layer reads of a run's settings."""
    values = {
        "seed": 0,
        "rounds": 3,
        "cache_dir": str(cache_dir),
        "data": data,
        "partition": partition,
        "public": public_settings(),
        "train": SimpleNamespace(validation_fraction=0.1),
        "privacy": SimpleNamespace(overlap="exclude"),
    }
    return SimpleNamespace(**{**values, **changes})


def write_images(folder: Path, count: int, seed: int = 0, suffix: str = "png") -> list[Path]:
    """Write small random pictures; return their paths in order of name."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    paths = [folder / f"{i:04d}.{suffix}" for i in range(count)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (12, 9, 3)).astype(np.uint8)).save(path)
    return paths


class TorchSet:
    """A map-style data set, as torch's, of grey pictures whose value is their position."""

    classes = ("dark", "bright")

    def __init__(self, count: int, labelled: bool = True) -> None:
        self._count, self._labelled = count, labelled

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, position: int) -> tuple[Any, int | None]:
        value = 255 * position // self._count
        label = int(value >= 127) if self._labelled else None
        if position % 2:
            return Image.new("L", (12, 10), value), label
        return np.full((3, 10, 12), value, np.uint8), label


def torch_sets(train: int = 40, test: int = 10) -> dict[str, Any]:
    """Data sets of one's own code."""
    return {"train": TorchSet(train), "public": TorchSet(12, labelled=False), "test": TorchSet(test)}
