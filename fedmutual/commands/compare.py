"""``fedmutual compare``: variants under the same conditions and seeds, in one table."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fedmutual.commands.parser import add_command

_EXAMPLES = """\
examples:
  fedmutual compare experiment=smoke                     a study: conf/experiment/smoke.yaml
  fedmutual compare strategy.kl_weight=0,1 seed=0,1,2 partition=iid,pathological
  fedmutual compare experiment=smoke seed=range(5) study.reference=alone --jobs 4

Sweeps are Hydra's. Repeating the command goes on with what is missing.
exit codes: 0 all runs completed, 1 some failed, 2 a setting was refused, 130 stopped by Ctrl-C.
"""


def add_arguments(commands: Any) -> None:
    """Add the subcommand to the parser's."""
    parser = add_command(
        commands,
        "compare",
        call,
        help="run strategies x conditions x seeds and compare them",
        description="Run variants under the same conditions and seeds, and write one table of all.",
        examples=_EXAMPLES,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings; a,b,c runs each")
    parser.add_argument("--jobs", type=_at_least_one, help="runs at a time (default: one a core)")
    parser.add_argument(
        "--engine",
        choices=("inprocess", "flwr"),
        default="inprocess",
        help="inprocess: a process a run, clients take turns; flwr: as `fedmutual run`, for the wall time",
    )


def call(arguments: argparse.Namespace) -> int:
    """Do what is missing of the study, and write its tables."""
    from fedmutual.compare.command import compare

    return compare(arguments.overrides, arguments.engine, arguments.jobs, Path.cwd())


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number
