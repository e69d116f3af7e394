"""``fedmutual compare`` end to end: killed, stopped, resumed, in parallel and in turn, with a failing run."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import pytest

from fedmutual.cli import main
from fedmutual.compare.command import compare
from fedmutual.compare.runner import alone
from fedmutual.results.directory import read_history

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 900.0  # seconds until something must have happened, on a machine that does much else
ROUNDS = 4
STUDY = (
    "experiment=smoke",
    f"rounds={ROUNDS}",
    "data.pool_size=120",
    "data.unseen_size=40",
    "public.size=24",
    "public.fill=0",
    "study.thresholds=[0.4]",
    # torch names no such GPU, which only the clients can find out
    'study.variants.broken=["device=cuda:99"]',
    "study.only=[mutual,fedasync,broken]",
    "study.conditions={}",
    "seed=0,1",
    "tracking.loggers=[]",
)


@contextmanager
def comparing(cwd: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The command as a process; killed, with all that it started, if the block leaves it running."""
    command = [sys.executable, "-m", "fedmutual", "compare", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    process = subprocess.Popen(
        command, cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        yield process
    finally:
        for child in [*descendants(process), process]:
            child.kill()
        process.wait()


def descendants(process: subprocess.Popen[str]) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def runs(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("outputs/compare/smoke/runs/*/*/config.yaml"))


def done(run: Path) -> bool:
    return (run / "summary.json").exists()


def summary(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "summary.json").read_text()))


def completed(run: Path) -> bool:
    return done(run) and summary(run)["status"] == "completed"


def half_done(folder: Path) -> list[Path]:
    """Runs that are somewhere after their first checkpoint."""
    return [
        run
        for run in runs(folder)
        if (run / "checkpoint.safetensors").exists()
        and not done(run)
        and 1 < max((line["round"] for line in read_history(run)), default=0) < ROUNDS
    ]


def results(folder: Path) -> dict[str, object]:
    """The tables without what says how long something took."""
    study = folder / "outputs" / "compare" / "smoke"
    found: dict[str, object] = {}
    for name in ("table.csv", "differences.csv", "runs.csv"):
        rows = list(csv.DictReader((study / name).open()))
        found[name] = [{k: v for k, v in row.items() if "seconds" not in k} for row in rows]
    lines = []
    for line in (study / "table.md").read_text().splitlines():
        cells = line.split("|")
        if "seconds to" in line and line.startswith("|"):
            timed = [i for i, cell in enumerate(cells) if "seconds" in cell]
        elif not line.startswith("|"):
            timed = []
        lines.append([cell for i, cell in enumerate(cells) if i not in timed])
    return found | {"table.md": lines}


def compared(
    cwd: Path,
    arguments: Sequence[str],
    jobs: int | None,
    until: Callable[[], bool] | None = None,
    ray_address: str | None = None,
) -> tuple[int, str, str]:
    """The command in this process, which starts its runs as others: its status, output and errors.

    When ``until`` comes true it gets the SIGINT of a Ctrl-C.
    """
    over = threading.Event()

    def watch() -> None:
        while until is not None and not until():
            if over.wait(0.02):
                return
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    watcher = threading.Thread(target=watch)
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # one that comes late is not for pytest
    try:
        with (
            redirect_stdout(io.StringIO()) as out,
            redirect_stderr(io.StringIO()) as errors,
            patch.dict(os.environ),  # it sets the runs' numbers of threads
        ):
            if until is not None:
                watcher.start()
            status = compare(arguments, "inprocess", jobs, cwd, ray_address)
    finally:
        over.set()
        if until is not None:
            watcher.join()
        signal.signal(signal.SIGINT, handler)
    return status, out.getvalue(), errors.getvalue()


