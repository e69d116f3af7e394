"""Mutual learning without rounds: exact targets from the newest predictions, their age, resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from flwr.app import Message
from local_grid import FIRST_NODE, Played, play, trains

from fedmutual.results.directory import RunDirectory
from fedmutual.settings import SettingsError
from fedmutual.settings.compose import compose
from fedmutual.wire.codec import decode
from fedmutual.wire.orders import read_order

QUICK = (
    "strategy=mutual_async",
    "strategy.public_epochs=1",
    "strategy.min_steps=1",
    "strategy.divergence=own_peer",
    "evaluation.unseen_every=0",
    "strategy.updates=9",
    "emulation.speeds=[1,2,8]",
)
NAMES = ("client-0", "client-1", "client-2")
# speeds 1, 2, 8: client-1's first report comes at 2 s, after client-0's second; client-2's at 8 s
ARRIVALS = [
    ("client-0", 1), ("client-0", 2), ("client-1", 2), ("client-0", 3), ("client-0", 4), ("client-1", 4),
    ("client-0", 5), ("client-0", 6), ("client-1", 6),
]  # fmt: skip
LATE = [("client-0", 7), ("client-2", 8)]  # were on their way


class Killed(Exception):
    """The server is gone."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Played:
    played = play(tmp_path_factory.mktemp("mutual-async") / "run", *QUICK)
    assert played.error is None
    return played


def arrivals(run: Played) -> list[dict[str, Any]]:
    return [line for line in run.history if not line["closing"]]


def sent_predictions(run: Played) -> dict[tuple[str, int], np.ndarray]:
    """What every client predicted, by its own count."""
    found = {}
    for reply in run.grid.replies:
        report = reply.content["report"] if trains(reply) else {}
        if report and len(report["predictions"]):
            found[report["client"], report["round"]] = decode(report["predictions"], 24, 2, "float16", 1e-4)
    return found


def targets(run: Played) -> dict[tuple[str, int], np.ndarray | None]:
    orders = [(m.metadata.dst_node_id, read_order(m.content)) for m in run.grid.orders if trains(m)]
    return {(NAMES[node - FIRST_NODE], order.round): order.log_targets for node, order in orders}


def test_nobody_waits_for_the_slowest(run: Played) -> None:
    assert [(line["client"], line["clock"]) for line in arrivals(run)] == ARRIVALS + LATE
    assert [line.get("late", False) for line in arrivals(run)] == [False] * 9 + [True] * 2
    assert run.summary["status"] == "completed"


def test_a_target_is_the_newest_predictions_of_the_others(run: Played) -> None:
    """Followed through the order of the arrivals: what had come when each order went out."""
    sent, got = sent_predictions(run), targets(run)
    newest: dict[str, np.ndarray] = {}
    counts = dict.fromkeys(NAMES, 1)
    for name in NAMES:
        assert got[name, 1] is None
    for name, _ in ARRIVALS[:-1]:
        newest[name] = sent[name, counts[name]]
        counts[name] += 1
        peers = [values for peer, values in newest.items() if peer != name]
        target = got[name, counts[name]]
        if not peers:
            assert target is None
        else:
            np.testing.assert_allclose(target, np.mean(peers, axis=0), atol=2e-2)
    assert {name for name, target in got.items() if target is not None} >= {("client-0", 4), ("client-1", 2)}


def test_no_weight_travels(run: Played) -> None:
    for message in [*run.grid.orders, *run.grid.replies]:
        assert "model" not in message.content
    figures = run.summary["traffic"]
    assert figures["uplink_bytes"] < 20_000


def test_staleness_is_counted_in_the_receivers_own_reports(run: Played) -> None:
    """Of the predictions that the order's target was made from, when the order went out."""
    ages = [line["peer_staleness"] for line in arrivals(run)[:9]]
    assert ages == [
        {}, {}, {},  # had heard nobody when they were asked,
        {},  # nor had client-0, asked at 2 s, just before client-1 spoke
        {"client-1": 1},  # client-0, asked at 3 s: it has reported once since
        {"client-0": 1},  # client-1, asked at 2 s: its own report came after client-0's of 2 s
        {"client-1": 2},  # client-0, asked at 4 s, just before client-1 spoke again
        {"client-1": 1},
        {"client-0": 1},
    ]  # fmt: skip


