"""``fedmutual report``: write an HTML report of one run, or a comparison of several."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fedmutual.commands.parser import add_command
from fedmutual.logs import complain

_EXAMPLES = """\
examples:
  fedmutual report outputs/2026-01-31/12-00-00-mutual           (rebuild: every run writes one itself)
  fedmutual report outputs/2026-01-31/* --output comparison.html

The page needs no network and no script. It shows up to twelve public images, and no folder names.
exit codes: 0 written, 2 a folder is not a run's or its files are damaged.
"""


def add_arguments(commands: Any) -> None:
    """Add the subcommand to the parser."""
    parser = add_command(
        commands,
        "report",
        call,
        help="write the HTML report of one run, or compare several runs",
        description="Write one self-contained HTML page about one run, or comparing several.",
        examples=_EXAMPLES,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="results folder of a run")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="output page; default: report.html in the run's folder; several runs: in this folder",
    )


def call(arguments: argparse.Namespace) -> int:
    """Write the page and print its path."""
    from fedmutual.report.page import REPORT, write_report
    from fedmutual.report.recorded import read_runs
    from fedmutual.results.directory import ResultsError

    try:
        runs = read_runs(arguments.runs)
        single = arguments.runs[0] if len(runs) == 1 else Path()
        file = (arguments.output or single / REPORT).absolute()
        write_report(runs, file, private=arguments.output is None)
    except (ResultsError, OSError) as error:
        complain(f"fedmutual report: {error}")
        return 2
    print(file)
    return 0
