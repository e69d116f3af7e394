"""``fedmutual watch``: keep a Flower process working."""

from __future__ import annotations

import argparse
import signal
import sys
from typing import Any

from fedmutual.commands.client_host import add_memory_limit
from fedmutual.commands.parser import add_command
from fedmutual.watch.health import PATIENCE

_EXAMPLES = """\
examples:
  fedmutual watch -- flower-supernode --superlink server:8443 --root-certificates ca.crt ...
  fedmutual watch --once -- flower-supernode ...      under Docker or systemd, which start it again themselves
  fedmutual watch -- flower-superexec --runtime-api-address 127.0.0.1:8000 ...

It starts the command again when it ends, and when it hangs: a SuperNode that holds an order without a client
process, whose main thread stands still, or whose SuperExec has ended. Processes that the command leaves
behind are ended. A SuperNode's client processes are forked from a warm one (fedmutual client-host), unless
--cold. Under systemd with Type=notify it reports READY and WATCHDOG.

exit codes: 0 ended by SIGTERM or SIGINT, 1 with --once: the command ended or hung, 2 it cannot be started.
"""


def add_arguments(commands: Any) -> None:
    """Add the subcommand to the parser."""
    parser = add_command(
        commands,
        "watch",
        call,
        help="keep a SuperNode or SuperExec working: restart it when it ends or hangs",
        description="Run a command; restart it when it ends or hangs.",
        examples=_EXAMPLES,
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=PATIENCE,
        metavar="SECONDS",
        help="time for which it must look hung before it is restarted (%(default)g)",
    )
    parser.add_argument(
        "--once",
        action="store_true",
        help="do not start it again, but end with exit code 1 and nothing left over",
    )
    parser.add_argument(
        "--cold",
        action="store_true",
        help="let a SuperNode start its client processes as Flower does, one after the other from nothing",
    )
    add_memory_limit(parser)
    parser.add_argument("watched", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="what to run")


def call(arguments: argparse.Namespace) -> int:
    """Run the command until a signal ends it."""
    from fedmutual.logs import show_logs
    from fedmutual.warm.superexec import client_host
    from fedmutual.watch.supervisor import Supervisor

    command = arguments.watched[1:] if arguments.watched[:1] == ["--"] else arguments.watched
    if not command:
        print("fedmutual watch: name the command to run, after --", file=sys.stderr)
        return 2
    show_logs()
    superexec = () if arguments.cold else client_host(arguments.memory_limit)
    supervisor = Supervisor(command, arguments.patience, arguments.once, superexec)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, supervisor.stop)
    try:
        return supervisor.run()
    except OSError as error:
        print(f"fedmutual watch: {command[0]} cannot be started: {error.strerror}", file=sys.stderr)
        return 2
