"""Nothing that a client sends ends a run: each bad reply is rejected by name, in every kind of strategy."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from local_grid import FIRST_NODE, play, trains

from fedmutual.engine.roster import Roster
from fedmutual.wire.codec import MessageError
from fedmutual.wire.exchange import Reply
from fedmutual.wire.metrics import read_metrics
from fedmutual.wire.reports import Expected, Report, attempt, read_report, report_record
from fedmutual.wire.weights import read_array, read_weights, weights_record

SECOND = FIRST_NODE + 1
MODEL = {"w": np.ones((2, 2), np.float32), "b": np.zeros(2, np.float32)}
EXPECTED = Expected(1, 3, 2, "float16", 1e-4, public_digest="d", own_metrics=())


def good() -> RecordDict:
    said = np.log(np.array([[0.9, 0.1], [0.5, 0.5], [0.2, 0.8]], np.float32))
    report = Report(
        "a", 1, "d", "Net", said, {"num-examples": 5, "train-loss": 0.5}, model=weights_record(MODEL)
    )
    return report_record(report, "float16", 1e-4)


Spoil = Callable[[RecordDict], None]


def config(**values: Any) -> Spoil:
    def spoil(content: RecordDict) -> None:
        for key, value in values.items():
            content["report"][key.replace("_", "-")] = value  # type: ignore[index]

    return spoil


def metric(name: str, value: Any) -> Spoil:
    def spoil(content: RecordDict) -> None:
        content["metrics"][name] = value  # type: ignore[index]

    return spoil


def drop(name: str) -> Spoil:
    def spoil(content: RecordDict) -> None:
        del content[name]

    return spoil


def replaced(name: str, record: Any) -> Spoil:
    def spoil(content: RecordDict) -> None:
        content[name] = record

    return spoil


def many_metrics(content: RecordDict) -> None:
    for i in range(100):
        content["metrics"][f"m{i}"] = 1.0  # type: ignore[index]


REPLIES: dict[str, Spoil] = {
    "no report": drop("report"),
    "no metrics": drop("metrics"),
    "metrics of another kind": replaced("metrics", ConfigRecord({"num-examples": 1})),
    "report of another kind": replaced("report", MetricRecord({"round": 1})),
    "name with a slash": config(client="../../etc"),
    "name of 2 MB": config(client="a" * 2_000_000),
    "name of 5000 digits": config(client="1" * 5000),
    "name with a formula": config(client=r"$\frac{$"),
    "name with a line break": config(client="a\nb"),
    "name as bytes": config(client=b"client-1"),
    "round as text": config(round="1"),
    "round far away": config(round=2**62),
    "protocol as list": config(protocol=[1, 2]),
    "predictions as text": config(predictions="x"),
    "predictions empty": config(predictions=b""),
    "predictions of 1 MB": config(predictions=b"\0" * 1_000_000),
    "predictions not finite": config(predictions=np.full(24, np.inf, "<f2").tobytes()),
    "model name of 1 MB": config(architecture="x" * 1_000_000),
    "model name with controls": config(architecture="\x1b[2J"),
    "underscored name": metric("validation_recall", 0.5),
    "accuracy of 1e18": metric("unseen-accuracy", 1e18),
    "accuracy below 0": metric("validation-accuracy", -0.5),
    "examples of 2^63-1": metric("num-examples", 2**63 - 1),
    "examples below 0": metric("num-examples", -1),
    "examples as float": metric("num-examples", 1.5),
    "a metric named rejected": metric("rejected", 1),
    "a metric named round": metric("round", 1),
    "a metric of 1e308": metric("train-loss", 1e308),
    "a metric that is not finite": metric("train-loss", float("nan")),
    "a metric that is a list": metric("train-loss", [1.0, 2.0]),
    "recalls above 1": metric("validation-recall", [2.0, 0.5]),
    "recalls of other classes": metric("validation-recall", [0.5, 0.5, 0.5]),
    "a hundred metrics": many_metrics,
}


def npy(header: str, data: bytes = b"") -> bytes:
    """A file in NumPy's format with any header."""
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


