"""A call to the SuperLink that fails on the way is repeated."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import httpx
import pytest
from flwr.app import Message
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.superlink.grid import HttpGrid
from test_exchange import Clock, FakeGrid

from fedmutual.wire.steady import GIVE_UP, SteadyGrid, steady

HANDSHAKE = httpx.ConnectTimeout("_ssl.c:1011: The handshake operation timed out")
CUT = httpx.ReadError("[SSL: UNEXPECTED_EOF_WHILE_READING] EOF occurred in violation of protocol")
REFUSED = httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed")


class FailingGrid(FakeGrid):
    """Raises the given errors first, one a call."""

    def __init__(self, errors: Iterable[Exception]) -> None:
        super().__init__(Clock(), {1: 0.0})
        self.failures = iter(errors)

    def _fail(self) -> None:
        error = next(self.failures, None)
        if error is not None:
            raise error

    def get_node_ids(self) -> list[int]:
        self._fail()
        return super().get_node_ids()

    def get_nodes(self) -> list[NodeInfo]:
        self._fail()
        return [NodeInfo(node_id=1, public_key=b"key", name="a")]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        self._fail()
        return ["id"]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        self._fail()
        return []


def steadied(grid: FailingGrid) -> SteadyGrid:
    return SteadyGrid(grid, grid.clock, grid.clock.sleep)


@pytest.mark.parametrize("error", [HANDSHAKE, CUT, ObjectPushError("object", 1, "session")])
@pytest.mark.parametrize(
    ("call", "answer"),
    [
        (lambda grid: grid.get_node_ids(), [1]),
        (lambda grid: grid.get_nodes(), [NodeInfo(node_id=1, public_key=b"key", name="a")]),
        (lambda grid: grid.push_messages([]), ["id"]),
        (lambda grid: grid.pull_messages(["id"]), []),
    ],
)
def test_a_moment_without_the_superlink_is_survived(error: Exception, call: Any, answer: Any) -> None:
    grid = FailingGrid([error, error, error])
    assert call(steadied(grid)) == answer
    assert grid.clock.slept == [1.0, 2.0, 4.0]


def test_it_is_not_tried_for_ever() -> None:
    grid = FailingGrid(HANDSHAKE for _ in iter(int, 1))
    with pytest.raises(httpx.ConnectTimeout):
        steadied(grid).get_node_ids()
    assert GIVE_UP <= grid.clock.now - 100 <= GIVE_UP + 20


@pytest.mark.parametrize("error", [REFUSED, ValueError("something else")])
def test_what_will_not_get_better_is_raised_at_once(error: Exception) -> None:
    grid = FailingGrid([error])
    with pytest.raises(type(error)):
        steadied(grid).get_node_ids()
    assert grid.clock.slept == []


@pytest.mark.parametrize("error", [HANDSHAKE, CUT])
def test_flower_itself_gives_up_what_fails_within_tls(error: Exception) -> None:
    """The reason for all this; where it no longer holds, SteadyGrid may go."""

    def fail() -> None:
        raise error

    with pytest.raises(type(error)):
        make_simple_http_retry_invoker().invoke(fail)


def test_only_a_deployments_grid_is_made_steady() -> None:
    assert getattr(steady(HttpGrid(insecure=True, token="t")), "may_lose", False)
    simulated = FailingGrid([])
    assert steady(simulated) is simulated
