"""A whole run in one process: the real ServerApp, ClientApp, messages and files, without Ray and sockets.

A simulation starts Ray and a process per message, which is too slow for a study of hundreds of runs. Here one
process runs the server and all clients, one client at a time. Every message passes through Flower's
serialisation, so results and byte counts equal those of ``flwr run`` exactly. Only the wall time differs,
since clients take turns.
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
from fedmutual.simulation.request import RunRequest, held, hydra_override, prepare

logger = logging.getLogger(__name__)

FIRST_NODE = 1000
RUN_ID = 1
# no other process needs time between two polls
QUICK = "exchange.poll_interval=0.001"

NodeConfig = Callable[[int], dict[str, Any]]


def run_inprocess(overrides: Sequence[str], output_dir: Path, num_clients: int | None = None) -> int:
    """Do a run in this process, or continue the run interrupted in ``output_dir``.

    An interrupted run without a checkpoint starts again, in an emptied folder.

    Parameters
    ----------
    overrides : Sequence[str]
        Hydra overrides, as for ``fedmutual run``; ``simulation.client_cpus`` sets torch's threads.
    output_dir : Path
        Folder of the results: empty, or with a run of the same settings.
    num_clients : int | None
        None: the settings' value, else 5.

    Returns
    -------
    int
        0 when the run completed, 1 when it failed: ``summary.json`` has the reason, the log the traceback.

    Raises
    ------
    SettingsError
        A setting is invalid; nothing was started.
    """
    return carry_out(request_in(overrides, output_dir, num_clients))


def carry_out(request: RunRequest) -> int:
    """Do a checked run in this process.

    Returns
    -------
    int
        0 when the run completed, 1 when it failed: ``summary.json`` has the reason, the log the traceback.

    Raises
    ------
    SettingsError
        The results folder is in use by another run, or cannot be written; nothing was started.
    """
    import torch

    from fedmutual.client.answer import forget_images
    from fedmutual.engine.server import run

    forget_images()
    torch.set_num_threads(request.settings.simulation.client_cpus)
    config = {"overrides": shlex.join([*request.overrides, QUICK])}
    grid = InProcessGrid(load_client_app(), request.num_clients, config)
    context = Context(run_id=RUN_ID, node_id=1, node_config={}, state=RecordDict(), run_config=dict(config))
    with held(request.output_dir):
        try:
            run(grid, context)
        except Exception:  # summary.json has the reason, the run's log the traceback
            logger.exception("the run failed")
            return 1
    return 0


def request_in(overrides: Sequence[str], output_dir: Path, num_clients: int | None = None) -> RunRequest:
    """Return the checked request for a run in its own folder: new, or resumed from its checkpoint."""
    path = Path(os.path.abspath(output_dir))
    if has_checkpoint(path / CHECKPOINT):
        return prepare([hydra_override("resume", str(path))], Path.cwd())
    if path.exists():  # no round was completed: nothing to resume
        shutil.rmtree(path)
    own = [hydra_override("output_dir", str(path))]
    own += [f"num_clients={num_clients}"] if num_clients is not None else []
    return prepare([*overrides, *own], Path.cwd())


def load_client_app() -> ClientApp:
    """Return the ClientApp of this checkout, or of the wheel."""
    folder = str(app_folder())
    sys.path.insert(0, folder)
    try:
        from client_app import app
    finally:
        sys.path.remove(folder)
    assert isinstance(app, ClientApp)
    return app


def enter_run() -> None:
    """Enter a Flower run, without which no message can be created."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN_ID, SUPERLINK_NODE_ID, 1


def over_the_wire(message: Message) -> Message:
    """Return a copy of a message after Flower's serialisation."""
    objects = get_all_nested_objects(message)
    copy = inflate_object_from_contents(message.object_id, {k: o.deflate() for k, o in objects.items()})
    assert isinstance(copy, Message)
    copy.metadata.__dict__["_message_id"] = message.metadata.message_id or message.object_id
    return copy


class InProcessGrid(Grid):
    """Nodes that run when their reply is requested.

    If no requested reply is ready, :meth:`pull_messages` carries out the oldest requested order: one per
    call, in push order. A strategy that pulls a single message therefore gets that one, whatever else is in
    flight, and can choose whose reply comes next (for example by a virtual clock).

    Parameters
    ----------
    client_app : ClientApp
    num_nodes : int
    run_config : dict
    node_config : callable
        Configuration of the i-th node; default: its partition.

    Attributes
    ----------
    takes_turns : bool
        Clients train one after the other, so the wall clock does not show their parallel duration.
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
        """Set the run of the messages."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run of the messages."""
        return self._run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Reject Flower's legacy way of creating a message."""
        raise NotImplementedError("legacy: create a flwr.app.Message")

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of the connected nodes."""
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Accept orders; return their ids, an empty one for an unknown node."""
        if not isinstance(messages, list | tuple):
            raise TypeError("pass a list, not a generator: HttpGrid iterates twice")
        return [self._push(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that are ready; if none is, carry out the oldest of these orders first."""
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
        self._pending[name] = over_the_wire(message)  # a copy: the sender may change the message later
        return name

    def _carry_out(self, name: str) -> None:
        order = self._pending.pop(name, None)
        reply = self._answer(order) if order is not None else None
        if reply is not None:
            self._ready[name] = reply

    def _answer(self, order: Message) -> Message | None:
        """Return a node's reply to an order; an exception of the ClientApp becomes an error reply."""
        try:
            reply = self.client_app(order, self.contexts[order.metadata.dst_node_id])
            return over_the_wire(reply)
        except Exception as error:  # as flwr-clientapp does
            reason = f"{type(error)}:<'{error}'>"
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=order)


def node_context(node: int, run_config: dict[str, Any], node_config: dict[str, Any]) -> Context:
    """Return the Context that Flower passes to a node's ClientApp; all of this is one person's."""
    return Context(
        run_id=RUN_ID,
        node_id=node,
        state=RecordDict(),
        run_config=dict(run_config),
        node_config={"trust-run": True, **node_config},
    )
