"""The asynchronous loop on a grid that only pretends, with clocks that nobody has to wait for."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from local_grid import enter_run, over_the_wire

from fedmutual.engine.asynchronous import LONGEST_PAUSE, AsynchronousLoop
from fedmutual.engine.timing import Dispatch, Timing, VirtualTiming, WallTiming
from fedmutual.settings import ExchangeSettings
from fedmutual.wire.exchange import ExchangeError, Reply

POLL = 0.5


class Clock:
    """The machine's: it goes on only when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0
        self.sleeps = 0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds
        self.sleeps += 1


class FakeGrid(Grid):
    """Answers node n after ``delay(n, its how-manieth message)`` seconds of the clock; None: never."""

    def __init__(self, clock: Clock, delay: Callable[[int, int], float | None], nodes: Iterable[int]) -> None:
        enter_run()
        self.clock, self.delay, self.nodes = clock, delay, set(nodes)
        self.rejects: set[int] = set()
        self.may_lose = False
        self.errors: dict[int, int] = {}
        self.pushed: list[tuple[int, float]] = []
        self.most_open: dict[int, int] = {}
        self._open: dict[str, tuple[float, Message]] = {}

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Run:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        raise NotImplementedError

    def get_node_ids(self) -> list[int]:
        return sorted(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        assert isinstance(messages, list)
        (message,) = messages
        node = message.metadata.dst_node_id
        count = sum(n == node for n, _ in self.pushed)
        self.pushed.append((node, self.clock.now))
        if node in self.rejects:
            return [""]
        name = f"m{len(self.pushed)}"
        message.metadata.__dict__["_message_id"] = name
        delay = self.delay(node, count)
        self._open[name] = (float("inf") if delay is None else self.clock.now + delay, over_the_wire(message))
        still = sum(m.metadata.dst_node_id == node for _, m in self._open.values())
        self.most_open[node] = max(self.most_open.get(node, 0), still)
        return [name]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        ready = [n for n in message_ids if n in self._open and self._open[n][0] <= self.clock.now]
        return [self._reply(self._open.pop(name)[1]) for name in ready]

    def _reply(self, order: Message) -> Message:
        node = order.metadata.dst_node_id
        if node in self.errors:
            return over_the_wire(Message(Error(self.errors[node], "boom"), reply_to=order))
        content = RecordDict({"metrics": MetricRecord({"seconds": 2.0})})
        return over_the_wire(Message(content, reply_to=order))


class Counting:
    """A source that counts: ``(node, seconds of the run's clock, error)`` of every reply."""

    def __init__(self, replies: int, speeds: dict[int, float] | None = None) -> None:
        self.replies, self.speeds = replies, speeds or {}
        self.seen: list[tuple[int, float, str]] = []
        self.good = 0
        self.sent: list[tuple[int, float]] = []
        self.useless: set[int] = set()

    def dispatch(self, node: int, now: float) -> Dispatch | None:
        self.sent.append((node, now))
        message = Message(RecordDict({"order": ConfigRecord({"n": len(self.sent)})}), node, "train.round")
        return Dispatch(message, (node,), self.speeds.get(node, 1.0))

    def arrived(self, reply: Reply, now: float) -> bool:
        self.seen.append((reply.node_id, now, reply.error))
        good = reply.content is not None and reply.node_id not in self.useless
        self.good += good
        return good

    def over(self, now: float) -> bool:
        return self.good >= self.replies


def settings(**changes: Any) -> ExchangeSettings:
    values: dict[str, Any] = {
        "min_clients": 1,
        "enough_clients": None,
        "join_timeout": 10.0,
        "round_timeout": 50.0,
        "return_timeout": 20.0,
        "poll_interval": POLL,
    }
    return ExchangeSettings(**{**values, **changes})


def loop(
    grid: FakeGrid, source: Counting, timing: Timing | None = None, expected: int = 2, **changes: Any
) -> AsynchronousLoop:
    clock = grid.clock
    timing = timing or WallTiming(clock)
    return AsynchronousLoop(grid, settings(**changes), source, timing, expected, clock, clock.sleep)


def global_random_state() -> tuple[object, ...]:
    return random.getstate(), str(np.random.get_state())  # noqa: NPY002


def of(source: Counting, node: int) -> list[float]:
    return [at for who, at, error in source.seen if who == node and not error]


# ---------------------------------------------------------------------------------------------------
# Time


def test_replies_are_taken_as_they_come_and_nobody_waits_for_the_slowest() -> None:
    grid = FakeGrid(Clock(), lambda node, _: {1: 1.0, 2: 8.0}[node], [1, 2])
    source = Counting(9)
    loop(grid, source).run()
    assert of(source, 1) == [1, 2, 3, 4, 5, 6, 7, 8, 9]  # the last one was on its way when the ninth came
    assert of(source, 2) == [8]
    assert grid.most_open == {1: 1, 2: 1}


def test_what_is_under_way_at_the_end_is_awaited_and_nothing_more_is_sent() -> None:
    grid = FakeGrid(Clock(), lambda node, _: {1: 1.0, 2: 8.0}[node], [1, 2])
    source = Counting(3)
    loop(grid, source).run()
    assert [(node, at) for node, at, _ in source.seen] == [(1, 1), (1, 2), (1, 3), (2, 8)]
    assert len(grid.pushed) == 4


def test_a_slow_client_is_emulated_by_the_time_that_it_learned() -> None:
    """It says that it learned 2 s, so at speed 3 its reply counts 4 s after it came."""
    grid = FakeGrid(Clock(), lambda node, _: 2.5, [1, 2])
    source = Counting(4, speeds={1: 3.0, 2: 1.0})
    loop(grid, source).run()
    assert of(source, 1)[0] == 6.5
    assert of(source, 2)[:3] == [2.5, 5.0, 7.5]


def test_what_a_client_claims_to_have_learned_is_bounded_by_its_absence() -> None:
    grid = FakeGrid(Clock(), lambda node, _: 0.5, [1])  # it says 2 s after 0.5 s
    source = Counting(1, speeds={1: 3.0})
    loop(grid, source, expected=1).run()
    assert of(source, 1) == [1.5]


def test_the_virtual_clock_orders_replies_whatever_the_machine_does() -> None:
    speeds = {1: 1.0, 2: 2.0, 3: 8.0}

    def virtual(delay: Callable[[int, int], float | None]) -> list[tuple[int, float, str]]:
        source = Counting(12, speeds)
        loop(FakeGrid(Clock(), delay, speeds), source, VirtualTiming(10.0)).run()
        return source.seen

    quick_is_slow = virtual(lambda node, _: 9.0 - speeds[node])
    assert quick_is_slow == virtual(lambda node, _: speeds[node])
    assert [(node, at) for node, at, _ in quick_is_slow][:5] == [(1, 10), (1, 20), (2, 20), (1, 30), (1, 40)]
    assert [(node, at) for node, at, _ in quick_is_slow][-4:] == [(1, 80), (2, 80), (3, 80), (1, 90)]


@hypothesis_settings(max_examples=40, deadline=None)
@given(
    delays=st.lists(st.floats(0.1, 30), min_size=1, max_size=12),
    speeds=st.lists(st.sampled_from([1.0, 2.0, 8.0]), min_size=1, max_size=4),
    virtual=st.booleans(),
    lost=st.sets(st.integers(0, 3)),
)
def test_time_never_goes_back_and_a_node_has_one_message(
    delays: list[float], speeds: list[float], virtual: bool, lost: set[int]
) -> None:
    def delay(node: int, count: int) -> float | None:
        return None if count in lost and node == 0 else delays[(3 * node + count) % len(delays)]

    grid = FakeGrid(Clock(), delay, range(len(speeds) + 1))
    source = Counting(10, dict(enumerate(speeds)))
    state = global_random_state()
    timing = VirtualTiming(1.0) if virtual else WallTiming(grid.clock)
    loop(grid, source, timing, round_timeout=40.0).run()
    assert global_random_state() == state
    moments = [at for _, at, _ in source.seen]
    assert moments == sorted(moments)
    assert [at for _, at in source.sent] == sorted(at for _, at in source.sent)
    answered: dict[int, int] = {}
    for node in range(len(speeds) + 1):
        answered[node] = sum(n == node for n, _, _ in source.seen)
        assert sum(n == node for n, _ in source.sent) == answered[node]  # none is forgotten
    assert max(grid.most_open.values()) == 1
    assert source.good >= 10


# ---------------------------------------------------------------------------------------------------
# Nodes that fail


def test_an_offline_client_is_retired_and_not_spun_on() -> None:
    grid = FakeGrid(Clock(), lambda *_: 1.0, [1, 2])
    grid.errors = {2: ErrorCode.NODE_UNAVAILABLE}
    source = Counting(60)
    run = loop(grid, source)
    run.run()
    times = [at for node, at in grid.pushed if node == 2]
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert len(times) <= 7  # in 60 s, with pauses of 1, 2, 4, 8, 16, 32 s
    assert pauses == sorted(pauses)
    assert len(of(source, 1)) == 60
    assert grid.clock.sleeps <= 60 / POLL + 10


def test_a_node_that_is_not_connected_gets_nothing_until_it_is_back() -> None:
    grid = FakeGrid(Clock(), lambda *_: 1.0, [1, 2])
    source = Counting(20)
    run = loop(grid, source)
    grid.nodes = {1}

    def arrived(reply: Reply, now: float) -> bool:
        if now >= 10:
            grid.nodes = {1, 2}
        return Counting.arrived(source, reply, now)

    source.arrived = arrived  # type: ignore[method-assign]
    run.run()
    assert of(source, 2)
    assert min(at for node, at in source.sent if node == 2) >= 10


def test_a_node_that_comes_back_starts_afresh() -> None:
    grid = FakeGrid(Clock(), lambda *_: 1.0, [1, 2])
    grid.errors = {2: ErrorCode.NODE_UNAVAILABLE}
    source = Counting(40)
    run = loop(grid, source)

    def arrived(reply: Reply, now: float) -> bool:
        if now >= 8 and 2 in grid.errors:
            grid.nodes = {1}
            grid.errors = {}
        elif now >= 12:
            grid.nodes = {1, 2}
        return Counting.arrived(source, reply, now)

    source.arrived = arrived  # type: ignore[method-assign]
    run.run()
    assert 12 < of(source, 2)[0] < 16  # and not after the pause of 8 s that its failures had come to


@pytest.mark.parametrize("virtual", [False, True])
def test_a_silent_node_is_given_up_and_gets_nothing_while_it_may_be_at_it(virtual: bool) -> None:
    grid = FakeGrid(Clock(), lambda node, n: None if node == 2 else 1.0, [1, 2])
    source = Counting(100)
    run = loop(grid, source, VirtualTiming(1.0) if virtual else None, round_timeout=30.0)
    run.run()
    assert [error for node, _, error in source.seen if node == 2] == [
        "no report within the round's time (exchange.round_timeout)"
    ]
    assert grid.most_open[2] == 1
    assert len(of(source, 1)) == 100


def test_a_late_reply_makes_its_node_free_again() -> None:
    grid = FakeGrid(Clock(), lambda node, n: 45.0 if (node, n) == (2, 0) else 1.0, [1, 2])
    source = Counting(100)
    loop(grid, source, round_timeout=30.0).run()
    assert of(source, 2)[0] >= 46
    assert grid.most_open[2] == 1


def test_an_order_that_nothing_is_heard_of_is_sent_again() -> None:
    grid = FakeGrid(Clock(), lambda node, n: None if (node, n) == (2, 1) else 1.0, [1, 2])
    grid.may_lose = True
    source = Counting(100)
    loop(grid, source, round_timeout=30.0).run()
    assert of(source, 2)[:3] == [1.0, 17.0, 18.0]  # 1 s and half of 30 s
    assert not any(error for _, _, error in source.seen)


def test_a_node_whose_order_was_lost_is_not_left_out_for_good() -> None:
    grid = FakeGrid(Clock(), lambda node, n: None if node == 2 and n < 2 else 1.0, [1, 2])
    grid.may_lose = True
    source = Counting(150)
    loop(grid, source, round_timeout=30.0).run()
    assert 60 <= of(source, 2)[0] <= 64  # given up after 30 s, and asked again after 30 s more


def test_a_reply_may_take_as_long_as_the_replies_do() -> None:
    grid = FakeGrid(Clock(), lambda node, n: None if (node, n) == (2, 3) else 200.0, [1, 2])
    source = Counting(40)
    loop(grid, source, round_timeout=None).run()
    (given_up,) = [at for node, at, error in source.seen if error]
    assert given_up == 3 * 200 + 5 * 200


def test_the_first_reply_of_a_node_may_take_long_whatever_the_others_do() -> None:
    grid = FakeGrid(Clock(), lambda node, n: 3000.0 if node == 2 else 100.0, [1, 2])
    source = Counting(60)
    loop(grid, source, round_timeout=None).run()
    assert of(source, 2)[0] == 3000
    assert not any(error for _, _, error in source.seen)


def test_a_report_of_no_use_makes_its_node_wait() -> None:
    grid = FakeGrid(Clock(), lambda *_: 1.0, [1, 2])
    source = Counting(30)
    source.useless = {2}
    loop(grid, source).run()
    assert sum(node == 2 for node, _ in grid.pushed) <= 6


@pytest.mark.parametrize("virtual", [False, True])
def test_too_few_clients_end_the_run_with_their_reasons_and_without_haste(virtual: bool) -> None:
    grid = FakeGrid(Clock(), lambda *_: 0.01, [1, 2])
    grid.rejects = {1, 2}
    source = Counting(5)
    timing = VirtualTiming(1.0) if virtual else WallTiming(grid.clock)
    with pytest.raises(
        ExchangeError, match=r"0 clients take part, 1 are needed .*node 1: the node is not con"
    ):
        loop(grid, source, timing).run()
    assert grid.clock.sleeps < 200
    assert len(grid.pushed) < 120


def test_pauses_are_bounded() -> None:
    grid = FakeGrid(Clock(), lambda *_: 1.0, [1, 2])
    grid.errors = {2: ErrorCode.CLIENT_APP_CRASHED}
    loop(grid, Counting(500)).run()
    times = [at for node, at in grid.pushed if node == 2]
    longest = max(later - earlier for earlier, later in itertools.pairwise(times))
    assert LONGEST_PAUSE <= longest <= LONGEST_PAUSE + 3
