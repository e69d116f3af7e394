"""benchmarks/make_digits.py: the ten classes that ship with scikit-learn, as a folder to learn from."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedmutual.data.partition import split
from fedmutual.settings.compose import compose

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "make_digits.py"


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    folder = tmp_path_factory.mktemp("digits")
    subprocess.run([sys.executable, str(SCRIPT), str(folder)], check=True)
    return folder


def test_every_digit_is_in_one_part_only(digits: Path) -> None:
    numbers = [file.stem for file in digits.rglob("*.png")]
    assert len(numbers) == len(set(numbers)) == 1797


def test_the_folder_is_data_to_learn_from(digits: Path, tmp_path: Path) -> None:
    overrides = ["data=folder", f"data.root={digits}", "data.image_size=8"]
    data = compose(overrides).data.load(tmp_path)
    assert data.classes == tuple("0123456789")
    assert data.public is not None
    assert data.unseen is not None
    assert (len(data.pool), len(data.public), len(data.unseen)) == (998, 400, 399)
    shares = np.bincount(data.unseen.labels) / len(data.unseen)
    assert shares == pytest.approx(np.full(10, 0.1), abs=0.005)  # stratified


def test_each_of_five_clients_has_one_camera(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    root = tmp_path / "cameras"
    subprocess.run([sys.executable, str(SCRIPT), str(root), "--cameras"], check=True)
    overrides = ["data=folder", f"data.root={root}", "data.image_size=8", "partition=natural"]
    settings = compose(overrides)
    pool = settings.data.load(tmp_path).pool
    parts = split(pool, settings.partition, 5, 0, tmp_path)
    cameras = [{pool.groups[i] for i in part} for part in parts]
    assert sorted(map(len, cameras)) == [1] * 5
    assert len(set.union(*cameras)) == 5
    for part in parts:
        shares = np.bincount(pool.labels[part], minlength=10) / len(part)
        assert shares == pytest.approx(np.full(10, 0.1), abs=0.05)
