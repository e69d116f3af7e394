"""``fedmutual provision``: folders for a server and its sites, with keys, certificates and all files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fedmutual.commands.parser import add_command
from fedmutual.logs import complain, shown

_EXAMPLES = """\
examples:
  fedmutual provision --example >project.yaml       then edit it: the server's name, the sites
  fedmutual provision project.yaml                  writes kits/server and kits/SITE
  fedmutual provision project.yaml                  again, after a site was added: keys are kept

Every folder holds what its machine needs (key, certificate, settings, compose file, systemd unit), and a
README.md that says how to start it. A private key that is gone, since it was handed over, is not made anew,
except with --new-key. Hand each site its own folder over a channel that nobody else reads, and
keep kits/authority offline: it signs the server's certificate.

exit codes: 0 written, 2 the project file has an error or a folder cannot be written.
"""


def add_arguments(commands: Any) -> None:
    """Add the subcommand to the parser."""
    parser = add_command(
        commands,
        "provision",
        call,
        help="make the folders of a server and its sites: keys, certificates, compose files, units",
        description="Make one folder for the server and one for each site from a project file.",
        examples=_EXAMPLES,
    )
    parser.add_argument("project", nargs="?", type=Path, metavar="PROJECT.yaml", help="the project file")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("kits"),
        metavar="DIR",
        help="folder of the folders (%(default)s)",
    )
    parser.add_argument(
        "--new-key", action="append", default=[], metavar="SITE", help="make a new key for this site"
    )
    parser.add_argument("--example", action="store_true", help="print an example of a project file")


def call(arguments: argparse.Namespace) -> int:
    """Write the folders, and say what each holds."""
    from fedmutual.files.disk import WriteError
    from fedmutual.provision.kits import provision
    from fedmutual.provision.project import EXAMPLE, ProjectError, read_project

    if arguments.example:
        print(EXAMPLE, end="")
        return 0
    if arguments.project is None:
        complain("fedmutual provision: name the project file; --example prints one")
        return 2
    try:
        outcome = provision(read_project(arguments.project), arguments.output, arguments.new_key)
    except (ProjectError, WriteError) as error:
        complain(f"fedmutual provision: {error}")
        return 2
    names = [str(arguments.output / folder) for folder in outcome.folders]
    for name, (folder, changed) in zip(names, outcome.folders.items(), strict=True):
        key = outcome.fingerprints.get(folder, "")
        print(shown(f"{name:<{max(map(len, names))}}  {changed}  {key}".rstrip()))
    for remark in outcome.remarks:
        complain(f"note: {remark}")
    return 0
