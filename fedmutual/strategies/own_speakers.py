"""A noisy speaker of each site, whose predictions make a consensus, and listeners.

A site sends once what :mod:`fedmutual.learning.own_speaker` fits to its images with noise says of all public
samples, and the noisy counts of the classes that it says something of. The server forms the consensus, and
the weights that say the same: the speaker.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from fedmutual.learning.consensus import log_softmax
from fedmutual.learning.own_speaker import STEPS, student, together
from fedmutual.learning.speaker import FeatureMap
from fedmutual.strategies.base import Arrays, below
from fedmutual.strategies.listeners import AXES, CENTRE, Listeners
from fedmutual.wire.reports import Report

SAID, COUNTS = "said", "counts"


class OwnSpeakers(Listeners):
    """Form the consensus of the clients' own speakers, and let the clients listen.

    The parameters are those of :class:`fedmutual.strategies.listeners.Listeners`.
    """

    def __init__(self, *args: Any, **listeners: Any) -> None:
        super().__init__(*args, **listeners)
        self._said: dict[str, np.ndarray[Any, Any]] = {}
        self._counts: dict[str, np.ndarray[Any, Any]] = {}

    def waits_for(self, client: str | None) -> bool:
        """Whether the client's predictions are missing."""
        return client not in self._said

    def like(self) -> dict[str, np.ndarray[Any, Any]]:
        """Return the shapes of the predictions and of the counts."""
        samples, classes = len(self._public), self.num_classes
        return {SAID: np.zeros((samples, classes), np.float32), COUNTS: np.zeros(classes, np.float32)}

    def add(self, releases: Mapping[str, Arrays], reports: Mapping[str, Report]) -> None:
        """Add what is new, and form the consensus of all."""
        for name, arrays in releases.items():
            floor = np.float32(math.log(self.floor))
            self._said[name] = np.maximum(log_softmax(arrays[SAID]), floor)
            self._counts[name] = arrays[COUNTS]
        self._agree()

    def state(self) -> tuple[dict[str, Any], Arrays]:
        """What the clients said, and the map that it is of."""
        said = {f"{SAID}.{name}": values for name, values in self._said.items()}
        counts = {f"{COUNTS}.{name}": values for name, values in self._counts.items()}
        return {}, {**said, **counts, **self.map.arrays()}

    def restore_state(self, meta: Mapping[str, Any], arrays: Arrays) -> None:
        """Continue from what :meth:`state` returned."""
        self._said, self._counts = below(f"{SAID}.", arrays), below(f"{COUNTS}.", arrays)
        self._use(FeatureMap(arrays[CENTRE], arrays[AXES]))  # another machine's has other last bits
        self._agree()

    def describe(self) -> str:
        """The strategy and its settings in one line."""
        noise = f"noise {self.multiplier:.3g} times the sensitivity" if self.multiplier else "NO NOISE"
        return f"OwnSpeakers: {len(self.map.axes)} axes, {STEPS} steps at each site, {noise}"

    def _agree(self) -> None:
        scores = together(self._said, self._counts)
        self.weights = None if scores is None else student(self._public, scores)
