"""A client's state: exact, atomic, and never in two hands."""

from __future__ import annotations

import logging
import os
import resource
import stat
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fedmutual.files.atomic
from fedmutual.client.state import ClientState, Ledger, StateError, StateFolder
from fedmutual.files.checkpoint import save_checkpoint
from fedmutual.learning.optimizers import make_optimizer
from fedmutual.wire.reports import Report

torch.set_num_threads(1)  # here and in the processes below: another number adds up in another order


def a_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2)).to(
        memory_format=torch.channels_last  # as the client trains it
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, steps: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 3, 8, 8, generator=generator)).square().mean().backward()
        optimizer.step()


def an_optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    return make_optimizer(name, model.parameters(), 0.01, 0.9 if name == "sgd" else 0.0, 0.0)


def a_state(round: int = 1, seed: int = 0, optimizer: str = "adam") -> ClientState:
    model = a_model(seed)
    trained = an_optimizer(optimizer, model)
    train(model, trained, seed)
    report = Report(
        client="a",
        round=round,
        public_digest="d",
        architecture="Sequential",
        predictions=np.log(np.array([[0.1, 0.9], [1 / 3, 2 / 3]], np.float32)),
        metrics={"num-examples": 5, "train-loss": 0.1 + 0.2, "validation-recall": [1 / 3, -1.0]},
    )
    weights = {key: value.detach() for key, value in model.state_dict().items()}
    return ClientState("torch.nn.Sequential", weights, trained.state_dict(), report, Ledger(10, 20))


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert value.dtype == second[key].dtype, key
        assert value.shape == second[key].shape, key
        assert torch.equal(value, second[key]), key


@pytest.fixture
def folder(tmp_path: Path) -> StateFolder:
    return StateFolder(tmp_path, "run", "a")


def test_nothing_before_the_first_report(folder: StateFolder) -> None:
    assert folder.load() is None


def test_it_lies_under_run_and_client(folder: StateFolder, tmp_path: Path) -> None:
    folder.save(a_state())
    assert (tmp_path / "run" / "a" / "state.safetensors").is_file()
    assert StateFolder(tmp_path, "run", "b").load() is None
    assert StateFolder(tmp_path, "another run", "a").load() is None


@pytest.mark.parametrize("unseen", [None, np.log(np.full((3, 2), 0.5, np.float32))])
def test_everything_comes_back(folder: StateFolder, unseen: Any) -> None:
    state = a_state()
    state = replace(state, report=replace(state.report, unseen_predictions=unseen))
    folder.save(state)
    back = folder.load()
    assert back is not None
    assert_equal(back.weights, state.weights)
    assert (back.architecture, back.ledger) == (state.architecture, state.ledger)
    for name in ("client", "round", "public_digest", "architecture", "metrics", "model"):
        assert getattr(back.report, name) == getattr(state.report, name)
    np.testing.assert_array_equal(back.report.predictions, state.report.predictions)
    assert back.report.predictions.dtype == np.float32
    if unseen is None:
        assert back.report.unseen_predictions is None
    else:
        np.testing.assert_array_equal(back.report.unseen_predictions, unseen)


def test_integer_buffers_stay_integers(folder: StateFolder) -> None:
    folder.save(a_state())
    back = folder.load()
    assert back is not None
    counter = back.weights["1.num_batches_tracked"]
    assert (counter.dtype, counter.shape, int(counter)) == (torch.int64, (), 3)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_the_optimiser_goes_on_as_if_nothing_had_happened(folder: StateFolder, name: str) -> None:
    state = a_state(optimizer=name)
    folder.save(state)
    back = folder.load()
    assert back is not None
    if name != "sgd":
        step = back.optimizer["state"][0]["step"]
        assert (step.shape, float(step)) == ((), 3.0)
    results = []
    for weights, history in ((state.weights, state.optimizer), (back.weights, back.optimizer)):
        model = a_model(seed=9)
        model.load_state_dict(weights)
        optimizer = an_optimizer(name, model)
        optimizer.load_state_dict(history)
        train(model, optimizer, seed=5)
        results.append(model.state_dict())
    assert_equal(*results)
    fresh = a_model(seed=9)
    fresh.load_state_dict(state.weights)
    train(fresh, an_optimizer(name, fresh), seed=5)
    assert not torch.equal(fresh.state_dict()["0.weight"], results[0]["0.weight"])  # the history does matter


