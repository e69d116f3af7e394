"""The tables of a study: Markdown for people, CSV for programs; both from the same rows.

Everything but the columns whose name holds "seconds" is the same for every repetition on one machine.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from fedmutual.compare.outcome import MEASURES, Outcome
from fedmutual.compare.plan import Plan
from fedmutual.compare.statistics import Difference, Spread, paired, paired_over_conditions, spread
from fedmutual.logs import csv_cell, shown
from fedmutual.report.tables import human_bytes
from fedmutual.results.summary import mean

Row = dict[str, Any]
ALL = "(all)"
_ONE = ("ensemble", "global model")  # without their spread on a terminal
_FIGURES = ("mean", "worst client", "ensemble", "global model", "up", "down", "image passes")


def result_rows(plan: Plan, outcomes: Sequence[Outcome], thresholds: Sequence[float]) -> list[Row]:
    """A row a condition and variant; accuracies are shares, Spread or None."""
    rows = []
    for condition in plan.conditions:
        for variant in plan.variants:
            planned = _those(outcomes, variant, condition)
            done = [outcome for outcome in planned if not outcome.failure]
            if not planned:
                continue
            row: Row = {"condition": condition, "variant": variant, "runs": len(done), "failed": 0}
            row["failed"] = len(planned) - len(done)
            shown = (*MEASURES, *_global(outcomes))
            row |= {m: spread(v for o in done if (v := getattr(o, m)) is not None) for m in shown}
            row |= {key: mean(getattr(o, key) for o in done) for key in ("up", "down")}
            row["image_passes"] = mean(o.image_passes for o in done if o.image_passes is not None)
            row |= _prices(done, thresholds)
            row["seconds"] = mean(o.seconds for o in done)
            rows.append(row)
    return rows


def _global(outcomes: Iterable[Outcome]) -> tuple[str, ...]:
    """The column of global models, where a strategy of the study has one."""
    return ("global_model",) if any(outcome.global_model is not None for outcome in outcomes) else ()


def _prices(done: Sequence[Outcome], thresholds: Sequence[float]) -> Row:
    """What it took to get as far as the thresholds: the mean over the runs that did, and how many did."""
    row: Row = {}
    for threshold in thresholds:
        points = [point for outcome in done if (point := outcome.price(threshold)) is not None]
        name = f"{100 * threshold:g} %"
        row[f"reached {name}"] = len(points)
        row[f"rounds to {name}"] = mean(float(point.round) for point in points)
        row[f"bytes to {name}"] = mean(point.bytes for point in points)
        row[f"seconds to {name}"] = mean(point.seconds for point in points)
    return row


def difference_rows(plan: Plan, outcomes: Sequence[Outcome]) -> list[Row]:
    """A row a condition and variant: mean paired difference from the reference, of each measure."""
    rows = []
    for variant in plan.variants:
        if variant == plan.reference:
            continue
        for condition in plan.conditions:
            row: Row = {"condition": condition, "variant": variant}
            for measure in MEASURES:
                values, reference = (
                    _by_seed(outcomes, name, condition, measure) for name in (variant, plan.reference)
                )
                row[measure] = paired(values, reference)
            rows.append(row)
        if len(plan.conditions) > 1:
            row = {"condition": ALL, "variant": variant}
            for measure in MEASURES:
                both = [
                    [_by_seed(outcomes, name, condition, measure) for condition in plan.conditions]
                    for name in (variant, plan.reference)
                ]
                row[measure] = paired_over_conditions(*both)
            rows.append(row)
    return rows


def _those(outcomes: Iterable[Outcome], variant: str, condition: str) -> list[Outcome]:
    return [o for o in outcomes if (o.run.variant, o.run.condition) == (variant, condition)]


def _by_seed(outcomes: Sequence[Outcome], variant: str, condition: str, measure: str) -> dict[int, float]:
    values = {o.run.seed: getattr(o, measure) for o in _those(outcomes, variant, condition) if not o.failure}
    return {seed: value for seed, value in values.items() if value is not None}


def markdown(
    plan: Plan, outcomes: Sequence[Outcome], thresholds: Sequence[float], command: str, title: str
) -> str:
    """The whole report of a study."""
    results = result_rows(plan, outcomes, thresholds)
    parts = [f"# {title}", "", f"    {command}", "", _EXPLAINED, ""]
    parts += _grid([_cells(row, thresholds) for row in results], plan)
    differences = difference_rows(plan, outcomes)
    if differences:
        parts += ["", f"## Differences from {plan.reference}", "", _DIFFERENCES, ""]
        parts += _grid([_difference_cells(row) for row in differences], plan)
    failures = [outcome for outcome in outcomes if outcome.failure]
    if failures:
        parts += ["", "## Failed", ""]
        parts += [f"- {o.run.label}: {_inline(o.failure)} (`runs/{o.run.folder}.log`)" for o in failures]
    return "\n".join([*parts, ""])


_EXPLAINED = """\
Accuracy on the whole unseen set in per cent, mean over the runs (seeds) ± standard deviation: of the mean
of the clients, of the worst client (in brackets: the lowest of all runs), of their mean-logit ensemble,
and of the global model where a strategy has one.
Image passes are what a client trained on in the whole run: private and public images, each every time.
Bytes are payload: up and down a client and round; to a threshold, both ways and a client. Seconds are those
of clients that learn side by side, each at the pace that it had here; of a run on a virtual clock (emulation,
and every strategy without rounds) they are that clock's. Rounds, bytes and seconds to a threshold are means
over the runs that reached it; where not all did, it says how many."""

_DIFFERENCES = f"""\
In points, paired by seed (same data, same partition, same start), with Student's 95 % interval over the
seeds. {ALL}: each seed's mean over the conditions."""


