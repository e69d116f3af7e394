"""A run on this machine: what is shown of it, and that nothing of it stays."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from command import RunCommand, wait_for
from rich.console import Console

from fedmutual.simulation import run as run_module
from fedmutual.simulation.processes import ProcessTree, runs
from fedmutual.simulation.progress import Display, HistoryTail, RoundLines, round_line
from fedmutual.simulation.request import prepare
from fedmutual.simulation.run import LocalRun, last_error
from fedmutual.simulation.superlink import FlowerError, environment

ROOT = Path(__file__).resolve().parents[1]


def row(number: int, client: str, **values: Any) -> dict[str, Any]:
    return {"round": number, "client": client, **values}


class TestRoundLine:
    def test_means_worst_sums_and_slowest(self) -> None:
        rows = [
            row(
                3, "a", validation_accuracy=0.9, unseen_accuracy=0.8, kl_before=0.4, kl_after=0.1, seconds=1.5
            ),
            row(
                3,
                "b",
                validation_accuracy=0.7,
                unseen_accuracy=0.4,
                kl_before=0.2,
                kl_after=0.1,
                seconds=4.25,
            ),
        ]
        rows[0] |= {"uplink_bytes": 1500, "downlink_bytes": 10}
        rows[1] |= {"uplink_bytes": 500, "downlink_bytes": 20}
        assert round_line(rows, 12, 2) == (
            "round  3/12  validation 0.800 (worst 0.700)  unseen 0.600 (worst 0.400)  "
            "KL 0.300 -> 0.100  4.2 s per client  2.00 kB up, 30 B down"
        )

    def test_what_was_not_measured_is_left_out(self) -> None:
        assert round_line([row(1, "a", train_loss=0.3)], 3, 1).strip() == "round 1/3"

    def test_the_closing_message_has_no_number(self) -> None:
        assert round_line([row(4, "a", closing=True, unseen_accuracy=0.5)], 3, 1) == (
            "closing    unseen 0.500 (worst 0.500)"
        )

    def test_missing_and_rejected_clients_are_named(self) -> None:
        rows = [row(1, "a", validation_accuracy=1.0), row(1, "b", rejected="not finite")]
        assert round_line(rows, 3, 3) == (
            "round 1/3  validation 1.000 (worst 1.000)  1 of 3 clients  [rejected b: not finite]"
        )


class TestRoundLines:
    def test_a_line_comes_when_all_clients_are_in(self) -> None:
        lines = RoundLines(2, 5)
        assert lines.add([row(1, "a")]) == []
        assert lines.waiting == "round 1, 1 of 2 clients"
        assert [line.strip() for line in lines.add([row(1, "b")])] == ["round 1/5"]
        assert (lines.completed, lines.waiting) == (1, "round 2")

    def test_or_when_the_next_round_begins(self) -> None:
        lines = RoundLines(2, 5)
        lines.add([row(1, "a")])
        assert lines.add([row(2, "a")]) == ["round 1/5  1 of 2 clients"]
        assert lines.flush() == ["round 2/5  1 of 2 clients"]
        assert lines.completed == 2

    def test_the_closing_round_is_no_round(self) -> None:
        lines = RoundLines(1, 1)
        lines.add([row(1, "a")])
        assert lines.waiting == "final evaluation"
        lines.add([row(2, "a", closing=True)])
        assert lines.completed == 1

    def test_plain_lines_where_there_is_no_terminal(self, capsys: pytest.CaptureFixture[str]) -> None:
        display = Display(Console(force_terminal=False, width=20), 1, 2)
        display.status("starting")
        display.rows([row(1, "a", validation_accuracy=0.5, unseen_accuracy=0.25)])
        display.rows([row(2, "[red]b")])
        display.close()
        assert capsys.readouterr().out.splitlines() == [
            "starting",
            "round 1/2  validation 0.500 (worst 0.500)  unseen 0.250 (worst 0.250)",
            "round 2/2",
        ]


class TestHistoryTail:
    def test_only_whole_new_lines(self, tmp_path: Path) -> None:
        path = tmp_path / "history.jsonl"
        tail = HistoryTail(path)
        assert tail.poll() == []
        with path.open("a") as file:
            file.write('{"round": 1, "client": "a"}\n{"round": 1, "cli')
            file.flush()
            assert tail.poll() == [row(1, "a")]
            assert tail.poll() == []
            file.write('ent": "b"}\n')
            file.flush()
            assert tail.poll() == [row(1, "b")]

    def test_a_resumed_run_shows_what_it_does_again(self, tmp_path: Path) -> None:
        path = tmp_path / "history.jsonl"
        first, second = (json.dumps(row(number, "a")) + "\n" for number in (1, 2))
        path.write_text(first + second)
        tail = HistoryTail(path)
        assert tail.poll() == []
        (tmp_path / "new").write_text(first)  # the second round was after the checkpoint
        (tmp_path / "new").replace(path)
        assert tail.poll() == []
        with path.open("a") as file:
            file.write(second)
        assert tail.poll() == [row(2, "a")]

    @pytest.mark.parametrize("first", ["other", "client-10"])
    def test_a_new_file_with_the_number_of_a_deleted_one_is_read_from_its_start(
        self, tmp_path: Path, first: str
    ) -> None:
        path = tmp_path / "history.jsonl"
        path.write_text(json.dumps(row(1, first)) + "\n")
        tail = HistoryTail(path)
        path.write_text("".join(json.dumps(row(number, "a")) + "\n" for number in (1, 2)))  # the same inode
        assert tail.poll() == [row(1, "a"), row(2, "a")]


def test_last_error_is_the_last_exception(tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    assert last_error(log) == ""
    log.write_text("ValueError: of an earlier run\n")
    start = log.stat().st_size
    with log.open("a") as file:
        file.write(
            "\x1b[92mINFO\x1b[0m: fine\nfedmutual.results.directory.ResultsError: folder taken\nINFO : exit\n"
        )
    assert last_error(log, start) == "fedmutual.results.directory.ResultsError: folder taken"
    log.write_text("one\ntwo\n")
    assert last_error(log) == "one\ntwo"


class BrokenSuperLink:
    """Refuses the app after a client has reported."""

    history = ""

    def __init__(self, app_dir: Path, log: Path, gpu_index: bool) -> None:
        self._output = log.parent

    def start(self, wait: Any) -> None:
        (self._output / "history.jsonl").write_text(self.history)

    def submit(self, *_: Any) -> str:
        raise FlowerError("flwr run: refused")

    def close(self, hurry: Any) -> None:
        pass


class FinishedSuperLink:
    """A run that was over at once, with a warning in its summary."""

    running, returned, simulating = True, True, False
    simulation = object()

    def __init__(self, app_dir: Path, log: Path, gpu_index: bool) -> None:
        self._output = log.parent
        self.processes = SimpleNamespace(record=lambda: None)

    def start(self, wait: Any) -> None:
        wait()

    def submit(self, *_: Any) -> str:
        lines = [row(n, f"client-{i}", validation_accuracy=0.75) for n in (1, 2) for i in range(2)]
        (self._output / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        summary = {"status": "completed", "reason": "", "clients": {}, "warnings": ["a tiny warning"]}
        (self._output / "summary.json").write_text(json.dumps(summary))
        return "1"

    def save_log(self, run_id: str, file: Path, wait: Any) -> None:
        file.write_text(f"the log of run {run_id}\n")

    def close(self, hurry: Any) -> None:
        pass


def test_a_run_that_completes_shows_rounds_warnings_and_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "SuperLink", FinishedSuperLink)
    console = Console(file=io.StringIO(), width=80)
    request = prepare(["output_dir=out", "num_clients=2", "rounds=2"], tmp_path)
    assert LocalRun(request, ROOT, console).run() == 0
    printed = console.file.getvalue().splitlines()
    rounds = [line for line in printed if line.startswith("round")]
    assert rounds == [f"round {n}/2  validation 0.750 (worst 0.750)" for n in (1, 2)]
    assert "warning: a tiny warning" in printed
    assert (tmp_path / "out" / "run.log").read_text() == "the log of run 1\n"
    assert f"Results: {tmp_path / 'out'}" in printed


@pytest.mark.parametrize(
    ("models", "said"), [("visionnet,resnet18", 1), ("visionnet,resnet18,resnet18", 0), ("", 0)]
)
def test_fewer_models_than_clients_are_announced(
    models: str, said: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "SuperLink", BrokenSuperLink)
    console = Console(file=io.StringIO(), width=80)
    request = prepare([f"model.per_client=[{models}]", "num_clients=3"], tmp_path)
    LocalRun(request, ROOT, console).run()
    line = "model.per_client: 3 clients take the 2 in turn"
    assert console.file.getvalue().splitlines().count(line) == said


@pytest.mark.parametrize("intact", [True, False])
def test_a_run_that_broke_is_failed_with_its_reason(
    intact: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    BrokenSuperLink.history = json.dumps(row(1, "a", validation_accuracy=0.5)) + "\n" if intact else "{}\n"
    monkeypatch.setattr(run_module, "SuperLink", BrokenSuperLink)
    console = Console(file=io.StringIO(), width=80)
    assert LocalRun(prepare(["output_dir=out"], tmp_path), ROOT, console).run() == 1
    printed = console.file.getvalue()
    assert "The run failed: flwr run: refused" in printed
    if not intact:  # what is damaged is named, and hides neither the reason nor the folder
        assert "line 1 is no history line" in printed
        assert f"Results: {tmp_path / 'out'}" in printed
        return
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["status"], summary["reason"]) == ("failed", "flwr run: refused")
    assert (summary["rounds_completed"], list(summary["clients"])) == (1, ["a"])


def test_environment_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    inherited = {"RAY_ADDRESS": "other:6379", "NO_PROXY": "intranet", "PYTHONPATH": "mine::/abs", "KEEP": "1"}
    result = environment(inherited, Path("/tmp/home"))
    assert "RAY_ADDRESS" not in result
    assert result["NO_PROXY"] == "intranet,127.0.0.1,localhost"
    assert result["PYTHONPATH"] == f"{tmp_path / 'mine'}{os.pathsep}/abs"
    assert (result["FLWR_HOME"], result["RAY_TMPDIR"], result["KEEP"]) == ("/tmp/home", "/tmp/home", "1")
    assert result["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert "RAY_TMPDIR" not in environment({}, Path("/" + "long/" * 12))  # a socket's path would be too long


# A parent that forks twice: the orphan leaves session and tree, ignores SIGTERM and says its pid.
STUBBORN = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        with open(sys.argv[1] + ".tmp", "w") as file:
            file.write(str(os.getpid()))
        os.rename(sys.argv[1] + ".tmp", sys.argv[1])
        time.sleep(60)
    os._exit(0)
os.wait()
if sys.argv[2] == "stay":
    time.sleep(60)
"""


