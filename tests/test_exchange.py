"""Sending and collecting, on a grid that only pretends, with a clock that nobody has to wait for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from local_grid import enter_run, over_the_wire

from fedmutual.engine.rounds import headline
from fedmutual.settings import ExchangeSettings
from fedmutual.wire.exchange import (
    CLOCK_SKEW,
    LONGEST_PAUSE,
    SETTLE_SECONDS,
    Exchange,
    ExchangeError,
    Reply,
    as_reply,
    explain,
    messages_to,
)
from fedmutual.wire.records import METRICS, payload_bytes

POLL = 0.5


class Clock:
    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.slept.append(seconds)
        self.now += seconds


class FakeGrid(Grid):
    """Answers node ``n`` after ``delays[n]`` seconds (never without an entry), newest reply first."""

    def __init__(self, clock: Clock, delays: dict[int, float], **behaviour: Any) -> None:
        enter_run()
        self.clock, self.delays = clock, delays
        self.rejected: dict[int, list[str]] = behaviour.get("rejected", {})
        self.errors: dict[int, Error] = behaviour.get("errors", {})
        self.online: Callable[[float], list[int]] = behaviour.get("online", lambda now: list(delays))
        self.pushed: list[Message] = []
        self.pulls: list[tuple[float, list[str]]] = []
        self.strays: list[Message] = []
        self._ready: dict[str, tuple[float, Message]] = {}

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Run:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        raise NotImplementedError("looks every 3 s in deployment: not to be used")

    def get_node_ids(self) -> list[int]:
        return self.online(self.clock.now)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        assert isinstance(messages, list), "HttpGrid iterates twice: a generator arrives empty"
        return [name for message in messages for name in self._push(message)]

    def _push(self, message: Message) -> list[str]:
        node = message.metadata.dst_node_id
        if node in self.rejected:
            return self.rejected[node]
        name = f"message-{len(self.pushed)}"
        message.metadata.__dict__["_message_id"] = name
        self.pushed.append(message)
        if node in self.delays:
            self._ready[name] = (self.clock.now + self.delays[node], self._reply(message, node))
        return [name]

    def _reply(self, order: Message, node: int) -> Message:
        inbound = over_the_wire(order)
        if node not in self.errors:
            content = RecordDict({"report": ConfigRecord({"node": node, "padding": b"x" * node})})
            return over_the_wire(Message(content, reply_to=inbound))
        reply = Message(self.errors[node], reply_to=inbound)
        reply.metadata.__dict__["_src_node_id"] = 1  # Flower's own errors come from the SuperLink
        return reply

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        assert isinstance(message_ids, list)
        self.pulls.append((self.clock.now, list(message_ids)))
        due = [i for i in message_ids if i in self._ready and self._ready[i][0] <= self.clock.now]
        return [*self.strays, *(self._ready.pop(name)[1] for name in reversed(due))]


def an_exchange(grid: FakeGrid, **changes: float | None) -> Exchange:
    values: dict[str, Any] = {
        "min_clients": None,
        "enough_clients": None,
        "return_timeout": 0.0,
        "join_timeout": 10.0,
        "round_timeout": 20.0,
        "poll_interval": POLL,
    }
    return Exchange(grid, ExchangeSettings(**values | changes), grid.clock, grid.clock.sleep)


def orders(*nodes: int) -> list[Message]:
    content = {node: RecordDict({"order": ConfigRecord({"n": node})}) for node in nodes}
    return messages_to(content, "train.round", 20.0)


def said(replies: list[Any]) -> list[int | None]:
    return [None if reply.content is None else reply.content["report"]["node"] for reply in replies]


def test_replies_in_any_order_go_to_their_orders() -> None:
    grid = FakeGrid(Clock(), {1: 3.0, 2: 0.0, 3: 1.0, 4: 1.0})
    replies = an_exchange(grid).send_and_collect(orders(1, 2, 3, 4))
    assert said(replies) == [1, 2, 3, 4]
    assert [reply.node_id for reply in replies] == [1, 2, 3, 4]
    assert [reply.seconds for reply in replies] == [3.0, 0.0, 1.0, 1.0]
    assert [reply.error for reply in replies] == [""] * 4


def test_bytes_are_counted_each_way() -> None:
    grid = FakeGrid(Clock(), {1: 0.0, 900: 0.0})
    messages = orders(1, 900)
    replies = an_exchange(grid).send_and_collect(messages)
    assert [reply.downlink_bytes for reply in replies] == [payload_bytes(m.content) for m in messages]
    for reply in replies:
        assert reply.content is not None
        assert reply.uplink_bytes == payload_bytes(reply.content)
    # 899 bytes of padding more, and the lengths of what holds them
    assert 899 <= replies[1].uplink_bytes - replies[0].uplink_bytes < 899 + 16


def test_a_round_ends_as_soon_as_everyone_has_answered() -> None:
    grid = FakeGrid(Clock(), {1: 0.0, 2: 0.0})
    an_exchange(grid).send_and_collect(orders(1, 2))
    assert grid.clock.slept == []


def test_only_the_poll_interval_is_slept_and_only_the_missing_are_asked_for() -> None:
    grid = FakeGrid(Clock(), {1: 0.0, 2: 1.2})
    an_exchange(grid).send_and_collect(orders(1, 2))
    assert grid.clock.slept == [POLL] * 3
    assert [ids for _, ids in grid.pulls] == [["message-0", "message-1"], *([["message-1"]] * 3)]


def test_a_long_round_says_what_it_has_and_for_whom_it_waits(caplog: pytest.LogCaptureFixture) -> None:
    grid = FakeGrid(Clock(), {1: 0.0, 2: 16.0})
    exchange = an_exchange(grid)
    exchange.label, exchange.name_of = (lambda good: f"round 3: {len(good)} good; "), {2: "clinic-b"}.get
    looks: list[tuple[list[int], int]] = []
    exchange.watch = lambda open, answered: looks.append((open, answered))
    with caplog.at_level("INFO", "fedmutual"):
        exchange.send_and_collect(orders(1, 2))
    assert caplog.messages == ["round 3: 1 good; 1 of 2 answered, waiting for clinic-b"]
    assert (looks[0], looks[-1]) == (([2], 1), ([], 2))


def test_a_round_is_named_with_the_validation_so_far() -> None:
    def reply(name: str, value: float) -> Reply:
        return Reply(1, RecordDict({METRICS: MetricRecord({name: value})}), "", 0, 0, 0.0)

    good = [reply("validation-accuracy", value) for value in (0.9, 0.92)]
    assert headline("round 3", good) == "round 3: validation 0.910; "
    assert headline("round 3", [reply("seconds", 1.0)]) == headline("round 3", []) == "round 3: "


def test_a_missing_reply_ends_with_the_rounds_time() -> None:
    grid = FakeGrid(Clock(), {1: 0.0})
    replies = an_exchange(grid).send_and_collect(orders(1, 2))
    assert said(replies) == [1, None]
    assert "round_timeout" in replies[1].error
    assert replies[1].uplink_bytes == 0
    assert replies[1].downlink_bytes > 0
    assert 120.0 <= grid.clock.now <= 120.0 + POLL


def test_a_reply_at_the_deadline_counts_and_a_later_one_is_ignored() -> None:
    grid = FakeGrid(Clock(), {1: 20.0, 2: 21.0})
    exchange = an_exchange(grid)
    assert said(exchange.send_and_collect(orders(1, 2))) == [1, None]
    grid.clock.now += 10  # the late one is there now
    grid.delays = {1: 0.0, 2: 0.0}
    again = exchange.send_and_collect(orders(1, 2))
    assert said(again) == [1, 2]
    assert [reply.seconds for reply in again] == [0.0, 0.0]


def test_a_reply_to_something_else_is_ignored() -> None:
    grid = FakeGrid(Clock(), {1: 1.0, 9: 0.0})
    other = orders(9)[0]
    other.metadata.__dict__["_message_id"] = "of an earlier round"
    grid.strays = [grid._reply(other, 9)]
    assert said(an_exchange(grid).send_and_collect(orders(1))) == [1]


@pytest.mark.parametrize("answer", [[""], []], ids=["deployment", "simulation"])
def test_a_rejected_push_is_that_nodes_error_and_nobody_elses(answer: list[str]) -> None:
    grid = FakeGrid(Clock(), {1: 0.0, 3: 0.0}, rejected={2: answer})
    replies = an_exchange(grid).send_and_collect(orders(1, 2, 3))
    assert said(replies) == [1, None, 3]
    assert replies[1].error == "the node is not connected"
    assert replies[1].node_id == 2
    assert (replies[1].downlink_bytes, replies[1].uplink_bytes) == (0, 0)
    assert grid.clock.slept == []


def test_some_orders_may_take_several_rounds_time() -> None:
    grid = FakeGrid(Clock(), {1: 25.0})
    assert said(an_exchange(grid, round_timeout=10.0).send_and_collect(orders(1))) == [None]
    grid = FakeGrid(Clock(), {1: 25.0})
    assert said(an_exchange(grid, round_timeout=10.0).send_and_collect(orders(1), rounds=3)) == [1]


def test_no_orders_no_replies() -> None:
    assert an_exchange(FakeGrid(Clock(), {})).send_and_collect([]) == []


def test_messages_expire_after_the_round_by_any_sensible_clock() -> None:
    assert [m.metadata.ttl for m in orders(4, 5)] == [20.0 + CLOCK_SKEW] * 2
    assert [m.metadata.dst_node_id for m in orders(4, 5)] == [4, 5]
    assert {m.metadata.message_type for m in orders(4, 5)} == {"train.round"}


# ---------------------------------------------------------------------------------------------------
# Errors

WORDS = {
    ErrorCode.UNKNOWN: "process died",
    ErrorCode.LOAD_CLIENT_APP_EXCEPTION: "cannot be loaded (is fedmutual installed there?)",
    ErrorCode.CLIENT_APP_RAISED_EXCEPTION: "ValueError: the disk is full",
    ErrorCode.MESSAGE_UNAVAILABLE: "round_timeout",
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE: "expired on the way",
    ErrorCode.NODE_UNAVAILABLE: "the node is gone",
    ErrorCode.CLIENT_APP_CRASHED: "process died (out of memory? killed?)",
    ErrorCode.MOD_FAILED_PRECONDITION: "a Flower mod of its ClientApp refused the order",
    ErrorCode.INVALID_FAB: "takes signed apps only",
}


@pytest.mark.parametrize("code", WORDS)
def test_each_flower_error_in_words_with_the_node_that_was_asked(code: int) -> None:
    reason = "Traceback (most recent call last):\n  File ...\nValueError: the disk is full\n"
    grid = FakeGrid(Clock(), {5: 0.0, 6: 0.0}, errors={5: Error(code, reason)})
    replies = an_exchange(grid).send_and_collect(orders(5, 6))
    assert said(replies) == [None, 6]
    assert WORDS[code] in replies[0].error
    assert "Traceback" not in replies[0].error
    assert replies[0].node_id == 5  # not 1, which the error says it comes from


def test_an_error_without_a_reason() -> None:
    assert explain(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION)) == "its ClientApp raised an exception"
    assert explain(Error(ErrorCode.LOAD_CLIENT_APP_EXCEPTION, "")).endswith("installed there?)")
    assert "ImportError: no torch" in explain(
        Error(ErrorCode.LOAD_CLIENT_APP_EXCEPTION, "ImportError: no torch")
    )
    assert explain(Error(99)) == "Flower error 99"


def test_a_message_that_somebody_else_pulled() -> None:
    grid = FakeGrid(Clock(), {3: 0.0})
    order = orders(3)[0]
    order.metadata.__dict__["_message_id"] = "m"
    reply = as_reply(grid._reply(order, 3))
    assert (reply.node_id, reply.error) == (3, "")
    assert reply.content is not None
    assert reply.uplink_bytes == payload_bytes(reply.content)
    grid.errors[3] = Error(ErrorCode.NODE_UNAVAILABLE, "")
    failed = as_reply(grid._reply(order, 3))
    assert failed.content is None
    assert "gone" in failed.error


# ---------------------------------------------------------------------------------------------------
# Nodes that die and come back, and nodes that are slow


class DyingGrid(FakeGrid):
    """The first orders of some nodes end in errors; ``dies[node]`` holds them, the next one first."""

    def __init__(
        self, clock: Clock, delays: dict[int, float], dies: dict[int, list[int]], **more: Any
    ) -> None:
        super().__init__(clock, delays, **more)
        self.dies = dies

    def _reply(self, order: Message, node: int) -> Message:
        codes = self.dies.get(node)
        self.errors = {node: Error(codes.pop(0), "")} if codes else {}
        return super()._reply(order, node)


def test_a_dead_process_gets_its_order_again_within_the_round() -> None:
    grid = DyingGrid(Clock(), {1: 0.0, 2: 3.0}, {2: [ErrorCode.CLIENT_APP_CRASHED]})
    messages = orders(1, 2)
    replies = an_exchange(grid, return_timeout=10.0).send_and_collect(messages)
    assert said(replies) == [1, 2]
    assert [m.metadata.dst_node_id for m in grid.pushed] == [1, 2, 2]
    assert grid.pushed[2].content == messages[1].content
    assert replies[1].downlink_bytes == 2 * payload_bytes(messages[1].content)
    assert replies[1].seconds == 6.0 + POLL


def test_a_dead_node_gets_its_order_again_when_it_is_back() -> None:
    grid = DyingGrid(
        Clock(), {1: 0.0, 2: 1.0}, {2: [ErrorCode.NODE_UNAVAILABLE]},
        online=lambda now: [1] if now < 106 else [1, 2],
    )  # fmt: skip
    replies = an_exchange(grid, return_timeout=10.0).send_and_collect(orders(1, 2))
    assert said(replies) == [1, 2]
    assert 107 <= grid.clock.now <= 109


@pytest.mark.parametrize(("return_timeout", "end"), [(5.0, 106.0), (0.0, 101.0)])
def test_a_node_that_does_not_come_back_is_out_for_the_round(return_timeout: float, end: float) -> None:
    grid = DyingGrid(Clock(), {1: 0.0, 2: 1.0}, {2: [ErrorCode.NODE_UNAVAILABLE]}, online=lambda now: [1])
    replies = an_exchange(grid, return_timeout=return_timeout).send_and_collect(orders(1, 2))
    assert said(replies) == [1, None]
    assert replies[1].error.startswith("the node is gone")
    assert ("exchange.return_timeout" in replies[1].error) == (return_timeout > 0)
    assert end <= grid.clock.now <= end + 2 * POLL


def test_an_order_that_kills_its_process_is_not_sent_for_ever() -> None:
    grid = DyingGrid(Clock(), {1: 0.0, 2: 0.0}, {2: [ErrorCode.CLIENT_APP_CRASHED] * 9})
    replies = an_exchange(grid, return_timeout=10.0).send_and_collect(orders(1, 2))
    assert said(replies) == [1, None]
    assert len(grid.pushed) == 1 + 3


@pytest.mark.parametrize("code", [ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE])
def test_a_report_that_got_lost_is_asked_for_again(code: int) -> None:
    grid = DyingGrid(Clock(), {1: 0.0, 2: 1.0}, {2: [code]})
    assert said(an_exchange(grid, return_timeout=10.0).send_and_collect(orders(1, 2))) == [1, 2]
    assert [m.metadata.dst_node_id for m in grid.pushed] == [1, 2, 2]


class LosingGrid(DyingGrid):
    """A deployment's, on which orders may be lost without a word; ``lost`` are numbers of pushed messages."""

    may_lose = True

    def __init__(self, clock: Clock, delays: dict[int, float], lost: set[int], **more: Any) -> None:
        super().__init__(clock, delays, more.pop("dies", {}), **more)
        self.lost = lost

    def _push(self, message: Message) -> list[str]:
        number = len(self.pushed)
        names = super()._push(message)
        if number in self.lost:
            del self._ready[names[0]]
        return names


