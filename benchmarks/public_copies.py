"""Make an image folder whose public set is half private: for measuring what overlap gives away.

    python benchmarks/public_copies.py PHOTOS FOLDER
    fedmutual run data=folder data.root=FOLDER privacy.overlap=allow privacy.record=true ...
    fedmutual audit RUN

Of the photographs' pool 300 become public only, copies of 300 others are public too, the rest and these are
private (``train/``); 1,000 of the other source are ``test/``.
"""

from __future__ import annotations

import argparse
import random
import shutil
from pathlib import Path

COPIES, ONLY_PUBLIC, TEST = 150, 150, 500  # of each class


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("photographs", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    rng = random.Random(0)
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
                shutil.copy(file, target / file.name)


if __name__ == "__main__":
    main()
