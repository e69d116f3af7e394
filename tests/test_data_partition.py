"""Partitions: every image at one client, whatever the process; METHOD.md section 3 for the stream."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from small_data import image_set

from fedmutual.data.images import DataError
from fedmutual.data.partition import (
    Dirichlet,
    Iid,
    Natural,
    Pathological,
    Size,
    Stream,
    split,
)
from fedmutual.data.stratify import hold_out, largest_remainder, stratified_folds, stratified_sample
from fedmutual.data.stream import stream_folds

ROOT = Path(__file__).resolve().parents[1]
LABELS = [0] * 60 + [1] * 40
quick = hypothesis_settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

PARTITIONS = [
    Iid(),
    Dirichlet(alpha=0.3, min_size=2),
    Pathological(classes_per_client=1),
    Size(weights=[]),
    Size(weights=[1.0, 1.0, 2.0, 4.0]),
    Natural(),
]


@pytest.mark.parametrize("partition", PARTITIONS, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("seed", [0, 7])
def test_every_image_is_at_exactly_one_client(partition: object, seed: int, tmp_path: Path) -> None:
    data = image_set(LABELS, groups=[f"id{i % 9}" for i in range(100)])
    parts = split(data, partition, 4, seed, tmp_path)
    assert len(parts) == 4
    assert all(len(part) > 0 and part.dtype == np.int64 for part in parts)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(100))
    again = split(data, partition, 4, seed, tmp_path / "other")
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))


@pytest.mark.parametrize("partition", PARTITIONS[:4], ids=lambda p: type(p).__name__)
def test_another_seed_gives_another_split_and_global_state_is_untouched(
    partition: object, tmp_path: Path
) -> None:
    data = image_set(LABELS)
    split(data, partition, 4, 5, tmp_path)  # what an import itself may draw is not meant
    np.random.seed(3)  # noqa: NPY002 (the global state is what is tested)
    random.seed(3)
    before = (np.random.get_state()[1].tolist(), random.getstate())  # noqa: NPY002
    first, second = (split(data, partition, 4, seed, tmp_path) for seed in (0, 1))
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before  # noqa: NPY002
    assert any(not np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_sizes_follow_the_weights(tmp_path: Path) -> None:
    # 104 images: one each, and 100 in proportion 1 : 1 : 2 : 6
    parts = split(image_set([0] * 104), Size(weights=[1.0, 1.0, 2.0, 6.0]), 4, 0, tmp_path)
    assert [len(part) for part in parts] == [11, 11, 21, 61]


def test_pathological_clients_hold_their_classes_only(tmp_path: Path) -> None:
    data = image_set([0] * 20 + [1] * 20 + [2] * 20)
    parts = split(data, Pathological(classes_per_client=2), 3, 0, tmp_path)
    assert [np.unique(data.labels[part]).tolist() for part in parts] == [[0, 1], [1, 2], [0, 2]]


def test_natural_ids_stay_together_and_are_dealt_evenly(tmp_path: Path) -> None:
    groups = ["c"] * 6 + ["a"] * 5 + ["b"] * 4 + ["d"] * 1
    parts = split(image_set([0, 1] * 8, groups), Natural(), 2, 0, tmp_path)
    held = [sorted({groups[i] for i in part}) for part in parts]
    assert held == [["c", "d"], ["a", "b"]]  # 6, 5 | 4 to the smaller (5), 1 to the smaller (6)
    four = split(image_set([0, 1] * 8, groups), Natural(), 4, 0, tmp_path)
    assert [{groups[i] for i in part} for part in four] == [{"a"}, {"b"}, {"c"}, {"d"}]


@pytest.mark.parametrize(
    ("partition", "clients", "message"),
    [
        (Iid(), 101, "start fewer clients"),
        (Dirichlet(alpha=0.3, min_size=30), 4, "partition.min_size"),
        (Dirichlet(alpha=0.001, min_size=10), 4, r"raise alpha, lower min_size"),
        (Pathological(classes_per_client=3), 4, "partition.classes_per_client: 3 is more than the 2"),
        (Pathological(classes_per_client=1), 1, "unassigned"),
        (Pathological(classes_per_client=2), 41, "smallest class of 40"),
        (Size(weights=[1.0, 2.0]), 4, "partition.weights: 2 weights for 4 clients"),
        (Natural(), 10, "10 clients cannot share 9 natural ids"),
        (Stream(), 4, "does not split"),
    ],
)
def test_impossible_splits_say_what_to_change(
    partition: object, clients: int, message: str, tmp_path: Path
) -> None:
    data = image_set(LABELS, groups=[f"id{i % 9}" for i in range(100)])
    with pytest.raises(DataError, match=message):
        split(data, partition, clients, 0, tmp_path)


def test_natural_without_ids_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="folder per id"):
        split(image_set(LABELS), Natural(), 2, 0, tmp_path)
    with pytest.raises(DataError, match="image-0-1 has none"):
        split(image_set([0, 1, 1], ["x", "", "y"]), Natural(), 2, 0, tmp_path)


def test_negative_weights_are_refused_with_the_settings() -> None:
    assert Size(weights=[1.0, -1.0]).check() is not None
    assert Size(weights=[]).check() is None


def test_another_process_needs_no_partitioner_once_the_split_is_cached(tmp_path: Path) -> None:
    data = image_set(LABELS)
    expected = split(data, Dirichlet(alpha=0.5, min_size=2), 3, 1, tmp_path)
    script = """