def test_a_peer_that_is_too_stale_no_longer_teaches(tmp_path: Path) -> None:
    """Client-1 is four times slower: client-0 hears it for two of its own reports, then no more."""
    run = play(
        tmp_path,
        *QUICK,
        "emulation.speeds=[1,4]",
        "strategy.updates=10",
        "strategy.staleness_limit=2",
        clients=2,
    )
    assert run.error is None
    heard = {
        update: target is not None for (name, update), target in targets(run).items() if name == "client-0"
    }
    # client-1 speaks at 4 and 8 s, after client-0's 4th and 8th report; at once its 5th order is on its way
    assert heard == {
        1: False,
        2: False,
        3: False,
        4: False,
        5: False,
        6: True,
        7: True,
        8: False,
        9: False,
    } | {update: taught for update, taught in heard.items() if update > 9}
    endless = play(
        tmp_path / "endless", *QUICK, "emulation.speeds=[1,4]", "strategy.updates=10",
        "strategy.staleness_limit=null", clients=2,
    )  # fmt: skip
    assert targets(endless)["client-0", 8] is not None


def test_a_bad_report_is_rejected_by_name_and_its_client_goes_on(tmp_path: Path) -> None:
    def tamper(node: int, reply: Message) -> Message:
        report = reply.content["report"]
        if trains(reply) and node == FIRST_NODE + 1 and report["round"] == 1:
            report["predictions"] = report["predictions"][:-2]
        return reply

    run = play(tmp_path, *QUICK, tamper=tamper)
    assert run.error is None
    ((arrival, client, reason),) = run.rejections()
    assert (arrival, client) == (3, "client-1")
    assert "predictions" in reason
    assert targets(run)["client-0", 4] is None  # nothing of it was used
    assert targets(run)["client-0", 7] is not None  # what it sent next, at 5 s, was


@pytest.mark.parametrize(("moment", "arrival"), [("after", 3), ("before", 6), ("after", 9), ("before", 11)])
def test_killed_and_resumed_equals_undisturbed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Played, moment: str, arrival: int
) -> None:
    save = RunDirectory.save_checkpoint

    def killed(self: RunDirectory, meta: Any, arrays: Any) -> None:
        if moment == "after":
            save(self, meta, arrays)
        if meta["round"] == arrival:
            raise Killed
        if moment == "before":
            save(self, meta, arrays)

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "save_checkpoint", killed)
        assert isinstance(play(tmp_path / "run", *QUICK).error, Killed)
    resumed = play(tmp_path / "run", *QUICK, resume=True)
    assert resumed.error is None
    timeless = [
        [{k: v for k, v in line.items() if "seconds" not in k} for line in played.history]
        for played in (resumed, run)
    ]
    assert timeless[0] == timeless[1]
    for name in NAMES:
        first, second = (
            safetensors.torch.load_file(played.states() / name / "model.safetensors")
            for played in (resumed, run)
        )
        for key, value in first.items():
            assert torch.equal(value, second[key]), (name, key)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["public=kfold"], "public.schedule: kfold, but strategy=mutual_async"),
        (["public=sample"], "public.schedule: sample, but strategy=mutual_async"),
        (["strategy.staleness_limit=0"], "strategy.staleness_limit: 0 is below 1"),
        (["emulation.speeds=[]"], "emulation.speeds: "),
        (["strategy.divergence=published_code", "strategy.temperature=2"], "strategy.temperature: 2"),
    ],
)
def test_misuse_is_refused_before_anything_starts(overrides: list[str], problem: str) -> None:
    with pytest.raises(SettingsError) as refused:
        compose(["strategy=mutual_async", *overrides])
    assert str(refused.value).startswith(problem)


def test_its_recipe_is_that_of_mutual_learning() -> None:
    """So that the two can be compared: every setting they share has one value."""
    alone, rounds = vars(compose(["strategy=mutual_async"]).strategy), vars(compose().strategy)
    assert {key: alone[key] for key in rounds if key != "name"} == {
        k: v for k, v in rounds.items() if k != "name"
    }
