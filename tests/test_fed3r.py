"""Fed3R: the sums by hand, the same head as from all images in one place, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from hypothesis import given
from hypothesis import strategies as st

from fedmutual.learning.ridge import solve, statistics
from fedmutual.settings import SettingsError
from fedmutual.settings.compose import compose
from fedmutual.strategies.fed3r import Fed3R
from fedmutual.wire.codec import MessageError
from fedmutual.wire.reports import Expected, Report, report_record


def test_the_sums_by_hand() -> None:
    gram, moment = statistics(np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([1, 0]), 2)
    assert gram.tolist() == [10, 14, 4, 20, 6, 2]  # x1 x1, x1 x2, x1, x2 x2, x2, 1
    assert moment.tolist() == [[3, 1], [4, 2], [1, 1]]


@given(st.lists(st.integers(0, 29), min_size=0, max_size=6, unique=True), st.sampled_from([0.0, 0.01, 1.0]))
def test_it_does_not_matter_who_has_which_image(cuts: list[int], ridge: float) -> None:
    rng = np.random.default_rng(0)
    features, labels = rng.standard_normal((30, 4)), np.sort(rng.integers(0, 3, 30))
    whole = solve(*statistics(features, labels, 3), ridge)
    parts = [
        statistics(f, y, 3)
        for f, y in zip(np.split(features, sorted(cuts)), np.split(labels, sorted(cuts)), strict=True)
    ]
    apart = solve(sum(g for g, _ in parts), sum(m for _, m in parts), ridge)
    for one, other in zip(whole, apart, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_it_is_scikit_learns_ridge() -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(1)
    features, labels = rng.standard_normal((40, 5)), rng.integers(0, 3, 40)
    penalty = 0.1 * (features**2).sum() / 5
    expected = linear.Ridge(alpha=penalty).fit(features, np.eye(3)[labels])
    weights, constants = solve(*statistics(features, labels, 3), 0.1)
    np.testing.assert_allclose(weights, expected.coef_, atol=1e-5)
    np.testing.assert_allclose(constants, expected.intercept_, atol=1e-5)


HEAD = {
    "linear.weight": np.zeros((2, 3), np.float32),
    "linear.bias": np.zeros(2, np.float32),
    "centre": np.ones(3, np.float32),
}


def report(arrays: dict[str, np.ndarray], round: int = 1) -> Report:
    model = ArrayRecord({name: Array(values) for name, values in arrays.items()})
    return Report("a", round, "", "lite0", np.zeros((0, 2), np.float32), {"num-examples": 4}, model=model)


def sums(features: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    return dict(zip(("gram", "moment"), statistics(features, labels, 2), strict=True))


def test_the_head_is_the_regressions_over_the_temperature() -> None:
    rng = np.random.default_rng(2)
    features, labels = rng.standard_normal((12, 3)), np.arange(12) % 2
    strategy = Fed3R(2, HEAD, ridge=0.1, temperature=0.5, measure=lambda round, weights: {"round": round})
    reports = {
        name: report(sums(features[s], labels[s]))
        for name, s in {"a": slice(0, 5), "b": slice(5, 12)}.items()
    }
    assert strategy.take(1, reports) == {"round": 1}
    weights, constants = solve(*statistics(features, labels, 2), 0.1)
    np.testing.assert_allclose(strategy.weights["linear.weight"], weights / 0.5, atol=1e-5)
    np.testing.assert_allclose(strategy.weights["linear.bias"], constants / 0.5, atol=1e-5)
    assert strategy.weights["linear.weight"].dtype == np.float32
    assert np.array_equal(strategy.weights["centre"], HEAD["centre"])
    before = strategy.weights
    strategy.take(2, {"a": report({}, round=2)})  # without fine-tuning, nothing more happens
    assert strategy.weights is before


def test_statistics_that_cannot_be_are_refused() -> None:
    strategy = Fed3R(2, HEAD)
    expected = Expected(1, 0, 2, "float16", 1e-4)
    good = sums(np.ones((4, 3)), np.arange(4) % 2)
    assert strategy.read(report_record(report(good), "float16", 1e-4), expected).client == "a"
    negative = good["gram"].copy()
    negative[4] = -1  # the second feature's square: 4 + 3 values a row, the diagonal is 0, 4, 7, 9
    for wrong, message in (
        ({**good, "gram": negative}, "negative square"),
        ({**good, "gram": good["gram"][:-1]}, "gram"),
        ({"gram": good["gram"]}, "other layers"),
        ({**good, "moment": good["moment"] * np.nan}, "not finite"),
    ):
        with pytest.raises(MessageError, match=message):
            strategy.read(report_record(report(wrong), "float16", 1e-4), expected)


@pytest.mark.parametrize("model", [["model=visionnet"], ["model=pretrained", "model.tune=all"]])
def test_it_is_for_heads(model: list[str]) -> None:
    with pytest.raises(SettingsError, match=r"strategy=fed3r solves for a head on frozen features"):
        compose(["strategy=fed3r", *model])
