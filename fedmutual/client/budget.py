"""What a site has spent of its privacy: every noisy release of its images, kept with its state.

``<state-dir>/.privacy/<client>/`` has one file for each release: what was released, how much noise it
has, and the hashes of the images that it is of. A file is on the disk before its release is sent, so that a
crash never makes the ledger say less than what has left. What is asked for again, after a crash or in another
run, is sent again as it was: that spends nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from fedmutual.files.checkpoint import CheckpointError, read_generation, save_checkpoint
from fedmutual.files.disk import make_private
from fedmutual.learning.gaussian import epsilon_of
from fedmutual.told import Told

FOLDER = ".privacy"
Arrays = Mapping[str, NDArray[Any]]

logger = logging.getLogger(__name__)


class BudgetError(Told, RuntimeError):
    """The privacy budget of a site's images is used up, or its ledger cannot be read."""


@dataclass(frozen=True)
class Asked:
    """A release that a run asks for.

    Attributes
    ----------
    multiplier : float
        Standard deviation of the noise over the sensitivity.
    delta : float
    kind : str
        Of the images: hashes of two kinds cannot be compared, and count as of the same images.
    about : Mapping[str, Any]
        JSON values that tell this release from others of the same images.
    sample_rate : float
        Probability of an image to be in a step of it (DP-SGD).
    steps : int
        How many steps it has, each with this noise.
    """

    multiplier: float
    delta: float
    kind: str
    about: Mapping[str, Any]
    sample_rate: float = 1.0
    steps: int = 1

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {**vars(self), "about": dict(self.about)}


@dataclass(frozen=True)
class Spent:
    """What releases of the same images have spent together.

    Attributes
    ----------
    epsilon, delta : float
    releases : int
    """

    epsilon: float
    delta: float
    releases: int


class BudgetLedger:
    """The releases of one client.

    Parameters
    ----------
    state_dir : Path
    client : str
    """

    def __init__(self, state_dir: Path, client: str) -> None:
        self.path = state_dir / FOLDER / client

    def release(
        self,
        asked: Asked,
        records: NDArray[np.uint8],
        budget: float,
        draw: Callable[[], Arrays],
        once: str | None = None,
    ) -> Arrays:
        """Return a noisy release: the one that was made before for the same, or a new one.

        Parameters
        ----------
        asked : Asked
        records : uint8 [n, 16]
            Hashes of the images that it is of.
        budget : float
            The epsilon that all releases on any of these images may spend.
        draw : callable
            Makes the release; called at most once.
        once : str or None
            A key of ``asked.about``: of what has one value of it, only one release is made.

        Raises
        ------
        BudgetError
            The release would spend more than the budget, or the ledger is damaged. Nothing was drawn.
        """
        with self._locked():
            path = self.path / f"{_key(asked, records)}.safetensors"
            if path.exists():
                logger.info("this release was made before; it is sent as it was, which spends nothing")
                return _read(path)[1]
            if once is not None and self.find(**{once: asked.about[once]}) is not None:
                raise BudgetError(
                    f"{self.path}: another release was made for the same {once} in this run, and two would "
                    "tell more than each: start a new run",
                    f"privacy: this site has made another release for the same {once}: start a new run",
                )
            before = self._on(asked.kind, records)
            spent = _together([*before, asked.as_dict()])
            if spent.epsilon > budget:
                raise BudgetError(
                    f"{self.path}: a release would bring what these images have spent to epsilon "
                    f"{spent.epsilon:.3g} (delta {spent.delta:g}), of {budget:g}: ask for what was released "
                    "before, or let the site's owner raise privacy-budget in the node configuration",
                    "privacy.budget: this site has no budget left for this run; its own log says more",
                )
            arrays = dict(draw())
            save_checkpoint(path, asked.as_dict(), {**arrays, "records": records})
            logger.info(
                "a release of %d images spends epsilon %.3g of %.3g (delta %g)",
                len(records),
                spent.epsilon,
                budget,
                spent.delta,
            )
            return arrays

    def rounds(self, asked: Asked, records: NDArray[np.uint8], budget: float) -> NoisyRounds:
        """Charge a training of several rounds, once and before its first; return what it has left so far.

        Raises
        ------
        BudgetError
            See :meth:`release`.
        """
        key = _key(asked, records)
        if not (self.path / f"{key}.safetensors").exists():
            self.release(asked, records, budget, dict)
        return NoisyRounds(self.path / key)

    def spent(self) -> Spent:
        """Return what all releases have spent together, as if all were of the same images.

        Raises
        ------
        BudgetError
            The ledger is damaged.
        """
        return _together([meta for meta, _ in self._entries()])

    def find(self, **about: Any) -> Arrays | None:
        """Return a release that was made about this; None if there is none."""
        for meta, arrays in self._entries():
            if about.items() <= meta["about"].items():
                return arrays
        return None

    def _on(self, kind: str, records: NDArray[np.uint8]) -> list[dict[str, Any]]:
        """The entries on any of these images, or on images of another kind, whose hashes say nothing."""
        own = {row.tobytes() for row in records}
        return [
            meta
            for meta, arrays in self._entries()
            if meta["kind"] != kind or any(row.tobytes() in own for row in arrays["records"])
        ]

    def _entries(self) -> Iterator[tuple[dict[str, Any], Arrays]]:
        for path in sorted(self.path.glob("*.safetensors")):
            yield _read(path)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        make_private(self.path)
        with FileLock(self.path / ".lock", mode=0o600):
            yield