def test_an_order_that_nothing_is_heard_of_is_sent_again_after_half_of_the_time() -> None:
    grid = LosingGrid(Clock(), {1: 0.0, 2: 1.0}, {1})
    replies = an_exchange(grid).send_and_collect(orders(1, 2))
    assert said(replies) == [1, 2]
    assert len(grid.pushed) == 3
    assert grid.clock.now == 100 + 20 / 2 + 1.0
    assert replies[1].downlink_bytes == 2 * payload_bytes(grid.pushed[1].content)


def test_a_slow_node_may_answer_the_first_message_and_then_the_second() -> None:
    grid = LosingGrid(Clock(), {1: 0.0, 2: 12.0}, set())
    exchange = an_exchange(grid)
    assert said(exchange.send_and_collect(orders(1, 2))) == [1, 2]
    assert grid.clock.now == 112.0
    grid.clock.now += 20.0
    grid.delays[2] = 0.0
    assert said(exchange.send_and_collect(orders(1, 2))) == [
        1,
        2,
    ]  # not the second's answer
    assert len(grid.pushed) == 2 + 1 + 2
    assert len(grid.pulls[-1][1]) == 3


def test_an_error_counts_only_when_no_other_message_is_under_way() -> None:
    dies = {2: [ErrorCode.CLIENT_APP_RAISED_EXCEPTION]}
    grid = LosingGrid(Clock(), {1: 0.0, 2: 12.0}, set(), dies=dies)
    assert said(an_exchange(grid, round_timeout=24.0).send_and_collect(orders(1, 2))) == [1, 2]


