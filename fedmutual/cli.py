"""The ``fedmutual`` command. Heavy modules are imported only after the settings are checked."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import fedmutual
from fedmutual.appfolder import app_folder
from fedmutual.commands import (
    audit,
    clean,
    client_host,
    compare,
    completion,
    config,
    doctor,
    export,
    predict,
    provision,
    report,
    run,
    site,
    status,
    watch,
)

_START = """\
first steps:
  fedmutual run                              five clients learn on generated faces; one line per round
  fedmutual run partition=dirichlet          the same with label skew; every setting is key=value
  fedmutual run data=folder data.root=DIR    your own images: DIR/train/<class>/, DIR/public/, DIR/test/
  fedmutual config --changed data=folder data.root=DIR      the resolved settings, and their source files
  fedmutual compare experiment=smoke         several methods under the same conditions: one table
  tensorboard --logdir outputs               watch runs during training

`fedmutual COMMAND --help` shows examples. Results go to outputs/<date>/<time>-<strategy>/.
Many sites instead of one machine: fedmutual provision (docs/deployment.md).
"""


def main(argv: Sequence[str] | None = None, app_dir: Path | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv : Sequence[str] | None
        Arguments; None: those of the process (``sys.argv``).
    app_dir : Path | None
        Folder of the Flower app for ``fedmutual run``; None: fedmutual's own app.

    Returns
    -------
    int
        The exit code.
    """
    if argv is None:  # the command itself: no process that it starts imports from the current folder
        os.environ["PYTHONSAFEPATH"] = "1"
        for stream in (sys.stdout, sys.stderr):  # a console that lacks a character shows its number
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
    parser = make_parser()
    if "_ARGCOMPLETE" in os.environ:  # called by the shell for completion
        import argcomplete

        argcomplete.autocomplete(parser)
    arguments, rest = parser.parse_known_args(argv)
    unknown = [item for item in rest if item.startswith("-")]
    if unknown:
        parser.error(f"unknown option {unknown[0]}")
    if rest and not hasattr(arguments, "overrides"):
        parser.error(f"unknown argument {rest[0]}")
    arguments.overrides = [*getattr(arguments, "overrides", []), *rest]
    arguments.app_dir = app_dir or app_folder()
    return int(arguments.call(arguments))


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="fedmutual",
        description="Federated image learning without sharing weights.",
        epilog=_START,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"fedmutual {fedmutual.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for command in (
        run,
        compare,
        doctor,
        audit,
        watch,
        client_host,
        provision,
        site,
        status,
        report,
        predict,
        export,
        config,
        clean,
        completion,
    ):
        command.add_arguments(commands)
    for name in ("run", "compare", "config"):
        completion.complete_overrides(commands.choices[name])
    return parser
