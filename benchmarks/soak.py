"""A long run of a real deployment on this machine, in which something is killed again and again.

Three sites, TLS, node keys, 100 short rounds (benchmarks/loopback.py). After every tenth round one of these
gets SIGKILL, drawn by seed: a client process, a whole site, the ServerApp (its run is then resumed), the
SuperLink. Memory, files and bytes on disk are taken after every round. At the end the models are compared,
bit for bit, with those of ``fedmutual run`` with the same settings, to which nothing happened.

    python benchmarks/soak.py --json soak.json
    python benchmarks/soak.py --rounds 20 --every 5

Two other trials, in which sites run under ``fedmutual watch``; growth is not looked at:

    python benchmarks/soak.py --worst 30                          kills at the state's write and at the reply
    python benchmarks/soak.py --busy 8 --minutes 20 --rounds 30   busy loops beside it, at normal priority

Exit code 1: the run did not complete, a report is missing, a model differs, something grew (the median of the
last third of the rounds is more than 10 % above that of the third before), or a site had more than one client
process beside the one that is needed.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from loopback import SHORT_ROUNDS, SITES, Loopback
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file

from fedmutual.results.directory import read_history

GROWTH = 1.10  # of the last third of the rounds over the middle third
KILLS = ("client process", "site", "ServerApp", "SuperLink")
ROUND_TIMEOUT = 1200.0
MOMENTS = ("reply", "state", "saved")  # of benchmarks/killpoint/sitecustomize.py
PROCESSES = 2  # client processes of a site at a time: the one that works, and one that starts or ends


@dataclass(frozen=True)
class Sample:
    """What is there after a round.

    Attributes
    ----------
    seconds : float
        Since the start.
    superlink_mb, site_mb : float
        Resident memory: the SuperLink's, and the median over sites of SuperNode and SuperExec together.
    state_files, state_mb : float
        Files and size of a client's state folder, median over sites.
    site_files, site_disk_mb : float
        The same of a whole site: state and FLWR_HOME.
    server_files, server_disk_mb : float
        The SuperLink's database and the results' folder.
    """

    round: int
    seconds: float
    superlink_mb: float
    site_mb: float
    state_files: float
    state_mb: float
    site_files: float
    site_disk_mb: float
    server_files: float
    server_disk_mb: float


GROWING = ("round", "seconds", "server_disk_mb")  # the history and Flower's database keep a line a report


class Soak:
    """One soak."""

    def __init__(
        self, deployment: Loopback, rounds: int, every: int, seed: int, console: Console, worst: int = 0
    ) -> None:
        self.deployment = deployment
        self.sites = deployment.sites
        self.worst = worst
        self.trial = bool(worst) or every >= rounds
        self.spared = 0  # client processes that were to be killed, and were not
        self.most_processes = 0
        self.output = deployment.folder / "out"
        self.rounds, self.every = rounds, every
        self.console = console
        self.samples: list[Sample] = []
        self.kills: list[dict[str, Any]] = []
        self.seed = seed
        self._random = random.Random(seed)
        self._next: list[str] = []
        common = [setting for setting in SHORT_ROUNDS if not setting.startswith("num_clients=")]
        self._settings = (*common, f"num_clients={self.sites}", f"rounds={rounds}")
        self._start = time.monotonic()
        self._run = ""

    def run(self) -> str:
        """Run it to its end; returns Flower's status."""
        self._run = self.deployment.submit(*self._settings, f"output_dir={self.output}")
        sampled = killed = 0
        last_change = asked = time.monotonic()
        armed: list[Path] = []
        while True:
            time.sleep(0.2)
            self.most_processes = max(self.most_processes, self._processes())
            done = max((line["round"] for line in read_history(self.output)), default=0)
            if done > sampled:
                sampled, last_change = done, time.monotonic()
                self.samples.append(self._sample(done))
                if self.trial:
                    self._say(
                        f"round {done} done; so far at most {self.most_processes} client processes a site"
                    )
            if self.worst and done > killed and len(self.kills) < self.worst and done < self.rounds:
                killed = done
                self.spared += sum(not path.exists() for path in armed)
                armed = self._arm(done + 1)
            if done and not self.worst and done % self.every == 0 and done < self.rounds and done != killed:
                killed = done
                self._kill(done + 1)
            if time.monotonic() - last_change > ROUND_TIMEOUT:
                return f"no round within {ROUND_TIMEOUT:g} s"
            if time.monotonic() - asked > 10.0:
                asked = time.monotonic()
                status = self.deployment.status(self._run)
                if status.startswith("finished"):
                    self.spared += sum(not path.exists() for path in armed)
                    return status

    def _arm(self, round: int) -> list[Path]:
        """Have a client process of every site killed in this round, each at its own moment."""
        armed = []
        for site in range(min(self.sites, self.worst - len(self.kills))):
            moment = MOMENTS[(site + round + self.seed) % len(MOMENTS)]
            armed.append(self.deployment.arm(site, moment))
            self.kills.append({"round": round, "what": moment, "where": f"site-{site}"})
            self._say(f"round {round}: SIGKILL to the client process of site-{site} at: {moment}")
        return armed

    def _processes(self) -> int:
        """Client processes of the site that has most of them."""
        return max(len(self.deployment.processes(f"site-{i}", "flwr-clientapp")) for i in range(self.sites))

    def _kill(self, round: int) -> None:
        since = (self.output / "history.jsonl").stat().st_mtime
        self._next = self._next or self._random.sample(KILLS, len(KILLS))  # each kind before one comes twice
        what, site = self._next.pop(), f"site-{self._random.randrange(self.sites)}"
        self.deployment.wait_for_process(site, "flwr-clientapp", since=since, timeout=ROUND_TIMEOUT)
        time.sleep(self._random.uniform(0.0, 3.0))  # anywhere between its imports and its answer
        if what == "client process":
            self.deployment.kill_process(site, "flwr-clientapp")
        elif what == "ServerApp":
            self.deployment.kill_process("superexec", "flwr-serverapp")
            self._run = self.deployment.submit(*self._settings, f"resume={self.output}")
        else:
            part = site if what == "site" else "superlink"
            self.deployment.kill_part(part)
            self.deployment.start_part(part)
        where = site if what in ("client process", "site") else ""
        self.kills.append({"round": round, "what": what, "where": where})
        self._say(f"round {round}: SIGKILL to {what} {where}")

    def _sample(self, round: int) -> Sample:
        folders = [self.deployment.folder / f"site-{site}" for site in range(self.sites)]
        states = [tree(folder / "state") for folder in folders]
        sites = [tree(folder) for folder in folders]
        results, database = tree(self.output), list(self.deployment.folder.glob("superlink.db*"))
        sample = Sample(
            round=round,
            seconds=time.monotonic() - self._start,
            superlink_mb=self._memory("superlink", "flower-superlink"),
            site_mb=statistics.median(
                self._memory(f"site-{i}", "flower-supernode") + self._memory(f"site-{i}", "flower-superexec")
                for i in range(self.sites)
            ),
            state_files=statistics.median(files for files, _ in states),
            state_mb=statistics.median(size for _, size in states),
            site_files=statistics.median(files for files, _ in sites),
            site_disk_mb=statistics.median(size for _, size in sites),
            server_files=results[0] + len(database),
            server_disk_mb=results[1] + sum(path.stat().st_size for path in database) / 1e6,
        )
        if round % self.every == 0:
            self._say(f"round {round}: {sample}")
        return sample

    def _memory(self, part: str, name: str) -> float:
        total = 0.0
        for process in self.deployment.processes(part, name):
            try:
                total += process.memory_info().rss / 1e6
            except psutil.NoSuchProcess:
                continue
        return total

    def _say(self, text: str) -> None:
        self.console.print(
            f"{time.monotonic() - self._start:7.1f} s  {text}", highlight=False, soft_wrap=True
        )

    def reference(self) -> Path:
        """Do the same with ``fedmutual run``, undisturbed; returns its results' folder."""
        output = self.deployment.folder / "reference"
        command = [sys.executable, "-m", "fedmutual", "run", *self._settings, f"output_dir={output}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return output

    def differences(self, reference: Path) -> list[str]:
        """Clients whose final model has other bits than in the undisturbed run, or none."""
        found = []
        for site in range(self.sites):
            name = f"client-{site}"
            ours = list(
                (self.deployment.folder / f"site-{site}" / "state").glob(f"*/{name}/model.safetensors")
            )
            (theirs,) = (reference / "clients").glob(f"*/{name}/model.safetensors")
            if len(ours) != 1 or load_bytes(ours[0]) != load_bytes(theirs):
                found.append(name)
        return found


def load_bytes(path: Path) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in load_file(path).items()}


