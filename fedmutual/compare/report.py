"""Everything that a study leaves beside its runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedmutual.compare import tables
from fedmutual.compare.outcome import Outcome
from fedmutual.compare.plan import Plan
from fedmutual.compare.plots import write_plots
from fedmutual.files.atomic import atomic_write


def write_report(
    plan: Plan,
    outcomes: Sequence[Outcome],
    thresholds: Sequence[float],
    command: str,
    name: str,
    folder: Path,
) -> Path:
    """Write the tables (``table.md``, .csv and .tex, differences and runs) and plots; return the first."""
    texts = {
        "table.csv": tables.as_csv(tables.result_rows(plan, outcomes, thresholds)),
        "differences.csv": tables.as_csv(tables.difference_rows(plan, outcomes)),
        "runs.csv": tables.as_csv(tables.run_rows(outcomes)),
        "table.tex": tables.latex(tables.result_rows(plan, outcomes, thresholds), plan, thresholds),
        "table.md": tables.markdown(plan, outcomes, thresholds, command, name or "Comparison"),
    }
    for file, text in texts.items():
        atomic_write(folder / file, text.encode(errors="backslashreplace"))
    write_plots(plan, outcomes, folder)
    return folder / "table.md"
