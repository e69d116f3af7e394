"""Predictions and their metrics."""

from __future__ import annotations

import logging
import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fedmutual.learning.divergence import as_logits
from fedmutual.learning.placement import to_input

CHANCE = 0.025  # a difference is not one if it is as probable as this without one

logger = logging.getLogger(__name__)


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, batch_size: int = 32) -> Tensor:
    """Return log-probabilities [n, C] of uint8 images [n, 3, H, W], in evaluation mode and fp32, on the CPU.

    If the device runs out of memory, use smaller batches.
    """
    device = next(model.parameters()).device
    model.eval()
    while True:
        try:
            parts = [
                torch.log_softmax(as_logits(model(to_input(batch, device)).float()), dim=1).cpu()
                for batch in torch.split(images, batch_size)
            ]
            return torch.cat(parts)
        except torch.OutOfMemoryError:
            if batch_size == 1:
                raise
        batch_size = (batch_size + 1) // 2
        logger.warning("%s is out of memory: predicting %d images at a time", device, batch_size)
        if device.type == "cuda":
            torch.cuda.empty_cache()


def cross_entropy(log_probabilities: Tensor, labels: Tensor) -> float:
    """Return the mean negative log-likelihood, in nats."""
    return float(torch.nn.functional.nll_loss(log_probabilities, labels))


def accuracy(log_probabilities: Tensor, labels: Tensor) -> float:
    """Return the share of samples whose most probable class is their label."""
    return float((log_probabilities.argmax(dim=1) == labels).float().mean())


def is_better(one: Tensor, other: Tensor, labels: Tensor) -> bool:
    """Whether one model is right on more samples than chance explains, and no worse in balanced accuracy.

    Predictions are [n, C] of the same samples, labels [n]. A sign test over the samples on which only one of
    the two is right, at :data:`CHANCE`.
    """
    first, second = (log_p.argmax(dim=1) == labels for log_p in (one, other))
    if by_chance(int((first & ~second).sum()), int((second & ~first).sum())) >= CHANCE:
        return False
    counts = torch.bincount(labels)
    leads = torch.bincount(labels[first], minlength=len(counts)) - torch.bincount(
        labels[second], minlength=len(counts)
    )
    return float((leads / counts.clamp(min=1)).sum()) >= 0


def by_chance(wins: int, losses: int) -> float:
    """Return the probability of as many wins or more by tosses of a coin (a sign test).

    >>> by_chance(3, 0), by_chance(2, 2)
    (0.125, 0.6875)
    """
    tosses = wins + losses
    return float(sum(math.comb(tosses, k) for k in range(wins, tosses + 1)) / 2**tosses)


def quality(log_probabilities: Tensor, labels: Tensor, ranked: bool = True) -> dict[str, float | list[float]]:
    """Return accuracy, balanced accuracy, recall per class and, if ``ranked``, F1, ECE and AUROC.

    Predictions are [n, C], labels [n]. Recall is -1 for a class that does not occur; balanced accuracy is the
    mean recall of the others. AUROC is missing if a class does not occur.
    """
    num_classes = log_probabilities.shape[1]
    counts = torch.bincount(labels, minlength=num_classes)
    present = counts > 0
    right = labels[log_probabilities.argmax(dim=1) == labels]
    recall = torch.bincount(right, minlength=num_classes) / counts
    figures: dict[str, float | list[float]] = {
        "accuracy": accuracy(log_probabilities, labels),
        "balanced_accuracy": float(recall[present].mean()),
        "recall": [float(value) for value in recall.where(present, -1.0)],
    }
    if ranked:
        figures["f1"] = macro_f1(log_probabilities, labels)
        figures["ece"] = calibration_error(log_probabilities, labels)
    if ranked and bool(present.all()):
        figures["auroc"] = auroc(log_probabilities, labels)
    return figures


def macro_f1(log_probabilities: Tensor, labels: Tensor) -> float:
    """Return the mean F1 of the classes that occur as a label or a prediction.

    F1 of a class is ``2 TP / (2 TP + FP + FN)``. Predictions are [n, C], labels [n].
    """
    num_classes, predicted = log_probabilities.shape[1], log_probabilities.argmax(dim=1)
    right = torch.bincount(labels[predicted == labels], minlength=num_classes)
    together = torch.bincount(labels, minlength=num_classes) + torch.bincount(
        predicted, minlength=num_classes
    )
    found = together > 0
    return float((2 * right[found] / together[found]).mean())


def calibration_error(log_probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Return the expected calibration error of the most probable class (arXiv:1706.04599).

    The mean over ``bins`` equal ranges of confidence, weighted by their samples, of the difference between
    confidence and accuracy. Predictions are [n, C], labels [n].
    """
    confidence, predicted = log_probabilities.double().exp().max(dim=1)
    place = torch.clamp((confidence * bins).ceil().long() - 1, 0, bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64)
    gap.index_add_(0, place, confidence - (predicted == labels).double())
    return float(gap.abs().sum() / len(labels))


def auroc(log_probabilities: Tensor, labels: Tensor) -> float:
    """Return the mean over the classes of the one-vs-rest area under the ROC curve.

    Predictions are [n, C], labels [n]; every class occurs. It is the probability that an image of the class
    has a higher score than one of another class (Mann-Whitney's U; ties count half). torchmetrics has it too,
    but takes two seconds to import, in every client process.
    """
    areas = []
    for number, scores in enumerate(log_probabilities.double().exp().T):
        _, place, count = scores.unique(return_inverse=True, return_counts=True)
        rank = (count.cumsum(0) - (count - 1) / 2)[place]  # from 1; ties share their mean
        mine = labels == number
        inside, outside = int(mine.sum()), int((~mine).sum())
        areas.append((float(rank[mine].sum()) - inside * (inside + 1) / 2) / (inside * outside))
    return sum(areas) / len(areas)


def ensemble(predictions: list[npt.NDArray[np.floating]]) -> npt.NDArray[np.float64]:
    """Return the mean-logit ensemble: log of the normalised geometric mean, [n, C]."""
    mean = np.mean([p.astype(np.float64) for p in predictions], axis=0)
    mean -= mean.max(axis=1, keepdims=True)  # two confident, opposed clients would underflow
    return np.asarray(mean - np.log(np.exp(mean).sum(axis=1, keepdims=True)), dtype=np.float64)
