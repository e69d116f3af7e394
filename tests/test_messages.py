"""The wire: what is packed comes back, within the error that its type allows; what is wrong is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from hypothesis import given, settings
from hypothesis import strategies as st
from local_grid import enter_run, over_the_wire

from fedmutual.wire import reports
from fedmutual.wire.codec import WIRE_DTYPES, MessageError, decode, encode
from fedmutual.wire.orders import Order, order_record, read_order
from fedmutual.wire.records import METRICS, MODEL, ORDER, PROTOCOL, REPORT, payload_bytes
from fedmutual.wire.reports import Expected, Report, read_report, report_record

FLOOR = 1e-4
LIMIT = -np.log(FLOOR)
# half a step of the type at the largest value that it has to hold
STEP = {"float32": 2.0**-24, "float16": 2.0**-11, "int8": 1 / 254}


def log_softmax(scores: np.ndarray) -> np.ndarray:
    shifted = scores - scores.max(axis=1, keepdims=True)
    return (shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))).astype(np.float32)


@st.composite
def distributions(draw: st.DrawFn) -> np.ndarray:
    """Log-probabilities [n, C], from nearly uniform to certain, also confidently wrong."""
    samples, classes = draw(st.integers(0, 12)), draw(st.sampled_from([2, 2, 3, 5, 12, 50]))
    spread = draw(st.sampled_from([0.01, 1.0, 5.0, 40.0]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return log_softmax(rng.normal(0, spread, (samples, classes)))


def wire(content: RecordDict) -> RecordDict:
    """What the other side gets."""
    enter_run()
    return over_the_wire(Message(content, 7, "train.round")).content


def a_report(**changes: Any) -> Report:
    report = Report(
        client="hospital-a",
        round=3,
        public_digest="d1",
        architecture="VisionNet",
        predictions=log_softmax(np.array([[0.0, 1.0], [0.0, -2.0], [0.0, 0.5]])),
        metrics={"num-examples": 40, "train-loss": 0.25, "validation-recall": [0.5, 1.0]},
    )
    return replace(report, **changes)


EXPECTED = Expected(
    round=3, public_digest="d1", num_samples=3, num_classes=2, wire_dtype="float16", floor=FLOOR
)


def an_order(**changes: Any) -> Order:
    order = Order(
        run="run-1",
        round=2,
        closing=False,
        public_digest="d1",
        num_classes=2,
        classes=("mask", "no_mask"),
        indices=np.arange(5, dtype=np.int32),
        target_indices=np.array([1, 4], np.int32),
        log_targets=log_softmax(np.array([[0.0, 1.0], [3.0, 0.0]])),
        target_entropies=None,
        kl_weight=0.5,
        evaluate_unseen=True,
    )
    return replace(order, **changes)


# ---------------------------------------------------------------------------------------------------
# Distributions


@given(
    distributions(),
    st.sampled_from([d for d in WIRE_DTYPES if d != "label"]),
    st.sampled_from([1e-7, 1e-4, 1e-2, 0.1]),
)
@settings(max_examples=150, deadline=None)
def test_every_distribution_survives_within_the_error_of_its_type(
    log_p: np.ndarray, wire_dtype: str, floor: float
) -> None:
    limit = -np.log(floor)
    samples, classes = log_p.shape
    data = encode(log_p, wire_dtype, floor)
    back = decode(data, samples, classes, wire_dtype, floor)
    assert back.dtype == np.float32
    assert back.shape == log_p.shape
    np.testing.assert_allclose(np.exp(back).sum(axis=1), 1, atol=1e-4)
    error = STEP[wire_dtype] * limit + 1e-5
    if classes == 2:
        assert len(data) == samples * np.dtype(wire_dtype).itemsize  # one value a sample
        odds = np.clip(log_p[:, 1] - log_p[:, 0], -limit, limit)
        np.testing.assert_allclose(back[:, 1] - back[:, 0], odds, atol=error)
    else:
        # raising to the floor adds at most C * floor to a row, which the normalisation takes out again
        expected = np.maximum(log_p, -limit)
        np.testing.assert_allclose(back, expected, atol=2 * error + np.log1p(classes * floor))


@given(distributions(), st.sampled_from(WIRE_DTYPES))
@settings(max_examples=50, deadline=None)
def test_what_is_kept_in_float16_is_the_float32_value_rounded_once(
    log_p: np.ndarray, wire_dtype: str
) -> None:
    data = encode(log_p, wire_dtype, FLOOR)
    exact = decode(data, *log_p.shape, wire_dtype, FLOOR)
    half = decode(data, *log_p.shape, wire_dtype, FLOOR, dtype=np.float16)
    assert half.dtype == np.float16
    assert half.flags.c_contiguous
    np.testing.assert_array_equal(half, exact.astype(np.float16))


def test_a_report_kept_in_float16_takes_half_the_memory() -> None:
    content = wire(report_record(a_report(), "float16", FLOOR))
    whole, half = (read_report(content, replace(EXPECTED, half=kept)).predictions for kept in (False, True))
    assert half.nbytes * 2 == whole.nbytes
    np.testing.assert_array_equal(half, whole.astype(np.float16))


def test_the_errors_of_the_types_are_the_documented_ones() -> None:
    log_p = log_softmax(np.stack([np.zeros(2001), np.linspace(-9, 9, 2001)], axis=1))
    worst = {
        name: np.abs(decode(encode(log_p, name, FLOOR), 2001, 2, name, FLOOR) - log_p).max()
        for name in WIRE_DTYPES
    }
    assert worst["float32"] < 2e-6
    assert 1e-3 < worst["float16"] < 4.5e-3  # between 8 and 16 a float16 has steps of 2^-7
    assert 0.02 < worst["int8"] < 0.0363  # half of 9.21 / 127
    assert worst["float16"] < worst["int8"]


@pytest.mark.parametrize("wire_dtype", [d for d in WIRE_DTYPES if d != "label"])
def test_no_probability_below_the_floor_is_sent(wire_dtype: str) -> None:
    certain = np.array([[-100.0, 0.0, -200.0]], np.float32)
    back = decode(encode(certain, wire_dtype, FLOOR), 1, 3, wire_dtype, FLOOR)
    np.testing.assert_allclose(np.exp(back[0]), [FLOOR, 1 - 2 * FLOOR, FLOOR], rtol=0.01)
    two = np.array([[-50.0, 0.0], [0.0, -50.0]], np.float32)
    back = decode(encode(two, wire_dtype, FLOOR), 2, 2, wire_dtype, FLOOR)
    np.testing.assert_allclose(back[:, 1] - back[:, 0], [LIMIT, -LIMIT], rtol=1e-3)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("wire_dtype", [d for d in WIRE_DTYPES if d != "label"])
def test_a_diverged_model_sends_nothing(wire_dtype: str, classes: int) -> None:
    # int8 has no NaN: it would arrive as a zero, which is a distribution
    bad = np.full((2, classes), np.nan, np.float32)
    with pytest.raises(MessageError, match=r"not finite.*diverge"):
        encode(bad, wire_dtype, FLOOR)


def halves(*values: float) -> bytes:
    return np.array(values, "<f2").tobytes()


@pytest.mark.parametrize(
    ("data", "classes", "problem"),
    [
        (halves(0, 0), 2, "4 bytes, not 3 x 1 values of float16"),
        (halves(0, 0, 0, 0), 2, "8 bytes, not 3 x 1"),
        (b"", 2, "0 bytes"),
        (halves(0, np.nan, 0), 2, "not finite"),
        (halves(0, np.inf, 0), 2, "not finite"),
        (halves(0, -np.inf, 0), 2, "not finite"),
        (halves(0, 11, 0), 2, r"values from 0 to 11, outside \[-9.21, 9.21\].*probability_floor"),
        (halves(*np.log([0.2, 0.3, 0.5] * 2), 0.5, 0, 0), 3, "outside"),
        (halves(*np.log([0.2, 0.3, 0.5] * 2), -20, 0, 0), 3, "outside"),
        (halves(*np.log([0.2, 0.3, 0.5] * 2), *np.log([0.2, 0.3, 0.6])), 3, "a row sums to 1.1, not to 1"),
        (halves(*np.log([0.2, 0.3, 0.5] * 2), *np.log([0.2, 0.1, 0.5])), 3, "a row sums to 0.8, not to 1"),
    ],
)
def test_what_is_no_distribution_is_refused(data: bytes, classes: int, problem: str) -> None:
    with pytest.raises(MessageError, match=problem):
        decode(data, 3, classes, "float16", FLOOR)


# ---------------------------------------------------------------------------------------------------
# Reports


@given(distributions(), st.sampled_from([d for d in WIRE_DTYPES if d != "label"]))
@settings(max_examples=40, deadline=None)
def test_a_report_comes_back(log_p: np.ndarray, wire_dtype: str) -> None:
    samples, classes = log_p.shape
    unseen = log_softmax(np.ones((4, classes)))
    report = a_report(predictions=log_p, unseen_predictions=unseen)
    expected = replace(
        EXPECTED, num_samples=samples, num_classes=classes, wire_dtype=wire_dtype, num_unseen=4
    )
    expected = replace(expected, num_classes=classes)
    report = replace(
        report, metrics={"num-examples": 40, "train-loss": 1 / 3, "validation-recall": [0.5] * classes}
    )
    back = read_report(wire(report_record(report, wire_dtype, FLOOR)), expected)
    for name in ("client", "round", "public_digest", "architecture", "metrics", "model"):
        assert getattr(back, name) == getattr(report, name)
    direct = decode(encode(log_p, wire_dtype, FLOOR), samples, classes, wire_dtype, FLOOR)
    np.testing.assert_array_equal(back.predictions, direct)
    assert back.unseen_predictions is not None
    np.testing.assert_allclose(back.unseen_predictions, unseen, atol=0.01)


def test_a_report_may_hold_a_model_and_lacks_it_otherwise() -> None:
    weights = ArrayRecord({"w": Array(np.arange(3, dtype=np.float32))})
    back = read_report(wire(report_record(a_report(model=weights), "float16", FLOOR)), EXPECTED)
    assert back.model is not None
    np.testing.assert_array_equal(back.model["w"].numpy(), [0, 1, 2])
    assert read_report(wire(report_record(a_report(), "float16", FLOOR)), EXPECTED).model is None


def damaged(part: str = REPORT, **changes: Any) -> RecordDict:
    """A good report with entries (underscores for hyphens) changed, or taken out with None."""
    content = report_record(a_report(unseen_predictions=a_report().predictions), "float16", FLOOR)
    for key, value in changes.items():
        name = key.replace("_", "-")
        if value is None:
            del content[part][name]
        else:
            content[part][name] = value
    return content


def without(part: str) -> RecordDict:
    content = damaged()
    del content[part]
    return content


def instead(part: str, record: Any) -> RecordDict:
    content = damaged()
    content[part] = record
    return content


BAD_REPORTS = {
    "other protocol": (damaged(protocol=PROTOCOL + 1), f"protocol {PROTOCOL + 1}, not {PROTOCOL}: install"),
    "no protocol": (damaged(protocol=None), "protocol None"),
    "no client": (damaged(client=None), "is no name of a client"),
    "empty client": (damaged(client=""), "is no name of a client"),
    "client no text": (damaged(client=5), "is no name of a client"),
    "late": (damaged(round=2), "round: 2, not 3"),
    "no round": (damaged(round=None), "round: None, not 3"),
    "other public set": (
        damaged(public_digest="d2"),
        "public-digest: d2, the server's is d1: give this site the same public images",
    ),
    "other dtype": (damaged(dtype="float32"), "dtype: float32, not float16"),
    "no predictions": (damaged(predictions=None), "predictions: missing"),
    "predictions no bytes": (damaged(predictions=[0.5, 0.5, 0.5]), "predictions: missing"),
    "too few": (damaged(predictions=halves(0, 0)), "predictions: 4 bytes, not 3 x 1"),
    "too many": (damaged(predictions=halves(0, 0, 0, 0)), "predictions: 8 bytes, not 3 x 1"),
    "NaN": (damaged(predictions=halves(0, np.nan, 0)), "predictions: a value is not finite"),
    "inf": (damaged(predictions=halves(0, np.inf, 0)), "predictions: a value is not finite"),
    "out of range": (damaged(predictions=halves(0, 30, 0)), "predictions: values from 0 to 30, outside"),
    "unseen too few": (damaged(unseen_predictions=halves(0)), "unseen-predictions: 2 bytes, not 3 x 1"),
    "unseen NaN": (
        damaged(unseen_predictions=halves(0, np.nan, 0)),
        "unseen-predictions: a value is not finite",
    ),
    "unseen no bytes": (damaged(unseen_predictions="x"), "unseen-predictions: no bytes"),
    "no metrics": (without(METRICS), "metrics: missing"),
    "metrics of another kind": (instead(METRICS, ConfigRecord({"num-examples": 4})), "metrics: missing"),
    "no count": (damaged(METRICS, num_examples=None), "num-examples: None is no count"),
    "count no integer": (damaged(METRICS, num_examples=40.5), "num-examples: 40.5 is no count"),
    "count negative": (damaged(METRICS, num_examples=-1), "num-examples: -1 is no count"),
    "count a list": (damaged(METRICS, num_examples=[1, 2]), r"num-examples: \[1, 2\] is no count"),
    "loss NaN": (damaged(METRICS, train_loss=float("nan")), "train-loss: nan is not finite.*diverge"),
    "recall inf": (
        damaged(METRICS, validation_recall=[0.5, float("inf")]),
        "validation-recall: .*not finite",
    ),
    "recall no list": (damaged(METRICS, validation_recall=0.5), "validation-recall: 0.5 is no list of 2"),
    "recall too long": (damaged(METRICS, validation_recall=[0.5] * 3), "validation-recall: .* no list of 2"),
    "recall of nothing": (damaged(METRICS, validation_recall=[-1.0, -1.0]), "validation-recall: .* no class"),
    "loss a list": (damaged(METRICS, train_loss=[0.5]), r"train-loss: \[0.5\] is no number"),
    "no report": (without(REPORT), "report: the message holds no such record"),
    "report of another kind": (
        instead(REPORT, MetricRecord({"round": 3})),
        "report: the message holds no such record",
    ),
    "empty": (RecordDict(), "report: the message holds no such record"),
    "model of another kind": (instead(MODEL, ConfigRecord({})), "model: no arrays"),
}


@pytest.mark.parametrize("kind", BAD_REPORTS)
def test_a_bad_report_is_refused_with_what_is_wrong(kind: str) -> None:
    content, problem = BAD_REPORTS[kind]
    with pytest.raises(MessageError, match=problem):
        read_report(wire(content), replace(EXPECTED, num_unseen=3))


def test_the_report_that_the_bad_ones_are_made_of_is_good() -> None:
    assert read_report(wire(damaged()), replace(EXPECTED, num_unseen=3)).client == "hospital-a"


def test_rows_that_are_no_distribution_are_refused() -> None:
    expected = replace(EXPECTED, num_samples=1, num_classes=3)
    content = damaged(predictions=halves(*np.log([0.5, 0.5, 0.5])))
    content[METRICS]["validation-recall"] = [0.1, 0.2, 0.3]
    with pytest.raises(MessageError, match=r"a row sums to 1.5, not to 1"):
        read_report(wire(content), expected)


def test_targets_that_several_orders_share_are_packed_once() -> None:
    shared = log_softmax(np.array([[0.0, 1.0], [3.0, 0.0]]))
    alone = order_record(an_order(log_targets=shared))
    shared.flags.writeable = False
    first, second = (order_record(an_order(log_targets=shared, round=r)) for r in (2, 3))
    assert first["order"]["targets"] is second["order"]["targets"]
    assert first["order"]["targets"] == alone["order"]["targets"]
    wide = order_record(an_order(log_targets=shared, wire_dtype="float32"))
    assert wide["order"]["targets"] == shared.tobytes()
    other = shared * 2
    other.flags.writeable = False
    assert order_record(an_order(log_targets=other))["order"]["targets"] == other.astype("<f2").tobytes()


def serialised_bytes(content: RecordDict) -> int:
    return sum(len(part.deflate()) for part in get_all_nested_objects(content).values())


@pytest.mark.parametrize("size", [0, 1, 100, 120, 127, 128, 16_370, 16_383, 16_384, 2**21])
@pytest.mark.parametrize("key", ["", "k", 200 * "k", "é"])
def test_bytes_are_counted_as_they_are_serialised(size: int, key: str) -> None:
    content = RecordDict(
        {
            "order": ConfigRecord(
                {key: bytes(size), "b": b"12", "n": 3, "texts": ["a", "b"], "bits": [b"1"]}
            ),
            "métrics": MetricRecord({"loss": 0.5, "recall": [1.0, 0.0]}),
        }
    )
    assert payload_bytes(content) == serialised_bytes(content)


def test_bytes_of_special_contents() -> None:
    weights = Array(np.zeros(3, np.float32))
    same = ConfigRecord({"a": b"x"})
    for content in (
        RecordDict(),
        RecordDict({"a": ConfigRecord(), "b": MetricRecord()}),
        RecordDict({"a": same, "b": ConfigRecord({"a": b"x"})}),  # equal records travel once
        RecordDict({"a": same, "model": ArrayRecord({"1": weights, "2": weights})}),
        order_record(an_order(config={"lr": 0.1})),
        report_record(a_report(), "float16", FLOOR),
    ):
        assert payload_bytes(content) == serialised_bytes(content)


def test_bytes_of_predictions_are_counted_without_serialising_them(monkeypatch: pytest.MonkeyPatch) -> None:
    content = order_record(an_order())
    sizes: list[int] = []
    original = ConfigRecord.deflate

    def deflate(self: ConfigRecord) -> bytes:
        sizes.append(sum(isinstance(value, bytes) for value in self.values()))
        return original(self)

    monkeypatch.setattr(ConfigRecord, "deflate", deflate)
    payload_bytes(content)
    assert sizes == [0]


def test_the_claimed_name_of_a_bad_report() -> None:
    assert reports.claimed_client(damaged(round=9)) == "hospital-a"
    assert reports.claimed_client(damaged(client=None)) is None
    assert reports.claimed_client(damaged(client=5)) is None
    assert reports.claimed_client(RecordDict()) is None
    assert reports.claimed_client(wire(reports.identification_record("b"))) == "b"


# ---------------------------------------------------------------------------------------------------
# Orders


@pytest.mark.parametrize("wire_dtype", [d for d in WIRE_DTYPES if d != "label"])
@pytest.mark.parametrize("classes", [2, 3, 12])
@pytest.mark.parametrize("entropies", [False, True])
def test_an_order_comes_back(wire_dtype: str, classes: int, entropies: bool) -> None:
    rng = np.random.default_rng(0)
    order = an_order(
        num_classes=classes,
        classes=tuple(f"class {i}" for i in range(classes)),
        log_targets=log_softmax(rng.normal(0, 3, (2, classes))),
        target_entropies=np.array([0.25, 0.5], np.float32) if entropies else None,
        divergence="peer_own" if entropies else "own_peer",
        temperature=2.0,
        wire_dtype=wire_dtype,
        floor=0.01,
        config={"lr": 0.1, "names": ["a", "b"]},
    )
    back = read_order(wire(order_record(order)))
    for name in (
        "run",
        "round",
        "closing",
        "public_digest",
        "num_classes",
        "classes",
        "kl_weight",
        "divergence",
        "temperature",
        "wire_dtype",
        "floor",
        "config",
        "evaluate_unseen",
        "model",
    ):
        assert getattr(back, name) == getattr(order, name)
    np.testing.assert_array_equal(back.indices, order.indices)
    np.testing.assert_array_equal(back.target_indices, order.target_indices)
    assert back.log_targets is not None
    rtol = 0 if wire_dtype == "float32" else 2.0**-11
    np.testing.assert_allclose(back.log_targets, order.log_targets, rtol=rtol)
    if entropies:
        np.testing.assert_array_equal(back.target_entropies, [0.25, 0.5])
    else:
        assert back.target_entropies is None


@pytest.mark.parametrize(("largest", "width"), [(2**16 - 1, 2), (2**16, 4)])
def test_an_index_takes_two_bytes_where_that_is_enough(largest: int, width: int) -> None:
    order = an_order(indices=np.array([3, largest], np.int32))
    content = order_record(order)
    assert len(content[ORDER]["indices"]) == 2 * width
    np.testing.assert_array_equal(read_order(wire(content)).indices, [3, largest])


def test_samples_that_have_a_target_and_are_to_be_predicted_are_named_once() -> None:
    order = an_order(indices=np.array([4, 1], np.int32), target_indices=np.array([4, 1], np.int32))
    content = order_record(order)
    assert "target-indices" not in content[ORDER]
    np.testing.assert_array_equal(read_order(wire(content)).target_indices, [4, 1])


def test_a_first_order_has_no_target() -> None:
    back = read_order(wire(order_record(an_order(log_targets=None, target_indices=np.zeros(0, np.int32)))))
    assert back.log_targets is None
    assert not back.has_target
    assert len(back.target_indices) == 0


def bad_order(**changes: Any) -> RecordDict:
    content = order_record(an_order())
    for key, value in changes.items():
        name = key.replace("_", "-")
        if value is None:
            del content[ORDER][name]
        else:
            content[ORDER][name] = value
    return content


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (bad_order(protocol=9), "the server speaks protocol 9, this site 2: install the same fedmutual"),
        (bad_order(run=None), "malformed.*run"),
        (bad_order(classes=["mask"]), "malformed.*classes: 1 names of 2 classes"),
        (bad_order(num_classes=None), "malformed.*num-classes"),
        (bad_order(num_classes=True), "malformed.*num-classes: True is no integer"),
        (bad_order(indices=b"123"), "malformed"),
        (bad_order(indices_dtype=None), "malformed.*indices-dtype"),
        (bad_order(indices_dtype="<f8"), "malformed.*indices-dtype"),
        (bad_order(target_indices=np.arange(3, dtype="<i4").tobytes()), "malformed"),
        (bad_order(targets=halves(0.0)), "malformed"),
        (bad_order(targets=halves(0.0, np.nan, 0.0, 0.0)), "malformed.*not finite"),
        (bad_order(targets_dtype="no type"), "malformed"),
        (bad_order(target_entropies=halves(0.0)), "malformed"),
        (bad_order(target_entropies=halves(0.0, np.inf)), "malformed.*not finite"),
        (bad_order(round="2"), "malformed.*round"),
        (bad_order(kl_weight="much"), "malformed"),
        (bad_order(divergence="js"), "malformed.*divergence: 'js' is none of"),
        (bad_order(temperature=0.0), "malformed.*temperature: 0.0 is no number above 0"),
        (bad_order(wire_dtype="float64"), "malformed.*wire-dtype: 'float64' is none of"),
        (bad_order(floor=None), "malformed.*floor"),
        (bad_order(floor=-1e-4), "malformed.*floor: -0.0001 is no number above 0"),
        (bad_order(run="../elsewhere"), "malformed.*run"),
        (bad_order(run=".."), "malformed.*run"),
        (RecordDict(), "order: the message holds no such record"),
        (
            RecordDict({ORDER: MetricRecord({"protocol": PROTOCOL})}),
            "order: the message holds no such record",
        ),
        (RecordDict({**bad_order(), MODEL: MetricRecord({})}), "model: no arrays"),
    ],
)
def test_a_malformed_order_is_refused(content: RecordDict, problem: str) -> None:
    with pytest.raises(MessageError, match=problem):
        read_order(wire(content))


# ---------------------------------------------------------------------------------------------------
# Bytes


def test_payload_is_what_flower_serialises() -> None:
    assert payload_bytes(RecordDict()) == len(RecordDict().deflate())
    small, large = (
        payload_bytes(report_record(a_report(predictions=np.zeros((n, 2), np.float32)), "float16", FLOOR))
        for n in (100, 1000)
    )
    assert 0 <= large - small - 2 * 900 <= 2  # a length prefix may take a byte more


def test_the_digest_of_the_private_images_travels_and_nothing_else_in_its_place() -> None:
    digest = "0123456789abcdef" * 2
    assert read_report(wire(report_record(a_report(), "float16", FLOOR)), EXPECTED).private_digest == ""
    record = report_record(a_report(private_digest=digest), "float16", FLOOR)
    assert read_report(wire(record), EXPECTED).private_digest == digest
    for wrong in ("x" * 32, digest[:-1], 7, digest + "\n"):
        config = ConfigRecord({**record[REPORT], "private-digest": wrong})  # type: ignore[dict-item]
        with pytest.raises(MessageError, match=r"private-digest: .* is no digest"):
            read_report(RecordDict({**record, REPORT: config}), EXPECTED)