import sys
from pathlib import Path
from small_data import image_set
from fedmutual.data.partition import Dirichlet, split
parts = split(image_set([0] * 60 + [1] * 40), Dirichlet(alpha=0.5, min_size=2), 3, 1, Path(sys.argv[1]))
assert not {"datasets", "flwr_datasets", "torch"} & set(sys.modules), sorted(sys.modules)
print([part.tolist() for part in parts])
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str([part.tolist() for part in expected])


def test_the_papers_stream_has_73_folds_of_52_or_53_images() -> None:
    labels = np.asarray([0] * 1914 + [1] * 1918)
    folds = stream_folds(labels, num_clients=5, rounds=12, seed=0)
    everything = [folds.warm_start, *folds.public, *(fold for round in folds.private for fold in round)]
    assert len(everything) == 73
    assert {len(fold) for fold in everything} == {52, 53}
    assert {int((labels[fold] == 0).sum()) for fold in everything} == {26, 27}
    assert np.array_equal(np.sort(np.concatenate(everything)), np.arange(3832))
    assert [len(round) for round in folds.private] == [5] * 12


def test_a_stream_with_too_few_images_says_so() -> None:
    with pytest.raises(DataError, match="= 13 folds, too many for its 25 images"):
        stream_folds(np.zeros(25, dtype=np.int64), num_clients=3, rounds=3, seed=0)


def test_largest_remainder_by_hand() -> None:
    # 7 seats for 5 : 3 : 1 are 3.89, 2.33, 0.78: whole parts 3, 2, 0 and the two largest remainders
    assert largest_remainder(np.array([5.0, 3.0, 1.0]), 7).tolist() == [4, 2, 1]


labels_of = st.lists(st.integers(0, 3), min_size=2, max_size=60).map(
    lambda values: np.asarray(values, dtype=np.int64)
)


@quick
@given(labels=labels_of, folds=st.integers(1, 60), seed=st.integers(0, 9))
def test_folds_cover_once_and_differ_by_one_at_most(labels: np.ndarray, folds: int, seed: int) -> None:
    folds = min(folds, len(labels))
    cut = stratified_folds(labels, folds, np.random.default_rng(seed))
    assert np.array_equal(np.sort(np.concatenate(cut)), np.arange(len(labels)))
    sizes = [len(fold) for fold in cut]
    assert max(sizes) - min(sizes) <= 1
    for label in range(4):
        counts = [int((labels[fold] == label).sum()) for fold in cut]
        assert max(counts) - min(counts) <= 1


@quick
@given(labels=labels_of, share=st.floats(0, 1), seed=st.integers(0, 9))
def test_a_stratified_sample_keeps_the_classes_in_proportion(
    labels: np.ndarray, share: float, seed: int
) -> None:
    size = round(share * len(labels))
    drawn = stratified_sample(labels, size, np.random.default_rng(seed))
    assert len(np.unique(drawn)) == len(drawn) == size
    for label in range(4):
        exact = size * (labels == label).sum() / len(labels)
        assert abs((labels[drawn] == label).sum() - exact) < 1 + 1e-6


@quick
@given(labels=labels_of, fraction=st.floats(0.001, 0.9), seed=st.integers(0, 9))
def test_both_sides_of_a_hold_out_have_an_image(labels: np.ndarray, fraction: float, seed: int) -> None:
    train, held_out = hold_out(labels, fraction, np.random.default_rng(seed))
    assert len(train) > 0
    assert len(held_out) > 0
    assert np.array_equal(np.sort(np.concatenate([train, held_out])), np.arange(len(labels)))
