"""The model card: what is known of a client's model, as a page that people and model hubs read."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fedmutual.settings import Settings, as_container
from fedmutual.settings.described import flat, installed_versions, without_paths

if TYPE_CHECKING:
    from fedmutual.data.site import SharedData, SiteData

# What of the run's settings a model card tells: all that shaped the model, nothing about the machine.
SETTINGS = (
    "strategy",
    "train",
    "optimizer",
    "public",
    "partition",
    "data",
    "precision",
    "deterministic",
)
PREPROCESSING = (
    "RGB, turned as EXIF says, transparency over white, resized to {size}x{size} pixels (bilinear, "
    "antialiased, whatever the shape), uint8 divided by 255: float [N, 3, {size}, {size}] in [0, 1]"
)
_MEASURES = {
    "validation_accuracy": "accuracy, own validation images",
    "validation_loss": "loss, own validation images (nats)",
    "validation_auroc": "AUROC, own validation images",
    "unseen_accuracy": "accuracy, shared unseen set",
    "unseen_auroc": "AUROC, shared unseen set",
    "kl_after": "KL to the peers on the public samples (nats)",
}


def preprocessing(image_size: int) -> str:
    """How a picture becomes an input, in one sentence."""
    return PREPROCESSING.format(size=image_size)


def model_card(
    settings: Settings,
    data: SiteData | SharedData,
    arguments: Mapping[str, Any],
    metrics: Mapping[str, Any],
    **own: Any,
) -> dict[str, Any]:
    """What rebuilds a model, and what is known of it: the content of ``model.json``.

    Parameters
    ----------
    arguments : Mapping[str, Any]
        Of the call that rebuilds the architecture.
    metrics : Mapping[str, Any]
        Measurements under the names of the history.
    own
        What only its owner knows: ``client``, ``rounds``, ``num_examples``, ``num_validation``; ``shared``
        is true for the global model of a run.
    """
    return {
        "target": settings.model.target,
        "arguments": dict(arguments),
        "classes": list(data.classes),
        "image_size": settings.data.image_size,
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
        What ``model.json`` holds; parts that it lacks are left out.
    """
    architecture = card["target"].rpartition(".")[2]
    classes = ", ".join(f"`{name}`" for name in card["classes"])
    settings = card.get("settings", {})
    size = card["image_size"]
    shared = card.get("shared", False)
    origin = "the server of a federation" if shared else "one site"
    sections = [
        _FRONT,
        f"# {architecture}{', the' if shared else ' of'} {_plain(card['client'])}",
        f"An image classifier that {origin} trained with [fedmutual]({_PROJECT}), strategy "
        f"`{card['strategy']}`, {card['rounds']} rounds, seed {card['seed']}.",
        "## Use",
        "```bash\nfedmutual predict --model . photo.jpg\nfedmutual export --model . --format onnx\n```",
        f"* Classes: {classes}\n* Input: {preprocessing(size)}\n* Output: {_output(card)}\n"
        f"* An exported program has the scaling and the softmax in it: uint8 [N, 3, {size}, {size}] in, "
        "probabilities [N, classes] out.\n"
        f"* Rebuilt from `model.json` (`{card['target']}`) and `model.safetensors`; nothing is unpickled.",
        "## Data",
        _table(("images", "number"), _sizes(card)),
        "## Metrics",
        _table(("at the end of the run", "value"), _metrics(card)),
        *(["## Settings", _table(("setting", "value"), settings.items())] if settings else []),
        "## Versions",
        _table(("package", "version"), card["versions"].items()),
        "## Limits",
        "The model knows the classes above and nothing else: any picture gets one of them. It was measured "
        "on the images named here only. A trained model can tell something about the images that it has "
        "learnt from: pass it on as you would pass on figures about them.",
    ]
    return "\n\n".join(sections) + "\n"


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
        "num_examples": "private, trained on in the last round",
        "num_validation": "private, held out to validate",
        "num_public": "public, shared by all sites",
        "num_unseen": "unseen, only evaluated on",
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
    """A value that cannot leave its cell."""
    return str(value).replace("|", "\\|").replace("\n", " ")
