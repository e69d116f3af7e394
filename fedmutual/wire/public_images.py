"""Sending the public images to sites that lack them: once, in parts, checked by digest (public.distribute).

The server asks a node whether it has the set; what is missing goes out in parts of about 32 MB, since
every message starts a process at the site. A site keeps what it has received, so that after a break only the
rest is sent. Nodes that join later get the set before their first order.

A site takes a set only if its owner has agreed (``accept-public``, ``max-public-bytes`` of its node
configuration), and checks every part before it unpacks or writes anything.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from fedmutual.data.cache import cache_folder
from fedmutual.data.images import DataError
from fedmutual.data.public import PublicSet
from fedmutual.data.received import MAX_BYTES, Part, has_received, parts_received, receive
from fedmutual.data.site import SharedData, own_public_set
from fedmutual.logs import brief
from fedmutual.settings import Settings, SettingsError
from fedmutual.settings.at_site import says_true, trusts_run
from fedmutual.settings.identity import partition_of
from fedmutual.wire.arrays import unpacked
from fedmutual.wire.codec import MessageError
from fedmutual.wire.exchange import Exchange, Reply, messages_to
from fedmutual.wire.grids import GridAround
from fedmutual.wire.records import is_integer

logger = logging.getLogger(__name__)

MESSAGE_TYPE = "query.public"
PART_BYTES = 32 * 2**20
ACCEPT, MOST = "accept-public", "max-public-bytes"  # of a node's configuration
MOST_CLASSES, LONGEST_NAME = 10_000, 256
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
        slices = part_slices(self._shared.public)
        asked = ConfigRecord({"digest": self._shared.public.digest, "parts": len(slices)})
        question = RecordDict({_PUBLIC: asked})
        missing: dict[int, set[int]] = {}
        for reply in self._send(dict.fromkeys(new, question)):
            said = self._said(reply, len(slices), "did not say whether it has the public set")
            if said is not None and not said[0]:
                missing[reply.node_id] = set(range(len(slices))) - said[1] or {0}
        sent = sum(
            self._send_part(number, len(slices), where, missing) for number, where in enumerate(slices)
        )
        if missing:
            self._count_bytes(sent)
            logger.info("the public set went to %d nodes: %d bytes", len(missing), sent)

    def has_served(self, node: int) -> bool:
        """Whether a node is known to have the whole set."""
        return node in self._served

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
            self._said(reply, count, "did not take the public set")
        return sent

    def _said(self, reply: Reply, count: int, problem: str) -> tuple[bool, set[int]] | None:
        """Read an answer and note who has the whole set; None, and a warning, for whatever else it is."""
        try:
            if reply.content is None:
                raise MessageError(reply.error)
            said = read_answer(reply.content, count)
        except Exception as error:  # nothing that a stranger sends ends the run
            logger.warning("node %d %s: %s", reply.node_id, problem, brief(str(error)))
            return None
        if said[0]:
            self._served.add(reply.node_id)
        return said

    def _send(self, contents: dict[int, RecordDict]) -> list[Reply]:
        timeout = self._exchange.patience.seconds
        return self._exchange.send_and_collect(messages_to(contents, MESSAGE_TYPE, timeout), everyone=True)


class ServingGrid(GridAround):
    """A Grid that serves the public set to a node before an order goes to it."""

    def __init__(self, grid: Grid, distributor: Distributor) -> None:
        super().__init__(grid)
        self._distributor = distributor
        self.takes_turns = getattr(grid, "takes_turns", False)
        self.may_lose = getattr(grid, "may_lose", False)

    def is_new(self, message: Message) -> bool:
        """Whether the node of an order is asked for the public set first, and may let others wait."""
        return self._is_order(message) and not self._distributor.has_served(message.metadata.dst_node_id)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        batch = list(messages)
        self._distributor.serve([m.metadata.dst_node_id for m in batch if self._is_order(m)])
        return self._grid.push_messages(batch)

    @staticmethod
    def _is_order(message: Message) -> bool:
        return message.metadata.message_type[:5] == "train"


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
    MessageError
        What was sent is no question, and no part that this site takes.
    DataError
        The site's owner has not agreed, there is no room for the set, or it does not have its digest.
    """
    cache_dir, question = cache_folder(settings.cache_dir), _config(content)
    wanted, count = question.get("digest"), question.get("parts")
    if not isinstance(wanted, str) or not is_integer(count):
        raise MessageError(f"{_PUBLIC}: {brief(wanted)}, {brief(count)}: not a digest and a number of parts")
    if _PIXELS in content:
        _require_agreement(node_config)
        most = _max_bytes(node_config)
        part = _read_part(wanted, question, content, settings.data.image_size, most)
        whole = receive(cache_dir, part, most)
    else:
        whole = _has(settings, node_config, cache_dir, wanted)
    parts = [] if whole else parts_received(cache_dir, wanted, count)
    return RecordDict({_PUBLIC: ConfigRecord({"whole": whole, "parts": parts})})


