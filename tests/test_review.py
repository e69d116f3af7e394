"""Copies across parts of the data, and what does not fit the network."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from local_grid import play
from numpy.typing import NDArray
from PIL import Image

from fedmutual.data.cache import cache_folder
from fedmutual.data.copies import Copies, Part, _signatures, find_copies
from fedmutual.data.images import ImageSet
from fedmutual.data.review import review_run, review_site
from fedmutual.data.site import load_site
from fedmutual.settings import Settings
from fedmutual.settings.compose import compose


def _photograph(seed: int, side: int = 160) -> Image.Image:
    """A smooth picture: random colours at 5 x 5 points."""
    points = np.random.default_rng(seed).integers(0, 256, (5, 5, 3)).astype(np.uint8)
    return Image.fromarray(points).resize((side, side), Image.Resampling.BICUBIC)


def _set(pictures: list[Image.Image], size: int = 32) -> ImageSet:
    pixels = np.stack(
        [np.asarray(p.convert("RGB").resize((size, size), reducing_gap=None)) for p in pictures]
    )
    labels = np.zeros(len(pictures), np.int64)
    return ImageSet(pixels, labels, None, tuple(f"{i}.png" for i in range(len(pictures))))


def _jpeg(picture: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return Image.open(file)


@pytest.mark.parametrize("size", [8, 13, 32, 100])
def test_signatures_are_means_of_blocks(size: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, size, size, 3)).astype(np.uint8)
    edges = np.linspace(0, size, 9).astype(int)
    block = pixels[1, edges[2] : edges[3], edges[7] : edges[8]].reshape(-1, 3).mean(axis=0)
    assert np.allclose(_signatures(pixels)[1, 2, 7], block, atol=1e-3)


def test_exact_and_near_copies_are_found_and_others_are_not() -> None:
    train = [_photograph(seed) for seed in range(200)]
    thumbnail = train[3].resize((48, 48), Image.Resampling.LANCZOS)
    others = [_photograph(seed) for seed in range(1000, 1200)]
    test = [*others[:5], train[7], thumbnail, _jpeg(train[9], 60), *others[5:]]
    found = find_copies([Part.of("training images", _set(train)), Part.of("test images", _set(test))])
    assert found == [Copies("test images", "training images", 1, 2, ("3.png", "6.png"))]


def test_copies_within_the_first_part_and_images_without_contrast() -> None:
    blank = [Image.new("RGB", (32, 32), (200 + i, 200, 200)) for i in range(3)]
    train = [_photograph(0), *blank, _photograph(1), _photograph(0, 80)]
    found = find_copies([Part.of("a", _set(train)), Part.of("b", _set([blank[0], _photograph(2)]))])
    assert found == [Copies("a", "a", 0, 1, ("0.png", "5.png")), Copies("b", "a", 1, 0, ("1.png", "0.png"))]


def _write(root: Path, count: int = 12, mode: str = "RGB", side: int = 160, first: int = 0) -> None:
    for name in ("a", "b"):
        (root / "train" / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            seed = first + 100 * ord(name) + i
            _photograph(seed, side).convert(mode).save(root / f"train/{name}/{i}.png")
    (root / "public").mkdir(exist_ok=True)
    for i in range(4):
        _photograph(10**6 + i, side).convert(mode).save(root / f"public/{i}.png")


def _settings(tmp_path: Path, *more: str) -> Settings:
    own = [f"data.root={tmp_path / 'in'}", f"cache_dir={tmp_path / 'cache'}"]
    return compose(["data=folder", *own, *more])


def _remarks(settings: Settings) -> list[str]:
    return review_site(load_site(settings, None), settings, 64)


def test_ordinary_photographs_need_no_remark(tmp_path: Path) -> None:
    _write(tmp_path / "in")
    assert _remarks(_settings(tmp_path)) == []
    assert review_run(_settings(tmp_path), 2, 64) == []


@pytest.mark.parametrize(
    ("written", "more", "said"),
    [
        ({"count": 5}, [], "fewer than 10 images of a (5), b (5)"),
        ({"side": 900}, [], "about 900 x 900 pixels and are reduced to 64 x 64: small details"),
        ({"side": 20}, [], "about 20 x 20 pixels and are enlarged to 64 x 64: data.image_size=32"),
    ],
)
def test_what_does_not_fit_is_said_with_its_setting(
    written: dict[str, Any], more: list[str], said: str, tmp_path: Path
) -> None:
    _write(tmp_path / "in", **written)
    (remark,) = _remarks(_settings(tmp_path, *more))
    assert said in remark
    assert review_run(_settings(tmp_path, *more), 2, 64) == [remark]


def test_a_set_that_uses_little_of_its_range_is_told_the_window(tmp_path: Path) -> None:
    _write(tmp_path / "in")

    def dim(values: NDArray[np.uint8]) -> NDArray[np.uint16]:
        return (values.astype(np.uint16) * 16)[..., 0]

    for path in (tmp_path / "in").rglob("*.png"):
        Image.fromarray(dim(np.asarray(Image.open(path)))).save(path)
    (remark,) = _remarks(_settings(tmp_path))
    assert "of 256 levels (0 to 1" in remark
    assert "set data.window=[0,4095]" in remark
    assert _remarks(_settings(tmp_path, "data.window=[0,4095]")) == []


def test_grey_that_tells_the_class_and_grey_for_a_backbone(tmp_path: Path) -> None:
    _write(tmp_path / "in")
    for path in (tmp_path / "in/train/a").glob("*.png"):
        Image.open(path).convert("L").save(path)
    (remark,) = _remarks(_settings(tmp_path))
    assert remark.startswith("100% of the images of a are grey, and 0% of b")


def test_a_thumbnail_of_a_training_image_in_the_test_folder_is_named(tmp_path: Path) -> None:
    _write(tmp_path / "in")
    (tmp_path / "in/test/a").mkdir(parents=True)
    with Image.open(tmp_path / "in/train/a/3.png") as picture:
        picture.resize((64, 64), Image.Resampling.LANCZOS).save(tmp_path / "in/test/a/thumb.jpg", quality=90)
    settings = _settings(tmp_path)
    (remark,) = review_run(settings, 2, 64)
    assert remark.startswith("1 of the test images are copies of private images (0 with the same pixels, 1 ")
    assert "such as a/thumb.jpg of a/3.png" in remark
    assert "test images" in _remarks(settings)[0]
    assert cache_folder(settings.cache_dir) == tmp_path / "cache"


def test_a_summary_has_the_digests_and_the_remarks(tmp_path: Path) -> None:
    _write(tmp_path / "in", side=20)
    own = ["data=folder", f"data.root={tmp_path / 'in'}", f"cache_dir={tmp_path / 'cache'}", "rounds=1"]
    run = play(tmp_path / "run", *own, "data.image_size=64", clients=2)
    assert run.error is None
    digests = {client["private_digest"] for client in run.summary["clients"].values()}
    assert len(digests) == 2
    assert all(len(digest) == 32 for digest in digests)
    assert run.summary["warnings"][0].startswith("the images have about 20 x 20 pixels")