def test_silence_has_an_end() -> None:
    grid = LosingGrid(Clock(), {1: 0.0, 2: 0.0}, set(range(1, 99)))
    replies = an_exchange(grid).send_and_collect(orders(1, 2))
    assert said(replies) == [1, None]
    assert grid.clock.now == 120.0
    assert len(grid.pushed) <= 1 + 3


class BatchGrid(LosingGrid):
    """Notes the size of every request, and refuses those of more than ``most`` messages as a whole."""

    def __init__(self, *arguments: Any, most: int = 1000, **more: Any) -> None:
        super().__init__(*arguments, lost=set(), **more)
        self.most, self.requests = most, []

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        batch = list(messages)
        self.requests.append(len(batch))
        return [] if len(batch) > self.most else super().push_messages(batch)


def test_orders_go_in_batches_and_a_rejected_one_keeps_its_place() -> None:
    grid = BatchGrid(Clock(), dict.fromkeys(range(1, 151), 0.0), rejected={70: [""]})
    replies = an_exchange(grid).send_and_collect(orders(*range(1, 151)))
    assert grid.requests == [64, 64, 22]
    assert said(replies) == [None if node == 70 else node for node in range(1, 151)]


def test_a_batch_that_is_refused_as_too_large_goes_one_at_a_time() -> None:
    grid = BatchGrid(Clock(), dict.fromkeys((1, 2, 3), 0.0), most=1, rejected={2: [""]})
    assert said(an_exchange(grid).send_and_collect(orders(1, 2, 3))) == [1, None, 3]
    assert grid.requests == [3, 1, 1, 1]


