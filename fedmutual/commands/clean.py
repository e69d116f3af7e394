"""``fedmutual clean``: remove leftovers of runs from this machine."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmutual.commands.parser import add_command
from fedmutual.logs import complain

if TYPE_CHECKING:
    from fedmutual.simulation.leftovers import Leftover

_EXAMPLES = """\
examples:
  fedmutual clean --dry-run                  list leftovers with sizes; nothing is removed
  fedmutual clean                            ask for each kind
  fedmutual clean cache superlinks --yes     do not ask
  fedmutual clean runs --older-than 7

kinds:
  cache       decoded images in the user's cache folder
  runs        runs below ./outputs/<date>/ and in the user's data folder, older than --older-than
  states      clients' states and models in the user's data folder (SuperNodes without state-dir), same age
  superlinks  SuperLinks whose `fedmutual run` was killed, and Flower's local SuperLink if idle
  apps        copies of this app unpacked by `flwr run`

Anything in use is never listed. exit codes: 0 done or nothing to do, 1 some items could not be removed,
2 cannot ask (no terminal and no --yes).
"""


def add_arguments(commands: Any) -> None:
    """Add the subcommand to the parser."""
    parser = add_command(
        commands,
        "clean",
        call,
        help="remove caches, old runs and leftover SuperLinks; asks first",
        description="Remove leftovers of runs from this machine. Asks first.",
        examples=_EXAMPLES,
    )
    # no `choices`: with nargs="*" argparse would check the empty list against them
    parser.add_argument(
        "kinds", nargs="*", metavar="kind", help="cache, runs, states, superlinks, apps; default: all"
    )
    parser.add_argument(
        "--older-than", type=float, default=30.0, metavar="DAYS", help="minimum age of runs and states (30)"
    )
    parser.add_argument("--dry-run", action="store_true", help="only show")
    parser.add_argument("--yes", action="store_true", help="do not ask")


def call(arguments: argparse.Namespace) -> int:
    """List leftovers, ask, remove."""
    from fedmutual.report.tables import human_bytes
    from fedmutual.simulation.leftovers import KINDS, find

    unknown = [kind for kind in arguments.kinds if kind not in KINDS]
    if unknown:
        print(f"fedmutual clean: {unknown[0]!r} is none of {', '.join(KINDS)}", file=sys.stderr)
        return 2
    found = find(tuple(arguments.kinds) or KINDS, Path.cwd() / "outputs", arguments.older_than)
    if not found:
        print("Nothing to remove.")
        return 0
    _show(found)
    if arguments.dry_run:
        return 0
    if not arguments.yes and not sys.stdin.isatty():
        print(
            "fedmutual clean: no terminal to ask on: add --yes to remove everything, or --dry-run",
            file=sys.stderr,
        )
        return 2
    failed = 0
    for kind in KINDS:
        those = [leftover for leftover in found if leftover.kind == kind]
        total = human_bytes(sum(leftover.size for leftover in those))
        if those and (arguments.yes or _agreed(f"Remove {kind} ({len(those)}, {total})? [y/N] ")):
            failed += sum(not _removed(leftover) for leftover in those)
    return min(failed, 1)


def _show(found: list[Leftover]) -> None:
    from rich.console import Console
    from rich.table import Table

    from fedmutual.report.tables import human_bytes

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("kind")
    table.add_column("size", justify="right")
    table.add_column("last used", justify="right")
    table.add_column("what", overflow="fold")
    for leftover in found:
        days = max(0.0, time.time() - leftover.used) / 86_400
        age = f"{days:.0f} days ago" if days >= 1.5 else f"{days * 24:.0f} h ago"
        table.add_row(leftover.kind, human_bytes(leftover.size), age, leftover.what)
    table.add_row("all", human_bytes(sum(leftover.size for leftover in found)), "", "")
    console = Console() if sys.stdout.isatty() else Console(width=200)  # a pipe has no width
    console.print(table, markup=False, highlight=False)


def _agreed(question: str) -> bool:
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:
        return False


def _removed(leftover: Leftover) -> bool:
    try:
        leftover.remove()
    except (OSError, RuntimeError) as error:
        complain(f"fedmutual clean: {leftover.what}: {error}")
        return False
    return True
