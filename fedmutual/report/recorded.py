"""A run as its folder tells it, whatever state it was left in."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedmutual.files.checkpoint import has_checkpoint
from fedmutual.learning.agreement import agreement
from fedmutual.report import evidence as kept
from fedmutual.report.evidence import Evidence, gather, public_predictions
from fedmutual.results.directory import (
    CHECKPOINT,
    CONFIG,
    SUMMARY,
    Record,
    ResultsError,
    RunDirectory,
    read_audit,
    read_summary,
    saved_overrides,
)
from fedmutual.results.summary import build_summary

logger = logging.getLogger(__name__)

_DIGEST = re.compile(r"[0-9a-f]{16}")  # of a run's settings, see fedmutual/compare/plan.py


@dataclass(frozen=True, eq=False)
class RecordedRun:
    """Everything that a report shows of one run.

    Attributes
    ----------
    name : str
        The folder's name, or its parent's where ``fedmutual compare`` named the folder by a digest; both
        where two runs share it.
    summary : dict
        ``summary.json``, or what the history allows to say where there is none.
    history : list of dict
        Lines of ``history.jsonl``.
    overrides : list of str
        What the run was started with.
    evidence : Evidence or None
        None where the run has left none.
    audit : dict or None
        ``audit.json``; None where the run was not audited.
    """

    name: str
    summary: Mapping[str, Any]
    history: list[Record]
    overrides: list[str]
    evidence: Evidence | None
    audit: Mapping[str, Any] | None = None


def read_run(path: Path, summary: Mapping[str, Any] | None = None) -> RecordedRun:
    """Read a run's folder.

    Parameters
    ----------
    summary : Mapping or None
        The summary of a run that is about to write it; None: that of the folder.

    Raises
    ------
    ResultsError
        The folder is none of a run, or a file in it is damaged.
    """
    path = path.absolute()
    if not (path / CONFIG).is_file():
        raise ResultsError(f"{path} holds no {CONFIG}: give the results folder of a run")
    history = RunDirectory(path).history()
    return RecordedRun(
        name=path.parent.name if _DIGEST.fullmatch(path.name) else path.name,
        summary=summary or _summary(path, history),
        history=history,
        overrides=saved_overrides(path),
        evidence=kept.load(path),
        audit=read_audit(path),
    )


def read_runs(paths: Sequence[Path]) -> list[RecordedRun]:
    """Read several folders, each once; runs of one name are told apart by the folder above.

    Where a run was killed before it left evidence, what its checkpoint holds of it takes its place.

    Raises
    ------
    ResultsError
        As :func:`read_run`.
    """
    folders = list(dict.fromkeys(path.resolve() for path in paths))
    runs = [read_run(folder) for folder in folders]
    names = [run.name for run in runs]
    return [
        replace(
            run,
            name=run.name if names.count(run.name) == 1 else f"{folder.parent.name}/{folder.name}",
            evidence=run.evidence or _recovered(folder),
        )
        for run, folder in zip(runs, folders, strict=True)
    ]


def _summary(path: Path, history: list[Record]) -> dict[str, Any]:
    summary = read_summary(path)
    if summary is not None:
        return summary
    reason = f"there is no {SUMMARY}: the run is still going on, or was killed"
    return build_summary(
        settings=RunDirectory(path).config(), status="stopped", reason=reason, history=history
    )


def _recovered(path: Path) -> Evidence | None:
    """Evidence from the last checkpoint of a killed run; None without public predictions.

    The samples in dispute are shown where the run's public set can be read here; else
    :attr:`Evidence.note` says why not.
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
        here = len(shared.public) + shared.public.views
        if len(positions) and int(np.max(positions)) >= here:
            raise ValueError(f"it has {here} images here, and fewer than in the run")
        return gather(shared, {}, arrays)
    except Exception as error:  # whatever a data source raises where its images are not
        logger.debug("the public set of %s", path, exc_info=True)
        clients, predictions = tuple(known), list(known.values())
        note = f"The run's public set cannot be read here: {error}."
        shares = agreement(predictions)
        return Evidence((), clients=clients, agreement=shares, num_public=len(predictions[0]), note=note)
