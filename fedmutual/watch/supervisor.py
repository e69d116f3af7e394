"""Run a command, pass its output on, and end or restart it when it hangs; nothing of it is left over."""

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
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

import psutil

from fedmutual.watch.health import CLIENT, PATIENCE, Health, Look, Process, superfluous

logger = logging.getLogger(__name__)

LOOK_SECONDS = 2.0  # between two looks
PATIENT_PROGRAMS = ("flower-supernode", "flower-superexec")
SUPEREXEC_VARIABLE = "FEDMUTUAL_SUPEREXEC"  # read by patient.py
PAUSE_SECONDS = 5.0  # before a restart
STOP_SECONDS = 8.0  # from SIGTERM to SIGKILL: a SuperNode says goodbye to its SuperLink; Docker gives 10 s


class Supervisor:
    """Keep one command running.

    Every start is a session of its own, so that all processes of the command are known, also those whose
    parent has died; they are ended with it.

    Parameters
    ----------
    command : sequence of str
    patience : float
        Seconds after which it counts as hung (:class:`fedmutual.watch.health.Health`).
    once : bool
        Never start it again: somebody else does that.
    superexec : sequence of str
        What a SuperNode starts in place of ``flower-superexec``; empty: that.
    """

    def __init__(
        self,
        command: Sequence[str],
        patience: float = PATIENCE,
        once: bool = False,
        superexec: Sequence[str] = (),
        look_seconds: float = LOOK_SECONDS,
        pause_seconds: float = PAUSE_SECONDS,
    ) -> None:
        self._command = list(command)
        self._patience = patience
        self._once = once
        self._superexec = list(superexec)
        self._look_seconds = look_seconds
        self._pause_seconds = pause_seconds
        self._stopped = threading.Event()

    def stop(self, *_: int | FrameType | None) -> None:
        """End the command, and do not start it again; a signal handler."""
        self._stopped.set()

    def run(self) -> int:
        """Run until :meth:`stop`, or once; returns the exit code, 1 where the command ended or hung.

        Raises
        ------
        OSError
            The command cannot be started.
        """
        while not self._stopped.is_set():
            reason = self._run_once()
            if self._stopped.is_set():
                break
            logger.warning("%s: %s%s", self._command[0], reason, "" if self._once else "; starting it again")
            if self._once:
                return 1
            tell_systemd(f"STATUS=restarting: {reason}")
            self._stopped.wait(self._pause_seconds)
        return 0

    def _run_once(self) -> str:
        """Run it until it ends, hangs or is to stop; returns the reason."""
        process = subprocess.Popen(
            started_as(self._command), env=environment(self._superexec), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, text=True,
            errors="replace",
        )  # fmt: skip
        health = Health(self._patience)
        reader = threading.Thread(target=_pass_on, args=(process, health), daemon=True)
        reader.start()
        tell_systemd(f"READY=1\nSTATUS={self._command[0]} runs as {process.pid}")
        try:
            return self._observe(process, health)
        finally:
            _end(process)
            reader.join(1.0)

    def _observe(self, process: subprocess.Popen[str], health: Health) -> str:
        while not self._stopped.wait(self._look_seconds):
            tell_systemd("WATCHDOG=1")
            if process.poll() is not None:
                return f"it ended with exit code {process.returncode}"
            seen = look(process.pid)
            for extra in superfluous(seen):
                logger.warning("%s %d: Flower has started others since: ending it", CLIENT, extra.pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(extra.pid, signal.SIGKILL)
            problem = health.problem(seen)
            if problem:
                return problem
        return "it is to stop"


def started_as(command: Sequence[str]) -> list[str]:
    """The command as it is started: Flower's programs in a way that a TLS time-out does not end them."""
    name = os.path.basename(command[0])
    if name not in PATIENT_PROGRAMS:
        return list(command)
    return [sys.executable, "-P", str(Path(__file__).with_name("patient.py")), name, *command[1:]]


def environment(superexec: Sequence[str] = ()) -> dict[str, str]:
    """The environment of the command: what it does must be in its log.

    Parameters
    ----------
    superexec : sequence of str
        What a SuperNode starts in place of ``flower-superexec``; empty: that.
    """
    level = os.environ.get("FLWR_LOG_LEVEL", "INFO").upper()
    other = {SUPEREXEC_VARIABLE: json.dumps(list(superexec))} if superexec else {}
    return os.environ | {"FLWR_LOG_LEVEL": level if level == "DEBUG" else "INFO"} | other


def look(leader: int) -> Look:
    """Look at a session from outside."""
    beats = None
    with contextlib.suppress(psutil.Error, OSError):
        beats = psutil.Process(leader).num_ctx_switches().voluntary or None  # 0: it is not counted here
    found = {process.pid: process for process in members(leader) if process.pid != leader}
    names = {pid: program(process) for pid, process in found.items()}
    clients = {pid for pid, name in names.items() if name == CLIENT}
    kept = []
    for pid, process in found.items():
        with contextlib.suppress(psutil.Error):
            if names[pid] and process.ppid() not in clients:
                kept.append(Process(pid, names[pid], process.create_time()))
    return Look(time.monotonic(), beats, kept)


def members(leader: int) -> Iterator[psutil.Process]:
    """Processes of a session."""
    for pid in psutil.pids():
        with contextlib.suppress(psutil.Error, OSError):
            if os.getsid(pid) == leader:
                process = psutil.Process(pid)
                if process.status() != psutil.STATUS_ZOMBIE:
                    yield process


def program(process: psutil.Process) -> str:
    """Base name of what a process runs, also where that is a Python script; empty for one that has ended."""
    try:
        words = [os.path.basename(word) for word in process.cmdline()[:2]]
    except psutil.Error:
        return ""
    script = len(words) == 2 and words[0].startswith("python")
    return words[script] if words else ""


def _pass_on(process: subprocess.Popen[str], health: Health) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        with contextlib.suppress(OSError):  # where nobody reads on, the command must not wait for that
            sys.stdout.write(line)
            sys.stdout.flush()
        health.read(line, time.monotonic())


def _end(process: subprocess.Popen[str]) -> None:
    """End a session: its leader may say goodbye, and whatever is left after that is killed."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
    process_group = list(members(process.pid))
    while process_group:  # again: one of them may have started another
        for left in process_group:
            with contextlib.suppress(psutil.Error):
                left.kill()
        psutil.wait_procs(process_group, timeout=1.0)
        process_group = list(members(process.pid))
    process.wait()


def tell_systemd(text: str) -> None:
    """Send a state to systemd, where it has started this process with ``Type=notify``."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel, contextlib.suppress(OSError):
        channel.sendto(text.encode(), address)