class NoisyRounds:
    """The weights that a training with noise has left, by round.

    Those of the last two rounds are kept: a server that goes on from an older state cannot have an earlier
    round trained once more.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def find(self, number: int) -> Arrays | None:
        """Return the weights of a round; None: it was not trained yet.

        Raises
        ------
        BudgetError
            It was, but its weights are gone.
        """
        file = self._file(number)
        if file.exists():
            logger.info("round %d was trained before; its weights are sent as they were", number)
            return _read(file)[1]
        if max(self._numbers(), default=0) > number:
            raise BudgetError(
                f"{self.path}: round {number} was trained before, and a second training is not accounted "
                "for: start a new run",
                "privacy: this site has trained this round before: start a new run",
            )
        return None

    def keep(self, number: int, weights: Arrays) -> None:
        """Write a round's weights to the disk, before they are sent."""
        make_private(self.path)
        save_checkpoint(self._file(number), {"round": number}, weights)
        for old in self._numbers():
            if old < number - 1:
                self._file(old).unlink()

    def _file(self, number: int) -> Path:
        return self.path / f"{number:06d}.safetensors"

    def _numbers(self) -> list[int]:
        return [int(file.stem) for file in self.path.glob("*.safetensors") if file.stem.isdigit()]


def _key(asked: Asked, records: NDArray[np.uint8]) -> str:
    state = hashlib.blake2b(digest_size=16)
    text = json.dumps(asked.as_dict(), sort_keys=True)
    state.update(text.encode() + b"\0" + np.ascontiguousarray(records).tobytes())
    return state.hexdigest()


def _together(entries: list[dict[str, Any]]) -> Spent:
    delta = min((entry["delta"] for entry in entries), default=0.0)
    spent = [(entry["multiplier"], entry["sample_rate"], entry["steps"]) for entry in entries]
    if any(rate < 1 or steps > 1 for _, rate, steps in spent):
        from fedmutual.learning import dpsgd

        return Spent(dpsgd.epsilon_of(spent, delta), delta, len(entries))
    return Spent(epsilon_of([entry["multiplier"] for entry in entries], delta), delta, len(entries))


def _read(path: Path) -> tuple[dict[str, Any], Arrays]:
    try:
        return read_generation(path)
    except CheckpointError as error:
        raise BudgetError(
            f"{error}: what these images have spent is not known any more: put the file back from a copy. "
            "To delete it is to forget what was spent",
            "privacy.budget: this site's ledger is damaged; its own log says more",
        ) from error
