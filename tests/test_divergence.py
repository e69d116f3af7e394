"""The mutual loss against scipy, against torch's own KL and against the explicit sum over all pairs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import rel_entr
from scipy.stats import entropy
from torch import Tensor

from fedmutual.learning.consensus import MeanConsensus
from fedmutual.learning.divergence import as_logits, mutual_loss, own_peer, peer_own, published_code

SAMPLES = 5
CASES = [(classes, peers, t) for classes in (2, 3, 40) for peers in (1, 4) for t in (0.5, 1.0, 3.0)]


def random_logits(*shape: int, scale: float = 2.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale


def log_probabilities(logits: Tensor) -> np.ndarray:
    return torch.log_softmax(logits, dim=-1).numpy()


def through_the_consensus(
    direction: str, own: Tensor, peers: list[Tensor], temperature: float
) -> tuple[float, Tensor]:
    """Value and gradient of the loss as a client computes it: peers -> one target -> loss, in float32."""
    predictions = {f"peer-{i}": log_probabilities(p).astype(np.float32) for i, p in enumerate(peers)}
    predictions["me"] = log_probabilities(own).astype(np.float32)
    target = MeanConsensus(predictions, direction, temperature).target("me")
    assert target is not None
    logits = own.to(torch.float32).requires_grad_()
    entropies = None if target.entropies is None else torch.from_numpy(target.entropies)
    loss = mutual_loss(direction, logits, torch.from_numpy(target.log_probabilities), entropies, temperature)
    loss.backward()
    assert logits.grad is not None
    return loss.item(), logits.grad


def over_all_pairs(
    direction: str, own: Tensor, peers: list[Tensor], temperature: float
) -> tuple[float, Tensor]:
    """The definition, with torch's KL for each pair, in float64."""
    logits = own.clone().requires_grad_()
    mine = torch.log_softmax(logits / temperature, dim=1)
    loss = torch.zeros((), dtype=torch.float64)
    for peer in peers:
        theirs = torch.log_softmax(peer / temperature, dim=1)
        first, second = (mine, theirs) if direction == "own_peer" else (theirs, mine)
        # kl_div(input, target) is KL(target || input)
        loss = loss + torch.nn.functional.kl_div(second, first, reduction="batchmean", log_target=True)
    loss = loss / len(peers)
    loss.backward()
    assert logits.grad is not None
    return loss.item(), logits.grad


@pytest.mark.parametrize("direction", ["own_peer", "peer_own"])
@pytest.mark.parametrize(("classes", "peers", "temperature"), CASES)
def test_value_and_gradient_equal_the_sum_over_all_pairs(
    direction: str, classes: int, peers: int, temperature: float
) -> None:
    own = random_logits(SAMPLES, classes)
    others = [random_logits(SAMPLES, classes, seed=i + 1) for i in range(peers)]
    value, gradient = through_the_consensus(direction, own, others, temperature)
    expected, expected_gradient = over_all_pairs(direction, own, others, temperature)
    assert value == pytest.approx(expected, rel=2e-5, abs=1e-6)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("direction", ["own_peer", "peer_own"])
@pytest.mark.parametrize("classes", [2, 7])
def test_value_equals_scipy(direction: str, classes: int) -> None:
    own = random_logits(SAMPLES, classes)
    others = [random_logits(SAMPLES, classes, seed=i + 1) for i in range(3)]
    value, _ = through_the_consensus(direction, own, others, 1.0)
    p = np.exp(log_probabilities(own))
    q = [np.exp(log_probabilities(other)) for other in others]
    pairs = [(p, other) if direction == "own_peer" else (other, p) for other in q]
    assert value == pytest.approx(np.mean([rel_entr(a, b).sum(axis=1).mean() for a, b in pairs]), rel=1e-5)
    assert value == pytest.approx(np.mean([entropy(a, b, axis=1).mean() for a, b in pairs]), rel=1e-5)


@pytest.mark.parametrize("direction", ["own_peer", "peer_own"])
@pytest.mark.parametrize("own_odds", [-16.0, 0.0, 16.0])
@pytest.mark.parametrize("peer_odds", [-16.0, 0.5, 16.0])
def test_extreme_log_odds_stay_exact(direction: str, own_odds: float, peer_odds: float) -> None:
    own = torch.tensor([[0.0, own_odds]], dtype=torch.float64)
    others = [torch.tensor([[0.0, odds]], dtype=torch.float64) for odds in (peer_odds, 1.0)]
    value, gradient = through_the_consensus(direction, own, others, 1.0)
    expected, expected_gradient = over_all_pairs(direction, own, others, 1.0)
    assert value == pytest.approx(expected, rel=1e-4, abs=2e-6)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=2e-6)