def test_batches_have_a_size_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = orders(1, 2, 3)
    monkeypatch.setattr("fedmutual.wire.exchange.BATCH_BYTES", 2 * payload_bytes(sent[0].content))
    grid = BatchGrid(Clock(), dict.fromkeys((1, 2, 3), 0.0))
    assert said(an_exchange(grid).send_and_collect(sent)) == [1, 2, 3]
    assert grid.requests == [2, 1]


def test_nodes_that_must_be_served_first_come_last_one_at_a_time() -> None:
    class Serving(BatchGrid):
        def is_new(self, message: Message) -> bool:
            return message.metadata.dst_node_id in (2, 4)

    grid = Serving(Clock(), dict.fromkeys((1, 2, 3, 4, 5), 0.0))
    assert said(an_exchange(grid).send_and_collect(orders(1, 2, 3, 4, 5))) == [1, 2, 3, 4, 5]
    assert grid.requests == [3, 1, 1]
    assert [m.metadata.dst_node_id for m in grid.pushed] == [1, 3, 5, 2, 4]


class SlowGrid(FakeGrid):
    """Takes ``seconds`` for every look."""

    def __init__(self, clock: Clock, delays: dict[int, float], seconds: float, may_lose: bool = True) -> None:
        super().__init__(clock, delays)
        self.seconds, self.may_lose = seconds, may_lose

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        self.clock.now += self.seconds
        return super().pull_messages(message_ids)


