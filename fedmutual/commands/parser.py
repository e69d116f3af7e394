"""The common part of all subcommand parsers."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

Call = Callable[[argparse.Namespace], int]


def add_command(
    commands: Any, name: str, call: Call, *, help: str, description: str, examples: str
) -> argparse.ArgumentParser:
    """Add a subcommand to the parser.

    Parameters
    ----------
    commands
        Result of ``ArgumentParser.add_subparsers``.
    name : str
    call : callable
        Runs the command and returns the exit code.
    help, description : str
        Line in the list of commands, and first line of its own ``--help``.
    examples : str
        End of its ``--help``, unformatted.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        allow_abbrev=False,
        help=help,
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(call=call)
    return parser
