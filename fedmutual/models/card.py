"""The model card: what is known about a client's model, as a page for people and model hubs."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fedmutual.backbones.weights import find_backbone
from fedmutual.data.decoding import PictureInput
from fedmutual.data.depth import as_window
from fedmutual.settings import Settings, as_container
from fedmutual.settings.described import flat, installed_versions, without_paths
from fedmutual.settings.pretrained import pretrained_settings

if TYPE_CHECKING:
    from fedmutual.data.site import SharedData, SiteData

# Settings shown on a model card: all that influence the model, nothing about the machine.
SETTINGS = (
    "strategy",
    "train",
    "optimizer",
    "augment",
    "public",
    "partition",
    "data",
    "precision",
    "deterministic",
    "privacy",
)
PREPROCESSING = (
    "RGB, EXIF orientation applied, transparency on white, resized to {size}x{size} pixels ({how}, "
    "antialiased, aspect ratio ignored), uint8 divided by 255: float [N, 3, {size}, {size}] in [0, 1]"
)
_PRIVACY = (
    "## Privacy\n\nWhat has left the site of its images is differentially private: epsilon {epsilon:.3g}, "
    "delta {delta:g} for each image, over {releases} release(s). "
)
_LISTENER = (
    "That is said of what has left, not of this model, which has learnt from the images without noise: keep "
    "it at the site."
)
_NOISY = (
    "This model was averaged of what has left. The noise is floating-point numbers (Opacus), against which "
    "attacks are known: take it as a baseline."
)
_MEASURES = {
    "validation_accuracy": "accuracy, own validation images",
    "validation_loss": "loss, own validation images (nats)",
    "validation_auroc": "AUROC, own validation images",
    "validation_f1": "F1 (mean over the classes), own validation images",
    "validation_ece": "calibration error (ECE), own validation images",
    "unseen_accuracy": "accuracy, shared unseen set",
    "unseen_auroc": "AUROC, shared unseen set",
    "unseen_f1": "F1 (mean over the classes), shared unseen set",
    "unseen_ece": "calibration error (ECE), shared unseen set",
    "kl_after": "KL to the peers on the public samples (nats)",
}


def preprocessing(picture: PictureInput) -> str:
    """Return a description of the preprocessing in one sentence."""
    text = PREPROCESSING.format(size=picture.size, how=picture.interpolation)
    if picture.window is None:
        return text
    low, high = picture.window
    return f"{text}; before, grey values of more than 8 bits: {low:g} to {high:g} become 0 to 255"


def picture_of_card(card: Mapping[str, Any]) -> PictureInput:
    """Return the pictures that the model of a card takes."""
    size, how = int(card["image_size"]), card.get("interpolation", "bilinear")
    return PictureInput(size, how, as_window(card.get("window")))


def model_card(
    settings: Settings,
    data: SiteData | SharedData,
    arguments: Mapping[str, Any],
    metrics: Mapping[str, Any],
    **own: Any,
) -> dict[str, Any]:
    """Return the content of ``model.json``: how to rebuild a model, and what is known about it.

    Parameters
    ----------
    arguments : Mapping[str, Any]
        Arguments of the call that rebuilds the architecture.
    metrics : Mapping[str, Any]
        Metrics, with the names of the history.
    own
        Facts known only to its owner: ``client``, ``rounds``, ``num_examples``, ``num_validation``;
        ``shared`` is true for a run's global model.
    """
    from fedmutual.models.learnt import picture_of  # torch

    picture = picture_of(settings)
    chosen = pretrained_settings(settings.model)
    return {
        "target": settings.model.target,
        "arguments": dict(arguments),
        "classes": list(data.classes),
        "image_size": picture.size,
        "interpolation": picture.interpolation,
        **({} if picture.window is None else {"window": list(picture.window)}),
        **({} if chosen is None else {"backbone": find_backbone(chosen).described}),
        "strategy": settings.strategy.name,
        "seed": settings.seed,
        "num_public": len(data.public),
        "num_unseen": None if data.unseen is None else len(data.unseen),
        "public_digest": data.public.digest,
        "metrics": dict(metrics),
        "settings": {
            key: value
            for key, value in flat(without_paths(as_container(settings))).items()
            if key.partition(".")[0] in SETTINGS
        },
        "versions": {"python": platform.python_version(), **installed_versions()},
        **own,
    }


def card_page(card: Mapping[str, Any]) -> str:
    """Return the card as Markdown with the front matter of model hubs.

    Parameters
    ----------
    card : Mapping[str, Any]
        Content of ``model.json``; missing parts are left out.
    """
    architecture = card["target"].rpartition(".")[2]
    classes = ", ".join(f"`{name}`" for name in card["classes"])
    settings = card.get("settings", {})
    size = card["image_size"]
    picture = picture_of_card(card)
    shared = card.get("shared", False)
    origin = "the server of a federation" if shared else "one site"
    rounds = f"{card['rounds']} round{'' if card['rounds'] == 1 else 's'}"
    sections = [
        _FRONT,
        f"# {architecture}{', the' if shared else ' of'} {_plain(card['client'])}",
        f"An image classifier that {origin} trained with [fedmutual]({_PROJECT}), strategy "
        f"`{card['strategy']}`, {rounds}, seed {card['seed']}.",
        "## Use",
        "```bash\nfedmutual predict --model . photo.jpg\nfedmutual export --model . --format onnx\n```",
        f"* Classes: {classes}\n* Input: {preprocessing(picture)}\n* Output: {_output(card)}\n"
        f"* An exported program includes the scaling and the softmax: uint8 [N, 3, {size}, {size}] in, "
        "probabilities [N, classes] out.\n"
        f"* Rebuilt from `model.json` (`{card['target']}`) and `model.safetensors`; nothing is unpickled.",
        *(
            ["## Backbone", _table(("backbone", "value"), card["backbone"].items())]
            if "backbone" in card
            else []
        ),
        *([_privacy(card["privacy"])] if "privacy" in card else []),
        "## Data",
        _table(("images", "number"), _sizes(card)),
        "## Metrics",
        _table(("at the end of the run", "value"), _metrics(card)),
        *(["## Settings", _table(("setting", "value"), settings.items())] if settings else []),
        "## Versions",
        _table(("package", "version"), card["versions"].items()),
        "## Limits",
        "The model knows only the classes above: every picture gets one of them. It was evaluated only on "
        "the images named here. A trained model can reveal information about its training images: share it "
        "as carefully as you would share statistics about them.",
    ]
    return "\n\n".join(sections) + "\n"


def _privacy(told: Mapping[str, Any]) -> str:
    return _PRIVACY.format(**told) + (_NOISY if told.get("noisy_model") else _LISTENER)


_PROJECT = "https://arxiv.org/abs/2503.05803"
_FRONT = """---
library_name: fedmutual
pipeline_tag: image-classification
tags:
- federated-learning
- mutual-learning
- pytorch
---"""


def _output(card: Mapping[str, Any]) -> str:
    if len(card["classes"]) == 2 and card["arguments"].get("num_classes") == 1:
        return f"[N, 1], the log-odds of `{card['classes'][1]}`"
    return f"[N, {len(card['classes'])}] logits, in the order of the classes"


def _sizes(card: Mapping[str, Any]) -> list[tuple[str, str]]:
    names = {
        "num_examples": "private, used for training in the last round",
        "num_validation": "private, held out for validation",
        "num_public": "public, shared by all sites",
        "num_unseen": "unseen, used for evaluation only",
    }
    return [(text, f"{card[key]:,}") for key, text in names.items() if card.get(key) is not None]


def _metrics(card: Mapping[str, Any]) -> list[tuple[str, str]]:
    metrics = card["metrics"]
    rows = [(text, f"{metrics[key]:.4f}") for key, text in _MEASURES.items() if metrics.get(key) is not None]
    for split in ("validation", "unseen"):
        for name, value in zip(card["classes"], metrics.get(f"{split}_recall") or [], strict=False):
            if value is not None and value >= 0:
                rows.append((f"recall of {name}, {split}", f"{value:.4f}"))
    return rows


def _table(head: tuple[str, str], rows: Any) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    return "\n".join([*lines, *(f"| {_plain(name)} | {_plain(value)} |" for name, value in rows)])


def _plain(value: object) -> str:
    """Return a value with Markdown table characters escaped."""
    return str(value).replace("|", "\\|").replace("\n", " ")
