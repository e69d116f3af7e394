"""The audit on the terminal: of one run, and of the runs of a study."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from fedmutual.report.leaks import leak_rows

_COLUMNS = (  # head, attack, figure, digits
    ("public copy, AUC", "public", "auc", 3),
    ("changed copy, AUC", "changed", "auc", 3),
    ("trained on, AUC", "private", "auc", 3),
    ("by anyone, AUC", "anyone", "auc", 3),
    ("LiRA, AUC", "lira", "auc", 3),
    ("class shares, R2", "classes", "calibrated", 2),
    ("counts, share", "counts", "share", 2),
)
_SEED = re.compile(r"[-_, ]*seed[_ ]\d+$")


def run_table(name: str, audit: Mapping[str, Any]) -> Table:
    """Return what the server of a run could tell."""
    title = f"What the server could tell: {name}"
    table = Table("what", "how well", "note", title=escape(title), box=SIMPLE_HEAD, title_justify="left")
    for row in leak_rows(audit):
        table.add_row(*(escape(text) for text in row))
    return table


def study_table(audits: Sequence[tuple[str, Mapping[str, Any]]]) -> Table:
    """Return the means over the seeds of each run, with the least and the largest.

    Parameters
    ----------
    audits : sequence of (str, dict)
        Name, which ends with the seed, and ``audit.json``.
    """
    heads = [name for name, *_ in _COLUMNS]
    table = Table("run", "seeds", *heads, box=SIMPLE_HEAD)
    grouped: dict[str, list[Mapping[str, Any]]] = {}
    for name, audit in audits:
        grouped.setdefault(_SEED.sub("", name) or name, []).append(audit)
    for name, own in grouped.items():
        table.add_row(escape(name), str(len(own)), *(_spread(own, *column[1:]) for column in _COLUMNS))
    return table


def _spread(audits: Sequence[Mapping[str, Any]], attack: str, figure: str, digits: int) -> str:
    values = [
        entry["figures"].get(figure, entry["figures"].get(f"{figure}_at_most"))
        for audit in audits
        for entry in audit["findings"]
        if entry["attack"] == attack and entry["figures"]
    ]
    if not values:
        return "-"
    known = np.array(values, float)
    text = f"{known.mean():.{digits}f}"
    return text if len(known) == 1 else f"{text} [{known.min():.{digits}f}, {known.max():.{digits}f}]"
