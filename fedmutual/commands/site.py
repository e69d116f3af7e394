"""``fedmutual site``: who may take part, by name."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmutual.commands.parser import add_command
from fedmutual.logs import complain, shown

if TYPE_CHECKING:
    from fedmutual.provision.registry import Registry
    from fedmutual.sites.superlink import Registered, SuperLink

_EXAMPLES = """\
examples:
  fedmutual site list
  fedmutual site add --all                        every site of the registry, those that are registered too
  fedmutual site add clinic-d --key clinic-d.pub
  fedmutual site add clinic-a --replace           its key was renewed: the old one is removed
  fedmutual site remove clinic-b                  shows the node and asks; --yes does not ask

The registry is the folder `sites` of what `fedmutual provision` makes: a public key a site, NAME.pub. Run
this on the SuperLink's machine. Flower never takes a removed key again: such a site needs a new one.

exit codes: 0 done, 1 nobody agreed, 2 refused, or the SuperLink does not answer.
"""


def add_arguments(commands: Any) -> None:
    """Add the subcommand to the parser."""
    parser = add_command(
        commands,
        "site",
        call,
        help="list, add and remove the sites of a SuperLink by name",
        description="List, add and remove the sites of a SuperLink by name.",
        examples=_EXAMPLES,
    )
    parser.add_argument("action", choices=("list", "add", "remove"))
    # as the settings of a run: whatever is no option, also after one (cli.py)
    parser.add_argument("overrides", nargs="*", metavar="NAME")
    parser.add_argument("--all", action="store_true", help="add: every site of the registry")
    parser.add_argument("--key", type=Path, metavar="FILE.pub", help="add: the public key of a new site")
    parser.add_argument("--replace", action="store_true", help="add: in place of another key of that name")
    parser.add_argument("--yes", action="store_true", help="remove: do not ask")
    add_connection(parser)


def add_connection(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where registry and SuperLink are."""
    parser.add_argument(
        "--sites", type=Path, default=Path("sites"), metavar="DIR", help="the registry (./%(default)s)"
    )
    parser.add_argument(
        "--superlink", metavar="HOST:PORT", help="default: the one of Flower's configuration (FLWR_HOME)"
    )
    parser.add_argument("--root-certificates", type=Path, metavar="FILE", help="the authority's ca.crt")
    parser.add_argument("--insecure", action="store_true", help="without TLS")


def call(arguments: argparse.Namespace) -> int:
    """Do it, and say what was done."""
    from fedmutual.provision.registry import Registry
    from fedmutual.sites.manage import SiteError
    from fedmutual.sites.superlink import SuperLink, SuperLinkError, connection_of

    problem = _problem(arguments)
    if problem:
        complain(f"fedmutual site: {problem}")
        return 2
    registry = Registry(arguments.sites)
    try:
        connection = connection_of(arguments.superlink, arguments.root_certificates, arguments.insecure)
        with SuperLink(connection) as superlink:
            return _ACTIONS[arguments.action](arguments, superlink, registry)
    except (SiteError, SuperLinkError, OSError) as error:
        complain(f"fedmutual site: {error}")
        return 2


def _problem(arguments: argparse.Namespace) -> str:
    action, names = arguments.action, arguments.overrides
    if action == "list":
        return ""
    if action == "add" and arguments.all:
        return "name the sites, or use --all" if names or arguments.key else ""
    if not names:
        return f"name the site to {action}" + (", or use --all" if action == "add" else "")
    if arguments.key and len(names) > 1:
        return "--key is one site's: name one"
    return ""


def _list(arguments: argparse.Namespace, superlink: SuperLink, registry: Registry) -> int:
    from fedmutual.sites.superlink import REMOVED
    from fedmutual.wire.signatures import fingerprint

    nodes = [node for node in superlink.nodes()[0] if node.state != REMOVED]
    rows = [(node.name or "(no name)", node.state, str(node.id), node.fingerprint) for node in nodes]
    there = {node.fingerprint for node in nodes}
    keys = {name: fingerprint(line) for name, line in registry.read().items()}
    rows += [(name, "not registered", "", key) for name, key in keys.items() if key not in there]
    width = max((len(row[0]) for row in rows), default=0)
    for name, state, node, key in sorted(rows):
        print(shown(f"{name:<{width}}  {state:<14}  {node:<20}  {key}"))
    return 0


def _add(arguments: argparse.Namespace, superlink: SuperLink, registry: Registry) -> int:
    from fedmutual.sites.manage import SiteError, add

    names = list(registry.read()) if arguments.all else arguments.overrides
    if not names:
        raise SiteError(
            f"{registry.folder} has no public key (NAME.pub): run this where provision put `sites`"
        )
    failed = False
    for name in names:  # one that is refused keeps no other away
        try:
            print(shown(add(superlink, registry, name, arguments.key, arguments.replace)))
        except SiteError as error:
            complain(f"fedmutual site: {error}")
            failed = True
    return 2 if failed else 0


def _remove(arguments: argparse.Namespace, superlink: SuperLink, registry: Registry) -> int:
    from fedmutual.sites.manage import remove

    for name in arguments.overrides:
        said = remove(superlink, registry, name, partial(_agreed, arguments.yes, name))
        if not said:
            complain(f"{name} was not removed" + ("" if sys.stdin.isatty() else ": add --yes to remove it"))
            return 1
        print(shown(said))
    return 0


def _agreed(yes: bool, name: str, nodes: Sequence[Registered]) -> bool:
    for node in nodes:
        print(shown(f"{name}: node {node.id}, {node.state}, key {node.fingerprint}"))
    if yes or not sys.stdin.isatty():
        return yes
    return input(f"Remove {name}? Its key is refused from then on, for good. [y/N] ").strip().lower() in (
        "y",
        "yes",
    )


_ACTIONS = {"list": _list, "add": _add, "remove": _remove}
