"""What goes wrong on the way: it is said by name, it costs one round at most, and the others go on."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from local_grid import FIRST_NODE, LocalGrid, Played, play, trains, undisturbed

import fedmutual.client.answer
import fedmutual.engine.server
from fedmutual.client.learner import Learner
from fedmutual.client.state import StateFolder
from fedmutual.learning.consensus import MeanConsensus
from fedmutual.wire.codec import decode
from fedmutual.wire.orders import read_order
from fedmutual.wire.records import METRICS, MODEL, REPORT

EAGER = "strategy.burn_in=0"
QUICK = (
    "exchange.round_timeout=0.05"  # clients work while they are pushed to: only lost replies are waited for
)
SECOND = FIRST_NODE + 1


def changed(part: str = REPORT, /, **changes: Any) -> Callable[[RecordDict], None]:
    """Change entries of a report (underscores for hyphens); None takes an entry out."""

    def change(content: RecordDict) -> None:
        for key, value in changes.items():
            name = key.replace("_", "-")
            if value is None:
                del content[part][name]
            else:
                content[part][name] = value

    return change


def damage(node: int, round: int, change: Callable[[RecordDict], None]) -> Any:
    """A tamper hook that changes one node's report in one round."""

    def tamper(source: int, reply: Message) -> Message:
        if source == node and trains(reply) and reply.content[REPORT]["round"] == round:
            change(reply.content)
        return reply

    return tamper


def halves(*values: float) -> bytes:
    return np.array(values, "<f2").tobytes()


def no_metrics(content: RecordDict) -> None:
    del content[METRICS]


def no_report(content: RecordDict) -> None:
    content[REPORT] = MetricRecord({"round": 2})


def a_false_model(content: RecordDict) -> None:
    content[MODEL] = ConfigRecord({})


BAD: dict[str, tuple[Callable[[RecordDict], None], str]] = {
    "protocol": (changed(protocol=99), "protocol 99, not 2"),
    "name": (changed(client=""), "client: '' is no name of a client"),
    "another's name": (changed(client="client-0"), "the report is client-0's, but this node is client-2"),
    "round": (changed(round=1), "round: 1, not 5"),
    "digest": (changed(public_digest="0123"), "public-digest: 0123, .* give this site the same"),
    "dtype": (changed(dtype="float64"), "dtype: float64, not float16"),
    "size": (changed(predictions=halves(0, 0)), "predictions: 4 bytes, not 24 x 1"),
    "NaN": (changed(predictions=halves(*[np.nan] * 24)), "predictions: a value is not finite"),
    "inf": (changed(predictions=halves(*[np.inf] * 24)), "predictions: a value is not finite"),
    "range": (changed(predictions=halves(*[15] * 24)), "predictions: values from 15 to 15, outside"),
    "no predictions": (changed(predictions=None), "predictions: missing"),
    "loss": (changed(METRICS, train_loss=float("nan")), "train-loss: nan is not finite"),
    "count": (changed(METRICS, num_examples=0.5), "num-examples: 0.5 is no count"),
    "recall": (changed(METRICS, validation_recall=0.5), "validation-recall: 0.5 is no list of 2"),
    "no metrics": (no_metrics, "metrics: missing"),
    "no report": (no_report, "report: the message holds no such record"),
    "model": (a_false_model, "model: no arrays"),
}


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> Played:
    """A run with another bad report in every round from the second on, from one client after the other."""

    def tamper(source: int, reply: Message) -> Message:
        for position, (change, _) in enumerate(BAD.values()):
            if source == FIRST_NODE + position % 3:
                reply = damage(source, position + 2, change)(source, reply)
        return reply

    rounds = f"rounds={len(BAD) + 2}"
    run = play(tmp_path_factory.mktemp("spoilt"), EAGER, rounds, "evaluation.unseen_every=0", tamper=tamper)
    assert run.summary["status"] == "completed", run.summary["reason"]
    return run


