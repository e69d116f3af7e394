"""The speaker's sums: sensitivity, noise, the ledger, and an audit that must be able to fail."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("opendp", reason="needs the extra fedmutual[privacy]")

from fedmutual.learning.gaussian import epsilon_of, multiplier_for, multiplier_of_sum, noisy, scale_of
from fedmutual.learning.speaker import CONSTANT, GRID, FeatureMap, divided, sensitivity, solve, sums


def unit(rng: np.random.Generator, n: int, k: int) -> np.ndarray:
    phi = rng.standard_normal((n, k))
    return phi / np.linalg.norm(phi, axis=1, keepdims=True)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 12), st.integers(2, 5), st.integers(0, 9))
def test_one_image_changes_the_sums_by_at_most_the_sensitivity(seed: int, k: int, c: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    phi, labels = unit(rng, n + 1, k), rng.integers(0, c, n + 1)
    change = sums(phi, labels, c) - sums(phi[:n], labels[:n], c)
    length = np.linalg.norm(change.astype(float))
    assert length <= sensitivity(k, c)
    assert length == pytest.approx(sensitivity(k, c), rel=1e-4)  # so a smaller bound would not hold


def test_an_image_that_is_longer_than_allowed_is_left_out() -> None:
    phi = np.array([[1.0, 0.0], [0.0, 1.1]])
    assert np.array_equal(sums(phi, np.array([0, 1]), 2), sums(phi[:1], np.array([0]), 2))


def test_features_that_no_number_describes_add_nothing() -> None:
    taken = FeatureMap(np.zeros(2, np.float32), np.eye(2, dtype=np.float32))
    phi = taken.unit(np.array([[np.nan, 1.0], [np.inf, 0.0], [0.0, 0.0], [3.0, 4.0]]))
    own = np.array([[0, 0, 0], [0, 0, 0], [0, 0, CONSTANT], [0.6, 0.8, CONSTANT]])
    np.testing.assert_allclose(phi, own / np.sqrt(1 + CONSTANT**2), atol=1e-12)
    assert (np.linalg.norm(phi, axis=1) <= 1 + 1e-12).all()


def test_the_axes_are_those_of_the_public_images() -> None:
    rng = np.random.default_rng(0)
    features = rng.standard_normal((50, 1)) * [[3.0, 3.0, 0.0]] + 0.1 * rng.standard_normal((50, 3))
    taken = FeatureMap.of_public(features, 2)
    assert taken.axes.shape == (2, 3)
    assert abs(taken.axes[0, :2]).min() > 5 * abs(taken.axes[0, 2])
    assert FeatureMap.of_public(features, 99).axes.shape == (3, 3)
    assert not np.array_equal(taken.digest, FeatureMap.of_public(features, 1).digest)


def test_without_noise_it_is_the_regression_on_the_features() -> None:
    rng = np.random.default_rng(1)
    phi, labels = unit(rng, 60, 4), rng.integers(0, 3, 60)
    told = divided(sums(phi, labels, 3, gram=True), 4, 3)
    centred = np.eye(3)[labels] - 1 / 3
    expected = np.linalg.solve(phi.T @ phi + 0.1 * 60 / 4 * np.eye(4), phi.T @ centred)
    np.testing.assert_allclose(solve(told, np.eye(4), 0.0, 0.1), expected, atol=1e-4)
    assert told["count"] == pytest.approx(60, abs=1e-3)


def test_with_noise_public_images_stand_in_for_the_covariance() -> None:
    rng = np.random.default_rng(1)
    phi, labels = unit(rng, 60, 4), rng.integers(0, 3, 60)
    whole, part = (divided(sums(phi, labels, 3, gram=gram), 4, 3) for gram in (True, False))
    assert set(part) == {"moment", "count"}
    own = phi.T @ phi / 60
    np.testing.assert_allclose(solve(part, own, 0.0, 0.1), solve(whole, np.eye(4), 0.0, 0.1), atol=1e-4)
    assert not np.allclose(solve(part, np.eye(4) / 4, 0.0, 0.1), solve(whole, np.eye(4), 0.0, 0.1), atol=0.01)


def test_the_noisier_the_more_penalty() -> None:
    told = divided(sums(np.eye(2), np.array([0, 1]), 2), 2, 2)
    small, large = (np.abs(solve(told, np.eye(2) / 2, noise, 0.0)).max() for noise in (0.0, 10.0))
    assert small == pytest.approx(0.5, rel=1e-3)
    assert large < 0.1


def test_what_the_speaker_says_has_one_spread_however_small_its_weights_are() -> None:
    from fedmutual.strategies.speaker import Speaker

    rng = np.random.default_rng(2)
    public = rng.standard_normal((40, 5))
    speaker = Speaker(
        2, FeatureMap.of_public(public, 3), public, schedule=lambda round: np.arange(40), multiplier=1.0
    )
    weights, said = np.array([[1.0, -1.0], [0.5, 0.2], [-2.0, 0.3], [0.1, 0.1]]), []
    for size in (1.0, 1e-3):
        speaker.weights = size * weights
        said.append(speaker.said(speaker.map.unit(public)))
    np.testing.assert_allclose(said[0], said[1], atol=1e-5)
    assert (said[0][:, 1] - said[0][:, 0]).std() > 3


def test_a_resumed_speaker_keeps_its_map() -> None:
    from fedmutual.strategies.speaker import Speaker

    rng = np.random.default_rng(3)
    public = rng.standard_normal((40, 5))

    def started(features: np.ndarray) -> Speaker:
        chosen = FeatureMap.of_public(features, 3)
        return Speaker(2, chosen, public, schedule=lambda round: np.arange(40), multiplier=1.0)

    first, resumed = started(public), started(public + 0.1 * rng.standard_normal((40, 5)))
    first._sums["a"] = np.arange(first.numbers)
    first._added = 1
    first._solve()
    assert resumed.map.digest.tobytes() != first.map.digest.tobytes()
    resumed.restore_state(*first.state())
    assert resumed.map.digest.tobytes() == first.map.digest.tobytes()
    np.testing.assert_allclose(resumed.said(resumed._public), first.said(first._public))


# ---------------------------------------------------------------------------------------------------
# The account


@pytest.mark.parametrize("epsilon", [0.1, 0.5, 8])
def test_the_noise_is_just_enough(epsilon: float) -> None:
    multiplier = multiplier_for(epsilon, 1e-3)
    assert 0.99 * epsilon < epsilon_of([multiplier], 1e-3) <= epsilon


@pytest.mark.parametrize(("epsilon", "delta"), [(0.25, 1e-3), (2.0, 1e-5)])
def test_the_account_promises_no_more_than_the_exact_curve_of_the_gaussian(
    epsilon: float, delta: float
) -> None:
    from scipy.stats import norm

    ratio = multiplier_for(epsilon, delta)
    # Balle and Wang, arXiv:1805.06530: the delta of the Gaussian mechanism at this epsilon
    exact = norm.cdf(0.5 / ratio - epsilon * ratio) - np.exp(epsilon) * norm.cdf(
        -0.5 / ratio - epsilon * ratio
    )
    assert exact <= delta


def test_releases_add_up() -> None:
    one = multiplier_for(0.5, 1e-3)
    assert epsilon_of([], 1e-3) == 0
    assert 0.5 < epsilon_of([one, one], 1e-3) < 1.0
    assert epsilon_of([one] * 4, 1e-3) == pytest.approx(epsilon_of([one / 2], 1e-3), rel=1e-6)


def test_the_noise_has_its_deviation_and_no_seed() -> None:
    zeros = np.zeros(4000, np.int64)
    first, second = noisy(zeros, scale_of(1.5, GRID)), noisy(zeros, scale_of(1.5, GRID))
    assert first.std() == pytest.approx(1.5 * GRID, rel=0.06)
    assert abs(first.mean()) < 0.1 * GRID
    assert not np.array_equal(first, second)


def divergence(scale: float, shares: int, alpha: float) -> float:
    """Renyi divergence of a sum of discrete Gaussians from the same, one step on, in one dimension."""
    reach = np.arange(-60, 61)
    one = np.exp(-(reach**2) / (2 * scale**2))
    total = one = one / one.sum()
    for _ in range(shares - 1):
        total = np.convolve(total, one)
    p, q = total[1:], total[:-1]
    held = (p > 1e-250) & (q > 1e-250)
    return float(
        np.log(np.sum(np.exp(alpha * np.log(p[held]) + (1 - alpha) * np.log(q[held])))) / (alpha - 1)
    )


@pytest.mark.parametrize("scale", [0.4, 0.6, 1.0, 3.0])
@pytest.mark.parametrize("alpha", [1.5, 2.0, 8.0])
def test_the_bound_of_a_sum_of_discrete_gaussians_holds(scale: float, alpha: float) -> None:
    """Against the divergence itself; as if it were one Gaussian, the narrow ones would break it."""
    bound = multiplier_of_sum(scale, 1, 4, 1)
    assert divergence(scale, 4, alpha) <= alpha / (2 * bound**2) * (1 + 1e-9)
    if scale == 0.4:
        assert divergence(scale, 4, alpha) > 1.01 * alpha / (2 * 4 * scale**2)


@pytest.mark.parametrize("shares", [1, 2, 4, 99])
def test_shares_of_the_noise_prove_together_what_is_asked_for(shares: int) -> None:
    wide, multiplier = sensitivity(33, 2), multiplier_for(0.5, 1e-3)
    scale = scale_of(multiplier, wide, shares)
    found = multiplier_of_sum(scale, wide, shares, 67)
    assert multiplier <= found <= multiplier * (1 + 1e-9)
    assert epsilon_of([found], 1e-3) <= 0.5


# ---------------------------------------------------------------------------------------------------
# The audit: a canary is in the data or not, and an attacker who knows everything else guesses


def lower_bound(with_it: np.ndarray, without: np.ndarray, delta: float) -> float:
    """Return the epsilon that the attacker's success proves, at 99.9 % (Clopper and Pearson), at least 0.

    (epsilon, delta) allows P(S | with) <= e^epsilon P(S | without) + delta for every set S; here S are the
    scores above a threshold, which is chosen on the first half of the draws and tested on the second.
    """
    from scipy.stats import beta

    half = len(with_it) // 2
    options = np.quantile(np.concatenate((with_it[:half], without[:half])), np.linspace(0.05, 0.95, 37))

    def proven(a: np.ndarray, b: np.ndarray, threshold: float, level: float) -> float:
        hits, alarms, n = int((a > threshold).sum()), int((b > threshold).sum()), len(a)
        low = beta.ppf(level, hits, n - hits + 1) if hits else 0.0
        high = beta.ppf(1 - level, alarms + 1, n - alarms) if alarms < n else 1.0
        return float(np.log(max(low - delta, 1e-12) / high))

    best = max(options, key=lambda t: proven(with_it[:half], without[:half], t, 0.05))
    return max(proven(with_it[half:], without[half:], best, 0.0005), 0.0)


def scores(epsilon: float | None, draws: int = 4000, sites: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """The attacker's scores of many releases, with and without the canary: its direction in it.

    Of several sites the attacker is one, who knows its own share of the noise.
    """
    rng = np.random.default_rng(0)
    phi, labels = unit(rng, 20, 3), rng.integers(0, 2, 20)
    whole, less = sums(phi, labels, 2), sums(phi[1:], labels[1:], 2)
    direction = (whole - less) / np.linalg.norm((whole - less).astype(float))
    shares = max(sites - 1, 1)
    multiplier = None if epsilon is None else multiplier_for(epsilon, 1e-3)
    scale = 1.0 if multiplier is None else scale_of(multiplier, sensitivity(3, 2), shares)

    def released(values: np.ndarray) -> np.ndarray:
        every = [noisy(np.tile(part, draws), scale) for part in (values, *[0 * values] * (shares - 1))]
        return np.sum(every, axis=0).reshape(draws, -1)

    drawn = (released(values) for values in (whole, less))
    a, b = ((total - less) @ direction / GRID for total in drawn)
    return a, b


@pytest.mark.parametrize("sites", [1, 4])
@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_the_audit_stays_below_the_promise(epsilon: float, sites: int) -> None:
    found = lower_bound(*scores(epsilon, sites=sites), delta=1e-3)
    assert found <= epsilon
    if epsilon == 2.0:
        assert found > 0.1  # the attack is one that finds something: 0.3 to 1.0 in 70 trials


@pytest.mark.parametrize("sites", [1, 4])
def test_the_audit_finds_missing_noise(sites: int) -> None:
    assert lower_bound(*scores(None, sites=sites), delta=1e-3) > 4
