"""Evidence of a run that was killed before it left any: its last checkpoint and the local public set."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from fedmutual.files.checkpoint import has_checkpoint
from fedmutual.learning.agreement import agreement
from fedmutual.report.evidence import Evidence, gather, public_predictions
from fedmutual.results.directory import CHECKPOINT, RunDirectory, saved_overrides

logger = logging.getLogger(__name__)


def recover(path: Path) -> Evidence | None:
    """Compare the public predictions in a run's checkpoint; None where there are none.

    The samples in dispute are shown where the run's public set can be read here; else
    :attr:`Evidence.note` says why not.

    Raises
    ------
    ResultsError
        The checkpoint is damaged.
    """
    if not has_checkpoint(path / CHECKPOINT):
        return None
    arrays = RunDirectory(path).load_checkpoint()[1]
    known = public_predictions(arrays)
    if len(known) < 2:
        return None
    try:
        from fedmutual.data.site import load_shared
        from fedmutual.settings.compose import compose

        settings = compose(saved_overrides(path))
        shared = load_shared(settings, settings.num_clients or len(known))
        positions = arrays["predicted"]
        if len(positions) and int(np.max(positions)) >= len(shared.public):
            raise ValueError(f"it has {len(shared.public)} images here, and fewer than in the run")
        return gather(shared, {}, arrays)
    except Exception as error:  # whatever a data source raises where its images are not
        logger.debug("the public set of %s", path, exc_info=True)
        clients, predictions = tuple(known), list(known.values())
        note = f"The run's public set cannot be read here: {error}."
        shares = agreement(predictions)
        return Evidence((), clients=clients, agreement=shares, num_public=len(predictions[0]), note=note)
