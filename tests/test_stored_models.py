"""Model folders: a card that people can read, and loading that calls and unpickles nothing foreign."""

from __future__ import annotations

import json
import pickle
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedmutual.client.state import StateFolder
from fedmutual.models.build import build_model
from fedmutual.models.card import card_page
from fedmutual.models.stored import StoredModelError, find_models, load_model, load_models
from fedmutual.settings.compose import compose


def card(**changes: Any) -> dict[str, Any]:
    return {
        "target": "fedmutual.models.visionnet.VisionNet",
        "arguments": {"num_classes": 1, "image_size": 20, "dropout": 0.2},
        "classes": ["mask", "no_mask"],
        "image_size": 20,
        "client": "clinic-a",
        "rounds": 3,
        "strategy": "mutual",
        "seed": 7,
        "num_examples": 1234,
        "num_validation": 12,
        "num_public": 24,
        "num_unseen": None,
        "metrics": {"validation_accuracy": 0.9, "kl_after": 0.0123, "validation_recall": [0.8, -1.0]},
        "settings": {"train.batch_size": 16},
        "versions": {"fedmutual": "0.1.0", "torch": "2.9"},
        **changes,
    }


def model_folder(path: Path, model: str = "visionnet", seed: int = 0, **changes: Any) -> Path:
    """A model as a client leaves it after its last round."""
    settings = compose([f"model={model}"]).model
    made, arguments = build_model(settings, 2, 20, seed)
    described = card(target=settings.target, arguments=arguments, client=path.name, **changes)
    return StateFolder(path.parent, "run", path.name).export_model(made.state_dict(), described)


class Boom:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("unpickled"),))


class Keyword(nn.Module):
    """A model with an argument that torchvision's functions would take for pretrained weights."""

    def __init__(self, weights: int) -> None:
        super().__init__()
        self.layer = nn.Linear(weights, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.layer(images.mean((2, 3)))
        return logits


def no_module() -> str:
    return "called"


@pytest.mark.parametrize("model", ["visionnet", "mnasnet0_5"])
def test_what_was_exported_is_what_is_loaded(tmp_path: Path, model: str) -> None:
    folder = model_folder(tmp_path / "clinic-a", model, seed=3)
    original, _ = build_model(compose([f"model={model}"]).model, 2, 20, 3)
    stored = load_model(folder)
    assert (stored.name, stored.classes, stored.picture.size) == ("clinic-a", ("mask", "no_mask"), 20)
    assert not stored.model.training
    weights = stored.model.state_dict()
    assert weights.keys() == original.state_dict().keys()
    assert all(torch.equal(weights[key], value) for key, value in original.state_dict().items())


def test_a_runs_folder_stands_for_all_its_models(tmp_path: Path) -> None:
    first, second = model_folder(tmp_path / "a"), model_folder(tmp_path / "b")
    assert find_models(tmp_path) == sorted([first, second])
    assert find_models(first) == [first]
    with pytest.raises(StoredModelError, match=r"has no model\.json"):
        find_models(tmp_path / "a" / "nothing")


def test_a_global_model_is_asked_where_it_is_named_or_alone(tmp_path: Path) -> None:
    shared, client = model_folder(tmp_path / "run" / "global_model"), tmp_path / "run" / "clients" / "a"
    assert find_models(tmp_path / "run") == [shared]  # its clients' models are at their sites
    owned = model_folder(client)
    assert find_models(tmp_path / "run") == [owned]
    assert find_models(shared) == [shared]


def test_a_pickle_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = model_folder(tmp_path / "clinic-a")
    for content in (pickle.dumps(Boom()), b"", b"\x10\0\0\0\0\0\0\0not a header"):
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(StoredModelError, match=r"model\.safetensors is damaged"):
            load_model(folder)
    torch.save({"a": Boom()}, folder / "model.safetensors")
    with pytest.raises(StoredModelError, match="damaged"):
        load_model(folder)
    assert not (tmp_path / "unpickled").exists()
    pickle.loads(pickle.dumps(Boom()))  # the trap would have worked
    assert (tmp_path / "unpickled").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"target": "os.system", "arguments": {"command": "touch called"}},
            "neither a torch.nn.Module class",
        ),
        ({"target": "test_stored_models.no_module", "arguments": {}}, "neither a torch.nn.Module class"),
        (
            {"target": "torchvision.models.list_models", "arguments": {}},
            r"does not create a torch\.nn\.Module",
        ),
        ({"target": "fedmutual.models.nosuch.Net"}, "cannot import"),
        ({"arguments": {"nosuch": 1}}, "nosuch"),
        ({"arguments": {"num_classes": 5, "image_size": 20}}, "of another model"),
        ({"classes": "mask"}, "classes is missing or not of type list"),
        ({"image_size": None}, "image_size is missing or not of type int"),
        ({"image_size": 10**9}, "image_size 1000000000 is not in 1 to 4096"),
        ({"image_size": 5}, "the model takes no image of image_size 5"),
        ({"classes": ["mask", 3]}, "classes are not a list of names"),
        ({"classes": ["mask", "no_mask", "beard"]}, "names 3 classes, the model has 2 outputs"),
        ({"arguments": {"num_classes": 10**13, "image_size": 20}}, "VisionNet"),
    ],
)
def test_cards_that_ask_for_something_else_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = model_folder(tmp_path / "clinic-a")
    (folder / "model.json").write_text(json.dumps(card(**changes)))
    with pytest.raises(StoredModelError, match=message) as refusal:
        load_model(folder)
    assert str(folder) in str(refusal.value)
    assert not (tmp_path / "called").exists()


def test_pretrained_weights_are_not_fetched_for_torchvision_and_kept_for_others(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "a", "squeezenet1_1")
    known = json.loads((folder / "model.json").read_text())
    known["arguments"]["weights"] = "DEFAULT"  # would be a download
    (folder / "model.json").write_text(json.dumps(known))
    load_model(folder)
    mine = card(target=f"{__name__}.Keyword", arguments={"weights": 3})
    where = StateFolder(tmp_path, "run", "b").export_model(Keyword(3).state_dict(), mine)
    assert load_model(where).model.layer.in_features == 3  # type: ignore[union-attr]


def test_only_the_owner_can_read_a_model(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "a")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o600}


def test_an_ensemble_needs_the_same_classes(tmp_path: Path) -> None:
    first, second = model_folder(tmp_path / "a"), model_folder(tmp_path / "b", classes=["no_mask", "mask"])
    with pytest.raises(StoredModelError, match="an ensemble needs the same classes in the same order"):
        load_models([first, second])


def test_the_card_says_what_is_known(tmp_path: Path) -> None:
    text = (model_folder(tmp_path / "clinic-a") / "README.md").read_text()
    front, body = text.split("---\n")[1:]
    assert "pipeline_tag: image-classification" in front
    for part in (
        "# VisionNet of clinic-a",
        "3 rounds, seed 7",
        "resized to 20x20 pixels",
        "the log-odds of `no_mask`",
        "| private, used for training in the last round | 1,234 |",
        "| accuracy, own validation images | 0.9000 |",
        "| recall of mask, validation | 0.8000 |",
        "| train.batch_size | 16 |",
        "| torch | 2.9 |",
    ):
        assert part in body
    assert "recall of no_mask" not in body  # it does not occur
    assert "unseen, used" not in body


def test_a_name_cannot_break_the_table() -> None:
    page = card_page(card(settings={"data.name": "a | b\n| c"}))
    assert "| data.name | a \\| b \\| c |" in page
