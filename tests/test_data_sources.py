"""Image folders, generated faces and Hugging Face data sets."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image
from small_data import run_settings, write_images

from fedmutual.data.faces import POOL, FacesSettings, draw
from fedmutual.data.folder import FacemaskSettings, FolderSettings
from fedmutual.data.huggingface import HuggingFaceSettings
from fedmutual.data.images import DataError, ImageData, pixel_hashes
from fedmutual.data.partition import Iid
from fedmutual.data.site import load_site
from fedmutual.settings.compose import CONF_DIR

ROOT = Path(__file__).resolve().parents[1]


def _folder(root: Path | str | None, classes: list[str] | None = None) -> FolderSettings:
    root = None if root is None else str(root)
    return FolderSettings(
        image_size=8, max_megapixels=1, interpolation="bilinear", window=None, root=root, classes=classes
    )


def _photographs(root: Path | str | None) -> FacemaskSettings:
    return FacemaskSettings(
        image_size=8,
        max_megapixels=1,
        interpolation="bilinear",
        window=None,
        root=None if root is None else str(root),
    )


def _hub(dataset: Path | str | None, **changes: object) -> HuggingFaceSettings:
    values = OmegaConf.to_container(OmegaConf.load(CONF_DIR / "data" / "huggingface.yaml"))
    assert isinstance(values, dict)
    values.pop("_target_")
    dataset = None if dataset is None else str(dataset)
    return HuggingFaceSettings(**{**values, "image_size": 8, "dataset": dataset, **changes})


# image folders


def test_a_folder_per_class_and_a_labelled_public_folder(tmp_path: Path) -> None:
    for place, count in (("train/dog/ann", 2), ("train/dog/bob", 1), ("train/cat/ann", 3)):
        write_images(tmp_path / place, count, seed=count)
    write_images(tmp_path / "public/fox", 2)
    write_images(tmp_path / "test/cat", 4)
    data = _folder(tmp_path, ["cat", "dog", "fox"]).load(tmp_path / "cache")
    assert data.classes == ("cat", "dog", "fox")
    assert data.pool.names == (
        *(f"cat/ann/000{i}.png" for i in range(3)),
        *(f"dog/ann/000{i}.png" for i in range(2)),
        "dog/bob/0000.png",
    )
    assert data.pool.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.pool.groups == ("ann", "ann", "ann", "ann", "ann", "bob")
    assert data.public is not None
    assert data.public.labels.tolist() == [2, 2]
    assert data.public.groups is None
    assert data.unseen is not None
    assert data.unseen.labels.tolist() == [0] * 4


def test_classes_fix_the_order_of_labels_and_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_images(tmp_path / "train/b", 1)
    write_images(tmp_path / "train/a", 1, seed=1)
    with caplog.at_level(logging.WARNING):
        data = _folder(tmp_path, ["b", "a", "c"]).load(tmp_path / "cache")
    assert data.pool.names == ("b/0000.png", "a/0000.png")
    assert data.pool.labels.tolist() == [0, 1]
    assert "has no images of class c" in caplog.text


def test_a_flat_public_folder_is_unlabelled_and_is_enough_for_a_server(tmp_path: Path) -> None:
    write_images(tmp_path / "public", 3)
    data = _folder(tmp_path, ["a", "b"]).load(tmp_path / "cache")
    assert data.public is not None
    assert data.public.labels.tolist() == [-1, -1, -1]
    assert len(data.pool) == 0
    with pytest.raises(DataError, match="no private images"):
        load_site(run_settings(_folder(tmp_path, ["a", "b"]), Iid(), tmp_path / "cache"), None)


def _empty(root: Path) -> None:
    (root / "train/a").mkdir(parents=True)
    (root / "train/b").mkdir()


def _loose(root: Path) -> None:
    write_images(root / "train/a", 1)
    write_images(root / "train/b", 1)
    write_images(root / "train", 1)


def _unknown(root: Path) -> None:
    write_images(root / "train/a", 1)
    write_images(root / "train/b", 1)
    write_images(root / "test/z", 1)


def _single(root: Path) -> None:
    write_images(root / "train/a", 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "neither a train nor a public folder"),
        (_empty, "train has no images"),
        (_loose, "is outside the class folders"),
        (_unknown, r"test/z' is not one of the classes \['a', 'b'\]"),
        (lambda root: (root / "train").mkdir(), r"data\.root: .* 0 class folders \[\].*set data\.classes="),
        (_single, r"data\.root: .* 1 class folders \['a'\].*set data\.classes="),
    ],
)
def test_wrong_folders_are_named(make: object, message: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    make(tmp_path / "in")  # type: ignore[operator]
    with pytest.raises(DataError, match=message):
        _folder(tmp_path / "in").load(tmp_path / "cache")


@pytest.mark.parametrize("classes", [[], ["a"], ["a", "a"]])
def test_named_classes_are_two_or_more(classes: list[str], tmp_path: Path) -> None:
    write_images(tmp_path / "train/a", 1)
    assert str(_folder(tmp_path, classes).check()).startswith(f"classes: {classes} ")
    with pytest.raises(DataError, match=r"data\.classes: "):
        _folder(tmp_path, classes).load(tmp_path / "cache")


@pytest.mark.parametrize("root", [None, "/no/such/folder"])
def test_a_missing_root_names_the_key_and_the_remedy(root: str | None, tmp_path: Path) -> None:
    for settings in (_folder(root), _photographs(root)):
        problem = settings.check()
        assert problem is not None
        assert problem.startswith("root: ")
        assert "set data.root=DIR" in problem
        with pytest.raises(DataError, match=r"data\.root: "):
            settings.load(tmp_path)


def test_photograph_folders_have_their_fixed_classes(tmp_path: Path) -> None:
    for place, count in (("pool/mask", 2), ("pool/no_mask", 3), ("unseen/mask", 1), ("unseen/no_mask", 1)):
        write_images(tmp_path / place, count)
    data = _photographs(tmp_path).load(tmp_path / "cache")
    assert data.classes == ("mask", "no_mask")
    assert data.pool.labels.tolist() == [0, 0, 1, 1, 1]
    assert data.public is None
    assert data.unseen is not None
    assert len(data.unseen) == 2


# generated faces


def _faces(**changes: int) -> FacesSettings:
    return FacesSettings(**{"image_size": 40, "pool_size": 8, "unseen_size": 4, "seed": 0, **changes})


def _everything(data: ImageData) -> list[bytes]:
    assert data.unseen is not None
    return [part.pixel_hashes().tobytes() for part in (data.pool, data.unseen)]


def test_faces_are_balanced_and_each_depends_on_seed_and_index_only(tmp_path: Path) -> None:
    few, more = _faces().load(tmp_path), _faces(pool_size=12).load(tmp_path)
    assert few.classes == ("mask", "no_mask")
    assert np.bincount(few.pool.labels).tolist() == [4, 4]
    assert few.unseen is not None
    assert np.bincount(few.unseen.labels).tolist() == [2, 2]
    assert np.array_equal(more.pool.images[:8], few.pool.images)
    assert len({row.tobytes() for row in more.pool.pixel_hashes()}) == 12
    assert _everything(_faces(seed=1).load(tmp_path)) != _everything(few)
    assert _everything(_faces().load(tmp_path / "other")) == _everything(few)


def test_faces_of_another_process_are_the_same_bytes() -> None:
    script = """
