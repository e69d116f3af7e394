"""Private images that are also public: found, left out, told to the owner and to nobody else."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from small_data import Source, run_settings

import fedmutual.data.overlap as overlap
import fedmutual.data.site as site_module
from fedmutual.cli import main
from fedmutual.client.disclosure import OVERLAP_KEY, overlap_rule
from fedmutual.client.refusal import error_reason
from fedmutual.data.images import DataError, ImageSet
from fedmutual.data.overlap import overlapping
from fedmutual.data.partition import Iid
from fedmutual.data.site import SiteData, load_site, overlap_text
from fedmutual.settings import SettingsError
from fedmutual.settings.compose import compose
from fedmutual.settings.schema import OVERLAP

SIDE = 40
Change = Callable[[Image.Image], Image.Image]


def scenes(count: int, seed: int) -> np.ndarray:
    """Pictures with large and small detail, as photographs have, uint8 [n, 40, 40, 3]."""
    rng = np.random.default_rng(seed)
    layers = sum(
        rng.normal(0, 60 / size**0.5, (count, size, size, 3)).repeat(SIDE // size, 1).repeat(SIDE // size, 2)
        for size in (4, 8, 20)
    )
    return np.clip(128 + layers, 0, 255).astype(np.uint8)


def image_set(pixels: np.ndarray) -> ImageSet:
    names = tuple(f"image-{i}" for i in range(len(pixels)))
    return ImageSet(pixels, np.arange(len(pixels)) % 2, None, names)


def jpeg(quality: int) -> Change:
    def change(image: Image.Image) -> Image.Image:
        data = io.BytesIO()
        image.save(data, "JPEG", quality=quality)
        return Image.open(data)  # type: ignore[return-value]

    return change


COPIES: dict[str, Change] = {
    "the same": lambda image: image,
    "another JPEG": jpeg(40),
    "another size": lambda image: image.resize((28, 28)).resize((SIDE, SIDE), Image.Resampling.BICUBIC),
    "darker": lambda image: image.point(lambda value: value * 0.7),
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "grey": lambda image: image.convert("L").convert("RGB"),
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_are_found_and_others_are_not(how: str, tmp_path: Path) -> None:
    private = scenes(60, 1)
    copies = [np.asarray(COPIES[how](Image.fromarray(private[i]))) for i in (3, 17, 44)]
    public = np.concatenate([scenes(80, 2), np.stack(copies)])
    assert overlapping(image_set(private), image_set(public), tmp_path).tolist() == [3, 17, 44]


def test_images_of_one_colour_are_copies_only_if_they_are_equal(tmp_path: Path) -> None:
    plain = np.stack([np.full((SIDE, SIDE, 3), level, np.uint8) for level in (10, 120, 121, 240)])
    found = overlapping(image_set(plain[:2]), image_set(plain[1:]), tmp_path)
    assert found.tolist() == [1]


def test_where_all_images_are_alike_a_copy_must_be_far_nearer(tmp_path: Path) -> None:
    """As digits or radiographs: on their own, two of these correlate as copies of photographs do."""
    common, own = scenes(1, 7).astype(int), scenes(140, 8).astype(int) - 128
    pixels = np.clip(common + own // 5, 0, 255).astype(np.uint8)
    private, public = pixels[:60], np.concatenate([pixels[60:], pixels[[3, 17]] // 2])
    grey = np.stack([image @ overlap.LUMINANCE for image in private[:2]]).reshape(2, -1)
    assert np.corrcoef(grey)[0, 1] > overlap.NEAR_PIXELS
    assert overlapping(image_set(private), image_set(public), tmp_path).tolist() == [3, 17]


def test_the_result_is_kept_and_another_set_has_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private, public = image_set(scenes(9, 1)), image_set(scenes(9, 1)[4:])
    assert overlapping(private, public, tmp_path).tolist() == [4, 5, 6, 7, 8]
    with monkeypatch.context() as patch:
        patch.setattr(overlap, "near_pairs", lambda *_: pytest.fail("computed again"))
        assert overlapping(private, public, tmp_path).tolist() == [4, 5, 6, 7, 8]
    assert overlapping(private, image_set(scenes(9, 1)[5:]), tmp_path).tolist() == [5, 6, 7, 8]


@pytest.mark.slow
def test_photographs_of_two_sources_have_no_copies_and_made_ones_are_found(
    facemask_root: Path, tmp_path: Path
) -> None:
    """A part of what docs/privacy.md says of all of them."""
    settings = compose(["data=facemask", f"data.root={facemask_root}", f"cache_dir={tmp_path}"])
    data = settings.data.load(tmp_path)
    assert data.unseen is not None
    rng = np.random.default_rng(0)
    one, other = (
        np.asarray(images.images[np.sort(rng.choice(len(images), 800, replace=False))])
        for images in (data.pool, data.unseen)
    )
    assert not len(overlapping(image_set(one), image_set(other), tmp_path))
    change = jpeg(40)
    copies = np.stack([np.asarray(change(Image.fromarray(image))) for image in one[:100]])
    found = overlapping(image_set(one), image_set(copies), tmp_path)
    assert set(range(100)) <= set(found.tolist())


# ---------------------------------------------------------------------------------------------------
# A site


def settings_of(tmp_path: Path, rule: str, pool: np.ndarray, public: np.ndarray | None) -> Any:
    source = Source(image_set(pool), None if public is None else image_set(public))
    return run_settings(source, Iid(), tmp_path, privacy=SimpleNamespace(overlap=rule))


def site(tmp_path: Path, rule: str = "exclude", shared: int = 5, partition: Any = None) -> SiteData:
    pool = scenes(60, 1)
    public = np.concatenate([scenes(20, 2), pool[:shared]])
    return load_site(settings_of(tmp_path, rule, pool, public), partition)


def test_public_images_are_not_trained_on(tmp_path: Path) -> None:
    allowed, excluded = site(tmp_path, "allow"), site(tmp_path)
    assert not len(allowed.left_out)
    assert set(excluded.left_out.tolist()) == set(allowed.train_indices(1).tolist()) & set(range(5))
    assert len(excluded.left_out)
    assert np.array_equal(
        excluded.train_indices(1), np.setdiff1d(allowed.train_indices(1), excluded.left_out)
    )
    assert np.array_equal(excluded.validation_indices(1), allowed.validation_indices(1))
    text = overlap_text(excluded)
    assert text.startswith(f"{len(excluded.left_out)} private training images are also public")


def test_without_copies_nothing_changes(tmp_path: Path) -> None:
    plain, excluded = site(tmp_path, "allow", shared=0), site(tmp_path, shared=0)
    assert not len(excluded.left_out)
    assert np.array_equal(excluded.train_indices(1), plain.train_indices(1))


def test_clients_of_one_pool_with_a_public_set_of_its_own_leave_their_copies_out(tmp_path: Path) -> None:
    both = [site(tmp_path, partition=(i, 2)) for i in (0, 1)]
    assert 0 < sum(len(each.left_out) for each in both) <= 5


def test_a_public_set_from_the_pool_is_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is disjoint from the private images, so results of simulations are what they were."""
    monkeypatch.setattr(site_module, "overlapping", lambda *_: pytest.fail("looked for"))
    settings = settings_of(tmp_path, "exclude", scenes(60, 1), None)
    assert not len(load_site(settings, (0, 2)).left_out)


