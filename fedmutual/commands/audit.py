"""``fedmutual audit``: what has left this site."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from fedmutual.commands.parser import add_command
from fedmutual.logs import complain, shown_lines

_EXAMPLES = """\
examples:
  fedmutual audit --sent --node-config 'client-name="clinic-a" data-dir="/data" state-dir="/state"'
  fedmutual audit --sent --json --node-config 'state-dir="/state"' | jq 'select(.kind == "report")'

Each message is there with its time, run, round, what it holds, bytes and SHA-256, before it leaves. The
digest is Flower's object id of the content, so whoever receives it can compare. `fedmutual doctor` says what
a run will send. A simulation keeps no such record.
exit codes: 0 shown, 1 nothing is recorded, 2 invalid option.
"""


def add_arguments(commands: Any) -> None:
    """Add the subcommand to the parser."""
    parser = add_command(
        commands,
        "audit",
        call,
        help="show what has left this site",
        description="Show what has left this site, in order.",
        examples=_EXAMPLES,
    )
    parser.add_argument("--sent", action="store_true", required=True, help="the record of what was sent")
    parser.add_argument("--node-config", default="", metavar="CONFIG", help="the SuperNode's")
    parser.add_argument("--json", action="store_true", help="print one JSON object a message")


def call(arguments: argparse.Namespace) -> int:
    """Print the record of every client that has its state here."""
    from fedmutual.client.sent import FOLDER, records_in, states_of
    from fedmutual.doctor.command import node_configuration
    from fedmutual.report.tables import human_bytes

    try:
        folder = states_of(node_configuration(arguments.node_config))
    except ValueError as error:
        complain(f"fedmutual: {error}")
        return 2
    messages = [sent for record in records_in(folder) for sent in record.read()]
    if not messages:
        complain(f"fedmutual: {folder / FOLDER}: nothing is recorded; give the SuperNode's --node-config")
        return 1
    for sent in messages:
        if arguments.json:
            print(json.dumps(asdict(sent)))
            continue
        about = f"{sent.run} round {sent.round}" if sent.round else sent.run
        print(shown_lines(f"{sent.time}  {sent.client}  {sent.kind}  {about}  {sent.bytes} bytes"))
        print(shown_lines(f"    sha256 {sent.sha256}  {', '.join(sent.holds)}".rstrip()))
    if not arguments.json:
        print(f"{len(messages)} messages, {human_bytes(sum(sent.bytes for sent in messages))}")
    return 0