def test_hand_checked_value_in_both_directions() -> None:
    # p = (3/4, 1/4), q = (1/2, 1/2): KL(p||q) = .75 ln 1.5 + .25 ln .5, KL(q||p) = .5 ln(2/3) + .5 ln 2
    logits = torch.tensor([[math.log(3.0), 0.0]])
    half = torch.full((1, 2), math.log(0.5))
    entropies = torch.tensor([math.log(2.0)])
    assert own_peer(logits, half).item() == pytest.approx(0.1308120, abs=1e-6)
    assert peer_own(logits, half, entropies).item() == pytest.approx(0.1438410, abs=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-16, 16), min_size=4, max_size=4), st.floats(0.5, 5))
def test_no_divergence_is_negative_and_identical_clients_have_none(odds: list[float], t: float) -> None:
    own, *others = [torch.tensor([[0.0, o]], dtype=torch.float64) for o in odds]
    for direction in ("own_peer", "peer_own"):
        value, _ = through_the_consensus(direction, own, others, t)
        assert value >= -1e-5
        same, gradient = through_the_consensus(direction, own, [own, own], t)
        assert same == pytest.approx(0, abs=2e-6)
        assert gradient.abs().max().item() < 2e-6


def test_own_peer_gradient_of_two_classes_is_its_closed_form() -> None:
    # METHOD: p (1 - p) (logit p - logit q), here with logit p = 1 and the peers' mean log-odds -2
    odds = torch.tensor([[1.0]], requires_grad=True)
    log_target = torch.log_softmax(torch.tensor([[0.0, -2.0]]), dim=1)
    own_peer(as_logits(odds), log_target).backward()
    p = 1 / (1 + math.exp(-1.0))
    assert odds.grad is not None
    assert odds.grad.item() == pytest.approx(p * (1 - p) * 3.0, rel=1e-5)


def test_peer_own_gradient_of_two_classes_is_bounded_by_one() -> None:
    odds = torch.tensor([[16.0]], requires_grad=True)
    log_target = torch.log_softmax(torch.tensor([[0.0, -16.0]]), dim=1)
    peer_own(as_logits(odds), log_target, torch.zeros(1)).backward()
    assert odds.grad is not None
    assert odds.grad.item() == pytest.approx(1.0, abs=1e-5)  # p - q


@pytest.mark.parametrize("direction", ["own_peer", "peer_own"])
def test_one_logit_learns_as_two_do(direction: str) -> None:
    odds = torch.tensor([[0.3], [-2.0]], requires_grad=True)
    target = torch.log_softmax(random_logits(2, 2).float(), dim=1)
    entropies = torch.zeros(2) if direction == "peer_own" else None
    one = mutual_loss(direction, as_logits(odds), target, entropies, 2.0)
    one.backward()
    scores = torch.tensor([[0.0, 0.3], [0.0, -2.0]], requires_grad=True)
    two = mutual_loss(direction, scores, target, entropies, 2.0)
    two.backward()
    assert odds.grad is not None
    assert scores.grad is not None
    assert one.item() == pytest.approx(two.item(), rel=1e-6)
    torch.testing.assert_close(odds.grad[:, 0], scores.grad[:, 1])


def test_as_logits_leaves_several_columns_alone() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0]])
    assert as_logits(scores) is scores
    assert as_logits(torch.tensor([[2.0], [-1.0]])).tolist() == [[0.0, 2.0], [0.0, -1.0]]


def test_published_code_is_negative_and_smallest_at_q_over_e() -> None:
    # p log(p / q) with q = 1/2: at p = q / e it is -q / e, at p = q it is 0
    log_target = torch.log_softmax(torch.zeros(1, 2), dim=1)

    def at(p: float) -> tuple[float, float]:
        odds = torch.tensor([[math.log(p / (1 - p))]], requires_grad=True)
        value = published_code(as_logits(odds), log_target)
        value.backward()
        assert odds.grad is not None
        return value.item(), odds.grad.item()

    lowest, slope = at(0.5 / math.e)
    assert lowest == pytest.approx(-0.5 / math.e, abs=1e-6)
    assert slope == pytest.approx(0, abs=1e-6)
    assert at(0.5)[0] == pytest.approx(0, abs=1e-6)
    assert at(0.5)[1] > 0.1  # where the clients agree it still pushes towards class 0
    assert at(0.1)[0] > lowest
    assert at(0.3)[0] > lowest


def test_published_code_reads_class_one_only() -> None:
    logits = torch.tensor([[0.0, math.log(1.5)]])  # p = 0.6
    log_target = torch.log(torch.tensor([[0.9, 0.2]]))  # q = 0.2, the other column is nonsense
    assert published_code(logits, log_target).item() == pytest.approx(0.6 * math.log(3.0), rel=1e-5)
    assert mutual_loss("published_code", logits, log_target, None).item() == pytest.approx(0.6 * math.log(3))


@pytest.mark.parametrize("name", ["jensen_shannon", "peer_own"])
def test_unknown_divergence_and_missing_entropies_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}.*without entropies"):
        mutual_loss(name, torch.zeros(1, 2), torch.zeros(1, 2), None)
