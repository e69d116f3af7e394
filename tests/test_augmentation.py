"""Augmentation of training images: seeded, of private images only, and no code of a run's at a site."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from local_grid import play
from torch import Tensor, nn

from fedmutual.client.transforms import transform_of
from fedmutual.learning.augmentation import Augmentation
from fedmutual.learning.training import Private, Public, Trainer
from fedmutual.settings import AugmentSettings, SettingsError
from fedmutual.settings.at_site import site_settings
from fedmutual.settings.compose import compose

JITTER = "augment.transforms=[{_target_: torchvision.transforms.v2.ColorJitter, brightness: 0.5}]"


def _images(count: int = 6, size: int = 16) -> Tensor:
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=random)
    return images.contiguous(memory_format=torch.channels_last)


def _augmentation(name: str, seed: int = 7, **more: Any) -> Augmentation:
    return Augmentation(transform_of(AugmentSettings(name=name, **{"transforms": [], **more}), 16), seed)


@pytest.mark.parametrize("name", ["flip_crop", "randaugment"])
def test_batches_are_seeded_and_nothing_else_is_disturbed(name: str) -> None:
    images, before = _images(), torch.random.get_rng_state()
    once, again = (_augmentation(name)(images, 3) for _ in range(2))
    assert torch.equal(once, again)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (once.shape, once.dtype) == (images.shape, torch.uint8)
    assert not torch.equal(once, images)
    assert not torch.equal(once, _augmentation(name)(images, 4))
    assert not torch.equal(once, _augmentation(name, seed=8)(images, 3))
    assert len({row.numpy().tobytes() for row in _augmentation(name)(images[:1].repeat(6, 1, 1, 1), 0)}) > 1


def test_transforms_of_ones_own_and_what_they_must_keep() -> None:
    flip = [{"_target_": "torchvision.transforms.v2.RandomHorizontalFlip", "p": 1.0}]
    assert torch.equal(_augmentation("custom", transforms=flip)(_images(), 0), _images().flip(3))
    smaller = [{"_target_": "torchvision.transforms.v2.CenterCrop", "size": 8}]
    with pytest.raises(
        ValueError, match=r"torch\.uint8 \[3, 8, 8\] after them, not torch\.uint8 \[3, 16, 16\]"
    ):
        _augmentation("custom", transforms=smaller)(_images(), 0)
    with pytest.raises(ValueError, match=r"augment\.transforms: .*NoSuch.* cannot be made"):
        _augmentation("custom", transforms=[{"_target_": "torchvision.transforms.v2.NoSuch"}])


class _Seen(nn.Module):
    """Keeps the means of the images that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(images.mean(dim=(1, 2, 3)))
        return self.weight.expand(len(images), 2)


def test_private_images_are_changed_and_public_ones_are_not() -> None:
    model = _Seen()
    white, black = (
        torch.full((4, 3, 8, 8), 255, dtype=torch.uint8),
        torch.zeros((4, 3, 8, 8), dtype=torch.uint8),
    )
    numbers: list[int] = []

    def halve(images: Tensor, batch: int) -> Tensor:
        numbers.append(batch)
        return images // 2 + 30

    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    trainer = Trainer(model, optimizer, "fp32", 2, torch.Generator(), augment=halve)
    private = Private(white, torch.tensor([0, 1, 0, 1]))
    public = Public(black, torch.full((4, 2), 0.5).log(), None, None, "own_peer", 1.0, 1.0)
    trainer.train(3, private, public)
    for seen in model.seen:
        torch.testing.assert_close(seen, torch.tensor([157 / 255, 157 / 255, 0, 0]))
    assert len(set(numbers)) == 3


def test_a_run_with_augmentation_is_reproducible_and_another_one(tmp_path: Path) -> None:
    def losses(name: str, *overrides: str) -> list[float]:
        run = play(tmp_path / name, "rounds=1", *overrides, clients=2)
        assert run.error is None
        return [line["train_loss"] for line in run.history if "train_loss" in line]

    plain, first, second = losses("a"), losses("b", "augment=flip_crop"), losses("c", "augment=flip_crop")
    assert first == second
    assert first != plain
    assert losses("d", "strategy=fedavg", "augment=custom", JITTER) != losses("e", "strategy=fedavg")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["augment=custom", "augment.transforms=[]"], r"augment\.transforms: \[\], but augment=custom"),
        ([JITTER], r"but augment=none: set augment=custom"),
        (["augment=custom", "augment.transforms=[flip]"], r"'flip' names no class"),
        (
            ["augment=flip_crop", "model=pretrained"],
            r"augment: flip_crop changes pictures .*model\.tune=head",
        ),
    ],
)
def test_what_does_not_go_together(overrides: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        compose(overrides)


@pytest.mark.parametrize(
    "transforms",
    [
        "[{_target_: os.system, command: ls}]",
        "[{_target_: torchvision.transforms.v2.functional.to_image}]",
        "[{_target_: torchvision.transforms.v2.Lambda, lambd: {_target_: builtins.exec}}]",
        "[{_target_: torchvision.transforms.v2.Compose, transforms: [{_target_: os.abort}]}]",
    ],
)
def test_a_run_names_no_code_for_a_site_in_its_transforms(transforms: str) -> None:
    text = f"data=faces augment=custom 'augment.transforms={transforms}'"
    with pytest.raises(SettingsError, match=r"augment\.transforms: .* is not allowed at this site"):
        site_settings({"overrides": text}, {"client-name": "ward"})
    allowed = site_settings({"overrides": f"augment=custom '{JITTER}'"}, {"client-name": "ward"})
    assert allowed.augment.transforms[0]["brightness"] == 0.5
    own = {"client-name": "ward", "allowed-classes": "mypkg.Noise"}
    noise = "augment=custom 'augment.transforms=[{_target_: mypkg.Noise}]'"
    assert site_settings({"overrides": noise}, own).augment.name == "custom"