def test_nothing_but_the_bad_reports_is_rejected(spoilt: Played) -> None:
    bad = [(position + 2, f"client-{position % 3}") for position in range(len(BAD))]
    assert [(round, client) for round, client, _ in spoilt.rejections()] == bad
    clients = spoilt.summary["clients"]
    assert [clients[f"client-{i}"]["rejected"] for i in range(3)] == [6, 6, 5]


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_report_is_rejected_by_name_and_the_client_is_back_next_round(
    spoilt: Played, kind: str
) -> None:
    position = list(BAD).index(kind)
    bad, name = position + 2, f"client-{position % 3}"
    ((_, client, reason),) = [rejection for rejection in spoilt.rejections() if rejection[0] == bad]
    assert client == name
    assert re.search(BAD[kind][1], reason), reason
    assert "train_loss" not in spoilt.line(bad, name)
    assert spoilt.line(bad, name)["uplink_bytes"] > 0  # it travelled all the same
    assert "rejected" not in spoilt.line(bad + 1, name)
    # its predictions are in nobody's target: those of the round before go on teaching
    sent = sent_in(spoilt, bad)
    assert set(sent) == {"client-0", "client-1", "client-2"} - {name}
    consensus = MeanConsensus(sent | {name: sent_in(spoilt, bad - 1)[name]}, "own_peer")
    for other in range(3):
        expected = consensus.target(f"client-{other}")
        assert expected is not None
        targets = spoilt.orders()[FIRST_NODE + other, bad + 1].log_targets
        np.testing.assert_allclose(targets, expected.log_probabilities, rtol=2**-10, atol=1e-4)


def sent_in(run: Played, round: int) -> dict[str, np.ndarray]:
    """Predictions by client, from the captured replies of a round that were accepted."""
    accepted = {h["node_id"]: h["client"] for h in run.history if h["round"] == round and "rejected" not in h}
    reports = {
        reply.metadata.src_node_id: reply.content[REPORT]
        for reply in reversed(run.grid.replies)  # the first counts: a later one may be tampered
        if trains(reply) and reply.content[REPORT].get("round") == round
    }
    return {
        name: decode(reports[node]["predictions"], 24, 2, "float16", 1e-4) for node, name in accepted.items()
    }


def test_unseen_predictions_of_a_wrong_size_cost_the_closing_figures_only(tmp_path: Path) -> None:
    run = play(tmp_path, tamper=damage(SECOND, 4, changed(unseen_predictions=halves(0.5))))
    assert run.summary["status"] == "completed"
    assert run.rejections() == [(4, "client-1", "unseen-predictions: 2 bytes, not 40 x 1 values of float16")]
    assert not run.summary["clients"]["client-1"]["finished"]
    assert run.summary["clients"]["client-0"]["finished"]


# ---------------------------------------------------------------------------------------------------
# Clients that fail


def failing(round: int, *nodes: int) -> Any:
    """A hook: the ClientApp itself breaks down, before fedmutual could say anything."""

    def before(node: int, order: Message) -> None:
        if trains(order) and node in nodes and read_order(order.content).round == round:
            raise RuntimeError("the disk is full")

    return before


@pytest.mark.parametrize("round", [1, 2, 4])
def test_a_client_that_raises_costs_its_own_report(tmp_path: Path, round: int) -> None:
    run = play(tmp_path, EAGER, before=failing(round, SECOND))
    assert run.summary["status"] == "completed"
    ((where, client, reason),) = run.rejections()
    assert where == round
    assert client == (None if round == 1 else "client-1")  # in round 1 nobody knows yet who it is
    assert "the disk is full" in reason
    assert "Traceback" not in reason
    if round < 4:
        assert "rejected" not in run.line(round + 1, "client-1")


