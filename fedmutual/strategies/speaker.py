"""A speaker made of noisy sums, and listeners: differential privacy for every record of every site.

A site sends once what :mod:`fedmutual.learning.speaker` adds up over its images, with noise; with secure
aggregation under masks, each site then with its share of the noise. The server solves a ridge regression: the
speaker.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from fedmutual.learning.gaussian import scale_of
from fedmutual.learning.speaker import GRID, FeatureMap, Matrix, divided, entries, sensitivity, solve
from fedmutual.strategies.base import Arrays, below
from fedmutual.strategies.listeners import AXES, CENTRE, Listeners
from fedmutual.wire.metrics import EXAMPLES
from fedmutual.wire.reports import Report

SUMS = "sums"


class Speaker(Listeners):
    """Add up noisy sums, solve, and let the clients listen.

    Parameters
    ----------
    num_classes : int
        C.
    feature_map : FeatureMap
    public : float [N, F]
        The public samples' features.
    colluding : int or None
        The sums come added up, as one report, and their noise has that many shares more than are needed.
        None: each client's sums come alone, with all the noise.
    ridge : float
        See :func:`fedmutual.learning.speaker.solve`.
    **listeners
        See :class:`fedmutual.strategies.listeners.Listeners`.
    """

    def __init__(
        self,
        num_classes: int,
        feature_map: FeatureMap,
        public: Matrix,
        *,
        colluding: int | None = None,
        ridge: float = 0.01,
        **listeners: Any,
    ) -> None:
        super().__init__(num_classes, feature_map, public, **listeners)
        if not ridge >= 0:
            raise ValueError("ridge: at least 0")
        self.ridge = ridge
        self.colluding = colluding
        self._sums: dict[str, np.ndarray[Any, Any]] = {}
        self._added = 0  # clients whose sums these are

    @property
    def numbers(self) -> int:
        """How many numbers a client's sums have."""
        return entries(self.map.size, self.num_classes, gram=not self.multiplier)

    def waits_for(self, client: str | None) -> bool:
        """Whether the client's sums are missing; added up, those of all are one."""
        return client not in self._sums and (self.colluding is None or not self._sums)

    def like(self) -> dict[str, np.ndarray[Any, Any]]:
        """Return the sums' shape."""
        return {SUMS: np.zeros(self.numbers, np.int64)}

    def add(self, releases: Mapping[str, Arrays], reports: Mapping[str, Report]) -> None:
        """Add what is new to the sums, and solve."""
        self._sums |= {name: arrays[SUMS] for name, arrays in releases.items()}
        counts = [int(cast(int, report.metrics[EXAMPLES])) for report in reports.values()]
        self._added = len(self._sums) if self.colluding is None else counts[0]
        self._solve()

    def state(self) -> tuple[dict[str, Any], Arrays]:
        """The sums by client, and the map that they are of."""
        arrays = {f"{SUMS}.{name}": said for name, said in self._sums.items()}
        return {"added": self._added}, {**arrays, **self.map.arrays()}

    def restore_state(self, meta: Mapping[str, Any], arrays: Arrays) -> None:
        """Continue from what :meth:`state` returned."""
        self._sums, self._added = below(f"{SUMS}.", arrays), meta["added"]
        self._use(FeatureMap(arrays[CENTRE], arrays[AXES]))  # another machine's has other last bits
        if self._sums:
            self._solve()

    def describe(self) -> str:
        """The strategy and its settings in one line."""
        noise = f"noise {self.multiplier:.3g} times the sensitivity" if self.multiplier else "NO NOISE"
        noise += "" if self.colluding is None else ", sums added up under masks"
        return f"Speaker: {len(self.map.axes)} axes, ridge {self.ridge:g}, {noise}"

    def _solve(self) -> None:
        total = np.stack(list(self._sums.values())).sum(axis=0)
        shares = 1 if self.colluding is None else max(self._added - self.colluding, 1)
        each = scale_of(self.multiplier, sensitivity(self.map.size, self.num_classes), shares) / GRID
        public = self._public.T @ self._public / len(self._public)
        found = divided(total, self.map.size, self.num_classes)
        self.weights = solve(found, public, each * math.sqrt(self._added), self.ridge)
