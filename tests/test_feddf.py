"""Server distillation: what the student learns from, what clients are taught, and that no weight travels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from local_grid import FIRST_NODE, Played, play, trains, undisturbed

from fedmutual.client.learner import Learner
from fedmutual.learning.aggregation import mean_of_scores
from fedmutual.learning.consensus import as_target
from fedmutual.settings import SettingsError
from fedmutual.settings.compose import compose
from fedmutual.wire.codec import decode

FEDDF = ("strategy=feddf", "strategy.digest_epochs=1", "strategy.student_epochs=2")


def said(run: Played, round: int) -> np.ndarray:
    """Log-probabilities [K, N, C] that the clients sent in a round."""
    reports = [m.content["report"] for m in run.grid.replies if trains(m)]
    return np.stack(
        [decode(r["predictions"], 24, 2, "float16", 1e-4) for r in reports if r["round"] == round]
    )


def on_the_wire(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float16).astype(np.float32)


def targets(run: Played, round: int) -> list[np.ndarray]:
    found = [order.log_targets for order in run.orders(round).values()]
    return [target for target in found if target is not None]


def test_the_student_learns_from_the_consensus_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labelled or not: clients may use labels, the student does not."""
    lessons: list[Any] = []
    taught: list[np.ndarray] = []
    step, predictions = Learner.separate_mutual_step, Learner.predictions

    def recorded(self: Learner, public: Any, epochs: int) -> None:
        if self.client == "server":
            lessons.append((public, epochs))
        step(self, public, epochs)

    def heard(self: Learner) -> np.ndarray:
        result = predictions(self)
        if self.client == "server":
            taught.append(result)
        return result

    monkeypatch.setattr(Learner, "separate_mutual_step", recorded)
    monkeypatch.setattr(Learner, "predictions", heard)
    run = play(tmp_path, *FEDDF, "rounds=2", "public.labelled=true")
    assert run.error is None
    assert [(epochs, public.labels, public.divergence) for public, epochs in lessons] == [
        (2, None, "peer_own")
    ] * 2
    for round, (public, _) in enumerate(lessons, start=1):
        consensus = mean_of_scores(said(run, round))
        np.testing.assert_array_equal(public.log_target.numpy(), consensus)
        np.testing.assert_array_equal(public.entropies.numpy(), as_target(consensus).entropies)
        sent = targets(run, round + 1)
        assert len(sent) == 3
        for target in sent:  # the student's predictions, not the consensus
            np.testing.assert_array_equal(target, on_the_wire(taught[round - 1]))
            assert not np.array_equal(target, on_the_wire(consensus))


def test_the_student_comes_nearer_to_the_consensus(tmp_path: Path) -> None:
    """KL(consensus || student) by hand, from what was sent and what came back."""

    def divergence(epochs: int) -> float:
        run = play(tmp_path / str(epochs), *FEDDF[:2], f"strategy.student_epochs={epochs}", "rounds=1")
        p, q = mean_of_scores(said(run, 1)), targets(run, 2)[0]
        return float((np.exp(p) * (p - q)).sum(axis=1).mean())

    assert divergence(20) < divergence(1)


def test_clients_may_digest_the_consensus_itself(tmp_path: Path) -> None:
    run = play(tmp_path, *FEDDF, "strategy.teacher=consensus", "rounds=1")
    for target in targets(run, 2):
        np.testing.assert_array_equal(target, on_the_wire(mean_of_scores(said(run, 1))))


def test_no_weight_travels() -> None:
    run = undisturbed(*FEDDF)
    assert not any("model" in m.content for m in (*run.grid.orders, *run.grid.replies) if trains(m))
    assert run.summary["traffic"]["uplink_bytes"] < 20_000
    assert (run.path / "global_model" / "model.safetensors").stat().st_size > 200_000


def test_its_accuracy_is_followed_through_the_rounds(tmp_path: Path) -> None:
    run = play(tmp_path, *FEDDF, "rounds=2", "evaluation.unseen_limit=null")
    last = {run.line(2, name)["global_unseen_accuracy"] for name in run.summary["clients"]}
    assert last == {run.summary["global_model"]["unseen_accuracy"]}


def test_a_bad_report_is_rejected_by_name_and_not_taught(tmp_path: Path) -> None:
    def tamper(node: int, reply: Any) -> Any:
        report = reply.content["report"]
        if trains(reply) and node == FIRST_NODE and report["round"] == 1:
            report["predictions"] = report["predictions"][:-2]
        return reply

    run = play(tmp_path, *FEDDF, "strategy.teacher=consensus", "rounds=2", tamper=tamper)
    assert run.error is None
    ((round, client, reason),) = run.rejections()
    assert (round, client) == (1, "client-0")
    assert "predictions" in reason
    reports = [
        m.content["report"] for m in run.grid.replies if trains(m) and m.content["report"]["round"] == 1
    ]
    good = [decode(r["predictions"], 24, 2, "float16", 1e-4) for r in reports if r["client"] != "client-0"]
    np.testing.assert_array_equal(targets(run, 2)[0], on_the_wire(mean_of_scores(np.stack(good))))


def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    whole = undisturbed(*FEDDF)

    def die(node: int, order: Any) -> None:
        if trains(order) and order.content["order"]["round"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        play(tmp_path / "run", *FEDDF, before=die)
    resumed = play(tmp_path / "run", *FEDDF, resume=True)
    assert resumed.error is None
    for key in ("clients", "unseen", "traffic", "global_model"):
        assert resumed.summary[key] == whole.summary[key]
    one, other = (
        torch.from_numpy(np.fromfile(r.path / "global_model" / "model.safetensors", np.uint8))
        for r in (whole, resumed)
    )
    assert torch.equal(one, other)


def test_misuse_is_refused_before_anything_starts() -> None:
    with pytest.raises(SettingsError, match=r"strategy\.teacher: 'both' is none of student, consensus"):
        compose(["strategy=feddf", "strategy.teacher=both"])
