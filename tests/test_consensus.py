"""Leave-one-out targets: numbers by hand, the explicit mean of the others, and what a peer can do to them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmutual.learning import consensus
from fedmutual.learning.consensus import MeanConsensus, Target, log_softmax, prediction_shares
from fedmutual.learning.divergence import mutual_loss, own_peer
from fedmutual.wire.codec import decode, encode

DIRECTIONS = ("own_peer", "peer_own")


def log_p(*rows: list[float]) -> np.ndarray:
    return np.log(np.array(rows, dtype=np.float32))


def random_predictions(clients: int, samples: int, classes: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {f"c{i}": log_softmax(3 * rng.normal(size=(samples, classes))) for i in range(clients)}


def target_of(consensus: MeanConsensus, client: str | None) -> Target:
    target = consensus.target(client)
    assert target is not None
    return target


def explicit(peers: list[np.ndarray], direction: str, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """The mean of the peers written down, in float64: (log target, mean entropy)."""
    soft = [p.astype(np.float64) / temperature for p in peers]
    soft = [p - np.log(np.exp(p).sum(axis=1, keepdims=True)) for p in soft]
    entropies = np.mean([-(np.exp(p) * p).sum(axis=1) for p in soft], axis=0)
    if direction == "own_peer":
        return np.mean(soft, axis=0), entropies
    return np.log(np.mean([np.exp(p) for p in soft], axis=0)), entropies


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_weighted_peers_give_the_weighted_mean_of_all_divergences(direction: str) -> None:
    """Against every pair written down: sum_j w_j KL(i, j) / sum_j w_j."""
    predictions = random_predictions(4, 6, 3, 0)
    weights = {"c0": 5.0, "c1": 0.5, "c2": 0.0, "c3": 2.0}
    own = torch.from_numpy(log_softmax(np.random.default_rng(1).normal(size=(6, 3))))
    target = target_of(MeanConsensus(predictions, direction, weights=weights), "c0")
    entropies = None if target.entropies is None else torch.from_numpy(target.entropies)
    loss = mutual_loss(direction, own, torch.from_numpy(target.log_probabilities), entropies, 1.0)
    pairs = 0.0
    for name in ("c1", "c2", "c3"):
        p, q = own.double(), torch.from_numpy(predictions[name]).double()
        kl = (p.exp() * (p - q)) if direction == "own_peer" else (q.exp() * (q - p))
        pairs += weights[name] * float(kl.sum(dim=1).mean())
    assert float(loss) == pytest.approx(pairs / 2.5, rel=1e-5)


def test_peers_without_weight_teach_nobody() -> None:
    consensus = MeanConsensus(random_predictions(2, 4, 2, 0), "peer_own", weights={"c0": 1.0, "c1": 0.0})
    assert consensus.target("c0") is None
    assert consensus.target("c1") is not None


def test_two_clients_get_each_other() -> None:
    a, b = log_p([0.9, 0.1]), log_p([0.2, 0.8])
    for direction in DIRECTIONS:
        consensus = MeanConsensus({"a": a, "b": b}, direction)
        np.testing.assert_allclose(target_of(consensus, "a").log_probabilities, b, atol=1e-6)
        np.testing.assert_allclose(target_of(consensus, "b").log_probabilities, a, atol=1e-6)


def test_three_clients_by_hand() -> None:
    predictions = {"a": log_p([0.5, 0.5]), "b": log_p([0.8, 0.2]), "c": log_p([0.2, 0.8])}
    # own || peer: mean log = (ln .8 + ln .2) / 2 = ln .4, not normalised
    geometric = target_of(MeanConsensus(predictions, "own_peer"), "a")
    np.testing.assert_allclose(geometric.log_probabilities, np.log([[0.4, 0.4]]), rtol=1e-5)
    assert geometric.entropies is None
    # peer || own: mean probability of a and c = (.35, .65), mean entropy = (ln 2 + .5004024) / 2
    arithmetic = target_of(MeanConsensus(predictions, "peer_own"), "b")
    np.testing.assert_allclose(arithmetic.log_probabilities, np.log([[0.35, 0.65]]), rtol=1e-5)
    assert arithmetic.entropies is not None
    np.testing.assert_allclose(arithmetic.entropies, [(math.log(2) + 0.5004024) / 2], rtol=1e-5)


def test_temperature_by_hand() -> None:
    # softmax(log P / 2) of (.9, .1) is (3, 1) / 4
    consensus = MeanConsensus({"a": log_p([0.9, 0.1]), "b": log_p([0.5, 0.5])}, "own_peer", 2.0)
    np.testing.assert_allclose(target_of(consensus, "b").log_probabilities, np.log([[0.75, 0.25]]), rtol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    clients=st.integers(2, 7),
    samples=st.integers(1, 6),
    classes=st.integers(2, 5),
    seed=st.integers(0, 999),
    direction=st.sampled_from(DIRECTIONS),
    temperature=st.sampled_from([0.5, 1.0, 4.0]),
)
def test_leave_one_out_is_the_mean_of_the_others(
    clients: int, samples: int, classes: int, seed: int, direction: str, temperature: float
) -> None:
    predictions = random_predictions(clients, samples, classes, seed)
    consensus = MeanConsensus(predictions, direction, temperature)
    for name in predictions:
        others = [p for peer, p in predictions.items() if peer != name]
        log_target, entropies = explicit(others, direction, temperature)
        target = target_of(consensus, name)
        assert target.log_probabilities.dtype == np.float32
        # absolute for probabilities: what is left of a sum of float32 has no relative accuracy near 0
        if direction == "own_peer":
            np.testing.assert_allclose(target.log_probabilities, log_target, rtol=1e-5, atol=1e-5)
        else:
            np.testing.assert_allclose(np.exp(target.log_probabilities), np.exp(log_target), atol=1e-6)
            np.testing.assert_allclose(target.entropies, entropies, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(5)), st.sampled_from(DIRECTIONS))
def test_the_order_of_the_clients_does_not_matter(order: list[int], direction: str) -> None:
    predictions = random_predictions(5, 4, 3, seed=1)
    shuffled = {f"c{i}": predictions[f"c{i}"] for i in order}
    for name in predictions:
        first = target_of(MeanConsensus(predictions, direction), name)
        second = target_of(MeanConsensus(shuffled, direction), name)
        np.testing.assert_allclose(first.log_probabilities, second.log_probabilities, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("absent", ["late", None])
def test_a_client_that_sent_nothing_gets_the_mean_of_all(direction: str, absent: str | None) -> None:
    predictions = random_predictions(3, 4, 3, seed=2)
    target = target_of(MeanConsensus(predictions, direction), absent)
    log_target, _ = explicit(list(predictions.values()), direction, 1.0)
    np.testing.assert_allclose(target.log_probabilities, log_target, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_without_a_peer_there_is_no_target(direction: str) -> None:
    alone = MeanConsensus({"a": log_p([0.9, 0.1])}, direction)
    assert alone.target("a") is None
    assert alone.target("b") is not None
    assert MeanConsensus({}, direction).target("a") is None


def test_float16_predictions_give_float32_targets_and_stay_as_they_are() -> None:
    predictions = {k: v.astype(np.float16) for k, v in random_predictions(3, 50, 4, seed=3).items()}
    before = {name: values.copy() for name, values in predictions.items()}
    for direction in DIRECTIONS:
        for temperature in (1.0, 2.0):
            consensus = MeanConsensus(predictions, direction, temperature)
            first, again = target_of(consensus, "c0"), target_of(consensus, "c0")
            log_target, _ = explicit([before["c1"], before["c2"]], direction, temperature)
            assert first.log_probabilities.dtype == np.float32
            np.testing.assert_array_equal(first.log_probabilities, again.log_probabilities)
            np.testing.assert_allclose(first.log_probabilities, log_target, atol=3e-3)
    for name, values in predictions.items():
        np.testing.assert_array_equal(values, before[name])


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_working_in_chunks_changes_nothing(
    direction: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictions = random_predictions(4, 23, 3, seed=4)
    whole = target_of(MeanConsensus(predictions, direction, temperature), "c1")
    for values in (1, 15, 66):  # 1, 5 and 22 samples: the last chunk is not full
        monkeypatch.setattr("fedmutual.learning.consensus.CHUNK_VALUES", values)
        parts = target_of(MeanConsensus(predictions, direction, temperature), "c1")
        np.testing.assert_allclose(parts.log_probabilities, whole.log_probabilities, rtol=1e-6, atol=1e-7)
        if whole.entropies is not None:
            assert parts.entropies is not None
            np.testing.assert_allclose(parts.entropies, whole.entropies, rtol=1e-6)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_mean_of_all_is_computed_once(direction: str) -> None:
    rule = MeanConsensus(random_predictions(3, 4, 2, 0), direction, include_own=True)
    first = rule.target("c0")
    assert first is not None
    assert rule.target("c1") is first
    assert rule.target(None) is first
    with pytest.raises(ValueError, match="read-only"):
        first.log_probabilities[0, 0] = 1


def test_every_finite_float16_becomes_the_same_float32() -> None:
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    finite = halves[np.isfinite(halves)]
    assert finite.size > consensus.FEW_VALUES  # else NumPy converts
    np.testing.assert_array_equal(
        consensus.as_float32(finite).view(np.int32), finite.astype(np.float32).view(np.int32)
    )


@pytest.mark.parametrize("temperature", [0.01, 0.05, 0.5, 1.0, 3.0])
def test_softening_at_any_temperature(temperature: float) -> None:
    scores = log_softmax(np.random.default_rng(0).normal(0, 2, (50, 7)))
    before = scores.copy()
    expected = log_softmax(scores / np.float32(temperature))
    found = consensus.softened(scores, np.float32(temperature))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(scores, before)


def test_what_a_confident_client_leaves_keeps_its_precision() -> None:
    """The difference of -9.2 and a sum close to it: float32 alone would be wrong by half a percent."""
    sure, unsure = np.log(np.array([[0.9999, 0.0001]])), np.log(np.array([[0.0001, 0.9999]]))
    predictions = {"a": sure.astype(np.float32), "b": unsure.astype(np.float32)}
    for client, other in (("a", "b"), ("b", "a")):
        target = MeanConsensus(predictions, "own_peer").target(client)
        assert target is not None
        np.testing.assert_allclose(target.log_probabilities, predictions[other], rtol=1e-6)


def test_the_consensus_outvotes_one_wrong_client() -> None:
    right, wrong = log_p([0.99, 0.01]), log_p([0.01, 0.99])
    predictions = {f"right-{i}": right for i in range(4)} | {"wrong": wrong}
    for direction in DIRECTIONS:
        consensus = MeanConsensus(predictions, direction)
        for name in predictions:
            assert target_of(consensus, name).log_probabilities.argmax() == 0
        # the wrong one sees four that agree; the right ones see three and the wrong one
        np.testing.assert_allclose(target_of(consensus, "wrong").log_probabilities, right, atol=1e-5)
    mean = target_of(MeanConsensus(predictions, "peer_own"), "right-0").log_probabilities
    np.testing.assert_allclose(np.exp(mean), [[(3 * 0.99 + 0.01) / 4, (3 * 0.01 + 0.99) / 4]], atol=1e-5)
    odds = target_of(MeanConsensus(predictions, "own_peer"), "right-0").log_probabilities
    assert odds[0, 0] - odds[0, 1] == pytest.approx(0.5 * math.log(99), rel=1e-5)  # (3 - 1) / 4


def test_opposed_clients_cancel() -> None:
    predictions = {"me": log_p([0.7, 0.3]), "yes": log_p([0.001, 0.999]), "no": log_p([0.999, 0.001])}
    for direction in DIRECTIONS:
        target = target_of(MeanConsensus(predictions, direction), "me").log_probabilities
        assert target[0, 0] == pytest.approx(target[0, 1], abs=1e-5)


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("floor", [1e-2, 1e-4])
def test_the_floor_of_the_wire_bounds_what_a_peer_can_pull(classes: int, floor: float) -> None:
    sure = np.full((1, classes), -60.0, dtype=np.float32)
    sure[0, -1] = 0.0
    arrived = decode(encode(sure, "float32", floor), 1, classes, "float32", floor)
    unsure = np.full((1, classes), -math.log(classes), dtype=np.float32)
    target = target_of(MeanConsensus({"me": unsure, "sure": arrived}, "own_peer"), "me")
    assert target.log_probabilities.min() >= math.log(floor) - math.log1p(classes * floor) - 1e-5

    def gradient(log_target: np.ndarray) -> float:
        logits = torch.zeros(1, classes, requires_grad=True)
        own_peer(logits, torch.from_numpy(log_target)).backward()
        assert logits.grad is not None
        return float(logits.grad.abs().max())

    assert gradient(target.log_probabilities) <= -math.log(floor) / classes + 1e-3 < gradient(sure)


def test_prediction_shares() -> None:
    predictions = log_p([0.9, 0.05, 0.05], [0.2, 0.7, 0.1], [0.4, 0.35, 0.25], [0.1, 0.8, 0.1])
    assert prediction_shares(predictions) == [0.5, 0.5, 0.0]


def test_log_softmax_survives_large_scores() -> None:
    scores = np.array([[1000.0, 1000.0], [-1000.0, 0.0]])
    np.testing.assert_allclose(log_softmax(scores), [[-math.log(2), -math.log(2)], [-1000.0, 0.0]], rtol=1e-6)
