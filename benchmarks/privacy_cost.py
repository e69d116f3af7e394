"""What privacy costs a site: its CPU time in a plain run, with secure aggregation, with differential privacy.

Runs the same federation of heads on a frozen backbone in this process, one after the other and in turns, and
adds up the CPU time (of all threads) that the clients spend on their orders: masks, noise, ledger, training.
Features are made before, and no time counts of the first run, which fills the caches. The smallest of the
repetitions stands for a mode.

    python benchmarks/privacy_cost.py data=facemask data.root=PHOTOS data.image_size=32
    python benchmarks/privacy_cost.py data=folder data.root=PHOTOS rounds=6 --repeat 5

Exit code 1: a mode takes more than 1.2 times the plain run's time.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import fedmutual.client.answer as client
from fedmutual.simulation.inprocess import run_inprocess

LIMIT = 1.2
RUN = ("model=pretrained", "num_clients=5", "rounds=6", "public.size=600", "evaluation.unseen_every=0")
MODES = {
    "plain": ("strategy=mutual",),
    "secagg": ("strategy=mutual", "privacy.secagg=true"),
    "dp": ("strategy=speaker", "privacy.epsilon=0.5"),
    "dp and secagg": ("strategy=speaker", "privacy.epsilon=0.5", "privacy.secagg=true"),
}


class Clock:
    """CPU seconds that clients have spent on their messages: orders and questions for keys."""

    def __init__(self) -> None:
        self.spent = 0.0
        self._handle = client._handle

    def __call__(self, *arguments: Any) -> Any:
        """Answer a message, and count the time."""
        before = time.process_time()
        try:
            return self._handle(*arguments)
        finally:
            self.spent += time.process_time() - before


def spent(overrides: Sequence[str], folder: Path) -> float:
    """Return the CPU seconds of all clients in a run."""
    clock = Clock()
    client._handle = clock
    try:
        if run_inprocess(overrides, folder):
            raise SystemExit(f"the run failed: {folder}")
    finally:
        client._handle = clock._handle
    return clock.spent


def main(arguments: Sequence[str]) -> int:
    """Measure all modes and print them beside each other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="as for fedmutual run")
    parser.add_argument("--repeat", type=int, default=3)
    chosen = parser.parse_intermixed_args(arguments)
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {mode: [] for mode in MODES}
    with tempfile.TemporaryDirectory() as temporary:
        for turn in range(chosen.repeat + 1):
            for mode, own in MODES.items():
                folder = Path(temporary) / f"{mode.replace(' ', '-')}-{turn}"
                seconds = spent([*RUN, *own, *chosen.overrides], folder)
                if turn:
                    times[mode].append(seconds)
    table = Table("", "CPU seconds of all clients", "times plain")
    ratios = {mode: min(found) / min(times["plain"]) for mode, found in times.items()}
    for mode, ratio in ratios.items():
        table.add_row(mode, f"{min(times[mode]):.2f}", f"{ratio:.2f}")
    Console().print(table)
    return int(max(ratios.values()) > LIMIT)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
