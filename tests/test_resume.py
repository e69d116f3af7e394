"""A run that was killed and resumed equals one that was not, to the last bit."""

from __future__ import annotations

import errno
import functools
import json
import os
from pathlib import Path
from typing import Any

import local_grid
import pytest
import safetensors.torch
import torch
from flwr.app import Message
from local_grid import FIRST_NODE, LocalGrid, Played, trains

import fedmutual.files.checkpoint
from fedmutual.results.directory import RunDirectory
from fedmutual.wire.records import REPORT

SEPARATE = ("strategy.burn_in=0", "strategy.phase=separate", "strategy.mutual_epochs=1")
MIXED = ("strategy.burn_in=0",)
NAMES = ("client-0", "client-1")
play = functools.partial(local_grid.play, clients=2)
undisturbed = functools.partial(local_grid.undisturbed, clients=2)


class Killed(Exception):
    """The server is gone."""


def history(run: Played) -> list[dict[str, Any]]:
    """Every line in its order, without the seconds."""
    return [{key: value for key, value in line.items() if "seconds" not in key} for line in run.history]


def weights(run: Played) -> dict[str, dict[str, torch.Tensor]]:
    states = run.states()
    return {name: safetensors.torch.load_file(states / name / "model.safetensors") for name in NAMES}


def assert_same(resumed: Played, undisturbed: Played) -> None:
    assert resumed.summary["status"] == "completed", resumed.summary["reason"]
    first, second = weights(resumed), weights(undisturbed)
    for name in NAMES:
        assert first[name].keys() == second[name].keys()
        for key, value in first[name].items():
            assert torch.equal(value, second[name][key]), (name, key)
    assert history(resumed) == history(undisturbed)
    for key in ("clients", "unseen", "traffic", "warnings", "rejected", "rounds_completed", "public_digest"):
        assert resumed.summary[key] == undisturbed.summary[key]


def after_checkpoint(monkeypatch: pytest.MonkeyPatch, round: int) -> dict[str, Any]:
    save = RunDirectory.save_checkpoint

    def killed(self: RunDirectory, meta: Any, arrays: Any) -> None:
        save(self, meta, arrays)
        if meta["round"] == round:
            raise Killed

    monkeypatch.setattr(RunDirectory, "save_checkpoint", killed)
    return {}


def before_checkpoint(monkeypatch: pytest.MonkeyPatch, round: int) -> dict[str, Any]:
    save = RunDirectory.save_checkpoint

    def killed(self: RunDirectory, meta: Any, arrays: Any) -> None:
        if meta["round"] == round:
            raise Killed
        save(self, meta, arrays)

    monkeypatch.setattr(RunDirectory, "save_checkpoint", killed)
    return {}


def before_history(monkeypatch: pytest.MonkeyPatch, round: int) -> dict[str, Any]:
    append = RunDirectory.append

    def killed(self: RunDirectory, records: Any) -> None:
        if records[0]["round"] == round:
            raise Killed
        append(self, records)

    monkeypatch.setattr(RunDirectory, "append", killed)
    return {}


def half_a_history_line(monkeypatch: pytest.MonkeyPatch, round: int) -> dict[str, Any]:
    append = RunDirectory.append

    def killed(self: RunDirectory, records: Any) -> None:
        if records[0]["round"] == round:
            with (self.path / "history.jsonl").open("a") as file:
                file.write(json.dumps(records[0])[:40])
            raise Killed
        append(self, records)

    monkeypatch.setattr(RunDirectory, "append", killed)
    return {}


def between_two_clients(monkeypatch: pytest.MonkeyPatch, round: int) -> dict[str, Any]:
    def tamper(node: int, reply: Message) -> Message:
        if trains(reply) and node == FIRST_NODE and reply.content[REPORT]["round"] == round:
            raise Killed
        return reply

    return {"tamper": tamper}


