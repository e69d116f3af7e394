"""A whole deployment on this machine: SuperLink, its SuperExec and a SuperNode a site, over loopback.

With TLS, node keys, a database and process isolation, as it runs on separate machines; every site has its
own FLWR_HOME, state and cache. Each part can be killed as if its power went, and started again. The tests and
the other benchmarks use it; nothing of it is needed to run fedmutual.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedmutual.provision.keys import make_site_key
from fedmutual.simulation.superlink import environment, program
from fedmutual.warm.host import TITLE as HOST_TITLE
from fedmutual.warm.superexec import client_host
from fedmutual.watch.supervisor import SUPEREXEC_VARIABLE, started_as

APP_DIR = Path(__file__).resolve().parents[1]
APP_PARTS = ("server_app.py", "client_app.py", "pyproject.toml", "README.md", "LICENSE", "conf", "fedmutual")
CONNECTION = "loopback"
POLL_INTERVAL = "FLWR_SUPEREXEC_TASK_POLL_INTERVAL"
MARK = "FEDMUTUAL_LOOPBACK"  # in the environment of every process that is started here
KILLPOINT, KILL_AT = APP_DIR / "benchmarks" / "killpoint", "FEDMUTUAL_KILL_AT"
CONNECTED = "SuperNode ID"  # in a SuperNode's log
RESTART_SECONDS = 2.0  # between two attempts to start a part again, as a restart policy makes them
COMMAND_TIMEOUT = 180.0
SITES = 3
SHORT_ROUNDS = (  # settings with which a round is hardly any learning
    f"num_clients={SITES}",
    "data.pool_size=120",
    "public.fill=0",
    "data.unseen_size=40",
    "data.image_size=20",
    "public.size=24",
    "train.local_epochs=1",
    "train.batch_size=16",
    "evaluation.unseen_every=0",
    "device=cpu",
)


class Loopback:
    """The deployment.

    Parameters
    ----------
    folder : Path
        Everything it writes: keys, database, logs, and ``site-<i>`` with FLWR_HOME and state.
    sites : int
    secure : bool
        TLS and node keys.
    app_dir : Path or None
        The Flower app that is submitted; None: this checkout's.
    poll_seconds : float or None
        How often each part looks for work, which takes a CPU's time; None: as often as in ``fedmutual run``.
    patience : float or None
        Sites and SuperExec run under ``fedmutual watch`` with this patience, in seconds; None: without it.
    warm : bool
        Client processes are forked from a warm one; false: as Flower starts them.
    """

    def __init__(
        self,
        folder: Path,
        sites: int = SITES,
        secure: bool = True,
        app_dir: Path | None = None,
        poll_seconds: float | None = None,
        patience: float | None = None,
        warm: bool = False,
    ) -> None:
        self.folder = folder.resolve()
        self.sites = sites
        self._polling = {} if poll_seconds is None else {POLL_INTERVAL: str(poll_seconds)}
        self._patience = patience
        self._warm = warm
        self.secure = secure
        self.app_dir = app_dir or self.folder / "app"
        self._own_app = app_dir is None
        self.address = f"127.0.0.1:{free_port()}"
        self._ports = [free_port() for _ in range(sites)]
        self._id = uuid.uuid4().hex[:12]
        self._keepers: dict[str, _Keeper] = {}
        self.folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Loopback:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -----------------------------------------------------------------------------------------------
    # Parts

    def start(self) -> None:
        """Make the keys, start everything, and return when all sites are connected."""
        if self._own_app:
            copy_app(self.app_dir)
        if self.secure:
            make_certificates(self.folder)
        self._write_connection()
        self.start_part("superlink")
        self.start_part("superexec")
        wait_for(self._answers, 60, "the SuperLink does not answer")
        for site in range(self.sites):
            if self.secure:
                self._register(site)
            self.start_part(f"site-{site}")
        # each look of `online` is a command of its own: it is asked when the sites themselves say so
        logs = [self.folder / f"site-{site}.log" for site in range(self.sites)]
        problem = "the sites do not connect"
        wait_for(lambda: all(log.exists() and CONNECTED in log.read_text() for log in logs), 120, problem)
        wait_for(lambda: self.online() == self.sites, 120, problem)

    def start_part(self, part: str) -> None:
        """Start a part and keep it running, like a container that is restarted whenever it ends."""
        command = self._command(part)
        if self._patience is not None and part != "superlink":
            watch = [sys.executable, "-m", "fedmutual", "watch", "--patience", str(self._patience)]
            watch += [] if self._warm else ["--cold"]
            command = [*watch, "--", program(command[0]), *command[1:]]
        elif self._warm and part.startswith("site"):
            command = started_as(command)
        self._keepers[part] = _Keeper(command, self._environment(part), self.folder / f"{part}.log")

    def kill_part(self, part: str) -> None:
        """SIGKILL to all processes of a part at once, and no restart: its power is gone."""
        keeper = self._keepers.pop(part, None)
        if keeper is not None:
            keeper.stop()
        for process in self.processes(part):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        wait_for(lambda: not self.processes(part), 30, f"{part} does not end")

    def stop_part(self, part: str) -> None:
        """Stop a part in order, as a person does: a SuperNode says goodbye to its SuperLink."""
        self._keepers.pop(part).end()

    def processes(self, part: str, name: str = "") -> list[psutil.Process]:
        """Running processes of a part, or those among them that run a program of that name."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                marked = process.environ().get(MARK) == f"{self._id}:{part}"
                if (
                    marked
                    and process.status() != psutil.STATUS_ZOMBIE
                    and name in " ".join(process.cmdline()[:2])
                ):
                    found.append(process)
        return found

    def kill_process(self, part: str, name: str, **when: float) -> None:
        """SIGKILL a process of that name within a part, as soon as :meth:`wait_for_process` sees it.

        ``flwr-clientapp`` of a site, ``flwr-serverapp`` of the superexec.
        """
        self.wait_for_process(part, name, **when)
        for process in self.processes(part, name):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)

    def wait_for_process(
        self, part: str, name: str, since: float = 0.0, worked: float = 0.0, timeout: float = 120.0
    ) -> None:
        """Wait for a process of a part that was started after ``since`` (Unix time) and has worked that long.

        ``worked`` is in seconds of CPU time: a client process has its order after about one.
        The kernel gives its boot time in whole seconds, so a process may seem a second older than it is.
        """

        def there() -> bool:
            for process in self.processes(part, name):
                with contextlib.suppress(psutil.NoSuchProcess):
                    used = process.cpu_times()
                    if process.create_time() + 1.0 > since and used.user + used.system >= worked:
                        return True
            return False

        wait_for(there, timeout, f"{part} starts no {name}")

    def arm(self, site: int, moment: str) -> Path:
        """Have the site's next client process killed at a moment (benchmarks/killpoint/sitecustomize.py).

        Returns the file that is there once it has been.
        """
        folder = self.folder / f"site-{site}" / "kill"
        folder.mkdir(exist_ok=True)
        done = folder / f"{moment}.done"
        done.unlink(missing_ok=True)
        (folder / moment).touch()
        return done

    def restarts(self) -> int:
        """How often ``fedmutual watch`` has started a site or the SuperExec again."""
        logs = [log.read_text() for log in self.folder.glob("*.log")]
        return sum(text.count("starting it again") for text in logs)

    def client_cpu(self) -> float:
        """CPU seconds of all client processes that have ended, and of the hosts that forked them."""
        total = 0.0
        for site in range(self.sites):
            for name in ("flower-superexec", HOST_TITLE):
                for process in self.processes(f"site-{site}", name):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        used = process.cpu_times()
                        total += used.children_user + used.children_system
                        total += used.user + used.system if name == HOST_TITLE else 0.0
                        for child in process.children():  # Flower waits for a child when it starts the next
                            if child.status() == psutil.STATUS_ZOMBIE:
                                left = child.cpu_times()
                                total += left.user + left.system
        return total

    def messages(self) -> int:
        """Number of messages that the sites have got."""
        logs = [self.folder / f"site-{site}.log" for site in range(self.sites)]
        return sum(log.read_text().count("Received successfully") for log in logs)

    def close(self) -> None:
        """End everything."""
        for part in list(self._keepers):
            with contextlib.suppress(TimeoutError):
                self.kill_part(part)

    # -----------------------------------------------------------------------------------------------
    # Runs

    def submit(self, *overrides: str, app_dir: Path | None = None, **run_config: str) -> str:
        """Start a run with these settings, of this app or of another one; returns its id."""
        config = dict(run_config)
        if overrides:
            config["overrides"] = shlex.join(overrides)
        file = self.folder / "run-config.toml"
        file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in config.items()))
        command = ["run", str(app_dir or self.app_dir), CONNECTION, "--format", "json"]
        answer = self.flwr(*command, *(["--run-config", str(file)] if config else []))
        if not answer.get("success"):
            raise RuntimeError(f"flwr run: {answer}")
        return str(answer["run-id"])

    def status(self, run_id: str) -> str:
        """Flower's status of a run, such as ``finished:completed``; empty while the SuperLink is away."""
        try:
            answer = self.flwr("ls", CONNECTION, "--run-id", run_id, "--format", "json")
        except subprocess.TimeoutExpired:
            return ""
        return str((answer.get("runs") or [{}])[0].get("status", ""))

    def online(self) -> int:
        """Number of connected SuperNodes."""
        answer = self.flwr("supernode", "list", CONNECTION, "--format", "json")
        return sum(node["status"] == "online" for node in answer.get("nodes", []))

    def flwr(self, *arguments: str) -> dict[str, Any]:
        """Run a ``flwr`` command and return its JSON answer."""
        done = subprocess.run(
            [program("flwr"), *arguments],
            env=self._environment("commands"), cwd=self.folder, capture_output=True, text=True,
            timeout=COMMAND_TIMEOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        start = done.stdout.find("{")
        if start < 0:
            raise RuntimeError(f"flwr {' '.join(arguments)}: {done.stdout}{done.stderr}")
        answer: dict[str, Any] = json.loads(done.stdout[start:])
        return answer

    def site_settings(self, site: int) -> dict[str, str]:
        """The site's node configuration."""
        return {
            "partition-id": str(site),
            "num-partitions": str(self.sites),
            "state-dir": f'"{self.folder}/site-{site}/state"',
            "cache-dir": f'"{self.folder}/site-{site}/cache"',
        }

    # -----------------------------------------------------------------------------------------------

    def _command(self, part: str) -> list[str]:
        tls = ["--root-certificates", str(self.folder / "ca.crt")] if self.secure else ["--insecure"]
        host, port = self.address.split(":")
        if part == "superlink":
            command = ["flower-superlink", "--host", host, "--port", port, "--isolation", "process"]
            command += ["--database", str(self.folder / "superlink.db")]
            command += ["--disable-runtime-dependency-installation"]
            if not self.secure:
                return [*command, "--insecure"]
            for option, file in (
                ("certfile", "server.crt"),
                ("keyfile", "server.key"),
                ("ca-certfile", "ca.crt"),
            ):
                command += [f"--ssl-{option}", str(self.folder / file)]
            return [*command, "--enable-supernode-auth"]
        if part == "superexec":
            return ["flower-superexec", "--runtime-api-address", self.address, *tls]
        site = int(part.removeprefix("site-"))
        config = " ".join(f"{key}={value}" for key, value in self.site_settings(site).items())
        command = ["flower-supernode", "--superlink", self.address, *tls]
        command += ["--host", host, "--port", str(self._ports[site]), "--node-config", config]
        if self.secure:
            command += ["--auth-supernode-private-key", str(self.folder / f"site-{site}" / "key")]
        return command

    def _environment(self, part: str) -> dict[str, str]:
        home = self.folder / part / "flwr"
        home.mkdir(parents=True, exist_ok=True)
        surroundings = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
        return (
            environment(surroundings, home)
            | self._polling
            | ({SUPEREXEC_VARIABLE: json.dumps(client_host())} if self._warm else {})
            | {
                MARK: f"{self._id}:{part}",
                "XDG_CACHE_HOME": str(self.folder),
                "PYTHONPATH": os.pathsep.join([str(KILLPOINT), os.environ.get("PYTHONPATH", "")]),
                KILL_AT: str(self.folder / part / "kill"),
            }
        )

    def _write_connection(self) -> None:
        text = (
            f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\naddress = "{self.address}"\n'
        )
        text += f'root-certificates = "{self.folder}/ca.crt"\n' if self.secure else "insecure = true\n"
        home = self.folder / "commands" / "flwr"
        home.mkdir(parents=True, exist_ok=True)
        (home / "config.toml").write_text(text)

    def _register(self, site: int) -> None:
        key = make_node_key(self.folder / f"site-{site}")
        answer = self.flwr(
            "supernode", "register", str(key), CONNECTION, "--name", f"site-{site}", "--format", "json"
        )
        if not answer.get("success"):
            raise RuntimeError(f"flwr supernode register: {answer}")

    def _answers(self) -> bool:
        host, port = self.address.split(":")
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=2.0):
            return True
        return False


