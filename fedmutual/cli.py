"""The ``fedmutual`` command. Nothing heavy is imported before the settings are known to be good."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fedmutual
from fedmutual.appfolder import app_folder
from fedmutual.commands import clean, completion, config, export, predict, report

APP_DIR = app_folder()

_START = """\
first steps:
  fedmutual run                              five clients learn on generated faces; a line a round
  fedmutual run partition=dirichlet          the same with label skew; every setting is key=value
  fedmutual run data=folder data.root=DIR    your own images: DIR/train/<class>/, DIR/public/, DIR/test/
  fedmutual config --changed data=folder data.root=DIR      what that comes to, and from which file
  fedmutual compare experiment=smoke         several methods under the same conditions: one table

`fedmutual COMMAND --help` has examples of each command. Results go to outputs/<date>/<time>-<strategy>/.
Many sites instead of one machine: docs/deployment.md.
"""

_EXAMPLES = """\
examples:
  fedmutual run                                          generated faces, 5 clients, mutual learning
  fedmutual run partition=dirichlet partition.alpha=0.3
  fedmutual run data=folder data.root=./photos num_clients=3 rounds=20
  fedmutual run experiment=paper
  fedmutual run model=custom model._target_=torchvision.models.squeezenet1_0
  fedmutual run 'model.per_client=[visionnet,resnet18,mobilenet_v3_small]' num_clients=3
  fedmutual run resume=outputs/2026-01-31/12-00-00-mutual

An override is Hydra's: group=choice takes conf/<group>/<choice>.yaml, key=value sets one value.
exit codes: 0 completed, 1 the run failed, 2 a setting was refused, 130 stopped by Ctrl-C.
"""

_COMPARE_EXAMPLES = """\
examples:
  fedmutual compare experiment=smoke                     a study: conf/experiment/smoke.yaml
  fedmutual compare strategy.kl_weight=0,1 seed=0,1,2 partition=iid,pathological
  fedmutual compare experiment=smoke seed=range(5) study.reference=alone --jobs 4

Sweeps are Hydra's. Repeating the command goes on with what is missing.
exit codes: 0 all runs completed, 1 some failed, 2 a setting was refused, 130 stopped by Ctrl-C.
"""

_DOCTOR_EXAMPLES = """\
examples:
  fedmutual doctor data=folder --node-config 'client-name="clinic-a" data-dir="/data" state-dir="/state"'
  fedmutual doctor data=folder --node-config 'client-name="clinic-a" data-dir="/data"' \\
      --superlink server.example:8000 --root-certificates ca.crt --auth-supernode-private-key keys/clinic-a

exit codes: 0 ready, 1 something is wrong (each line says what to do), 2 an option was refused.
"""


def main(argv: Sequence[str] | None = None, app_dir: Path = APP_DIR) -> int:
    """Run the command line.

    Parameters
    ----------
    argv : Sequence[str] | None
        Arguments; None: those of the process.
    app_dir : Path
        Folder of the Flower app.

    Returns
    -------
    int
        The exit code.
    """
    parser = _parser()
    if "_ARGCOMPLETE" in os.environ:  # the shell asks what could come next
        import argcomplete

        argcomplete.autocomplete(parser)
    arguments, rest = parser.parse_known_args(argv)
    unknown = [item for item in rest if item.startswith("-")]
    if unknown:
        parser.error(f"unknown option {unknown[0]}")
    if rest and not hasattr(arguments, "overrides"):
        parser.error(f"unknown argument {rest[0]}")
    overrides = arguments.overrides = [*getattr(arguments, "overrides", []), *rest]
    if hasattr(arguments, "call"):  # a command of fedmutual/commands/
        return int(arguments.call(arguments))
    if arguments.command == "compare":
        from fedmutual.compare.command import compare

        return compare(overrides, arguments.engine, arguments.jobs, Path.cwd())
    if arguments.command == "doctor":
        return _doctor(arguments, overrides)
    return _run(overrides, arguments.verbose, app_dir)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fedmutual",
        description="Federated image learning without sharing weights.",
        epilog=_START,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"fedmutual {fedmutual.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    run = commands.add_parser(
        "run",
        allow_abbrev=False,
        help="simulate a federation on this machine",
        description="Simulate a federation on this machine with `flwr run`.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.add_argument("overrides", nargs="*", metavar="key=value", help="what differs from conf/")
    run.add_argument(
        "--verbose", action="store_true", help="show the log of the server and the clients as well"
    )
    _add_compare(commands)
    _add_doctor(commands)
    for command in (report, predict, export, config, clean, completion):
        command.add_arguments(commands)
    for name in ("run", "compare", "config"):
        completion.complete_overrides(commands.choices[name])
    return parser


def _add_compare(commands: Any) -> None:
    compare = commands.add_parser(
        "compare",
        allow_abbrev=False,
        help="run strategies x conditions x seeds and compare them",
        description="Run variants under the same conditions and seeds, and write one table of all.",
        epilog=_COMPARE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    compare.add_argument("overrides", nargs="*", metavar="key=value", help="settings; a,b,c runs each")
    compare.add_argument("--jobs", type=_at_least_one, help="runs at a time (default: one a core)")
    compare.add_argument(
        "--engine",
        choices=("inprocess", "flwr"),
        default="inprocess",
        help="inprocess: a process a run, clients take turns; flwr: as `fedmutual run`, for the wall time",
    )


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def _add_doctor(commands: Any) -> None:
    doctor = commands.add_parser(
        "doctor",
        allow_abbrev=False,
        help="see whether this site is ready for a run",
        description="See whether this site is ready for a run. Give it what its flower-supernode is given.",
        epilog=_DOCTOR_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    doctor.add_argument("overrides", nargs="*", metavar="key=value", help="the run's settings")
    doctor.add_argument("--node-config", default="", metavar="CONFIG", help="the SuperNode's")
    doctor.add_argument(
        "--superlink", metavar="HOST:PORT", help="without it, only the site itself is looked at"
    )
    doctor.add_argument("--insecure", action="store_true", help="without TLS")
    doctor.add_argument("--root-certificates", type=Path, metavar="FILE", help="the server's ca.crt")
    doctor.add_argument("--auth-supernode-private-key", type=Path, metavar="FILE", help="the node's key")
    doctor.add_argument(
        "--public-digest", metavar="HEX", help="the server's: public_digest in its summary.json"
    )
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")


def _doctor(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    from fedmutual.doctor.command import Patient, examine, link_of, node_configuration, show

    try:
        node_config = node_configuration(arguments.node_config)
    except ValueError as error:
        return _refuse(str(error))
    link = link_of(
        arguments.superlink,
        arguments.insecure,
        arguments.root_certificates,
        arguments.auth_supernode_private_key,
    )
    patient = Patient(tuple(overrides), node_config, link, arguments.public_digest)
    return show(examine(patient), arguments.json)


def _run(overrides: Sequence[str], verbose: bool, app_dir: Path) -> int:
    from fedmutual.local.request import prepare
    from fedmutual.settings import SettingsError

    if not (app_dir / "server_app.py").is_file():
        return _refuse(f"no Flower app in {app_dir}: install fedmutual again, or run from a whole checkout")
    try:
        request = prepare(overrides, Path.cwd())
    except SettingsError as error:
        return _refuse(str(error))

    from rich.console import Console

    from fedmutual.local.run import LocalRun

    return LocalRun(request, app_dir, Console(), verbose).run()


def _refuse(reason: str) -> int:
    print(f"fedmutual: {reason}", file=sys.stderr)
    return 2
