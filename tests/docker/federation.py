"""A server and sites in containers, made by ``fedmutual provision`` and driven as docs/deployment.md says."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedmutual.provision.kits import provision
from fedmutual.provision.project import Project, Site

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
DOCKER = ROOT / "docker"
IMAGE = "fedmutual:test"
HOME = "/var/lib/fedmutual"
SITES = ("site-a", "site-b", "site-c")


def call(*command: str, timeout: float = 600, check: bool = True, **options: Any) -> str:
    """Run a command and return what it printed; its errors are part of the failure's message."""
    done = subprocess.run(command, text=True, capture_output=True, timeout=timeout, **options)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(command)}: code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout if check else done.stdout + done.stderr


def missing_engine() -> str:
    """Why containers cannot be run here; empty where they can."""
    if shutil.which("docker") is None:
        return "there is no docker command: install Docker"
    done = subprocess.run(["docker", "info"], capture_output=True, text=True)
    return "" if done.returncode == 0 else f"the Docker engine does not answer: {done.stderr.strip()[-500:]}"


def compose_command() -> list[str]:
    """``docker compose`` (2.x) where there is one, else ``docker-compose`` (1.29)."""
    if subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0:
        return ["docker", "compose"]
    return ["docker-compose"]


def build_image() -> None:
    """Build the image of docker/Dockerfile; the environment's TORCH_INDEX chooses PyTorch's build."""
    command = ["docker", "build", "-q", "-t", IMAGE, "-f", str(DOCKER / "Dockerfile")]
    command += ["--build-arg", f"TORCH_INDEX={os.environ.get('TORCH_INDEX', '')}", str(ROOT)]
    call(*command, timeout=3600)


def host_address() -> str:
    """The host as containers see it: every site leaves its own network to reach the server there."""
    route = call("docker", "run", "--rm", IMAGE, "cat", "/proc/net/route")
    gateways = [line.split()[2] for line in route.splitlines()[1:] if line.split()[1] == "00000000"]
    return socket.inet_ntoa(bytes.fromhex(gateways[0])[::-1])


