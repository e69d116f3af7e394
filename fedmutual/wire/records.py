"""What orders and reports share: names of records, protocol version, and how a record is read.

Each message is one ``RecordDict``. Distributions travel as the raw bytes of a small array inside a
``ConfigRecord``, because an ``ArrayRecord`` costs 600 bytes more a message than the 1,200 of 600 predictions.
Only strategies that exchange weights add an ``ArrayRecord`` named ``model``.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from fedmutual.wire.codec import MessageError

IndexArray = npt.NDArray[np.int32]
Metrics = dict[str, float | int | list[float] | list[int]]

PROTOCOL = 2
MESSAGE_TYPE = "train.round"  # orders of fedmutual's own engine; client_app.py registers its handler

# Names in the records, nowhere else.
ORDER, REPORT, METRICS, MODEL, CONFIG = "order", "report", "metrics", "model", "config"

NO_SAMPLES: IndexArray = np.zeros(0, np.int32)
FLOOR = 1e-4  # the least probability that travels, where nothing else is said


def payload_bytes(content: RecordDict) -> int:
    """Bytes of a message's content as Flower serialises it."""
    return sum(len(part.deflate()) for part in get_all_nested_objects(content).values())


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