def test_an_error_inside_the_client_is_told_under_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Learner.local_training

    def local_training(self: Learner) -> None:
        if self.client == "client-1":
            raise MemoryError("no memory left")
        training(self)

    monkeypatch.setattr(Learner, "local_training", local_training)
    run = play(tmp_path, "rounds=1")
    assert run.rejections()[0][2] == "client-1: MemoryError: no memory left"
    assert StateFolder(run.states().parent, run.states().name, "client-0").load() is not None


def test_without_a_quorum_the_run_fails_with_everyones_reason(tmp_path: Path) -> None:
    def tamper(node: int, reply: Message) -> Message:
        return damage(FIRST_NODE, 2, changed(round=7))(node, reply)

    run = play(tmp_path, tamper=tamper, before=failing(2, SECOND))
    assert run.error is not None
    assert run.summary["status"] == "failed"
    reason = run.summary["reason"]
    assert "round 2: 1 good reports, 2 are needed (exchange.min_clients)" in reason
    assert "client-0: round: 7, not 2" in reason
    assert "client-1: " in reason
    assert "the disk is full" in reason
    assert "client-2" not in reason
    assert [(r, c) for r, c, _ in run.rejections()] == [(2, "client-0"), (2, "client-1")]  # also written down
    assert run.summary["rounds_completed"] >= 1


def test_min_clients_is_the_quorum(tmp_path: Path) -> None:
    assert play(tmp_path / "1", "exchange.min_clients=1", before=failing(2, 1000, 1001)).error is None
    strict = play(tmp_path / "3", "exchange.min_clients=3", before=failing(2, SECOND))
    assert "2 good reports, 3 are needed" in strict.summary["reason"]


def test_a_run_that_nobody_joins_fails_with_the_remedy(tmp_path: Path) -> None:
    def prepare(grid: LocalGrid) -> None:
        grid.offline = {SECOND, SECOND + 1}

    run = play(tmp_path, "exchange.join_timeout=0.05", prepare=prepare)
    assert run.summary["status"] == "failed"
    assert run.summary["reason"].startswith("ExchangeError: 1 of 3 clients connected within 0.05 s")


def test_clients_that_are_gone_are_named_when_the_quorum_fails(tmp_path: Path) -> None:
    grids: list[LocalGrid] = []

    def tamper(node: int, reply: Message) -> Message:
        if node == FIRST_NODE + 2 and reply.content[REPORT]["round"] == 1:
            grids[0].offline = {SECOND, SECOND + 1}
        return reply

    run = play(tmp_path, prepare=grids.append, tamper=tamper)
    assert run.summary["status"] == "failed"
    assert "client-1: not connected | client-2: not connected" in run.summary["reason"]


def test_a_reply_that_never_comes_costs_the_rounds_time(tmp_path: Path) -> None:
    def tamper(node: int, reply: Message) -> Message | None:
        return None if node == SECOND and reply.content[REPORT]["round"] == 2 else reply

    run = play(tmp_path, EAGER, QUICK, tamper=tamper)
    assert run.summary["status"] == "completed"
    ((round, client, reason),) = run.rejections()
    assert (round, client) == (2, "client-1")
    assert "exchange.round_timeout" in reason
    assert "rejected" not in run.line(3, "client-1")


# ---------------------------------------------------------------------------------------------------
# Clients that leave and come


def after_round(round: int, last_node: int, act: Any) -> tuple[Any, Any]:
    """Hooks that act on the grid when the last report of a round is in."""
    grids: list[LocalGrid] = []

    def tamper(node: int, reply: Message) -> Message:
        if trains(reply) and node == last_node and reply.content[REPORT]["round"] == round:
            act(grids[0])
        return reply

    return grids.append, tamper


