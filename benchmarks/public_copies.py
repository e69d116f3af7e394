"""Make an image folder whose public set is half private: for measuring what overlap gives away.

    python benchmarks/public_copies.py PHOTOS FOLDER [--changed]
    fedmutual run data=folder data.root=FOLDER privacy.overlap=allow privacy.record=true ...
    fedmutual audit RUN

Of the photographs' pool 300 become public only, copies of 300 others are public too, the rest and these are
private (``train/``); 1,000 of the other source are ``test/``. With ``--changed`` the public copies are
mirrored, up to a fifth brighter or darker, with less contrast, and JPEG of quality 60.
"""

from __future__ import annotations

import argparse
import random
import shutil
from pathlib import Path

from PIL import Image, ImageEnhance, ImageOps

COPIES, ONLY_PUBLIC, TEST = 150, 150, 500  # of each class


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("photographs", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--changed", action="store_true", help="public copies are changed ones")
    arguments = parser.parse_args()
    rng, light = random.Random(0), random.Random(1)
    for own in sorted((arguments.photographs / "pool").iterdir()):
        files = sorted(own.iterdir())
        rng.shuffle(files)
        test = sorted((arguments.photographs / "unseen" / own.name).iterdir())
        rng.shuffle(test)
        parts = {"public": files[: COPIES + ONLY_PUBLIC], "train": files[ONLY_PUBLIC:], "test": test[:TEST]}
        for part, chosen in parts.items():
            target = arguments.folder / part / own.name
            target.mkdir(parents=True)
            for file in chosen:
                if arguments.changed and part == "public" and file in parts["train"]:
                    changed(file, light).save(target / f"{file.stem}.jpg", quality=60)
                else:
                    shutil.copy(file, target / file.name)


def changed(file: Path, light: random.Random) -> Image.Image:
    """Return a photograph mirrored, brighter or darker, and with less contrast."""
    with Image.open(file) as picture:
        image = ImageOps.mirror(picture.convert("RGB"))
    image = ImageEnhance.Brightness(image).enhance(light.uniform(0.8, 1.2))
    return ImageEnhance.Contrast(image).enhance(0.9)


if __name__ == "__main__":
    main()
