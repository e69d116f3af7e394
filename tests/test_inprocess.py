"""The in-process engine: orders carried out one at a time, runs that end well, badly and half-way.

That it gives the same bits as Flower's simulation is tested where there is one: test_end_to_end.py.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from local_grid import TINY
from small_data import write_images

from fedmutual.results.directory import read_history
from fedmutual.settings import SettingsError
from fedmutual.simulation.inprocess import FIRST_NODE, InProcessGrid, run_inprocess

OVERRIDES = [*TINY, "rounds=2"]


class Answering:
    """A ClientApp that says which order it was given, and keeps a list of them."""

    def __init__(self) -> None:
        self.app = ClientApp()
        self.seen: list[str] = []
        self.app.query("ask")(self.answer)

    def answer(self, message: Message, context: Context) -> Message:
        said = str(message.content["order"]["said"])  # type: ignore[index]
        self.seen.append(said)
        if said == "fail":
            raise RuntimeError("no such thing")
        return Message(RecordDict({"reply": ConfigRecord({"said": said})}), reply_to=message)


def order(node: int, said: str) -> Message:
    return Message(RecordDict({"order": ConfigRecord({"said": said})}), node, "query.ask")


def said(replies: Any) -> list[str]:
    return [reply.content["reply"]["said"] for reply in replies]


@pytest.fixture
def client() -> Answering:
    return Answering()


@pytest.fixture
def grid(client: Answering) -> InProcessGrid:
    return InProcessGrid(client.app, 3, {})


def test_images_that_change_between_two_runs_are_read_again(tmp_path: Path) -> None:
    for seed, (part, name) in enumerate(itertools.product(("train", "public"), "ab")):
        write_images(tmp_path / "data" / part / name, 8, seed)
    kept = [o for o in TINY if not o.startswith(("data.", "public.", "cache_dir", "rounds"))]
    source = [
        "data=folder",
        f"data.root={tmp_path}/data",
        "data.image_size=20",
        f"cache_dir={tmp_path}/cache",
    ]
    overrides = [*kept, *source, "rounds=1", "privacy.metrics=full"]
    digests = []
    for run in ("first", "second"):
        assert run_inprocess(overrides, tmp_path / run, num_clients=2) == 0
        history = read_history(tmp_path / run)
        digests.append({line["private_digest"] for line in history if "private_digest" in line})
        for name in "ab":
            write_images(tmp_path / "data" / "train" / name, 8, seed=100 + ord(name))
    assert digests[0]
    assert not digests[0] & digests[1]


def test_an_order_is_carried_out_when_its_reply_is_asked_for(grid: InProcessGrid, client: Answering) -> None:
    ids = list(grid.push_messages([order(FIRST_NODE + i, name) for i, name in enumerate("abc")]))
    assert client.seen == []
    assert said(grid.pull_messages([ids[2]])) == ["c"]  # whoever the strategy says comes first
    assert client.seen == ["c"]
    assert said(grid.pull_messages(ids)) == ["a"]  # one order a call, the oldest
    assert said(grid.pull_messages(ids)) == ["b"]
    assert list(grid.pull_messages(ids)) == []
    assert client.seen == ["c", "a", "b"]


def test_all_replies_at_once(grid: InProcessGrid) -> None:
    orders = [order(FIRST_NODE + i, name) for i, name in enumerate("abc")]
    assert said(grid.send_and_receive(orders)) == ["a", "b", "c"]


def test_what_the_sender_changes_later_does_not_arrive(grid: InProcessGrid) -> None:
    message = order(FIRST_NODE, "before")
    ids = list(grid.push_messages([message]))
    message.content["order"]["said"] = "after"  # type: ignore[index]
    assert said(grid.pull_messages(ids)) == ["before"]


def test_an_exception_is_an_error_reply_as_flowers(grid: InProcessGrid) -> None:
    (reply,) = grid.send_and_receive([order(FIRST_NODE, "fail")])
    assert reply.has_error()
    assert "no such thing" in str(reply.error.reason)


def test_a_node_that_does_not_exist_and_a_generator(grid: InProcessGrid) -> None:
    assert list(grid.push_messages([order(1, "lost")])) == [""]
    with pytest.raises(TypeError, match="generator"):
        grid.push_messages(order(FIRST_NODE, name) for name in "ab")


def test_a_run_that_completes_and_one_that_fails(tmp_path: Path) -> None:
    assert run_inprocess(OVERRIDES, tmp_path / "good", num_clients=2) == 0
    summary = json.loads((tmp_path / "good" / "summary.json").read_text())
    assert (summary["status"], len(summary["clients"])) == ("completed", 2)
    assert len(list((tmp_path / "good" / "clients").glob("*/*/model.safetensors"))) == 2
    assert run_inprocess([*OVERRIDES, "device=cuda:99"], tmp_path / "bad", num_clients=2) == 1
    summary = json.loads((tmp_path / "bad" / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert "client-0" in summary["reason"]


def test_a_folder_without_a_checkpoint_starts_again(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "history.jsonl").write_text('{"round": 1, "client": "old"}\n')
    assert run_inprocess(OVERRIDES, tmp_path / "run", num_clients=2) == 0
    assert {line["client"] for line in read_history(tmp_path / "run")} == {"client-0", "client-1"}


def test_a_bad_setting_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="rounds: 0 is below 1"):
        run_inprocess([*OVERRIDES, "rounds=0"], tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
