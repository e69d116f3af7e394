"""The reports of a run, kept as the server got them (``privacy.record``)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedmutual.results.directory import RunDirectory
from fedmutual.results.received import Recorder
from fedmutual.settings import Settings
from fedmutual.wire.records import IndexArray
from fedmutual.wire.reports import Report


def recorder_of(settings: Settings, journal: RunDirectory | None) -> Recorder | None:
    """Return what keeps a run's reports; None: they are not kept."""
    return Recorder(journal.path) if settings.privacy.record and journal is not None else None


def record_reports(
    recorder: Recorder, round: int, indices: IndexArray, reports: Mapping[str, Report], view: int = 0
) -> None:
    """Keep the predictions of a round or an arrival, and the weights, which the strategy has checked.

    Raises
    ------
    WriteError
        The folder cannot be written or the disk is full.
    """
    whole = {name: r.predictions for name, r in reports.items() if len(r.predictions) == len(indices)}
    recorder.add(round, np.asarray(indices, np.int32), whole, view)
    for name, report in reports.items():
        if report.model is not None:
            recorder.add_weights(name, {layer: array.numpy() for layer, array in report.model.items()})
