"""``strategy=feddf`` in the image application: a student at the server (after arXiv:2006.07242)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fedmutual.engine.server_model import ServerModel
from fedmutual.methods.digest import DigestSettings
from fedmutual.settings import Settings, setting
from fedmutual.strategies.digest import taught_to_all
from fedmutual.strategies.feddf import FedDF
from fedmutual.wire.codec import FloatArray
from fedmutual.wire.records import IndexArray

if TYPE_CHECKING:
    from fedmutual.data.site import SharedData


@dataclass(kw_only=True)
class FedDFSettings(DigestSettings):
    """Settings of ``strategy=feddf``."""

    student_epochs: int = setting("passes of the server's student over the round's public samples", minimum=1)
    teacher: str = setting(
        "the clients' target: student: the student's predictions, as in CFD; consensus: the student's target",
        choices=("student", "consensus"),
    )

    def strategy(self, settings: Settings, shared: SharedData) -> FedDF:
        """Return the strategy of these settings."""
        student = ImageStudent(ServerModel(settings, shared), self.student_epochs)
        return FedDF(student=student, teacher=self.teacher, **self.options(settings, shared))


class ImageStudent:
    """The server's model as FedDF's student.

    Parameters
    ----------
    model : ServerModel
    epochs : int
        Number of passes over the round's public samples.
    """

    def __init__(self, model: ServerModel, epochs: int) -> None:
        self.model = model
        self.epochs = epochs

    def distil(self, round: int, indices: IndexArray, log_probabilities: FloatArray) -> FloatArray:
        """Train on the consensus, without labels; return log-probabilities [n, C] after training."""
        order = taught_to_all(self.model.order(round, indices), indices, log_probabilities)
        learner = self.model.learner(order)
        learner.separate_mutual_step(replace(learner.public(), labels=None), self.epochs)
        return learner.predictions()

    def figures(self, round: int) -> dict[str, Any]:
        """Return the student's metrics on the unseen set."""
        return self.model.measured(round)

    def weights(self) -> dict[str, np.ndarray[Any, Any]]:
        """Return the weights by name."""
        return self.model.weights()

    def load(self, weights: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Load weights."""
        self.model.load(weights)
