"""``fedmutual compare`` from the command line to the tables."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fedmutual.compare.plan import Plan, make_plan
from fedmutual.compare.settings import Study, load_study
from fedmutual.logs import complain
from fedmutual.settings import SettingsError

if TYPE_CHECKING:
    from rich.console import Console

    from fedmutual.compare.pool import Workers


def compare(
    arguments: Sequence[str], engine: str, jobs: int | None, cwd: Path, ray_address: str | None = None
) -> int:
    """Do what is missing of a study and write its tables and plots.

    Parameters
    ----------
    arguments : Sequence[str]
        Hydra overrides, sweeps among them.
    engine : str
        "inprocess" or "flwr".
    jobs : int | None
        Runs at a time; None: as many as fit the cores (flwr: one; Ray: as many as the cluster takes).
    ray_address : str | None
        Run on Ray: "local", or the address of a cluster; None: in processes of this machine.

    Returns
    -------
    int
        0: all runs completed; 1: some failed; 2: a setting was refused; 128 + n: stopped by signal n.
    """
    try:
        study = load_study(arguments)
        plan = make_plan(study, cwd)
        return _compare(study, plan, _folder(study, cwd), arguments, engine, jobs, ray_address)
    except SettingsError as error:
        complain(f"fedmutual: {error}")
        return 2


def search(
    arguments: Sequence[str],
    trials: int,
    engine: str,
    jobs: int | None,
    cwd: Path,
    ray_address: str | None = None,
) -> int:
    """Search the swept settings by the clients' validation accuracy, and print the best trials.

    Parameters
    ----------
    arguments, engine, jobs, ray_address
        As for :func:`compare`.
    trials : int
        In all, those of an earlier command in the same folder included.

    Returns
    -------
    int
        0: done; 2: a setting was refused, or a trial failed; 128 + n: stopped by signal n.
    """
    from rich.console import Console

    from fedmutual.compare.runner import Runner, alone
    from fedmutual.compare.search import Search
    from fedmutual.simulation.interrupts import Interrupted, Interrupts
    from fedmutual.simulation.request import available_cores

    console = Console()
    try:
        study = load_study(arguments)
        folder = _folder(study, cwd)
        with (
            alone(folder),
            Interrupts() as interrupts,
            _workers(engine, ray_address, console) as workers,
        ):
            found = Search(study, folder, cwd)
            runner = Runner(folder, workers, jobs or (1 if engine == "flwr" else available_cores()), console)
            try:
                found.run(trials, runner, interrupts)
            except Interrupted as interruption:
                done = f"{len(found.done)} of {trials} trials are done"
                print(f"Stopped: {done}; repeat the command to go on: {folder}")
                return interruption.exit_code
    except SettingsError as error:
        complain(f"fedmutual: {error}")
        return 2
    console.print(found.table())
    print(f"Best: fedmutual run {found.best()}")
    print(f"Results: {folder}")
    return 0


def _folder(study: Study, cwd: Path) -> Path:
    """The same for the same command, so that repeating it goes on."""
    if study.output_dir is not None:
        return cwd / Path(study.output_dir).expanduser()
    given = hashlib.sha256(shlex.join(study.given).encode()).hexdigest()[:8]
    return cwd / "outputs" / "compare" / (study.name or given)


@contextmanager
def _workers(engine: str, ray_address: str | None, console: Console) -> Iterator[Workers]:
    """What starts the runs: the pool of this machine, or Ray."""
    from fedmutual.compare.cluster import RayCluster
    from fedmutual.compare.pool import Pool

    workers: Workers = Pool(engine)
    if ray_address is not None:
        if engine == "flwr":
            raise SettingsError(
                "--ray-address: --engine flwr starts a Ray of its own for every run: leave one out"
            )
        workers = RayCluster(
            ray_address, lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True)
        )
    try:
        yield workers
    finally:
        workers.close()


def _compare(
    study: Study,
    plan: Plan,
    folder: Path,
    arguments: Sequence[str],
    engine: str,
    jobs: int | None,
    ray_address: str | None,
) -> int:
    from rich.console import Console

    from fedmutual.compare.outcome import read_outcome
    from fedmutual.compare.report import write_report
    from fedmutual.compare.runner import Runner, alone
    from fedmutual.compare.tables import terminal_tables
    from fedmutual.simulation.interrupts import Interrupted, Interrupts
    from fedmutual.simulation.request import available_cores

    console = Console()
    cpus = max(run.cpus for run in plan.runs)
    if ray_address is not None:  # what does not fit waits in Ray's queue
        jobs = jobs or len(plan.runs)
    jobs = jobs or (1 if engine == "flwr" else max(1, available_cores() // cpus))
    with alone(folder), Interrupts() as interrupts, _workers(engine, ray_address, console) as workers:
        runner = Runner(folder, workers, jobs, console)
        try:
            runner.run(plan.runs, interrupts)
        except Interrupted as interruption:
            done = sum(runner.completed(run) for run in plan.runs)
            print(f"Stopped: {done} of {len(plan.runs)} runs are done; repeat the command to go on: {folder}")
            return interruption.exit_code
        outcomes = [
            read_outcome(run, runner.path(run), runner.reasons.get(run.digest, "")) for run in plan.runs
        ]
        command = shlex.join(["fedmutual", "compare", *arguments])
        table = write_report(plan, outcomes, study.settings.thresholds, command, study.name, folder)
    for shown_table in terminal_tables(plan, outcomes, study.settings.thresholds):
        console.print(shown_table)
    print(f"Table: {table} (Markdown), table.csv, table.tex, differences.csv, plots")
    print(f"Results: {folder}")
    failed = sum(bool(outcome.failure) for outcome in outcomes)
    if failed:
        complain(f"fedmutual: {failed} of {len(outcomes)} runs failed")
    return 1 if failed else 0
