"""Write scikit-learn's handwritten digits (1,797 of 8x8 pixels, ten classes) as folders for ``data=folder``.

    pip install scikit-learn  # part of the extra `dev`
    python benchmarks/make_digits.py DIGITS
    fedmutual compare experiment=digits data.root=DIGITS

Stratified by class and drawn with a fixed seed: 998 in ``train/``, 400 in ``public/``, 399 in ``test/``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

SHARES = {"public": 400, "test": 399}  # images; the rest is `train`


def main() -> None:
    """Write the three folders."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    digits = load_digits()
    pixels = np.rint(digits.images * 255 / 16).astype(np.uint8)
    left = np.arange(len(pixels))
    for part, number in SHARES.items():
        left, taken = train_test_split(left, test_size=number, stratify=digits.target[left], random_state=0)
        write(folder / part, taken, pixels, digits.target)
    write(folder / "train", left, pixels, digits.target)


def write(folder: Path, numbers: np.ndarray, pixels: np.ndarray, classes: np.ndarray) -> None:
    """Write images into a folder a class, named by their number in the data set."""
    for number in numbers:
        path = folder / str(classes[number]) / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[number]).save(path)


if __name__ == "__main__":
    main()