MOMENTS = {
    "after the checkpoint": (after_checkpoint, 2),
    "after the first checkpoint": (after_checkpoint, 1),
    "after the last checkpoint": (after_checkpoint, 3),
    "before the checkpoint": (before_checkpoint, 2),
    "before the history": (before_history, 2),
    "within a history line": (half_a_history_line, 3),
    "between two clients": (between_two_clients, 2),
    "between two closing clients": (between_two_clients, 4),
    "before the closing history": (before_history, 4),
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("overrides", [MIXED, SEPARATE], ids=["mixed", "separate"])
def test_killed_and_resumed_equals_uninterrupted(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trainings: list[tuple[str, int]],
    overrides: tuple[str, ...],
    moment: str,
) -> None:
    expected = undisturbed(*overrides)
    trainings.clear()
    hook, round = MOMENTS[moment]
    with monkeypatch.context() as patch:
        killed = play(tmp_path / "run", *overrides, **hook(patch, round))
    assert isinstance(killed.error, Killed)
    assert killed.summary["status"] == "failed"
    resumed = play(tmp_path / "run", *overrides, resume=True)
    assert_same(resumed, expected)
    assert sorted(trainings) == [(name, r) for name in NAMES for r in (1, 2, 3)]  # nobody trained twice
    assert (tmp_path / "run" / "summary.previous.json").exists()


@pytest.mark.parametrize(
    "overrides",
    [
        (*MIXED, "public=sample", "optimizer=sgd"),
        (*SEPARATE, "strategy.divergence=peer_own", "public=kfold", "strategy.wire_dtype=int8"),
    ],
    ids=["sample-sgd", "kfold-int8"],
)
def test_resumed_variants(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    overrides: tuple[str, ...],
) -> None:
    with monkeypatch.context() as patch:
        play(tmp_path / "run", *overrides, **after_checkpoint(patch, 2))
    assert_same(play(tmp_path / "run", *overrides, resume=True), undisturbed(*overrides))


def test_killed_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for resume, (hook, round) in enumerate([(before_checkpoint, 2), (between_two_clients, 3)]):
        with monkeypatch.context() as patch:
            play(tmp_path / "run", *MIXED, resume=bool(resume), **hook(patch, round))
    assert_same(play(tmp_path / "run", *MIXED, resume=True), undisturbed(*MIXED))


def test_nodes_with_new_ids_after_the_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        play(tmp_path / "run", *MIXED, **after_checkpoint(patch, 1))

    def prepare(grid: LocalGrid) -> None:
        for node in (FIRST_NODE, FIRST_NODE + 1):
            grid.rename_node(node, 5000 - node)  # also in another order

    resumed = play(tmp_path / "run", *MIXED, resume=True, prepare=prepare)
    assert resumed.summary["status"] == "completed"
    expected = undisturbed(*MIXED)
    first, second = weights(resumed), weights(expected)
    for name in NAMES:
        for key, value in first[name].items():
            assert torch.equal(value, second[name][key]), (name, key)


def test_a_damaged_checkpoint_falls_back_to_the_round_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        play(tmp_path / "run", *MIXED, **after_checkpoint(patch, 2))
    path = tmp_path / "run" / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-30])
    # every client has done round 2: it is asked again, and answers from its state
    assert_same(play(tmp_path / "run", *MIXED, resume=True), undisturbed(*MIXED))


def test_a_damaged_checkpoint_after_a_kill_within_the_next_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        play(tmp_path / "run", *MIXED, **between_two_clients(patch, 3))
    path = tmp_path / "run" / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-30])
    # the server is back at round 1, and one client has done round 3: it steps back to round 2
    assert_same(play(tmp_path / "run", *MIXED, resume=True), undisturbed(*MIXED))


def test_a_full_disk_at_the_server_ends_the_run_which_goes_on_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, written = fedmutual.files.checkpoint.atomic_write, []

    def full(path: Path, *arguments: Any, **options: Any) -> None:
        if path == tmp_path / "run" / "checkpoint.safetensors":
            if len(written) == 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            written.append(path)
        write(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(fedmutual.files.checkpoint, "atomic_write", full)
        stopped = play(tmp_path / "run", *MIXED)
    assert stopped.summary["status"] == "failed"
    assert "No space left on device" in stopped.summary["reason"]
    assert str(tmp_path / "run" / "checkpoint.safetensors") in stopped.summary["reason"]
    assert_same(play(tmp_path / "run", *MIXED, resume=True), undisturbed(*MIXED))


def test_a_run_without_a_checkpoint_cannot_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        play(tmp_path / "run", *MIXED, **before_checkpoint(patch, 1))
    again = play(tmp_path / "run", *MIXED, resume=True)
    assert "no round of that run was completed; start a new run" in str(again.error)


def test_a_results_folder_is_not_written_over(tmp_path: Path) -> None:
    first = play(tmp_path / "run", "rounds=1")
    again = play(tmp_path / "run", "rounds=1")
    assert f"continue that run with resume={tmp_path / 'run'}" in str(again.error)
    assert again.grid.orders == []
    assert again.history == first.history


def test_two_runs_with_the_same_settings_are_equal(tmp_path: Path) -> None:
    assert_same(play(tmp_path / "run", *MIXED), undisturbed(*MIXED))


def test_another_seed_is_another_run(tmp_path: Path) -> None:
    other, expected = weights(play(tmp_path / "run", *MIXED, "seed=1")), weights(undisturbed(*MIXED))
    assert not torch.equal(other["client-0"]["features.0.weight"], expected["client-0"]["features.0.weight"])