@pytest.mark.parametrize(
    ("seconds", "may_lose", "pause"), [(1.5, True, 1.5), (5.0, True, LONGEST_PAUSE), (1.5, False, POLL)]
)
def test_a_superlink_that_answers_slowly_is_asked_less_often(
    seconds: float, may_lose: bool, pause: float
) -> None:
    grid = SlowGrid(Clock(), {1: 0.0, 2: 18.0}, seconds, may_lose)
    assert said(an_exchange(grid).send_and_collect(orders(1, 2))) == [1, 2]
    # the first look brings a report: there may be more at once
    assert grid.clock.slept[0] == POLL
    assert set(grid.clock.slept[1:]) == {pause}


def test_in_simulation_nothing_is_sent_twice() -> None:
    grid = FakeGrid(Clock(), {1: 0.0, 2: 19.0})  # there, two messages to one node run at once
    assert said(an_exchange(grid).send_and_collect(orders(1, 2))) == [1, 2]
    assert len(grid.pushed) == 2


def test_the_rounds_time_follows_the_reports() -> None:
    grid = FakeGrid(Clock(), {1: 0.0, 2: 300.0})
    exchange = an_exchange(grid, round_timeout=None)
    assert exchange.patience.seconds == 3600
    assert said(exchange.send_and_collect(orders(1, 2))) == [1, 2]
    assert exchange.patience.seconds == 5 * 300
    start = grid.clock.now
    assert said(exchange.send_and_collect(orders(1, 3))) == [1, None]
    assert grid.clock.now - start == 1500


