"""A thousand nodes on a real SuperLink: seconds a round beyond the nodes' own work, messages, memory, CPU.

A SuperLink and its SuperExec run as in a deployment (benchmarks/loopback.py, without TLS), one more process
is all the nodes (benchmarks/light_nodes.py), and fedmutual's own ServerApp runs mutual learning with them:
every node reports distributions of its own, and gets targets of its own. No node learns, so a round is what
the server, Flower and the way between them take. A round counts from the end of the one before it (the first
from the start of training) until its reports are in the history, less what the nodes spent on making them.

    python benchmarks/thousand_nodes.py --nodes 1000 --rounds 3 --json nodes.json

Exit code 1: a round takes longer than ``--limit``, or a node's report is missing or was rejected.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from loopback import Loopback
from rich.console import Console
from rich.table import Table

from fedmutual.results.directory import HISTORY, SUMMARY, read_history

LIMIT = 15.0  # seconds a round beyond the nodes' own work
LOOK_SECONDS = 0.25  # between two looks at the processes and at the history
MIB = 2**20
SERVER, SUPERLINK, NODES = "ServerApp", "SuperLink", "nodes"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Rounds of a real SuperLink with many light nodes.")
    parser.add_argument("--nodes", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=600, help="public samples a round")
    parser.add_argument("--limit", type=float, default=LIMIT, help="most seconds a round")
    parser.add_argument("--threads", type=int, default=8, help="of the nodes' process")
    parser.add_argument("--poll", type=float, default=3.0, help="seconds between two questions of a node")
    parser.add_argument(
        "--database", action="store_true", help="the SuperLink keeps its state in a file; else in memory"
    )
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds until the run is given up")
    parser.add_argument("--json", type=Path, default=None, help="write all figures there")
    parser.add_argument("--folder", type=Path, default=None, help="keep logs and results there")
    arguments = parser.parse_args(argv)
    console = Console()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # what was started is ended
    with tempfile.TemporaryDirectory(prefix="fedmutual-nodes-") as temporary:
        folder = arguments.folder or Path(temporary)
        figures = measure(folder, arguments)
    show(console, figures)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    problems = complaints(figures, arguments.limit)
    for problem in problems:
        console.print(f"WRONG {problem}")
    return int(bool(problems))


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Do the run; return its figures."""
    output = folder / "out"
    settings = (
        f"num_clients={arguments.nodes}",
        f"rounds={arguments.rounds}",
        f"public.size={arguments.samples}",
        f"data.pool_size={arguments.samples + 20 * arguments.nodes}",  # the nodes have no images
        "data.unseen_size=40",
        "data.image_size=20",
        "public.fill=0",
        "strategy.closing=public",
        "device=cpu",
        f"output_dir={output}",
    )
    with Link(folder / "link", arguments.database) as link:
        with crowd(link.address, folder, arguments):
            watched = Watched(link, output)
            run = link.submit(*settings)
            watched.until_summary(lambda: link.status(run), arguments.timeout)
        watched.look()
    summary = json.loads((output / SUMMARY).read_text())
    if summary["status"] != "completed":
        raise SystemExit(f"the run {summary['status']}: {summary['reason']}")
    nodes = json.loads((folder / "nodes.json").read_text())
    return figures_of(arguments.nodes, read_history(output), summary, nodes, watched)


class Link(Loopback):
    """A SuperLink and its SuperExec, without TLS; the nodes come from elsewhere."""

    def __init__(self, folder: Path, database: bool) -> None:
        super().__init__(folder, sites=0, secure=False)
        self._database = database

    def _command(self, part: str) -> list[str]:
        command = super()._command(part)
        if not self._database and "--database" in command:  # Flower's own default
            at = command.index("--database")
            del command[at : at + 2]
        return command


