"""A small study in the pool of processes and on Ray on this machine, in turn: wall and CPU seconds of each.

The pool is what ``fedmutual compare`` takes on one machine.

    python benchmarks/pool_and_ray.py --repeat 3

Exit code 1: Ray took less wall time than the pool, or fewer CPU seconds. CPU seconds hold on a busy machine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

from cpu import Spent, watch

WAYS = {"pool": (), "ray": ("--ray-address", "local")}
STUDY = (
    "experiment=smoke",
    "rounds=2",
    "data.pool_size=200",
    "public.fill=0",
    "data.unseen_size=40",
    "public.size=40",
    "study.conditions={}",
    "study.only=[mutual,fedavg]",
    "seed=0,1",
)


def main() -> int:
    """Run the study each way, as often as asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=2)
    arguments, rest = parser.parse_known_args()
    spent: dict[str, list[Spent]] = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory() as temporary:
        cache = f"cache_dir={temporary}/cache"
        for turn in range(arguments.repeat):
            for name, options in WAYS.items():
                folder = Path(temporary) / f"{name}-{turn}"
                command = [sys.executable, "-m", "fedmutual", "compare", *STUDY, *arguments.overrides, *rest]
                command += [cache, f"output_dir={folder}", "--jobs", str(arguments.jobs), *options]
                spent[name].append(watch(command, os.environ, lambda: False))
    wall = {name: statistics.median(one.wall for one in found) for name, found in spent.items()}
    total = {name: statistics.median(one.total for one in found) for name, found in spent.items()}
    for name in WAYS:
        print(f"{name}: {wall[name]:.1f} s, {total[name]:.1f} CPU s")
    load = os.getloadavg()[0]
    ratios = wall["ray"] / wall["pool"], total["ray"] / total["pool"]
    print(f"ray / pool: {ratios[0]:.2f} of the time, {ratios[1]:.2f} of the CPU seconds; load {load:.1f}")
    return int(min(ratios) < 1)


if __name__ == "__main__":
    sys.exit(main())
