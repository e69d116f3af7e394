"""Nothing that a client sends ends a run: each bad reply is rejected by name, in every kind of strategy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attack import attack as attack_strategy
from attack import exchanges_weights
from attacks import TARGETED, WEIGHTS, Attack, fuzzed, npy
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmutual.engine.roster import Roster
from fedmutual.wire.codec import MessageError
from fedmutual.wire.exchange import Reply
from fedmutual.wire.metrics import read_metrics
from fedmutual.wire.reports import Expected, Report, attempt, read_report, report_record
from fedmutual.wire.weights import read_array, read_weights, weights_record

# unseen predictions are read in the closing round only; a formula is drawn as text
HARMLESS = {"unseen predictions as text", "unseen predictions of 1 MB", "model name with a formula"}
MODEL = {"w": np.ones((2, 2), np.float32), "b": np.zeros(2, np.float32)}
EXPECTED = Expected(1, 3, 2, "float16", 1e-4, public_digest="d", own_metrics=())


def good() -> RecordDict:
    said = np.log(np.array([[0.9, 0.1], [0.5, 0.5], [0.2, 0.8]], np.float32))
    report = Report(
        "a", 1, "d", "Net", said, {"num-examples": 5, "train-loss": 0.5}, model=weights_record(MODEL)
    )
    return report_record(report, "float16", 1e-4)


def rejection(attack: Attack, read: Callable[[RecordDict], Report]) -> str:
    """What the roster says of a spoilt reply, after a good one of the same node."""
    roster, content = Roster(None), good()
    roster.expect(1)
    roster.receive([Reply(5, good(), "", 0, 0, 0.0)], read, 1, False)
    attack(content)
    assert roster.receive([Reply(5, content, "", 0, 0, 0.0)], read, 1, False) == {}
    (line,) = roster.lines()
    assert line["client"] == "a"
    assert "num_examples" not in line
    return str(line["rejected"])


@pytest.mark.parametrize("fault", [fault for fault in TARGETED if fault not in HARMLESS])
def test_every_bad_reply_is_rejected_by_name(fault: str) -> None:
    reason = rejection(TARGETED[fault], lambda content: read_report(content, EXPECTED))
    assert 0 < len(reason) < 400
    assert reason.isprintable()


@pytest.mark.parametrize("fault", WEIGHTS)
def test_weights_that_are_none_are_rejected_by_name(fault: str) -> None:
    def read(content: RecordDict) -> Report:
        report = read_report(content, EXPECTED)
        read_weights(report, MODEL)
        return report

    assert rejection(WEIGHTS[fault], read).startswith("model: ")


@pytest.mark.federation
@pytest.mark.parametrize("strategy", ["mutual", "fedasync"])
def test_a_run_survives_them_all(strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmutual.engine.asynchronous.FIRST_PAUSE", 0.0)
    attacks = [*TARGETED.items(), *(WEIGHTS.items() if exchanges_weights(strategy) else ())]
    outcome = attack_strategy(
        strategy, [*attacks, *(("random", fuzzed(seed)) for seed in range(30))], tmp_path
    )
    assert outcome.ended == []
    assert outcome.not_finite == 0
    harmless = HARMLESS
    if exchanges_weights(strategy):  # an empty array has no predictions to be wrong
        harmless = harmless | {name for name in TARGETED if name.startswith("predictions ")}
    assert set(outcome.accepted) <= harmless
    assert outcome.counts["rejected"] >= 77


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
