"""The moving average of a client's weights: arithmetic, what predicts, and that it survives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from local_grid import play
from safetensors.torch import load_file
from torch import nn

from fedmutual.client.state import StateFolder
from fedmutual.learning.ema import MovingAverage

AVERAGED = "train.ema_decay=0.9"


def one_weight(value: float) -> nn.Linear:
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, value)
    return layer


def test_by_hand() -> None:
    """Decays 2/11 and 3/12 while they are below 0.9: 0 -> 9/11 -> 0.25 * 9/11 + 0.75 * 2."""
    average = MovingAverage(one_weight(0.0), 0.9)
    average.update(one_weight(1.0))
    assert average.model.weight.item() == pytest.approx(9 / 11)
    average.update(one_weight(2.0))
    assert average.model.weight.item() == pytest.approx(0.25 * 9 / 11 + 1.5)


def test_after_many_steps_the_decay_is_the_one_asked_for() -> None:
    average = MovingAverage(one_weight(0.0), 0.9, steps=1000)
    average.update(one_weight(1.0))
    assert average.model.weight.item() == pytest.approx(0.1)


def test_it_is_no_view_of_the_model_and_takes_over_buffers() -> None:
    model = nn.BatchNorm1d(2)
    average = MovingAverage(model, 0.9)
    model.running_mean += 3  # type: ignore[operator]
    assert torch.equal(average.model.running_mean, torch.zeros(2))
    average.update(model)
    assert torch.equal(average.model.running_mean, torch.full((2,), 3.0))


def test_it_is_what_is_left_at_the_end(tmp_path: Path) -> None:
    run = play(tmp_path, AVERAGED, "rounds=2")
    assert run.error is None
    state = StateFolder(run.states().parent, run.states().name, "client-0").load()
    assert state is not None
    assert state.average_steps > 0
    left = load_file(run.states() / "client-0" / "model.safetensors")
    assert all(torch.equal(left[name], state.average[name]) for name in left)
    assert any(not torch.equal(left[name], state.weights[name]) for name in left)


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    """The server dies in round 2; the averages go on where they were."""
    whole = play(tmp_path / "whole", AVERAGED, "rounds=3")
    deaths = iter([False, False, False, False, True])

    def die(node: int, reply: object) -> object:
        if next(deaths, False):
            raise KeyboardInterrupt
        return reply

    with pytest.raises(KeyboardInterrupt):
        play(tmp_path / "cut", AVERAGED, "rounds=3", tamper=die)
    cut = play(tmp_path / "cut", AVERAGED, "rounds=3", resume=True)
    assert cut.error is None
    for name in ("client-0", "client-1", "client-2"):
        one, two = (load_file(run.states() / name / "model.safetensors") for run in (whole, cut))
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_where_weights_are_exchanged_there_is_none(tmp_path: Path) -> None:
    run = play(tmp_path, "strategy=fedavg", AVERAGED, "rounds=1")
    assert run.error is None
    state = StateFolder(run.states().parent, run.states().name, "client-0").load()
    assert state is not None
    assert state.average == {}
