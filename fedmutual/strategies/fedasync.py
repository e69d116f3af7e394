"""FedAsync (arXiv:1903.03934): every model that arrives is mixed into the global one at once.

With ``buffer_size`` above 1, FedBuff (arXiv:2106.06639): so many deltas are gathered first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from fedmutual.learning.mixing import Staleness, add_delta, apply_deltas, mix
from fedmutual.strategies.arrivals import Arrays, ArrivalStrategy, Delivered, Figures
from fedmutual.wire.orders import Order
from fedmutual.wire.reports import Report
from fedmutual.wire.weights import read_weights, weights_record


class FedAsync(ArrivalStrategy):
    """Keep the global model and those of its versions that clients still train.

    Parameters
    ----------
    weights : Mapping[str, array]
        Version 0: the start of all clients.
    alpha : float
        Weight of a fresh model that arrives; with ``buffer_size`` > 1 the server's step size.
    staleness : Staleness
        Weight of a stale model.
    buffer_size : int
        1: FedAsync; more: FedBuff, with so many deltas a version.
    """

    def __init__(
        self,
        weights: Mapping[str, np.ndarray[Any, Any]],
        *,
        alpha: float = 0.6,
        staleness: Staleness | None = None,
        buffer_size: int = 1,
    ) -> None:
        self.alpha = alpha
        self.staleness = staleness or Staleness("polynomial", a=0.5, b=0)
        self.buffer_size = buffer_size
        self.version = 0
        self._models: dict[int, Arrays] = {0: dict(weights)}  # by version
        self._downloaded: dict[str, int] = {}  # the version of each client's present order
        self._buffer: Arrays | None = None
        self._buffered = 0

    def prepare(self, client: str, update: int, delivered: Delivered) -> None:
        """The next order brings the newest version."""
        self._downloaded[client] = self.version
        self._forget()

    def order(self, client: str, base: Order) -> Order:
        """The version that the client was given, also in a resend."""
        return replace(base, model=weights_record(self._models[self._downloaded[client]]))

    def closing_order(self, client: str, base: Order, delivered: Delivered) -> Order:
        """The final model."""
        return replace(base, model=weights_record(self._models[self.version]), evaluate_unseen=False)

    def take(self, client: str, report: Report, delivered: Delivered) -> Figures:
        """Mix in what has arrived; staleness counts from the version that the client was given."""
        trained = read_weights(report, self._models[self.version])
        downloaded = self._downloaded[client]
        age = self.version - downloaded
        if self.buffer_size == 1:
            weight = self.alpha * self.staleness(age)
            self._advance(mix(self._models[self.version], trained, weight))
        else:
            weight = self.staleness(age)
            self._buffer = add_delta(self._buffer, trained, self._models[downloaded], weight)
            self._buffered += 1
            if self._buffered == self.buffer_size:
                self._advance(
                    apply_deltas(self._models[self.version], self._buffer, self.alpha, self._buffered)
                )
                self._buffer, self._buffered = None, 0
        return {"version": self.version, "downloaded": downloaded, "staleness": age, "alpha": weight}

    def global_weights(self) -> Arrays:
        """The newest version."""
        return self._models[self.version]

    def state(self) -> tuple[dict[str, Any], Arrays]:
        """The models, which version each client trains, and the buffer."""
        arrays = {
            f"model.{v}.{key}": array for v, model in self._models.items() for key, array in model.items()
        }
        arrays |= {f"buffer.{key}": array for key, array in (self._buffer or {}).items()}
        meta = {"version": self.version, "downloaded": self._downloaded, "buffered": self._buffered}
        return meta, arrays

    def restore_state(self, meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Continue from what :meth:`state` returned."""
        self.version, self._buffered = meta["version"], meta["buffered"]
        self._downloaded = dict(meta["downloaded"])
        self._models, buffer = {}, Arrays()
        for name, array in arrays.items():
            kind, _, rest = name.partition(".")
            if kind == "buffer":
                buffer[rest] = array
                continue
            version, _, key = rest.partition(".")
            self._models.setdefault(int(version), {})[key] = array
        self._buffer = buffer or None

    def _advance(self, model: Arrays) -> None:
        self.version += 1
        self._models[self.version] = model

    def _forget(self) -> None:
        """Drop the versions that nobody trains."""
        used = {self.version, *self._downloaded.values()}
        self._models = {version: model for version, model in self._models.items() if version in used}
