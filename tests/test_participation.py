"""Rounds that not everyone takes part in, clients that come late, peers that lie: whole runs, small."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from local_grid import FIRST_NODE, Played, play

from fedmutual.engine.names import Names, Node
from fedmutual.engine.roster import Roster
from fedmutual.settings import ParticipationSettings


def reported(run: Played, round: int) -> set[str]:
    return {line["client"] for line in run.history if line["round"] == round and "rejected" not in line}


def roster(fraction: float, names: dict[int, str], *absent: str) -> Roster:
    known = Names()
    for node, name in names.items():
        assert known.claim(Node(node), name, {}) == ""
    return Roster(None, ParticipationSettings(fraction=fraction, absent=list(absent)), seed=3, names=known)


def test_the_same_clients_are_chosen_whatever_their_nodes_are_called() -> None:
    first = roster(0.5, {1: "a", 2: "b", 3: "c", 4: "d"})
    second = roster(0.5, {9: "d", 8: "c", 7: "b", 6: "a"})
    for round in range(1, 8):
        one = {first.name(node) for node in first.taking_part(round, [1, 2, 3, 4])}
        two = {second.name(node) for node in second.taking_part(round, [6, 7, 8, 9])}
        assert one == two
        assert len(one) == 2
    assert len({tuple(first.taking_part(round, [1, 2, 3, 4])) for round in range(1, 8)}) > 1


def test_a_share_is_rounded_up_and_absent_ones_are_not_chosen() -> None:
    five = roster(0.5, {i: f"c{i}" for i in range(5)}, "c0:1-1", "c1:1-1")
    assert five.taking_part(1, list(range(5))) == [2, 3, 4]
    assert len(five.taking_part(2, list(range(5)))) == 3


def test_half_of_the_clients_a_round(tmp_path: Path) -> None:
    run = play(tmp_path, "participation.fraction=0.5", "rounds=4", clients=4)
    assert run.error is None
    assert [len(reported(run, round)) for round in (1, 2, 3, 4)] == [2, 2, 2, 2]
    assert len(reported(run, 5)) == 4  # the closing order goes to everyone
    assert run.summary["status"] == "completed"


def test_who_comes_late_learns_from_the_consensus_at_once(tmp_path: Path) -> None:
    run = play(tmp_path, "participation.absent=[client-2:1-2]", "rounds=3")
    assert run.error is None
    assert [reported(run, round) for round in (1, 2, 3)] == [
        {"client-0", "client-1"}, {"client-0", "client-1"}, {"client-0", "client-1", "client-2"},
    ]  # fmt: skip
    order = run.orders(3)[FIRST_NODE + 2, 3]
    assert order.log_targets is not None
    assert len(order.target_indices) == 24


def test_an_absent_peer_goes_on_teaching_while_its_predictions_hold(tmp_path: Path) -> None:
    away = "participation.absent=[client-0:2-4]"
    kept = play(tmp_path / "kept", away, "strategy.staleness_limit=2", "rounds=4")
    dropped = play(tmp_path / "dropped", away, "strategy.staleness_limit=0", "rounds=4")

    def targets(run: Played, round: int) -> np.ndarray:
        found = run.orders(round)[FIRST_NODE + 1, round].log_targets
        assert found is not None
        return found

    assert np.array_equal(targets(kept, 2), targets(dropped, 2))
    assert not np.allclose(targets(kept, 3), targets(dropped, 3))  # client-0's of round 1 are in it
    other = kept.orders(4)[FIRST_NODE + 2, 4]
    assert other.log_targets is not None


def test_predictions_of_other_images_are_not_kept(tmp_path: Path) -> None:
    run = play(tmp_path, "public=sample", "participation.absent=[client-0:2-2]", "rounds=3")
    assert run.error is None
    assert run.summary["status"] == "completed"


@pytest.mark.parametrize("attack", ["label_flip", "random", "constant", "one_hot"])
def test_a_hostile_client_learns_like_all_and_is_not_counted(tmp_path: Path, attack: str) -> None:
    run = play(tmp_path, f"attack.name={attack}", "attack.clients=[client-1]", "consensus=median", "rounds=2")
    assert run.error is None
    clients = run.summary["clients"]
    assert clients["client-1"]["hostile"] is True
    honest = [clients[name]["unseen_accuracy"] for name in ("client-0", "client-2")]
    assert run.summary["unseen"]["mean_accuracy"] == pytest.approx(sum(honest) / 2)
    assert run.summary["unseen"]["worst_accuracy"] == min(honest)
    assert run.rejections() == []  # what it sends is well-formed


def test_one_hot_is_the_class_that_the_consensus_finds_least_probable(tmp_path: Path) -> None:
    run = play(tmp_path, "attack.name=one_hot", "attack.clients=[client-1]", "consensus=median", "rounds=3")
    from fedmutual.wire.codec import decode

    sent = [r.content["report"] for r in run.grid.replies if "report" in r.content]
    (report,) = [r for r in sent if r["client"] == "client-1" and r["round"] == 3]
    lies = decode(report["predictions"], 24, 2, "float16", 1e-4)
    known = run.orders(3)[FIRST_NODE + 1, 3].log_targets
    assert known is not None
    assert np.array_equal(lies.argmax(axis=1), known.argmin(axis=1))


def test_a_client_without_peers_is_told(tmp_path: Path) -> None:
    run = play(tmp_path / "mutual", "rounds=1", clients=1)
    assert run.summary["warnings"][0].startswith("one client has no peers: strategy=mutual exchanges nothing")
    run = play(tmp_path / "local", "strategy=local", "rounds=1", clients=1)
    assert not [warning for warning in run.summary["warnings"] if "peers" in warning]