def test_a_late_report_makes_the_next_rounds_longer() -> None:
    grid = FakeGrid(Clock(), {1: 1.0})
    exchange = an_exchange(grid, round_timeout=None)
    exchange.send_and_collect(orders(1))
    grid.delays[2] = 700.0
    assert said(exchange.send_and_collect(orders(1, 2))) == [1, None]
    assert exchange.patience.seconds == 600
    grid.clock.now += 100
    exchange.send_and_collect(orders(1))
    assert 5 * 700 <= exchange.patience.seconds <= 5 * 702


def test_the_answer_to_a_question_says_nothing_about_rounds() -> None:
    grid = FakeGrid(Clock(), {1: 1.0})
    exchange = an_exchange(grid, round_timeout=None)
    exchange.send_and_collect(messages_to({1: RecordDict({"order": ConfigRecord({"n": 1})})}, "query.x", 9.0))
    assert exchange.patience.seconds == 3600


def test_an_error_of_the_client_itself_is_final() -> None:
    grid = DyingGrid(Clock(), {1: 0.0, 2: 0.0}, {2: [ErrorCode.CLIENT_APP_RAISED_EXCEPTION]})
    assert said(an_exchange(grid, return_timeout=10.0).send_and_collect(orders(1, 2))) == [1, None]
    assert len(grid.pushed) == 2