def tree(folder: Path) -> tuple[int, float]:
    """Files below a folder, and their size in MB; what vanishes meanwhile does not count."""
    count, size = 0, 0
    for path in folder.rglob("*"):
        try:
            if path.is_file():
                count, size = count + 1, size + path.stat().st_size
        except FileNotFoundError:
            continue
    return count, size / 1e6


def growth(samples: Sequence[Sample]) -> dict[str, tuple[float, float, float]]:
    """Median of each third of the rounds, by quantity."""
    cuts = [len(samples) * part // 3 for part in range(4)]
    thirds = [samples[start:stop] for start, stop in itertools.pairwise(cuts)]
    names = [name for name in asdict(samples[0]) if name not in ("round", "seconds")]
    return {
        name: tuple(statistics.median(getattr(s, name) for s in third) for third in thirds) for name in names
    }


def missing(soak: Soak) -> list[str]:
    """Reports that are not there, and those that were rejected."""
    history = read_history(soak.output)
    good = {(line["round"], line["client"]) for line in history if "rejected" not in line}
    wanted = [(round, f"client-{site}") for round in range(1, soak.rounds + 2) for site in range(soak.sites)]
    gone = [f"round {round}, {name}" for round, name in wanted if (round, name) not in good]
    return gone + [
        f"round {line['round']}, {line['client']}: {line['rejected']}"
        for line in history
        if "rejected" in line
    ]


@contextlib.contextmanager
def busy_loops(count: int, minutes: float) -> Iterator[None]:
    """So many processes that do nothing but use a CPU, for so long at most."""
    code = f"import time; end = time.monotonic() + {60 * minutes}\nwhile time.monotonic() < end: pass"
    loops = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="A long run in which something is killed again and again.")
    parser.add_argument("--sites", type=int, default=SITES)
    parser.add_argument("--rounds", type=int, default=None, help="100; with --worst as many as it takes")
    parser.add_argument(
        "--worst", type=int, default=0, help="kills at the worst moments, one a site and round"
    )
    parser.add_argument("--busy", type=int, default=0, help="busy loops beside it, and no kills")
    parser.add_argument("--minutes", type=float, default=20.0, help="how long they last")
    parser.add_argument("--patience", type=float, default=120.0, help="of the sites' watch, with either")
    parser.add_argument("--cold", action="store_true", help="client processes start as Flower starts them")
    parser.add_argument("--every", type=int, default=10, help="rounds between two kills")
    parser.add_argument("--seed", type=int, default=0, help="what is killed, and where")
    parser.add_argument("--json", type=Path, default=None, help="write all figures there")
    parser.add_argument("--folder", type=Path, default=None, help="where everything goes, and stays")
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # nothing is left running
    os.environ["OMP_NUM_THREADS"] = "1"  # equal bits in the deployment and in the simulation
    console = Console()
    with tempfile.TemporaryDirectory(prefix="fedmutual-soak-") as temporary:
        folder = arguments.folder or Path(temporary)
        trial = bool(arguments.worst or arguments.busy)
        rounds = arguments.rounds or (-(-arguments.worst // arguments.sites) + 1 if arguments.worst else 100)
        every = rounds if arguments.busy else arguments.every
        patience = arguments.patience if trial else None
        with Loopback(folder, arguments.sites, patience=patience, warm=not arguments.cold) as deployment:
            soak = Soak(deployment, rounds, every, arguments.seed, console, arguments.worst)
            with busy_loops(arguments.busy, arguments.minutes):
                status = soak.run()
            restarts = deployment.restarts()
        wrong = [] if status == "finished:completed" else [f"the run ended as {status}"]
        lost = missing(soak)
        different = soak.differences(soak.reference()) if not wrong else []
    figures = growth(soak.samples) if not trial else {}
    if not trial:
        console.print(table(figures))
    console.print(f"{len(soak.kills)} kills, {len(soak.samples)} rounds sampled, "
                  f"{soak.samples[-1].seconds:.0f} s in all; at most {soak.most_processes} client processes "
                  f"of a site at a time; {restarts} restarts by the watch", highlight=False)  # fmt: skip
    wrong += [f"missing: {report}" for report in lost]
    wrong += [f"{client}: its model differs from the undisturbed run's" for client in different]
    wrong += [
        f"{name} grew from {middle:.1f} to {last:.1f}"
        for name, (_, middle, last) in figures.items()
        if name not in GROWING and last > GROWTH * middle
    ]
    if soak.most_processes > PROCESSES:
        wrong.append(f"{soak.most_processes} client processes of a site at a time")
    if soak.spared:
        wrong.append(f"{soak.spared} client processes were not killed at their moment")
    for problem in wrong:
        console.print(f"WRONG {problem}", highlight=False, markup=False)
    if not wrong:
        console.print(
            "ok: every report is there, the models have the undisturbed run's bits"
            + ("" if trial else ", nothing grew")
        )
    if arguments.json is not None:
        report = {"status": status, "kills": soak.kills, "most_processes": soak.most_processes,
                  "restarts": restarts, "missing": lost, "different_models": different,
                  "thirds": figures, "samples": [asdict(sample) for sample in soak.samples]}  # fmt: skip
        arguments.json.write_text(json.dumps(report, indent=2))
    return 1 if wrong else 0


def table(figures: dict[str, tuple[float, float, float]]) -> Table:
    """Medians of the thirds."""
    result = Table(title="Median of each third of the rounds", title_justify="left")
    for column in ("", "first", "middle", "last"):
        result.add_column(column, justify="left" if not column else "right")
    for name, values in figures.items():
        result.add_row(name.replace("_", " "), *(f"{value:.2f}" for value in values))
    return result


if __name__ == "__main__":
    sys.exit(main())