def _cells(row: Row, thresholds: Sequence[float]) -> Row:
    runs = f"{row['runs']}" if not row["failed"] else f"{row['runs']} ({row['failed']} failed)"
    worst: Spread | None = row["worst"]
    lowest = f" ({100 * worst.lowest:.1f})" if worst else ""
    cells: Row = {"condition": row["condition"], "variant": row["variant"], "runs": runs}
    cells |= {"mean": _spread(row["mean"]), "worst client": _spread(worst) + lowest}
    cells["ensemble"] = _spread(row["ensemble"])
    if "global_model" in row:
        cells["global model"] = _spread(row["global_model"])
    cells |= {key: _bytes(row[key]) for key in ("up", "down")}
    cells["image passes"] = _thousands(row["image_passes"])
    for name in (f"{100 * threshold:g} %" for threshold in thresholds):
        reached = row[f"reached {name}"]
        of = f" ({reached} of {row['runs']})" if 0 < reached < row["runs"] else ""
        cells[f"rounds to {name}"] = _number(row[f"rounds to {name}"]) + of
        cells[f"bytes to {name}"] = _bytes(row[f"bytes to {name}"])
        cells[f"seconds to {name}"] = _number(row[f"seconds to {name}"])
    cells["seconds"] = _number(row["seconds"])
    return cells


def _difference_cells(row: Row) -> Row:
    pairs = max((row[m].pairs for m in MEASURES if row[m] is not None), default=0)
    cells: Row = {"condition": row["condition"], "variant": row["variant"], "pairs": pairs}
    names = {"mean": "mean", "worst": "worst client", "ensemble": "ensemble"}
    return cells | {names[measure]: _difference(row[measure]) for measure in MEASURES}


def terminal_tables(plan: Plan, outcomes: Sequence[Outcome], thresholds: Sequence[float]) -> list[Table]:
    """Return the results and the differences from the reference, in the columns that matter most."""
    rows = [_cells(row, thresholds) for row in result_rows(plan, outcomes, thresholds)]
    failed = ["runs"] if any(outcome.failure for outcome in outcomes) else []
    names = [*(name for name in _FIGURES if name != "down"), *failed]
    tables = [_terminal("accuracy on the unseen images in %; ± over the seeds", rows, names, plan)]
    differences = [_difference_cells(row) for row in difference_rows(plan, outcomes)]
    if differences:
        title = f"difference from {plan.reference} in points [95 % interval]"
        tables.append(_terminal(title, differences, ["mean", "worst client", "ensemble"], plan))
    return tables


