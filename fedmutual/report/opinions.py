"""The sections of the report that compare predictions: with the labels, and with each other."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmutual.report.curves import MOST_LINES
from fedmutual.report.evidence import Evidence, Sample
from fedmutual.report.inline import look
from fedmutual.report.recorded import RecordedRun
from fedmutual.report.tables import percent
from fedmutual.results.summary import natural_key

MOST_CLASSES = 12  # in a matrix; beyond it a list of the most frequent mistakes is shorter
MOST_MATRICES = 12
LISTED = 8

Context = dict[str, Any]


def confusion_context(run: RecordedRun) -> Context:
    """Confusion matrices on the unseen set; with many classes, the most frequent mistakes."""
    evidence = run.evidence
    if evidence is None or not evidence.confusions:
        why = "Confusion matrices need the clients' closing predictions on a shared unseen set"
        ended = "" if run.summary["status"] == "completed" else f", and the run is {run.summary['status']}"
        return {"missing": f"{why}; this run has left none{ended}."}
    matrices = sorted(evidence.confusions.items(), key=lambda pair: _accuracy(pair[1]))[:MOST_MATRICES]
    shown = sorted(matrices, key=lambda pair: natural_key(pair[0]))
    named = [("ensemble", evidence.ensemble)] if evidence.ensemble is not None else []
    note = "Rows: the true class. Columns: what was predicted. Counts; the shade is the share of the row."
    if len(evidence.confusions) > len(shown):
        note += f" The {len(shown)} least accurate of {len(evidence.confusions)} clients."
    many = len(evidence.classes) > MOST_CLASSES
    make = _mistakes if many else _matrix
    if many:
        note = f"The {LISTED} most frequent mistakes: true class, predicted class, images."
    return {
        "note": note,
        "many": many,
        "classes": evidence.classes,
        "matrices": [make(name, matrix, evidence.classes) for name, matrix in [*named, *shown]],
    }


def _accuracy(matrix: NDArray[np.int64]) -> float:
    return float(np.trace(matrix) / max(matrix.sum(), 1))


def _matrix(name: str, matrix: NDArray[np.int64], classes: Sequence[str]) -> Context:
    rows = []
    for true, counts in zip(classes, matrix.tolist(), strict=True):
        total = max(sum(counts), 1)
        rows.append((true, [(f"{count:,}", f"{count / total:.3f}") for count in counts]))
    return {"name": name, "accuracy": percent(_accuracy(matrix)), "rows": rows}


def _mistakes(name: str, matrix: NDArray[np.int64], classes: Sequence[str]) -> Context:
    wrong = matrix - np.diag(np.diag(matrix))
    order = np.argsort(-wrong, axis=None, kind="stable")[:LISTED]
    pairs = [divmod(int(cell), len(classes)) for cell in order]
    rows = [(classes[i], classes[j], f"{wrong[i, j]:,}") for i, j in pairs if wrong[i, j]]
    return {"name": name, "accuracy": percent(_accuracy(matrix)), "rows": rows}


def agreement_context(evidence: Evidence | None) -> Context:
    """How often two clients choose the same class; with many clients, its distribution."""
    if evidence is None or evidence.agreement is None or len(evidence.clients) < 2:
        return {
            "missing": "Agreement is measured on the public predictions of the last round; this run has left "
            "none (its strategy exchanges none, or fewer than two clients reported)."
        }
    matrix, clients = evidence.agreement, evidence.clients
    num = len(clients)
    note = f"Share of the {evidence.num_public:,} public samples of the last round, in per cent"
    if num <= MOST_LINES:
        # the shades span what there is: agreement is rarely far from 1
        pairs = matrix[~np.eye(num, dtype=bool)]
        least, spread = float(pairs.min()), max(float(np.ptp(pairs)), 1e-9)
        cells = [
            [(f"{100 * share:.0f}", f"{0.08 + 0.92 * (share - least) / spread:.3f}") for share in row]
            for row in matrix.tolist()
        ]
        rows = [
            (name, [None if i == j else cell for j, cell in enumerate(row)])
            for i, (name, row) in enumerate(zip(clients, cells, strict=True))
        ]
        return {"note": f"{note}, to which two clients give the same class.", "heads": clients, "rows": rows}
    others = (matrix.sum(axis=1) - 1) / (num - 1)
    lowest = [(clients[i], percent(others[i])) for i in np.argsort(others, kind="stable")[:LISTED]]
    return {
        "note": f"{note}, to which a client gives the same class as another, mean over the other {num - 1}: "
        f"lowest {percent(others.min())}, median {percent(float(np.median(others)))}, "
        f"highest {percent(others.max())}.",
        "lowest": lowest,
    }


def disputed_context(evidence: Evidence | None) -> Context:
    """The public samples on which the clients disagree most, and who says what."""
    if evidence is None or evidence.agreement is None:
        return {"missing": "The public predictions of the last round are not known, see above."}
    if not evidence.samples:
        return {"missing": evidence.note or "The clients predict the same on every public sample."}
    return {"samples": [_sample(sample, evidence) for sample in evidence.samples]}


def _sample(sample: Sample, evidence: Evidence) -> Context:
    chosen = sample.probabilities.argmax(axis=1)
    sides = []
    for position, name in enumerate(evidence.classes):
        voters = np.flatnonzero(chosen == position)
        named = []
        if len(evidence.clients) <= MOST_LINES:
            shares = sample.probabilities[voters, position].tolist()
            named = [
                {"name": evidence.clients[i], "look": look(i), "share": f"{100 * share:.0f} %"}
                for i, share in zip(voters.tolist(), shares, strict=True)
            ]
        if len(voters):
            sides.append({"name": name, "count": len(voters), "clients": named})
    return {
        "name": sample.name,
        "picture": _png(sample.thumbnail),
        "divergence": f"{sample.divergence:.3f}",
        "label": evidence.classes[sample.label] if sample.label >= 0 else None,
        "sides": sorted(sides, key=lambda side: -side["count"]),
    }


def _png(pixels: NDArray[np.uint8]) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
