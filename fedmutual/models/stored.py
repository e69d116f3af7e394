"""Write and read a model's folder, ``model.safetensors`` and ``model.json``, without unpickling.

The card names the class that rebuilds the network. It is untrusted: a class is called only if it is a
``torch.nn.Module``, a function only if it is one of torchvision's models.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmutual.data.decoding import INTERPOLATIONS, PictureInput
from fedmutual.data.depth import window_problem
from fedmutual.files.atomic import atomic_write
from fedmutual.models.card import card_page, picture_of_card

if TYPE_CHECKING:
    from torch import Tensor, nn

WEIGHTS, CARD, PAGE = "model.safetensors", "model.json", "README.md"
BEST = "best"  # folder of a client's best model so far, in that of its last one
GLOBAL = "global_model"  # folder of a run's global model, next to the clients' models
_LARGEST_SIZE = 4096  # pixels a side; a damaged card must not ask for more memory than there is
_PRETRAINED = ("weights", "weights_backbone", "pretrained")  # would download weights that are then replaced


class StoredModelError(ValueError):
    """A model folder cannot be used; the message names it and says what to do."""


@dataclass(frozen=True, eq=False)
class StoredModel:
    """A model ready for prediction.

    Attributes
    ----------
    folder : Path
    card : dict
        ``model.json``.
    model : nn.Module
        In evaluation mode, on the CPU.
    """

    folder: Path
    card: dict[str, Any]
    model: nn.Module

    @property
    def name(self) -> str:
        """The name of the client that trained the model."""
        return str(self.card.get("client") or self.folder.name)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, in the order of the outputs."""
        return tuple(self.card["classes"])

    @property
    def picture(self) -> PictureInput:
        """The pictures that the model takes."""
        return picture_of_card(self.card)


def save_model(folder: Path, weights: Mapping[str, Tensor], card: Mapping[str, Any]) -> Path:
    """Write ``model.safetensors``, ``model.json`` (to rebuild the model) and a card; return the folder.

    Raises
    ------
    WriteError
        The disk is full, say.
    """
    from safetensors.torch import save

    atomic_write(folder / WEIGHTS, save({name: w.cpu().contiguous() for name, w in weights.items()}))
    atomic_write(folder / PAGE, card_page(card).encode())
    atomic_write(folder / CARD, json.dumps(card, indent=2).encode())
    return folder


def find_models(folder: Path) -> list[Path]:
    """Return the model folder itself, or the folders of all clients in a run's folder, sorted.

    Of a client's last and best model (``train.keep=best``), this is the last one; give the folder ``best``
    for the other. If the clients' models are missing (they stay at the sites), a run's folder stands for its
    global model.

    Raises
    ------
    StoredModelError
        No model found.
    """
    if (folder / CARD).is_file():
        return [folder]
    found = sorted(card.parent for card in folder.glob(f"**/{CARD}"))
    found = [path for path in found if path.name != GLOBAL] or found
    found = [path for path in found if path.name != BEST or path.parent not in found]
    if not found:
        raise StoredModelError(
            f"{folder} has no {CARD}: give a client's model folder "
            f"(<run>/clients/<run name>/<client>), a run's {GLOBAL}, or its folder for all of its clients"
        )
    return found