class _Keeper:
    """Keeps one command running until it is stopped."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        self._command, self._environment, self._log = [program(command[0]), *command[1:]], environment, log
        self._stopped = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Start it no more, and kill it."""
        self._stopped.set()
        while self._thread.is_alive():
            if self._process is not None:
                self._process.kill()
            self._thread.join(0.1)

    def end(self) -> None:
        """Ask it to end, wait until it has, and start it no more."""
        self._stopped.set()
        if self._process is not None:
            self._process.terminate()
        self._thread.join()

    def _keep(self) -> None:
        while not self._stopped.is_set():
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(
                    self._command, env=self._environment, cwd=self._log.parent, stdin=subprocess.DEVNULL,
                    stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip
            self._process.wait()
            self._stopped.wait(RESTART_SECONDS)


def copy_app(target: Path) -> None:
    """Copy the app and nothing else: ``flwr run`` looks at every file of a folder, also at a ``.venv``."""
    target.mkdir(parents=True, exist_ok=True)
    for name in APP_PARTS:
        part = APP_DIR / name
        if part.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(part, target / name, ignore=ignored, dirs_exist_ok=True)
        else:
            shutil.copy(part, target / name)


def wait_for(condition: Callable[[], bool], seconds: float, problem: str, interval: float = 0.1) -> None:
    """Wait until a condition holds.

    Raises
    ------
    TimeoutError
        With the problem.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{problem} within {seconds:g} s")
        time.sleep(interval)


def free_port() -> int:
    """A port that nobody listens on at present."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def make_certificates(folder: Path, host: str = "127.0.0.1", hours: float = 24.0) -> None:
    """Write ``ca.crt``, ``server.crt`` and ``server.key``; the server's is good for ``hours`` from now."""
    authority, server = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "loopback CA")])
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only",
         "decipher_only"), False,
    )  # fmt: skip
    sign = x509.KeyUsage(digital_signature=False, key_cert_sign=True, crl_sign=True, **usage)
    serve = x509.KeyUsage(digital_signature=True, key_cert_sign=False, crl_sign=False, **usage)
    ca = _certificate(issuer, issuer, authority, authority, [x509.BasicConstraints(True, None), sign])
    names = x509.SubjectAlternativeName(
        [x509.IPAddress(ipaddress.ip_address(host)), x509.DNSName("localhost")]
    )
    leaf = _certificate(
        subject, issuer, server, authority, [x509.BasicConstraints(False, None), serve, names], hours
    )
    pem = serialization.Encoding.PEM
    (folder / "ca.crt").write_bytes(ca.public_bytes(pem))
    (folder / "server.crt").write_bytes(leaf.public_bytes(pem))
    form, bare = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    _write_secret(folder / "server.key", server.private_bytes(pem, form, bare))


def make_node_key(folder: Path) -> Path:
    """Write a SuperNode's ``key`` and ``key.pub``; returns the public one."""
    folder.mkdir(parents=True, exist_ok=True)
    private, public = make_site_key(folder.name)
    _write_secret(folder / "key", private)
    (folder / "key.pub").write_bytes(public)
    return folder / "key.pub"


def _write_secret(path: Path, content: bytes) -> None:
    path.touch(mode=0o600)
    path.write_bytes(content)


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    authority: ec.EllipticCurvePrivateKey,
    extensions: list[Any],
    hours: float = 24.0,
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=24))
        .not_valid_after(now + datetime.timedelta(hours=hours))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()), False)
    )
    for extension in extensions:
        builder = builder.add_extension(
            extension, critical=not isinstance(extension, x509.SubjectAlternativeName)
        )
    return builder.sign(authority, hashes.SHA256())
