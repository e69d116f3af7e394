"""Run what is missing of a study, several runs at a time, and leave nothing running."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from fedmutual.compare.outcome import read_summary
from fedmutual.compare.plan import PlannedRun
from fedmutual.compare.pool import Work, Workers
from fedmutual.compare.worker import log_of
from fedmutual.report.tables import percent
from fedmutual.settings import SettingsError
from fedmutual.simulation.interrupts import Interrupts
from fedmutual.simulation.run import last_error


@dataclass
class _Job:
    run: PlannedRun
    path: Path
    work: Work
    log_start: int


class Runner:
    """The runs of one study.

    Parameters
    ----------
    folder : Path
        The study's.
    workers : Workers
        What starts the runs.
    jobs : int
        Runs at a time.
    """

    def __init__(self, folder: Path, workers: Workers, jobs: int, console: Console) -> None:
        self.folder, self.jobs, self.console = folder, jobs, console
        self._workers = workers
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
        self._workers.prepare(max(run.cpus for run in waiting))
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        try:
            with Progress(*columns, console=self.console, transient=True) as progress:
                task = progress.add_task("starting", total=sum(run.rounds for run in waiting))
                done = 0
                while waiting or self._running:
                    while waiting and len(self._running) < self.jobs:
                        self._start(waiting.pop(0))
                    self._workers.wait()
                    interrupts.check()
                    done += sum(self._finish(job) for job in self._ended())
                    begun = sorted(self._running, key=lambda job: not job.work.round)[:3]
                    active = ", ".join(f"{job.run.label} ({job.work.round})" for job in begun)
                    rounds = sum(min(job.work.round, job.run.rounds) for job in self._running)
                    progress.update(task, description=active, completed=done + rounds)
        finally:
            self._running = []
            self._workers.end(interrupts.hurry)

    def _start(self, run: PlannedRun) -> None:
        path = self.path(run)
        log = log_of(path)
        start = log.stat().st_size if log.exists() else 0
        self._running.append(_Job(run, path, self._workers.start(run, path), start))

    def _ended(self) -> list[_Job]:
        ended = [job for job in self._running if job.work.over()]
        self._running = [job for job in self._running if job not in ended]
        return ended

    def _finish(self, job: _Job) -> int:
        """Say what came of a run; returns its rounds."""
        summary = read_summary(job.path) or {}
        if summary.get("status") == "completed":
            unseen = summary["unseen"] or {}
            figures = f"mean {percent(unseen.get('mean_accuracy'))} %, "
            figures += f"worst client {percent(unseen.get('worst_accuracy'))} %"
            self._say(f"{job.run.label}: {figures}, {summary['seconds']['total']:.0f} s")
        else:
            said = job.work.problem or last_error(log_of(job.path), job.log_start)
            self.reasons[job.run.digest] = reason = said or f"its process ended with code {job.work.code}"
            reason = job.work.problem or summary.get("reason") or reason
            where = f" on {job.work.where}" if job.work.where else ""
            self._say(f"{job.run.label}: FAILED{where}: {reason}; see {log_of(job.path)}")
        return job.run.rounds

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
