"""Replies that a hostile client may send: targeted ones by name, and random ones from a seed.

Each attack changes a good reply in place, as far as Flower's records allow it. :data:`TARGETED` are for any
strategy, :data:`WEIGHTS` for the weights of those that exchange them.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

Attack = Callable[[RecordDict], None]

# ---------------------------------------------------------------------------------------------------
# How a reply is changed


def config(**values: Any) -> Attack:
    """Set entries of the report."""

    def change(content: RecordDict) -> None:
        for key, value in values.items():
            content["report"][key.replace("_", "-")] = value  # type: ignore[index]

    return change


def without(name: str) -> Attack:
    """Leave out an entry of the report."""

    def change(content: RecordDict) -> None:
        del content["report"][name]  # type: ignore[union-attr]

    return change


def metric(name: str, value: Any) -> Attack:
    """Set a metric."""

    def change(content: RecordDict) -> None:
        content["metrics"][name] = value  # type: ignore[index]

    return change


def drop(name: str) -> Attack:
    """Leave out a record."""

    def change(content: RecordDict) -> None:
        content.pop(name, None)

    return change


def replaced(name: str, record: Any) -> Attack:
    """Put another record in a record's place."""

    def change(content: RecordDict) -> None:
        content[name] = record

    return change


def emptied(content: RecordDict) -> None:
    """Leave nothing."""
    for name in list(content):
        del content[name]


def predictions(change: Callable[[bytes], bytes]) -> Attack:
    """Change the bytes of the predictions."""

    def attack(content: RecordDict) -> None:
        report = content["report"]
        report["predictions"] = change(report["predictions"])  # type: ignore[index,arg-type]

    return attack