def _terminal(title: str, rows: Sequence[Row], names: Sequence[str], plan: Plan) -> Table:
    keys = ["condition", "variant"] if len(plan.conditions) > 1 else ["variant"]
    table = Table(title=escape(title), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for key in keys:
        table.add_column(key, overflow="fold", min_width=6)
    figures = [name for name in names if any(row.get(name, "-") != "-" for row in rows)]
    for name in figures:
        table.add_column(name.replace(" ", "\n"), justify="right", no_wrap=True)
    for row in rows:
        name = str(row["variant"])
        style = "bold" if name == plan.reference else None
        cells = [_short(str(row.get(name, "-")), spread=name not in _ONE) for name in figures]
        table.add_row(*(escape(shown(row[key])) for key in keys), *cells, style=style)
    return table


def _short(cell: str, spread: bool) -> str:
    """One decimal place fewer, and no lowest run: 93.54 ± 0.47 (92.9) -> 93.5 ± 0.5, or 93.5 alone."""
    cell = cell if spread else re.sub(r" ± [\d.]+", "", cell)
    return re.sub(r"(\d+\.\d)\d\b", r"\1", re.sub(r" \([\d.]+\)$", "", cell))


def latex(rows: Sequence[Row], plan: Plan, thresholds: Sequence[float]) -> str:
    """Return result rows as a LaTeX table of the package booktabs."""
    cells = [_cells(row, thresholds) for row in rows]
    wanted = ("condition", "variant", *_FIGURES)
    names = [
        name for name in wanted if name in cells[0] and (name != "condition" or len(plan.conditions) > 1)
    ]
    lines = [[_tex(str(row[name])) for name in names] for row in cells]
    left = sum(name in ("condition", "variant") for name in names)
    head = f"\\begin{{tabular}}{{{'l' * left}{'r' * (len(names) - left)}}}\n\\toprule"
    body = [" & ".join(line) + r" \\" for line in [names, *lines]]
    return "\n".join([head, body[0], r"\midrule", *body[1:], r"\bottomrule", r"\end{tabular}", ""])


_TEX = {"\\": r"\textbackslash{}", "±": r"$\pm$", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}


def _tex(text: str) -> str:
    return "".join(_TEX.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in " ".join(shown(text).split()))


def _grid(rows: Sequence[Row], plan: Plan) -> list[str]:
    """A Markdown table; without the column of conditions where there is one only."""
    names = [name for name in rows[0] if name != "condition" or len(plan.conditions) > 1]
    table = [names, ["---"] * len(names)] + [[_inline(str(row[name])) for name in names] for row in rows]
    return [f"| {' | '.join(line)} |" for line in table]


def _inline(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _spread(value: Spread | None) -> str:
    if value is None:
        return "-"
    deviation = "" if value.deviation is None else f" ± {100 * value.deviation:.2f}"
    return f"{100 * value.mean:.2f}{deviation}"


def _difference(value: Difference | None) -> str:
    if value is None:
        return "-"
    interval = (
        "" if value.interval is None else " [{:+.2f}, {:+.2f}]".format(*(100 * v for v in value.interval))
    )
    return f"{100 * value.mean:+.2f}{interval}"


def _bytes(value: float | None) -> str:
    return "-" if value is None else human_bytes(value)


def _thousands(value: float | None) -> str:
    return "-" if value is None else f"{value / 1000:.1f} k"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def as_csv(rows: Sequence[Row]) -> str:
    """Rows as CSV, every figure in a column of its own at full precision; no text is a formula."""
    flat = [{name: csv_cell(value) for name, value in _flat(row).items()} for row in rows]
    names = list(dict.fromkeys(name for row in flat for name in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue()


def _flat(row: Mapping[str, Any]) -> Row:
    flat: Row = {}
    for name, value in row.items():
        if isinstance(value, Spread):
            figures = {"": value.mean, "_sd": value.deviation, "_min": value.lowest, "_max": value.highest}
            flat |= {f"{name}{key}": figure for key, figure in figures.items()}
        elif isinstance(value, Difference):
            low, high = value.interval or (None, None)
            flat |= {name: value.mean, f"{name}_low": low, f"{name}_high": high, "pairs": value.pairs}
        else:
            flat[name] = value
    return flat


def run_rows(outcomes: Sequence[Outcome]) -> list[Row]:
    """A row a run."""
    return [
        {
            **{key: getattr(outcome.run, key) for key in ("condition", "variant", "seed")},
            "failure": outcome.failure,
            **{
                key: getattr(outcome, key)
                for key in (*MEASURES, *_global(outcomes), "up", "down", "image_passes")
            },
            "folder": outcome.run.folder,
            "seconds": outcome.seconds,
        }
        for outcome in outcomes
    ]
