"""A site's own speaker: sensitivity, account, abstention, consensus, and an audit that can fail."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("opendp", reason="needs the extra fedmutual[privacy]")

from test_speaker import lower_bound, unit

from fedmutual.learning.gaussian import epsilon_of, multiplier_for, noisy
from fedmutual.learning.own_speaker import (
    STEPS,
    Noises,
    fit,
    gradient,
    log_said,
    longest,
    sensitivity,
    student,
    together,
)
from fedmutual.learning.speaker import GRID, Matrix, Whole

NONE = Noises(0.0, 0.0)


def unchanged(values: Whole, scale: float) -> Whole:
    raise AssertionError("there is no noise to add")


def speaker(
    rng: np.random.Generator, centres: Matrix, counts: list[int], noises: Noises = NONE
) -> tuple[Matrix, Matrix]:
    """A speaker of images around one centre [k] for each class."""
    labels = np.repeat(np.arange(len(counts)), counts)
    phi = centres[labels] + 0.3 * rng.standard_normal((len(labels), centres.shape[1]))
    phi /= np.linalg.norm(phi, axis=1, keepdims=True)
    size = centres.shape[1]
    add = noisy if noises.step else unchanged
    return fit(phi, labels, np.eye(size) / size, noises, add, num_classes=len(counts), share=0.01)


# ---------------------------------------------------------------------------------------------------
# Sensitivity


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32),
    st.integers(1, 12),
    st.integers(2, 5),
    st.integers(0, 9),
    st.sampled_from([0, 1, 30]),
)
def test_one_image_changes_a_gradient_by_at_most_the_sensitivity(
    seed: int, k: int, c: int, n: int, size: float
) -> None:
    """Whatever the weights: also where the model is quite wrong about the image."""
    rng = np.random.default_rng(seed)
    phi, labels = unit(rng, n + 1, k), rng.integers(0, c, n + 1)
    weights = size * rng.standard_normal((k, c))
    log_prior = np.log(rng.dirichlet(np.ones(c)) + 1e-6)
    change = gradient(phi, labels, weights, log_prior) - gradient(phi[:n], labels[:n], weights, log_prior)
    assert np.linalg.norm(change.astype(float)) <= sensitivity(k, c)


@pytest.mark.parametrize("classes", [2, 10])
def test_a_smaller_bound_would_not_hold(classes: int) -> None:
    phi, zero = np.ones((1, 1)), np.zeros((1, classes))
    length = np.linalg.norm(gradient(phi, np.array([0]), zero, np.zeros(classes)).astype(float))
    assert length == pytest.approx(sensitivity(1, classes), rel=1e-5)
    wrong = np.zeros((1, classes))
    wrong[0, 1] = 50  # without scaling it would be sqrt 2 long
    found = np.linalg.norm(gradient(phi, np.array([0]), wrong, np.zeros(classes)).astype(float)) / GRID
    assert found == pytest.approx(longest(classes), rel=1e-5)


def test_an_images_part_does_not_depend_on_the_other_images() -> None:
    rng = np.random.default_rng(4)
    phi, labels = unit(rng, 700, 30), rng.integers(0, 3, 700)
    weights, log_prior = rng.standard_normal((30, 3)), np.log(np.ones(3) / 3)
    alone = sum(gradient(phi[i : i + 1], labels[i : i + 1], weights, log_prior) for i in range(700))
    assert np.array_equal(gradient(phi, labels, weights, log_prior), alone)


def test_an_image_that_is_longer_than_allowed_is_left_out() -> None:
    phi, labels, zero = np.array([[1.0, 0.0], [0.0, 1.1]]), np.array([0, 1]), np.zeros((2, 2))
    found = gradient(phi, labels, zero, np.zeros(2))
    assert np.array_equal(found, gradient(phi[:1], labels[:1], zero, np.zeros(2)))


def test_without_scaling_it_is_the_gradient_of_the_cross_entropy() -> None:
    rng = np.random.default_rng(5)
    phi, labels = unit(rng, 20, 4), rng.integers(0, 3, 20)
    weights, log_prior = 0.01 * rng.standard_normal((4, 3)), np.zeros(3)

    def loss(w: Matrix) -> float:
        return -float(log_said(phi, w).astype(float)[np.arange(20), labels].sum())

    found = gradient(phi, labels, weights, log_prior).reshape(4, 3) / GRID
    step = np.zeros((4, 3))
    step[1, 2] = 0.5
    slope = loss(weights + step) - loss(weights - step)
    assert found[1, 2] == pytest.approx(slope, rel=0.1, abs=0.05)


# ---------------------------------------------------------------------------------------------------
# The account


@pytest.mark.parametrize(("epsilon", "classes"), [(0.5, 2), (2, 10)])
def test_counts_and_steps_together_spend_what_is_asked_for(epsilon: float, classes: int) -> None:
    """By OpenDP's composition of all that is released, and by the one figure that the ledger keeps."""
    noises = Noises.of(multiplier_for(epsilon, 1e-3), 33, classes)
    every = noises.multipliers(33, classes)
    assert len(every) == 1 + STEPS
    spent = epsilon_of(every, 1e-3)
    assert 0.99 * epsilon < spent <= epsilon
    assert epsilon_of([noises.together(33, classes)], 1e-3) == pytest.approx(spent, rel=1e-9)
    assert epsilon_of([noises.together(33, classes)] * 2, 1e-3) == pytest.approx(
        epsilon_of(every * 2, 1e-3), rel=1e-9
    )