def test_a_client_that_is_offline_for_two_rounds_comes_back(tmp_path: Path) -> None:
    grids: list[LocalGrid] = []

    def tamper(node: int, reply: Message) -> Message:
        if node == FIRST_NODE + 2:
            round = reply.content[REPORT]["round"]
            grids[0].offline = {SECOND} if round in (1, 2) else set()
        return reply

    run = play(tmp_path, EAGER, "rounds=5", prepare=grids.append, tamper=tamper)
    assert run.summary["status"] == "completed"
    rounds = [line["round"] for line in run.history if line["client"] == "client-1"]
    assert rounds == [1, 4, 5, 6]
    assert run.rejections() == []
    # what it is taught when it comes back is the mean of those who were there
    sent = sent_in(run, 3)
    assert set(sent) == {"client-0", "client-2"}
    expected = (sent["client-0"] + sent["client-2"]) / 2
    np.testing.assert_allclose(run.orders()[SECOND, 4].log_targets, expected, rtol=2**-10, atol=1e-4)
    assert run.line(4, "client-1")["kl_before"] >= 0


@pytest.mark.parametrize("round", [1, 2, 3])
def test_a_restarted_node_has_a_new_id_and_the_same_client(tmp_path: Path, round: int) -> None:
    prepare, tamper = after_round(round, FIRST_NODE + 2, lambda grid: grid.rename_node(SECOND, 7))
    separate = (
        "strategy.phase=separate",
        "strategy.mutual_epochs=1",
    )  # so that the closing order has targets
    run = play(tmp_path / "renamed" / "run", EAGER, *separate, prepare=prepare, tamper=tamper)
    same = undisturbed(EAGER, *separate)
    assert run.summary["status"] == "completed"
    assert run.line(round + 1, "client-1")["node_id"] == 7
    for r in range(round + 1, 5):
        np.testing.assert_array_equal(run.orders()[7, r].log_targets, same.orders()[SECOND, r].log_targets)
    assert len(list(run.states().iterdir())) == 3
    assert figures(run) == figures(same)


def figures(run: Played) -> list[dict[str, Any]]:
    """History without what differs from run to run."""
    lines = [{k: v for k, v in h.items() if "seconds" not in k and k != "node_id"} for h in run.history]
    return sorted(lines, key=lambda line: (line["round"], line["client"]))


def test_the_second_node_with_a_name_is_rejected_from_the_first_round_on(tmp_path: Path) -> None:
    run = play(tmp_path, "rounds=2", node_config=lambda i: {"partition-id": min(i, 1), "num-partitions": 2})
    assert run.summary["status"] == "completed"
    problem = f"nodes {SECOND} and {SECOND + 1} are both named client-1: give every node"
    (rejected,) = [line for line in run.history if "rejected" in line and line["round"] == 1]
    assert (rejected["node_id"], rejected["rejected"].startswith(problem)) == (SECOND + 1, True)
    assert sorted(run.summary["clients"]) == ["client-0", "client-1"]


def test_a_newcomer_with_a_taken_name_is_refused_and_the_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = {"partition-id": 1, "num-partitions": 3}
    prepare, tamper = after_round(1, FIRST_NODE + 2, lambda grid: grid.add_node(5, config))
    with caplog.at_level(logging.ERROR):
        run = play(tmp_path / "disturbed" / "run", EAGER, prepare=prepare, tamper=tamper)
    assert run.summary["status"] == "completed"
    assert "node 5 gets no order: nodes 1001 and 5 are both named client-1" in caplog.text
    assert 5 not in {node for node, _ in run.orders()}
    assert figures(run) == figures(undisturbed(EAGER))


def test_a_restarted_node_takes_over_when_its_old_id_is_seen_to_be_dead(tmp_path: Path) -> None:
    grids: list[LocalGrid] = []

    def tamper(node: int, reply: Message) -> Message:
        if trains(reply) and node == FIRST_NODE + 2:
            round = reply.content[REPORT]["round"]
            if round == 1:  # restarted: the old id is still listed
                grids[0].add_node(5, {"partition-id": 1, "num-partitions": 3})
            if round == 2:
                grids[0].offline = {SECOND}
        return reply

    run = play(tmp_path / "disturbed" / "run", EAGER, prepare=grids.append, tamper=tamper)
    assert run.summary["status"] == "completed"
    assert [line["node_id"] for line in run.history if line["client"] == "client-1"] == [SECOND, SECOND, 5, 5]
    assert figures(run) == figures(undisturbed(EAGER))