def test_an_optimiser_without_history(folder: StateFolder) -> None:
    folder.save(replace(a_state(), optimizer={}))
    back = folder.load()
    assert back is not None
    assert back.optimizer == {}


# ---------------------------------------------------------------------------------------------------
# Damage


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def test_a_damaged_file_falls_back_to_the_state_before_and_says_so(
    folder: StateFolder, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = a_state(1, seed=1), a_state(2, seed=2)
    folder.save(first)
    folder.save(second)
    damage(folder.path / "state.safetensors")
    with caplog.at_level(logging.WARNING):
        back = folder.load()
    assert back is not None
    assert back.report.round == 1
    assert_equal(back.weights, first.weights)
    assert "state.safetensors is damaged" in caplog.text
    assert "previous generation" in caplog.text
    caplog.clear()
    again = folder.load()
    assert again is not None
    assert again.report.round == 1
    assert caplog.text == ""  # said once


def test_a_cut_off_file_falls_back_too(folder: StateFolder) -> None:
    folder.save(a_state(1))
    folder.save(a_state(2))
    path = folder.path / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    back = folder.load()
    assert back is not None
    assert back.report.round == 1


def test_a_damaged_first_state_is_an_error_and_no_fresh_start(folder: StateFolder) -> None:
    folder.save(a_state())
    damage(folder.path / "state.safetensors")
    with pytest.raises(StateError, match=r"state.safetensors is damaged.*put this client's own file back"):
        folder.load()


@pytest.mark.parametrize("other", [("run", "b"), ("another run", "a")])
def test_the_state_of_another_client_or_run_is_refused(
    folder: StateFolder, tmp_path: Path, other: tuple[str, str]
) -> None:
    stranger = StateFolder(tmp_path, *other)
    folder.save(a_state(1))
    for round in (1, 2):
        stranger.save(a_state(round, seed=1))
    names = f"is the state of {other[1]} in the run {other[0]}, not of a in the run run: put"
    os.replace(stranger.path / "state.previous.safetensors", folder.path / "state.previous.safetensors")
    with pytest.raises(StateError, match=names):
        folder.step_back(1)
    os.replace(stranger.path / "state.safetensors", folder.path / "state.safetensors")
    with pytest.raises(StateError, match=names) as error:
        folder.load()
    assert str(folder.path / "state.safetensors") in str(error.value)


def test_a_file_that_is_no_state_is_refused(folder: StateFolder) -> None:
    save_checkpoint(folder.path / "state.safetensors", {"round": 3}, {})
    with pytest.raises(StateError, match="is the state of an unknown client in the run unknown"):
        folder.load()


def test_only_the_owner_can_read_a_state(folder: StateFolder, tmp_path: Path) -> None:
    with folder.locked():
        folder.save(a_state())
    for path in (tmp_path / "run", folder.path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.path.iterdir()} == {0o600}


def test_a_full_disk_is_an_error_and_leaves_both_generations(folder: StateFolder) -> None:
    first, second = a_state(1, seed=1), a_state(2, seed=2)
    folder.save(first)
    folder.save(second)
    before = {path.name: path.read_bytes() for path in folder.path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # the system refuses to write any further
    try:
        with pytest.raises(StateError, match=r"state of round 3 cannot be written .*make room") as error:
            folder.save(a_state(3, seed=3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(folder.path) in str(error.value)
    assert {
        path.name: path.read_bytes() for path in folder.path.iterdir()
    } == before  # and nothing else is left


def test_a_step_back_goes_to_the_generation_before(folder: StateFolder) -> None:
    first, second = a_state(1, seed=1), a_state(2, seed=2)
    folder.save(first)
    assert folder.step_back(1) is None  # there is none
    folder.save(second)
    assert folder.step_back(0) is None
    unchanged = folder.load()
    assert unchanged is not None
    assert unchanged.report.round == 2
    back = folder.step_back(1)
    assert back is not None
    assert_equal(back.weights, first.weights)
    again = folder.load()
    assert again is not None
    assert again.report.round == 1


class Killed(BaseException):
    """What no handler catches."""


@pytest.mark.parametrize("when", ["before the rename", "between the renames", "after the rename"])
def test_killed_while_saving(folder: StateFolder, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    first, second = a_state(1, seed=1), a_state(2, seed=2)
    folder.save(first)
    rename = os.replace

    def killed(source: Any, target: Any) -> None:
        if when == "before the rename":
            raise Killed
        rename(source, target)
        if when == "between the renames" or str(source).endswith(".tmp"):
            raise Killed

    monkeypatch.setattr(fedmutual.files.atomic.os, "replace", killed)
    with pytest.raises(Killed):
        folder.save(second)
    monkeypatch.undo()
    back = folder.load()
    assert back is not None
    expected = second if when == "after the rename" else first
    assert back.report.round == expected.report.round
    assert_equal(back.weights, expected.weights)


KILL = """
    import os, sys
    from pathlib import Path
    import fedmutual.files.atomic
    from test_state import a_state
    from fedmutual.client.state import StateFolder

    folder = StateFolder(Path(sys.argv[1]), "run", "a")
    folder.save(a_state(1, seed=1))
    rename = os.replace
    def killed(source, target):
        if str(source).endswith(".tmp"):
            os._exit(9)
        rename(source, target)
    fedmutual.files.atomic.os.replace = killed
    with folder.locked():
        folder.save(a_state(2, seed=2))
"""


def test_a_process_that_dies_between_file_and_rename_leaves_state_and_lock_usable(tmp_path: Path) -> None:
    tests = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILL), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": f"{tests}:{tests.parent}"},
        timeout=120,
        check=False,
    )
    assert done.returncode == 9
    folder = StateFolder(tmp_path, "run", "a")
    leftovers = list(folder.path.glob(".*.tmp"))
    assert len(leftovers) == 1  # the kill did happen between the two
    with folder.locked():
        back = folder.load()
        assert back is not None
        assert back.report.round == 1
        assert_equal(back.weights, a_state(1, seed=1).weights)
    assert not leftovers[0].exists()  # a model's size each: they would fill the disk


# ---------------------------------------------------------------------------------------------------
# The lock


HOLD = """
    import sys
    from pathlib import Path
    from fedmutual.client.state import StateFolder
    with StateFolder(Path(sys.argv[1]), "run", "a").locked():
        print("held", flush=True)
        sys.stdin.read()
"""


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(HOLD), str(tmp_path)]
    root = str(Path(__file__).parents[1])
    holder = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert holder.stdout is not None
    assert holder.stdin is not None
    try:
        assert holder.stdout.readline() == b"held\n"
        with (
            pytest.raises(
                StateError, match=r"in use by another process.*two nodes have one client-name"
            ) as error,
            StateFolder(tmp_path, "run", "a").locked(),
        ):
            pass
        assert str(tmp_path / "run" / "a") in str(error.value)
        with StateFolder(tmp_path, "run", "b").locked():
            pass
        holder.stdin.close()
        assert holder.wait(60) == 0
        with StateFolder(tmp_path, "run", "a").locked():
            pass
    finally:
        holder.kill()
        holder.wait()


def test_the_lock_is_released_by_an_error(folder: StateFolder) -> None:
    with pytest.raises(ValueError, match="of the learning"), folder.locked():
        raise ValueError("of the learning")
    with folder.locked():
        pass


def test_the_package_is_imported_where_there_is_no_fcntl() -> None:
    modules = "fedmutual.client.state, fedmutual.compare.runner, fedmutual.data.site, fedmutual.report.page"
    code = f"import sys; sys.modules['fcntl'] = None; import {modules}"
    subprocess.run([sys.executable, "-c", code], check=True)
