"""Every failure signature fires on its own history and is silent on a healthy one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmutual.results.diagnostics import diagnose

History = list[dict[str, Any]]


def healthy(rounds: int = 12, clients: int = 3) -> History:
    """A run that learns: accuracy rises to 95 %, the mutual step helps and moves the KL."""
    history: History = []
    for round in range(1, rounds + 2):
        for client in range(clients):
            accuracy = 0.95 - 0.4 / round - 0.01 * client
            mutual = {
                "kl_before": 0.4 / round + 0.02,
                "kl_after": 0.3 / round + 0.015,
                "loss_before": 0.30,
                "loss_after": 0.31,
                "accuracy_before": accuracy,
                "accuracy_after": accuracy - 0.02,
            }
            history.append(
                {
                    "round": round,
                    "client": f"client-{client}",
                    "train_loss": 1.0 / round,
                    "prediction_shares": [0.45, 0.55],
                    "validation_accuracy": accuracy,
                    "validation_recall": [None, accuracy],
                    "unseen_accuracy": accuracy,
                    "unseen_balanced_accuracy": accuracy,
                    "unseen_recall": [accuracy, accuracy],
                    **(mutual if round > 1 else {}),
                    **({"closing": True} if round == rounds + 1 else {}),
                }
            )
    return history


def of(history: History, client: str = "client-1", since: int = 1) -> History:
    """The lines of one client; changing them changes the history."""
    return [line for line in history if line["client"] == client and line["round"] >= since]


def forgetful(history: History) -> None:
    for line in of(history, since=2):
        line["accuracy_after"] = line["accuracy_before"] - 0.12


def forgetful_in_loss(history: History) -> None:
    for line in of(history, since=8):
        line.update(loss_before=0.3, loss_after=0.6)


def agreeing(history: History) -> None:
    for line in of(history, since=2):
        line.update(kl_before=1e-4, kl_after=5e-5)


def unmoved(history: History) -> None:
    for line in of(history, since=2):
        line["kl_after"] = line["kl_before"] * 1.001


def stuck(history: History) -> None:
    for line in history:
        line["unseen_accuracy"] = 0.6 + 0.001 * (line["round"] % 2)


def collapsed(history: History) -> None:
    for line in of(history, since=5):
        line.update(prediction_shares=[0.005, 0.995], unseen_recall=[0.0, 1.0], unseen_balanced_accuracy=0.5)


def blind_to_one(history: History) -> None:
    for line in of(history, since=5):
        line["unseen_recall"] = [0.001, 0.99]


def blind_at_the_end(history: History) -> None:
    for line in history:
        del line["unseen_recall"]
    of(history)[-1]["unseen_recall"] = [0.99, 0.0]


def away(history: History) -> None:
    history[:] = [line for line in history if not (line["client"] == "client-1" and 3 <= line["round"] <= 6)]


def rejected(history: History) -> None:
    for line in of(history, since=4):
        round = line["round"]
        line.clear()
        line.update(round=round, client="client-1", rejected="wrong public digest")


def lost(history: History) -> None:
    for line in of(history, since=5):
        line["train_loss"] = None


SIGNATURES: list[tuple[Callable[[History], None], list[str]]] = [
    (forgetful, ["forgetting", "client-1 (rounds 10 to 13)", "12 points", "strategy.phase=mixed"]),
    (forgetful_in_loss, ["forgetting", "client-1", "raises the loss"]),
    (agreeing, ["client-1 (rounds 10 to 13)", "hardly differ", "does nothing"]),
    (unmoved, ["client-1", "where it was", "strategy.kl_weight"]),
    (stuck, ["all clients (rounds 8 to 12)", "stopped at 60.1 %", "strategy.kl_weight=0"]),
    (collapsed, ["client-1 (rounds 11 to 13)", "collapse", "train.prior_correction=true"]),
    (blind_to_one, ["client-1 (round 13)", "class 0 is never recognised"]),
    (blind_at_the_end, ["client-1 (round 13)", "class 1 is never recognised"]),
    (away, ["client-1 (rounds 3 to 6)", "absent", "exchange.round_timeout"]),
    (rejected, ["client-1 (rounds 4 to 13: wrong public digest)"]),
    (lost, ["client-1 (round 13)", "no longer a number", "optimizer.learning_rate"]),
]


@pytest.mark.parametrize(("break_it", "words"), SIGNATURES, ids=lambda value: getattr(value, "__name__", ""))
def test_signature_fires_alone(break_it: Callable[[History], None], words: list[str]) -> None:
    history = healthy()
    break_it(history)
    warnings = diagnose(history, 2)
    assert len(warnings) == 1, warnings
    assert all(word in warnings[0] for word in words), warnings[0]
    assert "client-0" not in warnings[0]
    assert "client-2" not in warnings[0]


@given(st.integers(1, 30), st.integers(1, 6))
def test_healthy_run_is_silent(rounds: int, clients: int) -> None:
    assert diagnose(healthy(rounds, clients), 2) == []


@given(
    st.lists(
        st.fixed_dictionaries(
            {"round": st.integers(1, 9)},
            optional={
                "client": st.sampled_from(["a", "b"]),
                "closing": st.booleans(),
                "rejected": st.text(max_size=3),
                "train_loss": st.none() | st.floats(),
                "kl_before": st.none() | st.floats(),
                "kl_after": st.none() | st.floats(),
                "loss_before": st.none() | st.floats(),
                "loss_after": st.none() | st.floats(),
                "accuracy_before": st.none() | st.floats(0, 1),
                "accuracy_after": st.none() | st.floats(0, 1),
                "unseen_accuracy": st.none() | st.floats(0, 1),
                "prediction_shares": st.lists(st.floats(0, 1), min_size=2, max_size=2),
                "unseen_recall": st.lists(st.none() | st.floats(0, 1), min_size=2, max_size=2),
            },
        ),
        max_size=25,
    )
)
def test_any_history_is_read_and_not_changed(history: History) -> None:
    before = copy.deepcopy(history)
    warnings = diagnose(history, 2)
    assert all(isinstance(warning, str) and warning for warning in warnings)
    assert repr(history) == repr(before)


def test_fewer_than_two_classes_have_nothing_to_tell_apart() -> None:
    history = healthy()
    stuck(history)
    for line in history:
        line.update(prediction_shares=[1.0], unseen_recall=[0.0])
    assert diagnose(history, 1) == diagnose(history, 0) == []
    lost(history)
    (warning,) = diagnose(history, 1)
    assert "no longer a number" in warning


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.floats(),
    st.text(max_size=2),
    st.dictionaries(st.text(max_size=1), st.none()),
)


@given(
    st.sampled_from(sorted(healthy(1)[0].keys() - {"round", "closing"} | {"kl_before", "loss_after"})),
    st.one_of(ODD, st.lists(ODD, max_size=4)),
    st.integers(0, 3),
)
def test_odd_values_are_survived(key: str, value: Any, classes: int) -> None:
    history = healthy()
    for line in of(history, since=5)[::2]:
        line[key] = value
    assert all(isinstance(warning, str) for warning in diagnose(history, classes))


def test_one_bad_round_is_noise() -> None:
    history = healthy()
    line = of(history, since=12)[0]
    line.update(accuracy_after=0.2, loss_after=5.0, kl_before=0.0, prediction_shares=[0.0, 1.0])
    assert diagnose(history, 2) == []


def test_recovered_run_is_silent() -> None:
    history = healthy()
    for early in (line for line in history if 2 <= line["round"] <= 6):
        early.update(
            accuracy_after=0.1, prediction_shares=[1.0, 0.0], train_loss=None, unseen_recall=[1.0, 0.0]
        )
    assert diagnose(history, 2) == []


def test_idle_kl_is_meant_at_weight_zero() -> None:
    history = healthy()
    unmoved(history)
    assert diagnose(history, 2, kl_weight=0.0) == []


def test_one_sided_public_set_is_no_collapse() -> None:
    history = healthy()
    for line in history:
        line["prediction_shares"] = [0.99, 0.01]
    assert diagnose(history, 2) == []


def test_plateau_near_the_goal_is_none() -> None:
    history = healthy()
    for line in history:
        line["unseen_accuracy"] = 0.9
    assert diagnose(history, 2) == []


def test_few_of_many_classes_may_be_missing() -> None:
    history = healthy()
    for line in history:
        line["unseen_recall"] = [0.0] * 9 + [0.9] * 91
    assert diagnose(history, 100) == []
    for line in history:
        line["unseen_recall"] = [0.0] * 10 + [0.9] * 90
    (warning,) = diagnose(history, 100)
    assert "client-0, client-1, client-2 (round 13)" in warning
    assert "class 0, class 1, class 2, class 3, class 4 and 5 more are never" in warning


def test_asynchronous_rounds_are_not_absences() -> None:
    history = [{"round": step, "client": f"client-{step % 4}"} for step in range(1, 21)]
    assert diagnose(history, 2) == []


def test_node_without_a_name_is_called_by_its_id() -> None:
    history = healthy()
    history += [{"round": round, "node_id": 77, "rejected": "no report"} for round in range(1, 13)]
    (warning,) = diagnose(history, 2)
    assert "node 77 (rounds 1 to 12: no report)" in warning


def test_many_clients_make_one_warning() -> None:
    history = healthy(clients=20)
    for line in history:
        line["train_loss"] = None
    (warning,) = diagnose(history, 2)
    assert "client-4 and 15 more" in warning


def test_private_images_that_changed_are_named() -> None:
    def line(round: int, digest: str) -> dict[str, Any]:
        return {"round": round, "client": "a", "closing": False, "private_digest": digest}

    assert diagnose([line(1, "0" * 32), line(2, "0" * 32)], 2) == []
    (warning,) = diagnose([line(1, "0" * 32), line(2, "1" * 32), line(3, "1" * 32)], 2)
    assert warning.startswith("a: its private images changed between the rounds 1 and 2")
