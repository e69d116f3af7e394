"""Shadow runs for LiRA: the recorded run again, each client with a random half of its private images."""

from __future__ import annotations

import logging
import shlex
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from flwr.app import Context, RecordDict
from numpy.typing import NDArray

from fedmutual.audit.attacks import compared
from fedmutual.audit.copies import models_of, odds_on
from fedmutual.audit.membership import likelihood_ratios
from fedmutual.audit.truth import AuditError, RecordedTruth
from fedmutual.client.answer import SHADOW, forget_images
from fedmutual.data.site import half
from fedmutual.results.received import read_received
from fedmutual.simulation.inprocess import QUICK, InProcessGrid, load_client_app

logger = logging.getLogger(__name__)

Scores = NDArray[np.float64]


def lira(truth: RecordedTruth, scores: dict[str, Scores], count: int) -> dict[str, Scores]:
    """Return LiRA's score of each site's private images, from ``count`` shadow runs.

    Parameters
    ----------
    scores : dict[str, float array [n]]
        Of the recorded run: log-odds less the others' (:func:`fedmutual.audit.attacks.compared`).

    Raises
    ------
    AuditError
        A shadow run failed.
    """
    shadows = []
    for number in range(1, count + 1):
        logger.info("shadow run %d of %d", number, count)
        shadows.append(_shadow(truth, number))
    result = {}
    for client, own in scores.items():
        inside = np.zeros((count, len(own)), np.bool_)
        for row, number in zip(inside, range(1, count + 1), strict=True):
            row[half(truth.sites[client], number).train_parts[0]] = True
        result[client] = likelihood_ratios(own, np.stack([shadow[client] for shadow in shadows]), inside)
    return result


def _shadow(truth: RecordedTruth, number: int) -> dict[str, Scores]:
    """Do a shadow run, and attack it as the run itself."""
    from fedmutual.engine.server import run

    with tempfile.TemporaryDirectory(prefix="fedmutual-shadow-") as folder:
        path = Path(folder) / "run"
        own = [f"output_dir={path}", f"state_dir={folder}/state", "tracking.loggers=[]", QUICK]
        dropped = ("output_dir", "state_dir", "resume", "tracking.loggers", "num_clients")
        kept = [o for o in truth.overrides if o.partition("=")[0] not in dropped]
        config = {"overrides": shlex.join([*kept, f"num_clients={len(truth.sites)}", *own])}

        def node(i: int) -> dict[str, int]:
            return {"partition-id": i, "num-partitions": len(truth.sites), SHADOW: number}

        forget_images()
        grid = InProcessGrid(load_client_app(), len(truth.sites), config, node)
        context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=dict(config))
        try:
            run(grid, context)
        except Exception as error:
            raise AuditError(f"shadow run {number} failed: {error}") from error
        finally:
            forget_images()
        received = read_received(path)
    assert received is not None
    models, _ = models_of(replace(truth, received=received))
    return compared(odds_on(truth, models))