def weight(change: Callable[[np.ndarray], Array]) -> Spoil:
    def spoil(content: RecordDict) -> None:
        model = content["model"]
        assert isinstance(model, ArrayRecord)
        name = next(iter(model))
        model[name] = change(model[name].numpy())

    return spoil


def raw(data: bytes, stype: str = "numpy.ndarray") -> Callable[[np.ndarray], Array]:
    return lambda old: Array(dtype=str(old.dtype), shape=old.shape, stype=stype, data=data)


def objects(old: np.ndarray) -> Array:
    file = io.BytesIO()
    np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return raw(file.getvalue())(old)


def npz(old: np.ndarray) -> Array:
    file = io.BytesIO()
    np.savez(file, a=old)
    return raw(file.getvalue())(old)


def as_torch(old: np.ndarray) -> Array:
    return Array(dtype=str(old.dtype), shape=old.shape, stype="torch", data=Array(old).data)


WEIGHTS: dict[str, Spoil] = {
    "no weights": drop("model"),
    "weights of another kind": replaced("model", ConfigRecord({"w": 1})),
    "no layers": replaced("model", ArrayRecord()),
    "garbage": weight(raw(b"garbage")),
    "empty": weight(raw(b"")),
    "objects": weight(objects),
    "npz": weight(npz),
    "4 TiB": weight(raw(npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,), }"))),
    "no shape": weight(raw(npy("{'descr': '<f4'}"))),
    "a header of brackets": weight(raw(npy("(" * 110))),
    "another shape": weight(lambda old: Array(np.zeros((*old.shape, 2), old.dtype))),
    "another type": weight(lambda old: Array(old.astype(np.float64))),
    "another serialisation": weight(as_torch),
    "not finite": weight(lambda old: Array(np.full_like(old, np.nan))),
    "3e38": weight(lambda old: Array(np.full_like(old, 3e38))),
    "cut off": weight(lambda old: raw(Array(old).data[:-4])(old)),
}


def rejection(spoil: Spoil, read: Callable[[RecordDict], Report]) -> str:
    """What the roster says of a spoilt reply, after a good one of the same node."""
    roster, content = Roster(None), good()
    roster.expect(1)
    roster.receive([Reply(5, good(), "", 0, 0, 0.0)], read, 1, False)
    spoil(content)
    assert roster.receive([Reply(5, content, "", 0, 0, 0.0)], read, 1, False) == {}
    (line,) = roster.lines()
    assert line["client"] == "a"
    assert "num_examples" not in line
    return str(line["rejected"])


@pytest.mark.parametrize("fault", REPLIES)
def test_every_bad_reply_is_rejected_by_name(fault: str) -> None:
    reason = rejection(REPLIES[fault], lambda content: read_report(content, EXPECTED))
    assert 0 < len(reason) < 400
    assert reason.isprintable()


@pytest.mark.parametrize("fault", WEIGHTS)
def test_weights_that_are_none_are_rejected_by_name(fault: str) -> None:
    def read(content: RecordDict) -> Report:
        report = read_report(content, EXPECTED)
        read_weights(report, MODEL)
        return report

    assert rejection(WEIGHTS[fault], read).startswith("model: ")


