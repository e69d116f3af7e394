"""The in-process engine's grid with faults: lost, late and changed messages, nodes that come and go.

:func:`play` drives a whole run on it, with three clients on 120 generated faces of 20x20 pixels;
:func:`undisturbed` keeps one to which nothing happens, for all tests of a session.
"""

from __future__ import annotations

import functools
import json
import shlex
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo

from fedmutual.results.directory import read_history
from fedmutual.simulation.inprocess import FIRST_NODE, InProcessGrid, enter_run, node_context, over_the_wire
from fedmutual.wire.orders import Order, read_order

__all__ = ["FIRST_NODE", "LocalGrid", "enter_run", "over_the_wire", "play", "trains", "undisturbed"]

Tamper = Callable[[int, Message], Message | None]

torch.set_num_threads(1)  # tiny models: more threads only wait for each other

CACHE = tempfile.TemporaryDirectory(prefix="fedmutual-tests-")  # decoded images, for all tests of a session
TINY = (
    "rounds=3",
    "data.pool_size=120",
    "data.unseen_size=40",
    "data.image_size=20",
    "public.size=24",
    "public.fill=0",
    "train.batch_size=16",
    "device=cpu",
    "exchange.poll_interval=0.01",
    # whatever the defaults are: the paper's direction, and the least work
    "strategy.divergence=own_peer",
    "strategy.public_epochs=1",
    "strategy.min_steps=1",
    "train.local_epochs=1",
    f"cache_dir={CACHE.name}",
)


class LocalGrid(InProcessGrid):
    """The engine's grid, with an order carried out at once when it is pushed, and with faults.

    Parameters
    ----------
    tamper : callable
        Sees every reply on its way to the server and may change it; None loses it. What it raises ends the
        server.
    before : callable
        Sees every order before its client does; what it raises is the client's failure.

    Attributes
    ----------
    offline : set of int
        Nodes that are not connected; an order that is on its way to one is never answered.
    keys : dict[int, bytes]
        Public keys of the nodes that an operator has registered.
    """

    def __init__(
        self,
        client_app: ClientApp,
        num_nodes: int,
        run_config: dict[str, Any],
        *,
        node_config: Callable[[int], dict[str, Any]] | None = None,
        tamper: Tamper | None = None,
        before: Callable[[int, Message], None] | None = None,
    ) -> None:
        super().__init__(client_app, num_nodes, run_config, node_config)
        self.tamper = tamper or (lambda node, reply: reply)
        self.before = before or (lambda node, order: None)
        self.offline: set[int] = set()
        self.keys: dict[int, bytes] = {}
        self.orders: list[Message] = []
        self.replies: list[Message] = []

    def rename_node(self, old: int, new: int) -> None:
        """What a restart does to a SuperNode without a key: the same configuration, another id."""
        context = self.contexts.pop(old)
        self.contexts[new] = node_context(new, context.run_config, context.node_config)

    def add_node(self, node: int, node_config: dict[str, Any]) -> None:
        """A SuperNode that connects later."""
        run_config = next(iter(self.contexts.values())).run_config
        self.contexts[node] = node_context(node, run_config, node_config)

    def get_node_ids(self) -> Iterable[int]:
        return [node for node in self.contexts if node not in self.offline]

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [
            NodeInfo(
                node_id=node, public_key=self.keys.get(node), name="registered" if node in self.keys else None
            )
            for node in self.get_node_ids()
        ]

    def _push(self, message: Message) -> str:
        name = super()._push(message)
        if name:
            self.orders.append(message)
            if message.metadata.dst_node_id in self.offline:
                del self._pending[name]
            self._carry_out(name)
        return name

    def _answer(self, order: Message) -> Message | None:
        node = order.metadata.dst_node_id
        try:
            self.before(node, order)
        except Exception as error:
            reason = f"{type(error)}:<'{error}'>"
            reply: Message | None = Message(
                Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=order
            )
        else:
            reply = super()._answer(order)
        changed = None if reply is None else self.tamper(node, reply)
        if changed is not None:
            self.replies.append(changed)
        return changed


@dataclass
class Played:
    """A run that is over."""

    path: Path
    grid: LocalGrid
    error: BaseException | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)

    def line(self, round: int, client: str) -> dict[str, Any]:
        """The one history line of a client and round."""
        (line,) = [h for h in self.history if h["round"] == round and h["client"] == client]
        return line

    def orders(self, round: int | None = None) -> dict[tuple[int, int], Order]:
        """Orders by (node id, round)."""
        sent = [(m.metadata.dst_node_id, read_order(m.content)) for m in self.grid.orders if trains(m)]
        return {(node, order.round): order for node, order in sent if round in (None, order.round)}

    def rejections(self) -> list[tuple[int, str | None, str]]:
        """(round, client, reason) of every reply that was rejected."""
        return [(h["round"], h["client"], h["rejected"]) for h in self.history if "rejected" in h]

    def states(self) -> Path:
        """The folder of the clients' states."""
        (folder,) = (self.path / "clients").iterdir()
        return folder


def trains(message: Message) -> bool:
    """Whether a message is an order or its report, and no question who a node is."""
    return message.metadata.message_type == "train.round"


def play(
    path: Path, *overrides: str, clients: int = 3, resume: bool = False, page: bool = False, **hooks: Any
) -> Played:
    """Do a whole run, or continue one, as Flower would; what ends it is kept as ``error``.

    Parameters
    ----------
    path : Path
        Results folder.
    overrides : str
        Beside ``TINY``.
    page : bool
        Also write ``report.html``, which takes a sixth of such a run's time.
    hooks
        ``node_config``, ``tamper``, ``before`` of :class:`LocalGrid`; ``prepare`` gets the grid first.
    """
    import fedmutual.engine.server
    from client_app import app

    where = f"resume={path}" if resume else f"output_dir={path}"
    faces = not any(override.startswith("data=") for override in overrides)
    tiny = [setting for setting in TINY if faces or "_size" not in setting]
    if any(override.startswith("strategy=") for override in overrides):  # it has other settings
        tiny = [setting for setting in tiny if not setting.startswith("strategy.")]
    given = [*tiny, f"num_clients={clients}", f"state_dir={path}/clients", where, *overrides]
    config = {"overrides": shlex.join(given)}
    prepare = hooks.pop("prepare", lambda grid: None)
    grid = LocalGrid(app, clients, config, **hooks)
    prepare(grid)
    played = Played(path, grid)
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=config)
    with pytest.MonkeyPatch.context() as patch:
        # drawing takes longer than everything else, and is tested elsewhere
        patch.setattr(fedmutual.engine.server, "write_plots", lambda *_: [])
        if not page:
            patch.setattr(fedmutual.engine.server, "leave_report", lambda *_: None)
        try:
            fedmutual.engine.server.run(grid, context)
        except Exception as error:
            played.error = error
    played.history = read_history(path)
    if (path / "summary.json").exists():
        played.summary = json.loads((path / "summary.json").read_text())
    return played


@functools.cache
def undisturbed(*overrides: str, clients: int = 3) -> Played:
    """A run that nothing happens to, done once in a session: nobody may write into its folder."""
    folder = Path(tempfile.mkdtemp(prefix="undisturbed-", dir=CACHE.name))
    # the folder's name is part of the run's, and of its bytes
    played = play(folder / "run", *overrides, clients=clients)
    assert played.error is None
    return played
