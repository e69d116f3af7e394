"""The directory of a run on the server: configuration, history, checkpoint, summary.

Nothing else writes run data on the server. Every write is either atomic or one whole, synced line.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import OmegaConf
from platformdirs import user_data_path

from fedmutual.files import checkpoint
from fedmutual.files.atomic import atomic_write, sync_folder
from fedmutual.models.stored import GLOBAL, save_model
from fedmutual.results.summary import build_summary
from fedmutual.settings.described import flat

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ResultsError", "RunDirectory", "build_summary", "json_safe", "leave_summary", "user_runs_dir"]

logger = logging.getLogger(__name__)

CONFIG, HISTORY, SUMMARY = "config.yaml", "history.jsonl", "summary.json"
OVERRIDES, EVIDENCE = "overrides.json", "evidence.npz"
PUBLIC_DATA = "public_data.json"
CHECKPOINT = "checkpoint.safetensors"

Record = dict[str, Any]


class ResultsError(RuntimeError):
    """A results directory cannot be used as asked; the message names it and says what to do."""


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
        self.listeners: list[Callable[[Sequence[Mapping[str, Any]]], None]] = []

    @classmethod
    def create(
        cls,
        output_dir: Path | None,
        settings: Mapping[str, Any],
        run_name: str,
        overrides: Sequence[str] = (),
    ) -> RunDirectory:
        """Start a run's directory; save its resolved settings, and the overrides for a resume.

        Parameters
        ----------
        output_dir : Path | None
            The folder; None: ``<run_name>`` under :func:`user_runs_dir`.
        settings : Mapping[str, Any]
            ``settings.as_container(settings)``.

        Raises
        ------
        ResultsError
            The folder holds the results of another run, or is no folder.
        """
        path = (output_dir or user_runs_dir() / run_name).absolute()
        if path.exists() and not path.is_dir():
            raise ResultsError(f"output_dir: {path} is a file; choose a folder")
        taken = [name for name in (SUMMARY, HISTORY) if (path / name).exists()]
        if checkpoint.has_checkpoint(path / CHECKPOINT):
            taken.append(CHECKPOINT)
        if taken:
            raise ResultsError(
                f"output_dir: {path} already holds the results of another run ({', '.join(taken)}); "
                f"choose another folder, or continue that run with resume={path}"
            )
        directory = cls(path)
        directory.write_config(settings)
        atomic_write(path / OVERRIDES, json.dumps(list(overrides), indent=2).encode())
        return directory

    @classmethod
    def resume(cls, path: Path) -> RunDirectory:
        """Open the directory of an interrupted run at its last intact checkpoint.

        History lines after the checkpoint's round are dropped, because that part is about to be run again;
        an old ``summary.json`` becomes ``summary.previous.json``.

        Raises
        ------
        ResultsError
            The folder holds no checkpoint that can be read.
        """
        directory = cls(path.absolute())
        if not checkpoint.has_checkpoint(directory.path / CHECKPOINT):
            raise ResultsError(
                f"resume: {path} holds no {CHECKPOINT}: no round of that run was completed; start a new run"
            )
        for leftover in directory.path.glob(".*.tmp"):  # of a write that a kill cut off
            leftover.unlink()
        (directory.path / EVIDENCE).unlink(missing_ok=True)  # of what is about to be run on
        meta, _ = directory.load_checkpoint()
        kept = [line for line in directory.history() if int(line["round"]) <= meta["round"]]
        atomic_write(directory.path / HISTORY, b"".join(_line(record) for record in kept))
        if (directory.path / SUMMARY).exists():
            os.replace(directory.path / SUMMARY, directory.path / "summary.previous.json")
        return directory

    def write_config(self, settings: Mapping[str, Any]) -> None:
        """Save the resolved settings, atomically."""
        atomic_write(self.path / CONFIG, OmegaConf.to_yaml(OmegaConf.create(dict(settings))).encode())

    def config(self) -> dict[str, Any]:
        """Return the saved settings as plain nested dicts."""
        container = OmegaConf.to_container(OmegaConf.load(self.path / CONFIG))
        assert isinstance(container, dict)
        return {str(key): value for key, value in container.items()}

    def require_same(self, settings: Mapping[str, Any]) -> None:
        """Refuse to go on with settings that would make another run of it; folders and waiting may change.

        Raises
        ------
        ResultsError
            Naming the first setting that differs.
        """
        free = ("resume", "output_dir", "state_dir", "cache_dir", "device", "data.root", "num_clients")
        saved, now = flat(self.config()), flat(settings)
        changed = sorted(key for key in saved.keys() | now.keys() if saved.get(key) != now.get(key))
        for key in changed:
            if key in free or key.startswith(("exchange.", "simulation.", "tracking.")):
                continue
            raise ResultsError(
                f"resume: {key} is {now.get(key)!r} now and was {saved.get(key)!r} in {self.path}: "
                "repeat the run's settings (`fedmutual run resume=...` does it by itself)"
            )

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Add a line a record to ``history.jsonl``, on the disk on return; NaN and inf become null."""
        data = b"".join(_line(record) for record in records)
        path = self.path / HISTORY
        new = not path.exists()
        with path.open("ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if new:
            sync_folder(self.path)
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
            return checkpoint.load_checkpoint(self.path / CHECKPOINT)
        except checkpoint.CheckpointError as error:
            raise ResultsError(f"{error}; this run cannot be resumed") from error

    def count_public_bytes(self, sent: int) -> None:
        """Add bytes of public images that were sent; the count goes on when the run is resumed."""
        atomic_write(self.path / PUBLIC_DATA, json.dumps({"bytes": self.public_bytes() + sent}).encode())

    def public_bytes(self) -> int:
        """Bytes of public images that were sent in this run so far."""
        try:
            return int(json.loads((self.path / PUBLIC_DATA).read_bytes())["bytes"])
        except FileNotFoundError:
            return 0

    def write_global_model(self, weights: Mapping[str, Tensor], card: Mapping[str, Any]) -> Path:
        """Write the run's global model and its card into a folder of its own."""
        return save_model(self.path / GLOBAL, weights, card)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write ``summary.json`` atomically; NaN and inf become null."""
        text = json.dumps(json_safe(summary), indent=2, ensure_ascii=False, allow_nan=False)
        atomic_write(self.path / SUMMARY, f"{text}\n".encode())


def user_runs_dir() -> Path:
    """Folder of the runs without ``output_dir``, in the user's data folder (on Linux ``$XDG_DATA_HOME``)."""
    return user_data_path("fedmutual", appauthor=False) / "runs"


def read_history(path: Path) -> list[Record]:
    """Return the history lines of a results folder; no file means none.

    A last line that a kill cut short is left out with a warning.

    Raises
    ------
    ResultsError
        A line is no JSON object with a round.
    """
    file = path / HISTORY
    *lines, rest = file.read_bytes().split(b"\n") if file.exists() else [b""]
    if rest:  # it was being written when the run was killed
        logger.warning("%s: the last line was cut short and is ignored", file)
    records: list[Record] = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ResultsError(f"{file}, line {number} is no JSON: {error}") from error
        if not isinstance(record, dict) or not isinstance(record.get("round"), int):
            raise ResultsError(f"{file}, line {number} is no history line: it has no round")
        records.append(record)
    return records


def saved_overrides(path: Path) -> list[str]:
    """The overrides that an earlier run was started with; none where its folder has no such file."""
    try:
        return [str(override) for override in json.loads((path / OVERRIDES).read_bytes())]
    except FileNotFoundError:
        return []


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
    history = directory.history()
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
    return json.dumps(json_safe(record), ensure_ascii=False, allow_nan=False).encode() + b"\n"
