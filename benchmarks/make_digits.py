"""Write scikit-learn's handwritten digits (1,797 of 8x8 pixels, ten classes) as folders for ``data=folder``.

    pip install scikit-learn  # part of the extra `dev`
    python benchmarks/make_digits.py DIGITS
    fedmutual compare experiment=digits data.root=DIGITS

Stratified by class and drawn with a fixed seed: 998 in ``train/``, 400 in ``public/``, 399 in ``test/``.

With ``--cameras`` every image is taken by one of five cameras, which show the same digit in different ways:
with ``partition=natural`` a client has one of them, and all five are in the public and the test images
(``experiment=cameras``).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

SHARES = {"public": 400, "test": 399}  # images; the rest is `train`
CAMERAS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "plain": lambda image: image,
    "negative": ImageOps.invert,
    "tilted": lambda image: image.resize((24, 24)).rotate(30, Image.Resampling.BILINEAR),
    "faint": lambda image: ImageEnhance.Brightness(image).enhance(0.3),
    "blurred": lambda image: image.resize((24, 24)).filter(ImageFilter.GaussianBlur(2)),
}


def main() -> None:
    """Write the three folders."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cameras", action="store_true", help="five cameras, a folder each below the class")
    arguments = parser.parse_args()
    digits = load_digits()
    pixels = np.rint(digits.images * 255 / 16).astype(np.uint8)
    # dealt in turn within every class, so that no camera has more of one
    turn = np.empty(len(pixels), np.int64)
    turn[np.argsort(digits.target, kind="stable")] = np.arange(len(pixels))
    cameras = np.array(list(CAMERAS))[turn % len(CAMERAS)]
    left = np.arange(len(pixels))
    parts = {}
    for part, size in SHARES.items():
        left, parts[part] = train_test_split(
            left, test_size=size, stratify=digits.target[left], random_state=0
        )
    for part, numbers in (parts | {"train": left}).items():
        for number in numbers:
            folder = arguments.folder / part / str(digits.target[number])
            camera = str(cameras[number]) if arguments.cameras else ""
            write(folder / camera, number, CAMERAS[camera or "plain"](Image.fromarray(pixels[number])))


def write(folder: Path, number: int, image: Image.Image) -> None:
    """Write an image, named by its number in the data set."""
    folder.mkdir(parents=True, exist_ok=True)
    image.save(folder / f"{number:04}.png")


if __name__ == "__main__":
    main()
