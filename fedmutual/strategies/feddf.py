"""Server distillation after FedDF (arXiv:2006.07242): a global student, although no weight leaves a client.

FedDF's clients send weights; the server distils their ensemble, the mean of the logits, into one model on
unlabelled data, and sends that back. Here clients send predictions, as in CFD (arXiv:2012.00632): the server
distils their consensus into its student, and what returns to the clients is the student's predictions,
which they distil in turn.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from fedmutual.learning.aggregation import mean_of_scores
from fedmutual.strategies.base import Arrays, Figures, below, one_of
from fedmutual.strategies.digest import Digest
from fedmutual.wire.codec import FloatArray
from fedmutual.wire.records import IndexArray
from fedmutual.wire.reports import Report

logger = logging.getLogger(__name__)


class Student(Protocol):
    """The server's model. It holds the public samples."""

    def distil(self, round: int, indices: IndexArray, log_probabilities: FloatArray) -> FloatArray:
        """Learn the consensus [n, C] of the public samples ``indices``.

        Returns
        -------
        float array [n, C]
            What the student predicts for them afterwards, as log-probabilities.
        """

    def figures(self, round: int) -> Figures:
        """Measurements of a round, for its history; may be empty."""

    def weights(self) -> Arrays:
        """Its weights, by name."""

    def load(self, weights: Arrays) -> None:
        """Take over weights."""


class FedDF(Digest):
    """Distil the consensus into the student, and return what it then predicts.

    Parameters
    ----------
    num_samples, num_classes : int
    student : Student or None
        The server's model. None: there is none, and clients digest the consensus itself.
    teacher : str
        What clients digest. ``student``: its predictions, as in CFD; ``consensus``: what it learnt from.
    **options
        See :class:`fedmutual.strategies.digest.Digest`.
    """

    def __init__(
        self,
        num_samples: int,
        num_classes: int,
        *,
        student: Student | None = None,
        teacher: str = "student",
        **options: Any,
    ) -> None:
        super().__init__(num_samples, num_classes, **options)
        one_of("teacher", teacher, ("student", "consensus"))
        if student is None:
            logger.warning("FedDF has no student: clients digest the consensus itself")
        self.student = student
        self.teacher = teacher

    def consensus(self, predictions: FloatArray) -> FloatArray:
        """Mean scores: FedDF's AVGLOGITS."""
        return mean_of_scores(predictions)

    def take(self, round: int, reports: Mapping[str, Report]) -> Figures:
        """Form the consensus, and teach it to the student."""
        super().take(round, reports)
        assert self._consensus is not None
        if self.student is None:
            return {}
        said = self.student.distil(round, self._predicted, self._consensus)
        if self.teacher == "student":
            self._consensus = np.asarray(said, np.float32)
        return self.student.figures(round)

    def global_weights(self) -> Arrays | None:
        """The student's weights."""
        return None if self.student is None else self.student.weights()

    def state(self) -> tuple[dict[str, Any], Arrays]:
        """What clients are taught next, and the student."""
        meta, arrays = super().state()
        student = {} if self.student is None else self.student.weights()
        return meta, {**arrays, **{f"student.{name}": w for name, w in student.items()}}

    def restore_state(self, meta: Mapping[str, Any], arrays: Arrays) -> None:
        """Continue from what :meth:`state` returned."""
        super().restore_state(meta, arrays)
        if self.student is not None:
            self.student.load(below("student.", arrays))
