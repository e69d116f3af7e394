"""A client's state on its own disk: weights, optimiser, round and last report, in one atomic file.

``<state-dir>/<run>/<client>/state.safetensors`` holds all that is needed to continue bit for bit and the
last report, so that an order that arrives twice is answered and not trained twice. Random numbers are
derived from (seed, client, round), so no generator's state has to be kept. The file names its client and run,
and only its owner can read it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from fedmutual.files.checkpoint import (
    Arrays,
    CheckpointError,
    has_checkpoint,
    load_checkpoint,
    previous_path,
    read_generation,
    save_checkpoint,
    step_back,
)
from fedmutual.files.disk import make_private
from fedmutual.models.stored import BEST, CARD, save_model
from fedmutual.told import Told
from fedmutual.wire.reports import Report

_REMEDY = "put this client's own file back, or delete its folder: it then starts with fresh weights"
_OPTIMIZER_GROUPS = "optimizer-groups"


class StateError(Told, RuntimeError):
    """The state on disk does not fit the order; the message names the folder and the remedy."""


@dataclass(frozen=True)
class Ledger:
    """Bytes of message content that the client has received and sent in this run."""

    received: int = 0
    sent: int = 0


@dataclass(frozen=True)
class ClientState:
    """What a client keeps between two orders.

    Attributes
    ----------
    architecture : str
        What must not change within a run: the model's dotted path, and its backbone.
    weights : dict[str, Tensor]
    optimizer : dict[str, Any]
        ``state_dict`` of the local optimiser; empty before the first training.
    report : Report
        The last report; ``report.round`` is the last round that was answered.
    average : dict[str, Tensor]
        Moving average of the weights over ``average_steps`` steps; empty where there is none.
    sent : dict[str, Tensor]
        What goes with the last report in place of weights; empty where the strategy says it of the weights.
    """

    architecture: str
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    report: Report
    ledger: Ledger = field(default_factory=Ledger)
    average: dict[str, Tensor] = field(default_factory=dict)
    sent: dict[str, Tensor] = field(default_factory=dict)
    average_steps: int = 0


class StateFolder:
    """The folder of one client in one run."""

    def __init__(self, state_dir: Path, run: str, client: str) -> None:
        self.path = state_dir / run / client
        self._owner = {"client": client, "run": run}
        self._file = self.path / "state.safetensors"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for one order.

        Raises
        ------
        StateError
            If another process holds it (two nodes with one name, or a stray process), or it cannot be made.
        """
        try:
            make_private(self.path)
            held = FileLock(self.path / ".lock", timeout=0, mode=0o600).acquire()
        except Timeout as error:
            raise StateError(
                f"{self.path} is in use by another process: this client's last order is still running, "
                "or two nodes have one client-name"
            ) from error
        except OSError as error:
            raise StateError(
                f"{self.path} cannot be made ({error.strerror}): see to the state-dir"
            ) from error
        with held:
            for leftover in self.path.glob(".*.tmp"):  # of a write that a kill cut off, a model's size each
                leftover.unlink()
            yield

    def load(self) -> ClientState | None:
        """The client's state, or None before its first report.

        Raises
        ------
        StateError
            It is damaged, or another client's or run's.
        """
        if not has_checkpoint(self._file):
            return None
        try:
            meta, arrays = load_checkpoint(self._file)
        except CheckpointError as error:
            raise StateError(f"{error}: {_REMEDY}") from error
        return self._own(meta, arrays)

    def step_back(self, round: int) -> ClientState | None:
        """Return to the previous generation where that is of ``round`` or earlier; None where it is not.

        A server whose last checkpoint is damaged goes on from the one before, and asks for that round again.

        Raises
        ------
        StateError
            It is another client's or run's.
        """
        try:
            meta, arrays = read_generation(previous_path(self._file))
        except CheckpointError:
            return None
        state = self._own(meta, arrays)
        if state.report.round > round:
            return None
        step_back(self._file)
        return state

    def save(self, state: ClientState) -> None:
        """Replace the state atomically; the one before it is kept as the previous generation.

        Raises
        ------
        StateError
            The disk is full or cannot be written; both generations are as they were.
        """
        report = state.report
        meta: dict[str, Any] = {
            "owner": self._owner,
            "architecture": state.architecture,
            "report": {
                "client": report.client,
                "round": report.round,
                "public_digest": report.public_digest,
                "architecture": report.architecture,
                "metrics": report.metrics,
                "private_digest": report.private_digest,
            },
            "ledger": vars(state.ledger),
            "average_steps": state.average_steps,
        }
        arrays = {f"weights.{name}": tensor.cpu().numpy() for name, tensor in state.weights.items()}
        arrays |= {f"average.{name}": tensor.cpu().numpy() for name, tensor in state.average.items()}
        arrays |= {f"sent.{name}": tensor.cpu().numpy() for name, tensor in state.sent.items()}
        if state.optimizer:
            meta[_OPTIMIZER_GROUPS] = state.optimizer["param_groups"]
            arrays |= {
                f"optimizer.{index}.{key}": torch.as_tensor(value).cpu().numpy()
                for index, entries in state.optimizer["state"].items()
                for key, value in entries.items()
                if value is not None
            }
        arrays["report.predictions"] = report.predictions
        if report.unseen_predictions is not None:
            arrays["report.unseen_predictions"] = report.unseen_predictions
        try:
            save_checkpoint(self._file, meta, arrays)
        except OSError as error:
            size = sum(array.nbytes for array in arrays.values()) / 1e6
            raise StateError(
                f"{self.path}: the state of round {report.round} cannot be written ({error.strerror}); the "
                f"client goes on from the one before, which is intact: make room for {size:.1f} MB there"
            ) from error

    def _own(self, meta: dict[str, Any], arrays: Arrays) -> ClientState:
        owner = meta.get("owner")
        if owner != self._owner:
            names = owner if isinstance(owner, dict) else {}
            whose = f"{names.get('client', 'an unknown client')} in the run {names.get('run', 'unknown')}"
            wanted = f"{self._owner['client']} in the run {self._owner['run']}"
            raise StateError(f"{self._file} is the state of {whose}, not of {wanted}: {_REMEDY}")
        return _state(meta, arrays)

    def export_model(self, weights: dict[str, Tensor], card: dict[str, Any], place: str = "") -> Path:
        """Write the model and its card beside the state (:func:`fedmutual.models.stored.save_model`)."""
        if place:
            make_private(self.path / place)
        return save_model(self.path / place, weights, card)

    def best_card(self) -> dict[str, Any] | None:
        """Return the card of the best model so far (``train.keep=best``); None: there is none."""
        try:
            return dict(json.loads((self.path / BEST / CARD).read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return None


def _state(meta: dict[str, Any], arrays: Arrays) -> ClientState:
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    unseen = arrays.get("report.unseen_predictions")
    return ClientState(
        architecture=meta["architecture"],
        weights=_below("weights.", tensors),
        optimizer=_optimizer_from(meta, _below("optimizer.", tensors)),
        report=Report(**meta["report"], predictions=arrays["report.predictions"], unseen_predictions=unseen),
        ledger=Ledger(**meta["ledger"]),
        average=_below("average.", tensors),
        sent=_below("sent.", tensors),
        average_steps=meta["average_steps"],
    )


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _optimizer_from(meta: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    if _OPTIMIZER_GROUPS not in meta:
        return {}
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    return {"state": state, "param_groups": meta[_OPTIMIZER_GROUPS]}
