"""A private SuperLink on this machine, controlled through the ``flwr`` command."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import socket
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from fedmutual.simulation.owner import write_owner
from fedmutual.simulation.processes import ProcessTree, adopt_orphans, runs

CONNECTION = "fedmutual"
START_TIMEOUT = 120.0
COMMAND_TIMEOUT = 120.0
POLL_SECONDS = 0.05
# Ray's socket paths add up to 65 characters to RAY_TMPDIR; the limit is 107 (macOS: 103).
_LONGEST_RAY_FOLDER = 40

_ENVIRONMENT = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",  # else each run installs PyTorch again
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.5",  # there is one task to find, and finding it costs CPU time
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the setting `device` decides whether a GPU is used
    "RAY_enable_metrics_collection": "0",
    "RAY_prestart_worker_first_driver": "0",  # unused: Flower's actors need their own workers
    "PYTHONUNBUFFERED": "1",
    "PYTHONSAFEPATH": "1",  # nothing is imported from the folder where a process happens to start
}
# By default glibc returns large activations to the system and maps them again in every training step, which
# takes a third of the CPU time. With these values it keeps them, for a fifth more memory.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**31)}
_NOT_INHERITED = (
    "RAY_ADDRESS",
    "RAY_NAMESPACE",
    "RAY_RUNTIME_ENV",
)  # they would connect Ray to another cluster


class FlowerError(RuntimeError):
    """Flower did not start or refused a command; the message has Flower's output."""


class SuperLink:
    """A simulation SuperLink with a private home and port, isolated from any other SuperLink.

    Parameters
    ----------
    app_dir : Path
        The Flower app; the SuperLink runs there, because Ray's actors import from its working directory.
    log : Path
        File for the SuperLink's output.
    gpu_index : bool
        Clients choose a GPU by index, so Ray must not renumber the GPUs.
    """

    def __init__(self, app_dir: Path, log: Path, gpu_index: bool = False) -> None:
        self.app_dir = app_dir
        self.log = log
        self.home = _temporary_home()
        write_owner(self.home)  # lets `fedmutual clean` distinguish a live run's home from an abandoned one
        self.processes = ProcessTree(("FLWR_HOME", str(self.home)))
        self._environment = environment(os.environ, self.home, gpu_index)
        self._port = _free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._commands: list[subprocess.Popen[bytes]] = []
        self._simulation: psutil.Process | None = None
        self._ray: psutil.Process | None = None

    def start(self, wait: Callable[[], None]) -> None:
        """Start the SuperLink and return when it answers; call ``wait``, which may raise, while waiting.

        Raises
        ------
        FlowerError
            The process ended, or did not answer within ``START_TIMEOUT``.
        """
        address = f"127.0.0.1:{self._port}"
        config = f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
        (self.home / "config.toml").write_text(f'{config}address = "{address}"\ninsecure = true\n')
        adopt_orphans(True)
        command = [program("flower-superlink"), "--insecure", "--simulation", "--host", "127.0.0.1"]
        command += ["--port", str(self._port), "--disable-runtime-dependency-installation"]
        with self.log.open("ab") as log:
            self._process = self._spawn(command, stdout=log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + START_TIMEOUT
        while not self._answers():
            if not self.running:
                raise FlowerError(
                    f"flower-superlink ended with code {self._process.returncode}; see {self.log}"
                )
            if time.monotonic() > deadline:
                raise FlowerError(
                    f"flower-superlink did not answer within {START_TIMEOUT:.0f} s; see {self.log}"
                )
            wait()

    @property
    def running(self) -> bool:
        """Whether the SuperLink's process is alive."""
        return self._process is not None and self._process.poll() is None

    @property
    def simulation(self) -> psutil.Process | None:
        """The process with the ServerApp and Ray, even if it has ended; None: not seen yet."""
        if self._simulation is None:
            self._simulation = next(iter(self.processes.named("flwr-simulation")), None)
        return self._simulation

    @property
    def simulating(self) -> bool:
        """Whether the process with the ServerApp and Ray is alive."""
        return self.simulation is not None and runs(self.simulation)

    @property
    def returned(self) -> bool:
        """Whether the ServerApp has certainly returned: Flower shuts Ray down only afterwards."""
        if self._ray is None:
            self._ray = next(iter(self.processes.named("raylet")), None)
        return self._ray is not None and not runs(self._ray)

    def submit(self, run_config: str, federation_config: str, wait: Callable[[], None]) -> str:
        """Submit the app to the SuperLink with ``flwr run``; return the run's id.

        Raises
        ------
        FlowerError
            With the output of ``flwr run``.
        """
        file = self.home / "run-config.toml"
        file.write_text(run_config, encoding="utf-8")
        command = ["run", str(self.app_dir), CONNECTION, "--format", "json"]
        command += ["--run-config", str(file), "--federation-config", federation_config]
        answer = self.ask(command, wait)
        if not answer.get("success") or not answer.get("run-id"):
            raise FlowerError(f"flwr run: {_complaint(answer)}")
        return str(answer["run-id"])

    def status(self, run_id: str, wait: Callable[[], None]) -> tuple[str, str]:
        """Return the run's status in Flower, such as "finished:failed", and its details."""
        answer = self.ask(["ls", CONNECTION, "--run-id", run_id, "--format", "json"], wait)
        if not answer.get("runs"):
            raise FlowerError(f"flwr ls: {_complaint(answer)}")
        run = answer["runs"][0]
        details = str(run.get("status-details") or "")
        return str(run["status"]), "" if details == "N/A" else details  # Flower's placeholder for none

    def stop_run(self, run_id: str, wait: Callable[[], None]) -> None:
        """Tell Flower to stop the run, and end its process, which would take up to a minute to notice."""
        self.ask(["stop", run_id, CONNECTION, "--format", "json"], wait)
        if self.simulation is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                self.simulation.terminate()

    def stream_log(self, run_id: str, file: Path) -> None:
        """Append the output of the ServerApp and the clients to a file, until the run ends."""
        with file.open("ab") as out:
            command = [program("flwr"), "log", run_id, CONNECTION, "--stream"]
            self._spawn(command, stdout=out, stderr=subprocess.STDOUT)

    def save_log(self, run_id: str, file: Path, wait: Callable[[], None]) -> None:
        """Append the output so far of the ServerApp and the clients to a file."""
        with file.open("ab") as out:
            command = [program("flwr"), "log", run_id, CONNECTION, "--show"]
            process = self._spawn(command, stdout=out, stderr=subprocess.STDOUT)
            deadline = time.monotonic() + COMMAND_TIMEOUT
            while process.poll() is None and time.monotonic() < deadline:
                wait()

    def ask(self, arguments: list[str], wait: Callable[[], None]) -> dict[str, Any]:
        """Run a ``flwr`` command and return its JSON answer.

        Raises
        ------
        FlowerError
            The command printed no JSON, or took longer than ``COMMAND_TIMEOUT``.
        """
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
            process = self._spawn([program("flwr"), *arguments], stdout=out, stderr=errors)
            deadline = time.monotonic() + COMMAND_TIMEOUT
            while process.poll() is None:
                if time.monotonic() > deadline:
                    process.kill()
                    raise FlowerError(f"flwr {arguments[0]} took longer than {COMMAND_TIMEOUT:.0f} s")
                wait()
            out.seek(0)
            errors.seek(0)
            text, complaint = out.read().decode(errors="replace"), errors.read().decode(errors="replace")
        start = text.find("{")
        try:
            answer = json.loads(text[start:]) if start >= 0 else None
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            said = (complaint.strip() or text.strip())[-2000:]
            raise FlowerError(f"flwr {arguments[0]} (code {process.returncode}): {said}")
        return answer

    def close(self, hurry: Callable[[], bool]) -> None:
        """End every process of the run, the SuperLink first, and remove the private home."""
        self.processes.record()
        if self._process is not None and self.running:
            self._process.terminate()
            deadline = time.monotonic() + 5.0
            while self.running and time.monotonic() < deadline and not hurry():
                time.sleep(POLL_SECONDS)
        self.processes.end(grace=5.0, hurry=hurry)
        for command in self._commands:
            command.wait()
        self.processes.reap()
        adopt_orphans(False)
        shutil.rmtree(self.home, ignore_errors=True)

    def _spawn(self, command: list[str], **streams: Any) -> subprocess.Popen[bytes]:
        # a new session: the terminal's Ctrl-C reaches only us, and we shut the run down in order
        process = subprocess.Popen(
            command,
            cwd=self.app_dir,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            **streams,
        )
        self.processes.add(process.pid)
        self._commands.append(process)
        return process

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=2.0)  # ignores proxies
        with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        return False