@contextmanager
def crowd(address: str, folder: Path, arguments: argparse.Namespace) -> Iterator[None]:
    """Run the nodes' process, from when all of them have joined."""
    command = [sys.executable, str(Path(__file__).with_name("light_nodes.py")), "--address", address]
    command += ["--nodes", str(arguments.nodes), "--threads", str(arguments.threads)]
    command += ["--poll", str(arguments.poll), "--json", str(folder / "nodes.json")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            if process.stdout.readline() != "joined\n":
                raise SystemExit("the nodes cannot join the SuperLink")
            yield
        finally:
            process.terminate()
            process.wait(timeout=120)


@dataclass
class Seen:
    """CPU seconds and peak memory (bytes) of one process."""

    kind: str
    cpu: float = 0.0
    peak: int = 0


@dataclass
class Watched:
    """What the processes take, and when each round's reports were in the history."""

    link: Loopback
    output: Path
    seen: dict[int, Seen] = field(default_factory=dict)
    before: dict[int, float] = field(default_factory=dict)  # CPU before the run
    lines: list[tuple[float, int]] = field(default_factory=list)  # Unix time, lines of the history then

    def __post_init__(self) -> None:
        self._roots = [p for part in ("superlink", "superexec") for p in self.link.processes(part)]
        self.look()
        self.before = {pid: seen.cpu for pid, seen in self.seen.items()}

    def until_summary(self, status: Callable[[], str], seconds: float) -> None:
        """Look again and again until the run has left its summary, or ended without."""
        deadline, asked = time.monotonic() + seconds, time.monotonic()
        while not (self.output / SUMMARY).exists():
            if time.monotonic() > deadline:
                raise SystemExit(f"the run takes more than {seconds:g} s; see {self.link.folder}")
            if time.monotonic() > asked + 60.0:  # rarely: a command of its own takes the machine's time
                asked = time.monotonic()
                if status().startswith("finished") and not (self.output / SUMMARY).exists():
                    raise SystemExit(f"the run ended without results; see {self.link.folder}")
            self.look()
            time.sleep(LOOK_SECONDS)

    def look(self) -> None:
        """Note CPU and memory of every process, and how far the run is."""
        for process in self._processes():
            with contextlib.suppress(psutil.Error, OSError):
                times, kind = process.cpu_times(), kind_of(process.cmdline())
                seen = self.seen.setdefault(process.pid, Seen(kind))
                seen.kind, seen.cpu = kind or seen.kind, times.user + times.system
                seen.peak = max(seen.peak, peak_of(process.pid))
        with contextlib.suppress(OSError):
            count = (self.output / HISTORY).read_bytes().count(b"\n")
            if count and (not self.lines or self.lines[-1][1] != count):
                self.lines.append((time.time(), count))

    def _processes(self) -> list[psutil.Process]:
        found = list(self._roots)
        for root in [*self._roots, psutil.Process()]:
            with contextlib.suppress(psutil.Error):
                found += root.children(recursive=True)
        return found

    def cpu(self) -> dict[str, float]:
        """CPU seconds during the run, by kind of process."""
        sums: Counter[str] = Counter()
        for pid, seen in self.seen.items():
            sums[seen.kind] += seen.cpu - self.before.get(pid, 0.0)
        return dict(sums)

    def peak(self, kind: str) -> int:
        """Peak resident bytes of the largest process of a kind."""
        return max((seen.peak for seen in self.seen.values() if seen.kind == kind), default=0)


def kind_of(command_line: Sequence[str]) -> str:
    """Return what a process is, by its command line."""
    line = " ".join(command_line)
    words = {
        "light_nodes.py": NODES,
        "flwr-serverapp": SERVER,
        "flower-superlink": SUPERLINK,
        "flower-superexec": "SuperExec",
    }
    return next((kind for word, kind in words.items() if word in line), "other" if line else "")


def peak_of(pid: int) -> int:
    """Peak resident bytes of a process so far, where the kernel says it; else what it has now."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return int(psutil.Process(pid).memory_info().rss)


def ends_of(history: Sequence[dict[str, Any]], lines: Sequence[tuple[float, int]]) -> list[float]:
    """When each round's reports were all in the history: the first look that saw as many lines."""
    counts = Counter(line["round"] for line in history)
    totals = itertools.accumulate(counts[number] for number in sorted(counts))
    return [next(moment for moment, count in lines if count >= total) for total in totals]


def figures_of(
    nodes: int,
    history: Sequence[dict[str, Any]],
    summary: dict[str, Any],
    said: dict[str, Any],
    watched: Watched,
) -> dict[str, Any]:
    """Put together what was measured; rounds include the closing one."""
    ends = ends_of(history, watched.lines)
    start = ends[-1] - summary["seconds"]["training"]
    rounds = []
    for number, (begun, end) in enumerate(zip([start, *ends], ends, strict=False), 1):
        own = said["rounds"][str(number)]
        lines = [line for line in history if line["round"] == number]
        rounds.append(
            {
                "round": number,
                "seconds": end - begun,
                "own": own["own"],
                "beyond": end - begun - own["own"],
                "server": (own["first"] - begun) + (end - own["last"]),
                "good": sum("rejected" not in line for line in lines),
                "targets": own["targets"],
                "distinct": own["distinct"],
            }
        )
    seconds = ends[-1] - start
    return {
        "nodes": nodes,
        "rounds": rounds,
        "messages_a_second": 2 * sum(r["good"] for r in rounds) / seconds,
        "requests_a_second": said["requests"] / seconds,
        "seconds": seconds,
        "peak_bytes": {kind: watched.peak(kind) for kind in (SUPERLINK, SERVER, NODES)},
        "cpu_seconds": watched.cpu(),
        "errors": said["errors"][:5],
        "processors": os.cpu_count(),
        "load": os.getloadavg()[0],
    }


def complaints(figures: dict[str, Any], limit: float) -> list[str]:
    """Return what is wrong with a run: slow rounds, lost reports, targets that are not each node's own."""
    problems = []
    nodes = figures["nodes"]
    for each in figures["rounds"]:
        if each["beyond"] > limit:
            problems.append(f"round {each['round']}: {each['beyond']:.1f} s, at most {limit:g} s")
        if each["good"] != nodes:
            problems.append(f"round {each['round']}: {each['good']} good reports of {nodes}")
        if each["round"] > 1 and not each["distinct"] == each["targets"] == nodes:
            problems.append(
                f"round {each['round']}: {each['distinct']} different targets for {each['targets']} nodes"
            )
    return problems


def bound(figures: dict[str, Any]) -> str:
    """Say in a sentence what a round's time goes into."""
    cpu, seconds = figures["cpu_seconds"], figures["seconds"]
    kind = max(cpu, key=lambda name: cpu[name])
    busy = sum(cpu.values()) / seconds / (figures["processors"] or 1)
    return (
        f"Most CPU goes to the {kind}: {cpu[kind] / seconds:.2f} of a processor; all together keep "
        f"{busy:.0%} of {figures['processors']} processors busy (load {figures['load']:.1f})."
    )


def show(console: Console, figures: dict[str, Any]) -> None:
    table = Table(title=f"{figures['nodes']} nodes", title_justify="left")
    for column in ("round", "seconds", "nodes' own", "beyond", "server alone", "good reports"):
        table.add_column(column, justify="right")
    closing = figures["rounds"][-1]["round"]
    for each in figures["rounds"]:
        name = "closing" if each["round"] == closing else str(each["round"])
        numbers = (each[key] for key in ("seconds", "own", "beyond", "server"))
        table.add_row(name, *(f"{number:.2f}" for number in numbers), str(each["good"]))
    console.print(table)
    console.print(
        f"{figures['messages_a_second']:.0f} messages a second (orders and reports), "
        f"{figures['requests_a_second']:.0f} requests of the nodes a second"
    )
    for kind, size in figures["peak_bytes"].items():
        console.print(f"{kind}: {size / MIB:.0f} MiB at most")
    for kind, seconds in sorted(figures["cpu_seconds"].items(), key=lambda item: -item[1]):
        console.print(f"{kind}: {seconds:.1f} s of CPU")
    console.print(bound(figures))
    for error in figures["errors"]:
        console.print(f"a node's error: {error}")


if __name__ == "__main__":
    sys.exit(main())