class TestProcessTree:
    @pytest.mark.parametrize("parent", ["stay", "leave"])
    def test_an_orphan_that_ignores_sigterm_is_ended(self, parent: str, tmp_path: Path) -> None:
        mark = ("FEDMUTUAL_TEST", str(tmp_path))
        arguments = [sys.executable, "-c", STUBBORN, str(tmp_path / "pid"), parent]
        process = subprocess.Popen(arguments, env={**os.environ, mark[0]: mark[1]})
        tree = ProcessTree(mark)
        tree.add(process.pid)
        wait_for(lambda: (tmp_path / "pid").exists())
        orphan = psutil.Process(int((tmp_path / "pid").read_text()))
        if parent == "leave":
            process.wait()
        assert runs(orphan)
        tree.end(grace=0.2)
        process.wait()
        assert not runs(orphan)
        assert tree.alive() == []

    def test_nobody_else_is_touched(self, tmp_path: Path) -> None:
        sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
        other = subprocess.Popen(sleep, env={**os.environ, "FEDMUTUAL_TEST": "another run"})
        ours = subprocess.Popen(sleep, env={**os.environ, "FEDMUTUAL_TEST": str(tmp_path)})
        try:
            ProcessTree(("FEDMUTUAL_TEST", str(tmp_path))).end(grace=5.0)
            assert ours.wait() == -signal.SIGTERM
            assert other.poll() is None
        finally:
            other.kill()
            other.wait()

    def test_in_a_hurry_nobody_is_waited_for(self, tmp_path: Path) -> None:
        code = "import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(300)"
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        tree = ProcessTree(("FEDMUTUAL_TEST", str(tmp_path)))
        tree.add(process.pid)
        start = time.monotonic()
        tree.end(grace=300.0, hurry=lambda: True)
        assert time.monotonic() - start < 60
        process.stdout.close()
        process.wait()


@pytest.mark.slow
def test_a_server_that_raises_is_a_failed_run_with_its_reason(tmp_path: Path) -> None:
    """An app that says nothing itself; how a real one completes or is stopped: test_end_to_end.py."""
    app = ROOT / "tests" / "failing_app"
    folder = tmp_path / "run"
    command = RunCommand(folder, "output_dir=out", "num_clients=2", "rounds=2", "seed=13", app_dir=app)
    code, printed = command.end()
    assert code == 1
    assert "seed 13 is refused" in printed
    assert "Traceback" not in printed
    assert "seed 13 is refused" in (folder / "out" / "run.log").read_text()
    summary = json.loads((folder / "out" / "summary.json").read_text())
    assert (summary["status"], summary["rounds_completed"]) == ("failed", 0)
    assert "seed 13 is refused" in summary["reason"]
    assert command.left() == []
