"""A site's own record of what has left it: one line a message, written before the message goes.

``<state-dir>/.sent/<client>.jsonl`` belongs to the site, not to a run, and outlives the runs' folders. At
``MOST_BYTES`` it becomes ``<client>.1.jsonl``, which replaces the one before. In a simulation, where server
and sites are one person, nothing is recorded.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedmutual.files.atomic import append
from fedmutual.files.disk import make_private
from fedmutual.results.directory import states_dir
from fedmutual.settings.at_site import trusts_run
from fedmutual.settings.identity import CLIENT_NAME
from fedmutual.wire.records import payload_bytes

FOLDER = ".sent"
MOST_BYTES = 4 * 2**20  # of a file, and there are two: some 20,000 messages
KINDS = {"train.round": "report", "query.key": "key", "query.public": "public set", "query.identify": "name"}


@dataclass(frozen=True)
class Sent:
    """A message that has left the site.

    Attributes
    ----------
    time : str
        UTC, ISO 8601.
    client, run : str
        The run is empty where the question names none.
    round : int
        0 where there is none.
    kind : str
        ``report``, ``key``, ``public set``, ``name`` or ``error``.
    holds : list[str]
        What is in it, by name.
    bytes : int
        Of the content as serialised.
    sha256 : str
        Of the content: its object id in Flower, which the receiver can compute too. Of an error: its text's.
    """

    time: str
    client: str
    run: str
    round: int
    kind: str
    holds: list[str]
    bytes: int
    sha256: str


class SentRecord:
    """The record of one client.

    Parameters
    ----------
    state_dir : Path
    client : str
    """

    def __init__(self, state_dir: Path, client: str) -> None:
        self.path = state_dir / FOLDER / f"{client}.jsonl"

    def add(self, sent: Sent) -> None:
        """Write a line, on the disk on return.

        Raises
        ------
        OSError
            The folder cannot be written or the disk is full.
        """
        line = json.dumps(asdict(sent), ensure_ascii=False).encode() + b"\n"
        make_private(self.path.parent)
        if self.path.exists() and self.path.stat().st_size + len(line) > MOST_BYTES:
            os.replace(self.path, self._older)
        append(self.path, line)

    def read(self) -> Iterator[Sent]:
        """Return the lines in order, without one that a kill cut short."""
        for path in (self._older, self.path):
            lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
            for line in lines:
                try:
                    yield Sent(**json.loads(line))
                except (ValueError, TypeError):
                    continue

    @property
    def _older(self) -> Path:
        return self.path.with_suffix(".1.jsonl")


def states_of(node_config: Mapping[str, Any]) -> Path:
    """Return the folder of a site's states: its ``state-dir``, else one in the user's data folder."""
    return states_dir(str(node_config.get("state-dir") or ""))


def record_reply(order: Message, reply: Message, client: str, node_config: Mapping[str, Any]) -> None:
    """Record a reply that is about to leave; nothing in a simulation.

    Raises
    ------
    OSError
        It cannot be recorded.
    """
    if not trusts_run(node_config):
        SentRecord(states_of(node_config), client).add(described(order, reply, client))


def described(order: Message, reply: Message, client: str) -> Sent:
    """Return the line of a reply."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    run, round = _asked(order.content)
    if reply.has_error():
        reason = (reply.error.reason or "").encode()
        return Sent(now, client, run, round, "error", [], len(reason), hashlib.sha256(reason).hexdigest())
    kind = KINDS.get(order.metadata.message_type, order.metadata.message_type)
    content = reply.content
    return Sent(now, client, run, round, kind, _names(content), payload_bytes(content), content.object_id)


def records_in(state_dir: Path) -> list[SentRecord]:
    """Return the records of all clients below a folder of states, by name."""
    names = {path.name.split(".jsonl")[0].removesuffix(".1") for path in (state_dir / FOLDER).glob("*.jsonl")}
    return [SentRecord(state_dir, name) for name in sorted(names) if CLIENT_NAME.fullmatch(name)]


def _asked(content: RecordDict) -> tuple[str, int]:
    """Run and round that the question names, which the server has written."""
    for record in content.config_records.values():
        if "run" in record:
            run, round = record["run"], record.get("round", 0)
            return str(run)[:200], round if isinstance(round, int) else 0
    return "", 0


def _names(content: RecordDict) -> list[str]:
    """What a message holds: names of values, measurements, and arrays."""
    found: list[str] = []
    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            found.append(f"{name}: {len(record)} arrays")
        elif isinstance(record, ConfigRecord | MetricRecord):
            found += [key for key, value in record.items() if value != b""]
    return found