def read_answer(content: RecordDict, count: int) -> tuple[bool, set[int]]:
    """Return whether a site has the whole set, and which of the ``count`` parts.

    Raises
    ------
    MessageError
        The answer is none; the text names what is wrong with it.
    """
    said = _config(content)
    whole, parts = said.get("whole"), said.get("parts")
    if not isinstance(whole, bool):
        raise MessageError(f"{_PUBLIC}: whole: {brief(whole)} is neither true nor false")
    if not isinstance(parts, list) or len(parts) > count:
        size = f"{len(parts)} entries" if isinstance(parts, list) else brief(parts)
        raise MessageError(f"{_PUBLIC}: parts: {size}, not a list of up to {count} parts")
    numbers = {part for part in parts if isinstance(part, int) and 0 <= part < count}
    if len(numbers) < len(parts) or not all(map(is_integer, parts)):
        raise MessageError(f"{_PUBLIC}: parts: {brief(parts[:9])}: a part is a number from 0 to {count - 1}")
    return whole, numbers


def _config(content: RecordDict) -> ConfigRecord:
    record = content.get(_PUBLIC)
    if not isinstance(record, ConfigRecord):
        raise MessageError(f"{_PUBLIC}: missing: install the same fedmutual version on both")
    return record


def _read_part(
    wanted: str, config: ConfigRecord, content: RecordDict, image_size: int, max_bytes: int
) -> Part:
    """Read a part; its pixels are unpacked only after their header has been checked."""
    number, count = config.get("part"), config.get("parts")
    if not (is_integer(number) and is_integer(count)):
        raise MessageError(f"{_PUBLIC}: part {brief(number)} of {brief(count)}: not two integers")
    classes = config.get("classes")
    if not (
        isinstance(classes, list)
        and 2 <= len(classes) <= MOST_CLASSES
        and all(isinstance(name, str) and len(name) <= LONGEST_NAME for name in classes)
    ):
        raise MessageError(f"{_PUBLIC}: classes: not a list of 2 to {MOST_CLASSES} names")
    return Part(
        digest=wanted,
        number=number,
        count=count,
        classes=tuple(cast(list[str], classes)),
        labels=_read_labels(config.get("labels")),
        images=_read_pixels(content[_PIXELS], image_size, max_bytes),
    )


def _read_labels(values: object) -> NDArray[np.int64] | None:
    if values is None:
        return None
    if not isinstance(values, bytes) or len(values) % 8:
        raise MessageError(f"{_PUBLIC}: labels: not 8 bytes for each image")
    return np.frombuffer(values, "<i8").astype(np.int64)


def _read_pixels(record: object, image_size: int, max_bytes: int) -> NDArray[np.uint8]:
    array = record.get("images") if isinstance(record, ArrayRecord) else None
    if array is None or len(cast(ArrayRecord, record)) != 1:
        raise MessageError(f"{_PIXELS}: not one array of images")
    shape = tuple(array.shape)
    one = image_size * image_size * 3
    if len(shape) != 4 or not is_integer(shape[0]) or not 0 < shape[0] <= max_bytes // one:
        raise MessageError(
            f"{_PIXELS}: {brief(shape)} is no shape of pictures that this site takes (max-public-bytes)"
        )
    expected = (int(shape[0]), image_size, image_size, 3)
    remedy = f"the run's data.image_size is {image_size}"
    return unpacked(f"{_PIXELS}: images", array, expected, np.dtype(np.uint8), "not", remedy)


def _require_agreement(node_config: Mapping[str, Any]) -> None:
    agreed = says_true(node_config, ACCEPT) if ACCEPT in node_config else trusts_run(node_config)
    if not agreed:
        text = (
            "public.distribute: this site takes no public images from a server: copy them to it, or let its "
            f"owner agree in its node configuration ({ACCEPT}=true)"
        )
        raise DataError.to_everyone(text)


def _max_bytes(node_config: Mapping[str, Any]) -> int:
    most = node_config.get(MOST, MAX_BYTES)
    try:
        return int(most)
    except (TypeError, ValueError) as error:
        raise SettingsError(f"{MOST}: not a number of bytes") from error


def _has(settings: Settings, node_config: Mapping[str, Any], cache_dir: Path, wanted: str) -> bool:
    if partition_of(node_config) is not None:  # it shares the server's pool; its order checks the digest
        return True
    if has_received(cache_dir, wanted):
        return True
    own = own_public_set(settings)
    return own is not None and own.digest == wanted
