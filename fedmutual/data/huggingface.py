"""Image data sets from the Hugging Face hub, and local ones that ``datasets`` can load."""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from fedmutual.data.cache import FORMAT, Entry, cached
from fedmutual.data.decoding import Facts, PictureSettings, decode_into, read_with_facts, stamp_of
from fedmutual.data.depth import window_problem
from fedmutual.data.images import DataError, ImageData, ImageSet
from fedmutual.data.label_column import Labels, labels_of
from fedmutual.settings import setting

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class HuggingFaceSettings(PictureSettings):
    """A data set with an image column and a label column.

    A hub data set is decoded once and cached. Set ``revision`` if all sites must hold the same version (the
    digest check rejects different public images in any case).
    """

    dataset: str | None = setting("name on the hub, or a folder that load_dataset or load_from_disk can read")
    subset: str | None = setting("configuration of the data set; null: the only one")
    revision: str | None = setting("commit or tag on the hub; null: the newest at first load")
    train_split: str = setting("split with the clients' images")
    test_split: str | None = setting("split for evaluation only; null: none")
    public_split: str | None = setting(
        "split used as the public set, labelled or not; null: draw it from the training split"
    )
    image_column: str = setting("column with the images")
    label_column: str = setting("column with the labels (names or numbers)")
    group_column: str | None = setting("column with natural ids, for partition=natural; null: none")

    def check(self) -> str | None:
        """Return the problem if no data set is given, else None."""
        if self.dataset is None:
            return "dataset: no data set given: set data.dataset to a name on the hub or to a folder"
        for name, split in (("test", self.test_split), ("public", self.public_split)):
            if split == self.train_split:
                return f"{name}_split: {split} is the training split: choose another one, or null"
        return window_problem(self.window)

    def load(self, cache_dir: Path) -> ImageData:
        """Return the decoded splits; decoding happens once per machine."""
        problem = self.check()
        if problem is not None:
            raise DataError(f"data.{problem}")
        entries = {
            name: _entry(self, split, cache_dir, needs_labels=name != "public")
            for name, split in (
                ("pool", self.train_split),
                ("public", self.public_split),
                ("unseen", self.test_split),
            )
            if split is not None
        }
        classes = _classes(self, entries)
        sets = {name: _image_set(entry, classes) for name, entry in entries.items()}
        self._check_labels(classes, sets)
        return ImageData(classes, sets["pool"], sets.get("public"), sets.get("unseen"))

    def _check_labels(self, classes: tuple[str, ...], sets: Mapping[str, ImageSet]) -> None:
        labels = sets["pool"].labels
        missing = int((labels < 0).sum())
        if missing:
            raise DataError(
                f"data.label_column: {missing} of the {len(labels)} images of split {self.train_split} have "
                "no label (-1, null or NaN): remove them from the data set, or choose another column or split"
            )
        if len(np.unique(labels)) < 2:
            raise DataError(
                f"data.train_split: all images of split {self.train_split} have the class "
                f"{classes[labels[0]] if len(labels) else None}: a data set that is sorted by class must be "
                "shuffled before it is cut"
            )
        unseen = sets.get("unseen")
        if unseen is None:
            return
        hidden = int((unseen.labels < 0).sum())
        if hidden > 0:
            raise DataError(
                f"data.test_split: {hidden} of the {len(unseen)} images of split {self.test_split} "
                "have no label (hidden labels are -1) and cannot be evaluated: choose another split, or "
                "set data.test_split=null"
            )
        if len(np.unique(unseen.labels)) < 2:
            logger.warning(
                "data.test_split: all images of split %s have one class: accuracy on them says little",
                self.test_split,
            )


def _classes(settings: HuggingFaceSettings, entries: Mapping[str, Entry]) -> tuple[str, ...]:
    """Return the classes of the training split; the other splits have no others."""
    named: dict[str, list[str]] = {name: entry.index["classes"].tolist() for name, entry in entries.items()}
    classes = tuple(named["pool"])
    if len(classes) < 2:
        raise DataError(
            f"data.label_column: {settings.label_column} of {settings.dataset} has {len(classes)} classes "
            f"{list(classes)}, but 2 are needed: choose another column or another data.train_split"
        )
    for name, split in (("public", settings.public_split), ("unseen", settings.test_split)):
        strange = [label for label in named.get(name, []) if label not in classes]
        if strange:
            raise DataError(
                f"data.label_column: split {split} of {settings.dataset} has the class {strange[0]!r}, which "
                f"the training split {settings.train_split} lacks: it has {list(classes)}"
            )
    return classes


def _entry(settings: HuggingFaceSettings, split: str, cache_dir: Path, needs_labels: bool) -> Entry:
    values = asdict(settings)
    for name in ("train_split", "test_split", "public_split"):
        values.pop(name)
    stamp = json.dumps([FORMAT, values, split, _local_stamp(settings.dataset or "")], sort_keys=True)
    key = "hub-" + hashlib.blake2b(stamp.encode(), digest_size=12).hexdigest()
    return cached(cache_dir, key, lambda folder: _decode(settings, split, folder, needs_labels))


