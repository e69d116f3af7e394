"""Weights of peers from what they are worth."""

from __future__ import annotations

import pytest

from fedmutual.learning.competence import odds_weights


def test_two_classes_by_hand() -> None:
    weights = odds_weights({"good": 0.9, "fair": 0.75, "chance": 0.5, "worse": 0.2}, 2)
    assert weights == pytest.approx({"good": 9, "fair": 3, "chance": 0, "worse": 0})


def test_chance_depends_on_the_number_of_classes() -> None:
    assert odds_weights({"a": 0.1, "b": 0.5}, 10) == pytest.approx({"a": 0, "b": 1})


def test_nobody_is_certain() -> None:
    assert odds_weights({"a": 1.0, "b": 0.99}, 2) == pytest.approx(dict.fromkeys("ab", 99))


def test_a_client_that_cannot_validate_counts_as_the_mean() -> None:
    assert odds_weights({"a": 0.9, "b": 0.5, "new": None}, 2)["new"] == pytest.approx(4.5)


@pytest.mark.parametrize("accuracies", [{"a": 0.5, "b": 0.4}, {"a": None, "b": None}])
def test_where_nobody_is_better_than_chance_all_count_the_same(accuracies: dict[str, float | None]) -> None:
    assert odds_weights(accuracies, 2) == {"a": 1.0, "b": 1.0}


def test_two_that_disagree_are_weighed_by_who_is_right_more_often() -> None:
    """Against the outcomes of two independent clients counted: P(j right | exactly one is right)."""
    a, b = 0.9, 0.7
    only_a, only_b = a * (1 - b), b * (1 - a)
    weights = odds_weights({"a": a, "b": b}, 2)
    assert weights["b"] / (weights["a"] + weights["b"]) == pytest.approx(only_b / (only_a + only_b))