def test_a_newcomer_that_does_not_say_who_it_is_cannot_take_a_name(tmp_path: Path) -> None:
    config = {"partition-id": 1, "num-partitions": 3, "state-dir": str(tmp_path / "elsewhere")}
    prepare, added = after_round(1, FIRST_NODE + 2, lambda grid: grid.add_node(5, config))

    def tamper(node: int, reply: Message) -> Message | None:
        return added(node, reply) if trains(reply) else None

    run = play(tmp_path / "run", EAGER, QUICK, prepare=prepare, tamper=tamper)
    assert run.summary["status"] == "completed"
    assert [round for round, _, _ in run.rejections()] == [2, 3, 4]
    assert all("nodes 1001 and 5 are both named client-1" in reason for _, _, reason in run.rejections())
    assert [
        line["node_id"] for line in run.history if line["client"] == "client-1" and "rejected" not in line
    ] == [SECOND] * 4


def test_a_late_joiner_is_taught_and_takes_part(tmp_path: Path) -> None:
    config = {"partition-id": 2, "num-partitions": 3}
    prepare, tamper = after_round(1, SECOND, lambda grid: grid.add_node(5, config))
    share = {"node_config": lambda i: {"partition-id": i, "num-partitions": 3}}
    run = play(tmp_path, EAGER, clients=2, prepare=prepare, tamper=tamper, **share)
    assert run.summary["status"] == "completed"
    assert [line["round"] for line in run.history if line["client"] == "client-2"] == [2, 3, 4]
    sent = sent_in(run, 1)
    expected = (sent["client-0"] + sent["client-1"]) / 2
    np.testing.assert_allclose(run.orders()[5, 2].log_targets, expected, rtol=2**-10, atol=1e-4)
    assert set(sent_in(run, 2)) == {"client-0", "client-1", "client-2"}
    assert set(run.summary["clients"]) == {"client-0", "client-1", "client-2"}


# ---------------------------------------------------------------------------------------------------
# The public set


def test_a_changed_public_set_is_refused_by_name_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = fedmutual.client.answer.load_site

    def load_site(settings: Any, partition: Any, *more: Any) -> Any:
        site = load(settings, partition, *more)
        if partition == (1, 3):
            return dataclasses.replace(site, public=dataclasses.replace(site.public, digest="0123"))
        return site

    monkeypatch.setattr(fedmutual.client.answer, "load_site", load_site)
    fedmutual.client.answer._SITES.clear()
    try:
        run = play(tmp_path)
    finally:
        fedmutual.client.answer._SITES.clear()
    assert run.summary["status"] == "completed"
    rejected = run.rejections()
    assert [round for round, _, _ in rejected] == [1, 2, 3, 4]
    for _, _, reason in rejected:
        assert reason.startswith(
            "client-1: MessageError: public set: this site's digest is 0123, the server's "
        )
        assert "copy the server's" in reason
    assert {name for _, name, _ in rejected[1:]} == {"client-1"}


# ---------------------------------------------------------------------------------------------------
# The server itself


def test_a_server_that_fails_leaves_its_reason_and_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_shared(*_: Any) -> None:
        raise OSError("the photographs are gone")

    monkeypatch.setattr(fedmutual.engine.server, "load_shared", load_shared)
    run = play(tmp_path)
    assert isinstance(run.error, OSError)
    assert (run.summary["status"], run.summary["reason"]) == ("failed", "OSError: the photographs are gone")
    assert run.summary["seconds"]["total"] > 0
    assert run.grid.orders == []
