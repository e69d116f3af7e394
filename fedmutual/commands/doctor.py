"""``fedmutual doctor``: check whether this site is ready for a run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fedmutual.commands.parser import add_command
from fedmutual.logs import complain

_EXAMPLES = """\
examples:
  fedmutual doctor data=folder --node-config 'client-name="clinic-a" data-dir="/data" state-dir="/state"'
  fedmutual doctor data=folder --node-config 'client-name="clinic-a" data-dir="/data"' \\
      --superlink server.example:8000 --root-certificates ca.crt --auth-supernode-private-key keys/clinic-a

exit codes: 0 ready, 1 a check failed (each line says what to do), 2 invalid option.
"""


def add_arguments(commands: Any) -> None:
    """Add the subcommand to the parser."""
    parser = add_command(
        commands,
        "doctor",
        call,
        help="check whether this site is ready for a run",
        description="Check whether this site is ready for a run. Pass the flags of its flower-supernode.",
        examples=_EXAMPLES,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="the run's settings")
    parser.add_argument("--node-config", default="", metavar="CONFIG", help="the SuperNode's")
    parser.add_argument(
        "--superlink", metavar="HOST:PORT", help="without it, only the site itself is checked"
    )
    parser.add_argument("--insecure", action="store_true", help="without TLS")
    parser.add_argument("--root-certificates", type=Path, metavar="FILE", help="the server's ca.crt")
    parser.add_argument("--auth-supernode-private-key", type=Path, metavar="FILE", help="the node's key")
    parser.add_argument(
        "--public-digest", metavar="HEX", help="the server's public_digest (in its summary.json)"
    )
    parser.add_argument(
        "--sheet",
        type=Path,
        metavar="FILE.png",
        help="write a contact sheet and histogram of the images here",
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def call(arguments: argparse.Namespace) -> int:
    """Run all checks, and print one line for each."""
    from fedmutual.doctor.command import Patient, examine, link_of, node_configuration, show

    try:
        node_config = node_configuration(arguments.node_config)
    except ValueError as error:
        complain(f"fedmutual: {error}")
        return 2
    link = link_of(
        arguments.superlink,
        arguments.insecure,
        arguments.root_certificates,
        arguments.auth_supernode_private_key,
    )
    patient = Patient(tuple(arguments.overrides), node_config, link, arguments.public_digest, arguments.sheet)
    return show(examine(patient), arguments.json)
