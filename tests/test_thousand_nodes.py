"""Light nodes on a real SuperLink (benchmarks/thousand_nodes.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import thousand_nodes


def a_round(number: int, **changes: float) -> dict[str, Any]:
    values = {"beyond": 2.0, "good": 5, "targets": 5 if number > 1 else 0, "distinct": 5 if number > 1 else 0}
    return {"round": number, **values, **changes}


def test_a_good_run_has_no_complaint() -> None:
    figures = {"nodes": 5, "rounds": [a_round(1), a_round(2)]}
    assert thousand_nodes.complaints(figures, limit=2.0) == []


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"beyond": 15.2}, "round 2: 15.2 s, at most 15 s"),
        ({"good": 4}, "round 2: 4 good reports of 5"),
        ({"targets": 4, "distinct": 4}, "round 2: 4 different targets for 4 nodes"),
        ({"distinct": 1}, "round 2: 1 different targets for 5 nodes"),
    ],
)
def test_what_is_wrong_with_a_run_is_said(changes: dict[str, float], complaint: str) -> None:
    figures = {"nodes": 5, "rounds": [a_round(1), a_round(2, **changes)]}
    assert thousand_nodes.complaints(figures, limit=15.0) == [complaint]


def test_the_busiest_process_is_named() -> None:
    cpu = {"SuperLink": 9.0, "ServerApp": 3.0, "nodes": 4.0}
    said = thousand_nodes.bound({"cpu_seconds": cpu, "seconds": 10.0, "processors": 2, "load": 1.0})
    assert said.startswith("Most CPU goes to the SuperLink: 0.90 of a processor; all together keep 80% of 2")


def test_processes_are_told_apart() -> None:
    lines = (["python", "light_nodes.py"], ["/bin/flwr-serverapp", "--token"], ["sh"], [])
    assert [thousand_nodes.kind_of(line) for line in lines] == ["nodes", "ServerApp", "other", ""]


def test_a_round_ends_when_all_its_reports_are_seen() -> None:
    history = [{"round": number} for number in (1, 1, 1, 2, 2, 2)]
    looks = [(10.0, 1), (11.0, 3), (12.0, 5), (13.0, 6)]  # a look may see a part of what is being written
    assert thousand_nodes.ends_of(history, looks) == [11.0, 13.0]


@pytest.mark.slow
def test_light_nodes_take_part_in_a_real_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    small = ["--nodes", "6", "--rounds", "1", "--samples", "40", "--poll", "0.3", "--limit", "120"]
    assert thousand_nodes.main([*small, "--timeout", "240", "--json", str(file)]) == 0
    figures = json.loads(file.read_text())
    assert [each["good"] for each in figures["rounds"]] == [6, 6]
    assert figures["rounds"][1]["distinct"] == 6
    assert figures["errors"] == []
    assert min(figures["peak_bytes"].values()) > 20 * 2**20
    assert min(figures["cpu_seconds"][kind] for kind in ("SuperLink", "ServerApp", "nodes")) > 0
    assert "SuperLink" in capsys.readouterr().out
