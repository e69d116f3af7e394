"""The sections of the report that compare predictions: with the labels, and with each other."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmutual.report.curves import MOST_LINES
from fedmutual.report.evidence import Evidence, Mistake, Sample
from fedmutual.report.inline import look
from fedmutual.report.recorded import RecordedRun
from fedmutual.report.tables import percent
from fedmutual.results.summary import natural_key

MOST_CLASSES = 12  # in a matrix; beyond it a list of the most frequent mistakes is shorter
MOST_MATRICES = 12
LISTED = 8
MOST_COLUMNS = 40  # classes beside each other

Context = dict[str, Any]


def confusion_context(run: RecordedRun) -> Context:
    """Confusion matrices on the unseen set; with many classes, the most frequent mistakes."""
    evidence = run.evidence
    if evidence is None or not evidence.confusions:
        why = "Confusion matrices need the clients' closing predictions on a shared unseen set"
        ended = "" if run.summary["status"] == "completed" else f", and the run is {run.summary['status']}"
        return {"missing": f"{why}; this run has left none{ended}."}
    shown = sorted(evidence.confusions, key=lambda name: _accuracy(evidence.confusions[name]))[:MOST_MATRICES]
    matrices = {name: evidence.confusions[name] for name in sorted(shown, key=natural_key)}
    if evidence.ensemble is not None:
        matrices = {"ensemble": evidence.ensemble} | matrices
    many = len(evidence.classes) > MOST_CLASSES
    note = "Rows: the true class. Columns: what was predicted. Counts; the shade is the share of the row."
    if many:
        note = f"The {LISTED} most frequent mistakes: true class, predicted class, images."
    if len(evidence.confusions) > len(shown):
        note += f" The {len(shown)} least accurate of {len(evidence.confusions)} clients."
    rows = _mistakes if many else _matrix
    return {
        "note": note,
        "many": many,
        "classes": evidence.classes,
        "matrices": [
            {"name": name, "accuracy": percent(_accuracy(matrix)), "rows": rows(matrix, evidence.classes)}
            for name, matrix in matrices.items()
        ],
    }


def recall_context(run: RecordedRun) -> Context:
    """Which client knows which class: recall on the unseen set, else on each client's own held-out images."""
    evidence = run.evidence
    where, known = "the shared unseen set", {}
    if evidence is not None:
        known = {name: _recall(evidence.confusions[name]) for name in evidence.confusions}
    if not known:
        where = "its own held-out images"
        clients = run.summary["clients"].items()
        known = {
            name: client["validation_recall"] for name, client in clients if client.get("validation_recall")
        }
    classes = evidence.classes if evidence is not None else ()
    if not known or len({len(recall) for recall in known.values()}) != 1:
        return {"missing": "No client has said its recall of each class."}
    size = len(next(iter(known.values())))
    heads = list(classes) if len(classes) == size else [f"class {number}" for number in range(size)]
    note = f"Share of the images of a class that a client recognises, in per cent, on {where}."
    names = sorted(known, key=natural_key)
    chosen = list(range(size))
    if size > MOST_COLUMNS:
        means = [_mean(known[name][k] for name in names) for k in range(size)]
        chosen = sorted(sorted(range(size), key=means.__getitem__)[:MOST_COLUMNS])
        note += f" The {MOST_COLUMNS} worst of {size} classes."
    return {
        "note": note,
        "heads": [heads[k] for k in chosen],
        "rows": [(name, [_share(known[name][k]) for k in chosen]) for name in names],
    }


def _recall(matrix: NDArray[np.int64]) -> list[float | None]:
    pairs = zip(np.diag(matrix).tolist(), matrix.sum(axis=1).tolist(), strict=True)
    return [right / images if images else None for right, images in pairs]


