"""Flower's SuperExec whose client processes are forked from a warm one.

Flower's SuperExec starts ``flwr-clientapp`` for each message, by its name. Here that start is handed to a
:mod:`~fedmutual.warm.host`, and where there is none, or none that works, the program is started as ever.
Nothing else of Flower is changed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import psutil

from fedmutual.warm.host import CLIENT, UnfitError, set_title

logger = logging.getLogger(__name__)

HOST = Path(__file__).with_name("host.py")
MAIN = Path(__file__).parents[1] / "__main__.py"
PROGRAM = "flower-superexec"
INSTALLS = "--allow-runtime-dependency-installation"  # an app's own versions of what the host has imported
START_SECONDS = (
    60.0  # to import everything on a busy machine; `fedmutual watch` waits twice as long for a client
)
ANSWER_SECONDS = 10.0  # Flower gives a process up that has not spoken for half a minute
PING_SECONDS = 10.0
GROWTH = 256 << 20  # bytes that a host may use beyond those at its start
PAUSES = (0.0, 5.0, 30.0, 120.0, 600.0)  # seconds before another host, after so many in a row that failed


class ClientHost:
    """Keeps one host process, and starts client processes with it.

    Parameters
    ----------
    limit : int
        Bytes of memory that a client process may use; 0: any number.
    command : sequence of str
        The host; a number of a socket and the limit are added.
    ping_seconds, answer_seconds
        Injected by tests.
    """

    def __init__(
        self,
        limit: int,
        command: Sequence[str] = (sys.executable, "-P", str(HOST)),
        ping_seconds: float = PING_SECONDS,
        answer_seconds: float = ANSWER_SECONDS,
        pauses: Sequence[float] = PAUSES,
    ) -> None:
        self._limit, self._command = limit, list(command)
        self._ping_seconds, self._answer_seconds, self._pauses = ping_seconds, answer_seconds, pauses
        self._start = subprocess.Popen  # before :func:`run` replaces it
        self._lock = threading.Lock()
        self._channel: socket.socket | None = None  # while the host is ready
        self._least = 0  # bytes of memory at its start
        self._settled = threading.Event()  # it was ready once, or will not be soon
        self.pid = 0
        self.name = f"client host {id(self)}"

    def start(self, wait_seconds: float = START_SECONDS) -> None:
        """Start a host and keep one running; returns when it is ready, or after a while."""
        threading.Thread(target=self._keep, name=self.name, daemon=True).start()
        self._settled.wait(wait_seconds)

    def launch(self, arguments: Sequence[str]) -> int | None:
        """Fork a client process; returns its id, or None where there is no host that can."""
        state = self._ask(list(arguments)) if INSTALLS not in arguments else None
        children: list[int] = state["children"] if state else []
        return children[-1] if children else None

    def _ask(self, message: list[str]) -> dict[str, Any] | None:
        with self._lock:
            if self._channel is None:
                return None
            try:
                self._channel.settimeout(self._answer_seconds)
                self._channel.send(json.dumps(message).encode())
                return _received(self._channel)
            except OSError:
                self._channel.close()
                self._channel = None
                return None

    def _keep(self) -> None:
        failures = 0
        while failures < len(self._pauses):
            time.sleep(self._pauses[failures])
            began = time.monotonic()
            try:
                reason = self._keep_one()
            except UnfitError as error:
                logger.warning("client host: %s; client processes start cold", error)
                self._settled.set()
                return
            failures = 0 if time.monotonic() - began > START_SECONDS else failures + 1
            logger.warning("client host: %s; until there is another, client processes start cold", reason)
        logger.warning("client host: %d in a row have failed; client processes start cold", failures)
        self._settled.set()

    def _keep_one(self) -> str:
        """Start a host, and see to it until it must be replaced; returns why.

        Raises
        ------
        UnfitError
            No host can work here.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            command = [*self._command, str(theirs.fileno()), str(self._limit)]
            process = self._start(command, pass_fds=[theirs.fileno()])
            theirs.close()
            self.pid = process.pid
            try:
                return self._begin(ours) or self._see_to(process)
            finally:
                with self._lock:
                    self._channel = None
                process.kill()  # its children go on
                process.wait()

    def _begin(self, channel: socket.socket) -> str:
        channel.settimeout(START_SECONDS)
        try:
            state = _received(channel)
        except OSError as error:
            return f"it does not start ({error})"
        if "unfit" in state:
            raise UnfitError(state["unfit"])
        with self._lock:
            self._channel, self._least = channel, state["bytes"]
        self._settled.set()
        logger.info("client host: process %d is ready, %d MiB", self.pid, self._least >> 20)
        return ""

    def _see_to(self, process: subprocess.Popen[bytes]) -> str:
        while True:
            try:
                code = process.wait(self._ping_seconds)
                return f"it ended with exit code {code}"
            except subprocess.TimeoutExpired:
                state = self._ask([])
            if state is None:
                return f"it has not answered for {self._answer_seconds:g} s"
            if state["bytes"] > self._least + GROWTH and not state["children"]:
                return f"it has grown from {self._least >> 20} to {state['bytes'] >> 20} MiB"


def _received(channel: socket.socket) -> dict[str, Any]:
    text = channel.recv(65536)
    if not text:
        raise ConnectionError("it has ended")
    answer: dict[str, Any] = json.loads(text)
    return answer


def hosted(host: ClientHost) -> type[subprocess.Popen[Any]]:
    """Return a ``Popen`` that has client processes forked by a host."""

    class HostedPopen(subprocess.Popen[Any]):
        def __init__(self, args: Any, *rest: Any, **options: Any) -> None:
            if isinstance(args, list) and args[:1] == [CLIENT] and not rest and not options:
                pid = host.launch(args[1:])
                if pid is not None:
                    self.args, self.pid, self.returncode = args, pid, 0  # the host waits for it
                    self.stdin = self.stdout = self.stderr = None
                    return
                logger.warning("client host: this client process starts cold")
            super().__init__(args, *rest, **options)

    return HostedPopen


def default_limit() -> int:
    """Nine tenths of the memory of this container or machine, in bytes."""
    machine: int = psutil.virtual_memory().total
    sizes = [machine]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            sizes.append(int(Path(file).read_text()))
    return min(sizes) * 9 // 10


def client_host(limit: int | None = None) -> list[str]:
    """The command that takes the arguments of ``flower-superexec`` and starts clients warm.

    Parameters
    ----------
    limit : int or None
        MiB of memory that a client process may use; 0: any number; None: :func:`default_limit`.
    """
    memory = [] if limit is None else ["--memory-limit", str(limit)]
    return [sys.executable, "-P", str(MAIN), "client-host", *memory, "--"]


def run(arguments: Sequence[str], limit: int | None = None) -> int:
    """Run Flower's SuperExec until it ends; returns its exit code.

    Parameters
    ----------
    arguments : sequence of str
        Of ``flower-superexec``.
    limit : int or None
        Bytes of memory that a client process may use; 0: any number; None: :func:`default_limit`.
    """
    try:
        set_title(" ".join([PROGRAM, *arguments]))
        host = ClientHost(default_limit() if limit is None else limit)
        host.start()
        subprocess.Popen = hosted(host)  # type: ignore[assignment, misc]
    except Exception as error:
        logger.warning("client host: %s; client processes start cold", error)
    sys.argv = [str(Path(sys.executable).with_name(PROGRAM)), *arguments]
    (program,) = entry_points(group="console_scripts", name=PROGRAM)
    code: int | None = program.load()()
    return code or 0
