"""``fedmutual compare``: compare variants under the same conditions and seeds in one table."""

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
  fedmutual compare experiment=smoke --ray-address auto  on the cluster that this machine has joined
  fedmutual compare --trials 20 'optimizer.learning_rate=tag(log,interval(1e-4,1e-2))' seed=0,1

Sweeps use Hydra's grammar. Repeating the command does only the missing runs.
exit codes: 0 all runs completed, 1 some failed, 2 invalid setting, 130 stopped by Ctrl-C.
"""


def add_arguments(commands: Any) -> None:
    """Add the subcommand to the parser."""
    parser = add_command(
        commands,
        "compare",
        call,
        help="run strategies x conditions x seeds and compare them",
        description="Run variants under the same conditions and seeds, and compare them in one table.",
        examples=_EXAMPLES,
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings; key=a,b,c runs each value"
    )
    parser.add_argument(
        "--trials",
        type=_at_least_one,
        help="search instead: so many trials over the swept settings, by validation accuracy (Optuna)",
    )
    parser.add_argument("--jobs", type=_at_least_one, help="parallel runs (default: one per core)")
    parser.add_argument(
        "--engine",
        choices=("inprocess", "flwr"),
        default="inprocess",
        help="inprocess: one process per run, clients take turns; flwr: as `fedmutual run`, for wall times",
    )
    parser.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="run on Ray: `local` starts it here, `auto` or HOST:PORT is a cluster (default: no Ray)",
    )


def call(arguments: argparse.Namespace) -> int:
    """Do the missing runs of the study, and write its tables; or search."""
    from fedmutual.compare.command import compare, search

    if arguments.trials is not None:
        return search(
            arguments.overrides,
            arguments.trials,
            arguments.engine,
            arguments.jobs,
            Path.cwd(),
            arguments.ray_address,
        )
    return compare(arguments.overrides, arguments.engine, arguments.jobs, Path.cwd(), arguments.ray_address)


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number
