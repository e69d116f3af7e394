"""What the server received from the clients, kept for ``fedmutual audit`` (``privacy.record``).

``received/0001.npz`` and so on, a file a round (or a report, in a run without rounds): who, of which public
samples, which log-probabilities. ``closing.npz``: those of the unseen set. ``weights.npz``: the weights that
came last. Where the files of the rounds are more than :data:`MOST_BYTES`, the oldest but the first go.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmutual.files.archive import ArchiveError, Arrays, pack, unpack
from fedmutual.files.atomic import atomic_write
from fedmutual.results.errors import ResultsError

FOLDER = "received"
CLOSING, WEIGHTS = "closing.npz", "weights"
MOST_BYTES = 256 * 2**20  # of all rounds; of one client's weights as well

Floats = NDArray[np.float32]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Heard:
    """The predictions of one round.

    Attributes
    ----------
    round : int
        From 1; in a run without rounds the number of the report.
    indices : int32 array [n]
        Public samples that they are of.
    predictions : dict[str, float32 array [n, C]]
        Log-probabilities by client; with secure aggregation those of their mean, under one name.
    view : int
        Round whose views of the public samples they are of (``public.views``).
    """

    round: int
    indices: NDArray[np.int32]
    predictions: dict[str, Floats]
    view: int


@dataclass(frozen=True, eq=False)
class Received:
    """Everything that a run has kept of what its server received.

    Attributes
    ----------
    rounds : tuple[Heard, ...]
        In order; empty where no predictions are exchanged.
    unseen : dict[str, float32 array [u, C]]
        Of the closing reports.
    weights : dict[str, dict[str, array]]
        By client: those that it sent last.
    """

    rounds: tuple[Heard, ...] = ()
    unseen: dict[str, Floats] = field(default_factory=dict)
    weights: dict[str, dict[str, NDArray[Any]]] = field(default_factory=dict)


class Recorder:
    """Writes what the server receives, each file atomically.

    Parameters
    ----------
    path : Path
        The run's folder.
    """

    def __init__(self, path: Path) -> None:
        self.folder = path / FOLDER

    def add(
        self, round: int, indices: NDArray[np.int32], predictions: Mapping[str, Floats], view: int = 0
    ) -> None:
        """Keep the predictions of a round; nothing where there are none.

        Raises
        ------
        WriteError
            The folder cannot be written or the disk is full.
        """
        if not predictions or len(indices) == 0:
            return
        values = np.stack([np.asarray(p, np.float32) for p in predictions.values()])
        meta = {"round": round, "view": view or round, "clients": list(predictions)}
        data = pack(meta, {"indices": np.asarray(indices, np.int32), "predictions": values})
        self._make_room(len(data))
        atomic_write(self.folder / f"{round:04d}.npz", data)

    def close(self, unseen: Mapping[str, Floats]) -> None:
        """Keep the predictions of the unseen set."""
        if unseen:
            values = np.stack([np.asarray(p, np.float32) for p in unseen.values()])
            atomic_write(self.folder / CLOSING, pack({"clients": list(unseen)}, {"predictions": values}))

    def add_weights(self, client: str, weights: Arrays) -> None:
        """Keep a client's weights in place of those before."""
        size = sum(array.nbytes for array in weights.values())
        if size > MOST_BYTES:
            logger.warning("privacy.record: %d bytes of weights are too many to keep", size)
            return
        arrays = {str(number): array for number, array in enumerate(weights.values())}
        atomic_write(self.folder / WEIGHTS / f"{client}.npz", pack({"layers": list(weights)}, arrays))

    def _make_room(self, size: int) -> None:
        files = _files(self.folder)
        total = sum(file.stat().st_size for file in files) + size
        for file in files[1:]:
            if total <= MOST_BYTES:
                return
            total -= file.stat().st_size
            file.unlink()


def read_received(path: Path) -> Received | None:
    """Read what a run has kept; None where it has kept nothing. Nothing is unpickled.

    Raises
    ------
    ResultsError
        A file is damaged.
    """
    folder = path / FOLDER
    if not folder.is_dir():
        return None
    rounds = []
    for file in _files(folder):
        meta, arrays = _read(file)
        values = arrays["predictions"]
        if values.ndim != 3 or values.shape[:2] != (len(meta["clients"]), len(arrays["indices"])):
            raise ResultsError(f"{file} is damaged (its parts do not fit together): delete it")
        predictions = dict(zip(meta["clients"], values, strict=True))
        rounds.append(Heard(int(meta["round"]), arrays["indices"], predictions, int(meta["view"])))
    unseen: dict[str, Floats] = {}
    if (folder / CLOSING).exists():
        meta, arrays = _read(folder / CLOSING)
        unseen = dict(zip(meta["clients"], arrays["predictions"], strict=True))
    weights: dict[str, dict[str, NDArray[Any]]] = {}
    for file in (folder / WEIGHTS).glob("*.npz"):
        meta, arrays = _read(file)
        weights[file.stem] = {name: arrays[str(i)] for i, name in enumerate(meta["layers"])}
    return Received(tuple(rounds), unseen, weights)


def _files(folder: Path) -> list[Path]:
    found = [file for file in folder.glob("*.npz") if file.stem.isdecimal()]
    return sorted(found, key=lambda file: int(file.stem))


def _read(file: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    try:
        return unpack(file)
    except ArchiveError as error:
        raise ResultsError(f"{file} is damaged ({error}): delete it") from error
