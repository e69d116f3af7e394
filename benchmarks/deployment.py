"""Seconds that a round takes beyond its training, in a real deployment on this machine.

Three SuperNodes with TLS and keys (benchmarks/loopback.py) do rounds of fedmutual and, in turn, rounds of a
bare Flower app whose ClientApp imports torch and answers: what Flower and the import of torch cost by
themselves. Both servers look for replies at the same interval. A round counts with its slowest client, less
what that client spent in training steps, and with what the server does between two rounds, on average. The
CPU seconds of a client process, training included, depend less on what else the machine does.

    python benchmarks/deployment.py --rounds 10 --repeat 2 --json deployment.json

Exit code 1: the median round of fedmutual takes more than 1.2 times the bare app's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from loopback import SHORT_ROUNDS, SITES, Loopback, wait_for
from rich.console import Console
from rich.table import Table

from fedmutual.results.directory import read_history

LIMIT = 1.2
POLL_SECONDS = 0.05
RUN_SECONDS = 3600.0
SETTINGS = (*SHORT_ROUNDS, f"exchange.poll_interval={POLL_SECONDS}")

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
    bare: list[float] = []
    ours: list[float] = []
    closing: list[float] = []
    between: list[float] = []
    bare_cpu: list[float] = []
    cpu: list[float] = []
    with tempfile.TemporaryDirectory(prefix="fedmutual-deployment-") as folder:
        app = write_bare_app(Path(folder) / "bare")
        with Loopback(Path(folder) / "loopback", SITES) as deployment:
            for number in range(arguments.repeat):
                start = deployment.client_cpu()
                bare += run_bare(deployment, app, arguments.rounds)
                middle = deployment.client_cpu()
                rounds, last, server = run_fedmutual(deployment, f"out-{number}", arguments.rounds)
                ours, closing, between = ours + rounds, [*closing, last], [*between, server]
                bare_cpu.append((middle - start) / SITES / arguments.rounds)
                cpu.append((deployment.client_cpu() - middle) / SITES / (arguments.rounds + 1))
                console.print(f"{number + 1} of {arguments.repeat}: load {os.getloadavg()[0]:.1f}")
    ratio = statistics.median(ours) / statistics.median(bare)
    show(console, bare, ours, closing, between, bare_cpu, cpu)
    console.print(f"{'ok' if ratio <= LIMIT else 'WRONG'} {ratio:.2f} times the bare app (at most {LIMIT})")
    if arguments.json is not None:
        figures = {"bare": bare, "fedmutual": ours, "closing": closing, "between": between,
                   "bare_cpu": bare_cpu, "cpu": cpu, "ratio": ratio}  # fmt: skip
        arguments.json.write_text(json.dumps(figures, indent=2))
    return int(ratio > LIMIT)


def write_bare_app(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name, text in (("pyproject.toml", PYPROJECT), ("client_app.py", CLIENT), ("server_app.py", SERVER)):
        (folder / name).write_text(text)
    return folder


def run_bare(deployment: Loopback, app: Path, rounds: int) -> list[float]:
    """Seconds of each round but the first, in which nodes fetch and install the app."""
    out = deployment.folder / "bare.json"
    out.unlink(missing_ok=True)
    run = deployment.submit(app_dir=app, out=str(out), rounds=str(rounds))
    finish(deployment, run)
    seconds: list[float] = json.loads(out.read_text())
    return seconds[1:]


def run_fedmutual(deployment: Loopback, name: str, rounds: int) -> tuple[list[float], float, float]:
    """Seconds beyond training: of each round but the first, of the closing one, of the server a round."""
    output = deployment.folder / name
    finish(deployment, deployment.submit(*SETTINGS, f"rounds={rounds}", f"output_dir={output}"))
    lines: dict[int, list[tuple[float, float]]] = {}
    for line in read_history(output):
        spent = (line["round_trip_seconds"], line.get("train_seconds", 0.0))
        lines.setdefault(line["round"], []).append(spent)
    running = json.loads((output / "summary.json").read_text())["seconds"]["training"]
    server = (running - sum(max(whole for whole, _ in each) for each in lines.values())) / (rounds + 1)
    beyond = {round: server + max(whole - train for whole, train in each) for round, each in lines.items()}
    return [beyond[round] for round in range(2, rounds + 1)], beyond[rounds + 1], server


def finish(deployment: Loopback, run: str) -> None:
    """Wait for the end of a run; it is asked about rarely, since asking takes the machine's time."""
    start = time.monotonic()
    wait_for(
        lambda: deployment.status(run).startswith("finished"), RUN_SECONDS, f"run {run} does not end", 5.0
    )
    status = deployment.status(run)
    if status != "finished:completed":
        raise SystemExit(f"run {run} ended as {status} after {time.monotonic() - start:.0f} s")


def show(console: Console, *figures: Sequence[float]) -> None:
    table = Table(title="Seconds a round beyond training", title_justify="left")
    for column in ("", "median", "least", "greatest", "values"):
        table.add_column(column, justify="left" if not column else "right")
    rows = ("bare app, import torch", "fedmutual", "fedmutual, closing message", "fedmutual, server's part",
            "CPU of a client process, bare", "CPU of a client process, fedmutual")  # fmt: skip
    for name, values in zip(rows, figures, strict=True):
        cells = [statistics.median(values), min(values), max(values)]
        table.add_row(name, *(f"{value:.2f}" for value in cells), str(len(values)))
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
