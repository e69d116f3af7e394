"""The public set, its digest, its rounds, and what one client learns from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from small_data import Source, image_set, public_settings, run_settings

from fedmutual.data.images import DataError, ImageSet
from fedmutual.data.partition import Dirichlet, Iid, Stream, split
from fedmutual.data.public import digest, public_and_private
from fedmutual.data.site import load_shared, load_site

POOL = image_set([0] * 60 + [1] * 40)
quick = hypothesis_settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def _names(images: ImageSet) -> set[str]:
    return set(images.names)


def test_clients_and_public_set_divide_the_pool(tmp_path: Path) -> None:
    settings = run_settings(Source(POOL), Dirichlet(alpha=0.5, min_size=2), tmp_path)
    sites = [load_site(settings, (i, 3)) for i in range(3)]
    public = sites[0].public
    assert np.bincount(public.images.labels).tolist() == [9, 6]  # 15 % of 60 and of 40
    assert sum(len(site.private) for site in sites) == 85
    everyone = [_names(public.images), *(_names(site.private) for site in sites)]
    assert len(set().union(*everyone)) == sum(map(len, everyone)) == 100
    shared = load_shared(settings, None)
    assert {shared.public.digest} == {site.public.digest for site in sites}


def test_a_site_reads_the_pixels_of_its_own_share_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = image_set([0] * 60 + [1] * 40, groups=[f"id{i % 9}" for i in range(100)])
    partition = Dirichlet(alpha=0.5, min_size=2)
    settings = run_settings(Source(pool), partition, tmp_path)
    public, private = public_and_private(settings.data.load(tmp_path), settings, 3)
    assert isinstance(private, np.ndarray)
    remaining = pool.subset(private)
    expected = split(remaining, partition, 3, 0, tmp_path / "other")  # of a copy with pixels
    read: list[int] = []
    subset = ImageSet.subset

    def record(images: ImageSet, positions: np.ndarray) -> ImageSet:
        read.append(len(positions))
        return subset(images, positions)

    monkeypatch.setattr(ImageSet, "subset", record)
    for client, positions in enumerate(expected):
        site = load_site(settings, (client, 3))
        assert site.private.names == tuple(remaining.names[p] for p in positions)
        assert np.array_equal(site.private.images, remaining.images[positions])
        assert read == [len(public), len(positions)]
        read.clear()


def test_a_site_trains_on_what_it_does_not_hold_out(tmp_path: Path) -> None:
    site = load_site(run_settings(Source(POOL), Iid(), tmp_path), (0, 5))
    train, held_out = site.train_indices(1), site.validation_indices(1)
    assert (len(train), len(held_out)) == (15, 2)  # a tenth of 17
    assert np.array_equal(np.sort(np.concatenate([train, held_out])), np.arange(17))
    assert np.array_equal(train, site.train_indices(9))
    with pytest.raises(ValueError, match="counted from 1"):
        site.train_indices(0)


def test_nothing_is_held_out_where_the_fraction_is_0_or_there_is_one_image(tmp_path: Path) -> None:
    settings = run_settings(Source(POOL), Iid(), tmp_path, train=SimpleNamespace(validation_fraction=0.0))
    assert len(load_site(settings, (0, 5)).validation_indices(1)) == 0
    single = load_site(run_settings(Source(POOL), Iid(), tmp_path), (0, 85))
    assert (len(single.train_indices(1)), len(single.validation_indices(1))) == (1, 0)


def test_the_stream_gives_every_round_a_new_fold(tmp_path: Path) -> None:
    settings = run_settings(Source(POOL), Stream(), tmp_path, public=public_settings(schedule="kfold"))
    sites = [load_site(settings, (i, 4)) for i in range(4)]  # (4 + 1) * 3 + 1 = 16 folds of 6 or 7
    site = sites[1]
    rounds = [site.train_indices(r) for r in (1, 2, 3)]
    held_out = [site.validation_indices(r) for r in (1, 2, 3)]
    assert all(len(part) in (5, 6) for part in rounds)
    assert [len(part) for part in held_out] == [1, 2, 3]
    assert set(held_out[0]) < set(held_out[1]) < set(held_out[2])
    everything = np.concatenate([*rounds, held_out[2]])
    assert np.array_equal(np.sort(everything), np.arange(len(site.private)))
    assert np.array_equal(site.validation_indices(4), held_out[2])  # the closing message
    warm_start = site.public.warm_start
    assert warm_start is not None
    everyone = [_names(warm_start), _names(site.public.images), *(_names(s.private) for s in sites)]
    assert len(set().union(*everyone)) == sum(map(len, everyone)) == 100
    folds = [site.public.indices(settings.public, 0, r, 3) for r in (1, 2, 3, 4)]
    assert np.array_equal(np.concatenate(folds[:3]), np.arange(len(site.public)))
    assert np.array_equal(folds[3], folds[0])
    assert load_shared(settings, 4).public.digest == site.public.digest
    assert load_shared(settings, 3).public.digest != site.public.digest


@pytest.mark.parametrize("partition", [Iid(), Stream()], ids=["drawn", "stream"])
def test_schedules(partition: object, tmp_path: Path) -> None:
    public = load_shared(run_settings(Source(POOL), partition, tmp_path), 4).public
    count = len(public)
    assert public.indices(public_settings(), 0, 2, 3).tolist() == list(range(count))
    sample = public_settings(schedule="sample", per_round=5)
    drawn = [public.indices(sample, seed, r, 3) for seed, r in ((0, 1), (0, 2), (1, 1), (0, 1))]
    assert all(
        len(np.unique(d)) == 5 and np.array_equal(d, np.sort(d)) and d.dtype == np.int32 for d in drawn
    )
    assert drawn[0].tolist() == drawn[3].tolist()
    assert len({tuple(d) for d in drawn}) == 3
    assert len(public.indices(public_settings(schedule="sample"), 0, 1, 3)) == count // 4
    kfold = public_settings(schedule="kfold")
    folds = [public.indices(kfold, 0, r, 3) for r in (1, 2, 3)]
    assert np.array_equal(np.sort(np.concatenate(folds)), np.arange(count))
    for label in (0, 1):
        counts = [int((public.images.labels[fold] == label).sum()) for fold in folds]
        assert max(counts) - min(counts) <= 1


def test_more_rounds_than_public_images_repeat_the_folds(tmp_path: Path) -> None:
    settings = run_settings(Source(POOL), Iid(), tmp_path, public=public_settings(size=4, schedule="kfold"))
    public = load_shared(settings, None).public
    folds = [public.indices(settings.public, 0, r, 9).tolist() for r in range(1, 10)]
    assert sorted(map(tuple, folds[:4])) == [(0,), (1,), (2,), (3,)]
    assert folds[4:8] == folds[:4]


def test_an_own_public_set_is_used_and_size_caps_it(tmp_path: Path) -> None:
    own = image_set([0] * 6 + [1] * 14, seed=5)
    site = load_site(run_settings(Source(POOL, own), Iid(), tmp_path), (0, 1))
    assert site.public.images is own
    assert len(site.private) == 100
    capped = run_settings(Source(POOL, own), Iid(), tmp_path, public=public_settings(size=10))
    public = load_site(capped, None).public
    assert np.bincount(public.images.labels).tolist() == [3, 7]
    assert _names(public.images) < _names(own)


@pytest.mark.parametrize(
    ("partition", "own", "size", "expected"),
    [
        (Iid(), 20, 21, ["public.size: 21 is more than the 20 images of the data's own public set"]),
        (Iid(), 20, 20, []),
        (Iid(), None, 21, []),
        (Stream(), None, 21, ["public.size: 21 has no effect with partition=stream"]),
        (Stream(), None, None, []),
    ],
)
def test_a_public_size_without_effect_is_said_once_by_the_server(
    partition: object,
    own: int | None,
    size: int | None,
    expected: list[str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = Source(POOL, None if own is None else image_set([0, 1] * (own // 2), seed=5))
    settings = run_settings(source, partition, tmp_path, public=public_settings(size=size))
    public = load_shared(settings, 4).public
    load_site(settings, (0, 4))
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == len(expected)
    assert all(text.startswith(start) for text, start in zip(said, expected, strict=True))
    assert own is None or len(public) == own


def test_a_site_of_its_own_needs_a_public_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"<data.root>/public"):
        load_site(run_settings(Source(POOL), Iid(), tmp_path), None)
    with pytest.raises(DataError, match="num_clients"):
        load_shared(run_settings(Source(POOL), Stream(), tmp_path), None)


@pytest.mark.parametrize(
    ("own", "changes", "message"),
    [
        (None, {"size": 100}, "public.size: 100 of the pool's 100 images leaves no private image"),
        (None, {"schedule": "sample", "per_round": 16}, "public.per_round: 16 is more than the 15"),
        (image_set([-1] * 5), {"labelled": True}, "set public.labelled=false"),
        (image_set([]), {}, "the public set is empty"),
    ],
)
def test_impossible_public_sets_say_what_to_change(
    own: ImageSet | None, changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    settings = run_settings(Source(POOL, own), Iid(), tmp_path, public=public_settings(**changes))
    with pytest.raises(DataError, match=message):
        load_shared(settings, None)


def test_a_partition_id_must_be_below_their_number(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="partition-id: 3 is not below num-partitions 3"):
        load_site(run_settings(Source(POOL), Iid(), tmp_path), (3, 3))


@quick
@given(
    labels=st.lists(st.integers(0, 1), min_size=2, max_size=12),
    labelled=st.booleans(),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_the_digest_names_the_content(
    labels: list[int], labelled: bool, seed: int, data: st.DataObject
) -> None:
    images = image_set(labels, seed=seed)
    position = data.draw(st.integers(0, len(labels) - 1))
    name = digest(("a", "b"), images, labelled, None)
    assert len(bytes.fromhex(name)) == 16

    pixels = images.images.copy()
    pixels[position, 3, 4, 1] ^= 1
    assert digest(("a", "b"), replace(images, images=pixels), labelled, None) != name
    order = np.roll(np.arange(len(labels)), 1)
    assert digest(("a", "b"), images.subset(order), labelled, None) != name
    assert digest(("b", "a"), images, labelled, None) != name
    assert digest(("a", "b"), images, labelled, images) != name
    flipped = images.labels.copy()
    flipped[position] ^= 1
    assert (digest(("a", "b"), replace(images, labels=flipped), labelled, None) != name) == labelled
    # names, groups and the kept hashes are not content
    renamed = replace(images, names=tuple("x" for _ in labels), hashes=images.pixel_hashes())
    assert digest(("a", "b"), renamed, labelled, None) == name


def test_the_digest_covers_the_labels_of_the_warm_start() -> None:
    images, warm = image_set([0, 1]), image_set([0, 1], seed=1)
    other = replace(warm, labels=np.asarray([1, 0]))
    assert digest(("a",), images, False, warm) != digest(("a",), images, False, other)


def test_a_subset_of_everything_is_no_copy_and_lengths_must_agree() -> None:
    images = image_set([0, 1, 1], ["x", "y", "z"])
    assert images.subset(np.arange(3)) is images
    part = images.subset(np.asarray([2, 0]))
    assert (part.names, part.groups, part.labels.tolist()) == (("image-0-2", "image-0-0"), ("z", "x"), [1, 0])
    assert np.array_equal(part.images[0], images.images[2])
    with pytest.raises(ValueError, match=r"\(3, 8, 8, 3\) images"):
        replace(images, names=("one",))
