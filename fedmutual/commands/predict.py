"""``fedmutual predict``: predict the classes of pictures."""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmutual.commands.parser import add_command
from fedmutual.logs import complain, csv_cell, show_logs, shown

if TYPE_CHECKING:
    from fedmutual.inference.predict import Prediction

_EXAMPLES = """\
examples:
  fedmutual predict --model outputs/RUN/clients/NAME/client-0 photo.jpg
  fedmutual predict --model outputs/RUN photos             ensemble of the run's clients, whole folder
  fedmutual predict --model clinic-a --model clinic-b 'new/**/*.png' --format csv > classes.csv

Several models form an ensemble: the mean of their logits decides (as in summary.json).
exit codes: 0 all predicted, 1 a picture could not be read (it is named), 2 no such model or picture.
"""


def add_arguments(commands: Any) -> None:
    """Add the subcommand to the parser."""
    parser = add_command(
        commands,
        "predict",
        call,
        help="predict the classes of pictures with one model or an ensemble",
        description="Predict the classes of pictures with one client's model or an ensemble of several.",
        examples=_EXAMPLES,
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="files, folders or quoted patterns")
    parser.add_argument(
        "--model",
        action="append",
        required=True,
        type=Path,
        metavar="DIR",
        help="a client's model folder, or a run's folder for all its clients; repeatable",
    )
    parser.add_argument("--format", choices=("table", "csv", "json"), default="table")
    parser.add_argument("--device", default="auto", help="auto, cpu, mps, cuda or cuda:<n> (default: auto)")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="pictures per forward pass")
    parser.add_argument(
        "--max-megapixels", type=float, default=64, metavar="N", help="larger pictures are not decoded"
    )


def call(arguments: argparse.Namespace) -> int:
    """Predict, print the predictions, and report unreadable pictures."""
    from fedmutual.inference.pictures import PicturesError, find_pictures
    from fedmutual.models.stored import StoredModelError, find_models, load_models

    if arguments.batch_size < 1:
        return _refuse(f"--batch-size: {arguments.batch_size} is below 1")
    show_logs()
    try:
        pictures = find_pictures(arguments.images)
        folders = dict.fromkeys(found for folder in arguments.model for found in find_models(folder))
        models = load_models(list(folders))
        from fedmutual.learning.device import choose_device

        device = choose_device(arguments.device)
    except (PicturesError, StoredModelError) as error:
        return _refuse(str(error))
    except (ValueError, RuntimeError) as error:  # torch's errors for an unknown or missing device
        return _refuse(f"--device: {error}")
    from fedmutual.inference.predict import predict_pictures

    good: list[Prediction] = []
    bad: list[Prediction] = []
    for prediction in predict_pictures(
        models, pictures, device, arguments.batch_size, arguments.max_megapixels
    ):
        (bad if prediction.error else good).append(prediction)
    names = [model.name for model in models]
    try:
        {"table": _table, "csv": _csv, "json": _json}[arguments.format](good, models[0].classes, names)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` closed the pipe; avoids a second error at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    for prediction in bad:
        path = shown(prediction.path)  # its line breaks, too
        complain(f"fedmutual predict: {path} cannot be read: {prediction.error}")
    return 1 if bad else 0


def _table(predictions: Sequence[Prediction], classes: Sequence[str], models: Sequence[str]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("image", overflow="fold")
    table.add_column("class", overflow="fold")
    table.add_column("probability", justify="right")
    if len(models) > 1:
        table.add_column(f"of {len(models)} models", justify="right")
    for prediction in predictions:
        best = int(prediction.probabilities.argmax())
        row = [shown(prediction.path), shown(classes[best]), f"{100 * prediction.probabilities[best]:.1f} %"]
        votes = [str(prediction.votes)] if len(models) > 1 else []
        table.add_row(*map(escape, row), *votes)
    if predictions:
        Console().print(table)


def _csv(predictions: Iterable[Prediction], classes: Sequence[str], models: Sequence[str]) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    names = [f"p({name})" for name in classes]
    writer.writerow(map(csv_cell, ["image", "class", "probability", "votes", *names]))
    for prediction in predictions:
        p = [f"{value:.6f}" for value in prediction.probabilities]
        best = int(prediction.probabilities.argmax())
        row = [str(prediction.path), classes[best], p[best], prediction.votes, *p]
        writer.writerow(map(csv_cell, row))


def _json(predictions: Iterable[Prediction], classes: Sequence[str], models: Sequence[str]) -> None:
    records = []
    for prediction in predictions:
        p = [round(float(value), 6) for value in prediction.probabilities]
        best = int(prediction.probabilities.argmax())
        records.append(
            {
                "image": str(prediction.path),
                "class": classes[best],
                "probability": p[best],
                "votes": prediction.votes,
                "probabilities": dict(zip(classes, p, strict=True)),
            }
        )
    json.dump({"models": list(models), "predictions": records}, sys.stdout, indent=2)
    print()


def _refuse(reason: str) -> int:
    complain(f"fedmutual predict: {reason}")
    return 2
