"""``fedmutual audit RUN``: what a run keeps of what its server received, and what can be told from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedmutual.results import received
from fedmutual.results.errors import ResultsError
from fedmutual.results.received import Recorder, read_received


def log_p(*shape: int, seed: int = 0) -> np.ndarray:
    return np.log(np.random.default_rng(seed).dirichlet([1.0] * shape[-1], shape[:-1])).astype(np.float32)


def test_what_was_received_is_read_back(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    assert read_received(tmp_path) is None
    positions = np.array([1, 5, 6], np.int32)
    said = {"a": log_p(3, 2), "b": log_p(3, 2, seed=1)}
    for round in (2, 10, 1):
        recorder.add(round, positions, said)
    recorder.add(3, positions[:0], {"a": log_p(0, 2)})
    recorder.close({"a": log_p(7, 2)})
    recorder.add_weights("a", {"fc.weight": np.arange(3.0)})
    recorder.add_weights("a", {"fc.weight": np.arange(4.0)})
    found = read_received(tmp_path)
    assert found is not None
    assert [heard.round for heard in found.rounds] == [1, 2, 10]
    assert found.rounds[0].view == 1
    assert found.rounds[2].predictions.keys() == said.keys()
    np.testing.assert_array_equal(found.rounds[1].predictions["b"], said["b"])
    np.testing.assert_array_equal(found.unseen["a"], log_p(7, 2))
    assert found.weights["a"]["fc.weight"].tolist() == [0, 1, 2, 3]


def test_the_first_and_the_newest_rounds_are_kept_when_they_are_too_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(tmp_path)
    recorder.add(1, np.arange(50, dtype=np.int32), {"a": log_p(50, 2)})
    size = (tmp_path / received.FOLDER / "0001.npz").stat().st_size
    monkeypatch.setattr(received, "MOST_BYTES", int(3.5 * size))
    for round in range(2, 7):
        recorder.add(round, np.arange(50, dtype=np.int32), {"a": log_p(50, 2)})
    found = read_received(tmp_path)
    assert found is not None
    assert [heard.round for heard in found.rounds] == [1, 5, 6]
    recorder.add_weights("a", {"w": np.zeros(4 * size)})
    assert read_received(tmp_path).weights == {}  # type: ignore[union-attr]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    Recorder(tmp_path).add(1, np.arange(3, dtype=np.int32), {"a": log_p(3, 2)})
    (tmp_path / received.FOLDER / "0001.npz").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(ResultsError, match=r"0001\.npz is damaged"):
        read_received(tmp_path)
