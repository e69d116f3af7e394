"""What a run keeps for its report beside the history: confusion, agreement, the samples in dispute.

``evidence.npz`` in the run's folder, some dozen kilobytes of plain arrays: neither the unseen images nor all
public ones are needed to read a report again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedmutual.files.archive import pack, unpack
from fedmutual.files.atomic import atomic_write
from fedmutual.learning.agreement import Predictions, agreement, confusion, disagreement
from fedmutual.results.directory import EVIDENCE, ResultsError
from fedmutual.results.summary import natural_key

if TYPE_CHECKING:
    from fedmutual.data.images import ImageSet
    from fedmutual.data.site import SharedData

SAMPLES = 12  # public samples that are shown
THUMBNAIL = 96  # pixels a side, at most


@dataclass(frozen=True, eq=False)
class Sample:
    """A public sample on which the clients disagree.

    Attributes
    ----------
    name : str
        File name or id in the source.
    label : int
        Class that the source gives it; -1 where it gives none.
    divergence : float
        Jensen-Shannon divergence of the clients' predictions, in nats.
    probabilities : float array [K, C]
        Of the clients of :attr:`Evidence.clients`, in their order.
    thumbnail : uint8 array [h, w, 3]
    """

    name: str
    label: int
    divergence: float
    probabilities: NDArray[np.floating]
    thumbnail: NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Mistake:
    """An unseen image that the clients' ensemble takes for another class.

    Attributes
    ----------
    name : str
        File name or id in the source.
    label, predicted : int
        Its class, and the ensemble's.
    probability : float
        The ensemble's, of the predicted class.
    thumbnail : uint8 array [h, w, 3]
    """

    name: str
    label: int
    predicted: int
    probability: float
    thumbnail: NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Evidence:
    """What :func:`gather` finds; a part that the run had no data for is empty.

    Attributes
    ----------
    classes : tuple[str, ...]
    confusions : dict[str, int64 array [C, C]]
        Of every client that answered the closing order, on the unseen set; rows are the true classes.
    ensemble : int64 array [C, C] or None
        Of the mean-logit ensemble of these clients.
    clients : tuple[str, ...]
        Those whose predictions of the last round are known.
    agreement : float64 array [K, K] or None
        Share of the public samples on which two of them choose the same class.
    num_public : int
        Public samples that the last two are measured on.
    samples : tuple[Sample, ...]
        The most disputed first.
    note : str
        Why there are none although predictions are known.
    mistakes : tuple[Mistake, ...]
        The most certain first.
    """

    classes: tuple[str, ...]
    confusions: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    ensemble: NDArray[np.int64] | None = None
    clients: tuple[str, ...] = ()
    agreement: NDArray[np.float64] | None = None
    num_public: int = 0
    samples: tuple[Sample, ...] = ()
    note: str = ""
    mistakes: tuple[Mistake, ...] = ()


def gather(
    shared: SharedData,
    unseen_predictions: Mapping[str, Predictions],
    checkpoint: Mapping[str, NDArray[Any]],
    most_mistakes: int = SAMPLES,
) -> Evidence:
    """Compare the clients' predictions with the labels of the unseen set and with each other.

    Parameters
    ----------
    unseen_predictions : Mapping[str, array [u, C]]
        Log-probabilities of the closing reports.
    checkpoint : Mapping[str, array]
        Arrays of the server's last checkpoint. A strategy that exchanges predictions has
        ``predictions.<client>`` [n, C] and ``predicted`` [n], the public samples' positions, in it.
    most_mistakes : int
        Unseen images predicted wrong to keep at most.
    """
    from fedmutual.learning.evaluation import ensemble  # torch: reading a report needs none

    confusions: dict[str, NDArray[np.int64]] = {}
    together = None
    mistakes: tuple[Mistake, ...] = ()
    if shared.unseen is not None and unseen_predictions:
        labels = shared.unseen.labels
        names = sorted(unseen_predictions, key=natural_key)
        confusions = {name: confusion(unseen_predictions[name], labels) for name in names}
        joint = ensemble(list(unseen_predictions.values()))
        together = confusion(joint, labels)
        mistakes = _mistakes(shared.unseen, joint, most_mistakes)
    known = public_predictions(checkpoint)
    clients, predictions = tuple(known), list(known.values())
    if len(clients) < 2 or not len(predictions[0]):
        return Evidence(shared.classes, confusions, together, mistakes=mistakes)
    own = checkpoint["predicted"] < len(shared.public.images)  # not the views of the last round
    positions, predictions = checkpoint["predicted"][own], [log_p[own] for log_p in predictions]
    shares, disputed = agreement(predictions), _disputed(shared, positions, predictions)
    return Evidence(
        shared.classes,
        confusions,
        together,
        clients,
        shares,
        len(predictions[0]),
        disputed,
        mistakes=mistakes,
    )


def public_predictions(checkpoint: Mapping[str, NDArray[Any]]) -> dict[str, Predictions]:
    """The last round's predictions by client, in natural order (see :func:`gather`)."""
    known = {k.removeprefix("predictions."): v for k, v in checkpoint.items() if k.startswith("predictions.")}
    return {client: known[client] for client in sorted(known, key=natural_key)}


