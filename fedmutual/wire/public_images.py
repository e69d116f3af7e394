"""Sending the public images to sites that lack them: once, in parts, checked by digest (public.distribute).

The server asks a node whether it has the set; what is missing goes out in parts of about 32 MB, since
every message starts a process at the site. A site keeps what it has received, so that after a break only the
rest is sent. Nodes that join later get the set before their first order.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedmutual.data.cache import cache_folder
from fedmutual.data.images import DataError
from fedmutual.data.public import PublicSet
from fedmutual.data.received import Part, has_received, parts_received, receive
from fedmutual.data.site import SharedData, own_public_set
from fedmutual.settings import Settings
from fedmutual.settings.identity import partition_of
from fedmutual.wire.exchange import Exchange, Reply, messages_to

logger = logging.getLogger(__name__)

MESSAGE_TYPE = "query.public"
PART_BYTES = 32 * 2**20
_PUBLIC, _PIXELS = "public", "pixels"


class Distributor:
    """Gives every node the public set before its first order.

    Parameters
    ----------
    exchange : Exchange
    settings : Settings
    shared : SharedData
        With the public set to be sent.
    count_bytes : callable
        Told the bytes that were sent, for the ledger.

    Raises
    ------
    DataError
        The public set belongs to a stream (partition=stream), whose clients all hold its pool.
    """

    def __init__(
        self, exchange: Exchange, settings: Settings, shared: SharedData, count_bytes: Callable[[int], None]
    ) -> None:
        if shared.public.warm_start is not None:
            raise DataError(
                "public.distribute: with partition=stream every client has the pool: set it to false"
            )
        self._exchange = exchange
        self._shared = shared
        self._labelled = settings.public.labelled
        self._count_bytes = count_bytes
        self._served: set[int] = set()

    def serve(self, nodes: Iterable[int]) -> None:
        """Ask the nodes that have not been asked yet, and send what they lack; a failure is logged.

        A node that could not be served is asked again before its next order, and says itself what it lacks.
        """
        new = [node for node in nodes if node not in self._served]
        if not new:
            return
        question = RecordDict({_PUBLIC: ConfigRecord({"digest": self._shared.public.digest})})
        missing: dict[int, set[int]] = {}
        slices = part_slices(self._shared.public)
        for reply in self._send(dict.fromkeys(new, question)):
            said = None if reply.content is None else dict(cast(ConfigRecord, reply.content[_PUBLIC]))
            if said is None:
                logger.warning("node %d was not asked for the public set: %s", reply.node_id, reply.error)
            elif said["whole"]:
                self._served.add(reply.node_id)
            else:
                missing[reply.node_id] = set(range(len(slices))) - set(cast(list[int], said["parts"]))
                missing[reply.node_id] |= {0} if not missing[reply.node_id] else set()
        sent = sum(
            self._send_part(number, len(slices), where, missing) for number, where in enumerate(slices)
        )
        if missing:
            self._count_bytes(sent)
            logger.info("the public set went to %d nodes: %d bytes", len(missing), sent)

    def _send_part(self, number: int, count: int, where: slice, missing: Mapping[int, set[int]]) -> int:
        nodes = [node for node, parts in missing.items() if number in parts]
        if not nodes:
            return 0
        public = self._shared.public
        labels = public.images.labels if self._labelled else None
        part = Part(public.digest, number, count, self._shared.classes, labels, public.images.images[where])
        sent = 0
        for reply in self._send(dict.fromkeys(nodes, part_record(part))):
            sent += reply.downlink_bytes
            if reply.content is None:
                logger.warning("node %d did not take the public set: %s", reply.node_id, reply.error)
            elif dict(cast(ConfigRecord, reply.content[_PUBLIC]))["whole"]:
                self._served.add(reply.node_id)
        return sent

    def _send(self, contents: dict[int, RecordDict]) -> list[Reply]:
        timeout = self._exchange.patience.seconds
        return self._exchange.send_and_collect(messages_to(contents, MESSAGE_TYPE, timeout), everyone=True)


class ServingGrid(Grid):
    """A Grid that serves the public set to a node before an order goes to it."""

    def __init__(self, grid: Grid, distributor: Distributor) -> None:
        self._grid = grid
        self._distributor = distributor
        self.takes_turns = getattr(grid, "takes_turns", False)
        self.may_lose = getattr(grid, "may_lose", False)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        batch = list(messages)
        self._distributor.serve(
            [m.metadata.dst_node_id for m in batch if m.metadata.message_type[:5] == "train"]
        )
        return self._grid.push_messages(batch)

    def set_run(self, run: Run) -> None:
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        return self._grid.run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        return self._grid.create_message(*args, **kwargs)

    def get_node_ids(self) -> Iterable[int]:
        return self._grid.get_node_ids()

    def get_nodes(self) -> Iterable[NodeInfo]:
        return self._grid.get_nodes()

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self._grid.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self._grid.send_and_receive(messages, timeout=timeout)


def part_slices(public: PublicSet) -> list[slice]:
    """Cut a public set into parts of at most ``PART_BYTES``, at least one image each."""
    size = max(PART_BYTES // max(public.images.images[:1].nbytes, 1), 1)
    return [slice(start, start + size) for start in range(0, len(public), size)]


def part_record(part: Part) -> RecordDict:
    """Pack a part; pixels travel as an array, which Flower cuts into pieces that any transport takes."""
    config: dict[str, Any] = {
        "digest": part.digest,
        "part": part.number,
        "parts": part.count,
        "classes": list(part.classes),
    }
    if part.labels is not None:
        config["labels"] = part.labels.astype("<i8").tobytes()
    pixels = ArrayRecord({"images": Array(np.ascontiguousarray(part.images))})
    return RecordDict({_PUBLIC: ConfigRecord(config), _PIXELS: pixels})


def answer(content: RecordDict, settings: Settings, node_config: Mapping[str, Any]) -> RecordDict:
    """What a site answers: whether it has the set, and which parts; a part is kept first.

    Raises
    ------
    DataError
        What was sent does not have its digest.
    """
    config, cache_dir = dict(cast(ConfigRecord, content[_PUBLIC])), cache_folder(settings.cache_dir)
    wanted = str(config["digest"])
    if _PIXELS in content:
        images = cast(ArrayRecord, content[_PIXELS])["images"].numpy()
        labels = config.get("labels")
        whole = receive(
            cache_dir,
            Part(
                digest=wanted,
                number=cast(int, config["part"]),
                count=cast(int, config["parts"]),
                classes=tuple(cast(list[str], config["classes"])),
                labels=None if labels is None else np.frombuffer(cast(bytes, labels), "<i8"),
                images=images,
            ),
        )
    else:
        whole = _has(settings, node_config, cache_dir, wanted)
    parts = [] if whole else parts_received(cache_dir, wanted)
    return RecordDict({_PUBLIC: ConfigRecord({"whole": whole, "parts": parts})})


def _has(settings: Settings, node_config: Mapping[str, Any], cache_dir: Any, wanted: str) -> bool:
    if partition_of(node_config) is not None:  # it shares the server's pool; its order checks the digest
        return True
    if has_received(cache_dir, wanted):
        return True
    own = own_public_set(settings)
    return own is not None and own.digest == wanted
