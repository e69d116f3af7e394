"""The wire: typed orders and reports, and everything that is checked about what arrives.

An order asks a client for one round of learning (or, at the end, for its closing evaluation), a report
answers it. Each is one ``RecordDict``; distributions travel as the raw bytes of a small array inside the
record, because an ``ArrayRecord`` costs 600 bytes more a message than the 1,200 of 600 predictions.
Only strategies that exchange weights add an ``ArrayRecord`` named ``model``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from fedmutual.wire.codec import FloatArray, MessageError, decode, encode

PROTOCOL = 1

# Names in the records, nowhere else.
ORDER, REPORT, METRICS, MODEL = "order", "report", "metrics", "model"

IndexArray = npt.NDArray[np.int32]
Metrics = dict[str, float | int | list[float] | list[int]]


@dataclass(frozen=True)
class Order:
    """Server to client.

    Attributes
    ----------
    run : str
        Unique name of the run; names the client's state folder.
    round : int
        1..rounds; the closing order is ``rounds + 1``.
    closing : bool
        Take the last mutual step, evaluate, and save the model; no training and no predictions.
    public_digest, classes
        Which public set and which classes, in order.
    public_indices : int32 [n]
        Public samples to predict.
    target_indices : int32 [m]
        Samples of the previous round that ``targets`` belongs to; empty without a target.
    targets : float32 [m, C] or None
        See :class:`fedmutual.learning.consensus.Target`.
    target_entropies : float32 [m] or None
    kl_weight : float
        Lambda of this message's mutual step.
    evaluate_unseen : bool
    model : ArrayRecord or None
        Weights, only from strategies that exchange them.
    """

    run: str
    round: int
    closing: bool
    public_digest: str
    classes: tuple[str, ...]
    public_indices: IndexArray
    target_indices: IndexArray
    targets: FloatArray | None = None
    target_entropies: FloatArray | None = None
    kl_weight: float = 0.0
    evaluate_unseen: bool = False
    model: ArrayRecord | None = None


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
    predictions : float32 [n, C]
        Log-probabilities of the order's public samples; [0, C] in answer to a closing order.
    metrics : Metrics
        ``num-examples`` and the measurements of the round, keyed with hyphens.
    unseen_predictions : float32 [u, C] or None
        In the closing report: what the ensemble is measured from. Not used for learning.
    model : ArrayRecord or None
    """

    client: str
    round: int
    public_digest: str
    architecture: str
    predictions: FloatArray
    metrics: Metrics = field(default_factory=dict)
    unseen_predictions: FloatArray | None = None
    model: ArrayRecord | None = None


@dataclass(frozen=True)
class Expected:
    """What a report must look like to be accepted."""

    round: int
    public_digest: str
    num_samples: int
    num_classes: int
    wire_dtype: str
    floor: float
    num_unseen: int | None = None


# ---------------------------------------------------------------------------------------------------
# Orders


def order_record(order: Order, wire_dtype: str) -> RecordDict:
    """Pack an order. Targets travel in float16, or in float32 where predictions do."""
    dtype = "<f4" if wire_dtype == "float32" else "<f2"
    index_dtype = _index_dtype(order)
    config: dict[str, Any] = {
        "protocol": PROTOCOL,
        "run": order.run,
        "round": order.round,
        "closing": order.closing,
        "public-digest": order.public_digest,
        "classes": list(order.classes),
        "indices-dtype": index_dtype,
        "public-indices": order.public_indices.astype(index_dtype).tobytes(),
        "kl-weight": float(order.kl_weight),
        "evaluate-unseen": order.evaluate_unseen,
        "targets-dtype": dtype,
    }
    if not np.array_equal(order.target_indices, order.public_indices):  # a static public set goes once
        config["target-indices"] = order.target_indices.astype(index_dtype).tobytes()
    if order.targets is not None:
        config["targets"] = order.targets.astype(dtype).tobytes()
    if order.target_entropies is not None:
        config["target-entropies"] = order.target_entropies.astype(dtype).tobytes()
    records: dict[str, Any] = {ORDER: ConfigRecord(config)}
    if order.model is not None:
        records[MODEL] = order.model
    return RecordDict(records)


