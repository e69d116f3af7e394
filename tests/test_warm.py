"""Client processes forked from a warm one: the host, who keeps it, and what follows where it fails."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedmutual.cli import main, make_parser
from fedmutual.warm import superexec
from fedmutual.warm.host import CLIENT, TITLE, AppFirst, Host, UnfitError, resident_bytes, set_title
from fedmutual.warm.superexec import INSTALLS, ClientHost, client_host, default_limit, hosted
from fedmutual.watch import patient
from fedmutual.watch.supervisor import SUPEREXEC_VARIABLE, environment, program

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a host needs /proc")

MIB = 1 << 20
ORDER = ["--insecure", "--runtime-api-address", "127.0.0.1:1", "--token", "secret"]


def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# ---------------------------------------------------------------------------------------------------
# The host


class Served:
    """A host in a thread; its children are processes that sleep."""

    def __init__(self, limit: int = 0) -> None:
        self.ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.memory: dict[int, int] = {}
        self.started: list[subprocess.Popen[bytes]] = []
        self.host = Host(theirs, limit, fork=self._fork, resident=lambda pid: self.memory.get(pid, MIB))
        self.thread = threading.Thread(target=self.host.serve, daemon=True)
        self.thread.start()
        assert self.answer() == {"children": [], "bytes": MIB}  # it is ready

    def _fork(self) -> int:
        self.started.append(subprocess.Popen(["sleep", "60"]))
        return self.started[-1].pid

    def ask(self, arguments: list[str]) -> dict[str, Any]:
        self.ours.send(json.dumps(arguments).encode())
        return self.answer()

    def answer(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self.ours.recv(65536))
        return answer

    def children(self) -> list[int]:
        children: list[int] = self.ask([])["children"]
        return children


@pytest.fixture
def served() -> Iterator[Served]:
    made = Served(limit=100 * MIB)
    yield made
    made.ours.close()
    made.thread.join(10.0)
    for process in made.started:
        process.kill()
        process.wait()


def test_each_message_gets_a_child_of_its_own(served: Served) -> None:
    assert served.children() == []
    assert served.ask(ORDER)["children"] == [served.started[0].pid]
    os.kill(served.started[0].pid, signal.SIGTERM)
    until(lambda: served.children() == [])
    assert served.ask(ORDER)["children"] == [served.started[1].pid]


def test_a_child_that_takes_too_much_memory_is_ended_and_named(
    served: Served, capfd: pytest.CaptureFixture[str]
) -> None:
    (pid,) = served.ask(ORDER)["children"]
    served.memory[pid] = 100 * MIB
    assert served.children() == [pid]
    served.memory[pid] = 101 * MIB
    until(lambda: served.children() == [])
    said = capfd.readouterr().err
    assert f"client process {pid} uses 101 MiB, the limit is 100 MiB: it is ended" in said
    assert f"client process {pid} was ended by signal 9" in said


def test_processes_of_several_runs_work_side_by_side(served: Served) -> None:
    for _ in range(3):
        served.ask(ORDER)
    assert served.children() == [process.pid for process in served.started]


def test_the_host_ends_with_its_superexec_and_leaves_children_alone(served: Served) -> None:
    served.ask(ORDER)
    served.ours.close()
    served.thread.join(10.0)
    assert not served.thread.is_alive()
    assert served.started[0].poll() is None


def test_a_child_gets_its_arguments_and_lets_go_of_the_channel() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        ours.send(json.dumps(ORDER).encode())
        assert Host(theirs, 0, fork=lambda: 0).serve() == ORDER
        ours.recv(65536)
        assert ours.recv(65536) == b""


def test_memory_is_read_from_the_kernel() -> None:
    assert resident_bytes(os.getpid()) > MIB
    assert resident_bytes(2**22 + 1) == 0


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-c", code, *arguments], capture_output=True, text=True, timeout=120
    )


def test_a_title_takes_the_place_of_the_command_line() -> None:
    code = (
        "import psutil; from fedmutual.warm.host import set_title;"
        "from fedmutual.watch.supervisor import program;"
        "set_title('flwr-clientapp'); print(program(psutil.Process()), psutil.Process().cmdline()[0])"
    )
    done = run_python(code, "--token", "secret")
    assert done.stdout == "flwr-clientapp flwr-clientapp\n", done.stderr
    assert program(psutil.Process()) != CLIENT


def test_a_system_that_hides_command_lines_is_unfit(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> str:
        raise PermissionError(13, "no")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(UnfitError, match="hides"):
        set_title(CLIENT)


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("return None", 0, ""),
        ("sys.exit(1)", 1, ""),
        ("sys.exit('no token')", 1, "no token"),
        ("raise RuntimeError('broken')", 1, "RuntimeError: broken"),
        ("threading.Thread(target=lambda: (time.sleep(0.1), print('thread'))).start()", 0, ""),
    ],
    ids=["returns", "exits", "says why", "raises", "has a thread"],
)  # fmt: skip
def test_a_child_ends_as_python_does(body: str, code: int, said: str) -> None:
    done = run_python(
        "import atexit, sys, threading, time; from fedmutual.warm.host import end_with\n"
        f"def program():\n    atexit.register(print, 'left'); print('ran', end=' ')\n    {body}\n"
        "end_with(program)"
    )
    assert done.returncode == code
    assert said in done.stderr
    assert done.stdout.split() == (["ran", "thread", "left"] if "Thread" in body else ["ran", "left"])


def test_an_apps_own_package_comes_before_an_imported_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, version in (("site", "imported"), ("app", "the app's")):
        (tmp_path / folder / "heavy").mkdir(parents=True)
        (tmp_path / folder / "heavy" / "__init__.py").write_text(f"version = {version!r}")
        (tmp_path / folder / "light.py").write_text(f"version = {version!r}")
    (tmp_path / "app" / "heavy_app.py").write_text("import heavy, light; seen = heavy.version, light.version")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    for name in ("heavy", "light"):
        __import__(name)
    monkeypatch.setattr(sys, "meta_path", [AppFirst(sys.path, {"heavy"}), *sys.meta_path])
    sys.path.insert(0, str(tmp_path / "app"))  # as Flower does
    try:
        # as in a fresh process: what flwr-clientapp imports by itself is imported before the app is there
        assert __import__("heavy_app").seen == ("the app's", "imported")
    finally:
        for name in ("heavy", "light", "heavy_app"):
            sys.modules.pop(name, None)


# ---------------------------------------------------------------------------------------------------
# Who keeps it

FAKE = """
import json, os, signal, socket, sys, time
channel = socket.socket(fileno=int(sys.argv[-2]))
def say(**state):
    channel.send(json.dumps(state).encode())
{begin}
say(children=[], bytes=1000)
while text := channel.recv(65536):
    {step}
    say(children=[4711] if json.loads(text) else [], bytes={size})
