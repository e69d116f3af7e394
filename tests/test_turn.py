"""One client process of a node at a time."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from fedmutual.client import turn
from fedmutual.client.turn import PATIENCE, SupersededError, Turn, end_client, take_turn


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += 10.0
        time.sleep(0.001)


def test_nodes_that_share_a_folder_do_not_exclude_each_other(tmp_path: Path) -> None:
    first, second = Turn(tmp_path, 1), Turn(tmp_path, 2)
    first.take()
    second.take()


def test_the_second_waits_until_the_first_has_ended(tmp_path: Path) -> None:
    first, second = Turn(tmp_path, 1), Turn(tmp_path, 1)
    first.take()
    thread = threading.Thread(target=second.take)
    thread.start()
    thread.join(0.3)
    assert thread.is_alive()
    first._lock.release()  # as the kernel does when a process ends
    thread.join(5.0)
    assert not thread.is_alive()


def test_of_those_that_wait_only_the_newest_stays(tmp_path: Path) -> None:
    first, second, third = (Turn(tmp_path, 1) for _ in range(3))
    first.take()
    said: list[str] = []

    def wait() -> None:
        try:
            second.take()
        except SupersededError:
            said.append("superseded")

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.05)
    newest = threading.Thread(target=third.take)
    newest.start()
    waiting.join(5.0)
    assert said == ["superseded"]
    assert newest.is_alive()
    first._lock.release()
    newest.join(5.0)


def test_a_process_that_never_ends_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client stuck in a driver, say: Flower's signal to end does not reach it."""
    first, clock = Turn(tmp_path, 1), Clock()
    first.take()
    ended: list[str] = []

    def end(said: str) -> None:
        ended.append(said)
        first._lock.release()

    monkeypatch.setattr(turn, "end_client", end)
    Turn(tmp_path, 1, clock, clock.sleep).take()
    assert [said.split()[0] for said in ended] == [str(os.getpid())]
    assert clock.now >= PATIENCE


def test_only_a_client_process_is_ended_and_only_the_one_that_is_meant(tmp_path: Path) -> None:
    program = tmp_path / "flwr-clientapp"
    program.write_text("import time; time.sleep(60)")
    client = subprocess.Popen([sys.executable, str(program)])
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        time.sleep(0.1)
        end_client(f"{other.pid} {time.time_ns()}")
        end_client(f"{client.pid} {time.time_ns() - 10**12}")  # an older process with the same id
        end_client("")
        assert psutil.pid_exists(other.pid)
        assert client.poll() is None
        end_client(f"{client.pid} {time.time_ns()}")
        assert client.wait(5) == -9
    finally:
        client.kill()
        other.kill()
        other.wait()


def test_in_simulation_there_is_no_turn_to_take(tmp_path: Path) -> None:
    assert take_turn(1, {"state-dir": str(tmp_path)}) is None
    assert list(tmp_path.iterdir()) == []


def test_a_client_process_takes_it_before_torch_is_there(tmp_path: Path) -> None:
    """The second of two processes waits without torch; a third takes its place."""
    program = tmp_path / "flwr-clientapp"
    program.write_text(
        "import sys, time\n"
        "from fedmutual.client.turn import take_turn\n"
        "print('waits', 'torch' in sys.modules, flush=True)\n"
        f"turn = take_turn(7, {{'state-dir': {str(tmp_path)!r}}})\n"
        "print('works', flush=True)\n"
        "time.sleep(60)\n"
    )
    started = []
    try:
        for _ in range(3):
            process = subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE, text=True)
            started.append(process)
            assert process.stdout is not None
            assert process.stdout.readline() == "waits False\n"
            if len(started) == 1:
                assert process.stdout.readline() == "works\n"
            time.sleep(0.3)
        assert started[1].wait(10) == 0
        started[0].kill()
        assert started[2].stdout is not None
        assert started[2].stdout.readline() == "works\n"
    finally:
        for process in started:
            process.kill()
            process.wait()


def test_a_folder_that_cannot_be_written_is_no_reason_to_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/flwr-clientapp"])
    (tmp_path / "file").touch()
    assert take_turn(1, {"state-dir": str(tmp_path / "file")}) is None
