"""What the server computes a round: the targets of ALL clients, against one pass over the same memory, and
what reading a report, making an order and counting the bytes of both takes a client.

The predictions lie in memory as they travel (float16). One pass copies every client's once into a float32
buffer: what reading them costs at the least. The targets of all clients are then made one after the other,
as the strategy makes them, and dropped. Memory is the peak beyond the predictions, in units of one float32
array [samples, classes]: it must not depend on the number of clients. Times are CPU seconds of this process,
which hold on a busy machine better than a clock's; passes are the median of the repetitions, with the least
and the most.

    python benchmarks/server_cost.py                    # 1,000 x 10,000 x 10, then 10,000 x 600 x 2
    python benchmarks/server_cost.py --size 100 2000 10 --json server_cost.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from fedmutual.learning.consensus import MeanConsensus, log_softmax
from fedmutual.wire.orders import Order, order_record
from fedmutual.wire.records import payload_bytes
from fedmutual.wire.reports import Expected, Report, read_report, report_record

Predictions = Mapping[str, npt.NDArray[np.floating]]
SIZES = ((1_000, 10_000, 10), (10_000, 600, 2))  # clients, public samples, classes
FLOOR = 1e-4
BATCH = 20  # messages at a time
CASES = (("own_peer", 1.0), ("peer_own", 1.0), ("own_peer", 2.0), ("peer_own", 2.0))


@dataclass(frozen=True)
class Cost:
    """One case.

    Attributes
    ----------
    seconds : float
        CPU time of all clients' targets; the median of the repetitions.
    pass_seconds : float
        One pass over the predictions, timed before each repetition.
    passes, least, most : float
        Median and range of ``seconds / pass_seconds`` of the repetitions.
    peak_arrays : float
        Peak memory beyond the predictions, in float32 arrays [samples, classes].
    """

    divergence: str
    temperature: float
    seconds: float
    pass_seconds: float
    passes: float
    least: float
    most: float
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


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU time of this process for a work."""
    start = time.process_time()
    work()
    return time.process_time() - start


def client_milliseconds(samples: int, classes: int, repeat: int) -> dict[str, tuple[float, float, float]]:
    """CPU milliseconds a client of what the server does with its messages: median, least, most.

    Reading a report and keeping it in float16, packing an order with a target, and counting the bytes of
    each.
    """
    values = next(iter(make_predictions(1, samples, classes, "float32").values()))
    indices = np.arange(samples, dtype=np.int32)
    reply = report_record(Report("a", 1, "", "", values, {"num-examples": 1}), "float16", FLOOR)
    expected = Expected(1, samples, classes, "float16", FLOOR, half=True)
    order = Order(
        round=2, num_classes=classes, indices=indices, target_indices=indices, log_targets=values,
        target_entropies=values[:, 0],
    )  # fmt: skip
    sent = order_record(order)
    works: dict[str, Callable[[], object]] = {
        "reading a report": lambda: read_report(reply, expected),
        "bytes of a report": lambda: payload_bytes(reply),
        "packing an order": lambda: order_record(order),
        "bytes of an order": lambda: payload_bytes(sent),
    }
    return {name: _spread([1e3 / BATCH * cpu_seconds(lambda w=work: _batch(w)) for _ in range(repeat)])
            for name, work in works.items()}  # fmt: skip


def _batch(work: Callable[[], object]) -> None:
    for _ in range(BATCH):
        work()


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    return statistics.median(values), min(values), max(values)


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

    times = [(cpu_seconds(lambda: one_pass(predictions)), cpu_seconds(targets)) for _ in range(repeat)]
    base, seconds = (statistics.median(column) for column in zip(*times, strict=True))
    passes = _spread([targets / base for base, targets in times])
    peak, one_array = peak_bytes(targets), 4 * next(iter(predictions.values())).size
    return Cost(divergence, temperature, seconds, base, *passes, peak, peak / one_array)


def measure_size(clients: int, samples: int, classes: int, repeat: int) -> dict[str, Any]:
    """Measure one size, print its two tables and return the figures."""
    predictions = make_predictions(clients, samples, classes, "float16")
    total = sum(values.nbytes for values in predictions.values())
    costs = [measure(predictions, *case, repeat) for case in CASES]
    messages = client_milliseconds(samples, classes, repeat)
    title = f"{clients:,} clients x {samples:,} samples x {classes} classes"
    Console().print(_target_table(f"{title}, {total / 2**20:,.1f} MiB of float16", costs))
    table = Table("a client", "CPU ms", "from", "to", title=title)
    for name, figures in messages.items():
        table.add_row(name, *(f"{value:.3f}" for value in figures))
    Console().print(table)
    return {
        "clients": clients,
        "samples": samples,
        "classes": classes,
        "input_bytes": total,
        "cases": [asdict(cost) for cost in costs],
        "milliseconds": messages,
    }


def _target_table(title: str, costs: Sequence[Cost]) -> Table:
    table = Table(title=title)
    for column in ("divergence", "T", "CPU s", "one pass", "passes", "from", "to", "beyond input", "[N, C]"):
        table.add_column(column, justify="left" if column == "divergence" else "right")
    for cost in costs:
        table.add_row(
            cost.divergence, f"{cost.temperature:g}", f"{cost.seconds:.3f}", f"{cost.pass_seconds:.3f}",
            f"{cost.passes:.2f}", f"{cost.least:.2f}", f"{cost.most:.2f}",
            f"{cost.peak_bytes / 2**20:.2f} MiB", f"{cost.peak_arrays:.1f}",
        )  # fmt: skip
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables; write the figures down where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--size", type=int, nargs=3, action="append", metavar=("CLIENTS", "SAMPLES", "CLASSES")
    )
    parser.add_argument("--repeat", type=int, default=5, help="repetitions of each measurement")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    chosen = parser.parse_args(arguments)
    figures = [measure_size(*size, chosen.repeat) for size in chosen.size or SIZES]
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
