"""Confusion, agreement and disagreement on numbers worked out by hand, and their invariants."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon

from fedmutual.learning.agreement import agreement, confusion, disagreement
from fedmutual.learning.consensus import log_softmax


def log(rows: list[list[float]]) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(np.array(rows))


def test_confusion_counts_true_rows_and_predicted_columns() -> None:
    predictions = log([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.2, 0.3, 0.5], [0.1, 0.1, 0.8]])
    assert confusion(predictions, np.array([0, 0, 1, 2])).tolist() == [[1, 1, 0], [0, 0, 1], [0, 0, 1]]


def test_agreement_is_the_share_of_equal_choices() -> None:
    a = log([[0.9, 0.1], [0.9, 0.1], [0.2, 0.8], [0.4, 0.6]])  # 0 0 1 1
    b = log([[0.6, 0.4], [0.1, 0.9], [0.3, 0.7], [0.4, 0.6]])  # 0 1 1 1
    c = log([[0.1, 0.9], [0.1, 0.9], [0.8, 0.2], [0.9, 0.1]])  # 1 1 0 0
    assert agreement([a, b, c]).tolist() == [[1, 0.75, 0], [0.75, 1, 0.25], [0, 0.25, 1]]


def test_disagreement_by_hand() -> None:
    a, b = log([[1, 0], [0.5, 0.5], [0.9, 0.1]]), log([[0, 1], [0.5, 0.5], [0.5, 0.5]])
    # third sample: H(0.7, 0.3) - (H(0.9, 0.1) + H(0.5, 0.5)) / 2
    third = 0.6108643 - (0.3250830 + 0.6931472) / 2
    assert disagreement([a, b]) == pytest.approx([math.log(2), 0, third], abs=1e-6)


@given(st.integers(2, 6), st.integers(2, 5), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_invariants(clients: int, classes: int, samples: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = 10 * rng.normal(size=(clients, samples, classes))
    predictions = [log_softmax(s) for s in scores]
    divergence = disagreement(predictions)
    assert (divergence >= 0).all()
    assert divergence.max() <= math.log(min(clients, classes)) + 1e-6
    assert disagreement(predictions[::-1]) == pytest.approx(divergence, abs=1e-9)
    assert disagreement([predictions[0]] * 3) == pytest.approx(0, abs=1e-6)
    matrix = agreement(predictions)
    assert np.array_equal(matrix, matrix.T)
    assert (np.diag(matrix) == 1).all()
    pair = [np.exp(p[0].astype(np.float64)) for p in predictions[:2]]
    expected = jensenshannon(*[p / p.sum() for p in pair]) ** 2  # scipy's is the root
    assert disagreement(predictions[:2])[0] == pytest.approx(np.nan_to_num(expected), abs=1e-6)