"""


def fake(begin: str = "", step: str = "", size: str = "1000") -> list[str]:
    return [sys.executable, "-S", "-c", FAKE.format(begin=begin, step=step or "pass", size=size)]


def kept(*command: str, **options: Any) -> ClientHost:
    times: dict[str, Any] = {"ping_seconds": 0.05, "answer_seconds": 10.0, "pauses": (0.0,) * 4}
    host = ClientHost(0, command, **(times | options))
    host.start()
    return host


def ends(host: ClientHost) -> bool:
    return not any(thread.name == host.name and thread.is_alive() for thread in threading.enumerate())


@pytest.fixture(autouse=True)
def _no_host_is_left() -> Iterator[None]:
    yield
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if "channel = socket" in " ".join(process.cmdline()):
                process.kill()


def test_a_client_process_is_forked_by_the_host() -> None:
    host = kept(*fake(), ping_seconds=60.0)
    assert host.launch(ORDER) == 4711
    assert host.launch([*ORDER, INSTALLS]) is None  # its app brings other versions along


def test_a_killed_host_is_replaced_and_until_then_nothing_is_forked(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    host = kept(*fake(), pauses=(0.0, 1.0, 1.0))
    first = host.pid
    os.kill(first, signal.SIGKILL)
    until(lambda: not psutil.pid_exists(first))
    assert host.launch(ORDER) is None
    until(lambda: host.launch(ORDER) == 4711)
    assert host.pid != first
    assert "it ended with exit code -9; until there is another, client processes start cold" in caplog.text


def test_a_host_that_hangs_is_noticed_without_a_message(caplog: pytest.LogCaptureFixture) -> None:
    host = kept(*fake(step=f"os.path.exists('/dev/null') and os.kill(os.getpid(), {signal.SIGSTOP})"),
                answer_seconds=0.1)  # fmt: skip
    first = host.pid
    until(lambda: host.pid != first)
    assert "it has not answered for 0.1 s" in caplog.text


def test_a_message_does_not_wait_long_for_a_host_that_hangs() -> None:
    host = kept(*fake(step="time.sleep(60)"), ping_seconds=60.0, answer_seconds=0.1)
    start = time.monotonic()
    assert host.launch(ORDER) is None
    assert time.monotonic() - start < 10.0


def test_a_host_that_has_grown_is_replaced(caplog: pytest.LogCaptureFixture) -> None:
    host = kept(*fake(size="1000 + (300 << 20)"))
    first = host.pid
    until(lambda: host.pid != first)
    assert "it has grown from 0 to 300 MiB" in caplog.text


def test_an_unfit_host_is_not_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    host = kept(*fake(begin="say(unfit='2 threads run after the imports'); sys.exit()"))
    assert host.launch(ORDER) is None
    until(lambda: ends(host))
    assert caplog.text.count("2 threads run after the imports; client processes start cold") == 1


def test_hosts_that_fail_again_and_again_are_given_up(caplog: pytest.LogCaptureFixture) -> None:
    host = kept(*fake(begin="sys.exit(3)"), pauses=(0.0, 0.0))
    until(lambda: ends(host))
    assert "2 in a row have failed; client processes start cold" in caplog.text


class Forks:
    """In place of a :class:`ClientHost`."""

    def __init__(self, pid: int | None) -> None:
        self.pid = pid
        self.asked: list[list[str]] = []

    def launch(self, arguments: list[str]) -> int | None:
        self.asked.append(arguments)
        return self.pid


def test_flowers_start_of_a_client_process_goes_to_the_host(tmp_path: Path) -> None:
    forks: Any = Forks(17)
    process = hosted(forks)([CLIENT, *ORDER])
    assert (process.pid, forks.asked) == (17, [ORDER])
    other = hosted(forks)([sys.executable, "-S", "-c", ""])
    assert other.wait() == 0
    assert len(forks.asked) == 1


def test_without_a_host_a_client_process_starts_cold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / CLIENT).write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/cold\n')
    (tmp_path / CLIENT).chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    nobody: Any = Forks(None)
    assert hosted(nobody)([CLIENT, *ORDER]).wait() == 0
    assert (tmp_path / "cold").read_text().split() == ORDER
    assert caplog.text.count("this client process starts cold") == 1


def test_where_no_host_can_be_kept_flowers_superexec_runs_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(title: str) -> None:
        raise UnfitError("not here")

    class Entry:
        def load(self) -> Callable[[], None]:
            return lambda: None

    monkeypatch.setattr(superexec, "set_title", refuse)
    monkeypatch.setattr(superexec, "entry_points", lambda **_: [Entry()])
    monkeypatch.setattr(sys, "argv", [])
    popen = subprocess.Popen
    assert superexec.run(["--insecure"]) == 0
    assert subprocess.Popen is popen
    assert sys.argv[1:] == ["--insecure"]
    assert "not here; client processes start cold" in caplog.text


def test_a_limit_is_within_the_machine() -> None:
    assert 0 < default_limit() < psutil.virtual_memory().total


# ---------------------------------------------------------------------------------------------------
# Commands


def test_a_supernode_under_watch_starts_the_warm_superexec(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "said.py"
    script.write_text("import sys; print(sys.argv[1:])")
    monkeypatch.setenv(SUPEREXEC_VARIABLE, json.dumps([sys.executable, "-S", str(script)]))
    made = patient.OtherPopen(["flower-superexec", "--insecure"], stdout=subprocess.PIPE)
    assert made.communicate()[0] == b"['--insecure']\n"
    made = patient.OtherPopen([sys.executable, "-S", "-c", "print(1)"], stdout=subprocess.PIPE)
    assert made.communicate()[0] == b"1\n"
    assert SUPEREXEC_VARIABLE == patient.OTHER
    assert json.loads(environment(client_host(9))[SUPEREXEC_VARIABLE])[-4:] == [
        "client-host", "--memory-limit", "9", "--",
    ]  # fmt: skip


def test_the_commands_take_a_limit_and_watch_can_do_without() -> None:
    arguments = make_parser().parse_args(["client-host", "--memory-limit", "9", "--", "--insecure"])
    assert (arguments.memory_limit, arguments.flower) == (9, ["--", "--insecure"])
    arguments = make_parser().parse_args(["watch", "--cold", "--", "flower-supernode"])
    assert arguments.cold
    assert main(["client-host"]) == 2


@pytest.mark.slow
def test_the_command_runs_from_its_file_and_hands_over_to_flower() -> None:
    done = subprocess.run([*client_host(), "--version"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Flower version" in done.stdout


@pytest.mark.slow
def test_a_real_child_is_a_client_process(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "4")  # which start at the import
    host = ClientHost(0)
    host.start()
    assert "is ready" in caplog.text
    assert TITLE in psutil.Process(host.pid).cmdline()
    pid = host.launch(ORDER)
    assert pid is not None
    child = psutil.Process(pid)
    until(lambda: child.cmdline()[:1] == [CLIENT])
    assert program(child) == CLIENT
    assert "secret" not in " ".join(child.cmdline())
    assert child.ppid() == host.pid
    os.kill(host.pid, signal.SIGKILL)
    time.sleep(0.1)
    assert child.is_running()  # its work goes on
    child.kill()


@pytest.mark.slow
def test_a_real_child_that_takes_too_much_memory_is_ended(capfd: pytest.CaptureFixture[str]) -> None:
    host = ClientHost(limit=MIB)
    host.start()
    pid = host.launch(ORDER)
    assert pid is not None
    until(lambda: not psutil.pid_exists(pid))
    assert f"client process {pid} uses " in capfd.readouterr().err
    assert host.launch(ORDER) not in (None, pid)  # the next one has its chance
