"""What the server leaves at the end of a run for its report; nothing here can make a run fail."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmutual.results.directory import CHECKPOINT, RunDirectory

if TYPE_CHECKING:
    from fedmutual.data.site import SharedData
    from fedmutual.learning.consensus import FloatArray

logger = logging.getLogger(__name__)


def keep_evidence(
    journal: RunDirectory, shared: SharedData, unseen_predictions: Mapping[str, FloatArray], mistakes: int
) -> None:
    """Write ``evidence.npz`` (:func:`fedmutual.report.evidence.gather`); an error is logged only."""
    try:
        from fedmutual.files.checkpoint import has_checkpoint
        from fedmutual.report import evidence

        arrays = journal.load_checkpoint()[1] if has_checkpoint(journal.path / CHECKPOINT) else {}
        evidence.save(evidence.gather(shared, unseen_predictions, arrays, mistakes), journal.path)
    except Exception as error:
        logger.debug("the evidence", exc_info=True)
        logger.warning("evidence.npz is not written, the report lacks confusion and agreement: %s", error)


def leave_report(path: Path, summary: Mapping[str, Any] | None = None) -> None:
    """Write ``report.html`` into a run's folder; an error is logged only.

    Parameters
    ----------
    summary : Mapping[str, Any] or None
        The run's summary, which could not be written, say; None: the one that is there.
    """
    try:
        from fedmutual.report.page import REPORT, write_report
        from fedmutual.report.recorded import read_run

        write_report([read_run(path, summary)], path / REPORT)
    except Exception as error:
        logger.debug("the report", exc_info=True)
        logger.warning("report.html is not written: %s; try `fedmutual report %s`", error, path)
