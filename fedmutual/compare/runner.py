"""Run what is missing of a study, several runs at a time, and leave nothing running."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from fedmutual.compare.outcome import read_summary
from fedmutual.compare.plan import PlannedRun
from fedmutual.compare.worker import PRELOAD, log_of, work
from fedmutual.report.tables import percent
from fedmutual.settings import SettingsError
from fedmutual.simulation.interrupts import Interrupts
from fedmutual.simulation.progress import HistoryTail
from fedmutual.simulation.run import last_error
from fedmutual.simulation.superlink import ALLOCATOR

POLL_SECONDS = 0.1
ENDING_SECONDS = 30.0  # for runs that were told to end: a federation of real processes needs a while


@dataclass
class _Job:
    run: PlannedRun
    path: Path
    process: BaseProcess
    history: HistoryTail
    log_start: int
    round: int = 0


class Runner:
    """The runs of one study.

    Parameters
    ----------
    folder : Path
        The study's.
    engine : str
        "inprocess", or "flwr" for the machinery of ``fedmutual run``.
    jobs : int
        Runs at a time.
    """

    def __init__(self, folder: Path, engine: str, jobs: int, console: Console) -> None:
        self.folder, self.engine, self.jobs, self.console = folder, engine, jobs, console
        self._context = multiprocessing.get_context("forkserver")
        self._running: list[_Job] = []
        self.reasons: dict[str, str] = {}  # digest -> why a run that has failed says nothing itself

    def path(self, run: PlannedRun) -> Path:
        """The results folder of a run."""
        return self.folder / "runs" / run.folder

    def completed(self, run: PlannedRun) -> bool:
        """Whether a run is over and well."""
        return (read_summary(self.path(run)) or {}).get("status") == "completed"

    def run(self, runs: Sequence[PlannedRun], interrupts: Interrupts) -> None:
        """Do all runs that are not completed; a failed one does not stop the others.

        Raises
        ------
        Interrupted
            A signal came; what was running has been ended.
        """
        waiting = [run for run in runs if not self.completed(run)]
        if len(waiting) < len(runs):
            self._say(f"{len(runs) - len(waiting)} of {len(runs)} runs were completed before")
        if not waiting:
            return
        self._prepare_processes(max(run.cpus for run in waiting))
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        try:
            with Progress(*columns, console=self.console, transient=True) as progress:
                task = progress.add_task("starting", total=sum(run.rounds for run in waiting))
                done = 0
                while waiting or self._running:
                    while waiting and len(self._running) < self.jobs:
                        self._start(waiting.pop(0))
                    time.sleep(POLL_SECONDS)
                    interrupts.check()
                    done += sum(self._finish(job) for job in self._ended())
                    active = ", ".join(f"{job.run.label} ({job.round})" for job in self._running[:3])
                    rounds = sum(min(job.round, job.run.rounds) for job in self._running)
                    progress.update(task, description=active, completed=done + rounds)
        finally:
            self._end_all(interrupts)

    def _prepare_processes(self, cpus: int) -> None:
        os.environ.update(ALLOCATOR | {"OMP_NUM_THREADS": str(cpus), "MKL_NUM_THREADS": str(cpus)})
        multiprocessing.set_forkserver_preload(PRELOAD)

    def _start(self, run: PlannedRun) -> None:
        path = self.path(run)
        log = log_of(path)
        start = log.stat().st_size if log.exists() else 0
        process = self._context.Process(target=work, args=(path, run.overrides, self.engine))
        process.start()
        self._running.append(_Job(run, path, process, HistoryTail(path / "history.jsonl"), start))

    def _ended(self) -> list[_Job]:
        for job in self._running:
            job.round = max([job.round, *(int(row["round"]) for row in job.history.poll())])
        ended = [job for job in self._running if not job.process.is_alive()]
        self._running = [job for job in self._running if job not in ended]
        return ended

    def _finish(self, job: _Job) -> int:
        """Say what came of a run; returns its rounds."""
        job.process.join()
        summary = read_summary(job.path) or {}
        if summary.get("status") == "completed":
            unseen = summary["unseen"] or {}
            figures = f"mean {percent(unseen.get('mean_accuracy'))} %, "
            figures += f"worst client {percent(unseen.get('worst_accuracy'))} %"
            self._say(f"{job.run.label}: {figures}, {summary['seconds']['total']:.0f} s")
        else:
            ended = f"its process ended with code {job.process.exitcode}"
            said = last_error(log_of(job.path), job.log_start)
            self.reasons[job.run.digest] = reason = said or ended
            self._say(f"{job.run.label}: FAILED: {summary.get('reason') or reason}; see {log_of(job.path)}")
        job.process.close()
        return job.run.rounds

    def _end_all(self, interrupts: Interrupts) -> None:
        for job in self._running:
            job.process.terminate()
        deadline = time.monotonic() + ENDING_SECONDS
        while any(job.process.is_alive() for job in self._running):
            if time.monotonic() > deadline or interrupts.hurry():
                for job in self._running:
                    job.process.kill()
            time.sleep(POLL_SECONDS)
        self._running = []

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a study's folder; two commands in one folder would write each other's files.

    Raises
    ------
    SettingsError
        Another process holds it.
    """
    try:
        held = FileLock(folder / ".lock", timeout=0).acquire()
    except Timeout as error:
        raise SettingsError(f"output_dir: {folder} is in use by another fedmutual compare") from error
    with held:
        yield
