"""The process that has imported everything: it forks a child for each message (``host.py FD LIMIT``).

A child is a ``flwr-clientapp`` as Flower's SuperExec would have started it, without the seconds that Python
needs to import Flower and PyTorch. The host imports nothing of an app, so that every child loads the code
that came with its run. It runs no kernel and starts no thread: a fork would copy locked locks.

Run as a script of its own: nothing of fedmutual is imported.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NoReturn

CLIENT = "flwr-clientapp"
TITLE = "fedmutual client-host"
LOOK_SECONDS = 0.5  # between two looks at running children
# what an image classifier's client imports; what is missing is left out
MODULES = (
    "numpy", "torch", "torchvision.transforms.v2", "scipy.optimize", "scipy.special", "PIL.Image", "hydra",
    "omegaconf", "safetensors.torch", "safetensors.numpy", "filelock", "platformdirs", "psutil",
    "cryptography.hazmat.primitives.asymmetric.x25519",
)  # fmt: skip
_PAGE = os.sysconf("SC_PAGE_SIZE")


class UnfitError(Exception):
    """Children of this process could not work as those that Flower starts."""


class Host:
    """Forks children, and ends those that take too much memory.

    Parameters
    ----------
    channel : socket.socket
        A pair's end: one message, one answer. The host ends when the other end is closed.
    limit : int
        Bytes of memory that a child may use; 0: any number.
    fork, resident
        Injected by tests.
    """

    def __init__(
        self,
        channel: socket.socket,
        limit: int,
        fork: Callable[[], int] = os.fork,
        resident: Callable[[int], int] | None = None,
    ) -> None:
        self._channel = channel
        self._limit = limit
        self._fork = fork
        self._resident = resident or resident_bytes
        self.children: list[int] = []  # oldest first

    def serve(self) -> list[str] | None:
        """Answer until the other end is closed; in a child, return the arguments of its program."""
        with contextlib.suppress(ConnectionError):  # it is closed
            self._answer()
            return self._serve()
        return None

    def _serve(self) -> list[str] | None:
        while True:
            timeout = LOOK_SECONDS if self.children else None
            readable = select.select([self._channel], [], [], timeout)[0]
            self._look()
            if not readable:
                continue
            text = self._channel.recv(65536)
            if not text:
                return None
            arguments: list[str] = json.loads(text)
            if arguments:
                pid = self._fork()
                if not pid:
                    self._channel.close()
                    return arguments
                self.children.append(pid)
            self._answer()

    def _answer(self) -> None:
        state = {"children": self.children, "bytes": self._resident(os.getpid())}
        self._channel.send(json.dumps(state).encode())

    def _look(self) -> None:
        for pid in list(self.children):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self.children.remove(pid)
                if os.WIFSIGNALED(status):
                    say(f"client process {pid} was ended by signal {os.WTERMSIG(status)}")
            elif self._limit and (used := self._resident(pid)) > self._limit:
                limit = self._limit >> 20
                say(f"client process {pid} uses {used >> 20} MiB, the limit is {limit} MiB: it is ended")
                os.kill(pid, signal.SIGKILL)


def resident_bytes(pid: int) -> int:
    """Memory that a process uses, shared pages included; 0 for one that has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    except (OSError, IndexError):
        return 0


def say(text: str) -> None:
    """Write a line to the log."""
    print(f"WARNING fedmutual: {text}", file=sys.stderr, flush=True)


def set_title(title: str) -> None:
    """Show a title in place of this process's command line.

    Raises
    ------
    UnfitError
        The system does not show it.
    """
    try:
        start, end = (
            int(field) for field in Path("/proc/self/stat").read_text().rpartition(")")[2].split()[45:47]
        )
        content = title.encode()[: end - start - 1].ljust(end - start, b"\0")
        ctypes.memmove(start, content, len(content))
        shown = Path("/proc/self/cmdline").read_bytes().rstrip(b"\0").decode()
    except (OSError, ValueError, IndexError) as error:
        raise UnfitError(f"this system hides a process's command line ({error})") from error
    if not shown or not title.startswith(shown):
        raise UnfitError("this system does not show a process's title")


