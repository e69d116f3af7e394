"""What orders and reports share: names of records, protocol version, and how a record is read.

Each message is one ``RecordDict``. Distributions travel as the raw bytes of a small array inside a
``ConfigRecord``, because an ``ArrayRecord`` costs 600 bytes more a message than the 1,200 of 600 predictions.
Only strategies that exchange weights add an ``ArrayRecord`` named ``model``.
"""

from __future__ import annotations

import json
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.supercore.constant import HEAD_BODY_DIVIDER, HEAD_VALUE_DIVIDER
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_body

from fedmutual.wire.codec import MessageError

IndexArray = npt.NDArray[np.int32]
Metrics = dict[str, float | int | list[float] | list[int]]

PROTOCOL = 2
MESSAGE_TYPE = "train.round"  # orders of fedmutual's own engine; client_app.py registers its handler

# Names in the records, nowhere else.
ORDER, REPORT, METRICS, MODEL, CONFIG = "order", "report", "metrics", "model", "config"

_ANY_ID = 64 * "0"  # object ids are as long as SHA-256 in hexadecimal

NO_SAMPLES: IndexArray = np.zeros(0, np.int32)
FLOOR = 1e-4  # the least probability that travels, where nothing else is said


def payload_bytes(content: RecordDict) -> int:
    """Bytes of a message's content as Flower serialises it.

    Counted without serialising bytes or computing hashes, unless the content holds arrays or equal records,
    of which Flower sends one.
    """
    records = [record for record in content.values() if not isinstance(record, ArrayRecord)]
    if len(records) < len(content) or _repeats(records):
        return sum(len(part.deflate()) for part in get_all_nested_objects(content).values())
    references = json.dumps(dict.fromkeys(content, _ANY_ID))
    head = f"RecordDict{HEAD_VALUE_DIVIDER}{','.join(_ANY_ID for _ in records)}"
    return _object_bytes(head, len(references)) + sum(_record_bytes(record) for record in records)


def _repeats(records: list[Any]) -> bool:
    return any(bool(a == b) for position, a in enumerate(records) for b in records[:position])


def _record_bytes(record: ConfigRecord | MetricRecord) -> int:
    """Serialised bytes of a record: what is left without its bytes values, and their sizes."""
    blobs = {key: len(value) for key, value in record.items() if isinstance(value, bytes)}
    rest = (
        ConfigRecord({key: value for key, value in record.items() if key not in blobs}) if blobs else record
    )
    body = len(get_object_body(rest.deflate(), type(rest))) + sum(map(_item_bytes, blobs, blobs.values()))
    return _object_bytes(f"{type(record).__qualname__}{HEAD_VALUE_DIVIDER}", body)


def _object_bytes(head: str, body: int) -> int:
    return len(f"{head}{HEAD_VALUE_DIVIDER}{body}") + len(HEAD_BODY_DIVIDER) + body


def _item_bytes(key: str, size: int) -> int:
    """Bytes of an entry of a ConfigRecord with ``size`` bytes, as a message of protocol buffers."""
    name = _field_bytes(len(key.encode())) if key else 0
    return _field_bytes(name + _field_bytes(_field_bytes(size)))


def _field_bytes(size: int) -> int:
    """Bytes of a field with a number below 16: its tag, its length in groups of seven bits, its content."""
    return 1 + max(-(-size.bit_length() // 7), 1) + size


def read_config(content: RecordDict, name: str) -> dict[str, Any]:
    """Values of a ConfigRecord; MessageError where there is none."""
    record = content.get(name)
    if not isinstance(record, ConfigRecord):
        raise MessageError(f"{name}: the message holds no such record")
    return dict(record)


def read_model(content: RecordDict) -> ArrayRecord | None:
    """The weights of a message, where it has any."""
    model = content.get(MODEL)
    if model is not None and not isinstance(model, ArrayRecord):
        raise MessageError(f"{MODEL}: no arrays")
    return model


def is_integer(value: object) -> TypeGuard[int]:
    """Whether a value is a whole number, which True and False are not here."""
    return isinstance(value, int) and not isinstance(value, bool)


def integer(value: object, name: str) -> int:
    """A whole number; TypeError for anything else, True and False included."""
    if not is_integer(value):
        raise TypeError(f"{name}: {value!r} is no integer")
    return value
