"""Features of frozen backbones, computed before a simulation starts: once, with a bar, by all cores.

Its clients would find them missing at the same moment, and all but one would wait.
"""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fedmutual.backbones.intake import intake_of
from fedmutual.backbones.weights import EXTRA
from fedmutual.data.cache import cache_folder
from fedmutual.data.decoding import PictureSettings
from fedmutual.settings import Settings
from fedmutual.settings.compose import compose, model_overrides, without_model
from fedmutual.settings.pretrained import pretrained_settings
from fedmutual.simulation.request import RunRequest


def compute_features(request: RunRequest, console: Console) -> None:
    """Fill the cache with the features that the run's clients will need; what is there stays.

    Raises
    ------
    DataError, WeightsError, WriteError
        The message names the folder or setting, and the remedy.
    """
    models = request.settings.model.per_client
    plain = without_model(request.overrides)
    chosen = [compose([*plain, *model_overrides(name)]) for name in dict.fromkeys(models)]
    for settings in chosen or [request.settings]:
        pretrained = pretrained_settings(settings.model)
        if pretrained is not None and pretrained.tune != "all":
            with _bar(console) as bar:
                _fill(settings, bar, pretrained.backbone.rpartition("/")[2])


def backbone_hint(request: RunRequest) -> str:
    """Say what a backbone would bring to a run on photographs that has none; empty: nothing to say."""
    settings = request.settings
    models = settings.model.per_client
    drawn = not isinstance(settings.data, PictureSettings)
    if drawn or models or pretrained_settings(settings.model) is not None or settings.experiment_name:
        return ""
    return (
        "These photographs train a network from nothing. model=pretrained starts from one that knows a "
        f"million others, which is mostly faster and more often right ({EXTRA})."
    )


def _fill(settings: Settings, bar: Progress, backbone: str) -> None:
    task = bar.add_task("", total=None)
    cache_dir = cache_folder(settings.cache_dir)
    intake = intake_of(settings, lambda done, total: bar.update(task, completed=done, total=total))
    data = intake.of(settings.data.load(cache_dir), settings, cache_dir)
    named = [("private and public images", data.pool.inputs), ("augmented views", data.pool.augmented)]
    named += [("public images", data.public.inputs)] if data.public else []
    named += [("test images", data.unseen.inputs)] if data.unseen else []
    for name, inputs in named:
        if inputs is not None:
            bar.update(task, description=f"{backbone}: features of {name}", completed=0, total=None)
            _ = inputs.array


def _bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True)