def prepare() -> set[str]:
    """Import everything, and see whether a fork of this process can work.

    Returns
    -------
    set of str
        Packages that ``flwr-clientapp`` alone would not have imported.

    Raises
    ------
    UnfitError
        It cannot.
    """
    (program,) = entry_points(group="console_scripts", name=CLIENT)
    program.load()
    before = _packages()
    for name in MODULES:
        try:
            importlib.import_module(name)
        except ImportError:
            continue
    with contextlib.suppress(Exception):  # nothing depends on it
        _compose_something()
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        raise UnfitError("an import has initialised CUDA")
    gc.collect()
    gc.freeze()  # collections in children skip, and so do not copy, what is shared
    _try_fork()
    threads = len(os.listdir("/proc/self/task"))  # OpenBLAS ends its own before a fork
    if threads > 1:
        raise UnfitError(f"{threads} threads run after the imports")
    return _packages() - before


def _compose_something() -> None:
    """Have Hydra compose a config: it finds its plugins, and its parser its tables, only once."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "group").mkdir()
        Path(folder, "group", "one.yaml").write_text("value: 1\ntext: a\nflag: true\nlist: [1, 2.5, x]\n")
        Path(folder, "config.yaml").write_text("defaults: [{group: one}, _self_]\nrate: 0.1\nname: null\n")
        overrides = ["group=one", "rate=1e-3", "name=/a/b-c_d.e", "group.flag=false", "group.list=[a,b,1]"]
        with initialize_config_dir(version_base="1.3", config_dir=folder):
            compose(config_name="config", overrides=overrides)
    GlobalHydra.instance().clear()


def _packages() -> set[str]:
    return {name.partition(".")[0] for name in sys.modules}


def _try_fork() -> None:
    pid = os.fork()
    if not pid:
        code = 1
        try:
            set_title(CLIENT)
            code = 0
        finally:
            os._exit(code)
    if os.waitpid(pid, 0)[1]:
        raise UnfitError("a forked process did not work")


def become_client(arguments: Sequence[str], imported: set[str]) -> NoReturn:
    """Do in a child what Flower's program does with these arguments.

    Parameters
    ----------
    imported : set of str
        Packages that an app may bring along in another version (:func:`prepare`).
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    set_title(CLIENT)
    program = Path(sys.executable).with_name(CLIENT)
    sys.argv = sys.orig_argv[:] = [str(program), *arguments]
    numpy = sys.modules.get("numpy")
    if numpy is not None:  # children must not draw the same numbers; random does so itself
        numpy.random.seed()
    sys.meta_path.insert(0, AppFirst(sys.path, imported))
    (entry,) = entry_points(group="console_scripts", name=CLIENT)
    end_with(entry.load())


def end_with(program: Callable[[], object]) -> NoReturn:
    """Run a program, and end this process as Python would, but without freeing each of the shared objects.

    That would copy them all: half a second of a CPU.
    """
    code = 1
    try:
        code = _exit_code(program())
    except SystemExit as end:
        code = _exit_code(end.code)
    except BaseException:
        traceback.print_exc()
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _exit_code(value: object) -> int:
    if isinstance(value, int):
        return value & 0xFF
    if value is not None:
        print(value, file=sys.stderr)
    return int(value is not None)


class AppFirst:
    """Lets an app's own packages come before imported ones of the same name, as in a fresh process.

    Parameters
    ----------
    known : sequence of str
        ``sys.path`` before Flower has added the app's folder.
    imported : set of str
        Packages that an app may bring along.
    """

    def __init__(self, known: Sequence[str], imported: set[str]) -> None:
        self._known = set(known)
        self._imported = imported

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Find nothing; called before a module is imported for the first time."""
        for folder in [folder for folder in sys.path if folder not in self._known]:
            self._known.add(folder)
            for package in self._imported:
                if Path(folder, f"{package}.py").exists() or Path(folder, package, "__init__.py").exists():
                    _forget(package)


def _forget(package: str) -> None:
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        del sys.modules[name]


def main() -> None:
    """Serve the socket that the first argument names."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to everybody; the SuperExec ends this process
    channel = socket.socket(fileno=int(sys.argv[1]))
    try:
        set_title(TITLE)
        imported = prepare()
    except Exception as error:
        channel.send(json.dumps({"unfit": f"{type(error).__name__}: {error}"}).encode())
        return
    arguments = Host(channel, int(sys.argv[2])).serve()
    if arguments is not None:
        become_client(arguments, imported)


if __name__ == "__main__":
    main()
