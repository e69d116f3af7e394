"""A study's runs as tasks of Ray, on this machine or on a cluster."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedmutual.appfolder import PACKAGE, app_folder
from fedmutual.compare.carried import recover, replace_folder, whole
from fedmutual.compare.node import Beat, Order, carry_out, versions
from fedmutual.compare.plan import PlannedRun
from fedmutual.compare.pool import POLL_SECONDS
from fedmutual.compare.worker import log_of
from fedmutual.files.checkpoint import has_checkpoint
from fedmutual.results.directory import CHECKPOINT
from fedmutual.settings import SettingsError
from fedmutual.settings.hydra_conf import parsed
from fedmutual.simulation.request import available_cores
from fedmutual.simulation.superlink import ALLOCATOR

LOCAL = "local"
ATTEMPTS = 3  # of a run whose process or machine is lost
ENDING_SECONDS = 10.0
READ = ("data.root", "data.dataset", "model.backbone")  # settings that may name a file or folder
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_prestart_worker_first_driver": "0",
    # what Ray hides from a task without a share of a GPU is for the setting `device` to decide
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


class RayWork:
    """A run that Ray carries out, again where its machine is lost.

    Parameters
    ----------
    ray : Any
        The package.
    submit : Callable[[], Any]
        Hands the run to Ray, with what is in its folder; returns the stream of its beats.
    """

    def __init__(
        self, ray: Any, run: PlannedRun, path: Path, submit: Callable[[], Any], say: Callable[[str], None]
    ):
        self.round = 0
        self.problem = self.where = ""
        self.code: int | None = None
        self.beats = submit()
        self._ray, self._run, self._path, self._submit, self._say = ray, run, path, submit, say
        self._attempts = 1

    def over(self) -> bool:
        """Whether it has ended; takes what has come."""
        while not self._ended() and self._ray.wait([self.beats], timeout=0, fetch_local=False)[0]:
            self._take()
        return self._ended()

    def _ended(self) -> bool:
        return bool(self.problem) or self.code is not None

    def _take(self) -> None:
        try:
            beat: Beat = self._ray.get(next(self.beats))
        except StopIteration:
            self._lost("its task ended")
        except self._ray.exceptions.RayTaskError as error:  # of our own code there, or of its installation
            self.problem = f"its task failed: {str(error).strip().splitlines()[-1]}"
        except self._ray.exceptions.RuntimeEnvSetupError as error:
            self.problem = f"Ray cannot set up its environment: {str(error).strip().splitlines()[0]}"
        except self._ray.exceptions.RayError as error:
            self._lost(type(error).__name__)
        else:
            self._note(beat)

    def _note(self, beat: Beat) -> None:
        self.where, self.round = beat.node, max(self.round, beat.round)
        if beat.log:
            log = log_of(self._path)
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("ab") as file:
                file.write(beat.log)
        if beat.changes is not None and beat.changes.names:
            replace_folder(self._path, beat.changes)
        if beat.code is not None and beat.code < 0:
            self._lost(f"its process was ended by signal {-beat.code}")
        else:
            self.code, self.problem = beat.code, beat.problem

    def _lost(self, why: str) -> None:
        place = self.where or "a machine that had not answered"
        if self._attempts == ATTEMPTS:
            self.problem = f"lost {ATTEMPTS} times, the last time with {place}: {why}"
            return
        self._attempts += 1
        self._say(f"{self._run.label}: lost with {place} ({why}); attempt {self._attempts} of {ATTEMPTS}")
        self.beats = self._submit()


class RayCluster:
    """Ray, which is connected to when the first run starts.

    Parameters
    ----------
    address : str
        "local": Ray is started on this machine, for this study alone; else as ``ray.init`` takes it.
    say : Callable[[str], None]
        Tells the user.
    ray : Any
        The package; None: imported.
    """

    def __init__(self, address: str, say: Callable[[str], None], ray: Any = None) -> None:
        self._address, self._say, self._ray = address, say, ray
        self._task: Any = None
        self._started: list[RayWork] = []

    def prepare(self, cpus: int) -> None:
        """Connect.

        Raises
        ------
        SettingsError
            There is no such cluster.
        """
        if self._task is not None:
            return
        if self._address.startswith("ray://"):
            raise SettingsError(
                f"--ray-address: {self._address} is a client's address: join the cluster with `ray start "
                "--address=HOST:PORT --num-cpus=0` on this machine, and give --ray-address auto"
            )
        os.environ.update(_QUIET)
        if self._ray is None:
            import ray

            self._ray = ray
        local = {"num_cpus": available_cores(), "include_dashboard": False} if self._address == LOCAL else {}
        with _bundle() as bundle, _own_signals():
            try:
                self._ray.init(
                    address=self._address,
                    runtime_env={"working_dir": str(bundle), "env_vars": {**ALLOCATOR, **_QUIET}},
                    log_to_driver=False,
                    logging_level="ERROR",
                    **local,
                )
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise SettingsError(f"--ray-address: no cluster at {self._address}: {error}") from error
        self._task = self._ray.remote(carry_out)

    def start(self, run: PlannedRun, path: Path) -> RayWork:
        """Hand a run to Ray, with the folder of the one interrupted in ``path``."""
        recover(path)

        def submit() -> Any:
            begun = whole(path) if has_checkpoint(path / CHECKPOINT) else None
            order = Order(run.folder, run.overrides, needs(run), versions(), begun)
            resources = {"num_cpus": run.cpus, "num_gpus": run.gpus}
            # a lost task is handed over again by RayWork, which knows how far the run was
            task = self._task.options(**resources, num_returns="streaming", max_retries=0, name=run.label)
            return task.remote(order)

        work = RayWork(self._ray, run, path, submit, self._say)
        self._started = [*(work for work in self._started if not work.problem and work.code is None), work]
        return work

    def wait(self) -> None:
        """Wait until something comes, a moment at most."""
        running = [work.beats for work in self._started if not work.problem and work.code is None]
        if running:
            self._ray.wait(running, timeout=POLL_SECONDS, fetch_local=False)

    def end(self, hurry: Callable[[], bool]) -> None:
        """End what still runs."""
        running = [work.beats for work in self._started if not work.problem and work.code is None]
        for beats in running:
            self._ray.cancel(beats)
        if running and not hurry():
            self._ray.wait(running, num_returns=len(running), timeout=ENDING_SECONDS, fetch_local=False)
        self._started = []

    def close(self) -> None:
        """Leave the cluster, or end the local one."""
        if self._task is not None:
            with _own_signals():
                self._ray.shutdown()
            self._task = None


def needs(run: PlannedRun) -> dict[str, str]:
    """Return the files and folders of this machine that a run reads, by the setting that names them."""
    values = {override.key_or_group: str(override.value()) for override in map(parsed, run.overrides)}
    return {
        key: values[key] for key in READ if os.path.isabs(values.get(key, "")) and os.path.exists(values[key])
    }


@contextmanager
def _bundle() -> Iterator[Path]:
    """The code that runs: this package and its app, without what else lies in a checkout."""
    with tempfile.TemporaryDirectory(prefix="fedmutual-app-") as temporary:
        target = Path(temporary)
        for name in ("pyproject.toml", "server_app.py", "client_app.py"):
            shutil.copy2(app_folder() / name, target / name)
        shutil.copytree(app_folder() / "conf", target / "conf")
        shutil.copytree(PACKAGE, target / "fedmutual", ignore=shutil.ignore_patterns("_app", "__pycache__"))
        yield target


@contextmanager
def _own_signals() -> Iterator[None]:
    """Ray sets a handler of SIGTERM; the command keeps its own."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
