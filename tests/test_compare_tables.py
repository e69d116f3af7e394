"""Curves, statistics and tables of a study on numbers worked out by hand."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from scipy import stats

from fedmutual.compare import tables
from fedmutual.compare.outcome import Outcome, Point, _is_virtual, curve
from fedmutual.compare.plan import Plan, PlannedRun
from fedmutual.compare.plots import write_plots
from fedmutual.compare.statistics import paired, paired_over_conditions, spread


def line(round: int, client: str, accuracy: float | None = None, **more: Any) -> dict[str, Any]:
    sizes = {"uplink_bytes": 100, "downlink_bytes": 10, "seconds": 1.0}
    return {"round": round, "client": client, "unseen_accuracy": accuracy, **sizes, **more}


def planned(variant: str, condition: str = "", seed: int = 0) -> PlannedRun:
    return PlannedRun(variant, condition, seed, (), 3, 1, 0.0, f"{variant}-{condition}-{seed}")


# ---------------------------------------------------------------------------------------------------
# Curves


def test_a_curve_has_a_point_a_round_with_the_mean_the_bytes_and_the_slowest_client() -> None:
    history = [
        line(1, "a", 0.5, seconds=2.0), line(1, "b", 0.7, seconds=3.0),
        line(2, "a"), line(2, "b"),  # not evaluated, but paid for
        line(3, "a", 0.9, seconds=5.0), line(3, "b", 1.0),
    ]  # fmt: skip
    first, last = curve(history)
    assert (first.round, first.accuracy, first.bytes, first.seconds) == (1, pytest.approx(0.6), 110, 3.0)
    assert (last.round, last.accuracy, last.bytes, last.seconds) == (3, pytest.approx(0.95), 330, 9.0)


def test_an_asynchronous_curve_has_a_point_an_arrival_and_the_strategys_clock() -> None:
    history = [
        line(1, "a", 0.5, clock=10.0), line(2, "b", 0.7, clock=12.0),
        line(3, "a", 0.9, clock=20.0), line(4, "c", clock=21.0, rejected="late"),
    ]  # fmt: skip
    points = curve(history)
    assert [(p.round, p.seconds, p.bytes) for p in points] == [(2, 12.0, 110), (3, 20.0, 165)]
    assert [p.accuracy for p in points] == pytest.approx([0.6, 0.8])


def test_a_run_without_an_unseen_set_has_no_curve() -> None:
    assert curve([line(1, "a"), line(1, "b")]) == []


def test_a_price_is_the_first_moment_at_the_threshold() -> None:
    points = tuple(Point(r, a, 100.0 * r, 1.0 * r) for r, a in [(1, 0.8), (2, 0.91), (3, 0.89), (4, 0.94)])
    outcome = Outcome(planned("m"), curve=points)
    assert outcome.price(0.9) == points[1]
    assert outcome.price(0.94) == points[3]
    assert outcome.price(0.95) is None


# ---------------------------------------------------------------------------------------------------
# Statistics


def test_spread_by_hand() -> None:
    found = spread([0.90, 0.92, 0.94])
    assert found is not None
    assert (found.count, found.lowest, found.highest) == (3, 0.90, 0.94)
    assert found.mean == pytest.approx(0.92)
    assert found.deviation == pytest.approx(0.02)  # sqrt((0.02² + 0 + 0.02²) / 2)
    assert spread([]) is None
    assert spread([0.9]).deviation is None  # type: ignore[union-attr]


def test_a_paired_interval_by_hand() -> None:
    found = paired({0: 0.91, 1: 0.92, 2: 0.93, 9: 0.1}, {0: 0.90, 1: 0.90, 2: 0.90, 8: 0.2})
    assert found is not None
    assert found.pairs == 3  # seeds 8 and 9 have no partner
    assert found.mean == pytest.approx(0.02)
    # differences 0.01, 0.02, 0.03: s = 0.01; t(0.975, 2) = 4.302653; 4.302653 * 0.01 / sqrt(3) = 0.0248414
    assert found.interval == pytest.approx((-0.0048414, 0.0448414), abs=1e-7)


def test_one_pair_has_no_interval_and_no_pair_no_difference() -> None:
    assert paired({0: 0.5}, {0: 0.4}).interval is None  # type: ignore[union-attr]
    assert paired({0: 0.5}, {1: 0.4}) is None


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=12))
def test_the_interval_is_scipys_paired_t_interval(pairs: list[tuple[float, float]]) -> None:
    a, b = (np.array([pair[i] for pair in pairs]) for i in (0, 1))
    found = paired(dict(enumerate(a.tolist())), dict(enumerate(b.tolist())))
    assert found is not None
    assert found.interval is not None
    if np.ptp(a - b) > 1e-6:  # scipy has no interval for equal differences
        expected = stats.ttest_rel(a, b).confidence_interval(0.95)
        assert found.interval == pytest.approx((expected.low, expected.high), rel=1e-6, abs=1e-9)
    low, high = found.interval
    assert low <= found.mean <= high or math.isclose(low, high, abs_tol=1e-12)


def test_over_conditions_the_seeds_are_the_sample() -> None:
    values = [{0: 0.90, 1: 0.90, 2: 0.5}, {0: 0.80, 1: 0.80}]
    references = [{0: 0.88, 1: 0.90, 2: 0.4}, {0: 0.78, 1: 0.76}]
    found = paired_over_conditions(values, references)
    assert found is not None
    # seed 0: (0.02 + 0.02) / 2, seed 1: (0 + 0.04) / 2; seed 2 lacks a condition
    assert (found.pairs, found.mean) == (2, pytest.approx(0.02))
    assert found.interval == pytest.approx((0.02, 0.02))


# ---------------------------------------------------------------------------------------------------
# Tables


@pytest.fixture
def study() -> tuple[Plan, list[Outcome]]:
    outcomes = []
    for condition in ("iid", "skewed"):
        for seed in (0, 1):
            gain = 0.01 * seed
            ends = (Point(1, 0.85, 50.0, 1.0), Point(2, 0.91, 100.0, 2.0 + seed))
            ours = Outcome(
                planned("ours", condition, seed),
                "",
                0.92 + gain,
                0.9,
                0.95,
                10,
                20,
                3.0,
                ends,
                image_passes=4500,
            )
            theirs = replace(ours, run=planned("theirs", condition, seed), mean=0.90, curve=ends[:1])
            outcomes += [ours, theirs]
    outcomes[-1] = Outcome(planned("theirs", "skewed", 1), failure="out | of\nmemory")
    return Plan(tuple(o.run for o in outcomes), ("ours", "theirs"), ("iid", "skewed"), "theirs"), outcomes


def test_the_markdown_table(study: tuple[Plan, list[Outcome]]) -> None:
    text = tables.markdown(*study, [0.9], "fedmutual compare experiment=x", "x")
    assert text.startswith("# x\n\n    fedmutual compare experiment=x\n")
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in text.splitlines() if row[:1] == "|"]
    assert rows[2] == [
        "iid", "ours", "2", "92.50 ± 0.71", "90.00 ± 0.00 (90.0)", "95.00 ± 0.00", "10 B", "20 B",
        "4.5 k", "2.0", "100 B", "2.5", "3.0",
    ]  # fmt: skip
    assert rows[3][9:12] == ["-", "-", "-"]  # never at 90 %
    assert rows[5][:3] == ["skewed", "theirs", "1 (1 failed)"]
    differences = rows[8:]
    # 2 and 3 points: mean 2.5, s = 0.7071, t(0.975, 1) = 12.7062, half = 12.7062 * 0.5 = 6.3531
    assert differences[0][:4] == ["iid", "ours", "2", "+2.50 [-3.85, +8.85]"]
    assert differences[1][:4] == ["skewed", "ours", "1", "+2.00"]
    assert differences[2][:4] == ["(all)", "ours", "1", "+2.00"]
    assert r"- theirs, skewed, seed 1: out \| of memory" in text


def test_a_price_says_how_many_runs_paid_it(study: tuple[Plan, list[Outcome]]) -> None:
    plan, outcomes = study
    outcomes[0] = replace(outcomes[0], curve=())
    text = tables.markdown(plan, outcomes, [0.9], "", "x")
    assert "| 2.0 (1 of 2) | 100 B | 3.0 |" in text


def test_one_condition_needs_no_column(study: tuple[Plan, list[Outcome]]) -> None:
    plan, outcomes = study
    iid = [o for o in outcomes if o.run.condition == "iid"]
    text = tables.markdown(replace(plan, conditions=("iid",)), iid, [0.9], "", "x")
    assert "condition |" not in text
    assert "| (all) |" not in text


def test_global_models_have_a_column_where_there_are_any(study: tuple[Plan, list[Outcome]]) -> None:
    def cells(outcomes: list[Outcome]) -> list[list[str]]:
        text = tables.markdown(study[0], outcomes, [0.9], "command", "x")
        return [row.strip("| ").split(" | ") for row in text.splitlines() if row.startswith("|")]

    assert "global model" not in cells(study[1])[0]
    outcomes = [replace(o, global_model=0.5 + 0.25 * o.run.seed) for o in study[1]]
    head, _, first, *_ = cells(outcomes)
    assert first[head.index("global model")] == "62.50 ± 17.68"  # 50 and 75
    rows = list(csv.DictReader(io.StringIO(tables.as_csv(tables.run_rows(outcomes)))))
    assert {row["global_model"] for row in rows if row["seed"] == "1"} == {"0.75"}


def test_csv_holds_every_figure_at_full_precision(study: tuple[Plan, list[Outcome]]) -> None:
    plan, outcomes = study
    (row, *_) = csv.DictReader(io.StringIO(tables.as_csv(tables.result_rows(plan, outcomes, [0.9]))))
    assert float(row["mean"]) == pytest.approx(0.925)
    assert float(row["mean_sd"]) == pytest.approx(0.01 / math.sqrt(2))
    assert (row["worst_min"], row["bytes to 90 %"], row["reached 90 %"]) == ("0.9", "100.0", "2")
    (difference, *_) = csv.DictReader(io.StringIO(tables.as_csv(tables.difference_rows(plan, outcomes))))
    assert float(difference["mean_low"]) == pytest.approx(0.025 - 0.0635310, abs=1e-6)
    runs = list(csv.DictReader(io.StringIO(tables.as_csv(tables.run_rows(outcomes)))))
    assert [run["failure"] for run in runs] == [""] * 7 + ["out | of\nmemory"]


def test_the_plots_are_drawn(study: tuple[Plan, list[Outcome]], tmp_path: Path) -> None:
    write_plots(*study, tmp_path)
    names = {
        f"accuracy_by_{price}.{kind}" for price in ("round", "bytes", "seconds") for kind in ("png", "svg")
    }
    assert {file.name for file in tmp_path.iterdir()} == names
    drawn = (tmp_path / "accuracy_by_bytes.svg").read_text()
    assert all(f"<!-- {text} -->" in drawn for text in ("ours", "theirs", "iid", "skewed"))


def test_measured_and_virtual_seconds_are_never_in_one_plot(
    study: tuple[Plan, list[Outcome]], tmp_path: Path
) -> None:
    plan, outcomes = study
    virtual = [replace(outcome, virtual=outcome.run.variant == "ours") for outcome in outcomes]
    write_plots(plan, virtual, tmp_path / "mixed")
    names = ("accuracy_by_seconds.svg", "accuracy_by_virtual_seconds.svg")
    measured, emulated = ((tmp_path / "mixed" / name).read_text() for name in names)
    assert "<!-- theirs -->" in measured
    assert "<!-- ours -->" not in measured
    assert "<!-- ours -->" in emulated
    assert "<!-- theirs -->" not in emulated
    assert "emulated clock" in emulated
    write_plots(plan, [replace(outcome, virtual=True) for outcome in outcomes], tmp_path / "one")
    assert not (tmp_path / "one" / "accuracy_by_virtual_seconds.svg").exists()
    assert "emulated clock" in (tmp_path / "one" / "accuracy_by_seconds.svg").read_text()


def test_seconds_are_virtual_where_a_clock_is_emulated() -> None:
    history = [line(1, "a", 0.5, clock=3.0)]
    assert _is_virtual(history, {"emulation": {"clock": "auto"}})
    assert not _is_virtual(history, {"emulation": {"clock": "wall"}})
    assert not _is_virtual([line(1, "a", 0.5)], {"emulation": {"clock": "auto"}})


def test_nothing_is_drawn_where_nothing_was_measured(tmp_path: Path) -> None:
    outcome = Outcome(planned("ours"), failure="no")
    write_plots(Plan((outcome.run,), ("ours",), ("",), "ours"), [outcome], tmp_path)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------
# For the terminal and for papers


def _study() -> tuple[Plan, list[Outcome]]:
    runs = [planned(variant, seed=seed) for variant in ("mutual", "a_long_name=1") for seed in (0, 1)]
    outcomes = [
        Outcome(run, mean=0.9 + 0.01 * i, worst=0.8, ensemble=None, up=2000.0, down=3000.0, seconds=4.0)
        for i, run in enumerate(runs)
    ]
    plan = Plan(tuple(runs), ("mutual", "a_long_name=1"), ("",), "mutual")
    return plan, outcomes


def test_a_terminal_gets_the_columns_that_matter_and_they_fit() -> None:
    plan, outcomes = _study()
    out = io.StringIO()
    console = Console(file=out, width=80)
    for table in tables.terminal_tables(plan, outcomes, [0.9]):
        console.print(table)
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert "90.5 ± 0.7" in text
    assert "ensemble" not in text  # nothing was measured
    assert "rounds to" not in text
    assert "difference from mutual in points" in text
    assert "+2.0" in text
    assert "a_long_name=1" in text


def test_all_columns_of_a_study_fit_a_terminal() -> None:
    names, conditions = ("mutual", "fedavg-equal-passes"), ("dirichlet-0.3", "iid")
    runs = [
        planned(variant, condition, seed) for variant in names for condition in conditions for seed in (0, 1)
    ]
    rest = {"ensemble": 0.95, "up": 2190, "down": 26e3, "global_model": 0.94, "image_passes": 54_700}
    outcomes = [Outcome(run, mean=0.9 + 0.001 * i, worst=0.88, **rest) for i, run in enumerate(runs)]
    out = io.StringIO()
    for table in tables.terminal_tables(Plan(tuple(runs), names, conditions, "mutual"), outcomes, []):
        Console(file=out, width=80).print(table)
    assert max(map(len, out.getvalue().splitlines())) <= 80
    assert "…" not in out.getvalue()
    for word in ("mutual", "90.0 ± 0.0", "88.0 ± 0.0", " 95.0 ", " 94.0 ", "2.1 kB", "54.7 k"):
        assert word in out.getvalue(), word


def test_latex_has_a_row_a_variant_and_no_raw_character() -> None:
    plan, outcomes = _study()
    text = tables.latex(tables.result_rows(plan, outcomes, []), plan, [])
    assert r"a\_long\_name=1 & 92.50 $\pm$ 0.71" in text
    assert text.count(r"\\") == 3
    assert text.startswith("\\begin{tabular}{lrrrrrr}")