def filled(value: float) -> Attack:
    """Predictions that are all the same float16."""
    return predictions(lambda old: np.full(len(old) // 2, value, "<f2").tobytes())


def metrics(count: int) -> Attack:
    """Add that many metrics."""

    def change(content: RecordDict) -> None:
        for i in range(count):
            content["metrics"][f"m{i}"] = 1.0  # type: ignore[index]

    return change


def npy(header: str, data: bytes = b"") -> bytes:
    """A file in NumPy's format with any header."""
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


def weight(change: Callable[[np.ndarray], Array]) -> Attack:
    """Change the first array of the weights."""

    def attack(content: RecordDict) -> None:
        model = content.get("model")
        assert isinstance(model, ArrayRecord)
        name = next(iter(model))
        model[name] = change(model[name].numpy())

    return attack


def raw(data: bytes, stype: str = "numpy.ndarray") -> Callable[[np.ndarray], Array]:
    """The array's own header around other bytes."""
    return lambda old: Array(dtype=str(old.dtype), shape=old.shape, stype=stype, data=data)


def _objects(old: np.ndarray) -> Array:
    file = io.BytesIO()
    np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return raw(file.getvalue())(old)


def _npz(old: np.ndarray) -> Array:
    file = io.BytesIO()
    np.savez(file, a=old)
    return raw(file.getvalue())(old)


def _declared(**other: Any) -> Callable[[np.ndarray], Array]:
    """Right bytes under a wrong declaration."""

    def change(old: np.ndarray) -> Array:
        right = {
            "dtype": str(old.dtype),
            "shape": old.shape,
            "stype": "numpy.ndarray",
            "data": Array(old).data,
        }
        return Array(**(right | other))

    return change


def _renamed(content: RecordDict) -> None:
    model = content["model"]
    assert isinstance(model, ArrayRecord)
    content["model"] = ArrayRecord({f"other.{name}": array for name, array in model.items()})


def _one_more(content: RecordDict) -> None:
    content["model"]["one.more"] = Array(np.zeros(3, np.float32))  # type: ignore[index]


# ---------------------------------------------------------------------------------------------------
# The targeted ones

TARGETED: dict[str, Attack] = {
    "nothing": emptied,
    "no report": drop("report"),
    "no metrics": drop("metrics"),
    "an empty report": replaced("report", ConfigRecord()),
    "empty metrics": replaced("metrics", MetricRecord()),
    "metrics of another kind": replaced("metrics", ConfigRecord({"num-examples": 1})),
    "report of another kind": replaced("report", MetricRecord({"round": 1})),
    "no name": without("client"),
    "an empty name": config(client=""),
    "name with a slash": config(client="../../etc"),
    "name of 2 MB": config(client="a" * 2_000_000),
    "name of 5000 digits": config(client="1" * 5000),
    "name of 65 letters": config(client="a" * 65),
    "name with a formula": config(client=r"$\frac{$"),
    "name with a line break": config(client="a\nb"),
    "name with a final line break": config(client="a\n"),
    "name with controls": config(client="\x1b[2J"),
    "name in other letters": config(client="кlinik"),
    "name that begins with a dot": config(client=".."),
    "name as bytes": config(client=b"client-1"),
    "name as number": config(client=1),
    "another client's name": config(client="client-0"),
    "no round": without("round"),
    "round as text": config(round="1"),
    "round as float": config(round=1.5),
    "round as list": config(round=[1]),
    "round far away": config(round=2**62),
    "round below 0": config(round=-1),
    "no protocol": without("protocol"),
    "protocol as list": config(protocol=[1, 2]),
    "protocol of the future": config(protocol=10**9),
    "no digest": without("public-digest"),
    "another digest": config(public_digest="0" * 32),
    "digest as bytes": config(public_digest=b"0"),
    "no type": without("dtype"),
    "another type": config(dtype="float64"),
    "type as code": config(dtype="O"),
    "no predictions": without("predictions"),
    "predictions as text": config(predictions="x"),
    "predictions as number": config(predictions=1.0),
    "predictions as list": config(predictions=[0.5, 0.5]),
    "predictions empty": config(predictions=b""),
    "predictions of 1 MB": config(predictions=b"\0" * 1_000_000),
    "predictions cut off": predictions(lambda old: old[:-2] or b"\0"),
    "predictions with an odd byte": predictions(lambda old: old + b"\0"),
    "predictions twice": predictions(lambda old: old * 2 or b"\0\0"),
    "predictions infinite": filled(np.inf),
    "predictions minus infinite": filled(-np.inf),
    "predictions not numbers": filled(np.nan),
    "predictions above 1": filled(6e4),
    "unseen predictions as text": config(unseen_predictions="x"),
    "unseen predictions of 1 MB": config(unseen_predictions=b"\0" * 1_000_000),
    "model name of 1 MB": config(architecture="x" * 1_000_000),
    "model name with controls": config(architecture="\x1b[2J"),
    "model name with a formula": config(architecture=r"$\frac{$"),
    "model name as number": config(architecture=1),
    "underscored name": metric("validation_recall", 0.5),
    "accuracy of 1e18": metric("unseen-accuracy", 1e18),
    "accuracy below 0": metric("validation-accuracy", -0.5),
    "accuracy as list": metric("validation-accuracy", [0.5]),
    "no count of examples": lambda content: content["metrics"].pop("num-examples"),  # type: ignore[attr-defined]
    "examples of 2^63-1": metric("num-examples", 2**63 - 1),
    "examples below 0": metric("num-examples", -1),
    "examples as float": metric("num-examples", 1.5),
    "examples as list": metric("num-examples", [1]),
    "a metric named rejected": metric("rejected", 1),
    "a metric named round": metric("round", 1),
    "a metric named client": metric("client", 1),
    "a metric with a formula": metric(r"$\frac{$", 1.0),
    "a metric without a name": metric("", 1.0),
    "a metric with a name of 1 MB": metric("m" * 1_000_000, 1.0),
    "a metric of 1e308": metric("train-loss", 1e308),
    "a metric of minus 1e308": metric("kl-before", -1e308),
    "a metric that is infinite": metric("train-loss", float("inf")),
    "a metric that is not finite": metric("train-loss", float("nan")),
    "a metric that is a list": metric("train-loss", [1.0, 2.0]),
    "seconds below 0": metric("train-seconds", -1.0),
    "seconds of a century": metric("train-seconds", 3e9),
    "recall as number": metric("validation-recall", 0.5),
    "recalls above 1": metric("validation-recall", [2.0, 0.5]),
    "recalls of no class": metric("validation-recall", [-1.0, -1.0]),
    "recalls of other classes": metric("validation-recall", [0.5, 0.5, 0.5]),
    "a million recalls": metric("validation-recall", [0.5] * 1_000_000),
    "a hundred metrics": metrics(100),
    "ten thousand metrics": metrics(10_000),
}

WEIGHTS: dict[str, Attack] = {
    "no weights": drop("model"),
    "weights of another kind": replaced("model", ConfigRecord({"w": 1})),
    "no layers": replaced("model", ArrayRecord()),
    "other layers": _renamed,
    "a layer more": _one_more,
    "garbage": weight(raw(b"garbage")),
    "empty": weight(raw(b"")),
    "objects": weight(_objects),
    "npz": weight(_npz),
    "4 TiB": weight(raw(npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,), }"))),
    "4 TiB declared": weight(_declared(shape=(2**40,))),
    "a shape below 0": weight(_declared(shape=(-1,))),
    "a thousand dimensions": weight(_declared(shape=(1,) * 1000)),
    "another type declared": weight(_declared(dtype="float64")),
    "no type at all": weight(_declared(dtype="x" * 1000)),
    "a type of objects": weight(_declared(dtype="object")),
    "no shape": weight(raw(npy("{'descr': '<f4'}"))),
    "a header of brackets": weight(raw(npy("(" * 110))),
    "a header of code": weight(raw(npy("__import__('os').getpid()"))),
    "another shape": weight(lambda old: Array(np.zeros((*old.shape, 2), old.dtype))),
    "another type": weight(lambda old: Array(old.astype(np.float64))),
    "another serialisation": weight(_declared(stype="torch")),
    "not finite": weight(lambda old: Array(np.full_like(old, np.nan))),
    "3e38": weight(lambda old: Array(np.full_like(old, 3e38))),
    "cut off": weight(lambda old: raw(Array(old).data[:-4])(old)),
}

# ---------------------------------------------------------------------------------------------------
# The random ones


def fuzzed(seed: int) -> Attack:
    """One to three random changes."""

    def change(content: RecordDict) -> None:
        dice = random.Random(seed)
        for _ in range(dice.randint(1, 3)):
            dice.choice(_CHANGES)(content, dice)

    return change


def _value(dice: random.Random) -> Any:
    return dice.choice([
        lambda: dice.randint(-(2**63), 2**63 - 1),
        lambda: dice.randint(-3, 30),
        lambda: dice.choice([float("nan"), float("inf"), -float("inf"), 1e308, -1e308, 5e-324, -0.0, 0.5]),
        lambda: dice.uniform(-2, 2),
        lambda: "".join(chr(dice.choice([dice.randint(0, 127), dice.randint(160, 55000)])) for _ in "123456"),
        lambda: dice.randbytes(dice.randint(0, 200)),
        lambda: dice.random() < 0.5,
        lambda: [dice.uniform(-1, 2) for _ in range(dice.randint(0, 4))],
        lambda: [dice.randint(-9, 9) for _ in range(dice.randint(0, 4))],
    ])()  # fmt: skip


def _set_entry(content: RecordDict, dice: random.Random) -> None:
    report = content.get("report")
    if isinstance(report, ConfigRecord):
        report[dice.choice([*report, "unseen-predictions", "other"])] = _value(dice)


def _set_metric(content: RecordDict, dice: random.Random) -> None:
    record, value = content.get("metrics"), _value(dice)
    if isinstance(record, MetricRecord) and not isinstance(value, str | bytes | bool):
        names = [*record, "validation-recall", "unseen-accuracy", "kl-before", "seconds"]
        name = dice.choice(names) if dice.random() < 0.8 else str(_value(dice))
        record[name] = value


def _drop_record(content: RecordDict, dice: random.Random) -> None:
    if content:
        del content[dice.choice(list(content))]


def _swap_record(content: RecordDict, dice: random.Random) -> None:
    name = dice.choice(["report", "metrics", "model", "other"])
    content[name] = dice.choice([ConfigRecord(), MetricRecord(), ArrayRecord(), MetricRecord({"a": 1})])


def _bytes(data: bytes, dice: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(dice.randint(1, 8)):
        if changed:
            changed[dice.randrange(len(changed))] = dice.randrange(256)
    start, end = dice.choice([(0, None), (0, None), (0, -1), (1, None), (0, len(data) // 2)])
    return bytes(changed[start:end])


def _flip_predictions(content: RecordDict, dice: random.Random) -> None:
    report = content.get("report")
    if isinstance(report, ConfigRecord) and isinstance(report.get("predictions"), bytes):
        report["predictions"] = _bytes(report["predictions"], dice)  # type: ignore[arg-type]


def _flip_weights(content: RecordDict, dice: random.Random) -> None:
    model = content.get("model")
    if isinstance(model, ArrayRecord) and model:
        name = dice.choice(list(model))
        old = model[name]
        parts: dict[str, Any] = {"dtype": old.dtype, "shape": old.shape, "stype": old.stype, "data": old.data}
        part = dice.choice(["data", "data", "data", "dtype", "shape", "stype"])
        shapes = [(), (0,), (2**40,), (-1,), (*old.shape, 1)]
        others = {
            "dtype": ["O", "float16", "U9", "x", "V4", "M8[ns]"],
            "shape": shapes,
            "stype": ["", "torch"],
        }
        parts[part] = _bytes(old.data, dice) if part == "data" else dice.choice(others[part])
        model[name] = Array(**parts)


_CHANGES = [_set_entry, _set_entry, _set_metric, _set_metric, _flip_predictions, _flip_weights]
_CHANGES += [_drop_record, _swap_record]
