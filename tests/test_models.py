"""VisionNet as the paper has it, and any other model by its dotted path."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedmutual.models.build import build_model
from fedmutual.models.visionnet import VisionNet
from fedmutual.settings import ModelSettings

VISIONNET = "fedmutual.models.visionnet.VisionNet"


def model_settings(target: str = VISIONNET, **arguments: Any) -> ModelSettings:
    return ModelSettings(target=target, arguments=arguments, per_client=[])


def no_model(num_classes: int) -> str:
    """A factory that is no model's, for the test below."""
    return f"{num_classes} classes"


@pytest.mark.parametrize(("name", "size", "smallest"), [("squeezenet1_1", 16, 17), ("alexnet", 20, 63)])
def test_pictures_that_a_network_cannot_take_are_refused_with_the_size_that_it_takes(
    name: str, size: int, smallest: int
) -> None:
    target = f"torchvision.models.{name}"
    with pytest.raises(ValueError, match=f"{target} cannot take pictures of {size}x{size} pixels") as error:
        build_model(model_settings(target), 2, size, seed=0)
    assert f"set data.image_size={smallest} or larger" in str(error.value)
    with pytest.raises(ValueError, match=f"cannot take pictures of {smallest - 1}x"):
        build_model(model_settings(target), 2, smallest - 1, seed=0)
    model, _ = build_model(model_settings(target), 2, smallest, seed=0)
    assert model.training


def test_visionnet_is_the_papers() -> None:
    model = VisionNet()
    assert sum(p.numel() for p in model.parameters()) == 1_862_785
    layers = [type(m).__name__ for m in model.modules() if not list(m.children())]
    assert layers == [
        "Conv2d", "MaxPool2d", "ReLU", "Conv2d", "MaxPool2d", "ReLU", "Conv2d", "ReLU",
        "Flatten", "Dropout", "Linear", "ReLU", "Dropout", "Linear",
    ]  # fmt: skip
    dense = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in dense] == [(28_224, 64), (64, 1)]
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.2, 0.2]


def test_resnet8_is_small_and_takes_any_size() -> None:
    model, _ = build_model(model_settings("fedmutual.models.resnet8.ResNet8"), 10, 32, seed=0)
    assert sum(p.numel() for p in model.parameters()) == 78_042
    assert model(torch.rand(2, 3, 32, 32)).shape == model(torch.rand(2, 3, 21, 40)).shape == (2, 10)
    weighted = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    shortcuts = [m for m in weighted if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)]
    assert len(weighted) - len(shortcuts) == 8


def test_pooling_before_the_activation_changes_no_bit() -> None:
    torch.manual_seed(0)
    model = VisionNet(image_size=30)
    first, pool, relu, second, pool2, relu2, *rest = model.features
    papers = nn.Sequential(first, relu, pool, second, relu2, pool2, *rest)
    images = torch.rand(4, 3, 30, 30)
    found = []
    for features in (model.features, papers):
        model.zero_grad()
        features(images).square().sum().backward()
        found.append(
            [features(images), *(p.grad.clone() for p in features.parameters() if p.grad is not None)]
        )
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_visionnet_starts_as_keras_does() -> None:
    torch.manual_seed(0)
    for layer in VisionNet(image_size=40).modules():
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            continue
        assert layer.bias is not None
        assert not layer.bias.any()
        receptive = layer.weight[0, 0].numel()  # Glorot uniform: sqrt(6 / (fan in + fan out))
        bound = math.sqrt(6 / (receptive * (layer.weight.shape[0] + layer.weight.shape[1])))
        assert layer.weight.abs().max() <= bound
        assert layer.weight.abs().max() > 0.9 * bound
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15)


@pytest.mark.parametrize("size", [18, 19, 40, 41, 64, 100])
def test_visionnet_takes_every_size_from_18(size: int) -> None:
    images = torch.rand(2, 3, size, size)
    assert VisionNet(num_classes=5, image_size=size)(images).shape == (2, 5)


