"""Tables and plots: figures are where they belong, and nothing that a run can leave breaks them."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from fedmutual.report import plots
from fedmutual.report.curves import MOST_LINES
from fedmutual.report.plots import accuracy_figure, collaboration_figure, traffic_figure, write_plots
from fedmutual.report.tables import clients_table, human_bytes, percent
from fedmutual.results.summary import build_summary

RUN: dict[str, Any] = {"experiment_name": None, "seed": 3, "rounds": 2, "strategy": {"name": "mutual"}}
History = list[dict[str, Any]]


def run(clients: int = 2, rounds: int = 2) -> History:
    """Client c has 10 c points less; the mutual step of round r is in the report of round r + 1."""
    history: History = []
    for round in range(1, rounds + 2):
        for client in range(clients):
            step = {"loss_before": 0.5, "loss_after": 0.7, "kl_before": 0.4, "kl_after": 0.1}
            history.append(
                {
                    "round": round,
                    "client": f"client-{client}",
                    "model": "VisionNet",
                    "num_examples": 1234,
                    "validation_accuracy": 0.95,
                    "unseen_accuracy": 0.9 - 0.1 * client,
                    "unseen_balanced_accuracy": 0.89,
                    "uplink_bytes": 1000,
                    "downlink_bytes": 500,
                    **(step if round > 1 else {}),
                    **({"closing": True} if round == rounds + 1 else {}),
                }
            )
    return history


def summary_of(history: History, status: str = "completed", **more: Any) -> dict[str, Any]:
    return build_summary(settings=RUN, status=status, history=history, **more)


def printed(summary: dict[str, Any], width: int = 80) -> list[str]:
    console = Console(width=width, file=io.StringIO())
    console.print(clients_table(summary))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return text.splitlines()


# --- tables


def test_table_rows() -> None:
    lines = printed(summary_of(run(), ensemble={"accuracy": 0.934, "balanced_accuracy": 0.93}))
    rows = {words[0]: words[1:] for line in lines if (words := line.split())}
    assert rows["client-0"] == ["VisionNet", "1,234", "95.0", "90.0", "89.0", "3.00", "kB", "1.50", "kB"]
    assert rows["client-1"][2:5] == ["95.0", "80.0", "89.0"]
    assert rows["mean"] == ["95.0", "85.0", "89.0"]
    assert rows["worst"] == ["95.0", "80.0", "89.0"]
    assert rows["ensemble"] == ["-", "93.4", "93.0"]
    assert rows["total"] == ["6.00", "kB", "3.00", "kB"]


def test_figures_are_whole_in_80_columns() -> None:
    history = run()
    for line in history:
        line.update(client=f"a-hospital-with-a-very-long-name-{line['client']}", model="mobilenet_v3_small")
        line.update(num_examples=123_456, uplink_bytes=250_000_000)
    lines = printed(summary_of(history))
    rows = [line for line in lines if "123,456" in line]
    assert len(rows) == 2
    assert all("750 MB" in row and "1.50 kB" in row and len(row) <= 80 for row in rows)


def test_interrupted_run_says_so() -> None:
    history = [line for line in run() if line["round"] < 2 or line["client"] == "client-0"]
    text = "\n".join(printed(summary_of(history, "failed")))
    assert "†client-1" in text
    assert "†client-0" not in text
    assert "did not finish" in text


def test_table_without_clients_and_without_unseen() -> None:
    assert clients_table(summary_of([], "failed")).row_count == 3
    history = [{"round": 1, "client": "a", "validation_accuracy": 0.5}]
    assert any(line.split()[:4] == ["†a", "-", "-", "50.0"] for line in printed(summary_of(history)))


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (9_994, "9.99 kB"),
        (9_996, "10.0 kB"),
        (99_960, "100 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (7_451_140, "7.45 MB"),
        (5 * 10**15, "5.00 PB"),
    ],
)
def test_human_bytes(count: int, text: str) -> None:
    assert human_bytes(count) == text


@given(st.integers(0, 10**15))
def test_human_bytes_is_right_to_three_digits(count: int) -> None:
    number, unit = human_bytes(count).split()
    size = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "PB": 1e15}[unit]
    assert float(number) * size == pytest.approx(count, rel=0.0051)
    assert float(number) < 1000


def test_percent() -> None:
    assert (percent(0.9345), percent(1.0), percent(None)) == ("93.5", "100.0", "-")


# --- plots


def labelled(figure: Any, panel: int = 0) -> dict[str, list[tuple[float, float]]]:
    """Points of every line of a panel that the legend names."""
    lines = figure.axes[panel].get_lines()
    return {
        line.get_label(): [(float(x), float(y)) for x, y in zip(*line.get_data(), strict=True)]
        for line in lines
        if not line.get_label().startswith("_")
    }


def test_plots_are_written_whole(tmp_path: Path) -> None:
    write_plots(run(), tmp_path)
    names = ["accuracy", "collaboration", "traffic"]
    expected = {f"{name}{suffix}" for name in names for suffix in (".png", ".svg")}
    assert {file.name for file in tmp_path.iterdir()} == expected  # no temporary file is left
    for file in tmp_path.iterdir():
        data = file.read_bytes()
        if file.suffix == ".png":
            width, height = struct.unpack(">II", data[16:24])
            assert width > 1000
            assert height > 500
        else:
            assert data.rstrip().endswith(b"</svg>")


def test_equal_runs_give_equal_files(tmp_path: Path) -> None:
    for name in "ab":
        write_plots(run(), tmp_path / name)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_accuracy_lines_hold_the_figures() -> None:
    figure = accuracy_figure(run())
    lines = labelled(figure)
    assert lines["client-1"] == [(1, 80), (2, 80), (3, 80)]
    assert lines["mean"] == [(1, pytest.approx(85)), (2, pytest.approx(85)), (3, pytest.approx(85))]
    assert figure is not None
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["1", "2", "end"]


def test_collaboration_is_a_saw_tooth() -> None:
    figure = collaboration_figure(run(clients=1))
    assert figure is not None
    loss = [line for line in figure.axes[0].get_lines() if line.get_linestyle() == ":"]
    assert [tuple(map(list, line.get_data())) for line in loss] == [([1, 1.5, 2, 2.5], [0.5, 0.7, 0.5, 0.7])]
    (steps,) = (line for line in figure.axes[1].get_lines() if line.get_linestyle() == "-")
    points = np.column_stack(steps.get_data())
    gap = [np.nan, np.nan]  # nothing from 1.5 to 2
    expected = [[1, 0.4], [1.5, 0.1], gap, [2, 0.4], [2.5, 0.1], gap]
    np.testing.assert_equal(np.where(np.isnan(points[:, 1:]), np.nan, points), expected)


def test_traffic_is_the_running_total() -> None:
    lines = labelled(traffic_figure(run()))
    assert lines["clients to server"] == [(1, 2), (2, 4), (3, 6)]  # kB
    assert lines["server to clients"] == [(1, 1), (2, 2), (3, 3)]


def test_many_clients_become_quantiles() -> None:
    history = run(clients=50)
    for line in history:
        line["unseen_accuracy"] = int(line["client"].removeprefix("client-")) / 49
    lines = labelled(accuracy_figure(history))
    assert set(lines) == {"median of the clients", "thick: unseen set", "thin: own validation images"}
    assert lines["median of the clients"] == [(x, pytest.approx(50)) for x in (1, 2, 3)]
    figure = collaboration_figure(history)
    points = labelled(figure)["median of the clients"]
    assert [y for _, y in points if not np.isnan(y)] == [0.5, 0.7, 0.5, 0.7]


def test_asynchronous_mean_takes_the_last_known_accuracy() -> None:
    history: History = [
        {"round": 1, "client": "a", "unseen_accuracy": 0.5},
        {"round": 2, "client": "b", "unseen_accuracy": 0.7},
        {"round": 3, "client": "a", "unseen_accuracy": 0.9},
    ]
    assert labelled(accuracy_figure(history))["mean"] == [(2, pytest.approx(60)), (3, pytest.approx(80))]


def test_nothing_to_draw(tmp_path: Path) -> None:
    for history in ([], [{"unseen_accuracy": None}], [{"rejected": "late", "unseen_accuracy": 0.5}]):
        write_plots([{"round": 1, "client": "a", **line} for line in history], tmp_path)
    assert not list(tmp_path.iterdir())


FIGURE = st.none() | st.floats()


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {"round": st.integers(1, 40), "client": st.integers(0, 15).map(str)},
            optional={
                "closing": st.booleans(),
                "rejected": st.just("late"),
                "unseen_accuracy": st.none() | st.floats(0, 1),
                "validation_accuracy": st.none() | st.floats(0, 1),
                "loss_before": st.floats(0, 1e3) | FIGURE.filter(lambda x: x is None or x != x),
                "loss_after": st.floats(0, 1e3),
                "kl_before": st.floats(0, 1),
                "kl_after": st.none() | st.floats(0, 1),
                "uplink_bytes": st.integers(0, 10**12),
            },
        ),
        max_size=60,
    )
)
def test_any_history_can_be_drawn(history: History) -> None:
    for draw in (accuracy_figure, collaboration_figure, traffic_figure):
        figure = draw(history)
        if figure is not None:
            figure.draw_without_rendering()


def test_colours_differ() -> None:
    assert len(set(plots.COLOURS)) * len(plots.MARKERS) >= MOST_LINES


WEIRD = ("$\\frac{$", "_hidden", "\udc80", "a\nb", "\x01", "<script>", "9" * 300)


@pytest.mark.parametrize("value", [1e308, -1e308, 1.7e308, 5e-324])
def test_weird_names_and_figures_cost_no_picture(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, value: float
) -> None:
    keys = ("unseen_accuracy", "validation_accuracy", "loss_before", "loss_after", "kl_before", "kl_after")
    history = [
        {"round": round, "client": name, "model": name, "uplink_bytes": 10, **dict.fromkeys(keys, value)}
        for round in (1, 2, 3)
        for name in WEIRD
    ]
    write_plots(history, tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()}
    expected = {"traffic"} if abs(value) > 1 else {"accuracy", "collaboration", "traffic"}
    assert drawn == {f"{name}{suffix}" for name in expected for suffix in (".png", ".svg")}
    assert not caplog.records


def test_a_picture_that_fails_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(history: object) -> None:
        raise RuntimeError("no such glyph")

    monkeypatch.setattr("fedmutual.report.plots.accuracy_figure", broken)
    write_plots(run(), tmp_path)
    assert {path.stem for path in tmp_path.iterdir()} == {"collaboration", "traffic"}
    assert caplog.messages == [f"{tmp_path / 'accuracy'} is not drawn: no such glyph"]


def test_the_axis_of_a_round_that_cannot_be_is_drawn_at_once(tmp_path: Path) -> None:
    history = [{"round": round, "client": "a", "unseen_accuracy": 0.5} for round in (1, 10**9)]
    write_plots(history, tmp_path)
    assert (tmp_path / "accuracy.png").exists()