def test_enough_reports_end_the_round_and_the_slow_node_joins_when_it_has_answered() -> None:
    grid = FakeGrid(Clock(), {1: 0.0, 2: 0.0, 3: 4.0})
    exchange = an_exchange(grid, enough_clients=2)
    first = exchange.send_and_collect(orders(1, 2, 3))
    assert said(first) == [1, 2, None]
    assert "exchange.enough_clients" in first[2].error
    assert grid.clock.now == 100.0
    grid.delays = {1: 0.0, 2: 3.0, 3: 1.0}
    second = exchange.send_and_collect(orders(1, 2, 3))  # 2 is slower than 3 now, 3 still has the first order
    assert said(second) == [1, 2, None]
    assert grid.clock.now == 103.0
    assert [m.metadata.dst_node_id for m in grid.pushed] == [1, 2, 3, 1, 2]
    assert second[2].downlink_bytes == 0
    grid.delays = {1: 0.0, 2: 3.0, 3: 1.0}
    # the old answer of 3 comes at 104, the new one a second after the new order
    third = exchange.send_and_collect(orders(1, 2, 3))
    assert said(third) == [1, None, 3]
    assert grid.clock.now == 105.0 + POLL


def test_a_node_that_never_answers_is_ordered_again_after_the_rounds_time() -> None:
    grid = FakeGrid(Clock(), {1: 0.0})
    exchange = an_exchange(grid, enough_clients=1)
    exchange.send_and_collect(orders(1, 2))
    exchange.send_and_collect(orders(1, 2))
    assert [m.metadata.dst_node_id for m in grid.pushed] == [1, 2, 1]
    grid.clock.now += 20
    exchange.send_and_collect(orders(1, 2))
    assert [m.metadata.dst_node_id for m in grid.pushed] == [1, 2, 1, 1, 2]


def test_everyone_means_everyone() -> None:
    grid = FakeGrid(Clock(), {1: 0.0, 2: 4.0})
    assert said(an_exchange(grid, enough_clients=1).send_and_collect(orders(1, 2), everyone=True)) == [1, 2]


# ---------------------------------------------------------------------------------------------------
# Waiting


def one_more_every(seconds: float, most: int) -> Callable[[float], list[int]]:
    return lambda now: list(range(50, 50 + min(most, int((now - 100) / seconds))))


def test_waits_for_the_count_and_no_longer() -> None:
    grid = FakeGrid(Clock(), {}, online=one_more_every(2.0, 9))
    assert an_exchange(grid).wait_for_clients(3) == [50, 51, 52]
    assert grid.clock.now == 106.0
    assert set(grid.clock.slept) == {POLL}


def test_without_a_count_it_waits_until_no_more_arrive() -> None:
    grid = FakeGrid(Clock(), {}, online=one_more_every(SETTLE_SECONDS * 0.75, 4))
    assert an_exchange(grid, poll_interval=0.25).wait_for_clients(None) == [50, 51, 52, 53]
    assert grid.clock.now == 103.0 + SETTLE_SECONDS


def test_a_client_that_leaves_while_the_others_settle_is_not_counted() -> None:
    grid = FakeGrid(Clock(), {}, online=lambda now: [1, 2] if now < 100.5 else [2])
    assert an_exchange(grid, poll_interval=0.25).wait_for_clients(None) == [2]
    assert grid.clock.now == 100.5 + SETTLE_SECONDS


@pytest.mark.parametrize(
    ("count", "online", "begins"),
    [(3, [7, 8], "2 of 3 clients connected within 10 s"), (None, [], "0 of any clients connected")],
)
def test_too_few_clients_is_an_error_with_the_remedy(
    count: int | None, online: list[int], begins: str
) -> None:
    grid = FakeGrid(Clock(), {}, online=lambda now: online)
    with pytest.raises(ExchangeError, match=begins) as error:
        an_exchange(grid).wait_for_clients(count)
    for remedy in ("start the other SuperNodes", "num_clients", "exchange.join_timeout"):
        assert remedy in str(error.value)
    assert 110 <= grid.clock.now <= 110 + 2 * POLL
