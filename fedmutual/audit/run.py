"""All attacks on a recorded run, and ``audit.json``."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from fedmutual.audit import attacks
from fedmutual.audit.attacks import Finding, attempt
from fedmutual.audit.leak import FPR
from fedmutual.audit.truth import RecordedTruth, read_truth
from fedmutual.files.atomic import atomic_write
from fedmutual.results.directory import AUDIT, json_safe
from fedmutual.settings import PrivacySettings

PUBLIC = "an image of a client is public"
CHANGED = "a changed copy of a client's image is public"
PRIVATE = "an image was trained on"
MIX = "a client's class shares"
SIZE = "a client's number of images"
COUNTS = "a client's validation images, by class"

_SOURCES = {"weights": "from the clients' weights", "copy": "from copies of the clients' models"}

logger = logging.getLogger(__name__)


def audit_run(path: Path, overrides: Sequence[str] = (), shadows: int = 0) -> dict[str, Any]:
    """Attack a recorded run; write ``audit.json`` into its folder, and return it.

    Parameters
    ----------
    overrides : sequence of str
        What has changed since, such as ``data.root``.
    shadows : int
        Shadow runs for LiRA; each takes as long as the run. 0: without it.

    Raises
    ------
    AuditError, ResultsError, SettingsError, DataError, WriteError
        The message names the file or setting, and the remedy.
    """
    truth = read_truth(path, overrides)
    found = {
        "strategy": truth.settings.strategy.name,
        "seed": truth.settings.seed,
        "clients": len(truth.sites),
        "rounds": len(truth.received.rounds),
        "findings": [asdict(finding) for finding in _findings(truth, shadows)],
    }
    found = json_safe(found)
    text = json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False)
    atomic_write(path.absolute() / AUDIT, f"{text}\n".encode())
    return dict(found)


def _findings(truth: RecordedTruth, shadows: int) -> list[Finding]:
    if truth.settings.privacy.epsilon is not None:
        return _proven(truth.settings.privacy)
    return [
        *_membership(truth, shadows),
        attempt("classes", MIX, lambda: attacks.classes_of_clients(truth)),
        attempt("size", SIZE, lambda: attacks.sizes_of_clients(truth)),
        attempt("counts", COUNTS, lambda: attacks.counts_of_validation(truth)),
        *attacks.peers(truth),
    ]


def _membership(truth: RecordedTruth, shadows: int) -> list[Finding]:
    """Attack the clients' weights where the server has them, else copies that it makes."""
    from fedmutual.audit.copies import heard_from, models_of, odds_on

    models, what = models_of(truth)
    rounds = truth.received.rounds or (heard_from(truth, models) if what == "weights" else ())
    found = [
        attempt("public", PUBLIC, lambda: attacks.public_copies(truth, rounds)),
        attempt("changed", CHANGED, lambda: attacks.public_copies(truth, rounds, changed=True)),
    ]
    if not models:
        return [*found, Finding("private", PRIVATE, note="not computed: what was received makes no model")]
    odds = odds_on(truth, models)
    scores = attacks.compared(odds)
    ways = {"private": (scores, f"{_SOURCES[what]}, the others as reference")}
    if len(models) > 1:
        ways["anyone"] = (attacks.summed(odds), f"{_SOURCES[what]}, their sum")
    else:
        ways["private"] = (scores, "from a copy of the clients' mean, for the sum is all that was received")
    if shadows:
        from fedmutual.audit.shadows import lira

        ways["lira"] = (lira(truth, scores, shadows), f"LiRA, {shadows} shadow runs")
    for name, (values, note) in ways.items():
        found.append(attempt(name, PRIVATE, partial(_told, truth, values, note)))
    if not shadows:
        found.append(
            Finding("lira", PRIVATE, note="not computed: LiRA needs shadow runs: --shadows 4 or more")
        )
    return found


def _told(truth: RecordedTruth, values: dict[str, Any], note: str) -> tuple[dict[str, Any], str]:
    return attacks.private_images(truth, values), note


def _proven(privacy: PrivacySettings) -> list[Finding]:
    """What no attack on a run with differential privacy can exceed; what it does not send tells nothing."""
    assert privacy.epsilon is not None
    epsilon = max(privacy.epsilon, privacy.budget or 0.0)  # a larger budget allows several releases
    odds = math.exp(epsilon)
    figures = {
        "auc_at_most": min(1.0, odds / (1 + odds) + privacy.delta),
        "tpr_at_most": min(1.0, odds * FPR + privacy.delta),
    }
    note = f"proven for every attack, epsilon {epsilon:g}"
    unsent = "not computed: no report has a figure for it; those of a simulation would leave no site"
    others = (("classes", MIX), ("size", SIZE), ("counts", COUNTS))
    return [
        Finding("private", PRIVATE, figures, note),
        *(Finding(name, of, note=unsent) for name, of in others),
    ]
