"""``fedmutual run``: simulate a whole federation on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fedmutual.commands.parser import add_command
from fedmutual.logs import complain

_EXAMPLES = """\
examples:
  fedmutual run                                          generated faces, 5 clients, mutual learning
  fedmutual run partition=dirichlet partition.alpha=0.3
  fedmutual run data=folder data.root=./photos num_clients=3 rounds=20
  fedmutual run experiment=paper
  fedmutual run model=custom model._target_=torchvision.models.squeezenet1_0
  fedmutual run 'model.per_client=[visionnet,resnet18,mobilenet_v3_small]' num_clients=3
  fedmutual run resume=outputs/2026-01-31/12-00-00-mutual

Overrides use Hydra's grammar: group=choice selects conf/<group>/<choice>.yaml, key=value sets one value.
exit codes: 0 completed, 1 the run failed, 2 invalid setting, 130 stopped by Ctrl-C.
"""


def add_arguments(commands: Any) -> None:
    """Add the subcommand to the parser."""
    parser = add_command(
        commands,
        "run",
        call,
        help="simulate a federation on this machine",
        description="Simulate a federation on this machine with `flwr run`.",
        examples=_EXAMPLES,
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="changes from the defaults in conf/"
    )
    parser.add_argument(
        "--verbose", action="store_true", help="also show the log of the server and the clients"
    )


def call(arguments: argparse.Namespace) -> int:
    """Check the settings, then run."""
    from fedmutual.settings import SettingsError
    from fedmutual.simulation.request import prepare

    app_dir: Path = arguments.app_dir
    if not (app_dir / "server_app.py").is_file():
        return _refuse(f"no Flower app in {app_dir}: reinstall fedmutual, or run from a complete checkout")
    try:
        request = prepare(arguments.overrides, Path.cwd())
    except SettingsError as error:
        return _refuse(str(error))

    from rich.console import Console

    from fedmutual.backbones.weights import WeightsError
    from fedmutual.data.images import DataError
    from fedmutual.files.disk import WriteError
    from fedmutual.simulation.ahead import backbone_hint, compute_features
    from fedmutual.simulation.run import LocalRun

    console = Console()
    try:
        compute_features(request, console)
        hint = backbone_hint(request)
        if hint:
            console.print(hint, markup=False, highlight=False, soft_wrap=True)
        return LocalRun(request, app_dir, console, arguments.verbose).run()
    except SettingsError as error:  # the results folder is another run's, or cannot be made
        return _refuse(str(error))
    except (DataError, WeightsError, WriteError) as error:  # what features are computed from
        return _refuse(str(error))
    except KeyboardInterrupt:  # LocalRun has its own way to stop
        complain("fedmutual: stopped; the features computed so far are kept")
        return 130


def _refuse(reason: str) -> int:
    complain(f"fedmutual: {reason}")
    return 2
