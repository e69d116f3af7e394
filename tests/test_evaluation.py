"""Measures on numbers that can be checked by counting."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics.functional.classification import (
    binary_auroc,
    multiclass_calibration_error,
    multiclass_f1_score,
    multiclass_recall,
)

from fedmutual.learning.evaluation import (
    accuracy,
    calibration_error,
    cross_entropy,
    ensemble,
    is_better,
    macro_f1,
    predict,
    quality,
)


def log_p(*rows: list[float]) -> Tensor:
    return torch.log(torch.tensor(rows))


def test_accuracy_and_cross_entropy_by_hand() -> None:
    predictions = log_p([0.8, 0.2], [0.4, 0.6], [0.5001, 0.4999])
    labels = torch.tensor([0, 1, 1])
    assert accuracy(predictions, labels) == pytest.approx(2 / 3)
    expected = -(math.log(0.8) + math.log(0.6) + math.log(0.4999)) / 3
    assert cross_entropy(predictions, labels) == pytest.approx(expected, rel=1e-6)


def test_better_is_more_than_chance_and_not_at_the_cost_of_a_class() -> None:
    labels = torch.tensor([0] * 6 + [1] * 2)
    right, wrong = torch.eye(2)[labels], torch.eye(2)[1 - labels]
    assert is_better(right, wrong, labels)
    assert not is_better(wrong, right, labels)
    assert not is_better(right, torch.cat([wrong[:5], right[5:]]), labels)  # 5 of 5: 1 in 32
    assert is_better(right, torch.cat([wrong[:6], right[6:]]), labels)
    many = torch.tensor([0] * 60 + [1] * 2)
    often, fair = torch.eye(2)[many * 0], torch.eye(2)[many].clone()
    fair[:9] = fair[:9].flip(1)
    assert not is_better(often, fair, many)  # right on 7 more, but never on the second class


def test_two_classes_by_hand() -> None:
    # class 0: .9 .6 .3 right, right, wrong; class 1: only the last is right
    predictions = log_p([0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.8, 0.2], [0.2, 0.8])
    labels = torch.tensor([0, 0, 0, 1, 1])
    figures = quality(predictions, labels)
    assert figures["accuracy"] == pytest.approx(3 / 5)
    assert figures["recall"] == pytest.approx([2 / 3, 1 / 2])
    assert figures["balanced_accuracy"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    # scores of class 1: negatives .1 .4 .7, positives .2 .8: of 6 pairs .2>.1 and .8>.1,.4,.7 are in order
    assert figures["auroc"] == pytest.approx(4 / 6)


def test_three_classes_by_hand() -> None:
    predictions = log_p([0.7, 0.2, 0.1], [0.3, 0.4, 0.3], [0.1, 0.3, 0.6], [0.5, 0.3, 0.2])
    figures = quality(predictions, torch.tensor([0, 1, 2, 1]))
    assert figures["accuracy"] == pytest.approx(3 / 4)
    assert figures["recall"] == pytest.approx([1.0, 0.5, 1.0])
    assert figures["balanced_accuracy"] == pytest.approx(2.5 / 3)
    # one against the rest: class 0 .7 above .3 .1 .5; class 1 .4 above .2 .3 and .3 above .2, half of the
    # tie at .3: 3.5 of 4; class 2 .6 above all
    assert figures["auroc"] == pytest.approx((1 + 3.5 / 4 + 1) / 3)


@pytest.mark.parametrize("classes", [2, 5])
def test_recall_and_auroc_equal_torchmetrics(classes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    predictions = torch.log_softmax(torch.randn(200, classes, generator=generator), dim=1)
    labels = torch.randint(0, classes, (200,), generator=generator)
    figures = quality(predictions, labels)
    recall = multiclass_recall(predictions, labels, classes, average="none")
    assert figures["recall"] == pytest.approx(recall.tolist())
    assert figures["balanced_accuracy"] == pytest.approx(float(recall.mean()))
    auroc = [binary_auroc(predictions[:, c].exp(), (labels == c).int()) for c in range(classes)]
    assert figures["auroc"] == pytest.approx(float(torch.stack(auroc).mean()))


def test_ties_in_auroc_count_half() -> None:
    figures = quality(log_p([0.5, 0.5], [0.5, 0.5]), torch.tensor([0, 1]))
    assert figures["auroc"] == pytest.approx(0.5)


def test_an_absent_class_has_no_recall_and_no_auroc() -> None:
    figures = quality(log_p([0.7, 0.2, 0.1], [0.3, 0.4, 0.3], [0.1, 0.8, 0.1]), torch.tensor([0, 0, 1]))
    assert figures["recall"] == pytest.approx([0.5, 1.0, -1.0])
    assert figures["balanced_accuracy"] == pytest.approx(0.75)
    assert "auroc" not in figures


def test_auroc_is_left_out_where_it_is_not_asked_for() -> None:
    predictions, labels = log_p([0.9, 0.1], [0.2, 0.8]), torch.tensor([0, 1])
    assert "auroc" not in quality(predictions, labels, ranked=False)
    assert quality(predictions, labels)["auroc"] == 1.0


def test_ensemble_by_hand() -> None:
    # geometric means sqrt(.9 * .4) = .6 and sqrt(.1 * .6) = .24495, normalised
    first, second = np.log([[0.9, 0.1]]), np.log([[0.4, 0.6]])
    result = np.exp(ensemble([first, second]))
    np.testing.assert_allclose(result, [[0.6 / 0.8449490, 0.2449490 / 0.8449490]], rtol=1e-6)
    np.testing.assert_allclose(ensemble([first]), first, rtol=1e-12)


def test_ensemble_of_opposed_and_sure_clients_is_undecided() -> None:
    sure = np.array([[-2000.0, 0.0]], dtype=np.float32)
    np.testing.assert_allclose(ensemble([sure, sure[:, ::-1]]), np.log([[0.5, 0.5]]))


class Mean(nn.Module):
    """Log-odds = 10 * (mean pixel - 1/2), noisy while it trains."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((outputs,), 10.0))
        self.noise = nn.Dropout(0.5)

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = (self.noise(images).mean(dim=(1, 2, 3), keepdim=True)[:, :, 0, 0] - 0.5) * self.scale
        return scores


