"""The report: one HTML file that needs nothing else, neither a network nor a script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from fedmutual.files.atomic import atomic_write
from fedmutual.report.comparison import comparison_context
from fedmutual.report.recorded import RecordedRun
from fedmutual.report.sections import run_context
from fedmutual.report.style import STYLE
from fedmutual.report.template import TEMPLATE
from fedmutual.results.errors import ResultsError

REPORT = "report.html"


def render(runs: Sequence[RecordedRun]) -> str:
    """Return the page on one run, or on several side by side; what comes from a run is escaped."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    context: Mapping[str, Any] = {
        "title": runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        "style": Markup(STYLE),
        "together": comparison_context(runs) if len(runs) > 1 else None,
        "runs": [run_context(run) for run in runs],
    }
    return environment.from_string(TEMPLATE).render(context)


def write_report(runs: Sequence[RecordedRun], file: Path, private: bool = True) -> None:
    """Write the page, atomically; for its owner only if ``private``.

    Raises
    ------
    ResultsError
        The runs hold what no run writes.
    WriteError
    """
    try:
        page = render(runs)
    except Exception as error:  # whatever a damaged file makes of the figures
        names = ", ".join(run.name for run in runs)
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ResultsError(
            f"no report can be made of {names}: files of it are damaged ({reason}); put them back from a copy"
        ) from error
    # half a surrogate pair is in no UTF-8 file, but can be in a file name
    atomic_write(file, page.encode(errors="backslashreplace"), private=private)
