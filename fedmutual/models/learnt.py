"""What of a client's model learns: all of it, or what stands on a frozen backbone.

A frozen backbone is neither kept in a client's state nor sent: of such a model only the top has weights in
them. When the model is saved, the backbone's weights are joined to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedmutual.backbones.weights import find_backbone
from fedmutual.data.decoding import PictureInput
from fedmutual.data.intake import own_picture
from fedmutual.data.site import SharedData, SiteData
from fedmutual.models.build import build_model
from fedmutual.settings import ModelSettings, Settings
from fedmutual.settings.pretrained import pretrained_settings


def build_learnt(
    settings: Settings, data: SiteData | SharedData, seed: int, new: bool = True
) -> tuple[nn.Module, dict[str, Any]]:
    """Build what learns, for the inputs that ``data`` has.

    Parameters
    ----------
    new : bool
        It gets no saved weights: a head takes the scale of the public images' features.

    Returns
    -------
    learnt : nn.Module
    arguments : dict
        Of the call that rebuilds the whole model's architecture.

    Raises
    ------
    ValueError
        The model cannot be built; the message names the setting.
    WeightsError
        Its backbone's weights cannot be used.
    """
    chosen = pretrained_settings(settings.model)
    num_classes = len(data.classes)
    if chosen is None:
        return build_model(settings.model, num_classes, settings.data.image_size, seed)
    from fedmutual.models.pretrained import Head

    backbone = find_backbone(chosen)
    arguments = {
        "num_classes": num_classes,
        "architecture": backbone.architecture,
        "image_size": backbone.picture.size,
        "mean": list(backbone.mean),
        "std": list(backbone.std),
        "tune": chosen.tune,
    }
    if chosen.tune != "head":
        whole = _whole(settings, arguments)
        return (whole.top if chosen.tune == "last" else whole), arguments
    features = data.public.images.seen
    head = Head(features.shape[1], num_classes)
    if chosen.scale and new:
        head.fit_scale(torch.from_numpy(np.array(features)))
    return head, arguments


def whole_weights(
    settings: Settings, arguments: dict[str, Any], learnt: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Join what has learnt to the frozen backbone: the weights of the model that ``arguments`` rebuild."""
    chosen = pretrained_settings(settings.model)
    if chosen is None or chosen.tune == "all":
        return dict(learnt)
    prefix = "top.head." if chosen.tune == "head" else "top."
    frozen = _whole(settings, arguments).state_dict()
    return {**frozen, **{f"{prefix}{name}": values for name, values in learnt.items()}}


def picture_of(settings: Settings) -> PictureInput:
    """Return the pictures that the settings' model takes."""
    chosen = pretrained_settings(settings.model)
    own = own_picture(settings)
    return own if chosen is None else replace(find_backbone(chosen).picture, window=own.window)


def architecture_of(model: ModelSettings) -> str:
    """Name what must not change within a run: the class, and a pretrained model's backbone and tuned part."""
    chosen = pretrained_settings(model)
    return model.target if chosen is None else f"{model.target} {chosen.backbone} {chosen.tune}"


def name_of(model: ModelSettings, learnt: nn.Module) -> str:
    """Name a model for people, in reports and tables."""
    chosen = pretrained_settings(model)
    return (
        type(learnt).__name__ if chosen is None else f"{chosen.backbone.rpartition('/')[2]} ({chosen.tune})"
    )


def frozen_digest(settings: Settings) -> str:
    """Name the frozen part, on whose outputs weights are trained; empty for a model without one.

    Weights of two clients can be averaged only if they stand on the same.
    """
    chosen = pretrained_settings(settings.model)
    if chosen is None:
        return ""
    backbone = find_backbone(chosen)
    return f"{chosen.tune} {backbone.picture.size} {backbone.picture.interpolation} {backbone.digest[:16]}"


def parameter_groups(settings: Settings, learnt: nn.Module) -> list[dict[str, Any]]:
    """Return an optimiser's groups of parameters, each with its ``share`` of the learning rate."""
    chosen = pretrained_settings(settings.model)
    own = list(learnt.named_parameters())
    if chosen is None or chosen.tune == "head":
        return [{"params": [p for _, p in own], "share": 1.0}]
    heads = {id(p) for p in _head_parameters(learnt)}
    return [
        {"params": [p for _, p in own if id(p) in heads], "share": 1.0},
        {"params": [p for _, p in own if id(p) not in heads], "share": chosen.lower_rate},
    ]


def _head_parameters(learnt: nn.Module) -> Iterator[nn.Parameter]:
    from fedmutual.models.pretrained import Head

    return (p for module in learnt.modules() if isinstance(module, Head) for p in module.parameters())


def _whole(settings: Settings, arguments: dict[str, Any]) -> Any:
    from fedmutual.backbones.network import load_backbone
    from fedmutual.models.pretrained import Pretrained

    chosen = pretrained_settings(settings.model)
    assert chosen is not None
    return Pretrained(**arguments, network=load_backbone(find_backbone(chosen)))
