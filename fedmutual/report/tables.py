"""The outcome of a run as a table in the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fedmutual.results.summary import mean

MEASURES = ("validation_accuracy", "unseen_accuracy", "unseen_balanced_accuracy")


def clients_table(summary: Mapping[str, Any]) -> Table:
    """Return the clients of a summary as a table: accuracies in per cent, traffic in bytes.

    "unseen" is the accuracy on the shared unseen set, "bal." the balanced accuracy on it. The last rows are
    the mean and the worst of the clients, the ensemble where it was measured, and the global model where the
    strategy has one. A dagger marks a client
    that did not finish: its figures are the last known ones. Fits 80 columns.
    """
    clients: Mapping[str, Mapping[str, Any]] = summary["clients"]
    table = Table(title=escape(_title(summary)), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    # only names may shrink in a narrow terminal, never figures
    for heading in ("client", "model"):
        table.add_column(heading, overflow="ellipsis")
    for heading in ("images", "valid.\n%", "unseen\n%", "bal.\n%", "up", "down"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, client in clients.items():
        table.add_row(
            ("" if client.get("finished", True) else "†") + escape(name),
            escape(client.get("model") or "-"),
            _count(client.get("num_examples")),
            *(percent(client.get(measure)) for measure in MEASURES),
            human_bytes(client["uplink_bytes"]),
            human_bytes(client["downlink_bytes"]),
            style=None if client.get("finished", True) else "dim",
        )
    table.add_section()
    _add_footer(table, summary, clients.values())
    if not all(client.get("finished", True) for client in clients.values()):
        table.caption = Text("† did not finish: its last known figures")
    return table


def percent(share: float | None) -> str:
    """A share in per cent with one decimal, "-" where it was not measured."""
    return "-" if share is None else f"{100 * share:.1f}"


def human_bytes(count: float) -> str:
    """A number of bytes in decimal units with three digits: 999 B, 7.45 MB, 12.3 GB."""
    value, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    # what would be rounded up to 1000 belongs to the next unit
    while value >= 999.5 and len(units) > 1:
        value /= 1000
        units.pop(0)
    decimals = 0 if units[0] == "B" or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{decimals}f} {units[0]}"


def _title(summary: Mapping[str, Any]) -> str:
    experiment = f", experiment {summary['experiment']}" if summary.get("experiment") else ""
    rounds, done = summary["rounds"], summary.get("rounds_completed", summary["rounds"])
    progress = f"{rounds} rounds" if done >= rounds else f"{done} of {rounds} rounds"
    return f"{summary['strategy']}{experiment}: {progress}, seed {summary['seed']}"


def _add_footer(table: Table, summary: Mapping[str, Any], clients: Iterable[Mapping[str, Any]]) -> None:
    columns = [[c[m] for c in clients if c.get(m) is not None] for m in MEASURES]
    traffic = summary["traffic"]
    total = [human_bytes(traffic[key]) for key in ("uplink_bytes", "downlink_bytes")]
    table.add_row("mean", "", "", *(percent(mean(column)) for column in columns), "", "", style="bold")
    table.add_row("worst", "", "", *(percent(min(column, default=None)) for column in columns), "", "")
    unseen = summary.get("unseen") or {}
    if unseen.get("ensemble_accuracy") is not None:
        balanced = unseen.get("ensemble_balanced_accuracy")
        table.add_row("ensemble", "", "", "", percent(unseen["ensemble_accuracy"]), percent(balanced), "", "")
    together = summary.get("global_model")
    if together is not None:
        figures = [percent(together.get(measure)) for measure in MEASURES]
        table.add_row("global", escape(together["model"]), "", *figures, "", "")
    table.add_row("total", "", "", "", "", "", *total)


def _count(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"