def test_refuse_and_nothing_left_are_errors_that_tell_the_server_no_number(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"refuse: \d of 54 private training images .* image-") as error:
        site(tmp_path, "refuse")
    assert error_reason(error.value, {}) == (
        "DataError: this site's images cannot be used as they are; its own log says more"
    )
    with pytest.raises(DataError, match="exclude: 54 of 54"):
        site(tmp_path, shared=60)
    assert not len(site(tmp_path, "refuse", shared=0).left_out)


@pytest.mark.parametrize("chosen", OVERLAP)
@pytest.mark.parametrize("owner", [None, *OVERLAP])
@pytest.mark.parametrize("trust", [True, False])
def test_the_stricter_word_holds(chosen: str, owner: str | None, trust: bool) -> None:
    node = {"trust-run": trust} | ({} if owner is None else {OVERLAP_KEY: owner})
    rule = overlap_rule(chosen, node)
    own = owner or ("allow" if trust else "exclude")
    assert OVERLAP.index(rule) == max(OVERLAP.index(chosen), OVERLAP.index(own))


def test_a_misspelt_word_is_refused() -> None:
    with pytest.raises(SettingsError, match="privacy-overlap"):
        overlap_rule("allow", {OVERLAP_KEY: "maybe"})
    with pytest.raises(SettingsError, match=r"privacy\.overlap"):
        compose(["privacy.overlap=maybe"])


def test_the_doctor_says_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i, pixels in enumerate(scenes(30, 1)):
        for part in [f"train/{'ab'[i % 2]}", *(["public"] if i < 4 else [])]:
            (tmp_path / part).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / part / f"{i}.png")
    node = f'client-name="here" data-dir="{tmp_path}" state-dir="{tmp_path}/s" cache-dir="{tmp_path}/c"'
    main(["doctor", "data=folder", "data.image_size=40", "device=cpu", "--node-config", node])
    shown = [line for line in capsys.readouterr().out.splitlines() if "overlap" in line]
    assert any(line.startswith("warning") and "are also public" in line for line in shown), shown


def test_the_default_leaves_them_out() -> None:
    assert compose().privacy.overlap == "exclude"
    assert replace(compose().privacy, overlap="allow").overlap == "allow"
