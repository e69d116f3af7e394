"""FedMD, DS-FL and CFD: targets worked out by hand, what a client does with them, labels on the wire."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from local_grid import play, trains

from fedmutual.client.learner import Learner
from fedmutual.learning.aggregation import (
    entropy_reduction,
    mean_of_probabilities,
    mean_of_scores,
)
from fedmutual.learning.consensus import as_target
from fedmutual.settings.compose import compose
from fedmutual.wire.codec import MessageError, decode, encode

P = np.log(np.array([[[0.8, 0.2]], [[0.5, 0.5]], [[0.2, 0.8]]], np.float32))  # three clients, one sample


def test_targets_by_hand() -> None:
    # odds 4, 1 and 1/4: the geometric mean is 1
    assert np.exp(mean_of_scores(P)) == pytest.approx(np.array([[0.5, 0.5]]))
    # odds 4 and 1: the geometric mean is 2
    assert np.exp(mean_of_scores(P[:2])) == pytest.approx(np.array([[2 / 3, 1 / 3]]))
    assert np.exp(mean_of_probabilities(P[:2])) == pytest.approx(np.array([[0.65, 0.35]]))
    # softmax((0.65, 0.35) / 0.1): the logit is 3
    assert np.exp(entropy_reduction(P[:2], 0.1))[0, 0] == pytest.approx(1 / (1 + np.exp(-3)))
    # entropy of (0.65, 0.35), in nats
    entropy = -(0.65 * np.log(0.65) + 0.35 * np.log(0.35))
    assert as_target(mean_of_probabilities(P[:2])).entropies == pytest.approx([entropy])


@given(st.lists(st.lists(st.floats(-8, 8), min_size=3, max_size=3), min_size=2, max_size=5))
def test_every_consensus_is_a_distribution_and_keeps_what_all_agree_on(scores: list[list[float]]) -> None:
    from fedmutual.learning.consensus import log_softmax

    predictions = log_softmax(np.array(scores, np.float32))[:, None, :]
    best = predictions.argmax(axis=2)[:, 0]
    for values in (
        mean_of_scores(predictions),
        mean_of_probabilities(predictions),
        entropy_reduction(predictions, 0.1),
    ):
        assert np.exp(values).sum(axis=1) == pytest.approx(1, abs=1e-4)
        if len(set(best.tolist())) == 1:
            assert values[0, best[0]] >= values.max() - 1e-4


@pytest.mark.parametrize(("name", "after"), [("fedmd", ["local_training"]), ("dsfl", []), ("cfd", [])])
def test_clients_digest_and_then_learn_locally(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, after: list[str]
) -> None:
    done: list[str] = []
    for method in ("separate_mutual_step", "local_training", "predictions"):
        original = getattr(Learner, method)

        def recorded(self: Learner, *args: Any, method: str = method, original: Any = original) -> Any:
            if self.client == "client-0":
                done.append(method)
            return original(self, *args)

        monkeypatch.setattr(Learner, method, recorded)
    run = play(tmp_path, f"strategy={name}", "strategy.digest_epochs=1", "rounds=2")
    assert run.error is None
    learn = ["local_training", "predictions"]
    assert done == [*learn, "separate_mutual_step", *learn, "separate_mutual_step", *after]


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("fedmd", mean_of_scores),
        ("dsfl", lambda p: entropy_reduction(p, 0.1)),
        ("cfd", mean_of_probabilities),
    ],
)
def test_everyone_gets_the_consensus_of_what_was_sent(tmp_path: Path, name: str, form: Any) -> None:
    run = play(tmp_path, f"strategy={name}", "strategy.digest_epochs=1", "rounds=1")
    options = compose([f"strategy={name}"]).strategy
    sent = [
        decode(m.content["report"]["predictions"], 24, 2, options.wire_dtype, options.probability_floor)
        for m in run.grid.replies
        if trains(m) and m.content["report"]["round"] == 1
    ]
    expected = form(np.stack(sent)).astype(np.float16).astype(np.float32)
    orders = list(run.orders(2).values())
    assert len(orders) == 3
    for order in orders:
        assert order.log_targets is not None
        assert np.array_equal(order.log_targets, expected)


def test_no_weight_travels(tmp_path: Path) -> None:
    run = play(tmp_path, "strategy=fedmd", "strategy.digest_epochs=1", "rounds=1")
    assert not any("model" in m.content for m in (*run.grid.orders, *run.grid.replies) if trains(m))


@pytest.mark.parametrize("classes", [2, 3, 300])
def test_labels_survive_the_wire(classes: int) -> None:
    scores = np.random.default_rng(0).normal(size=(21, classes)).astype(np.float32)
    log_p = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    data = encode(log_p, "label", 1e-4)
    assert len(data) == {2: 3, 3: 21, 300: 42}[classes]
    arrived = decode(data, 21, classes, "label", 1e-4)
    assert np.array_equal(arrived.argmax(axis=1), log_p.argmax(axis=1))
    assert np.exp(arrived).sum(axis=1) == pytest.approx(1, abs=1e-5)
    with pytest.raises(MessageError, match="bytes"):
        decode(data + b"x", 21, classes, "label", 1e-4)


def test_a_label_of_no_class_is_refused() -> None:
    with pytest.raises(MessageError, match="label 3"):
        decode(bytes([0, 3]), 2, 3, "label", 1e-4)
