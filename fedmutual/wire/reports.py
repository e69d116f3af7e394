"""Reports: what a client answers, and everything that is checked about it."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedmutual.logs import brief
from fedmutual.settings.identity import CLIENT_NAME
from fedmutual.wire.codec import MessageError, decode, encode
from fedmutual.wire.metrics import read_metrics
from fedmutual.wire.records import METRICS, MODEL, PROTOCOL, REPORT, Metrics, read_config, read_model


@dataclass(frozen=True)
class Report:
    """Client to server.

    Attributes
    ----------
    client : str
    round : int
    public_digest : str
    architecture : str
        Class of the client's model.
    predictions : float32 [n, C], or float16 where ``Expected.half``
        Log-probabilities of the order's public samples; [0, C] in answer to a closing order.
    metrics : Metrics
        ``num-examples`` and the measurements of the round, keyed with hyphens.
    unseen_predictions : float32 [u, C] or None
        In the closing report: what the ensemble is measured from. Not used for learning.
    model : ArrayRecord or None
    private_digest : str
        Of the client's private images; it shows whether they changed. Empty: not told.
    masked : bytes or None
        Secure aggregation: in place of predictions, the client's masked part of the sum; empty where it takes
        no part in one.
    """

    client: str
    round: int
    public_digest: str
    architecture: str
    predictions: npt.NDArray[np.floating]
    metrics: Metrics = field(default_factory=dict)
    unseen_predictions: npt.NDArray[np.floating] | None = None
    model: ArrayRecord | None = None
    private_digest: str = ""
    masked: bytes | None = None


@dataclass(frozen=True)
class Expected:
    """What a report must look like to be accepted.

    Attributes
    ----------
    num_unseen : int or None
        Samples of the unseen set, where predictions of them are expected.
    own_metrics : collection of str, or None
        See :func:`fedmutual.wire.metrics.read_metrics`.
    masked_bytes : int or None
        Size of a masked part, where predictions are added up masked.
    half : bool
        Keep the predictions in float16, the type in which they travel by default.
    """

    round: int
    num_samples: int
    num_classes: int
    wire_dtype: str
    floor: float
    public_digest: str = ""
    closing: bool = False
    num_unseen: int | None = None
    own_metrics: Collection[str] | None = None
    masked_bytes: int | None = None
    half: bool = False


def report_record(report: Report, wire_dtype: str, floor: float) -> RecordDict:
    """Pack a report."""
    config: dict[str, Any] = {
        "protocol": PROTOCOL,
        "client": report.client,
        "round": report.round,
        "public-digest": report.public_digest,
        "architecture": report.architecture,
        "dtype": wire_dtype,
    }
    if report.private_digest:
        config["private-digest"] = report.private_digest
    if report.masked is None:
        config["predictions"] = encode(report.predictions, wire_dtype, floor)
    else:
        config["masked"] = report.masked
    if report.unseen_predictions is not None:
        config["unseen-predictions"] = encode(report.unseen_predictions, "float16", floor)
    records: dict[str, Any] = {REPORT: ConfigRecord(config), METRICS: MetricRecord(cast(Any, report.metrics))}
    if report.model is not None:
        records[MODEL] = report.model
    return RecordDict(records)


def claimed_client(content: RecordDict) -> str | None:
    """The name in a report that may otherwise be malformed; None where it has none."""
    try:
        name = read_config(content, REPORT).get("client")
    except MessageError:
        return None
    return cast(str, name) if _is_name(name) else None


def claimed_accuracy(content: RecordDict) -> float | None:
    """The validation accuracy in a report that is not checked yet; None where it has none."""
    metrics = content.get(METRICS)
    value = metrics.get("validation-accuracy") if isinstance(metrics, MetricRecord) else None
    return float(value) if isinstance(value, int | float) else None


def attempt(read: Callable[[RecordDict], Report], content: RecordDict) -> tuple[Report | None, str]:
    """Read a reply; whatever it raises is the reason to reject it, and never ends a run."""
    try:
        return read(content), ""
    except MessageError as error:
        return None, str(error)
    except Exception as error:
        return None, f"malformed: {brief(error)}"


def claimed_seconds(content: RecordDict) -> float:
    """How long a client says it took, in a report that may otherwise be malformed; 0 where it does not."""
    metrics = content.get(METRICS)
    seconds = metrics.get("seconds") if isinstance(metrics, MetricRecord) else None
    return max(float(seconds), 0.0) if isinstance(seconds, int | float) and np.isfinite(seconds) else 0.0


def read_report(content: RecordDict, expected: Expected) -> Report:
    """Unpack a report and check it: protocol, round, public set, type, size, range, distributions.

    Raises
    ------
    MessageError
        With the first thing that is wrong and, where there is one, the remedy.
    """
    config = read_config(content, REPORT)
    if config.get("protocol") != PROTOCOL:
        raise MessageError(
            f"protocol {brief(config.get('protocol'))}, not {PROTOCOL}: install the same fedmutual"
        )
    client = config.get("client")
    if not _is_name(client):
        raise MessageError(f"client: {brief(client)} is no name of a client")
    if config.get("round") != expected.round:
        raise MessageError(f"round: {brief(config.get('round'))}, not {expected.round}")
    if config.get("public-digest") != expected.public_digest:
        raise MessageError(
            f"public-digest: {brief(config.get('public-digest'))}, the server's is {expected.public_digest}: "
            "give this site the same public images"
        )
    if config.get("dtype") != expected.wire_dtype:
        raise MessageError(f"dtype: {brief(config.get('dtype'))}, not {expected.wire_dtype}")
    predictions, masked = _predictions(config, expected)
    unseen = None
    if expected.num_unseen is not None and "unseen-predictions" in config:
        blob = config["unseen-predictions"]
        if not isinstance(blob, bytes):
            raise MessageError("unseen-predictions: no bytes")
        unseen = decode(
            blob,
            expected.num_unseen,
            expected.num_classes,
            "float16",
            expected.floor,
            name="unseen-predictions",
        )
    return Report(
        client=cast(str, client),
        round=expected.round,
        public_digest=expected.public_digest,
        architecture=_architecture(config.get("architecture", "")),
        predictions=predictions,
        metrics=read_metrics(content, expected.num_classes, expected.own_metrics),
        unseen_predictions=unseen,
        model=read_model(content),
        private_digest=_private_digest(config.get("private-digest", "")),
        masked=masked,
    )


def _predictions(
    config: Mapping[str, Any], expected: Expected
) -> tuple[npt.NDArray[np.floating], bytes | None]:
    """The predictions of a report, or none and the masked part that stands for them."""
    name = "predictions" if expected.masked_bytes is None else "masked"
    data = config.get(name)
    if not isinstance(data, bytes):
        raise MessageError(f"{name}: missing")
    if expected.masked_bytes is None:
        shape = (expected.num_samples, expected.num_classes)
        kept = np.float16 if expected.half else np.float32
        return decode(data, *shape, expected.wire_dtype, expected.floor, dtype=kept), None
    if len(data) not in (0, expected.masked_bytes):
        raise MessageError(f"masked: {len(data)} bytes, not {expected.masked_bytes}")
    return np.zeros((0, expected.num_classes), np.float32), data


def identification_record(client: str, **more: bytes) -> RecordDict:
    """Answer to the question who a node is, and to more."""
    return RecordDict({REPORT: ConfigRecord({"protocol": PROTOCOL, "client": client, **more})})


def unseen_payload_bytes(report: Report) -> int:
    """Bytes of a closing report's predictions on the unseen set."""
    if report.unseen_predictions is None:
        return 0
    return len(encode(report.unseen_predictions, "float16", 1e-4))


def _is_name(name: object) -> bool:
    return isinstance(name, str) and CLIENT_NAME.fullmatch(name) is not None


def _architecture(name: object) -> str:
    if not isinstance(name, str) or len(name) > 100 or not name.isprintable():
        raise MessageError(f"architecture: {brief(name)} is no name of a model")
    return name


def _private_digest(text: object) -> str:
    if not isinstance(text, str) or re.fullmatch("(?:[0-9a-f]{32})?", text) is None:
        raise MessageError(f"private-digest: {brief(text)} is no digest")
    return text