@pytest.mark.parametrize("strategy", ["mutual", "mutual_async", "fedavg", "fedasync"])
def test_a_run_survives_them(strategy: str, tmp_path: Path) -> None:
    every = {**REPLIES, **WEIGHTS}
    left = ["no metrics", "name of 5000 digits", "protocol as list", "accuracy of 1e18"]
    left += ["objects", "3e38"] if strategy.startswith("fed") else ["predictions not finite"]
    count = len(left)

    def tamper(node: int, reply: Message) -> Message:
        if node == SECOND and trains(reply) and not reply.has_error() and left:
            every[left.pop()](reply.content)
        return reply

    extra = [f"strategy={strategy}"] if strategy != "mutual" else []
    small = ("data.pool_size=60", "data.unseen_size=8", f"rounds={count + 1}")
    run = play(tmp_path / "run", *extra, *small, tamper=tamper)
    assert run.error is None
    assert run.summary["status"] == "completed"
    assert len(run.rejections()) == count - len(left) >= 4
    assert {client for _, client, _ in run.rejections()} <= {"client-1", None}  # None: before it was known


def test_a_header_is_checked_before_anything_is_allocated() -> None:
    huge = Array(dtype="float32", shape=(2**40,), stype="numpy.ndarray", data=npy(
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,), }"
    ))  # fmt: skip
    with pytest.raises(MessageError, match="bytes, not"):
        read_array("w", huge, (2**40,), np.dtype(np.float32))


def test_a_good_report_is_read() -> None:
    report, reason = attempt(lambda content: read_report(content, EXPECTED), good())
    assert reason == ""
    assert report is not None


VALUES = st.one_of(
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.text(max_size=80),
    st.binary(max_size=80),
    st.booleans(),
    st.lists(st.floats(), min_size=1, max_size=4),
)


@settings(max_examples=500)
@given(st.dictionaries(st.sampled_from(sorted(good()["report"])), VALUES, min_size=1, max_size=4))
def test_whatever_stands_in_a_report_is_read_or_rejected(changes: dict[str, Any]) -> None:
    content = good()
    for key, value in changes.items():
        content["report"][key] = value  # type: ignore[index]
    report, reason = attempt(lambda c: read_report(c, EXPECTED), content)
    assert (report is None) == bool(reason)
    if report is not None:
        assert np.isfinite(report.predictions).all()
        np.testing.assert_allclose(np.exp(report.predictions).sum(axis=1), 1, rtol=1e-3)


@settings(max_examples=500)
@given(
    st.dictionaries(
        st.one_of(
            st.sampled_from(["train-loss", "validation-accuracy", "validation-recall"]), st.text(max_size=70)
        ),
        st.one_of(
            st.integers(-(2**63), 2**63 - 1), st.floats(), st.lists(st.floats(), min_size=1, max_size=3)
        ),
        max_size=5,
    )
)
def test_whatever_stands_in_the_metrics_is_in_range_or_rejected(found: dict[str, Any]) -> None:
    content = RecordDict({"metrics": MetricRecord({**found, "num-examples": 1})})
    try:
        metrics = read_metrics(content, 2, ())
    except MessageError:
        return
    assert metrics.keys() <= {"num-examples", "train-loss", "validation-accuracy", "validation-recall"}
    assert 0 <= metrics.get("validation-accuracy", 0) <= 1  # type: ignore[operator]
    assert abs(metrics.get("train-loss", 0)) <= 1e9  # type: ignore[arg-type]


@settings(max_examples=300)
@given(st.binary(max_size=300))
def test_whatever_stands_in_an_array_is_rejected(data: bytes) -> None:
    like = {"w": np.zeros(3, np.float32)}
    model = ArrayRecord({"w": Array(dtype="float32", shape=(3,), stype="numpy.ndarray", data=data)})
    report = Report("a", 1, "d", "Net", np.zeros((0, 2), np.float32), {}, model=model)
    with pytest.raises(MessageError, match="model: w"):
        read_weights(report, like)


def test_good_weights_are_read() -> None:
    like = {"w": np.arange(3, dtype=np.float32), "n": np.array(5)}
    report = Report("a", 1, "d", "Net", np.zeros((0, 2), np.float32), {}, model=weights_record(like))
    read = read_weights(report, like)
    assert {name: values.tolist() for name, values in read.items()} == {"w": [0, 1, 2], "n": 5}
