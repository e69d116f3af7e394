"""Weights of peers from what they are worth."""

from __future__ import annotations

import math

import pytest

from fedmutual.learning.competence import log_odds_weights


def test_two_classes_by_hand() -> None:
    weights = log_odds_weights({"good": 0.9, "fair": 0.75, "chance": 0.5, "worse": 0.2}, 2)
    assert weights == pytest.approx({"good": math.log(9), "fair": math.log(3), "chance": 0, "worse": 0})


def test_chance_depends_on_the_number_of_classes() -> None:
    assert log_odds_weights({"a": 0.1, "b": 0.5}, 10) == pytest.approx({"a": 0, "b": math.log(9)})


def test_nobody_is_certain() -> None:
    assert log_odds_weights({"a": 1.0, "b": 0.99}, 2) == pytest.approx(dict.fromkeys("ab", math.log(99)))


def test_a_client_that_cannot_validate_counts_as_the_mean() -> None:
    assert log_odds_weights({"a": 0.9, "b": 0.5, "new": None}, 2)["new"] == pytest.approx(math.log(9) / 2)


@pytest.mark.parametrize("accuracies", [{"a": 0.5, "b": 0.4}, {"a": None, "b": None}])
def test_where_nobody_is_better_than_chance_all_count_the_same(accuracies: dict[str, float | None]) -> None:
    assert log_odds_weights(accuracies, 2) == {"a": 1.0, "b": 1.0}
