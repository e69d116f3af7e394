"""A whole run in one process: the real ServerApp, ClientApp, messages and files, without Ray and sockets.

A simulation costs Ray, and a process a message; a study of hundreds of runs cannot pay that. Here one
process holds the server and all clients, one of which learns at a time. Every message goes through Flower's
serialisation, so the figures and the bytes are those of ``flwr run``, bit for bit; only the wall time of the
whole is that of clients that take turns.
"""

from __future__ import annotations

import itertools
import logging
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedmutual.appfolder import app_folder
from fedmutual.files.checkpoint import has_checkpoint
from fedmutual.results.directory import CHECKPOINT
from fedmutual.simulation.request import RunRequest, hydra_override, prepare

logger = logging.getLogger(__name__)

FIRST_NODE = 1000
RUN_ID = 1
# nobody else has to be given time between two looks for a reply
QUICK = "exchange.poll_interval=0.001"

NodeConfig = Callable[[int], dict[str, Any]]


def run_inprocess(overrides: Sequence[str], output_dir: Path, num_clients: int | None = None) -> int:
    """Do a run in this process, or continue the one that was interrupted in ``output_dir``.

    An interrupted run that had not come to a checkpoint starts again: its folder is emptied first.

    Parameters
    ----------
    overrides : Sequence[str]
        Hydra overrides, as for ``fedmutual run``; ``simulation.client_cpus`` : threads of torch.
    output_dir : Path
        Folder of the results; nothing but a run of these settings may be in it.
    num_clients : int | None
        None: as the settings say, or 5.

    Returns
    -------
    int
        0 when the run completed, 1 when it failed: ``summary.json`` has the reason, the log the traceback.

    Raises
    ------
    SettingsError
        A setting is refused; nothing was started.
    """
    return carry_out(request_in(overrides, output_dir, num_clients))


def carry_out(request: RunRequest) -> int:
    """Do a checked run in this process.

    Returns
    -------
    int
        0 when the run completed, 1 when it failed: ``summary.json`` has the reason, the log the traceback.
    """
    import torch

    from fedmutual.engine.server import run

    torch.set_num_threads(request.settings.simulation.client_cpus)
    config = {"overrides": shlex.join([*request.overrides, QUICK])}
    grid = InProcessGrid(load_client_app(), request.num_clients, config)
    context = Context(run_id=RUN_ID, node_id=1, node_config={}, state=RecordDict(), run_config=dict(config))
    try:
        run(grid, context)
    except Exception:  # whatever it was, summary.json says it, and the run's log shows where
        logger.exception("the run failed")
        return 1
    return 0


def request_in(overrides: Sequence[str], output_dir: Path, num_clients: int | None = None) -> RunRequest:
    """The checked request for a run in a folder of its own: a new one, or to go on from its checkpoint."""
    path = Path(os.path.abspath(output_dir))
    if has_checkpoint(path / CHECKPOINT):
        return prepare([hydra_override("resume", str(path))], Path.cwd())
    if path.exists():  # no round was completed: there is nothing to go on from
        shutil.rmtree(path)
    own = [hydra_override("output_dir", str(path))]
    own += [f"num_clients={num_clients}"] if num_clients is not None else []
    return prepare([*overrides, *own], Path.cwd())


def load_client_app() -> ClientApp:
    """The ClientApp of this checkout, or of the wheel."""
    folder = str(app_folder())
    sys.path.insert(0, folder)
    try:
        from client_app import app
    finally:
        sys.path.remove(folder)
    assert isinstance(app, ClientApp)
    return app


def enter_run() -> None:
    """Messages can only be made inside a run."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN_ID, SUPERLINK_NODE_ID, 1


def over_the_wire(message: Message) -> Message:
    """A copy that went through Flower's serialisation."""
    objects = get_all_nested_objects(message)
    copy = inflate_object_from_contents(message.object_id, {k: o.deflate() for k, o in objects.items()})
    assert isinstance(copy, Message)
    copy.metadata.__dict__["_message_id"] = message.metadata.message_id or message.object_id
    return copy


class InProcessGrid(Grid):
    """Nodes that answer when their reply is asked for.

    An order is carried out when a call of :meth:`pull_messages` names it and nothing that it names is ready
    yet: one order a call, in the order of pushing. So a strategy that pulls one message gets that one,
    whatever else is under way, and may decide itself (by a virtual clock, say) whose reply comes next.

    Parameters
    ----------
    client_app : ClientApp
    num_nodes : int
    run_config : dict
    node_config : callable
        Node configuration of the i-th node; by default its partition.

    Attributes
    ----------
    takes_turns : bool
        Clients learn one after the other: the wall clock does not say how long they would take side by
        side.
    """

    takes_turns = True

    def __init__(
        self,
        client_app: ClientApp,
        num_nodes: int,
        run_config: dict[str, Any],
        node_config: NodeConfig | None = None,
    ) -> None:
        enter_run()
        self.client_app = client_app
        configure = node_config or (lambda i: {"partition-id": i, "num-partitions": num_nodes})
        self.contexts = {
            FIRST_NODE + i: node_context(FIRST_NODE + i, run_config, configure(i)) for i in range(num_nodes)
        }
        self._run = Run.create_empty(run_id=RUN_ID)
        self._pending: dict[str, Message] = {}
        self._ready: dict[str, Message] = {}
        self._ids = itertools.count()

    def set_run(self, run: Run) -> None:
        """Set the run that the messages belong to."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run that the messages belong to."""
        return self._run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Flower's legacy way of making a message; not offered."""
        raise NotImplementedError("legacy: make a flwr.app.Message")

    def get_node_ids(self) -> Iterable[int]:
        """Ids of the connected nodes."""
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Take orders; returns their ids, an empty one for a node that does not exist."""
        if not isinstance(messages, list | tuple):
            raise TypeError("HttpGrid iterates twice: pass a list, not a generator")
        return [self._push(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that are ready; where none is, carry out the oldest of these orders first."""
        names = list(message_ids)
        if not any(name in self._ready for name in names):
            wanted = set(names)
            oldest = next((name for name in self._pending if name in wanted), None)
            if oldest is not None:
                self._carry_out(oldest)
        return [self._ready.pop(name) for name in names if name in self._ready]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push orders and return the replies to all of them."""
        names = list(self.push_messages(list(messages)))
        for name in names:
            self._carry_out(name)
        return self.pull_messages(names)

    def _push(self, message: Message) -> str:
        if message.metadata.dst_node_id not in self.contexts:
            return ""
        name = f"m{next(self._ids)}"
        message.metadata.__dict__["_message_id"] = name
        self._pending[name] = over_the_wire(message)  # as it is now: the sender may go on to change it
        return name

    def _carry_out(self, name: str) -> None:
        order = self._pending.pop(name, None)
        reply = self._answer(order) if order is not None else None
        if reply is not None:
            self._ready[name] = reply

    def _answer(self, order: Message) -> Message | None:
        """The node's reply to an order, as it arrives; what the ClientApp raises becomes an error reply."""
        try:
            reply = self.client_app(order, self.contexts[order.metadata.dst_node_id])
            return over_the_wire(reply)
        except Exception as error:  # as flwr-clientapp does
            reason = f"{type(error)}:<'{error}'>"
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=order)


def node_context(node: int, run_config: dict[str, Any], node_config: dict[str, Any]) -> Context:
    """What Flower hands to a node's ClientApp."""
    return Context(
        run_id=RUN_ID,
        node_id=node,
        state=RecordDict(),
        run_config=dict(run_config),
        node_config=node_config,
    )
