"""A site's own speaker: sensitivity, account, abstention, consensus, and an audit that can fail."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("opendp", reason="needs the extra fedmutual[privacy]")

from test_speaker import lower_bound, unit

from fedmutual.learning.gaussian import multiplier_for, noisy, scale_of
from fedmutual.learning.own_speaker import COUNT, class_sums, sensitivity, solve_own, student, together
from fedmutual.learning.speaker import GRID, Matrix


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 12), st.integers(2, 5), st.integers(0, 9))
def test_one_image_changes_the_sums_by_at_most_the_sensitivity(seed: int, k: int, c: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    phi, labels = unit(rng, n + 1, k), rng.integers(0, c, n + 1)
    change = class_sums(phi, labels, c) - class_sums(phi[:n], labels[:n], c)
    length = np.linalg.norm(change.astype(float))
    assert length <= sensitivity(k)
    assert length == pytest.approx(sensitivity(k), rel=1e-4)  # so a smaller bound would not hold


def test_an_image_that_is_longer_than_allowed_is_left_out() -> None:
    phi = np.array([[1.0, 0.0], [0.0, 1.1]])
    assert np.array_equal(class_sums(phi, np.array([0, 1]), 2), class_sums(phi[:1], np.array([0]), 2))


def test_the_sums_are_those_of_each_class() -> None:
    rng = np.random.default_rng(1)
    phi, labels = unit(rng, 600, 4), rng.integers(0, 3, 600)
    found = class_sums(phi, labels, 3).reshape(5, 3) / GRID
    np.testing.assert_allclose(found[:4], phi.T @ np.eye(3)[labels], atol=1e-3)
    np.testing.assert_allclose(found[4], COUNT * np.bincount(labels), atol=1e-3)


# ---------------------------------------------------------------------------------------------------
# What it says

CENTRES = np.eye(3)


def images(rng: np.random.Generator, counts: list[int]) -> tuple[Matrix, np.ndarray]:
    """Return images around one centre for each class."""
    labels = np.repeat(np.arange(len(counts)), counts)
    phi = CENTRES[labels] + 0.3 * rng.standard_normal((len(labels), 3))
    return phi / np.linalg.norm(phi, axis=1, keepdims=True), labels


def speaker(counts: list[int], epsilon: float | None = None, seed: int = 6) -> tuple[Matrix, Matrix]:
    rng = np.random.default_rng(seed)
    shown, _ = images(rng, [100, 100, 100])
    sums = class_sums(*images(rng, counts), 3)
    if epsilon is None:
        return solve_own(sums, 3, shown, 0.0, 0.01)
    scale = scale_of(multiplier_for(epsilon, 1e-3), sensitivity(3))
    return solve_own(noisy(sums, scale), 3, shown, scale / GRID, 0.01)


def test_it_tells_each_class_from_the_public_images_however_many_there_are() -> None:
    rare, _ = speaker([600, 30, 30])
    weights, counts = speaker([100, 100, 100])
    np.testing.assert_allclose(counts, [100, 100, 100], atol=1e-3)
    assert (CENTRES @ weights).argmax(axis=1).tolist() == [0, 1, 2]
    assert (CENTRES @ rare).argmax(axis=1).tolist() == [0, 1, 2]
    between = (CENTRES[0] + CENTRES[1]) / np.sqrt(2)  # as near to one class as to the other
    low, high = sorted(between @ rare[:, :2])
    assert high - low < 0.3 * (CENTRES[0] @ rare)[0]  # the shares of the classes are not in it


def test_a_site_with_one_class_says_something_of_it() -> None:
    weights, counts = speaker([100, 0, 0])
    assert np.flatnonzero(counts).tolist() == [0]
    assert not weights[:, 1:].any()
    assert CENTRES[0] @ weights[:, 0] > 0.5 > -0.1 > CENTRES[1] @ weights[:, 0]


def test_a_site_says_nothing_of_a_class_that_it_hardly_has() -> None:
    heard = np.array([speaker([200, 200, 0], 0.5)[1] > 0 for _ in range(100)])
    assert heard[:, :2].all()
    assert 0.1 < heard[:, 2].mean() < 0.55  # the noise is above half its deviation in 31 % of all draws


def test_the_consensus_hears_of_each_class_who_has_it() -> None:
    one, other = np.array([[1.0, 0.0, 0.2]]), np.array([[5.0, 3.0, 9.0]])
    counts = {"a": np.array([10.0, 10.0, 5.0]), "b": np.array([0.0, 30.0, 0.0])}
    scores = together({"a": one, "b": other}, counts)
    np.testing.assert_allclose(scores, [[1.0, 0.25 * 0.0 + 0.75 * 3.0, 0.2]])
    assert together({"a": one}, {"a": np.array([0.0, 9.0, 0.0])}) is None
    nobody = together({"a": one}, {"a": np.array([9.0, 0.0, 9.0])})
    np.testing.assert_allclose(nobody, [[1.0, 0.2, 0.2]])


def test_two_sites_with_a_class_each_teach_both() -> None:
    weights, counts = zip(*(speaker([100 * (k == own) for k in range(3)]) for own in range(3)), strict=True)
    said = {f"{k}": CENTRES @ w for k, w in enumerate(weights)}
    scores = together(said, {f"{k}": c for k, c in enumerate(counts)})
    assert scores is not None
    assert scores.argmax(axis=1).tolist() == [0, 1, 2]


def test_the_student_says_what_the_consensus_says() -> None:
    rng = np.random.default_rng(8)
    phi, new = unit(rng, 80, 6), unit(rng, 20, 6)
    weights = {name: rng.standard_normal((6, 3)) for name in "ab"}
    counts = {"a": np.array([9.0, 9.0, 9.0]), "b": np.array([9.0, 5.0, 0.0])}
    made = student(phi, together({n: phi @ w for n, w in weights.items()}, counts))
    np.testing.assert_allclose(
        new @ made, together({n: new @ w for n, w in weights.items()}, counts), atol=1e-4
    )


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


def scores(epsilon: float | None, draws: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """The attacker's scores of many releases, with and without the canary: its direction in it."""
    rng = np.random.default_rng(0)
    phi, labels = unit(rng, 20, 3), rng.integers(0, 2, 20)
    whole, less = class_sums(phi, labels, 2), class_sums(phi[1:], labels[1:], 2)
    direction = (whole - less) / np.linalg.norm((whole - less).astype(float))
    scale = 1.0 if epsilon is None else scale_of(multiplier_for(epsilon, 1e-3), sensitivity(3))
    drawn = (noisy(np.tile(values, draws), scale).reshape(draws, -1) for values in (whole, less))
    a, b = ((released - less) @ direction / GRID for released in drawn)
    return a, b


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_the_audit_stays_below_the_promise(epsilon: float) -> None:
    found = lower_bound(*scores(epsilon), delta=1e-3)
    assert found <= epsilon
    if epsilon == 2.0:
        assert found > 0.1  # the attack is one that finds something


def test_the_audit_finds_missing_noise() -> None:
    assert lower_bound(*scores(None), delta=1e-3) > 4