def test_predict_is_exact_in_every_batch_size_and_in_evaluation_mode() -> None:
    images = torch.arange(0, 250, 50, dtype=torch.uint8)[:, None, None, None].expand(5, 3, 2, 2)
    model = Mean(1).train()
    whole = predict(model, images)
    odds = [10 * (value / 255 - 0.5) for value in range(0, 250, 50)]
    torch.testing.assert_close(whole[:, 1] - whole[:, 0], torch.tensor(odds))
    torch.testing.assert_close(whole.exp().sum(dim=1), torch.ones(5))
    assert not whole.requires_grad
    for batch_size in (1, 2, 5):
        torch.testing.assert_close(predict(model, images, batch_size), whole)
    assert predict(Mean(4), images).shape == (5, 4)
    assert predict(model, images[:0]).shape == (0, 2)


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_f1_and_calibration_are_those_of_torchmetrics(classes: int) -> None:
    random = torch.Generator().manual_seed(classes)
    log_p = torch.log_softmax(2 * torch.randn(300, classes, generator=random), dim=1)
    labels = torch.randint(0, classes, (300,), generator=random)
    expected = multiclass_f1_score(log_p.argmax(1), labels, classes, average="macro")
    assert macro_f1(log_p, labels) == pytest.approx(float(expected), abs=1e-6)
    expected = multiclass_calibration_error(log_p.exp(), labels, classes, n_bins=15, norm="l1")
    assert calibration_error(log_p, labels) == pytest.approx(float(expected), abs=1e-6)


def test_f1_and_calibration_by_hand() -> None:
    log_p = torch.tensor([[0.9, 0.1, 0.0], [0.9, 0.1, 0.0], [0.4, 0.6, 0.0]]).clamp(min=1e-9).log()
    labels = torch.tensor([0, 1, 1])
    assert macro_f1(log_p, labels) == pytest.approx(2 / 3)  # 2/3 for both classes; the third does not occur
    assert calibration_error(log_p, labels) == pytest.approx((0.8 + 0.4) / 3)  # |1.8 - 1| and |0.6 - 1|
    assert {"f1", "ece"} <= quality(log_p, labels).keys()
    assert not {"f1", "ece"} & quality(log_p, labels, ranked=False).keys()