from fedmutual.data.faces import POOL, draw
from fedmutual.data.images import pixel_hashes
import numpy as np
print(pixel_hashes(np.stack([draw(3, "pool", POOL, i, 40) for i in (5, 2)])).tobytes().hex())
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    here = np.stack([draw(3, "pool", POOL, i, 40) for i in (5, 2)])
    assert done.stdout.strip() == pixel_hashes(here).tobytes().hex()


def test_a_warm_site_imports_nothing_heavy(tmp_path: Path) -> None:
    script = """
import sys
from pathlib import Path
from small_data import public_settings
import fedmutual.data.huggingface, fedmutual.data.folder
from types import SimpleNamespace
from fedmutual.data.faces import FacesSettings
from fedmutual.data.partition import Iid
from fedmutual.data.site import load_site
loaded = {"torch", "datasets", "flwr_datasets"} & set(sys.modules)
assert not loaded, loaded
settings = SimpleNamespace(
    seed=0, rounds=3, cache_dir=sys.argv[1], partition=Iid(), public=public_settings(),
    data=FacesSettings(image_size=16, pool_size=20, unseen_size=4, seed=0),
    train=SimpleNamespace(validation_fraction=0.1),
)
print(load_site(settings, (0, 2)).public.digest)
if sys.argv[2] == "warm":
    loaded = {"torch", "datasets", "flwr_datasets"} & set(sys.modules)
    assert not loaded, loaded
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    digests = [
        subprocess.run(
            [sys.executable, "-c", script, str(tmp_path), state],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for state in ("cold", "warm")
    ]
    assert digests[0] == digests[1]


def test_a_linear_model_of_the_pixels_does_not_solve_the_faces(tmp_path: Path) -> None:
    import torch

    data = _faces(pool_size=1000, unseen_size=400, image_size=24).load(tmp_path)
    assert data.unseen is not None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Linear(24 * 24 * 3, 2)
    inputs, unseen = (
        torch.tensor(part.images.reshape(len(part), -1) / 255.0).float() for part in (data.pool, data.unseen)
    )
    mean, scale = inputs.mean(0), inputs.std(0)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, weight_decay=1e-2)
    for _ in range(150):
        loss = torch.nn.functional.cross_entropy(
            model((inputs - mean) / scale), torch.tensor(data.pool.labels)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    right = model((unseen - mean) / scale).argmax(1) == torch.tensor(data.unseen.labels)
    assert 0.6 < float(right.float().mean()) < 0.9  # learnable at all, and not by colours alone


# Hugging Face


def _save(splits: dict[str, tuple[list[int], list[str]]], folder: Path) -> None:
    """Save splits of (labels, class names); the n-th has random pictures of seed n."""
    import datasets

    def table(labels: list[int], names: list[str], seed: int) -> datasets.Dataset:
        rng = np.random.default_rng(seed)
        pictures = [Image.fromarray(rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)) for _ in labels]
        columns = {"image": pictures, "label": labels, "site": [f"s{i % 2}" for i in range(len(labels))]}
        features = datasets.Features(
            {
                "image": datasets.Image(),
                "label": datasets.ClassLabel(names=names),
                "site": datasets.Value("string"),
            }
        )
        return datasets.Dataset.from_dict(columns, features=features)

    tables = {name: table(*split, seed) for seed, (name, split) in enumerate(splits.items(), start=1)}
    datasets.DatasetDict(tables).save_to_disk(str(folder))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    names = ["no", "yes"]
    _save({"train": ([0, 1, 1, 0], names), "test": ([1, 0], names)}, tmp_path / "saved")
    return tmp_path / "saved"


def test_a_saved_data_set_with_labels_and_groups(saved: Path, tmp_path: Path) -> None:
    settings = _hub(saved, test_split="test", group_column="site")
    data = settings.load(tmp_path / "cache")
    assert data.classes == ("no", "yes")
    assert data.pool.labels.tolist() == [0, 1, 1, 0]
    assert data.pool.groups == ("s0", "s1", "s0", "s1")
    expected = np.random.default_rng(1).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    assert np.array_equal(data.pool.images[0], expected)
    assert data.unseen is not None
    assert data.unseen.labels.tolist() == [1, 0]
    assert data.public is None


def test_an_image_folder_that_load_dataset_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    write_images(tmp_path / "in/train/a", 2)
    write_images(tmp_path / "in/train/b", 2, seed=1)
    data = _hub(tmp_path / "in").load(tmp_path / "cache")
    assert data.classes == ("a", "b")
    assert data.pool.labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_column": "target"}, "has no column 'target'"),
        ({"train_split": "valid"}, "cannot load split 'valid'"),
    ],
)
def test_wrong_columns_and_splits_are_named(
    changes: dict[str, str], message: str, saved: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        _hub(saved, **changes).load(tmp_path / "cache")


def test_a_test_split_with_hidden_labels_is_refused(tmp_path: Path) -> None:
    names = ["no", "yes"]
    _save({"train": ([0, 1], names), "test": ([-1, -1, 1], names)}, tmp_path / "hidden")
    assert _hub(tmp_path / "hidden").load(tmp_path / "cache").unseen is None
    with pytest.raises(DataError, match=r"data\.test_split: 2 of the 3 images .*set data\.test_split=null"):
        _hub(tmp_path / "hidden", test_split="test").load(tmp_path / "cache")


def test_a_public_split_needs_no_labels_and_no_other_split_goes_without(tmp_path: Path) -> None:
    import datasets

    names = ["no", "yes"]
    _save({"train": ([0, 1], names), "unlabelled": ([0, 1, 1], names)}, tmp_path / "first")
    tables = datasets.load_from_disk(str(tmp_path / "first"))
    tables["unlabelled"] = tables["unlabelled"].remove_columns("label")
    tables.save_to_disk(str(tmp_path / "in"))
    data = _hub(tmp_path / "in", public_split="unlabelled").load(tmp_path / "cache")
    assert data.classes == ("no", "yes")
    assert data.public is not None
    assert data.public.labels.tolist() == [-1, -1, -1]
    with pytest.raises(DataError, match="split unlabelled, has no column 'label'"):
        _hub(tmp_path / "in", test_split="unlabelled").load(tmp_path / "other")
    for split in ("test_split", "train_split"):  # decoded before, as the public split
        with pytest.raises(DataError, match=r"have no label|but 2 are needed"):
            _hub(tmp_path / "in", **{split: "unlabelled"}).load(tmp_path / "cache")


def test_a_data_set_of_one_class_is_refused(tmp_path: Path) -> None:
    _save({"train": ([0, 0], ["no"])}, tmp_path / "one")
    with pytest.raises(DataError, match=r"data\.label_column: label of .* has 1 classes \['no'\]"):
        _hub(tmp_path / "one").load(tmp_path / "cache")


def _table(folder: Path, labels: list[Any], kind: Any, test: list[Any] | None = None) -> Path:
    """Save a data set with these labels in a column of this kind."""
    import datasets

    def table(labels: list[Any]) -> datasets.Dataset:
        pictures = [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(len(labels))]
        features = datasets.Features({"image": datasets.Image(), "label": kind})
        return datasets.Dataset.from_dict({"image": pictures, "label": labels}, features=features)

    splits = {"train": table(labels), **({} if test is None else {"test": table(test)})}
    datasets.DatasetDict(splits).save_to_disk(str(folder))
    return folder


def test_labels_are_numbers_or_text_and_a_split_may_lack_a_class(tmp_path: Path) -> None:
    import datasets

    text = _table(tmp_path / "text", ["b", "a", "c"], datasets.Value("string"), ["c", "a"])
    data = _hub(text, test_split="test").load(tmp_path / "cache")
    assert data.classes == ("a", "b", "c")
    assert data.pool.labels.tolist() == [1, 0, 2]
    assert data.unseen is not None
    assert data.unseen.labels.tolist() == [2, 0]
    numbers = _table(tmp_path / "numbers", [10, 9, 2], datasets.Value("int64"))
    data = _hub(numbers).load(tmp_path / "cache")
    assert (data.classes, data.pool.labels.tolist()) == (("2", "9", "10"), [2, 1, 0])
    whole = _table(tmp_path / "floats", [1.0, 0.0], datasets.Value("float32"))
    assert _hub(whole).load(tmp_path / "cache").classes == ("0", "1")


@pytest.mark.parametrize(
    ("labels", "kind", "message"),
    [
        ([0, 1, -1], "int64", r"1 of the 3 images of split train have no label \(-1, null or NaN\)"),
        ([0.0, 1.0, float("nan")], "float32", "1 of the 3 images"),
        ([0, None, 1], "int64", "1 of the 3 images"),
        (["a", None, None, "b"], "string", "2 of the 4 images"),
        ([0.5, 1.0], "float32", "has 0.5, a measurement and no class"),
        ([[0, 1], [1]], ["int64"], r"has several labels per image, such as \[0, 1\]"),
    ],
)
def test_labels_that_are_none_get_a_clear_word(
    labels: list[Any], kind: Any, message: str, tmp_path: Path
) -> None:
    import datasets

    value = datasets.Value(kind) if isinstance(kind, str) else datasets.Sequence(datasets.Value(kind[0]))
    with pytest.raises(DataError, match=message):
        _hub(_table(tmp_path / "in", labels, value)).load(tmp_path / "cache")


def test_splits_of_one_class_or_of_another_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import datasets

    two = datasets.ClassLabel(names=["no", "yes"])
    with pytest.raises(DataError, match=r"all images of split train have the class yes: .* shuffled"):
        _hub(_table(tmp_path / "one", [1, 1], two)).load(tmp_path / "cache")
    _hub(_table(tmp_path / "test", [0, 1], two, [0, 0]), test_split="test").load(tmp_path / "cache")
    assert "all images of split test have one class" in caplog.text
    other = _table(tmp_path / "other", ["a", "b"], datasets.Value("string"), ["a", "x"])
    with pytest.raises(DataError, match=r"split test of .* has the class 'x', which .* has \['a', 'b'\]"):
        _hub(other, test_split="test").load(tmp_path / "cache")


def test_what_a_data_set_lacks_is_refused_with_what_it_has(tmp_path: Path) -> None:
    import datasets

    folder = _table(tmp_path / "in", [0, 1], datasets.ClassLabel(names=["a", "b"]))
    with pytest.raises(DataError, match=r"cannot load split 'valid' of .*: it has train"):
        _hub(folder, test_split="valid").load(tmp_path / "cache")
    with pytest.raises(DataError, match=r"no column 'x': it has image \(Image\), label \(ClassLabel\)"):
        _hub(folder, group_column="x").load(tmp_path / "cache")
    with pytest.raises(DataError, match=r"data\.image_column: label of .* has no images: image has some"):
        _hub(folder, image_column="label").load(tmp_path / "cache")
    alone = datasets.load_from_disk(str(folder))["train"]
    alone.save_to_disk(str(tmp_path / "alone"))
    with pytest.raises(DataError, match=r"cannot load split 'test' of .*: it has train"):
        _hub(tmp_path / "alone", test_split="test").load(tmp_path / "cache")
    assert str(_hub(folder, public_split="train").check()).startswith("public_split: train is the training")


def test_a_data_set_must_be_named(tmp_path: Path) -> None:
    assert str(_hub(None).check()).startswith("dataset: ")
    with pytest.raises(DataError, match=r"set data\.dataset"):
        _hub(None).load(tmp_path)


# the configuration


@pytest.mark.parametrize(
    "path",
    sorted(
        {*CONF_DIR.glob("data/*.yaml"), *CONF_DIR.glob("partition/*.yaml")} - {CONF_DIR / "data/custom.yaml"}
    ),
    ids=str,
)
def test_every_file_fills_its_settings_class(path: Path) -> None:
    from hydra.utils import get_class

    values = OmegaConf.load(path)
    schema = OmegaConf.structured(get_class(values.pop("_target_")))
    merged = OmegaConf.merge(schema, values)
    assert not OmegaConf.missing_keys(merged)
    OmegaConf.to_object(merged)


def test_a_folder_of_classes_alone_is_the_pool(tmp_path: Path) -> None:
    write_images(tmp_path / "cat", 3)
    write_images(tmp_path / "dog", 4)
    data = _folder(tmp_path).load(tmp_path / ".cache")
    assert (data.classes, data.public, data.unseen) == (("cat", "dog"), None, None)
    assert data.pool.labels.tolist() == [0] * 3 + [1] * 4
    assert _folder(tmp_path).count() == (7, None)
    (tmp_path / "test").mkdir()  # then its names have a meaning, and train/ is missing
    with pytest.raises(DataError, match="neither a train nor a public folder"):
        _folder(tmp_path).load(tmp_path / ".cache")
