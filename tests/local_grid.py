"""An in-process Grid: no Ray and no sockets, but real serialisation, error replies and drops.

:func:`play` drives a whole run on it, with three clients on 120 generated faces of 20x20 pixels.
"""

from __future__ import annotations

import itertools
import json
import shlex
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedmutual.messages import Order, read_order
from fedmutual.results import read_history

Tamper = Callable[[int, Message], Message | None]

torch.set_num_threads(1)  # tiny models: more threads only wait for each other

CACHE = tempfile.TemporaryDirectory(prefix="fedmutual-tests-")  # decoded images, for all tests of a session
TINY = (
    "rounds=3",
    "data.pool_size=120",
    "data.unseen_size=40",
    "data.image_size=20",
    "public.size=24",
    "train.batch_size=16",
    "device=cpu",
    "exchange.poll_interval=0.01",
    # whatever the defaults are: the paper's direction, and the least work
    "strategy.divergence=own_peer",
    "strategy.public_epochs=1",
    "train.local_epochs=1",
    f"cache_dir={CACHE.name}",
)
FIRST_NODE = 1000


def enter_run() -> None:
    """Messages can only be made inside a run."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, SUPERLINK_NODE_ID, 1


def over_the_wire(message: Message) -> Message:
    """A copy that went through Flower's serialisation."""
    objects = get_all_nested_objects(message)
    copy = inflate_object_from_contents(message.object_id, {k: o.deflate() for k, o in objects.items()})
    copy.metadata.__dict__["_message_id"] = message.metadata.message_id or message.object_id
    return copy


class LocalGrid(Grid):
    """Runs ``client_app`` at once when an order is pushed.

    Parameters
    ----------
    client_app : ClientApp
    num_nodes : int
    run_config : dict
    node_config : callable
        Node configuration of the i-th node; by default its partition.
    tamper : callable
        Sees every reply on its way to the server and may change it; None loses it. What it raises ends the
        server.
    before : callable
        Sees every order before its client does; what it raises is the client's failure.
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
        enter_run()
        self.client_app = client_app
        self.tamper = tamper or (lambda node, reply: reply)
        self.before = before or (lambda node, order: None)
        configure = node_config or (lambda i: {"partition-id": i, "num-partitions": num_nodes})
        self.contexts = {
            FIRST_NODE + i: self._context(FIRST_NODE + i, run_config, configure(i)) for i in range(num_nodes)
        }
        self.offline: set[int] = set()
        self.orders: list[Message] = []
        self.replies: list[Message] = []
        self._run = Run.create_empty(run_id=1)
        self._ready: dict[str, Message] = {}
        self._ids = itertools.count()

    @staticmethod
    def _context(node: int, run_config: dict[str, Any], node_config: dict[str, Any]) -> Context:
        return Context(
            run_id=1, node_id=node, state=RecordDict(), run_config=dict(run_config), node_config=node_config
        )

    def rename_node(self, old: int, new: int) -> None:
        """What a restart does to a SuperNode without a key: the same configuration, another id."""
        context = self.contexts.pop(old)
        self.contexts[new] = self._context(new, context.run_config, context.node_config)

    def add_node(self, node: int, node_config: dict[str, Any]) -> None:
        """A SuperNode that connects later."""
        run_config = next(iter(self.contexts.values())).run_config
        self.contexts[node] = self._context(node, run_config, node_config)

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError("legacy")

    def get_node_ids(self) -> Iterable[int]:
        return [node for node in self.contexts if node not in self.offline]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        if not isinstance(messages, list | tuple):
            raise TypeError("HttpGrid iterates twice: pass a list, not a generator")
        return [self._push(message) for message in messages]

    def _push(self, message: Message) -> str:
        node = message.metadata.dst_node_id
        if node not in self.contexts:
            return ""
        name = f"m{next(self._ids)}"
        message.metadata.__dict__["_message_id"] = name
        self.orders.append(message)
        if node in self.offline:
            return name
        inbound = over_the_wire(message)
        try:
            self.before(node, inbound)
            reply = self.client_app(inbound, self.contexts[node])
            reply = None if reply is None else over_the_wire(reply)
        except Exception as error:  # as flwr-clientapp does
            reason = f"{type(error)}:<'{error}'>"
            reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=inbound)
        changed = None if reply is None else self.tamper(node, reply)
        if changed is not None:
            self.replies.append(changed)
            self._ready[name] = changed
        return name

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._ready.pop(name) for name in list(message_ids) if name in self._ready]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        names = list(self.push_messages(list(messages)))
        return self.pull_messages(names)


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


def play(path: Path, *overrides: str, clients: int = 3, resume: bool = False, **hooks: Any) -> Played:
    """Do a whole run, or continue one, as Flower would; what ends it is kept as ``error``.

    Parameters
    ----------
    path : Path
        Results folder.
    overrides : str
        Beside ``TINY``.
    hooks
        ``node_config``, ``tamper``, ``before`` of :class:`LocalGrid`; ``prepare`` gets the grid first.
    """
    import fedmutual.server
    from client_app import app

    where = f"resume={path}" if resume else f"output_dir={path}"
    faces = not any(override.startswith("data=") for override in overrides)
    tiny = [setting for setting in TINY if faces or "_size" not in setting]
    given = [*tiny, f"num_clients={clients}", f"state_dir={path}/clients", where, *overrides]
    config = {"overrides": shlex.join(given)}
    prepare = hooks.pop("prepare", lambda grid: None)
    grid = LocalGrid(app, clients, config, **hooks)
    prepare(grid)
    played = Played(path, grid)
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=config)
    plots = fedmutual.server.write_plots
    fedmutual.server.write_plots = (
        lambda *_: []
    )  # drawing takes longer than everything else; tested elsewhere
    try:
        fedmutual.server.run(grid, context)
    except Exception as error:
        played.error = error
    finally:
        fedmutual.server.write_plots = plots
    played.history = read_history(path)
    if (path / "summary.json").exists():
        played.summary = json.loads((path / "summary.json").read_text())
    return played