def load_model(folder: Path) -> StoredModel:
    """Rebuild a client's model from its folder.

    Raises
    ------
    StoredModelError
        A file is missing or damaged, the weights are of another architecture, or the card's target is not a
        model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from fedmutual.models.build import load_weights

    card = _read_card(folder)
    model = _build(folder, card["target"], card["arguments"])
    try:
        load_weights(model, load_file(folder / WEIGHTS))
    except FileNotFoundError as error:
        raise StoredModelError(f"{folder} has no {WEIGHTS}") from error
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise StoredModelError(f"{folder / WEIGHTS} is damaged or of another model: {reason}") from error
    _require_outputs(folder, card, model.eval())
    return StoredModel(folder, card, model)


def load_models(folders: Sequence[Path]) -> list[StoredModel]:
    """Load the models of an ensemble.

    Raises
    ------
    StoredModelError
        As :func:`load_model`, or the models have different classes.
    """
    models = [load_model(folder) for folder in folders]
    for other in models[1:]:
        if other.classes != models[0].classes:
            raise StoredModelError(
                f"{other.folder} has the classes {', '.join(other.classes)}, {models[0].folder} "
                f"{', '.join(models[0].classes)}: an ensemble needs the same classes in the same order"
            )
    return models


def _read_card(folder: Path) -> dict[str, Any]:
    try:
        card = json.loads((folder / CARD).read_bytes())
    except OSError as error:
        raise StoredModelError(f"{folder / CARD} cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise StoredModelError(f"{folder / CARD} is not JSON: {error}") from error
    kinds = {"target": str, "arguments": dict, "classes": list, "image_size": int}
    for key, kind in kinds.items():
        if not isinstance(card, dict) or not isinstance(card.get(key), kind):
            raise StoredModelError(f"{folder / CARD}: {key} is missing or not of type {kind.__name__}")
    if not all(isinstance(name, str) for name in card["classes"]) or len(card["classes"]) < 1:
        raise StoredModelError(f"{folder / CARD}: classes are not a list of names")
    if not 1 <= card["image_size"] <= _LARGEST_SIZE:
        raise StoredModelError(
            f"{folder / CARD}: image_size {card['image_size']} is not in 1 to {_LARGEST_SIZE}"
        )
    if card.get("interpolation", "bilinear") not in INTERPOLATIONS:
        raise StoredModelError(f"{folder / CARD}: interpolation is none of {', '.join(INTERPOLATIONS)}")
    window = card.get("window")
    numbers = isinstance(window, list) and all(isinstance(value, int | float) for value in window)
    problem = None if window is None else window_problem(window) if numbers else f"window: {window}"
    if problem:
        raise StoredModelError(f"{folder / CARD}: {problem}")
    return dict(card)


def _require_outputs(folder: Path, card: Mapping[str, Any], model: nn.Module) -> None:
    """Refuse a card with other classes or another image size than the network's."""
    import torch

    from fedmutual.learning.evaluation import predict

    blank = torch.zeros(1, 3, card["image_size"], card["image_size"], dtype=torch.uint8)
    try:
        outputs = predict(model, blank, 1).shape[1]
    except Exception as error:  # a network raises what it likes
        reason = (str(error).splitlines() or [repr(error)])[0]
        raise StoredModelError(
            f"{folder / CARD}: the model takes no image of image_size {card['image_size']}: {reason}"
        ) from error
    if outputs != len(card["classes"]):
        raise StoredModelError(
            f"{folder / CARD} names {len(card['classes'])} classes, the model has {outputs} outputs: "
            "put the card back that was written with the model"
        )


def _build(folder: Path, target: str, arguments: dict[str, Any]) -> nn.Module:
    from hydra.utils import get_object
    from torch import nn

    try:
        found = get_object(target)
    except Exception as error:  # importing foreign code can raise anything
        raise StoredModelError(f"{folder / CARD}: cannot import {target}: {error}") from error
    torchvision = inspect.isfunction(found) and found.__module__.startswith("torchvision.models.")
    if torchvision:
        arguments = {key: value for key, value in arguments.items() if key not in _PRETRAINED}
    elif not (inspect.isclass(found) and issubclass(found, nn.Module)):
        raise StoredModelError(
            f"{folder / CARD}: {target} is neither a torch.nn.Module class nor a model of torchvision, so it "
            "is not called, for safety; wrap your factory function in a class"
        )
    try:
        model = found(**arguments)
    except Exception as error:  # so can a constructor with damaged arguments
        raise StoredModelError(f"{folder / CARD}: {target}({arguments}): {error!r}") from error
    if not isinstance(model, nn.Module):
        raise StoredModelError(f"{folder / CARD}: {target} does not create a torch.nn.Module")
    return model