def save(evidence: Evidence, path: Path) -> None:
    """Write ``evidence.npz``, atomically."""
    samples = evidence.samples
    meta = {
        "classes": evidence.classes,
        "clients": evidence.clients,
        "num_public": evidence.num_public,
        "confusions": list(evidence.confusions),
        "samples": [{"name": s.name, "label": s.label, "divergence": s.divergence} for s in samples],
        "mistakes": [
            {"name": m.name, "label": m.label, "predicted": m.predicted, "probability": m.probability}
            for m in evidence.mistakes
        ],
    }
    arrays = {
        "confusions": np.array(list(evidence.confusions.values())),
        "ensemble": evidence.ensemble,
        "agreement": evidence.agreement,
        "probabilities": np.array([sample.probabilities for sample in samples], np.float16),
        "thumbnails": np.array([sample.thumbnail for sample in samples], np.uint8),
        "wrong": np.array([mistake.thumbnail for mistake in evidence.mistakes], np.uint8),
    }
    known = {name: array for name, array in arrays.items() if array is not None}
    atomic_write(path / EVIDENCE, pack(meta, known))


def load(path: Path) -> Evidence | None:
    """Read ``evidence.npz`` of a run's folder; None where the run has left none. Nothing is unpickled.

    Raises
    ------
    ResultsError
        The file is damaged.
    """
    file = path / EVIDENCE
    if not file.exists():
        return None
    try:
        meta, arrays = unpack(file)
        evidence = Evidence(
            classes=tuple(meta["classes"]),
            confusions=dict(zip(meta["confusions"], arrays["confusions"], strict=True)),
            ensemble=arrays.get("ensemble"),
            clients=tuple(meta["clients"]),
            agreement=arrays.get("agreement"),
            num_public=meta["num_public"],
            samples=tuple(
                Sample(**sample, probabilities=probabilities, thumbnail=thumbnail)
                for sample, probabilities, thumbnail in zip(
                    meta["samples"], arrays["probabilities"], arrays["thumbnails"], strict=True
                )
            ),
            mistakes=tuple(
                Mistake(**mistake, thumbnail=thumbnail)
                for mistake, thumbnail in zip(meta.get("mistakes", []), arrays.get("wrong", ()), strict=True)
            ),
        )
        _require_whole(evidence)
    except Exception as error:  # also where parts are missing or of another kind
        reason = " ".join(str(error).split())
        raise ResultsError(
            f"{file} is damaged ({reason}): delete it, the report then says what is missing"
        ) from error
    return evidence


def _require_whole(evidence: Evidence) -> None:
    """Refuse parts that do not fit together."""
    num_classes, num_clients = len(evidence.classes), len(evidence.clients)
    names = (*evidence.classes, *evidence.clients, *evidence.confusions, *(s.name for s in evidence.samples))
    matrices: list[tuple[NDArray[Any], int]] = [
        (matrix, num_classes) for matrix in evidence.confusions.values()
    ]
    matrices += [] if evidence.ensemble is None else [(evidence.ensemble, num_classes)]
    matrices += [] if evidence.agreement is None else [(evidence.agreement, num_clients)]
    whole = all(isinstance(name, str) for name in names) and isinstance(evidence.num_public, int)
    whole &= all(m.shape == (size, size) and m.dtype.kind in "iuf" for m, size in matrices)
    for sample in evidence.samples:
        whole &= sample.probabilities.shape == (num_clients, num_classes)
        whole &= isinstance(sample.label, int) and -1 <= sample.label < num_classes
        whole &= isinstance(sample.divergence, float) and _is_picture(sample.thumbnail)
    for mistake in evidence.mistakes:
        whole &= isinstance(mistake.name, str) and isinstance(mistake.probability, float)
        whole &= all(isinstance(c, int) and 0 <= c < num_classes for c in (mistake.label, mistake.predicted))
        whole &= _is_picture(mistake.thumbnail)
    if not whole:
        raise ValueError("its parts do not fit together")


def _disputed(
    shared: SharedData, positions: NDArray[np.integer], predictions: list[Predictions]
) -> tuple[Sample, ...]:
    scores = disagreement(predictions)
    worst = np.argsort(-scores, kind="stable")[:SAMPLES]
    images = shared.public.images
    return tuple(
        Sample(
            name=images.names[positions[i]],
            label=int(images.labels[positions[i]]),
            divergence=float(scores[i]),
            probabilities=np.exp(np.stack([p[i] for p in predictions])),
            thumbnail=_thumbnail(images.images[positions[i]]),
        )
        for i in worst
        if scores[i] > 0
    )


def _mistakes(unseen: ImageSet, log_p: Predictions, most: int) -> tuple[Mistake, ...]:
    predicted, certainty = log_p.argmax(axis=1), log_p.max(axis=1)
    order = np.argsort(-certainty, kind="stable")
    wrong = order[(predicted != unseen.labels)[order]][:most]
    return tuple(
        Mistake(
            name=unseen.names[i],
            label=int(unseen.labels[i]),
            predicted=int(predicted[i]),
            probability=float(np.exp(certainty[i])),
            thumbnail=_thumbnail(unseen.images[i]),
        )
        for i in wrong.tolist()
    )


def _is_picture(pixels: NDArray[Any]) -> bool:
    return pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.size > 0


def _thumbnail(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    from PIL import Image

    picture = Image.fromarray(np.asarray(pixels))
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    return np.asarray(picture)
