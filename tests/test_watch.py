"""What is taken for a hung SuperNode and what is not, and what becomes of a watched command."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
import psutil
import pytest
from flwr.supercore.retry import RetryInvoker, make_simple_http_retry_invoker
from test_steady import CUT, HANDSHAKE, REFUSED

from fedmutual.cli import main, make_parser
from fedmutual.watch import supervisor
from fedmutual.watch.health import CLIENT, CLIENTS, SUPEREXEC, Health, Look, Process, superfluous
from fedmutual.watch.patient import patient
from fedmutual.watch.supervisor import Supervisor, environment, started_as

PATIENCE = 100.0
WORKS = ((1, SUPEREXEC), (2, CLIENT))
NO_CLIENT = ((1, SUPEREXEC),)


Step = str | tuple[float, Sequence[tuple[int, str]]]


def seen(now: float, beats: int | None, running: Sequence[tuple[int, str]] = NO_CLIENT) -> Look:
    return Look(now, beats, [Process(pid, name, 10.0 * pid) for pid, name in running])


def watched(*steps: Step, per_second: float = 2.0) -> str:
    """What is said after these lines of log and stretches of seconds, looked at once a second."""
    health, now, said = Health(PATIENCE), 1000.0, ""
    for step in steps:
        if isinstance(step, str):
            health.read(f"\x1b[92mINFO \x1b[0m:      {step}\n", now)
            continue
        for _ in range(int(step[0])):
            now += 1.0
            said = said or health.problem(seen(now, int(now * per_second), step[1]))
    return said


def test_a_client_killed_while_it_hands_over_its_reply_hangs_its_supernode() -> None:
    until_then = ("Received successfully", (500, WORKS), "Sending: train.round message (ID: 5)")
    assert watched(*until_then, (90, NO_CLIENT)) == ""
    assert "it holds an order, but for 100 s" in watched(*until_then, (110, NO_CLIENT))


@pytest.mark.parametrize(
    "steps",
    [
        ((500, NO_CLIENT),),
        ("Received successfully", (500, WORKS)),
        ("Received successfully", (60, NO_CLIENT), (10, WORKS), (90, NO_CLIENT)),
        ("Received successfully", (9, WORKS), "Sending: x", "Sent successfully", (500, NO_CLIENT)),
        ("Received successfully", "Sending: x", "Failed to send message 5: no", (500, NO_CLIENT)),
        ("Received successfully", "Sending: x", "Run 1: Ignoring reply message 5", (500, NO_CLIENT)),
    ],
    ids=["idle", "working", "process restarted", "answered", "failed", "run over"],
)  # fmt: skip
def test_a_working_supernode_is_left_alone(steps: Sequence[Step]) -> None:
    assert watched(*steps) == ""


def test_a_long_upload_is_not_a_hang() -> None:
    assert watched("Received successfully", "Sending: x", (900, NO_CLIENT), per_second=0.2) == ""


def test_without_client_processes_an_order_is_never_done() -> None:
    assert "it holds an order" in watched("Received successfully", (150, NO_CLIENT))


def test_client_processes_that_are_somewhere_else_are_not_missed() -> None:
    assert watched("Received successfully", (500, ())) == ""


def test_a_main_thread_that_has_ended_is_seen_by_its_stillness() -> None:
    assert watched((90, NO_CLIENT), per_second=0.0) == ""
    assert "main thread has not moved for 100 s" in watched((110, NO_CLIENT), per_second=0.0)


def test_where_the_system_counts_no_beats_nothing_is_made_of_them() -> None:
    health = Health(PATIENCE)
    assert not any(health.problem(seen(now, None)) for now in range(0, 2000, 10))


def test_a_superexec_that_has_ended_is_missed_and_one_that_never_was_is_not() -> None:
    assert watched((20, NO_CLIENT), (5, ())) == ""
    assert watched((20, NO_CLIENT), (15, ())) == "its SuperExec has ended"
    assert watched((500, ())) == ""


def test_client_processes_do_not_pile_up() -> None:
    processes = [(9, CLIENT), (1, SUPEREXEC), (4, CLIENT), (7, CLIENT), (5, CLIENT)]
    assert [p.pid for p in superfluous(seen(1.0, 1, processes))] == [4, 5]
    assert superfluous(seen(1.0, 1, processes[:3])) == []
    assert CLIENTS == 2


def test_the_log_must_say_what_a_supernode_does(monkeypatch: pytest.MonkeyPatch) -> None:
    for level, set_to in ((None, "INFO"), ("ERROR", "INFO"), ("debug", "DEBUG")):
        monkeypatch.delenv("FLWR_LOG_LEVEL", raising=False)
        if level:
            monkeypatch.setenv("FLWR_LOG_LEVEL", level)
        assert environment()["FLWR_LOG_LEVEL"] == set_to


def test_a_flower_program_goes_on_after_a_failure_within_tls() -> None:
    sleeps: list[float] = []

    def make() -> RetryInvoker:
        invoker = make_simple_http_retry_invoker()
        invoker.wait_function = sleeps.append
        return invoker

    failures = iter([HANDSHAKE, CUT, HANDSHAKE])

    def answer() -> str:
        error = next(failures, None)
        if error is not None:
            raise error
        return "answer"

    assert patient(make)().invoke(answer) == "answer"
    assert len(sleeps) == 3
    failures = iter([REFUSED])
    with pytest.raises(httpx.ConnectError):
        patient(make)().invoke(answer)


def test_flowers_programs_are_started_that_way_and_say_who_they_are() -> None:
    assert started_as(["sh", "-c", "true"]) == ["sh", "-c", "true"]
    assert started_as(["/some/bin/flower-supernode", "--insecure"])[-2:] == ["flower-supernode", "--insecure"]
    done = subprocess.run(started_as(["flower-superexec", "--version"]), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Flower version" in done.stdout


# ---------------------------------------------------------------------------------------------------
# A command

SLEEPER = "import os, sys, time; print('started', os.getpid(), flush=True); time.sleep(60)"
PARENT = (
    "import subprocess, sys, time;"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
    "print('child', child.pid, flush=True); {end}"
)


def run_for(command: Sequence[str], until: Path, **options: float) -> None:
    """Watch a command until a file is there."""
    watch = Supervisor(command, look_seconds=0.02, pause_seconds=0.01, **options)
    thread = threading.Thread(target=watch.run)
    thread.start()
    deadline = time.monotonic() + 20
    while not until.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    watch.stop()
    thread.join(20)
    assert until.exists()
    assert not thread.is_alive()


def test_a_command_that_ends_is_started_again(tmp_path: Path) -> None:
    script = "i=$(ls | grep -c run); touch run$i; test $i = 2 && touch third && exec sleep 60; exit 1"
    run_for(["sh", "-c", f"cd {tmp_path}; {script}"], tmp_path / "third")
    assert (tmp_path / "run0").exists()


def test_what_a_command_leaves_behind_ends_with_it(tmp_path: Path) -> None:
    end = f"open({str(tmp_path / 'pids')!r}, 'a').write(f'{{child.pid}} '); sys.exit(1)"
    code = PARENT.format(end=end) + f"; open({str(tmp_path / 'never')!r}, 'w')"
    watch = Supervisor([sys.executable, "-c", code], look_seconds=0.02, pause_seconds=0.01)
    assert watch._run_once().startswith("it ended with exit code 1")
    (pid,) = [int(word) for word in (tmp_path / "pids").read_text().split()]
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_where_somebody_else_restarts_it_its_end_is_the_end() -> None:
    watch = Supervisor(["sh", "-c", "exit 0"], once=True, look_seconds=0.02)
    assert watch.run() == 1


def test_a_hung_command_is_ended_and_started_again(tmp_path: Path) -> None:
    (tmp_path / SUPEREXEC).write_text("import time; time.sleep(60)")
    code = (
        "import pathlib, subprocess, sys, time;"
        f"first = pathlib.Path({str(tmp_path / 'first')!r}); again = first.exists(); first.touch();"
        f"again and pathlib.Path({str(tmp_path / 'second')!r}).touch();"
        f"subprocess.Popen([sys.executable, {str(tmp_path / SUPEREXEC)!r}]);"
        "print('INFO: Received successfully', flush=True);\n"
        "while True: time.sleep(0.05)"
    )
    run_for([sys.executable, "-c", code], tmp_path / "second", patience=0.3)


def test_the_command_line_passes_options_on_and_ends_by_a_signal() -> None:
    arguments = make_parser().parse_args(["watch", "--patience", "9", "--", "flower-supernode", "--insecure"])
    assert arguments.patience == 9
    assert arguments.watched[-2:] == ["flower-supernode", "--insecure"]
    command = [sys.executable, "-m", "fedmutual", "watch", "--", sys.executable, "-c", SLEEPER]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pid = int(process.stdout.readline().split()[1])
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert not psutil.pid_exists(pid)


def test_a_command_that_is_not_there_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        assert main(["watch", "--", "/no/such/program"]) == 2
        assert main(["watch"]) == 2
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert "/no/such/program cannot be started" in capsys.readouterr().err


def test_systemd_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(address)
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        supervisor.tell_systemd("WATCHDOG=1")
        assert channel.recv(99) == b"WATCHDOG=1"
    os.unlink(address)
    supervisor.tell_systemd("WATCHDOG=1")  # nobody listens: no reason to fail
