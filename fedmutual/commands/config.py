"""``fedmutual config``: show a run's resolved settings and the source of each value."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmutual.commands.parser import add_command
from fedmutual.logs import complain

if TYPE_CHECKING:
    from fedmutual.settings.origins import Origin

_EXAMPLES = """\
examples:
  fedmutual config                                       every setting of `fedmutual run` and its source
  fedmutual config --changed experiment=paper rounds=3   only changes from the defaults in conf/
  fedmutual config --meaning partition=dirichlet         with the meaning of each setting
  fedmutual config --node-config 'device="cuda:1" model="resnet18"'      as that SuperNode sees it
  fedmutual config --format json | less

Nothing is started. A source is a file in conf/, the command line, a SuperNode's own configuration, the
settings of the resumed run, or "fedmutual run", which sets the folders and the number of clients.
exit codes: 0 shown, 2 invalid setting.
"""

RUN, RESUMED = "fedmutual run", "the resumed run"


def add_arguments(commands: Any) -> None:
    """Add the subcommand to the parser."""
    parser = add_command(
        commands,
        "config",
        call,
        help="show the resolved settings and where each value comes from",
        description="Show the resolved settings without running anything.",
        examples=_EXAMPLES,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides, as for `fedmutual run`")
    parser.add_argument("--changed", action="store_true", help="only what differs from the defaults")
    parser.add_argument("--meaning", action="store_true", help="show the meaning of each setting")
    parser.add_argument(
        "--node-config", metavar="CONFIG", help="configuration of a SuperNode, which takes precedence"
    )
    parser.add_argument("--format", choices=("table", "json"), default="table")


def call(arguments: argparse.Namespace) -> int:
    """Compose the settings and print them."""
    from fedmutual.settings import SettingsError
    from fedmutual.settings.compose import compose
    from fedmutual.settings.origins import meanings, origins

    try:
        node = _node_config(arguments.node_config)
        overrides, found = resolved(arguments.overrides, Path.cwd(), node)
        if arguments.changed:
            default = {(entry.key, str(entry.value)) for entry in origins([])}
            found = [entry for entry in found if (entry.key, str(entry.value)) not in default]
        words = meanings(compose(overrides, node)) if arguments.meaning else None
    except SettingsError as error:
        complain(f"fedmutual: {error}")
        return 2
    if arguments.format == "json":
        rows = [{"key": entry.key, "value": entry.value, "source": entry.source} for entry in found]
        print(json.dumps(rows, indent=2, ensure_ascii=False))
    else:
        _print_table(found, words)
    return 0


def resolved(
    typed: Sequence[str], cwd: Path, node: Mapping[str, Any]
) -> tuple[tuple[str, ...], list[Origin]]:
    """Return what ``fedmutual run`` passes to Flower: the overrides, and each setting with its source.

    Raises
    ------
    SettingsError
        As ``fedmutual run``.
    """
    from fedmutual.results.directory import saved_overrides
    from fedmutual.settings.compose import compose
    from fedmutual.settings.origins import COMMAND_LINE, origins
    from fedmutual.simulation.request import prepare

    request = prepare(typed, cwd)
    saved = saved_overrides(Path(request.settings.resume)) if request.settings.resume else []
    sources = dict.fromkeys(map(_key, saved), RESUMED) | dict.fromkeys(map(_key, typed), COMMAND_LINE)
    labels = {override: sources.get(_key(override), RUN) for override in request.overrides}
    compose(request.overrides, node)
    return request.overrides, origins(request.overrides, node, labels)


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def _node_config(text: str | None) -> dict[str, Any]:
    """Parse ``--node-config`` as ``flower-supernode`` does."""
    from flwr.common.config import parse_config_args

    from fedmutual.settings import SettingsError

    try:
        node = dict(parse_config_args([text])) if text else {}
    except Exception as error:  # Flower raises errors of click, typer and toml
        raise SettingsError(f"--node-config: cannot parse {text!r}: {error}") from error
    if text and not node:
        raise SettingsError(f'--node-config: {text!r} has no key="value"')
    return node


def _print_table(found: Sequence[Origin], words: Mapping[str, str] | None) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("setting", "value", "from", *(["meaning"] if words is not None else [])):
        table.add_column(column, overflow="fold")
    for entry in found:
        value = "null" if entry.value is None else json.dumps(entry.value, ensure_ascii=False)
        meaning = [words.get(entry.key, "")] if words is not None else []
        table.add_row(entry.key, value.strip('"'), entry.source, *meaning)
    console = Console() if sys.stdout.isatty() else Console(width=200)  # a pipe has no width
    console.print(table, markup=False, highlight=False)
