"""The virtual clock of strategies with rounds: by hand, in the history and after a resume."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest
from flwr.app import Message
from hypothesis import given
from hypothesis import strategies as st
from local_grid import FIRST_NODE, play, trains

from fedmutual.compare.outcome import curve
from fedmutual.engine import virtual_rounds
from fedmutual.engine.virtual_rounds import VirtualRounds
from fedmutual.settings import EmulationSettings, SettingsError
from fedmutual.settings.compose import compose

SLOW = ("strategy=local", "emulation.speeds=[1,1,8]", "emulation.nominal_seconds=0.5")


def emulation(*speeds: float, clock: str = "virtual") -> EmulationSettings:
    return EmulationSettings(clock=clock, speeds=list(speeds), nominal_seconds=1.0)


def test_examples_in_the_docstring() -> None:
    result = doctest.testmod(virtual_rounds)
    assert (result.attempted, result.failed) == (5, 0)


def test_speeds_are_dealt_out_by_name_and_kept() -> None:
    clock = VirtualRounds(emulation(1, 2, 4))
    clock.pass_round(["client-10", "client-2"])  # 1 for client-2, 2 for client-10
    assert clock.now == 2
    clock.pass_round(["client-1", "client-2"])  # comes later: 4
    assert clock.now == 6
    clock.pass_round(["client-2"])
    assert clock.now == 7


@given(st.lists(st.sets(st.sampled_from("abcd"), min_size=1), max_size=8))
def test_time_never_goes_back_and_nobody_is_waited_for_longer_than_the_slowest(
    rounds: list[set[str]],
) -> None:
    clock, before = VirtualRounds(emulation(1, 3)), 0.0
    for present in rounds:
        clock.pass_round(present)
        assert 1 <= clock.now - before <= 3
        before = clock.now


@pytest.mark.parametrize(
    ("chosen", "there"),
    [
        (emulation(1.0, clock="auto"), False),
        (emulation(1, 8, clock="auto"), True),
        (emulation(1.0), True),
        (emulation(1, 8, clock="wall"), False),
    ],
)
def test_time_is_the_machines_unless_clients_differ(chosen: EmulationSettings, there: bool) -> None:
    assert (VirtualRounds.of(chosen) is not None) == there


def test_a_run_tells_the_time_in_its_history_also_after_a_resume(tmp_path: Path) -> None:
    def die(node: int, order: Message) -> None:
        if trains(order) and order.content["order"]["round"] == 3:
            raise KeyboardInterrupt

    def lost(node: int, reply: Message) -> Message:
        report = reply.content["report"]
        if node == FIRST_NODE + 2 and trains(reply) and report["round"] == 2:
            report["round"] = 1  # the slow client's report is rejected: the round ends without it
        return reply

    with pytest.raises(KeyboardInterrupt):
        play(tmp_path, *SLOW, before=die, tamper=lost)
    run = play(tmp_path, *SLOW, resume=True)
    assert run.error is None
    clocks = {line["round"]: line["clock"] for line in run.history}
    assert clocks == {1: 4.0, 2: 4.5, 3: 8.5, 4: 8.5}
    assert [point.seconds for point in curve(run.history)] == [4.0, 4.5, 8.5, 8.5]


@pytest.mark.parametrize("speeds", ["[]", "[1,0]"])
def test_misuse_is_refused_before_anything_starts(speeds: str) -> None:
    with pytest.raises(SettingsError, match=r"emulation\.speeds: "):
        compose([f"emulation.speeds={speeds}"])
