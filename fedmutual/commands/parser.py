"""What every subcommand's parser has in common."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

Call = Callable[[argparse.Namespace], int]


def add_command(
    commands: Any, name: str, call: Call, *, help: str, description: str, examples: str
) -> argparse.ArgumentParser:
    """Add a subcommand to the parser's.

    Parameters
    ----------
    commands
        What ``ArgumentParser.add_subparsers`` gave.
    name : str
    call : callable
        Does it, and returns the exit code.
    help, description : str
        A line among the other commands, and the first of its own ``--help``.
    examples : str
        The end of its ``--help``, as it stands.
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
