"""Server distillation after FedDF (arXiv:2006.07242): a global student, although no weight leaves a client.

FedDF's clients send weights; the server distils their ensemble, the mean of the logits, into one model on
unlabelled data, and sends that back. Here clients send predictions, as in CFD (arXiv:2012.00632): the server
distils their consensus into its student, and what returns to the clients is the student's predictions,
which they distil in turn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from fedmutual.data.site import SharedData
from fedmutual.engine.history import Line
from fedmutual.engine.rounds import Arrays, below
from fedmutual.engine.server_model import ServerModel, server_order
from fedmutual.learning.aggregation import mean_of_scores
from fedmutual.results.directory import RunDirectory
from fedmutual.settings import Settings, setting
from fedmutual.strategies.digest import Digest, DigestSettings, taught_to_all
from fedmutual.wire.codec import FloatArray
from fedmutual.wire.messages import Report


@dataclass(kw_only=True)
class FedDFSettings(DigestSettings):
    """Settings of ``strategy=feddf``."""

    student_epochs: int = setting("passes of the student over the round's public samples", minimum=1)
    teacher: str = setting(
        "what clients digest: student: its predictions, as in CFD; consensus: what it learnt from itself",
        choices=("student", "consensus"),
    )

    revisits_last: ClassVar[bool] = False

    def consensus(self, predictions: FloatArray) -> FloatArray:
        """Mean scores: FedDF's AVGLOGITS."""
        return mean_of_scores(predictions)

    def build(self, settings: Settings, shared: SharedData, run: str, journal: RunDirectory | None) -> FedDF:
        """Make the strategy of a run."""
        return FedDF(settings, shared, run, journal)


class FedDF(Digest):
    """Gather predictions, distil their consensus into the student, return what it then predicts."""

    options: FedDFSettings

    def __init__(
        self, settings: Settings, shared: SharedData, run: str, journal: RunDirectory | None = None
    ) -> None:
        super().__init__(settings, shared, run, journal)
        self.student = ServerModel(settings, shared)

    def take(self, round: int, reports: Mapping[str, Report]) -> Line:
        """Form the consensus, and teach it to the student: nothing else, no label either."""
        super().take(round, reports)
        order = server_order(self, round)
        learner = self.student.learner(taught_to_all(order, self._predicted, self._consensus))
        public = replace(learner.public("peer_own", 1.0), labels=None)
        learner.separate_mutual_step(public, self.options.student_epochs)
        if self.options.teacher == "student":
            self._consensus = learner.predictions()
        return self.student.measured(order) if self.evaluates_unseen(round) else {}

    def global_weights(self) -> Arrays:
        """The student."""
        return self.student.weights()

    def state(self) -> tuple[dict[str, Any], Arrays]:
        """What clients are taught next, and the student."""
        meta, arrays = super().state()
        return meta, {**arrays, **{f"student.{name}": w for name, w in self.student.weights().items()}}

    def restore_state(self, meta: Mapping[str, Any], arrays: Arrays) -> None:
        """Take up what :meth:`state` gave."""
        super().restore_state(meta, arrays)
        self.student.load(below("student.", arrays))
