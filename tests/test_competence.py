"""Weights of peers from what they are worth, as a whole and sample by sample."""

from __future__ import annotations

import numpy as np
import pytest
from test_robust import first, two_classes

from fedmutual.learning.competence import certainty, odds_weights
from fedmutual.learning.consensus import Gathered, MeanConsensus, log_softmax
from fedmutual.settings.compose import compose

ALL = slice(None)


def sure(p: np.ndarray, rows: slice) -> np.ndarray:
    """A competence of one's own with a step: who is not sure of a sample says next to nothing about it."""
    return np.where(p.max(axis=1) >= 0.7, 1.0, 1e-3)


COMPETENCES = {"certainty": certainty(2), "sure": sure}


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


def target_of(name: str, *overrides: str, validated: dict[str, float] | None = None, **p: float) -> float:
    """Probability of class 0 that the consensus of these settings teaches a client."""
    rule = compose(list(overrides)).consensus.rule()
    target = rule.form(Gathered(two_classes(**p), "peer_own", validated=validated or {})).target(name)
    return first(target.log_probabilities)


def test_who_is_at_a_loss_abstains() -> None:
    """Weights 1 - H / log 2: 0.531 at 0.9, next to nothing at 0.5."""
    expected = (0.531 * 0.9 + 0.001 * 0.5) / 0.532
    assert target_of("a", "consensus=confidence", a=0.5, b=0.9, c=0.5) == pytest.approx(expected, abs=1e-3)
    everyone = target_of("b", "consensus=confidence", "consensus.include_own=true", a=0.5, b=0.9, c=0.5)
    assert everyone == pytest.approx(0.9, abs=3e-3)


def test_the_odds_of_being_right_weigh_the_peers() -> None:
    validated = {"a": 0.5, "b": 0.9, "c": 0.75}
    target = target_of("a", "consensus=validation", validated=validated, a=0.5, b=0.8, c=0.4)
    assert target == pytest.approx((9 * 0.8 + 3 * 0.4) / 12, abs=1e-5)


@pytest.mark.parametrize("name", COMPETENCES)
@pytest.mark.parametrize("divergence", ["own_peer", "peer_own"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_weight_a_sample_is_the_weighted_mean_of_the_peers(
    name: str, divergence: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the weights written down, in float64; in chunks of which the last is not full."""
    monkeypatch.setattr("fedmutual.learning.consensus.CHUNK_VALUES", 12)
    rng = np.random.default_rng(0)
    predictions = {f"c{i}": log_softmax(3 * rng.normal(size=(9, 3))) for i in range(4)}
    competence = COMPETENCES[name]
    target = MeanConsensus(predictions, divergence, temperature, None, competence).target("c1")
    total, mean = np.zeros((9, 1)), np.zeros((9, 3))
    for peer in ("c0", "c2", "c3"):
        weight = competence(np.exp(predictions[peer]), ALL)[:, None]
        log_p = log_softmax(predictions[peer] / temperature)
        mean += weight * (log_p if divergence == "own_peer" else np.exp(log_p))
        total += weight
    assert target is not None
    expected = mean / total if divergence == "own_peer" else np.log(mean / total)
    assert len(np.unique(total.round(6))) > 1
    np.testing.assert_allclose(target.log_probabilities, expected, atol=1e-4)


@pytest.mark.parametrize("name", COMPETENCES)
@pytest.mark.parametrize("divergence", ["own_peer", "peer_own"])
def test_a_competence_leaves_one_out_exactly(name: str, divergence: str) -> None:
    """Where a weight depends on nobody else, taken out is as never there."""
    rng = np.random.default_rng(0)
    predictions = {f"c{i}": log_softmax(3 * rng.normal(size=(9, 3))) for i in range(4)}
    others = {client: p for client, p in predictions.items() if client != "c1"}
    competence = COMPETENCES[name]
    taken_out = MeanConsensus(predictions, divergence, competence=competence).target("c1")
    never_in = MeanConsensus(others, divergence, competence=competence).target(None)
    assert taken_out is not None
    assert never_in is not None
    assert taken_out.log_probabilities == pytest.approx(never_in.log_probabilities, abs=1e-4)


@pytest.mark.parametrize("name", ["confidence", "validation"])
def test_before_anyone_has_spoken_there_is_nothing_to_learn(name: str) -> None:
    rule = compose([f"consensus={name}"]).consensus.rule()
    assert rule.form(Gathered({}, "peer_own")).target("a") is None
