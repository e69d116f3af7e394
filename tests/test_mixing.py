"""Staleness and mixing: numbers worked out by hand, and what must hold for all numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmutual.learning.mixing import STALENESS, Staleness, add_delta, apply_deltas, mix
from fedmutual.learning.proximal import proximal

staleness = st.builds(
    Staleness,
    st.sampled_from(STALENESS),
    a=st.floats(0.01, 20, allow_nan=False),
    b=st.floats(0, 20, allow_nan=False),
)


@pytest.mark.parametrize(
    ("function", "age", "expected"),
    [
        ("constant", 100, 1.0),
        ("polynomial", 0, 1.0),
        ("polynomial", 3, 0.5),  # (3 + 1) ** -0.5
        ("polynomial", 8, 1 / 3),
        ("hinge", 4, 1.0),
        ("hinge", 5, 1 / 11),  # 1 / (10 (5 - 4) + 1)
        ("hinge", 6, 1 / 21),
    ],
)
def test_staleness_by_hand(function: str, age: int, expected: float) -> None:
    a = 0.5 if function == "polynomial" else 10.0
    assert Staleness(function, a=a, b=4)(age) == pytest.approx(expected, rel=1e-15)


@given(staleness, st.integers(0, 10_000), st.integers(0, 10_000))
def test_staleness_is_a_share_that_never_grows_with_age(s: Staleness, first: int, second: int) -> None:
    young, old = sorted((first, second))
    assert s(0) == 1.0
    assert 0 < s(old) <= s(young) <= 1


@given(staleness, st.floats(0.01, 1), st.lists(st.integers(0, 50), min_size=1, max_size=200))
def test_alpha_is_not_multiplied_up(s: Staleness, alpha: float, ages: list[int]) -> None:
    """Every arrival has alpha s(age), whatever came before it."""
    alphas = [alpha * s(age) for age in ages]
    assert alphas == [alpha * s(age) for age in ages[::-1]][::-1]
    assert all(0 < value <= alpha for value in alphas)


def test_a_model_of_the_future_is_refused() -> None:
    with pytest.raises(ValueError, match="future version"):
        Staleness("constant", 1, 1)(-1)


def test_mix_by_hand() -> None:
    present = {"w": np.float32([1, 2]), "n": np.int64(7)}
    arrived = {"w": np.float32([3, -2]), "n": np.int64(9)}
    mixed = mix(present, arrived, 0.25)
    np.testing.assert_array_equal(mixed["w"], np.float32([1.5, 1.0]))
    assert mixed["w"].dtype == np.float32
    assert mixed["n"] == 9


@given(
    st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=20),
    st.integers(0, 2**32 - 1),
    st.floats(0, 1),
)
def test_a_mixture_lies_between_and_ends_at_its_parts(old: list[float], seed: int, alpha: float) -> None:
    a = {"w": np.float32(old)}
    b = {"w": np.random.default_rng(seed).normal(size=len(old)).astype(np.float32)}
    mixed = mix(a, b, alpha)["w"]
    low, high = np.minimum(a["w"], b["w"]), np.maximum(a["w"], b["w"])
    assert np.all((low <= mixed) & (mixed <= high))
    np.testing.assert_array_equal(mix(a, b, 1.0)["w"], b["w"])
    np.testing.assert_array_equal(mix(a, b, 0.0)["w"], a["w"])


def test_fedbuff_by_hand() -> None:
    """x = 10; deltas 2 (fresh) and -1 (weight 1/2, from another start): 10 + 0.5 / 2 (2 - 1/2) = 10.375."""
    total = add_delta(None, {"w": np.float32([3.0])}, {"w": np.float32([1.0])}, 1.0)
    total = add_delta(total, {"w": np.float32([4.0])}, {"w": np.float32([5.0])}, 0.5)
    applied = apply_deltas({"w": np.float32([10.0])}, total, 0.5, 2)
    assert applied["w"].tolist() == [10.375]
    assert applied["w"].dtype == np.float32


def test_proximal_by_hand() -> None:
    """f(x) = 2 x, x_0 = 1, rho = 0.5, step 0.1: 1 -> 0.8 -> 0.8 - 0.1 (2 + 0.5 (0.8 - 1)) = 0.61."""
    x = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = torch.optim.SGD([x], lr=0.1)

    def step() -> None:
        optimizer.zero_grad()
        (2 * x).sum().backward()
        optimizer.step()

    with proximal(optimizer, 0.5):
        step()
        assert x.item() == pytest.approx(0.8)
        step()
        assert x.item() == pytest.approx(0.61)
    step()  # and outside the block it is gone
    assert x.item() == pytest.approx(0.41)


def test_the_proximal_gradient_is_that_of_half_the_square() -> None:
    start = torch.randn(5, generator=torch.Generator().manual_seed(0))
    results = []
    for explicit in (False, True):
        x = torch.nn.Parameter(start.clone())
        optimizer = torch.optim.Adam([x], lr=0.1)
        with proximal(optimizer, 0.0 if explicit else 0.7):
            for _ in range(5):
                optimizer.zero_grad()
                loss = x.cos().sum()
                if explicit:
                    loss = loss + 0.7 / 2 * ((x - start) ** 2).sum()
                loss.backward()
                optimizer.step()
        results.append(x.detach())
    torch.testing.assert_close(results[0], results[1])