def environment(inherited: Mapping[str, str], home: Path, gpu_index: bool = False) -> dict[str, str]:
    """Return the environment of a run's processes.

    Parameters
    ----------
    inherited : Mapping[str, str]
        The caller's environment.
    home : Path
        The private ``FLWR_HOME``; also the folder of Ray's files if its socket paths stay short enough.
    gpu_index : bool
        Let every client see all GPUs with their original numbers.
    """
    result = ALLOCATOR | {key: value for key, value in inherited.items() if key not in _NOT_INHERITED}
    scripts = sysconfig.get_path("scripts")
    local = [entry for entry in (result.get("NO_PROXY") or result.get("no_proxy") or "").split(",") if entry]
    no_proxy = ",".join(dict.fromkeys([*local, "127.0.0.1", "localhost"]))
    result |= _ENVIRONMENT | {
        "FLWR_HOME": str(home),
        "PATH": os.pathsep.join(
            [scripts, result.get("PATH", os.defpath)]
        ),  # Flower starts its programs by name
        "NO_PROXY": no_proxy,
        "no_proxy": no_proxy,
    }
    if len(str(home)) <= _LONGEST_RAY_FOLDER:
        result["RAY_TMPDIR"] = str(home)
    if result.get("PYTHONPATH"):  # these processes run in a different folder
        entries = [entry for entry in result["PYTHONPATH"].split(os.pathsep) if entry]
        result["PYTHONPATH"] = os.pathsep.join(os.path.abspath(entry) for entry in entries)
    if gpu_index:
        result["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"] = "1"
    return result


def program(name: str) -> str:
    """Return the path of a command of this Python environment.

    Raises
    ------
    FlowerError
        The command is not installed.
    """
    path = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if path is None:
        raise FlowerError(f"{name} is not installed: pip install 'flwr[simulation]'")
    return path


def _complaint(answer: Mapping[str, Any]) -> str:
    lines = str(answer.get("error-message") or answer).splitlines()
    return " ".join(line for line in lines if line and not line.startswith("Using SuperLink:"))


def _temporary_home() -> Path:
    """Create a private folder; in /tmp if the system's temporary folder has too long a path for Ray."""
    folder: str | None = tempfile.gettempdir()
    for candidate in (tempfile.gettempdir(), "/tmp"):
        if len(os.path.realpath(candidate)) + 19 <= _LONGEST_RAY_FOLDER and os.access(candidate, os.W_OK):
            folder = candidate
            break
    return Path(tempfile.mkdtemp(prefix="fedmutual-", dir=folder)).resolve()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
