"""Class counts of a client's validation images, reconstructed from the figures in its reports."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Counts = tuple[int, ...]

TOLERANCE = 1e-4  # of a share times its number of images
MOST_TRIES = 200_000


class TooMany(Exception):
    """There are too many distributions to try."""


def fitting(reports: Sequence[Mapping[str, Any]], images: int, classes: int, most: int) -> list[Counts]:
    """Return the distributions of so many images that fit all figures of a client, at most ``most``.

    Parameters
    ----------
    reports : sequence of mappings
        ``validation_accuracy`` and, where it was told, ``validation_recall`` [C], whose entry is None for a
        class that does not occur. Both may be missing.

    Raises
    ------
    TooMany
        It was given up after :data:`MOST_TRIES`.
    """
    told = [report for report in reports if report.get("validation_recall") is not None]
    found = []
    possible = [_possible(told, c, images) for c in range(classes)]
    for tries, counts in enumerate(_distributions(images, possible)):
        if tries == MOST_TRIES:
            raise TooMany
        if all(_adds_up(report, counts) for report in told):
            found.append(counts)
        if len(found) == most:
            break
    return found


def _possible(reports: Sequence[Mapping[str, Any]], number: int, images: int) -> list[int]:
    """Numbers of images of a class with which each of its recalls is a share of them."""
    recalls = [report["validation_recall"][number] for report in reports]
    if any(recall is None or recall < 0 for recall in recalls):
        return [0]
    least = 1 if recalls else 0
    return [n for n in range(least, images + 1) if all(_whole(recall * n) for recall in recalls)]


def _distributions(images: int, possible: Sequence[Sequence[int]]) -> Iterator[Counts]:
    """Return all choices of one number a class that add up to ``images``."""
    first, *rest = possible
    if not rest:
        if images in first:
            yield (images,)
        return
    most = sum(max(own, default=0) for own in rest)
    for number in first:
        if 0 <= images - number <= most:
            for others in _distributions(images - number, rest):
                yield (number, *others)


def _adds_up(report: Mapping[str, Any], counts: Counts) -> bool:
    accuracy = report.get("validation_accuracy")
    right = sum(
        n * (recall or 0.0) for n, recall in zip(counts, report["validation_recall"], strict=True) if n
    )
    return accuracy is None or math.isclose(right, accuracy * sum(counts), abs_tol=TOLERANCE)


def _whole(value: float) -> bool:
    return abs(value - round(value)) <= TOLERANCE