def read_order(content: RecordDict) -> Order:
    """Unpack and check an order.

    Raises
    ------
    MessageError
        For another protocol version or a malformed record.
    """
    config = _config(content, ORDER)
    if config.get("protocol") != PROTOCOL:
        raise MessageError(
            f"the server speaks protocol {config.get('protocol')}, this site {PROTOCOL}: "
            "install the same fedmutual version on both"
        )
    model = _model(content)
    try:
        classes = tuple(cast(list[str], config["classes"]))
        dtype = np.dtype(cast(str, config["targets-dtype"]))
        public_indices = target_indices = _indices(config, "public-indices")
        if "target-indices" in config:
            target_indices = _indices(config, "target-indices")
        targets = entropies = None
        if "targets" in config:
            flat = np.frombuffer(cast(bytes, config["targets"]), dtype).astype(np.float32)
            targets = flat.reshape(len(target_indices), len(classes))
        if "target-entropies" in config:
            flat = np.frombuffer(cast(bytes, config["target-entropies"]), dtype).astype(np.float32)
            entropies = flat.reshape(len(target_indices))
        return Order(
            run=_folder_name(config["run"]),
            round=_integer(config["round"], "round"),
            closing=bool(config["closing"]),
            public_digest=str(config["public-digest"]),
            classes=classes,
            public_indices=public_indices,
            target_indices=target_indices,
            targets=targets,
            target_entropies=entropies,
            kl_weight=float(cast(float, config["kl-weight"])),
            evaluate_unseen=bool(config["evaluate-unseen"]),
            model=model,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise MessageError(f"order: malformed: {error!r}") from error


# ---------------------------------------------------------------------------------------------------
# Reports


def report_record(report: Report, wire_dtype: str, floor: float) -> RecordDict:
    """Pack a report."""
    config: dict[str, Any] = {
        "protocol": PROTOCOL,
        "client": report.client,
        "round": report.round,
        "public-digest": report.public_digest,
        "architecture": report.architecture,
        "dtype": wire_dtype,
        "predictions": encode(report.predictions, wire_dtype, floor),
    }
    if report.unseen_predictions is not None:
        config["unseen-predictions"] = encode(report.unseen_predictions, "float16", floor)
    records: dict[str, Any] = {REPORT: ConfigRecord(config), METRICS: MetricRecord(cast(Any, report.metrics))}
    if report.model is not None:
        records[MODEL] = report.model
    return RecordDict(records)


def claimed_client(content: RecordDict) -> str | None:
    """The name in a report that may otherwise be malformed; None where it has none."""
    try:
        name = _config(content, REPORT).get("client")
    except MessageError:
        return None
    return name if isinstance(name, str) and name else None


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
    config = _config(content, REPORT)
    if config.get("protocol") != PROTOCOL:
        raise MessageError(f"protocol {config.get('protocol')}, not {PROTOCOL}: install the same fedmutual")
    client = config.get("client")
    if not isinstance(client, str) or not client:
        raise MessageError("client: the report names no client")
    if config.get("round") != expected.round:
        raise MessageError(f"round: {config.get('round')}, not {expected.round}")
    if config.get("public-digest") != expected.public_digest:
        raise MessageError(
            f"public-digest: {config.get('public-digest')}, the server's is {expected.public_digest}: "
            "give this site the same public images"
        )
    if config.get("dtype") != expected.wire_dtype:
        raise MessageError(f"dtype: {config.get('dtype')}, not {expected.wire_dtype}")
    data = config.get("predictions")
    if not isinstance(data, bytes):
        raise MessageError("predictions: missing")
    predictions = decode(
        data, expected.num_samples, expected.num_classes, expected.wire_dtype, expected.floor
    )
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
        client=client,
        round=expected.round,
        public_digest=expected.public_digest,
        architecture=str(config.get("architecture", "")),
        predictions=predictions,
        metrics=_metrics(content, expected.num_classes),
        unseen_predictions=unseen,
        model=_model(content),
    )


def identification_record(client: str) -> RecordDict:
    """Answer to the question who a node is."""
    return RecordDict({REPORT: ConfigRecord({"protocol": PROTOCOL, "client": client})})


def unseen_payload_bytes(report: Report) -> int:
    """Bytes of a closing report's predictions on the unseen set."""
    if report.unseen_predictions is None:
        return 0
    return len(encode(report.unseen_predictions, "float16", 1e-4))


def payload_bytes(content: RecordDict) -> int:
    """Bytes of a message's content as Flower serialises it."""
    return sum(len(part.deflate()) for part in get_all_nested_objects(content).values())


def _index_dtype(order: Order) -> str:
    """Two bytes an index where that is enough."""
    both = np.concatenate((order.public_indices, order.target_indices))
    return "<u2" if both.max(initial=0) < 2**16 else "<i4"


def _indices(config: dict[str, Any], key: str) -> IndexArray:
    dtype = str(config["indices-dtype"])
    if dtype not in ("<u2", "<i4"):
        raise ValueError(f"indices-dtype {dtype!r}")
    return np.frombuffer(cast(bytes, config[key]), dtype).astype(np.int32)


def _metrics(content: RecordDict, num_classes: int) -> Metrics:
    record = content.get(METRICS)
    if not isinstance(record, MetricRecord):
        raise MessageError("metrics: missing")
    metrics: Metrics = dict(record)
    count = metrics.get("num-examples")
    if not isinstance(count, int) or count < 0:
        raise MessageError(f"num-examples: {count!r} is no count")
    for name, value in metrics.items():
        if not np.isfinite(np.asarray(value, dtype=np.float64)).all():
            raise MessageError(f"{name}: {value} is not finite (did the training diverge?)")
        if not name.endswith("-recall"):
            if isinstance(value, list):
                raise MessageError(f"{name}: {value} is no number")
        elif not isinstance(value, list) or len(value) != num_classes:
            raise MessageError(f"{name}: {value} is no list of {num_classes} recalls")
        elif max(value) < 0:  # -1 stands for a class that does not occur
            raise MessageError(f"{name}: {value} measures no class")
    return metrics


def _model(content: RecordDict) -> ArrayRecord | None:
    model = content.get(MODEL)
    if model is not None and not isinstance(model, ArrayRecord):
        raise MessageError(f"{MODEL}: no arrays")
    return model


def _folder_name(run: object) -> str:
    """The run's name, which becomes a folder at the client and must not lead out of the state folder."""
    name = str(run)
    if name in ("", ".", "..") or "/" in name or "\\" in name:
        raise ValueError(f"run: {name!r} cannot be the name of a folder")
    return name


def _integer(value: object, name: str) -> int:
    if not isinstance(value, int):
        raise TypeError(f"{name}: {value!r} is no integer")
    return value


def _config(content: RecordDict, name: str) -> dict[str, Any]:
    record = content.get(name)
    if not isinstance(record, ConfigRecord):
        raise MessageError(f"{name}: the message holds no such record")
    return dict(record)
