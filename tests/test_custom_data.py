"""Data sets of one's own code."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import small_data
from local_grid import play
from small_data import TorchSet

from fedmutual.data.images import DataError
from fedmutual.settings import SettingsError
from fedmutual.settings.at_site import site_settings
from fedmutual.settings.compose import compose

CUSTOM = ["data=custom", "data._target_=small_data.torch_sets"]


def test_data_sets_of_a_function_are_read_with_its_arguments(tmp_path: Path) -> None:
    data = compose([*CUSTOM, "+data.train=20", "data.image_size=8"]).data.load(tmp_path)
    assert data.classes == ("dark", "bright")
    assert (len(data.pool), len(data.public), len(data.unseen)) == (20, 12, 10)
    assert data.pool.labels.tolist() == [0] * 10 + [1] * 10
    assert data.public.labels.tolist() == [-1] * 12
    assert np.array_equal(data.pool.images[4], np.full((8, 8, 3), 255 * 4 // 20, np.uint8))
    assert np.array_equal(data.pool.images[5], np.full((8, 8, 3), 255 * 5 // 20, np.uint8))


def test_images_are_cached_under_the_name_of_their_state_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    real = TorchSet.__getitem__

    def counted(self: TorchSet, position: int) -> Any:
        read.append(position)
        return real(self, position)

    monkeypatch.setattr(TorchSet, "__getitem__", counted)
    numbers = []
    for version in ("null", "null", "a", "a", "b"):
        read.clear()
        compose([*CUSTOM, "data.image_size=8", f"data.version={version}"]).data.load(tmp_path)
        numbers.append(len(read))
    assert numbers == [62, 62, 62, 0, 62]


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (
            {"train": [(np.zeros((4, 4)), 0)], "classes": ["a", "b"]},
            r"train\[0\]: .* float64 \[4, 4\], not uint8",
        ),
        ({"train": [(np.zeros((4, 4), np.uint8), 2)], "classes": ["a", "b"]}, r"train\[0\] has the label 2"),
        ({"train": [], "classes": ["a"]}, "names no two classes"),
        (SimpleNamespace(train=[]), "names no two classes"),
        (ValueError("no disk"), r"small_data\.torch_sets raised ValueError: no disk"),
    ],
)
def test_what_a_function_returns_is_checked(
    made: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def function() -> Any:
        if isinstance(made, Exception):
            raise made
        return made

    monkeypatch.setattr(small_data, "torch_sets", function)
    with pytest.raises(DataError, match=message):
        compose(CUSTOM).data.load(tmp_path)


def test_a_function_needs_a_name_and_a_site_its_owners_word() -> None:
    with pytest.raises(SettingsError, match="_target_"):
        compose(["data=custom"])
    with pytest.raises(SettingsError, match=r"data\._target_: no class 'small_data.nothing'"):
        compose(["data=custom", "data._target_=small_data.nothing"])
    run = {"overrides": " ".join(CUSTOM)}
    with pytest.raises(SettingsError, match=r"data\._target_: .* allowed-classes"):
        site_settings(run, {"client-name": "ward"})
    own = {"client-name": "ward", "allowed-classes": "small_data.torch_sets"}
    assert site_settings(run, own).data.target == "small_data.torch_sets"


def test_a_run_on_data_sets_of_ones_own(tmp_path: Path) -> None:
    run = play(tmp_path / "run", *CUSTOM, "data.image_size=24", "rounds=1", clients=2)
    assert run.error is None
    assert run.summary["unseen"]["num_examples"] == 10
