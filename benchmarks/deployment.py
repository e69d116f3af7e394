"""Seconds that a round takes beyond its training, in a real deployment on this machine.

Three SuperNodes with TLS and keys (benchmarks/loopback.py) do, in turn, rounds of

* a bare Flower app whose ClientApp imports torch and answers: what Flower and that import cost by themselves;
* fedmutual, whose client processes start as Flower starts them;
* fedmutual with client processes that are forked from a warm one, as `fedmutual watch` has it.

The servers look for replies at the same interval. A round counts with its slowest client, less what that
client spent in training steps, and with what the server does between two rounds, on average. The CPU seconds
of a message, training and the warm process's own included, depend less on what else the machine does. A
first run, in which nodes make their data, does not count, nor does the first round, in which they fetch the
app.

    python benchmarks/deployment.py --rounds 10 --repeat 2 --json deployment.json

Exit code 1: the median round of fedmutual takes more than 1.2 times the bare app's, or, warm, more than 0.6
times, or a message more than 0.25 times its CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from loopback import SHORT_ROUNDS, SITES, Loopback, wait_for
from rich.console import Console
from rich.table import Table

from fedmutual.results.directory import read_history

COLD_LIMIT, WARM_LIMIT, CPU_LIMIT = 1.2, 0.6, 0.25  # of what the bare app takes
POLL_SECONDS = 0.05
RUN_SECONDS = 3600.0
# the closing message as cheap as a round: what it learns is not what is measured
SETTINGS = (*SHORT_ROUNDS, "strategy.closing=public", f"exchange.poll_interval={POLL_SECONDS}")

PYPROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "bare"
version = "1.0.0"
description = "Imports torch and answers"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "bare"

[tool.flwr.app.components]
serverapp = "server_app:app"
clientapp = "client_app:app"

[tool.flwr.app.config]
out = ""
rounds = ""
"""
CLIENT = """\
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message, context):
    version = ConfigRecord({"version": str(torch.__version__)})
    return Message(RecordDict({"report": version}), reply_to=message)
"""
SERVER = f"""\
import json, time
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()


@app.main()
def main(grid, context):
    while len(nodes := sorted(grid.get_node_ids())) < {SITES}:
        time.sleep({POLL_SECONDS})
    seconds = []
    for _ in range(int(context.run_config["rounds"])):
        start = time.monotonic()
        waiting = set()
        for node in nodes:
            content = RecordDict({{"order": ConfigRecord({{"x": 1}})}})
            waiting.update(grid.push_messages([Message(content, node, "train")]))
        while waiting:
            waiting -= {{m.metadata.reply_to_message_id for m in grid.pull_messages(list(waiting))}}
            time.sleep({POLL_SECONDS})
        seconds.append(time.monotonic() - start)
    with open(context.run_config["out"], "w") as file:
        json.dump(seconds, file)
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Seconds a round beyond training, against a bare Flower app."
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--repeat", type=int, default=2, help="runs of each, in turn")
    parser.add_argument("--json", type=Path, default=None, help="write all figures there")
    arguments = parser.parse_args(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    console = Console()
    bare, cold, warm = Measured(), Measured(), Measured()
    with tempfile.TemporaryDirectory(prefix="fedmutual-deployment-") as folder:
        app = write_bare_app(Path(folder) / "bare")
        for number in range(arguments.repeat):
            with Loopback(Path(folder) / f"cold-{number}", SITES) as deployment:
                run_bare(deployment, app, arguments.rounds, bare)
                run_fedmutual(deployment, arguments.rounds, cold)
            with Loopback(Path(folder) / f"warm-{number}", SITES, warm=True) as deployment:
                run_fedmutual(deployment, arguments.rounds, warm)
            console.print(f"{number + 1} of {arguments.repeat}: load {os.getloadavg()[0]:.1f}")
    show(console, bare, cold, warm)
    checks = (
        ("fedmutual, a round", ratio(cold.rounds, bare.rounds), COLD_LIMIT),
        ("warm, a round", ratio(warm.rounds, bare.rounds), WARM_LIMIT),
        ("warm, CPU of a message", ratio(warm.cpu, bare.cpu), CPU_LIMIT),
    )
    for name, value, limit in checks:
        word = "ok" if value <= limit else "WRONG"
        console.print(f"{word} {name}: {value:.2f} times the bare app's (at most {limit})")
    if arguments.json is not None:
        figures = {"bare": asdict(bare), "fedmutual": asdict(cold), "warm": asdict(warm)}
        arguments.json.write_text(json.dumps(figures, indent=2))
    return int(any(value > limit for _, value, limit in checks))


@dataclass
class Measured:
    """Seconds of one of the three.

    Attributes
    ----------
    rounds, closing, between : list of float
        Of a round beyond training, of a closing message beyond it, of the server's part of a round.
    cpu : list of float
        CPU seconds of a message in each run.
    """

    rounds: list[float] = field(default_factory=list)
    closing: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @contextmanager
    def cpu_of(self, deployment: Loopback) -> Iterator[None]:
        """Measure the CPU of a message in a block."""
        cpu, messages = deployment.client_cpu(), deployment.messages()
        yield
        time.sleep(2.0)  # until the last processes have ended
        self.cpu.append((deployment.client_cpu() - cpu) / (deployment.messages() - messages))


def ratio(values: Sequence[float], of: Sequence[float]) -> float:
    """Median by median."""
    return statistics.median(values) / statistics.median(of)


def write_bare_app(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name, text in (("pyproject.toml", PYPROJECT), ("client_app.py", CLIENT), ("server_app.py", SERVER)):
        (folder / name).write_text(text)
    return folder


def run_bare(deployment: Loopback, app: Path, rounds: int, measured: Measured) -> None:
    """A run of the bare app."""
    out = deployment.folder / "bare.json"
    with measured.cpu_of(deployment):
        finish(deployment, deployment.submit(app_dir=app, out=str(out), rounds=str(rounds)))
    measured.rounds += json.loads(out.read_text())[1:]


def run_fedmutual(deployment: Loopback, rounds: int, measured: Measured) -> None:
    """A run of fedmutual, after a short one."""
    finish(deployment, deployment.submit(*SETTINGS, "rounds=1", f"output_dir={deployment.folder / 'first'}"))
    output = deployment.folder / "out"
    with measured.cpu_of(deployment):
        finish(deployment, deployment.submit(*SETTINGS, f"rounds={rounds}", f"output_dir={output}"))
    lines: dict[int, list[tuple[float, float]]] = {}
    for line in read_history(output):
        spent = (line["round_trip_seconds"], line.get("train_seconds", 0.0))
        lines.setdefault(line["round"], []).append(spent)
    running = json.loads((output / "summary.json").read_text())["seconds"]["training"]
    server = (running - sum(max(whole for whole, _ in each) for each in lines.values())) / (rounds + 1)
    beyond = {round: server + max(whole - train for whole, train in each) for round, each in lines.items()}
    measured.rounds += [beyond[round] for round in range(2, rounds + 1)]
    measured.closing.append(beyond[rounds + 1])
    measured.between.append(server)


def finish(deployment: Loopback, run: str) -> None:
    """Wait for the end of a run; it is asked about rarely, since asking takes the machine's time."""
    start = time.monotonic()
    wait_for(
        lambda: deployment.status(run).startswith("finished"), RUN_SECONDS, f"run {run} does not end", 5.0
    )
    status = deployment.status(run)
    if status != "finished:completed":
        raise SystemExit(f"run {run} ended as {status} after {time.monotonic() - start:.0f} s")


def show(console: Console, bare: Measured, cold: Measured, warm: Measured) -> None:
    table = Table(title="Seconds a round beyond training", title_justify="left")
    for column in ("", "median", "least", "greatest", "values"):
        table.add_column(column, justify="left" if not column else "right")
    rows = {
        "bare app, import torch": bare.rounds,
        "fedmutual": cold.rounds,
        "fedmutual, warm": warm.rounds,
        "fedmutual, closing message": cold.closing,
        "fedmutual, warm, closing message": warm.closing,
        "fedmutual, server's part": [*cold.between, *warm.between],
        "CPU of a message, bare": bare.cpu,
        "CPU of a message, fedmutual": cold.cpu,
        "CPU of a message, fedmutual, warm": warm.cpu,
    }
    for name, values in rows.items():
        cells = [statistics.median(values), min(values), max(values)]
        table.add_row(name, *(f"{value:.2f}" for value in cells), str(len(values)))
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
