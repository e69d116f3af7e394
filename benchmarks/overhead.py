"""What the federation costs: the same learning as one plain PyTorch loop and through ``flwr run``.

Both do the same arithmetic on the same data with the same number of threads, one strictly after the other:
``plain_loop.py`` in one process, and ``fedmutual run`` with one client at a time that gets all threads.
Training is what lies between the first training step and the last evaluation; start-up (imports, data,
SuperLink, Ray) and the end (ensemble, plots, shut-down) are given apart. By default one core is left to
everything else, since one stalled thread stalls all the threads of a step. A small case then compares
weights bit for bit.

    python benchmarks/overhead.py --repeat 3 --json overhead.json
    python benchmarks/overhead.py rounds=4 data.image_size=64 strategy.phase=separate

Exit code 1: training takes more than 1.05 times the plain loop's time or, with all processes together, 1.25
times its CPU seconds; start-up takes more than 25 CPU seconds; the accuracies differ by more than noise; or
the weights differ. CPU seconds hold on a busy machine, the times do not: its load is printed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cpu import Spent, watch
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file

from fedmutual.data.site import load_shared
from fedmutual.settings.compose import compose
from fedmutual.simulation.request import available_cores
from fedmutual.simulation.superlink import ALLOCATOR

WALL_LIMIT = 1.05  # times the plain loop's training
CPU_LIMIT, STARTUP_LIMIT = 1.25, 25.0  # times the plain loop's CPU seconds; CPU seconds
PLAIN_LOOP = Path(__file__).with_name("plain_loop.py")
TIMED_CASE = ("rounds=8", "public.fill=0")
SMALL_CASE = (
    "rounds=2",
    "data.pool_size=200",
    "public.fill=0",
    "data.unseen_size=100",
    "data.image_size=20",
    "strategy.phase=separate",
    "strategy.mutual_epochs=2",
    "strategy.wire_dtype=float32",
    "deterministic=true",
)
SMALL_CLIENTS = 2


@dataclass(frozen=True)
class Measured:
    """One run.

    Attributes
    ----------
    wall, startup, training, ending : float
        Seconds; the first is the sum of the others.
    in_clients, in_steps : float
        Seconds of the training that clients spent on orders, and of those in optimiser steps; nan for the
        plain loop, which does not measure them.
    accuracy : float
        Mean of the clients' final accuracies on the unseen set.
    cpu : Mapping[str, float]
        CPU seconds by kind of process.
    cpu_startup : float
        CPU seconds of all processes before the first order's training.
    """

    wall: float
    startup: float
    training: float
    ending: float
    accuracy: float
    in_clients: float = math.nan
    in_steps: float = math.nan
    cpu: Mapping[str, float] = field(default_factory=dict)
    cpu_startup: float = 0.0

    @property
    def cpu_training(self) -> float:
        """CPU seconds of all processes after the start-up."""
        return sum(self.cpu.values()) - self.cpu_startup


@dataclass(frozen=True)
class Case:
    """What both are given."""

    overrides: tuple[str, ...]
    clients: int
    threads: int

    def run_plain(self, folder: Path) -> Measured:
        """Run the plain loop in a process of its own; its weights are left in ``folder``."""
        command = [sys.executable, str(PLAIN_LOOP), str(folder), "--clients", str(self.clients)]
        spent = self._run([*command, "--threads", str(self.threads), *self.overrides], lambda: False)
        result = json.loads((folder / "result.json").read_text())
        wall, training = spent.wall, result["seconds"]["training"]
        accuracy = statistics.fmean(result["accuracies"].values())
        # what follows the training is writing the weights: not worth a column
        startup = max(0.0, spent.total - training * self.threads)  # its threads are busy all the time
        return Measured(wall, wall - training, training, 0.0, accuracy, cpu=spent.cpu, cpu_startup=startup)

    def run_federated(self, folder: Path) -> Measured:
        """Run ``fedmutual run``; its results and the clients' states are left in ``folder``."""
        command = [sys.executable, "-m", "fedmutual", "run", *self.overrides]
        # all cores for one client at a time; OMP_NUM_THREADS says how many of them its threads take
        command += [f"num_clients={self.clients}", f"simulation.client_cpus={available_cores()}"]
        lines = folder / "history.jsonl"
        spent = self._run(
            [*command, f"output_dir={folder}", f"state_dir={folder}/clients"],
            lambda: lines.exists() and lines.stat().st_size > 0,
        )
        wall, began = spent.wall, spent.began
        history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
        summary = json.loads((folder / "summary.json").read_text())
        first = [line for line in history if line["round"] == 1]
        # the first order waits until Ray and its actor are there; the clients then answer one by one
        waited = max(line["round_trip_seconds"] for line in first) - sum(line["seconds"] for line in first)
        # the first client also pays for its process's imports, which the plain loop has in its start-up
        beside_steps = [line["seconds"] - line["train_seconds"] for line in first]
        waited += max(beside_steps) - statistics.median(beside_steps)
        training = summary["seconds"]["training"] - waited
        startup = (folder / "config.yaml").stat().st_mtime - began + summary["seconds"]["startup"] + waited
        return Measured(
            wall=wall,
            startup=startup,
            training=training,
            ending=wall - startup - training,
            accuracy=summary["unseen"]["mean_accuracy"],
            in_clients=sum(line["seconds"] for line in history),
            in_steps=sum(line.get("train_seconds", 0.0) for line in history),
            cpu=spent.cpu,
            cpu_startup=sum(spent.at_mark.values()) - self.threads * sum(line["seconds"] for line in first),
        )

    def _run(self, command: list[str], mark: Callable[[], bool]) -> Spent:
        """Run a command with the case's threads."""
        threads = str(self.threads)
        # `fedmutual run` sets up the allocator, which is no merit of the federation: both get it
        environment = {**ALLOCATOR, **os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        return watch(command, environment, mark)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    console = Console()
    machine = describe_machine(arguments.threads)
    console.print(", ".join(f"{key}: {value}" for key, value in machine.items()), highlight=False)
    with tempfile.TemporaryDirectory(prefix="fedmutual-overhead-") as name:
        folder = Path(name)
        common = (f"cache_dir={folder / 'cache'}", "device=cpu")
        timed = Case((*TIMED_CASE, *arguments.overrides, *common), arguments.clients, arguments.threads)
        small = Case((*SMALL_CASE, *common), SMALL_CLIENTS, arguments.threads)
        decode_images(timed, small)
        plain, federated = measure(timed, folder, arguments.repeat, console)
        small.run_plain(folder / "small-plain")
        small.run_federated(folder / "small-federated")
        verdict: dict[str, Any] = {
            "ratio": median(federated, "training") / median(plain, "training"),
            "cpu_ratio": median(federated, "cpu_training") / median(plain, "cpu_training"),
            "cpu_startup": median(federated, "cpu_startup"),
            "noise": noise(timed, plain),
            "timed_case_differences": differences(folder / "plain-0", folder / "federated-0"),
            "small_case_differences": differences(folder / "small-plain", folder / "small-federated"),
        }
    console.print(table(timed, plain, federated), cpu_table(plain, federated))
    problems = judge(console, verdict, plain, federated)
    if arguments.json is not None:
        report = {
            "machine": machine,
            "case": asdict(timed) | {"overrides": [*TIMED_CASE, *arguments.overrides]},
            "plain": [asdict(run) for run in plain],
            "federated": [asdict(run) for run in federated],
            **verdict,
            "problems": problems,
        }
        arguments.json.write_text(json.dumps(_without_nan(report), indent=2) + "\n")
    return 1 if problems else 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="what differs from conf/")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each, alternating (default 3)")
    parser.add_argument("--clients", type=int, default=5)
    spare = max(1, available_cores() - 1)
    parser.add_argument("--threads", type=int, default=spare, help="of both (default: all cores but one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures there")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.repeat < 1 or arguments.clients < 2 or arguments.threads < 1:
        parser.error("--repeat and --threads take at least 1, --clients at least 2")
    return arguments


