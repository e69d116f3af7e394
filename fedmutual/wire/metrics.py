"""The measurements in a report: which names, how many, and in which range."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import numpy as np
from flwr.app import MetricRecord, RecordDict

from fedmutual.logs import brief
from fedmutual.wire.codec import MessageError
from fedmutual.wire.records import METRICS, Metrics

MOST_METRICS = 64
MOST_EXAMPLES = 10**9
LARGEST = 1e12  # no loss, time or share is larger
EXAMPLES = "num-examples"
TRAINED = "trained-images"  # in the round; an image counts every time
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")

# What the image application's clients report, and the range of each. Recalls: -1 for a class without images.
APPLICATION: dict[str, tuple[float, float]] = {
    EXAMPLES: (0, MOST_EXAMPLES),
    TRAINED: (0, LARGEST),
    **dict.fromkeys(("seconds", "train-seconds"), (0, 1e8)),
    **dict.fromkeys(("train-loss", "validation-loss", "loss-after", "kl-before", "kl-after"), (-1e9, 1e9)),
    **dict.fromkeys(("accuracy-after", "validation-accuracy", "validation-auroc"), (0, 1)),
    **dict.fromkeys(("unseen-accuracy", "unseen-auroc"), (0, 1)),
    **dict.fromkeys(("validation-f1", "validation-ece", "unseen-f1", "unseen-ece"), (0, 1)),
    **dict.fromkeys(("validation-recall", "unseen-recall"), (-1, 1)),
}


def read_metrics(content: RecordDict, num_classes: int, own: Collection[str] | None) -> Metrics:
    """Read and check a reply's measurements.

    Parameters
    ----------
    content : RecordDict
    num_classes : int
        Length of a list of recalls.
    own : collection of str, or None
        Names that a client may report besides those of :data:`APPLICATION`. None: any name, as in a Flower
        app of somebody else's.

    Raises
    ------
    MessageError
        Naming the first measurement that is wrong.
    """
    record = content.get(METRICS)
    if not isinstance(record, MetricRecord):
        raise MessageError("metrics: missing")
    if len(record) > MOST_METRICS:
        raise MessageError(f"metrics: {len(record)} of them, at most {MOST_METRICS} are read")
    metrics: Metrics = dict(record)
    count = metrics.get(EXAMPLES)
    if not isinstance(count, int) or not 0 <= count <= MOST_EXAMPLES:
        raise MessageError(f"{EXAMPLES}: {brief(count)} is no count up to {MOST_EXAMPLES:,}")
    for name, value in metrics.items():
        _check(name, value, num_classes, own)
    return metrics


def _check(name: str, value: Any, num_classes: int, own: Collection[str] | None) -> None:
    if not _NAME.fullmatch(name):
        raise MessageError(f"metrics: {brief(name)} is no name of a measurement")
    if own is not None and name not in APPLICATION and name not in own:
        raise MessageError(f"{name}: no measurement of this application (RoundStrategy.own_metrics)")
    values = np.asarray(value, np.float64)
    if not np.isfinite(values).all():
        raise MessageError(f"{name}: {brief(value)} is not finite (did the training diverge?)")
    if not name.endswith("-recall"):
        if isinstance(value, list):
            raise MessageError(f"{name}: {brief(value)} is no number")
    elif not isinstance(value, list) or len(value) != num_classes:
        raise MessageError(f"{name}: {brief(value)} is no list of {num_classes} recalls")
    elif values.max() < 0:
        raise MessageError(f"{name}: {brief(value)} measures no class")
    low, high = APPLICATION.get(name, (-LARGEST, LARGEST)) if own is not None else (-LARGEST, LARGEST)
    if values.size and not (low <= values.min() and values.max() <= high):
        raise MessageError(f"{name}: {brief(value)} is outside [{low:g}, {high:g}]")