def test_visionnet_refuses_too_small_images() -> None:
    with pytest.raises(ValueError, match="at least 18x18 pixels, not 17x17"):
        VisionNet(image_size=17)


def test_build_is_seeded_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    first, _ = build_model(model_settings(), 2, 24, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    again, _ = build_model(model_settings(), 2, 24, seed=1)
    other, _ = build_model(model_settings(), 2, 24, seed=2)
    torch.testing.assert_close(first.state_dict(), again.state_dict(), rtol=0, atol=0)
    assert not torch.equal(
        first.state_dict()["classifier.2.weight"], other.state_dict()["classifier.2.weight"]
    )


@pytest.mark.parametrize(("classes", "outputs"), [(2, 1), (3, 3), (10, 10)])
def test_two_classes_get_one_output(classes: int, outputs: int) -> None:
    model, arguments = build_model(model_settings(dropout=0.5), classes, 24, seed=0)
    assert arguments == {"num_classes": outputs, "image_size": 24, "dropout": 0.5}
    assert model(torch.rand(1, 3, 24, 24)).shape == (1, outputs)


def test_the_arguments_rebuild_the_model() -> None:
    model, arguments = build_model(model_settings(), 2, 24, seed=0)
    VisionNet(**arguments).load_state_dict(model.state_dict())


def test_a_torchvision_model_by_its_path() -> None:
    model, arguments = build_model(model_settings("torchvision.models.squeezenet1_1"), 3, 64, seed=0)
    assert arguments == {"num_classes": 3}  # it takes no image_size
    assert model.eval()(torch.rand(1, 3, 64, 64)).shape == (1, 3)


@pytest.mark.parametrize(
    ("settings", "image_size", "message"),
    [
        (model_settings("nosuch_package.Net"), 24, "model._target_: cannot import nosuch_package.Net"),
        (model_settings("torchvision.models.resnet17"), 24, "model._target_: cannot import .*resnet17"),
        (model_settings(depth=3), 24, "model: .*VisionNet.*unexpected keyword argument 'depth'"),
        (model_settings(), 16, "model: .*VisionNet.*at least 18x18"),
        (model_settings("test_models.no_model"), 24, "model._target_: test_models.no_model does not create"),
    ],
)
def test_a_model_that_cannot_be_built_names_its_setting(
    settings: ModelSettings, image_size: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(settings, 2, image_size, seed=0)


def test_one_output_only_for_models_made_for_it() -> None:
    # SqueezeNet ends in a ReLU: with a single output, the log-odds, it could never predict class 0
    settings = ModelSettings(target="torchvision.models.squeezenet1_1", arguments={}, per_client=[])
    model, arguments = build_model(settings, num_classes=2, image_size=40, seed=0)
    assert arguments["num_classes"] == 2
    assert model(torch.zeros((1, 3, 40, 40))).shape == (1, 2)


class _Planted:
    """What a pickle from elsewhere can do when it is read: anything."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("ran"),)


class FromFile(nn.Module):
    """A model that reads its weights as torchvision does, without ``weights_only``."""

    def __init__(self, num_classes: int, file: str) -> None:
        super().__init__()
        self.head = nn.Linear(2, num_classes)
        self.head.load_state_dict(torch.load(file, weights_only=False))


def test_pretrained_weights_are_read_as_tensors_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    good = {"weight": torch.ones(3, 2), "bias": torch.ones(3)}
    torch.save(good, tmp_path / "good.pt")
    torch.save({**good, "bias": _Planted()}, tmp_path / "bad.pt")
    target = f"{__name__}.FromFile"
    model, _ = build_model(model_settings(target, file="good.pt"), 3, 20, 0)
    assert torch.equal(model.state_dict()["head.bias"], good["bias"])
    with pytest.raises(ValueError, match="FromFile"):
        build_model(model_settings(target, file="bad.pt"), 3, 20, 0)
    assert not (tmp_path / "ran").exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ  # the caller's own torch.load is as before