def started_here() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The study; its runs share the images and how they are divided, wherever their results are."""
    return (*STUDY, f"cache_dir={tmp_path_factory.mktemp('cache')}")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, arguments: tuple[str, ...]) -> Path:
    """The study from start to end, one run at a time."""
    folder = tmp_path_factory.mktemp("undisturbed")
    status, out, errors = compared(folder, arguments, jobs=1)
    assert status == 1, errors
    assert "2 of 6 runs failed" in errors
    assert "broken, seed 0: FAILED: " in out
    return folder


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_failed_run_is_named_and_stops_nobody(undisturbed: Path) -> None:
    study = undisturbed / "outputs" / "compare" / "smoke"
    text = (study / "table.md").read_text()
    (failed,) = [line for line in text.splitlines() if line.startswith("- broken, seed 0: ")]
    assert "torch sees 0 GPUs" in failed or "cuda:99" in failed
    assert (study / failed.split("`")[1]).exists()
    rows = {row["variant"]: row for row in csv.DictReader((study / "table.csv").open())}
    assert {name: (row["runs"], row["failed"]) for name, row in rows.items()} == {
        "mutual": ("2", "0"),
        "fedasync": ("2", "0"),
        "broken": ("0", "2"),
    }
    summaries = [summary(run) for run in runs(undisturbed)]
    mutual = [
        one["unseen"]["mean_accuracy"]
        for one in summaries
        if one["status"] == "completed" and one["strategy"] == "mutual"
    ]
    assert float(rows["mutual"]["mean"]) == pytest.approx(sum(mutual) / 2)
    assert float(rows["mutual"]["reached 40 %"]) >= 1
    for price in ("round", "bytes", "seconds"):
        assert (study / f"accuracy_by_{price}.png").exists()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_what_only_a_resume_needs_is_removed_and_the_models_stay(undisturbed: Path) -> None:
    whole = [run for run in runs(undisturbed) if completed(run)]
    assert len(whole) == 4
    for run in whole:
        assert list(run.glob("clients/*/*/state*")) == []
        assert len(list(run.glob("clients/*/*/model.safetensors"))) == 3


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_stopped_and_resumed_gives_the_same_tables(
    undisturbed: Path, arguments: tuple[str, ...], tmp_path: Path
) -> None:
    with comparing(tmp_path, *arguments, "--jobs", "2") as killed:
        wait_for(lambda: bool(half_done(tmp_path)), "no run was ever half done")
        started = descendants(killed)
        killed.kill()
        wait_for(lambda: not any(p.is_running() for p in started), "the runs outlived their parent")
    interrupted = [run for run in runs(tmp_path) if not done(run)]
    continued = half_done(tmp_path)
    assert interrupted
    here = started_here()  # the server of processes, which stays

    def something_else_runs() -> bool:
        return all(map(done, interrupted)) and not all(map(done, runs(tmp_path)))

    status, out, _ = compared(tmp_path, arguments, jobs=2, until=something_else_runs)
    assert status == 130, "nothing was running to be stopped"
    assert "repeat the command to go on" in out
    wait_for(lambda: started_here() <= here, "something was left running")
    before = {run: (run / "history.jsonl").stat().st_mtime_ns for run in runs(tmp_path) if completed(run)}
    assert before
    status, out, errors = compared(tmp_path, arguments, jobs=2)
    assert status == 1, errors
    assert "runs were completed before" in out
    assert all((run / "history.jsonl").stat().st_mtime_ns == before[run] for run in before)
    # from its checkpoint: no round was trained twice (a run without rounds says nothing of them)
    for run in (run for run in continued if summary(run)["strategy"] != "fedasync"):
        assert run.with_name(f"{run.name}.log").read_text().count("round 1: 3 clients reported") == 1
    assert results(tmp_path) == results(undisturbed)


def test_two_commands_in_one_folder_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with alone(tmp_path / "outputs" / "compare" / "smoke"):
        assert main(["compare", "experiment=smoke", "study.only=[mutual]"]) == 2
    assert "smoke is in use by another fedmutual compare" in capsys.readouterr().err
    assert runs(tmp_path) == []
