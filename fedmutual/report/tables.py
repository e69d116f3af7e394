"""The outcome of a run as a table: rows for the report, and the table in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.filesize import pick_unit_and_suffix
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fedmutual.results.summary import mean

MEASURES = ("validation_accuracy", "unseen_accuracy", "unseen_balanced_accuracy")
WAYS = ("uplink_bytes", "downlink_bytes")


class Row(NamedTuple):
    """A row of a table, in words: ``figures`` has an entry per measure, ``traffic`` is up and down."""

    name: str
    model: str = ""
    images: str = ""
    figures: Sequence[str] = ()
    traffic: Sequence[str] = ("", "")
    finished: bool = True


def client_rows(summary: Mapping[str, Any], measures: Sequence[str]) -> list[Row]:
    """A row for each client of a summary."""
    return [
        Row(
            name,
            client.get("model") or "-",
            "-" if client.get("num_examples") is None else f"{client['num_examples']:,}",
            [percent(client.get(measure)) for measure in measures],
            [human_bytes(client[way]) for way in WAYS],
            client.get("finished", True),
        )
        for name, client in summary["clients"].items()
    ]


def total_rows(summary: Mapping[str, Any], measures: Sequence[str]) -> list[Row]:
    """Mean and worst of the clients, the ensemble and the global model where there is one, and the bytes."""
    clients, unseen = summary["clients"].values(), summary.get("unseen") or {}
    columns = [[c[measure] for c in clients if c.get(measure) is not None] for measure in measures]
    rows = [Row("mean", figures=[percent(mean(column)) for column in columns])]
    rows.append(Row("worst", figures=[percent(min(column, default=None)) for column in columns]))
    if unseen.get("ensemble_accuracy") is not None:
        keys = [measure.replace("unseen", "ensemble") for measure in measures]
        rows.append(Row("ensemble", figures=[percent(unseen.get(key)) for key in keys]))
    if together := summary.get("global_model"):
        figures = [percent(together.get(measure)) for measure in measures]
        rows.append(Row("global", together["model"], figures=figures))
    total = [human_bytes(summary["traffic"][way]) for way in WAYS]
    return [*rows, Row("total", figures=[""] * len(measures), traffic=total)]


def clients_table(summary: Mapping[str, Any]) -> Table:
    """Return the clients of a summary as a table: accuracies in per cent, traffic in bytes.

    "unseen" is the accuracy on the shared unseen set, "bal." the balanced accuracy on it. The last rows are
    those of :func:`total_rows`. A dagger marks a client that did not finish: its figures are the last known
    ones. Fits 80 columns.
    """
    table = Table(title=escape(_title(summary)), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    # only names may shrink in a narrow terminal, never figures
    for heading in ("client", "model"):
        table.add_column(heading, overflow="ellipsis")
    for heading in ("images", "valid.\n%", "unseen\n%", "bal.\n%", "up", "down"):
        table.add_column(heading, justify="right", no_wrap=True)

    def add(row: Row, style: str | None = None) -> None:
        name = escape(row.name) if row.finished else f"†{escape(row.name)}"
        table.add_row(name, escape(row.model), row.images, *row.figures, *row.traffic, style=style)

    clients = client_rows(summary, MEASURES)
    for row in clients:
        add(row, None if row.finished else "dim")
    table.add_section()
    for row in total_rows(summary, MEASURES):
        add(row, "bold" if row.name == "mean" else None)
    if not all(row.finished for row in clients):
        table.caption = Text("† did not finish: its last known figures")
    return table


def percent(share: float | None) -> str:
    """A share in per cent with one decimal, "-" where it was not measured."""
    return "-" if share is None else f"{100 * share:.1f}"


def counted(number: int, noun: str) -> str:
    """A number with its noun: 1 round, 2 rounds."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def human_bytes(count: float) -> str:
    """A number of bytes in decimal units with three digits: 999 B, 7.45 MB, 12.3 GB."""
    rounded = float(f"{count:.3g}")  # first, so that 999.9 kB is 1.00 MB
    unit, name = pick_unit_and_suffix(int(rounded), ["B", "kB", "MB", "GB", "TB", "PB"], 1000)
    return f"{rounded:.0f} B" if unit == 1 else f"{rounded / unit:#.3g}".rstrip(".") + f" {name}"


def _title(summary: Mapping[str, Any]) -> str:
    experiment = f", experiment {summary['experiment']}" if summary.get("experiment") else ""
    rounds, done = summary["rounds"], summary.get("rounds_completed", summary["rounds"])
    progress = counted(rounds, "round") if done >= rounds else f"{done} of {counted(rounds, 'round')}"
    return f"{summary['strategy']}{experiment}: {progress}, seed {summary['seed']}"
