"""Consensus against a hostile minority: numbers by hand, bounds that no minority can leave, memory."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmutual.learning.attack import poisoned
from fedmutual.learning.consensus import Gathered, MeanConsensus, log_softmax
from fedmutual.learning.robust import (
    SAYS_NOTHING,
    TrimmedConsensus,
    information,
    outlier_scores,
    suspicion,
    trimmed_mean,
    trust,
)
from fedmutual.settings.compose import compose

HONEST = {"a": 0.9, "b": 0.8, "c": 0.7}


def two_classes(**first: float) -> dict[str, np.ndarray]:
    """Log-probabilities [1, 2] by client, from the probability of class 0."""
    return {name: np.log(np.array([[p, 1 - p]], np.float32)) for name, p in first.items()}


def first(log_p: np.ndarray) -> float:
    return float(np.exp(log_p[0, 0]))


@pytest.mark.parametrize(("trim", "expected"), [(0, 0.48), (1, (0.1 + 0.7 + 0.8) / 3), (2, 0.7), (9, 0.7)])
def test_trimmed_mean_by_hand(trim: int, expected: float) -> None:
    predictions = two_classes(**HONEST, x=0.0001, y=0.1)
    mean = trimmed_mean(list(predictions.values()), trim)
    assert first(mean) == pytest.approx(expected if trim else sum([0.9, 0.8, 0.7, 0.0001, 0.1]) / 5, abs=1e-5)


def test_several_classes_are_renormalised() -> None:
    p = np.array([[[0.6, 0.3, 0.1]], [[0.5, 0.1, 0.4]], [[0.1, 0.2, 0.7]]])
    medians = np.array([0.5, 0.2, 0.4])
    assert np.exp(trimmed_mean(list(np.log(p)), None)) == pytest.approx(
        medians[None] / medians.sum(), rel=1e-5
    )


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_two_of_five_cannot_leave_what_honest_ones_span(data: st.DataObject) -> None:
    """Whatever two send, the median is between the honest values, sample by sample."""
    probability = st.floats(0.001, 0.999)
    honest = [data.draw(probability) for _ in range(3)]
    hostile = [data.draw(probability) for _ in range(2)]
    values = dict(zip("abcde", honest + hostile, strict=True))
    target = TrimmedConsensus(two_classes(**values), "peer_own").target("a")
    assert target is not None
    assert min(honest) - 1e-5 <= first(target.log_probabilities) <= max(honest) + 1e-5


def test_chunks_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    predictions = [log_softmax(rng.normal(size=(57, 4))) for _ in range(5)]
    whole = trimmed_mean(predictions, 1)
    monkeypatch.setattr("fedmutual.learning.consensus.CHUNK_VALUES", 40)
    assert np.array_equal(whole, trimmed_mean(predictions, 1))


def test_the_plain_mean_loses_the_class_and_the_median_keeps_it() -> None:
    """Three are fairly sure, two send the opposite with all their weight."""
    honest = two_classes(a=0.7, b=0.75, c=0.65)
    lies = {name: poisoned("one_hot", honest["a"], None, 0) for name in ("x", "y")}
    mean = MeanConsensus(honest | lies, "own_peer").target("a")
    median = TrimmedConsensus(honest | lies, "own_peer").target("a")
    assert mean is not None
    assert mean.log_probabilities.argmax() == 1
    assert median is not None
    assert median.log_probabilities.argmax() == 0


@pytest.mark.parametrize("divergence", ["own_peer", "peer_own"])
def test_the_loss_to_a_robust_consensus_is_zero_at_it(divergence: str) -> None:
    import torch

    from fedmutual.learning.divergence import mutual_loss

    target = TrimmedConsensus(two_classes(**HONEST), divergence).target(None)
    assert target is not None
    entropies = None if target.entropies is None else torch.from_numpy(target.entropies.copy())
    log_q = torch.from_numpy(target.log_probabilities.copy())
    assert float(mutual_loss(divergence, log_q, log_q, entropies)) == pytest.approx(0, abs=1e-6)


def test_outlier_scores_by_hand() -> None:
    """Median 0.7; distances 0.2, 0.1, 0, 0, 0.6, of which the usual one is 0.1."""
    predictions = two_classes(a=0.9, b=0.8, c=0.7, d=0.7, x=0.1)
    scores = outlier_scores(predictions, predictions, tolerance=2, margin=0.05)
    assert scores == pytest.approx({"a": 0, "b": 0, "c": 0, "d": 0, "x": 0.6 - 2 * 0.1 - 0.05}, abs=1e-5)
    assert outlier_scores(two_classes(a=0.9, x=0.1), "ax", tolerance=1, margin=0) == {"a": 0, "x": 0}


def test_who_knows_one_class_and_has_not_been_taught_is_no_outlier() -> None:
    """It says "class 0" of everything, of which half is class 1: half of all away from the others."""
    knows = log_softmax(np.array([[9, 0], [0, 9]], np.float32))
    lacks = log_softmax(np.array([[9, 0], [9, 0]], np.float32))
    predictions = {"a": knows, "b": knows, "c": knows, "d": lacks}
    first_time = outlier_scores(predictions, taught=(), tolerance=1, margin=0.1)
    assert first_time == dict.fromkeys("abcd", 0)
    again = outlier_scores(predictions, taught="abcd", tolerance=1, margin=0.1)
    assert again == pytest.approx({"a": 0, "b": 0, "c": 0, "d": 0.4}, abs=1e-3)


def test_who_says_the_same_of_everything_is_not_heard() -> None:
    """Two constant liars and an honest client that lacks class 1 would outvote the two that know it."""
    knows = log_softmax(np.array([[3, 0], [0, 3], [0, 2]], np.float32))
    lacks = log_softmax(np.array([[3, 0], [2.9, 0], [3, 0]], np.float32))
    constant = {name: poisoned("constant", knows, None, 0) for name in ("x", "y")}
    predictions = {"a": knows, "b": knows, "c": lacks} | constant
    assert information(constant["x"]) == 0
    assert information(lacks) > SAYS_NOTHING
    consensus = compose(["consensus=reputation"]).consensus.rule()
    assert consensus.remember({}, predictions).keys() == predictions.keys()
    target = consensus.form(Gathered(predictions, "peer_own")).target("c")
    expected = (2 * np.exp(knows) + np.exp(lacks)) / 3
    assert np.exp(target.log_probabilities) == pytest.approx(expected, abs=1e-5)
    nobody = consensus.form(Gathered(constant, "peer_own"))
    assert nobody.target("x") is None


def test_information_by_hand() -> None:
    """Half of the samples surely one class, half surely the other: log 2; halfway between: less."""
    assert information(log_softmax(np.array([[50, 0], [0, 50]], np.float32))) == pytest.approx(np.log(2))
    p = np.array([[0.9, 0.1], [0.5, 0.5]])
    h = lambda q: -(q * np.log(q)).sum()  # noqa: E731
    assert information(np.log(p)) == pytest.approx(h(p.mean(axis=0)) - (h(p[0]) + h(p[1])) / 2)


def test_suspicion_against_a_client_fades() -> None:
    held: dict[str, float] = {}
    for score in (0.4, 0.0, 0.0):
        held = suspicion(held, {"x": score}, memory=0.5)
    assert held == pytest.approx({"x": 0.1})
    assert trust({"x": 0.1}, ["a", "x"], severity=30) == pytest.approx({"a": 1.0, "x": np.exp(-3)})


def test_reputation_takes_the_word_from_a_liar() -> None:
    consensus = compose(["consensus=reputation"]).consensus.rule()
    predictions = two_classes(a=0.9, b=0.8, c=0.85, d=0.8, x=0.01)
    held: dict[str, float] = {}
    for _ in range(3):
        held = consensus.remember(held, predictions)
    target = consensus.form(Gathered(predictions, "peer_own", suspicion=held)).target("a")
    assert first(target.log_probabilities) == pytest.approx((0.9 + 0.8 + 0.85 + 0.8) / 4, abs=1e-3)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["consensus=median", "strategy=fedavg"], "consensus: strategy=fedavg"),
        (["consensus=validation", "strategy=local"], "consensus: strategy=local"),
        (["consensus=reputation", "consensus.memory=1.5"], "consensus.memory"),
        (["consensus=median", "strategy.divergence=published_code"], "strategy.divergence"),
        (["consensus=trimmed_mean", "consensus.trim=0"], "consensus.trim"),
        (["attack.name=random"], "attack.name"),
        (["participation.absent=[client-1:x]"], "participation.absent"),
        (["attack.clients=[client-0]"], "attack.name"),
    ],
)
def test_what_does_not_go_together_is_refused(overrides: list[str], key: str) -> None:
    from fedmutual.settings import SettingsError

    with pytest.raises(SettingsError, match=f"^{key}"):
        compose(overrides)