def describe_machine(threads: int) -> dict[str, Any]:
    """What the figures depend on."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.partition(":")[2].strip()
            for line in cpuinfo.read_text().splitlines()
            if "model name" in line
        ]
        model = next(iter(names), model)
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": threads,
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": version("torch"),
        "flwr": version("flwr"),
    }


def decode_images(*cases: Case) -> None:
    """Make the images once, so that neither side is timed making them."""
    for case in cases:
        load_shared(compose(case.overrides), case.clients)


def measure(case: Case, folder: Path, repeat: int, console: Console) -> tuple[list[Measured], list[Measured]]:
    """Run both ``repeat`` times in turn; who begins changes, so that a drift evens out."""
    plain: list[Measured] = []
    federated: list[Measured] = []
    for number in range(repeat):
        steps = [
            ("plain loop", case.run_plain, plain, "plain"),
            ("fedmutual run", case.run_federated, federated, "federated"),
        ]
        for name, run, runs, prefix in steps if number % 2 == 0 else reversed(steps):
            runs.append(run(folder / f"{prefix}-{number}"))
            last = runs[-1]
            console.print(
                f"{name} {number + 1}/{repeat}: {last.training:.2f} s of training, {last.wall:.1f} s in all",
                highlight=False,
            )
    return plain, federated


def noise(case: Case, plain: list[Measured]) -> float:
    """Two standard errors of the difference of two independent accuracies on the unseen set."""
    unseen = load_shared(compose(case.overrides), case.clients).unseen
    assert unseen is not None
    share = plain[0].accuracy
    return 2 * math.sqrt(2 * share * (1 - share) / len(unseen))


def differences(plain: Path, federated: Path) -> list[str]:
    """Names of the tensors ``client: tensor`` whose bits are not the same."""
    (states,) = (federated / "clients").iterdir()
    ours = {path.stem: load_file(path) for path in plain.glob("*.safetensors")}
    theirs = {path.parent.name: load_file(path) for path in states.glob("*/model.safetensors")}
    if not ours or ours.keys() != theirs.keys():
        return [f"clients: {sorted(ours)} and {sorted(theirs)}"]
    found = []
    for client, weights in sorted(ours.items()):
        for name in sorted(weights.keys() | theirs[client].keys()):
            pair = [side.get(name) for side in (weights, theirs[client])]
            if any(t is None for t in pair) or pair[0].tobytes() != pair[1].tobytes():
                found.append(f"{client}: {name}")
    return found


def median(runs: Sequence[Measured], name: str) -> float:
    return statistics.median(getattr(run, name) for run in runs)


def table(case: Case, plain: Sequence[Measured], federated: Sequence[Measured]) -> Table:
    """Medians, with the least and the greatest value of the training time."""
    title = (
        f"{case.clients} clients, one at a time with {case.threads} threads; seconds, median of {len(plain)}"
    )
    result = Table(title=title, title_justify="left")
    result.add_column("")
    for column in ("start-up", "training", "(from - to)", "in orders", "in steps", "end", "unseen %"):
        result.add_column(column, justify="right")
    for name, runs in (("plain loop", plain), ("fedmutual run", federated)):
        times = [run.training for run in runs]
        cells = [f"{median(runs, key):.2f}" for key in ("startup", "training")]
        cells.append(f"{min(times):.2f} - {max(times):.2f}")
        cells += [f"{median(runs, key):.2f}" for key in ("in_clients", "in_steps", "ending")]
        cells.append(f"{100 * median(runs, 'accuracy'):.2f}")
        result.add_row(name, *("" if cell == "nan" else cell for cell in cells))
    return result


def cpu_table(plain: Sequence[Measured], federated: Sequence[Measured]) -> Table:
    """CPU seconds of the whole run by process, medians."""
    result = Table(title="CPU seconds, start-up included", title_justify="left")
    result.add_column("")
    for name in ("plain loop", "fedmutual run"):
        result.add_column(name, justify="right")
    kinds = sorted({kind for run in federated for kind in run.cpu}, key=lambda k: -cpu_of(federated, k))
    own = {kind for run in plain for kind in run.cpu}
    for kind in kinds:
        result.add_row(kind, "", f"{cpu_of(federated, kind):.1f}")
    total = [sum(cpu_of(runs, kind) for kind in known) for runs, known in ((plain, own), (federated, kinds))]
    result.add_row("all", *(f"{seconds:.1f}" for seconds in total))
    return result


def cpu_of(runs: Sequence[Measured], kind: str) -> float:
    return statistics.median(run.cpu.get(kind, 0.0) for run in runs)


def judge(
    console: Console, verdict: dict[str, Any], plain: Sequence[Measured], federated: Sequence[Measured]
) -> list[str]:
    """Print the verdict; returns what is wrong."""
    gap = abs(median(federated, "accuracy") - median(plain, "accuracy"))
    checks = {
        f"training takes {verdict['ratio']:.3f} times the plain loop's (at most {WALL_LIMIT})": verdict[
            "ratio"
        ]
        <= WALL_LIMIT,
        f"all processes take {verdict['cpu_ratio']:.3f} times its CPU (at most {CPU_LIMIT})": verdict[
            "cpu_ratio"
        ]
        <= CPU_LIMIT,
        f"start-up takes {verdict['cpu_startup']:.1f} CPU seconds (at most {STARTUP_LIMIT:g})": verdict[
            "cpu_startup"
        ]
        <= STARTUP_LIMIT,
        f"accuracies differ by {100 * gap:.2f} points (noise: {100 * verdict['noise']:.2f})": gap
        <= verdict["noise"],
    }
    for case in ("timed", "small"):
        found = verdict[f"{case}_case_differences"]
        outcome = f"{len(found)} tensors differ ({', '.join(found[:3])} ...)" if found else "identical bits"
        checks[f"weights of the {case} case: {outcome}"] = not found
    for text, good in checks.items():
        console.print(f"{'ok   ' if good else 'WRONG'} {text}", highlight=False, markup=False)
    return [text for text, good in checks.items() if not good]


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and math.isnan(value) else value


if __name__ == "__main__":
    sys.exit(main())
