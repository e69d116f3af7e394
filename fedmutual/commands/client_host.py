"""``fedmutual client-host``: Flower's SuperExec of a site, with client processes that start at once."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from fedmutual.commands.parser import add_command

_EXAMPLES = """\
examples:
  flower-supernode --isolation process --host 127.0.0.1 --port 9094 ...
  fedmutual client-host -- --insecure --runtime-api-address 127.0.0.1:9094
  fedmutual client-host --memory-limit 8192 -- --insecure --runtime-api-address 127.0.0.1:9094

Takes the place of flower-superexec, with its arguments after --. One process imports Flower and PyTorch, and
each message gets a fork of it, which loads the app that came with the run. Where no such process can work, or
it does not answer, client processes start as flower-superexec starts them, and the log says why.
`fedmutual watch -- flower-supernode ...` does this by itself.

exit codes: those of flower-superexec.
"""


def add_arguments(commands: Any) -> None:
    """Add the subcommand to the parser."""
    parser = add_command(
        commands,
        "client-host",
        call,
        help="flower-superexec of a site, with client processes that start at once",
        description="Run Flower's SuperExec of a site; client processes are forked from a warm one.",
        examples=_EXAMPLES,
    )
    add_memory_limit(parser)
    parser.add_argument(
        "flower", nargs=argparse.REMAINDER, metavar="-- ARGUMENT ...", help="arguments of flower-superexec"
    )


def add_memory_limit(parser: argparse.ArgumentParser) -> None:
    """Add the option of a client process's memory."""
    parser.add_argument(
        "--memory-limit",
        type=int,
        metavar="MIB",
        help="end a client process that uses more memory; 0: any (nine tenths of the container or machine)",
    )


def call(arguments: argparse.Namespace) -> int:
    """Run the SuperExec until it ends; returns its exit code."""
    from fedmutual.logs import show_logs
    from fedmutual.warm.superexec import run

    flower = arguments.flower[1:] if arguments.flower[:1] == ["--"] else arguments.flower
    if not flower:
        print("fedmutual client-host: name the arguments of flower-superexec, after --", file=sys.stderr)
        return 2
    show_logs()
    return run(flower, None if arguments.memory_limit is None else arguments.memory_limit << 20)
