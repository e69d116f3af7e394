"""The directory of a run on the server: configuration, history, checkpoint, summary.

Nothing else writes run data on the server. Every write is either atomic or one whole, synced line. The folder
belongs to one run at a time (:mod:`fedmutual.results.hold`) and, as the files in it, to its owner.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import OmegaConf
from platformdirs import user_data_path

from fedmutual.files import checkpoint
from fedmutual.files.atomic import append, atomic_write
from fedmutual.files.disk import WriteError, allocate, create, writing
from fedmutual.models.stored import GLOBAL, save_model
from fedmutual.results.errors import ResultsError
from fedmutual.results.hold import hold
from fedmutual.results.progress import PROGRESS
from fedmutual.results.summary import DIRECTIONS, MEASURES, build_summary, summary_problem
from fedmutual.settings.described import flat

if TYPE_CHECKING:
    from filelock import FileLock
    from torch import Tensor

__all__ = ["ResultsError", "RunDirectory", "build_summary", "json_safe", "leave_summary", "user_runs_dir"]

logger = logging.getLogger(__name__)

CONFIG, HISTORY, SUMMARY = "config.yaml", "history.jsonl", "summary.json"
OVERRIDES, EVIDENCE = "overrides.json", "evidence.npz"
PUBLIC_DATA = "public_data.json"
AUDIT = "audit.json"  # what `fedmutual audit RUN` has found
CHECKPOINT = "checkpoint.safetensors"
RESERVE, RESERVED = ".reserve", 256 * 1024  # bytes, given up for the summary when the disk is full
LAST_ROUND = 10**9  # a larger number is damage
_REMEDY = "put it back from a copy of the folder"
_RETYPE = "or delete it, and give the run's own settings with the command"
# What the summary and the report read of a history line; a strategy may write more.
_TEXTS = ("client", "model", "rejected", "private_digest")
_NUMBERS = (
    *(
        "node_id",
        "num_examples",
        "trained_images",
        "unseen_num_examples",
        "seconds",
        "clock",
        "kl_before",
        "kl_after",
    ),
    *(f"{split}_{measure}" for split in ("validation", "unseen") for measure in MEASURES[:-1]),
    *DIRECTIONS,
)

Record = dict[str, Any]


class RunDirectory:
    """The results of one run in one folder.

    Use :meth:`create` for a new run and :meth:`resume` for an interrupted one.

    Attributes
    ----------
    path : Path
        The folder, absolute.
    listeners : list[Callable]
        Called with the records that :meth:`append` has put on the disk.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: FileLock | None = None
        self.listeners: list[Callable[[Sequence[Mapping[str, Any]]], None]] = []

    @classmethod
    def create(
        cls,
        output_dir: Path | None,
        settings: Mapping[str, Any],
        run_name: str,
        overrides: Sequence[str] = (),
    ) -> RunDirectory:
        """Start a run's directory and hold it; save its resolved settings, and the overrides for a resume.

        Parameters
        ----------
        output_dir : Path | None
            The folder; None: ``<run_name>`` under :func:`user_runs_dir`.
        settings : Mapping[str, Any]
            ``settings.as_container(settings)``.

        Raises
        ------
        ResultsError
            The folder holds the results of another run, which may still be going on, or is no folder.
        WriteError
            The folder cannot be written, or the disk is full.
        """
        path = (output_dir or user_runs_dir() / run_name).absolute()
        if path.exists() and not path.is_dir():
            raise ResultsError(f"output_dir: {path} is a file; choose a folder")
        directory = cls(path)
        directory._hold()
        try:
            directory._require_empty()
            directory._reserve()
            directory.write_config(settings)
            atomic_write(path / OVERRIDES, json.dumps(list(overrides), indent=2).encode())
        except BaseException:
            directory.close()
            raise
        return directory

    @classmethod
    def resume(cls, path: Path, settings: Mapping[str, Any] | None = None) -> RunDirectory:
        """Open and hold the directory of an interrupted run at its last intact checkpoint.

        History lines after the checkpoint's round are dropped, because that part is about to be run again;
        an old ``summary.json`` becomes ``summary.previous.json``.

        Parameters
        ----------
        path : Path
        settings : Mapping[str, Any] | None
            Settings that must be those of the run (:meth:`require_same`); None: not compared.

        Raises
        ------
        ResultsError
            The folder holds no checkpoint that can be read, or its run is still going on.
        """
        directory = cls(path.absolute())
        if not checkpoint.has_checkpoint(directory.path / CHECKPOINT):
            raise ResultsError(
                f"resume: {path} holds no {CHECKPOINT}: no round of that run was completed; start a new run"
            )
        directory._hold()
        try:
            if settings is not None:
                directory.require_same(settings)
            directory._go_back()
            directory._reserve()
        except BaseException:
            directory.close()
            raise
        return directory

    def close(self) -> None:
        """Let other runs use the folder; to be called when nothing more is written."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _hold(self) -> None:
        self._lock = hold(self.path)

    def _require_empty(self) -> None:
        taken = [name for name in (SUMMARY, HISTORY) if (self.path / name).exists()]
        if checkpoint.has_checkpoint(self.path / CHECKPOINT):
            taken.append(CHECKPOINT)
        if taken:
            raise ResultsError(
                f"output_dir: {self.path} already holds the results of another run ({', '.join(taken)}); "
                f"choose another folder, or continue that run with resume={self.path}"
            )

    def _go_back(self) -> None:
        """Undo what came after the last intact checkpoint."""
        meta, _ = self.load_checkpoint()
        kept = [line for line in self.history() if int(line["round"]) <= meta["round"]]
        for leftover in self.path.glob(".*.tmp"):  # of a write that a kill cut off
            leftover.unlink()
        (self.path / EVIDENCE).unlink(missing_ok=True)  # of what is about to be run on
        atomic_write(self.path / HISTORY, b"".join(_line(record) for record in kept))
        if (self.path / SUMMARY).exists():
            os.replace(self.path / SUMMARY, self.path / "summary.previous.json")

    def _reserve(self) -> None:
        """Keep room for the summary."""
        path = self.path / RESERVE
        path.unlink(missing_ok=True)
        with writing(path, RESERVED), create(path) as file:
            allocate(file, RESERVED)

    def write_config(self, settings: Mapping[str, Any]) -> None:
        """Save the resolved settings, atomically."""
        atomic_write(self.path / CONFIG, OmegaConf.to_yaml(OmegaConf.create(dict(settings))).encode())

    def config(self) -> dict[str, Any]:
        """Return the saved settings as plain nested dicts.

        Raises
        ------
        ResultsError
            The file is missing or damaged.
        """
        file = self.path / CONFIG
        try:
            container = OmegaConf.to_container(OmegaConf.load(file))
        except FileNotFoundError as error:
            raise ResultsError(f"{self.path} holds no {CONFIG}: give the results folder of a run") from error
        except Exception as error:  # those of YAML, of OmegaConf and of the file system
            raise ResultsError(_damaged(file, error)) from error
        if not isinstance(container, dict) or not {"strategy", "seed", "rounds"} <= container.keys():
            raise ResultsError(_damaged(file, "it holds no settings"))
        return {str(key): value for key, value in container.items()}

    def require_same(self, settings: Mapping[str, Any]) -> None:
        """Refuse to go on with settings that would make another run of it; folders and waiting may change.

        Raises
        ------
        ResultsError
            Naming the settings that differ.
        """
        free = ("resume", "output_dir", "state_dir", "cache_dir", "device", "data.root", "num_clients")
        saved, now = flat(self.config()), flat(settings)
        changed = sorted(key for key in saved.keys() | now.keys() if saved.get(key) != now.get(key))
        others = [
            f"{key} is {now.get(key)!r} now and was {saved.get(key)!r}"
            for key in changed
            if not (key in free or key.startswith(("exchange.", "simulation.", "tracking.")))
        ]
        if others:
            raise ResultsError(
                f"resume: {'; '.join(others)} in {self.path}: "
                "repeat the run's settings (`fedmutual run resume=...` does it by itself)"
            )

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Add a line a record to ``history.jsonl``, on the disk on return; NaN and inf become null.

        Raises
        ------
        WriteError
            The disk is full, say; nothing was added.
        """
        append(self.path / HISTORY, b"".join(_line(record) for record in records))
        for listener in self.listeners:
            listener(records)

    def history(self) -> list[Record]:
        """Return every history line so far (:func:`read_history`)."""
        return read_history(self.path)

    def save_checkpoint(self, meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Save the server's state after a round (:func:`fedmutual.files.checkpoint.save_checkpoint`).

        ``meta["round"]`` is the last round whose history lines are kept on resume.
        """
        if not isinstance(meta.get("round"), int):
            raise TypeError('meta["round"] must be the round that was completed')
        checkpoint.save_checkpoint(self.path / CHECKPOINT, meta, arrays)

    def load_checkpoint(self) -> tuple[dict[str, Any], checkpoint.Arrays]:
        """Return the newest intact state (:func:`fedmutual.files.checkpoint.load_checkpoint`).

        Raises
        ------
        ResultsError
            There is none, or none can be read.
        """
        try:
            meta, arrays = checkpoint.load_checkpoint(self.path / CHECKPOINT)
        except checkpoint.CheckpointError as error:
            raise ResultsError(f"{error}; this run cannot be resumed: start a new one") from error
        if not isinstance(meta.get("round"), int):
            raise ResultsError(f"{self.path / CHECKPOINT} is no run's: this run cannot be resumed from it")
        return meta, arrays

    def count_public_bytes(self, sent: int) -> None:
        """Add bytes of public images that were sent; the count goes on when the run is resumed."""
        atomic_write(self.path / PUBLIC_DATA, json.dumps({"bytes": self.public_bytes() + sent}).encode())

    def public_bytes(self) -> int:
        """Bytes of public images that were sent in this run so far.

        Raises
        ------
        ResultsError
            The file that counts them is damaged.
        """
        file = self.path / PUBLIC_DATA
        try:
            return int(json.loads(file.read_bytes())["bytes"])
        except FileNotFoundError:
            return 0
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise ResultsError(f"{_damaged(file, error)}; or delete it to count from 0") from error

    def write_global_model(self, weights: Mapping[str, Tensor], card: Mapping[str, Any]) -> Path:
        """Write the run's global model and its card into a folder of its own."""
        return save_model(self.path / GLOBAL, weights, card)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write ``summary.json`` atomically; NaN and inf become null.

        On a full disk the room that the run has reserved for it is used.

        Raises
        ------
        WriteError
        """
        text = json.dumps(json_safe(summary), indent=2, ensure_ascii=False, allow_nan=False)
        reserve = self.path / RESERVE
        try:
            atomic_write(self.path / SUMMARY, _encoded(f"{text}\n"))
        except WriteError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not reserve.exists():
                raise
            reserve.unlink()
            atomic_write(self.path / SUMMARY, _encoded(f"{text}\n"))
        reserve.unlink(missing_ok=True)
        (self.path / PROGRESS).unlink(missing_ok=True)


def user_runs_dir() -> Path:
    """Folder of the runs without ``output_dir``, in the user's data folder (on Linux ``$XDG_DATA_HOME``)."""
    return user_data_path("fedmutual", appauthor=False) / "runs"


def states_dir(state_dir: str | None = None) -> Path:
    """Folder of clients' states: the one that is set, else one beside :func:`user_runs_dir`."""
    return Path(state_dir or user_runs_dir().parent / "state")


def read_history(path: Path) -> list[Record]:
    """Return the history lines of a results folder; no file means none.

    A last line that a kill cut short is left out with a warning.

    Raises
    ------
    ResultsError
        A line is no JSON object with a round, or holds what no run writes.
    """
    file = path / HISTORY
    try:
        *lines, rest = file.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ResultsError(f"{file} cannot be read: {error.strerror}") from error
    if rest:  # it was being written when the run was killed
        logger.warning("%s: the last line was cut short and is ignored", file)
    return [_record(file, number, line) for number, line in enumerate(lines, start=1)]


def _record(file: Path, number: int, line: bytes) -> Record:
    where = f"{file}, line {number}"
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ResultsError(f"{where} is no JSON ({error}): {_REMEDY}") from error
    round = record.get("round") if isinstance(record, dict) else None
    if type(round) is not int or not 0 <= round <= LAST_ROUND:
        raise ResultsError(f"{where} is no history line, it has no round: {_REMEDY}")
    wrong = [key for key, value in record.items() if not _plausible(key, value)]
    if wrong:
        raise ResultsError(f"{where}: {wrong[0]} is not what a run writes there: {_REMEDY}")
    return dict(record)


def _plausible(key: str, value: Any) -> bool:
    if value is None:
        return True
    if key in _TEXTS:
        return isinstance(value, str)
    return key not in _NUMBERS or (isinstance(value, int | float) and abs(value) <= sys.float_info.max)


def read_summary(path: Path) -> dict[str, Any] | None:
    """Return the summary of a results folder; None where the run has left none.

    Raises
    ------
    ResultsError
        It is damaged.
    """
    file = path / SUMMARY
    try:
        summary = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ResultsError(f"{_damaged(file, error)}; or delete it") from error
    problem = summary_problem(summary)
    if problem:
        raise ResultsError(f"{_damaged(file, problem)}; or delete it")
    return dict(summary)


def read_audit(path: Path) -> dict[str, Any] | None:
    """Return what ``fedmutual audit`` has found of a run; None where it was not audited.

    Raises
    ------
    ResultsError
        The file is damaged.
    """
    file = path / AUDIT
    try:
        found = json.loads(file.read_bytes())
        whole = all(isinstance(entry["figures"], dict) for entry in found["findings"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ResultsError(f"{_damaged(file, error)}; or delete it, and audit the run again") from error
    return dict(found) if whole else None


def saved_overrides(path: Path) -> list[str]:
    """The overrides that an earlier run was started with; none where its folder has no such file.

    Raises
    ------
    ResultsError
        The file is damaged.
    """
    file = path / OVERRIDES
    try:
        saved = json.loads(file.read_bytes())
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError) as error:
        raise ResultsError(f"{_damaged(file, error)}; {_RETYPE}") from error
    if not isinstance(saved, list) or not all(isinstance(override, str) for override in saved):
        raise ResultsError(f"{_damaged(file, 'it is no list of texts')}; {_RETYPE}")
    return saved


def _damaged(file: Path, why: object) -> str:
    """The one line about a damaged file."""
    return f"{file} is damaged ({' '.join(str(why).split())}): {_REMEDY}"


def leave_summary(output_dir: Path, status: str, reason: str) -> Path:
    """Leave a ``summary.json`` where a run was cut off before it wrote one.

    It is built from the configuration and the history that are there. The seconds are estimates: training is
    the sum over rounds of the slowest client, startup is the rest.

    Parameters
    ----------
    output_dir : Path
        Folder of the run.
    status : str
        "stopped" when it was asked to stop, "failed" when something broke it.
    reason : str
        What happened, for the person.

    Returns
    -------
    Path
        The summary; one that was there already is left as it is.

    Raises
    ------
    ResultsError
        The folder is none of a run: it has no ``config.yaml``.
    """
    directory = RunDirectory(output_dir.absolute())
    path = directory.path / SUMMARY
    if path.exists():
        return path
    config = directory.path / CONFIG
    if not config.exists():
        raise ResultsError(f"{output_dir} holds no {CONFIG}: no run was started in it")
    try:
        history = directory.history()
    except ResultsError as error:  # a summary without figures is better than none
        history, reason = [], f"{reason}; {error}"
    slowest: dict[int, float] = {}
    for line in history:
        slowest[line["round"]] = max(slowest.get(line["round"], 0.0), line.get("seconds") or 0.0)
    total, training = max(0.0, time.time() - config.stat().st_mtime), sum(slowest.values())
    seconds = {"total": total, "startup": max(0.0, total - training), "training": training}
    summary = build_summary(
        settings=directory.config(),
        status=status,
        reason=reason,
        history=history,
        public_data_bytes=directory.public_bytes(),
        seconds=seconds,
    )
    directory.write_summary(summary)
    return path


def json_safe(value: Any) -> Any:
    """Return ``value`` as what JSON can hold: NaN and inf become None, arrays lists, paths strings."""
    if isinstance(value, Mapping):
        return {str(key): json_safe(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_safe(entry) for entry in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return json_safe(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def _line(record: Mapping[str, Any]) -> bytes:
    return _encoded(json.dumps(json_safe(record), ensure_ascii=False, allow_nan=False)) + b"\n"


def _encoded(text: str) -> bytes:
    """JSON in UTF-8; half a surrogate pair, as in a file name that is none, becomes JSON's escape of it."""
    return text.encode(errors="backslashreplace")