def _local_stamp(dataset: str) -> list[tuple[str | int, ...]]:
    """Return the files' stamps, so that a changed local data set is decoded again."""
    folder = Path(dataset)
    if not folder.is_dir():
        return []
    files = sorted(
        path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("cache-")
    )
    return [(str(path.relative_to(folder)), *stamp_of(path)) for path in files]


def _decode(
    settings: HuggingFaceSettings, split: str, folder: Path, needs_labels: bool
) -> Mapping[str, NDArray[np.generic]]:
    import datasets

    table = _table(settings, split)
    needed = [settings.image_column, settings.group_column, settings.label_column if needs_labels else None]
    for column in needed:
        if column is not None and column not in table.column_names:
            listed = ", ".join(f"{name} ({_kind(feature)})" for name, feature in table.features.items())
            raise DataError(f"{settings.dataset}, split {split}, has no column {column!r}: it has {listed}")
    if _kind(table.features[settings.image_column]) not in ("Image", "binary", "string", "large_binary"):
        images = [name for name, feature in table.features.items() if _kind(feature) == "Image"]
        raise DataError(
            f"data.image_column: {settings.image_column} of {settings.dataset} has no images: "
            f"{', '.join(images) or 'no column'} has some"
        )
    classes, labels = _labels(table, settings, split)
    groups = None if settings.group_column is None else [str(g) for g in table[settings.group_column]]
    table = table.cast_column(settings.image_column, datasets.Image(decode=False))

    def read(position: int) -> tuple[NDArray[np.uint8], Facts]:
        source = _source(table[position][settings.image_column])
        picture = settings.picture
        return read_with_facts(
            source, picture.size, settings.max_megapixels, picture.interpolation, picture.window
        )

    names = [f"{split}-{position}" for position in range(len(table))]
    readers = [lambda p=position: read(p) for position in range(len(table))]
    decoded = decode_into(folder, readers, names, settings.image_size)
    kept = decoded["kept"].astype(np.int64)
    index: dict[str, NDArray[np.generic]] = {
        "facts": decoded["facts"],
        "labels": labels[kept],
        "classes": np.asarray(classes, dtype=np.str_),
        "names": np.asarray(names, dtype=np.str_)[kept],
    }
    return index if groups is None else {**index, "groups": np.asarray(groups, dtype=np.str_)[kept]}


def _kind(feature: Any) -> str:
    return str(getattr(feature, "dtype", "") if type(feature).__name__ == "Value" else type(feature).__name__)


def _table(settings: HuggingFaceSettings, split: str) -> Any:
    """Load one split as a ``datasets.Dataset``."""
    import datasets
    from flwr_datasets import FederatedDataset

    name = settings.dataset or ""
    try:
        if (Path(name) / "dataset_dict.json").is_file() or (Path(name) / "state.json").is_file():
            saved = datasets.load_from_disk(name)
            splits = (
                saved if isinstance(saved, datasets.DatasetDict) else {str(saved.split or "train"): saved}
            )
            if split not in splits:
                raise ValueError(f"it has {', '.join(splits)}")
            return splits[split]
        if Path(name).is_dir():
            return datasets.load_dataset(name, settings.subset, split=split)
        source = FederatedDataset(
            dataset=name, subset=settings.subset, partitioners={}, shuffle=False, revision=settings.revision
        )
        return source.load_split(split)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"data.dataset: cannot load split {split!r} of {name}: {error}") from error


def _labels(table: Any, settings: HuggingFaceSettings, split: str) -> Labels:
    """Return class names (the column's own, else its sorted values) and labels (-1: unlabelled).

    Without a label column (an unlabelled public split), return no names and labels of -1.
    """
    import datasets

    column = settings.label_column
    if column not in table.column_names:
        return [], np.full(len(table), -1, dtype=np.int64)
    feature = table.features[column]
    names = feature.names if isinstance(feature, datasets.ClassLabel) else None
    return labels_of(list(table[column]), names, f"{column} of {settings.dataset}, split {split},")


def _source(cell: Mapping[str, Any] | None) -> str | IO[bytes]:
    """Return the bytes or the path of an undecoded image cell."""
    if cell is None:
        raise ValueError("no image")
    return io.BytesIO(cell["bytes"]) if cell.get("bytes") is not None else str(cell["path"])


def _image_set(entry: Entry, classes: Sequence[str]) -> ImageSet:
    groups = entry.index.get("groups")
    # -1 stays: the last one of the places
    places = np.asarray([*map(classes.index, entry.index["classes"].tolist()), -1], dtype=np.int64)
    return ImageSet(
        images=entry.images,
        labels=places[entry.index["labels"].astype(np.int64)],
        groups=None if groups is None else tuple(groups.tolist()),
        names=tuple(entry.index["names"].tolist()),
        hashes=entry.hashes,
        facts=entry.index["facts"].astype(np.float64),
    )
