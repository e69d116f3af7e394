"""A noisy speaker of each site, whose scores make a consensus, and listeners.

A site sends once how its own noisy speaker (:mod:`fedmutual.learning.own_speaker`) scores all public samples,
and the noisy counts of the classes that it says something of. The server forms the consensus, and the weights
that say the same: the speaker.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fedmutual.learning.own_speaker import student, together
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
        """Whether the client's scores are missing."""
        return client not in self._said

    def like(self) -> dict[str, np.ndarray[Any, Any]]:
        """Return the shapes of the scores and of the counts."""
        samples, classes = len(self._public), self.num_classes
        return {SAID: np.zeros((samples, classes), np.float32), COUNTS: np.zeros(classes, np.float32)}

    def add(self, releases: Mapping[str, Arrays], reports: Mapping[str, Report]) -> None:
        """Add what is new, and form the consensus of all."""
        for name, arrays in releases.items():
            self._said[name], self._counts[name] = arrays[SAID], arrays[COUNTS]
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
        if self._said:
            self._agree()

    def describe(self) -> str:
        """The strategy and its settings in one line."""
        noise = f"noise {self.multiplier:.3g} times the sensitivity" if self.multiplier else "NO NOISE"
        return f"OwnSpeakers: {len(self.map.axes)} axes, {noise}"

    def _agree(self) -> None:
        scores = together(self._said, self._counts)
        self.weights = None if scores is None else student(self._public, scores)