def _mean(values: Iterable[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else 1.0


def _share(value: float | None) -> tuple[str, str]:
    return ("", "0") if value is None else (f"{100 * value:.0f}", f"{value:.3f}")


def _accuracy(matrix: NDArray[np.int64]) -> float:
    return float(np.trace(matrix) / max(matrix.sum(), 1))


def _matrix(matrix: NDArray[np.int64], classes: Sequence[str]) -> list[Any]:
    return _shaded(classes, matrix, matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1), ",")


def _shaded(names: Sequence[str], values: NDArray[Any], shades: NDArray[Any], text: str) -> list[Any]:
    """Rows of a table with shaded cells: a name, and each cell's text and shade (0 to 1)."""
    pairs = zip(values.tolist(), shades.tolist(), strict=True)
    cells = [[(f"{v:{text}}", f"{s:.3f}") for v, s in zip(*pair, strict=True)] for pair in pairs]
    return list(zip(names, cells, strict=True))


def _mistakes(matrix: NDArray[np.int64], classes: Sequence[str]) -> list[Any]:
    wrong = matrix - np.diag(np.diag(matrix))
    order = np.argsort(-wrong, axis=None, kind="stable")[:LISTED]
    pairs = [divmod(int(cell), len(classes)) for cell in order]
    return [(classes[i], classes[j], f"{wrong[i, j]:,}") for i, j in pairs if wrong[i, j]]


def agreement_context(evidence: Evidence | None) -> Context:
    """How often two clients choose the same class; with many clients, its distribution."""
    if evidence is None or evidence.agreement is None or len(evidence.clients) < 2:
        return {
            "missing": "Agreement is measured on the public predictions of the last round; this run has left "
            "none (its strategy exchanges none, or fewer than two clients reported)."
        }
    matrix, clients = evidence.agreement, evidence.clients
    note = f"Share of the {evidence.num_public:,} public samples of the last round, in per cent"
    if len(clients) <= MOST_LINES:
        # the shades span what there is: agreement is rarely far from 1
        pairs = matrix[~np.eye(len(clients), dtype=bool)]
        shades = 0.08 + 0.92 * (matrix - pairs.min()) / max(float(np.ptp(pairs)), 1e-9)
        rows = _shaded(clients, 100 * matrix, shades, ".0f")
        return {"note": f"{note}, to which two clients give the same class.", "heads": clients, "rows": rows}
    others = (matrix.sum(axis=1) - 1) / (len(clients) - 1)
    lowest = [f"{clients[i]} {percent(others[i])} %" for i in np.argsort(others, kind="stable")[:LISTED]]
    return {
        "note": f"{note}, to which a client gives the same class as another, mean over the other "
        f"{len(clients) - 1}: median {percent(float(np.median(others)))}, highest {percent(others.max())}; "
        f"lowest: {', '.join(lowest)}."
    }


def disputed_context(evidence: Evidence | None) -> Context:
    """The public samples on which the clients disagree most, and each client's choice."""
    if evidence is None or evidence.agreement is None:
        return {"missing": "The public predictions of the last round are not known, see above."}
    if not evidence.samples:
        return {"missing": evidence.note or "The clients predict the same on every public sample."}
    note = (
        "The public samples of the last round on which the clients disagree most (Jensen-Shannon divergence "
        "of their predictions, in nats), and the probability that each gives its class."
    )
    return {"note": note, "samples": [_sample(sample, evidence) for sample in evidence.samples]}


def _sample(sample: Sample, evidence: Evidence) -> Context:
    chosen = sample.probabilities.argmax(axis=1)
    sides = []
    for position in np.unique(chosen).tolist():
        voters = np.flatnonzero(chosen == position).tolist()
        shares = [f"{evidence.clients[i]} {100 * sample.probabilities[i, position]:.0f} %" for i in voters]
        named = (
            list(zip(map(look, voters), shares, strict=True)) if len(evidence.clients) <= MOST_LINES else []
        )
        sides.append({"name": evidence.classes[position], "count": len(voters), "clients": named})
    return {
        "name": sample.name,
        "picture": _png(sample.thumbnail),
        "divergence": f"{sample.divergence:.3f}",
        "label": evidence.classes[sample.label] if sample.label >= 0 else None,
        "sides": sorted(sides, key=lambda side: -side["count"]),
    }


def mistakes_context(evidence: Evidence | None) -> Context:
    """The unseen images that the ensemble predicts wrong."""
    if evidence is None or evidence.ensemble is None:
        return {"missing": "The closing predictions on a shared unseen set are not known, see above."}
    wrong = int(evidence.ensemble.sum() - np.trace(evidence.ensemble))
    if not evidence.mistakes:
        kept = "none of them was kept (evaluation.mistakes)" if wrong else "every one right"
        return {"missing": f"The clients' ensemble predicts {wrong:,} unseen images wrong: {kept}."}
    note = (
        f"Of the {wrong:,} unseen images that the mean-logit ensemble predicts wrong, those of which "
        "it is most certain: mislabelled ones are often among them."
    )
    return {"note": note, "mistakes": [_mistake(m, evidence.classes) for m in evidence.mistakes]}


def _mistake(mistake: Mistake, classes: Sequence[str]) -> Context:
    return {
        "name": mistake.name,
        "picture": _png(mistake.thumbnail),
        "label": classes[mistake.label],
        "predicted": classes[mistake.predicted],
        "probability": percent(mistake.probability),
    }


def _png(pixels: NDArray[np.uint8]) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