def test_everything_that_reads_the_images_has_its_noise() -> None:
    """As many draws as are accounted, each as wide as is accounted."""
    asked: list[tuple[int, float]] = []

    def add(values: Whole, scale: float) -> Whole:
        asked.append((len(values), scale))
        return values

    noises = Noises.of(multiplier_for(1, 1e-3), 3, 2)
    rng = np.random.default_rng(0)
    fit(unit(rng, 9, 3), rng.integers(0, 2, 9), np.eye(3) / 3, noises, add, num_classes=2, share=0.01)
    assert asked == [(2, noises.count), *[(6, noises.step)] * STEPS]


# ---------------------------------------------------------------------------------------------------
# What it says


def test_without_noise_it_learns_and_the_prior_is_not_in_its_predictions() -> None:
    rng = np.random.default_rng(6)
    centres = np.eye(3)[:, :3]
    weights, counts = speaker(rng, centres, [300, 30, 30])
    assert counts.tolist() == [300, 30, 30]
    assert (centres @ weights).argmax(axis=1).tolist() == [0, 1, 2]
    between = (centres[0] + centres[1]) / math.sqrt(2)  # as near to one class as to the other
    said = log_said(between[None], weights)[0]
    assert abs(said[0] - said[1]) < 0.5 < math.log(300 / 30)


def test_a_site_says_nothing_of_a_class_that_it_hardly_has() -> None:
    rng = np.random.default_rng(7)
    noises = Noises.of(multiplier_for(0.5, 1e-3), 3, 3)
    heard = np.array([speaker(rng, np.eye(3), [200, 200, 0], noises)[1] > 0 for _ in range(60)])
    assert heard[:, :2].all()
    # the noise is above half its deviation in 31 % of all draws
    assert 0.1 < heard[:, 2].mean() < 0.6
    assert speaker(rng, np.eye(3), [9, 9, 0])[1].tolist() == [9, 9, 0]


def test_the_consensus_hears_of_each_class_who_has_it() -> None:
    sure = np.log(np.array([[0.9, 0.05, 0.05], [0.05, 0.9, 0.05]]))
    lost = np.log(np.array([[0.05, 0.05, 0.9], [0.05, 0.05, 0.9]]))
    both = np.array([5.0, 5.0, 5.0])
    scores = together({"a": sure, "b": lost}, {"a": both, "b": np.array([5.0, 0.0, 0.0])})
    np.testing.assert_allclose(scores, sure - sure.mean(axis=1, keepdims=True))  # b knows one class only
    scores = together({"a": sure, "b": lost}, {"a": both, "b": np.array([5.0, 5.0, 0.0])})
    assert scores is not None
    own = sure - sure.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(scores[:, 2], own[:, 2])
    np.testing.assert_allclose(scores[:, :2], own[:, :2] / 2)  # b finds its two classes alike
    assert together({"a": sure}, {"a": np.array([0.0, 9.0, 0.0])}) is None
    nobody = together({"a": sure}, {"a": np.array([9.0, 9.0, 0.0])})
    assert nobody is not None
    assert nobody.argmax(axis=1).tolist() == [0, 1]


def test_who_has_more_of_its_rarest_class_is_heard_more() -> None:
    one, other = np.log([[0.9, 0.1]]), np.log([[0.2, 0.8]])
    scores = together({"a": one, "b": other}, {"a": np.array([50.0, 50.0]), "b": np.array([900.0, 2.0])})
    assert scores is not None
    assert scores.argmax() == 0


