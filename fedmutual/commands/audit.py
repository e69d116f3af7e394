"""``fedmutual audit``: what the server of a run could tell, and what has left this site."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedmutual.commands.parser import add_command
from fedmutual.logs import complain, shown_lines

_EXAMPLES = """\
examples:
  fedmutual run privacy.record=true ...; fedmutual audit outputs/2026-01-31/12-00-00-mutual
  fedmutual audit RUN --shadows 8       (LiRA: eight more runs, each as long as the first)
  fedmutual audit STUDY                 (of `fedmutual compare`: every run, and one table)
  fedmutual audit RUN data.root=DIR     (the images have moved)
  fedmutual audit --sent --node-config 'client-name="clinic-a" data-dir="/data" state-dir="/state"'
  fedmutual audit --sent --json --node-config 'state-dir="/state"' | jq 'select(.kind == "report")'

RUN is attacked with what its server received, which it keeps with privacy.record=true, and the result is
compared with the truth: the images are loaded again, so it must be a simulation (`fedmutual run`). It leaves
audit.json and a section in report.html.

--sent: each message is there with its time, run, round, what it holds, bytes and SHA-256, before it leaves.
The digest is Flower's object id of the content, so whoever receives it can compare. `fedmutual doctor` says
what a run will send. A simulation keeps no such record.
exit codes: 0 shown, 1 nothing is recorded, 2 invalid option, or a run that cannot be audited.
"""


def add_arguments(commands: Any) -> None:
    """Add the subcommand to the parser."""
    parser = add_command(
        commands,
        "audit",
        call,
        help="measure what the server of a run could tell, or show what has left this site",
        description="Measure what the server of a run could tell; or show what has left this site.",
        examples=_EXAMPLES,
    )
    parser.add_argument(
        "runs", nargs="*", metavar="RUN", help="results folder of a run, or of a study; and overrides"
    )
    parser.add_argument(
        "--shadows", type=int, default=0, metavar="N", help="shadow runs for LiRA (default: 0, without it)"
    )
    parser.add_argument("--sent", action="store_true", help="the record of what was sent")
    parser.add_argument("--node-config", default="", metavar="CONFIG", help="the SuperNode's, with --sent")
    parser.add_argument(
        "--json", action="store_true", help="print JSON: an object a message, or the findings"
    )


def call(arguments: argparse.Namespace) -> int:
    """Show what was sent, or audit runs."""
    overrides = [text for text in arguments.runs if "=" in text and not Path(text).exists()]
    runs = [Path(text) for text in arguments.runs if text not in overrides]
    if arguments.sent == bool(runs) or (arguments.sent and overrides) or arguments.shadows < 0:
        complain("fedmutual audit: give the folder of a run, or --sent (--shadows is 0 or more)")
        return 2
    return _sent(arguments) if arguments.sent else _runs(runs, overrides, arguments)


def _runs(folders: list[Path], overrides: list[str], arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from fedmutual.audit.run import audit_run
    from fedmutual.audit.tables import run_table, study_table
    from fedmutual.audit.truth import AuditError
    from fedmutual.backbones.weights import WeightsError
    from fedmutual.data.images import DataError
    from fedmutual.report.leave import leave_report
    from fedmutual.results.directory import ResultsError
    from fedmutual.settings import SettingsError

    console, audits = Console(), []
    for name, path in _named(folders):
        try:
            found = audit_run(path, overrides, arguments.shadows)
        except (AuditError, ResultsError, SettingsError, DataError, WeightsError, OSError) as error:
            complain(f"fedmutual audit: {error}")
            return 2
        leave_report(path.absolute())
        audits.append((name, found))
        if not arguments.json:
            console.print(run_table(name, found))
    if arguments.json:
        print(json.dumps(dict(audits), indent=2, ensure_ascii=False))
    elif len(audits) > 1:
        console.print(study_table(audits))
    return 0


def _named(folders: list[Path]) -> list[tuple[str, Path]]:
    """Return runs with their names; a study's folder stands for its completed runs."""
    from fedmutual.results.directory import CONFIG, SUMMARY

    found = []
    for folder in folders:
        if (folder / CONFIG).exists() or not (folder / "runs").is_dir():
            found.append((folder.name or str(folder), folder))
            continue
        runs = sorted(file.parent for file in (folder / "runs").glob(f"*/*/{SUMMARY}"))
        found += [(path.parent.name, path) for path in runs]
    return found


def _sent(arguments: argparse.Namespace) -> int:
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