class Federation:
    """The containers; every site is a compose project of its own, with its own network.

    Parameters
    ----------
    folder : Path
        Receives certificates and keys, a folder for the server and one for each site.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.address = host_address()
        with socket.socket() as listener:
            listener.bind(("", 0))
            self.port = listener.getsockname()[1]
        self.user = "1000:1000" if os.getuid() == 0 else f"{os.getuid()}:{os.getgid()}"
        self._prefix = f"fedmutual-test-{os.getpid()}"
        self._folders: dict[str, Path] = {}
        self._containers: dict[tuple[str, str], str] = {}

    # folders ---------------------------------------------------------------------------------------

    def provision(self, *sites: str, output: str = "kits") -> Path:
        """Make the folders of a server and of sites on generated faces; those that are there are kept."""
        shares = ({"partition-id": number % len(SITES), "num-partitions": len(SITES)} for number in range(9))
        made = tuple(Site(name, settings=share) for name, share in zip(sites, shares, strict=False))
        folder = self.folder / output
        provision(Project((self.address,), made, port=self.port, image=IMAGE), folder)
        self._give_away()
        return folder

    def use(self, name: str, folder: Path) -> None:
        """Have :meth:`compose` find "server" or a site in a folder."""
        self._folders[name] = folder
        self._give_away()

    def _give_away(self) -> None:
        if os.getuid() == 0:  # the containers run as another user
            call("chown", "-R", self.user, str(self.folder))

    # containers ------------------------------------------------------------------------------------

    def compose(self, name: str, *arguments: str, check: bool = True, timeout: float = 900) -> str:
        """Call compose for "server" or a site."""
        files = ["-f", str(self._folders[name] / "compose.yaml")]
        if name != "server":
            files += ["-f", str(HERE / "one_thread.compose.yaml")]
        command = [*compose_command(), "-p", f"{self._prefix}-{name}", *files, *arguments]
        return call(*command, check=check, timeout=timeout, env={**os.environ, "RUN_AS": self.user})

    def start(self) -> None:
        """Make all keys, start the server, register the sites' keys and start the sites."""
        kits = self.provision(*SITES)
        for name in ("server", *SITES):
            self.use(name, kits / name)
        self.compose("server", "up", "-d")
        self.compose("server", "run", "--rm", "-T", "fedmutual", "site", "add", "--all")
        for site in SITES:
            self.compose(site, "up", "-d")

    def stop(self) -> None:
        """Remove every container, network and volume of this federation."""
        for name in self._folders:
            self.compose(name, "down", "-v", "-t", "2", check=False)

    def container(self, name: str, service: str) -> str:
        """Id of a service's container, which a restart does not change."""
        if (name, service) not in self._containers:
            self._containers[name, service] = self.compose(name, "ps", "-q", service).split()[0]
        return self._containers[name, service]

    def flwr(self, *arguments: str) -> str:
        """Run the ``flwr`` command beside the SuperLink."""
        return self.compose("server", "run", "--rm", "-T", "flwr", *arguments)

    # runs ------------------------------------------------------------------------------------------

    def run(self, output: str, *overrides: str) -> str:
        """Start a run whose results go to ``output`` on the server's volume; returns its id."""
        return self._submit(f"output_dir='{HOME}/{output}' overrides='{' '.join(overrides)}'")

    def resume(self, output: str, *overrides: str) -> str:
        """Go on with the run whose results are in ``output``; returns its new id."""
        return self._submit(f"overrides='{' '.join(overrides)} resume={HOME}/{output}'")

    def _submit(self, config: str) -> str:
        command = ["run", "/app", "server", "--format", "json", "--run-config", config]
        for _ in range(12):  # the SuperLink is starting, or too busy for a TLS handshake in time
            said = self.compose("server", "run", "--rm", "-T", "flwr", *command, check=False)
            if '"run-id"' in said:
                answer, _ = json.JSONDecoder().raw_decode(said[said.index("{") :])
                return str(answer["run-id"])
            time.sleep(10)
        raise RuntimeError(f"flwr run: {said}")

    def status(self, run_id: str) -> str:
        """The run's status as Flower has it, such as "finished:completed"; else what was said instead."""
        command = ["run", "--rm", "-T", "flwr", "list", "server", "--run-id", run_id, "--format", "json"]
        said = self.compose("server", *command, check=False)
        try:
            answer, _ = json.JSONDecoder().raw_decode(said[said.index("{") :])
            return str(answer["runs"][0]["status"])
        except (ValueError, LookupError):  # the SuperLink is starting
            return said

    def result(self, output: str, file: str) -> str:
        """A file of a run's results; empty while there is none."""
        return self._read("server", "superexec", f"cat {HOME}/{output}/{file} 2>/dev/null || true")

    def history(self, output: str) -> list[dict[str, Any]]:
        """The complete lines of a run's history."""
        text = self.result(output, "history.jsonl")
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def at_site(self, site: str, script: str) -> str:
        """Run a shell script in a site's container."""
        return self._read(site, "supernode", script)

    def _read(self, name: str, service: str, script: str) -> str:
        return call("docker", "exec", self.container(name, service), "sh", "-c", script)

    @contextmanager
    def captured(self) -> Iterator[dict[str, Any]]:
        """Measure all that passes the server's door; the dict is filled at the end (see sniffer.py)."""
        name, measured = f"{self._prefix}-sniffer", dict[str, Any]()
        command = ["docker", "run", "-d", "--name", name, "--user", "0", "--cap-add", "NET_RAW"]
        command += ["--network", f"container:{self.container('server', 'gateway')}"]
        call(*command, "-v", f"{HERE / 'sniffer.py'}:/sniffer.py:ro", IMAGE, "python", "/sniffer.py", "8443")
        try:
            wait_for(lambda: "ready" in call("docker", "logs", name), 60, "the sniffer")
            yield measured
            call("docker", "stop", "-t", "30", name)
            measured.update(json.loads(call("docker", "logs", name).splitlines()[-1]))
        finally:
            call("docker", "rm", "-f", name, check=False)


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Wait until something is so.

    Raises
    ------
    TimeoutError
        It was not within the time.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:.0f} s")
        time.sleep(2.0)