def test_the_student_says_what_the_consensus_says() -> None:
    rng = np.random.default_rng(8)
    phi, new = unit(rng, 80, 6), unit(rng, 20, 6)
    weights = {name: rng.standard_normal((6, 3)) for name in "ab"}
    counts = {"a": np.array([9.0, 9.0, 9.0]), "b": np.array([9.0, 5.0, 0.0])}
    made = student(phi, together({n: log_said(phi, w) for n, w in weights.items()}, counts))
    there = together({n: log_said(new, w) for n, w in weights.items()}, counts)
    np.testing.assert_allclose(new @ made, there, atol=1e-4)


def strategy(**more: object):  # type: ignore[no-untyped-def]
    from fedmutual.learning.speaker import FeatureMap
    from fedmutual.strategies.own_speakers import OwnSpeakers

    public = np.random.default_rng(3).standard_normal((40, 5))
    chosen = FeatureMap.of_public(public, 3)
    return OwnSpeakers(2, chosen, public, schedule=lambda round: np.arange(40), multiplier=1.0, **more)


def said(counts: tuple[float, float]) -> dict[str, np.ndarray]:
    scores = np.random.default_rng(9).standard_normal((40, 2)).astype(np.float32)
    return {"said": scores, "counts": np.array(counts, np.float32)}


def test_a_resumed_server_has_the_same_speaker() -> None:
    first, resumed = strategy(), strategy()
    first.add({"a": said((8, 9)), "b": said((3, 0))}, {})
    resumed.restore_state(*first.state())
    np.testing.assert_array_equal(resumed.weights, first.weights)
    assert not resumed.waits_for("b")
    assert resumed.waits_for("c")


def test_where_nobody_says_anything_nobody_is_taught_or_asked_again() -> None:
    from fedmutual.wire.orders import Order
    from fedmutual.wire.records import NO_SAMPLES

    server = strategy()
    base = Order(round=2, num_classes=2, indices=NO_SAMPLES, wire_dtype="float16", floor=1e-4)
    assert server.order("a", base).model is not None
    server.add({"a": said((8, 0))}, {})
    assert server.order("a", base) is base
    server.add({"b": said((8, 8))}, {})
    assert server.order("a", base).log_targets is not None


# ---------------------------------------------------------------------------------------------------
# The audit: a canary is in the data or not, and an attacker who knows everything else guesses


def scores(
    epsilon: float | None, patch: pytest.MonkeyPatch, draws: int = 1000
) -> tuple[np.ndarray, np.ndarray]:
    """The attacker's scores of many releases, with and without the canary.

    The attacker sees every noisy count and gradient, which is more than what is sent, and computes at each
    step's weights what the canary would add. The score is the likelihood ratio.
    """
    rng = np.random.default_rng(0)
    phi, labels = unit(rng, 20, 1), rng.integers(0, 2, 20)
    noises = Noises.of(multiplier_for(epsilon, 1e-3), 1, 2) if epsilon else Noises(1.0, 1.0)
    needed = {s: noisy(np.zeros(4 * draws * (1 + STEPS), np.int64), s) for s in (noises.count, noises.step)}
    used = dict.fromkeys(needed, 0)
    at: list[tuple[Matrix, Matrix]] = []

    def noted(phi: Matrix, labels: np.ndarray, weights: Matrix, log_prior: Matrix) -> Whole:
        at.append((weights, log_prior))
        return gradient(phi, labels, weights, log_prior)

    def counted(some: np.ndarray) -> Whole:
        return np.bincount(some, minlength=2)

    def score(kept: slice) -> float:
        seen: list[float] = []
        at.clear()

        def add(values: Whole, scale: float) -> Whole:
            drawn = values + needed[scale][used[scale] : used[scale] + 2]
            used[scale] += 2
            rest, part = (
                gradient(phi[some], labels[some], *at[-1]) if at else counted(labels[some])
                for some in (slice(1, 20), slice(0, 1))
            )
            seen.append(float((2 * (drawn - rest) - part) @ part) / (2 * scale**2))
            return drawn

        fit(phi[kept], labels[kept], np.eye(1), noises, add, num_classes=2, share=0.01)
        return sum(seen)

    patch.setattr("fedmutual.learning.own_speaker.gradient", noted)
    inside, outside = ([score(kept) for _ in range(draws)] for kept in (slice(0, 20), slice(1, 20)))
    return np.array(inside), np.array(outside)


def test_the_audit_stays_below_the_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    found = lower_bound(*scores(4.0, monkeypatch), delta=1e-3)
    assert 0.1 < found <= 4  # the attack is one that finds something


def test_the_audit_finds_missing_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lower_bound(*scores(None, monkeypatch), delta=1e-3) > 4
