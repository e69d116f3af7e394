"""Image data sets from the Hugging Face hub, and local ones that ``datasets`` can load."""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from fedmutual.data.cache import FORMAT, Entry, cached
from fedmutual.data.decoding import Facts, PictureSettings, decode_into, read_with_facts, stamp_of
from fedmutual.data.depth import window_problem
from fedmutual.data.images import DataError, ImageData, ImageSet
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
        names: list[list[str]] = [entry.index["classes"].tolist() for entry in entries.values()]
        classes = tuple(sorted(names, key=len)[-1])
        if any(list(classes[: len(other)]) != other for other in names):
            raise DataError(f"the splits of {self.dataset} have different classes: {names}")
        if len(classes) < 2:
            raise DataError(
                f"data.label_column: {self.label_column} of {self.dataset} has {len(classes)} classes "
                f"{list(classes)}, but 2 are needed: choose another column or another data.train_split"
            )
        sets = {name: _image_set(entry) for name, entry in entries.items()}
        if bool((sets["pool"].labels < 0).any()):
            raise DataError(f"data.label_column: some images of split {self.train_split} have no label")
        hidden = int((sets["unseen"].labels < 0).sum()) if "unseen" in sets else 0
        if hidden > 0:
            raise DataError(
                f"data.test_split: {hidden} of the {len(sets['unseen'])} images of split {self.test_split} "
                "have no label (hidden labels are -1) and cannot be evaluated: choose another split, or "
                "set data.test_split=null"
            )
        return ImageData(classes, sets["pool"], sets.get("public"), sets.get("unseen"))


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
            raise DataError(
                f"{settings.dataset}, split {split}, has no column {column!r}: {table.column_names}"
            )
    classes, labels = _labels(table, settings.label_column)
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


def _table(settings: HuggingFaceSettings, split: str) -> Any:
    """Load one split as a ``datasets.Dataset``."""
    import datasets
    from flwr_datasets import FederatedDataset

    name = settings.dataset or ""
    try:
        if (Path(name) / "dataset_dict.json").is_file() or (Path(name) / "state.json").is_file():
            saved = datasets.load_from_disk(name)
            return saved[split] if isinstance(saved, datasets.DatasetDict) else saved
        if Path(name).is_dir():
            return datasets.load_dataset(name, settings.subset, split=split)
        source = FederatedDataset(
            dataset=name, subset=settings.subset, partitioners={}, shuffle=False, revision=settings.revision
        )
        return source.load_split(split)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"data.dataset: cannot load split {split!r} of {name}: {error}") from error


def _labels(table: Any, column: str) -> tuple[list[str], NDArray[np.int64]]:
    """Return class names (the column's own, else its sorted values) and labels (-1: unlabelled).

    Without a label column (an unlabelled public split), return no names and labels of -1.
    """
    import datasets

    if column not in table.column_names:
        return [], np.full(len(table), -1, dtype=np.int64)
    feature, values = table.features[column], list(table[column])
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names), np.asarray([-1 if v is None else v for v in values], dtype=np.int64)
    present = sorted({value for value in values if value is not None})
    place = {value: position for position, value in enumerate(present)}
    return [str(v) for v in present], np.asarray([place.get(v, -1) for v in values], dtype=np.int64)


def _source(cell: Mapping[str, Any] | None) -> str | IO[bytes]:
    """Return the bytes or the path of an undecoded image cell."""
    if cell is None:
        raise ValueError("no image")
    return io.BytesIO(cell["bytes"]) if cell.get("bytes") is not None else str(cell["path"])


def _image_set(entry: Entry) -> ImageSet:
    groups = entry.index.get("groups")
    return ImageSet(
        images=entry.images,
        labels=entry.index["labels"].astype(np.int64),
        groups=None if groups is None else tuple(groups.tolist()),
        names=tuple(entry.index["names"].tolist()),
        hashes=entry.hashes,
        facts=entry.index["facts"].astype(np.float64),
    )
