"""The server's work grows with K and its memory does not (benchmarks/server_cost.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import server_cost

from fedmutual.learning.consensus import MeanConsensus

SAMPLES, CLASSES = 1_000, 10
ONE_ARRAY = 4 * SAMPLES * CLASSES


@pytest.mark.parametrize(("divergence", "temperature"), server_cost.CASES)
def test_memory_beyond_the_input_does_not_grow_with_the_clients(divergence: str, temperature: float) -> None:
    peaks = {}
    for clients in (4, 64):
        predictions = server_cost.make_predictions(clients, SAMPLES, CLASSES, "float16")
        peaks[clients] = server_cost.peak_bytes(
            lambda p=predictions: server_cost.all_targets(p, divergence, temperature)
        )
    # 60 more clients add less than one client's array: nothing is kept for each of them
    assert abs(peaks[64] - peaks[4]) < ONE_ARRAY / 2
    assert ONE_ARRAY < peaks[64] < 10 * ONE_ARRAY


@pytest.mark.parametrize("clients", [2, 3, 50])
def test_every_contribution_is_computed_twice(clients: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once into the sum, once out of it: 2 K for the targets of all K clients, and no pairs."""
    sizes: list[int] = []
    original = MeanConsensus._contribution

    def counted(self: MeanConsensus, values: Any, weight: float, rows: slice) -> Any:
        sizes.append(values.size)
        return original(self, values, weight, rows)

    monkeypatch.setattr(MeanConsensus, "_contribution", counted)
    predictions = server_cost.make_predictions(clients, 20, 3, "float16")
    server_cost.all_targets(predictions, "own_peer", 1.0)
    assert sizes == [60] * (2 * clients)


def test_peak_bytes_sees_numpy() -> None:
    assert server_cost.peak_bytes(lambda: bytearray(5_000_000)) >= 5_000_000
    held = server_cost.make_predictions(2, SAMPLES, CLASSES, "float32")
    assert server_cost.peak_bytes(lambda: None) < ONE_ARRAY
    assert 4 * SAMPLES * CLASSES <= server_cost.peak_bytes(lambda: server_cost.one_pass(held)) < 2 * ONE_ARRAY


def test_the_benchmark_prints_and_writes_its_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "cost.json"
    small = ["--size", "3", "50", "2", "--repeat", "1", "--json", str(file)]
    assert server_cost.main(small) == 0
    (figures,) = json.loads(file.read_text())
    assert figures["input_bytes"] == 3 * 50 * 2 * 2
    assert [(case["divergence"], case["temperature"]) for case in figures["cases"]] == [*server_cost.CASES]
    assert all(
        case["seconds"] > 0 and case["least"] <= case["passes"] <= case["most"] for case in figures["cases"]
    )
    for name in ("reading a report", "packing an order", "bytes of a report", "bytes of an order"):
        assert len(figures["milliseconds"][name]) == 3
    printed = capsys.readouterr().out
    assert "peer_own" in printed
    assert "reading a report" in printed
