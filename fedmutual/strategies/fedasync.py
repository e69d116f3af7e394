"""FedAsync (arXiv:1903.03934): every model that arrives is mixed into the global one at once.

With ``buffer_size`` above 1, FedBuff (arXiv:2106.06639): so many deltas are gathered first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import ArrayRecord, RecordDict

from fedmutual.data.site import SharedData
from fedmutual.engine.arriving import FLOOR, Arrays, Arriving, ArrivingSettings
from fedmutual.engine.history import Line
from fedmutual.engine.participants import Participant
from fedmutual.learning.mixing import STALENESS, Staleness, add_delta, apply_deltas, mix
from fedmutual.results.directory import RunDirectory
from fedmutual.settings import Settings, setting
from fedmutual.wire.messages import Order, Report, report_record
from fedmutual.wire.weights import initial_weights, one_architecture, read_weights, weights_record

if TYPE_CHECKING:
    from torch import Tensor

    from fedmutual.client.learner import Answer, Learner


@dataclass(kw_only=True)
class FedAsyncSettings(ArrivingSettings):
    """Settings of ``strategy=fedasync`` and ``strategy=fedbuff``."""

    alpha: float = setting(
        "weight of a fresh model that arrives; buffer_size > 1: the server's step size", above=0, maximum=1
    )
    staleness: str = setting("how much a stale model counts, s(t - tau)", choices=STALENESS)
    staleness_a: float = setting("a of polynomial and hinge", above=0)
    staleness_b: float = setting("b of hinge: up to this staleness a model counts fully", minimum=0)
    proximal: float = setting("rho, the pull of a client's weights towards those it was sent", minimum=0)
    buffer_size: int = setting("1: FedAsync; more: FedBuff, with so many deltas a version", minimum=1)

    def misfit(self, settings: Settings) -> str | None:
        """Weights can only be mixed between equal models."""
        return one_architecture(settings)

    def build(
        self, settings: Settings, shared: SharedData, run: str, journal: RunDirectory | None
    ) -> FedAsync:
        """Make the strategy of a run."""
        return FedAsync(settings, shared, run, journal)

    def learn(self, learner: Learner) -> Answer:
        """Measure the global model as it came, then train it on the private images."""
        from fedmutual.client.learner import Answer
        from fedmutual.learning.proximal import proximal

        if learner.order.closing:
            return learner.close()
        learner.validate()
        if learner.order.evaluate_unseen:
            learner.evaluate_unseen(learner.settings.evaluation.unseen_limit)
        with proximal(learner.optimizer, self.proximal):
            learner.local_training()
        return Answer(np.zeros((0, len(learner.order.classes)), np.float32))

    def pack(self, report: Report, weights: Mapping[str, Tensor]) -> RecordDict:
        """The weights, where they were trained: at the end they are the server's own."""
        if "train-loss" in report.metrics:
            report = replace(report, model=ArrayRecord({name: w.cpu() for name, w in weights.items()}))
        return report_record(report, "float16", FLOOR)


class FedAsync(Arriving):
    """Keep the global model and those of its versions that clients still work on."""

    def __init__(
        self, settings: Settings, shared: SharedData, run: str, journal: RunDirectory | None = None
    ) -> None:
        super().__init__(settings, shared, run, journal)
        options: FedAsyncSettings = settings.strategy
        self.options = options
        self.version = 0
        self._staleness = Staleness(options.staleness, options.staleness_a, options.staleness_b)
        self._models: dict[int, Arrays] = {}  # by version
        self._downloaded: dict[str, int] = {}  # the version of each client's present order
        self._buffer: Arrays | None = None
        self._buffered = 0

    def begin(self) -> None:
        """Version 0 is the common start."""
        self._models = {0: initial_weights(self.settings, self.shared)}

    def prepare(self, client: Participant) -> None:
        """The next order brings the newest version."""
        self._downloaded[client.name] = self.version
        self._forget()

    def order(self, client: Participant) -> Order:
        """The version that the client was given, also when it is asked again."""
        model = weights_record(self._models[self._downloaded[client.name]])
        return replace(self._base(client), model=model)

    def closing_order(self, client: Participant) -> Order:
        """The final model."""
        model = weights_record(self._models[self.version])
        return replace(self._base(client), model=model, evaluate_unseen=False)

    def take(self, client: Participant, report: Report) -> Line:
        """Mix what has arrived; staleness counts from the version that the client was given."""
        trained = read_weights(report, self._models[self.version])
        downloaded = self._downloaded[client.name]
        age = self.version - downloaded
        if self.options.buffer_size == 1:
            weight = self.options.alpha * self._staleness(age)
            self._advance(mix(self._models[self.version], trained, weight))
        else:
            weight = self._staleness(age)
            self._buffer = add_delta(self._buffer, trained, self._models[downloaded], weight)
            self._buffered += 1
            if self._buffered == self.options.buffer_size:
                rate, count = self.options.alpha, self._buffered
                self._advance(apply_deltas(self._models[self.version], self._buffer, rate, count))
                self._buffer, self._buffered = None, 0
        return {"version": self.version, "downloaded": downloaded, "staleness": age, "alpha": weight}

    def global_weights(self) -> Arrays:
        """The newest version."""
        return self._models[self.version]

    def state(self) -> tuple[dict[str, Any], Arrays]:
        """The models, which version each client works on, and the buffer."""
        arrays = {
            f"model.{v}.{key}": array for v, model in self._models.items() for key, array in model.items()
        }
        arrays |= {f"buffer.{key}": array for key, array in (self._buffer or {}).items()}
        meta = {"version": self.version, "downloaded": self._downloaded, "buffered": self._buffered}
        return meta, arrays

    def restore_state(self, meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Take up what :meth:`state` gave."""
        self.version, self._buffered = meta["version"], meta["buffered"]
        self._downloaded = dict(meta["downloaded"])
        buffer: Arrays = {}
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
        """Drop the versions that nobody works on."""
        used = {self.version, *self._downloaded.values()}
        self._models = {version: model for version, model in self._models.items() if version in used}
