"""``fedmutual status``: the sites and the run, as the server sees them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmutual.commands.parser import add_command
from fedmutual.commands.site import add_connection
from fedmutual.logs import complain

if TYPE_CHECKING:
    from fedmutual.sites.status import Status

_EXAMPLES = """\
examples:
  fedmutual status                            sites with key, node, last sign of life and round; the run
  fedmutual status --silent 600 --check       exit code 1 while a site has been silent for over ten minutes
  fedmutual status --json
  fedmutual status --prometheus 9464          serves http://127.0.0.1:9464/metrics until it is stopped

Run it on the SuperLink's machine. Connected sites send a sign of life every 30 s; a site that is cut off is
known to be offline after a minute.
exit codes: 0, 1 with --check: somebody is silent, 2 the SuperLink does not answer.
"""


def add_arguments(commands: Any) -> None:
    """Add the subcommand to the parser."""
    parser = add_command(
        commands,
        "status",
        call,
        help="show a server's sites by name, and what the run waits for",
        description="Show a server's sites by name, and what the run waits for.",
        examples=_EXAMPLES,
    )
    parser.add_argument("--run", type=Path, metavar="DIR", help="the run's folder; default: the newest")
    parser.add_argument(
        "--runs", type=Path, metavar="DIR", help="the folder of the runs; default: the user's"
    )
    parser.add_argument(
        "--silent",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="a site that was not heard of for longer is silent (%(default)g)",
    )
    parser.add_argument("--check", action="store_true", help="exit code 1 while a site is silent")
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.add_argument("--prometheus", metavar="[HOST:]PORT", help="serve it as metrics instead")
    add_connection(parser)


def call(arguments: argparse.Namespace) -> int:
    """Print the status, or serve it."""
    from rich.console import Console

    from fedmutual.sites.show import print_status
    from fedmutual.sites.superlink import SuperLinkError

    try:
        if arguments.prometheus is not None:
            return _serve(arguments)
        status = _collect(arguments)
    except (SuperLinkError, OSError) as error:
        complain(f"fedmutual status: {error}")
        return 2
    if arguments.json:
        print(status.as_json())
    else:
        console = Console()
        print_status(status, console if console.is_terminal else Console(width=200))  # a pipe has no width
    return int(arguments.check and any(site.silent for site in status.sites))


def _collect(arguments: argparse.Namespace) -> Status:
    from fedmutual.provision.registry import Registry
    from fedmutual.results.directory import user_runs_dir
    from fedmutual.sites.status import newest_run, status_of
    from fedmutual.sites.superlink import SuperLink, connection_of

    connection = connection_of(arguments.superlink, arguments.root_certificates, arguments.insecure)
    with SuperLink(connection) as superlink:
        nodes, now = superlink.nodes()
    run = arguments.run or newest_run(arguments.runs or user_runs_dir())
    return status_of(nodes, now, Registry(arguments.sites), run, arguments.silent)


def _serve(arguments: argparse.Namespace) -> int:
    from fedmutual.sites.show import make_server
    from fedmutual.sites.superlink import SuperLinkError, connection_of

    host, _, port = arguments.prometheus.rpartition(":")
    if not port.isdigit() or int(port) > 65535:
        raise SuperLinkError(f"--prometheus {arguments.prometheus!r} is no port and no HOST:PORT")
    connection_of(arguments.superlink, arguments.root_certificates, arguments.insecure)  # refused at once
    with make_server(host.strip("[]") or "127.0.0.1", int(port), lambda: _collect(arguments)) as server:
        print(f"http://{server.server_name}:{server.server_port}/metrics", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return 0
    return 0
