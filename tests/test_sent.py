"""A site's record of what has left it: complete, in order, bounded, and readable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from local_grid import Played, enter_run, play

import fedmutual.client.sent as sent_record
from fedmutual.cli import main
from fedmutual.client import answer
from fedmutual.client.sent import FOLDER, Sent, SentRecord, described, record_reply, records_in
from fedmutual.doctor.site import what_leaves
from fedmutual.settings import SettingsError
from fedmutual.settings.compose import compose
from fedmutual.wire.records import payload_bytes

LINE = Sent("2026-01-01T00:00:00+00:00", "ana", "run-1", 3, "report", ["predictions"], 1200, "ab" * 32)


def exchange(kind: str = "train.round", **question: Any) -> tuple[Message, Message]:
    """An order and its reply."""
    enter_run()
    order = Message(RecordDict({"order": ConfigRecord(question)}), 5, kind)
    return order, Message(RecordDict({"report": ConfigRecord({"client": "ana"})}), reply_to=order)


def test_lines_are_kept_in_order_and_for_the_owner_alone(tmp_path: Path) -> None:
    record = SentRecord(tmp_path, "ana")
    for number in range(3):
        record.add(Sent(**{**vars(LINE), "round": number}))
    assert [line.round for line in record.read()] == [0, 1, 2]
    assert record.path.stat().st_mode & 0o777 == 0o600
    assert [each.path for each in records_in(tmp_path)] == [record.path]


def test_the_record_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sent_record, "MOST_BYTES", 1000)
    record = SentRecord(tmp_path, "ana")
    for number in range(40):
        record.add(Sent(**{**vars(LINE), "round": number}))
    files = list((tmp_path / FOLDER).iterdir())
    assert sorted(file.name for file in files) == ["ana.1.jsonl", "ana.jsonl"]
    assert all(file.stat().st_size <= 1000 for file in files)
    rounds = [line.round for line in record.read()]
    assert rounds == list(range(40 - len(rounds), 40))
    assert len(records_in(tmp_path)) == 1


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path: Path) -> None:
    record = SentRecord(tmp_path, "ana")
    record.add(LINE)
    with record.path.open("ab") as file:
        file.write(b'{"time": "2026')
    assert list(record.read()) == [LINE]


def test_what_is_recorded_of_a_report() -> None:
    order, reply = exchange(run="run-1", round=3)
    line = described(order, reply, "ana")
    assert (line.client, line.run, line.round, line.kind) == ("ana", "run-1", 3, "report")
    assert line.holds == ["client"]
    assert line.bytes == payload_bytes(reply.content)
    assert line.sha256 == reply.content.object_id
    assert len(bytes.fromhex(line.sha256)) == 32


def test_only_a_simulation_keeps_no_record(tmp_path: Path) -> None:
    order, reply = exchange()
    record_reply(order, reply, "ana", {"trust-run": "true", "state-dir": str(tmp_path)})
    assert list(tmp_path.iterdir()) == []
    record_reply(order, reply, "ana", {"state-dir": str(tmp_path)})
    assert len(list(SentRecord(tmp_path, "ana").read())) == 1


def test_what_cannot_be_recorded_is_not_sent(tmp_path: Path) -> None:
    (tmp_path / FOLDER).write_text("no folder")
    grid = play_site(tmp_path, rounds=1).grid
    assert grid.replies
    assert all(reply.has_error() for reply in grid.replies if reply.metadata.message_type == "train.round")
    assert "cannot record what it sends" in str(grid.replies[-1].error.reason)


def play_site(states: Path, rounds: int) -> Played:
    """A run of three sites that do not trust it."""
    own = {"trust-run": "false", "state-dir": str(states), "cache-dir": str(states / "cache")}
    return play(
        states / "results",
        f"rounds={rounds}",
        "privacy.secagg=true",
        "state_dir=null",
        "cache_dir=null",
        node_config=lambda i: {"partition-id": i, "num-partitions": 3, **own},
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Played]:
    folder = tmp_path_factory.mktemp("site")
    return folder, play_site(folder, rounds=2)


def test_everything_that_the_server_got_is_recorded(site: tuple[Path, Played]) -> None:
    folder, played = site
    assert played.error is None
    lines = [line for record in records_in(folder) for line in record.read()]
    got = [reply.content.object_id for reply in played.grid.replies]
    assert sorted(line.sha256 for line in lines) == sorted(got)
    of_one = [line for line in lines if line.client == "client-1"]
    assert [(line.kind, line.round) for line in of_one if line.kind != "name"] == [
        ("key", 0), ("report", 1), ("report", 2), ("report", 3),
    ]  # fmt: skip
    assert "masked" in of_one[-2].holds
    assert len({line.run for line in of_one if line.kind == "report"}) == 1


def test_the_command_shows_it(site: tuple[Path, Played], capsys: pytest.CaptureFixture[str]) -> None:
    folder, played = site
    node = f'state-dir="{folder}"'
    assert main(["audit", "--sent", "--node-config", node]) == 0
    shown = capsys.readouterr().out
    assert f"{len(played.grid.replies)} messages" in shown
    assert all(reply.content.object_id in shown for reply in played.grid.replies)
    assert main(["audit", "--sent", "--json", "--node-config", node]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {line["client"] for line in lines} == {"client-0", "client-1", "client-2"}


def test_an_empty_record_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "--sent", "--node-config", f'state-dir="{tmp_path}"']) == 1
    assert "nothing is recorded" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "node", "said", "unsaid"),
    [
        ([], {}, ["predictions of the public", "unseen images, once", "rounded figures", ".sent"], []),
        (["privacy.secagg=true"], {}, ["masked", "their sum only"], ["unseen images, once"]),
        (["privacy.metrics=none"], {}, ["no figure measured"], ["rounded"]),
        ([], {"privacy-metrics": "full"}, ["recall per class"], []),
        (["strategy=fedavg"], {}, ["all weights that learn"], ["predictions of the public"]),
        (["strategy=local"], {}, ["its name"], ["weights", "predictions of the public"]),
        ([], {"trust-run": "true"}, ["none in a simulation"], [".sent"]),
    ],
)
def test_the_doctor_says_what_will_leave(
    overrides: list[str], node: dict[str, str], said: list[str], unsaid: list[str]
) -> None:
    text = what_leaves(compose(overrides), node)
    assert all(part in text for part in said), text
    assert not any(part in text for part in unsaid), text


def test_the_doctor_says_what_the_owner_refuses() -> None:
    with pytest.raises(SettingsError, match="takes part only with it"):
        what_leaves(compose(), {"require-secagg": "true"})


def test_the_client_has_no_way_around_the_record() -> None:
    """Every handler of the app either uses ``_handle`` or records by itself."""
    source = Path(answer.__file__).read_text(encoding="utf-8")
    assert source.count("reply_to=message") == 2  # the reply, and the error in its place
    app = (Path(answer.__file__).parents[2] / "client_app.py").read_text(encoding="utf-8")
    assert app.count("reply_to=") == app.count("record_reply(") == 1
