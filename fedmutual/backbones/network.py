"""The networks of timm and torchvision without their last layer, and the weights in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedmutual.backbones.weights import EXTRA, Backbone, WeightsError, require_timm

_STAGES = ("blocks", "stages", "features")  # names of the list of a network's stages


def bare_network(architecture: str) -> nn.Module:
    """Build a network with random weights that returns features, [N, F]; the global RNG is unchanged.

    Parameters
    ----------
    architecture : str
        ``timm:<model>`` or ``torchvision:<model>``. Nothing is fetched.

    Raises
    ------
    ValueError
        There is no such model, or it does not end in a linear layer.
    """
    library, _, name = architecture.partition(":")
    with torch.random.fork_rng(devices=[]):
        if library == "timm":
            return _of_timm(name)
        if library == "torchvision":
            return _of_torchvision(name)
    raise ValueError(f"model.architecture: {architecture!r} is neither timm:<model> nor torchvision:<model>")


def _of_timm(name: str) -> nn.Module:
    require_timm(name)
    import timm

    if not timm.is_model(name):  # its own names only: timm would fetch others from a hub
        raise ValueError(f"model.architecture: timm has no model {name!r}")
    return timm.create_model(name, pretrained=False, num_classes=0)


def _of_torchvision(name: str) -> nn.Module:
    from torchvision import models

    if name not in models.list_models():
        raise ValueError(f"model.architecture: torchvision has no model {name!r}")
    network: nn.Module = models.get_model(name, weights=None)
    path, last = list(network.named_modules())[-1]
    if not isinstance(last, nn.Linear):
        raise ValueError(
            f"model.architecture: torchvision's {name} does not end in a linear layer that could be replaced"
        )
    parent, _, leaf = path.rpartition(".")
    setattr(network.get_submodule(parent), leaf, nn.Identity())
    return network


def load_backbone(backbone: Backbone) -> nn.Module:
    """Build a backbone's network with its weights, read as tensors only, in evaluation mode.

    Raises
    ------
    WeightsError
        The file is damaged, or of another architecture.
    """
    network = bare_network(backbone.architecture)
    own = network.state_dict()
    tensors = _read(backbone)
    if backbone.in_order:  # and then those of the classifier
        tensors = dict(zip(own, tensors.values(), strict=False))
    missing = [name for name in own if name not in tensors]
    wrong = [name for name in own if name in tensors and tensors[name].shape != own[name].shape]
    if missing or wrong:
        told = f"it lacks {missing[0]}" if missing else f"{wrong[0]} has another shape"
        raise WeightsError(
            f"model.backbone: {backbone.file} is not of {backbone.architecture} ({told}): set "
            f"model.architecture, or {EXTRA}"
        )
    network.load_state_dict({name: tensors[name] for name in own})
    return network.eval()


def _read(backbone: Backbone) -> Mapping[str, Tensor]:
    try:
        if backbone.file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return cast(Mapping[str, Tensor], load_file(backbone.file))
        found: Any = torch.load(backbone.file, map_location="cpu", weights_only=True)
    except Exception as error:  # pickles, archives and torch raise many types
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(
            f"model.backbone: {backbone.file} cannot be read as a file of tensors ({reason}): bring it again"
        ) from error
    for key in ("state_dict", "model"):  # of training scripts
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not all(isinstance(v, Tensor) for v in found.values()):
        raise WeightsError(f"model.backbone: {backbone.file} holds no state_dict")
    return found


def divided(network: nn.Module, tune: str) -> tuple[nn.Sequential, nn.Sequential]:
    """Divide a network into what is frozen and what is tuned of it.

    Parameters
    ----------
    tune : str
        ``head``: all of it is frozen; ``last``: all but the last stage and what follows it; ``all``: nothing.

    Raises
    ------
    ValueError
        With ``last``, where the network is no plain sequence of its modules.
    """
    if tune == "head":
        return nn.Sequential(network), nn.Sequential()
    if tune == "all":
        return nn.Sequential(), nn.Sequential(network)
    parts = _parts(network)
    stages = [i for i, part in enumerate(parts) if sum(isinstance(m, nn.Conv2d) for m in part.modules()) > 1]
    if not stages or stages[-1] == 0 or not _is_sequence(network, parts):
        raise ValueError(
            "model.tune: last is for backbones that are a sequence of stages, which "
            f"{type(network).__name__} is not: use head or all"
        )
    return nn.Sequential(*parts[: stages[-1]]), nn.Sequential(*parts[stages[-1] :])


class Normalise(nn.Module):
    """Pictures in [0, 1] as the weights want them.

    Parameters
    ----------
    mean, std : 3 floats
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean).reshape(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Pictures [N, 3, S, S], or grey ones [N, 1, S, S]."""
        return (images.expand(-1, 3, -1, -1) - self.mean) / self.std


def _parts(network: nn.Module) -> list[nn.Module]:
    """Return the modules one after the other, the stages of a list of stages singly."""
    parts: list[nn.Module] = []
    for name, child in network.named_children():
        parts += child.children() if name in _STAGES and isinstance(child, nn.Sequential) else [child]
    flat = [part for part in parts if not isinstance(part, nn.Identity)]
    pooled = any(isinstance(part, nn.AdaptiveAvgPool2d) for part in flat)
    return [*flat, nn.Flatten(1)] if pooled else flat


@torch.no_grad()
def _is_sequence(network: nn.Module, parts: list[nn.Module]) -> bool:
    probe = torch.linspace(0, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
    was = network.training
    network.eval()
    try:
        return torch.equal(network(probe), nn.Sequential(*parts)(probe))
    except RuntimeError:  # shapes that do not follow each other
        return False
    finally:
        network.train(was)
