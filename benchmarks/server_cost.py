"""What the server computes a round: the targets of ALL clients, against one pass over the same memory.

The predictions lie in memory as they travel (float16). One pass copies every client's once into a float32
buffer: what reading them costs at the least. The targets of all clients are then made one after the other,
as the strategy makes them, and dropped. Memory is the peak beyond the predictions, in units of one float32
array [samples, classes]: it must not depend on the number of clients.

    python benchmarks/server_cost.py
    python benchmarks/server_cost.py --clients 100 --samples 2000 --json server_cost.json
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from fedmutual.learning.consensus import MeanConsensus, log_softmax

Predictions = Mapping[str, npt.NDArray[np.floating]]
CASES = (("own_peer", 1.0), ("peer_own", 1.0), ("own_peer", 2.0), ("peer_own", 2.0))


@dataclass(frozen=True)
class Cost:
    """One case.

    Attributes
    ----------
    seconds : float
        All clients' targets; the best of the repetitions.
    pass_seconds : float
        One pass over the predictions, timed alternately with the targets.
    passes : float
        ``seconds / pass_seconds``.
    peak_arrays : float
        Peak memory beyond the predictions, in float32 arrays [samples, classes].
    """

    divergence: str
    temperature: float
    seconds: float
    pass_seconds: float
    passes: float
    peak_bytes: int
    peak_arrays: float


def make_predictions(clients: int, samples: int, classes: int, dtype: str, seed: int = 0) -> Predictions:
    """Random normalised log-probabilities of every client."""
    rng = np.random.default_rng(seed)
    return {
        f"client-{i}": log_softmax(2 * rng.standard_normal((samples, classes), np.float32)).astype(dtype)
        for i in range(clients)
    }


def one_pass(predictions: Predictions) -> None:
    """Copy every client's predictions once into a float32 buffer."""
    buffer = np.empty(next(iter(predictions.values())).shape, np.float32)
    for values in predictions.values():
        np.copyto(buffer, values)


def all_targets(predictions: Predictions, divergence: str, temperature: float) -> None:
    """Every client's target, one after the other."""
    consensus = MeanConsensus(predictions, divergence, temperature)
    for client in predictions:
        consensus.target(client)


def best_seconds(repeat: int, *works: Callable[[], None]) -> list[float]:
    """Shortest wall time of each of several works, which take turns ``repeat`` times."""
    best = [math.inf] * len(works)
    for _ in range(repeat):
        for position, work in enumerate(works):
            start = time.perf_counter()
            work()
            best[position] = min(best[position], time.perf_counter() - start)
    return best


def peak_bytes(work: Callable[[], None]) -> int:
    """Most memory that Python and numpy hold at once during ``work``, beyond what they held before."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def measure(predictions: Predictions, divergence: str, temperature: float, repeat: int) -> Cost:
    """Time and memory of one case."""

    def targets() -> None:
        all_targets(predictions, divergence, temperature)

    base, seconds = best_seconds(repeat, lambda: one_pass(predictions), targets)
    peak, one_array = peak_bytes(targets), 4 * next(iter(predictions.values())).size
    return Cost(divergence, temperature, seconds, base, seconds / base, peak, peak / one_array)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; write it down where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=1_000)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16")
    parser.add_argument("--repeat", type=int, default=3, help="the best of so many runs counts")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    chosen = parser.parse_args(arguments)
    predictions = make_predictions(chosen.clients, chosen.samples, chosen.classes, chosen.dtype)
    total = sum(values.nbytes for values in predictions.values())
    costs = [measure(predictions, *case, chosen.repeat) for case in CASES]
    table = Table(
        title=f"{chosen.clients:,} clients x {chosen.samples:,} samples x {chosen.classes} classes, "
        f"{total / 2**20:,.1f} MiB of {chosen.dtype}"
    )
    for column in ("divergence", "T", "seconds", "one pass", "ratio", "peak beyond input", "arrays [N, C]"):
        table.add_column(column, justify="left" if column == "divergence" else "right")
    for cost in costs:
        table.add_row(
            cost.divergence, f"{cost.temperature:g}", f"{cost.seconds:.3f}", f"{cost.pass_seconds:.3f}",
            f"{cost.passes:.2f}",
            f"{cost.peak_bytes / 2**20:.2f} MiB", f"{cost.peak_arrays:.1f}",
        )  # fmt: skip
    Console().print(table)
    if chosen.json is not None:
        figures = {
            "clients": chosen.clients,
            "samples": chosen.samples,
            "classes": chosen.classes,
            "dtype": chosen.dtype,
            "input_bytes": total,
            "cases": [asdict(cost) for cost in costs],
        }
        chosen.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
