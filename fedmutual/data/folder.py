"""Images in one folder per class."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np

from fedmutual.data.class_folders import class_name, classes_of, refuse_splits
from fedmutual.data.decoding import (
    ImageFile,
    PictureSettings,
    decode_files,
    is_system,
    scan_images,
    skipped_text,
)
from fedmutual.data.depth import window_problem
from fedmutual.data.images import DataError, ImageData, ImageSet, empty_set
from fedmutual.logs import shown
from fedmutual.settings import setting

logger = logging.getLogger(__name__)

MASK_CLASSES = ("mask", "no_mask")


@dataclass(kw_only=True)
class FolderSettings(PictureSettings):
    """``ROOT/train/<class>/**``, optionally ``ROOT/public/`` and ``ROOT/test/<class>/**``.

    Without any of these folders, ``ROOT/<class>/**``.

    The public folder holds one folder per class, or unlabelled images directly. The name of a folder below
    the class is the natural id of its images (``ROOT/train/<class>/<id>/...``). A server with ``public``
    needs no ``train``.
    """

    root: str | None = setting("absolute path of the folder with train/, public/, test/")
    classes: list[str] | None = setting(
        "class names in order; null: sorted folder names of train, or of public without train"
    )

    def check(self) -> str | None:
        """Say what is wrong with ``root``, or None."""
        if self.classes is not None and len(set(self.classes)) != len(self.classes):
            return f"classes: {self.classes} has a duplicate"
        if self.classes is not None and len(self.classes) < 2:
            return f"classes: {self.classes} has fewer than 2 names: give the classes of all clients"
        return window_problem(self.window) or _root_problem(
            self.root, "train/<class>/ (and public/, test/<class>/)"
        )

    def count(self) -> tuple[int, int | None]:
        """Return the numbers of files in the pool and in the public folder; reject misplaced files."""
        _, listed = self._listed()
        pool, public = listed["train"], listed["public"]
        return 0 if pool is None else len(pool.files), None if public is None else len(public.files)

    def load(self, cache_dir: Path) -> ImageData:
        """Return the decoded folders; decoding happens once per machine."""
        classes, listed = self._listed()
        sets = {name: _decoded(part, classes, self, cache_dir) for name, part in listed.items()}
        return ImageData(
            classes=classes,
            pool=sets["train"] or empty_set(self.image_size),
            public=sets["public"],
            unseen=sets["test"],
        )

    def _listed(self) -> tuple[tuple[str, ...], dict[str, _Listing | None]]:
        """Return the classes and the files of each folder, without decoding any."""
        root = _root(self.check(), self.root)
        train, public, test = (root / name for name in ("train", "public", "test"))
        if not any(part.is_dir() for part in (train, public, test)) and len(_subfolders(root)) > 1:
            train = root  # nothing but a folder a class
            if self.classes is None:
                refuse_splits(root, _subfolders(root))
        elif not train.is_dir() and not public.is_dir():
            raise DataError(_no_part(root))
        public_flat = public.is_dir() and not _subfolders(public)
        classes = classes_of({part: _subfolders(part) for part in (train, public, test)}, self.classes)
        if len(classes) < 2:
            raise DataError(
                f"data.root: {root} has {len(classes)} class folders {list(classes)}, but 2 are needed: "
                "put images into train/<class>/, or set data.classes=[a,b] to the classes of all clients"
            )
        return classes, {
            "train": _labelled(train, classes),
            "public": _flat(public) if public_flat else _labelled(public, classes),
            "test": _labelled(test, classes),
        }


@dataclass(kw_only=True)
class FacemaskSettings(PictureSettings):
    """Photographs of two sources, ``ROOT/pool/{mask,no_mask}`` and ``ROOT/unseen/{mask,no_mask}``."""

    root: str | None = setting("absolute path of the folder with pool/ and unseen/")

    def check(self) -> str | None:
        """Say what is wrong with ``root``, or None."""
        return window_problem(self.window) or _root_problem(
            self.root, "pool/{mask,no_mask}/ and unseen/{mask,no_mask}/"
        )

    def count(self) -> tuple[int, int | None]:
        """Return the number of files in the pool."""
        return len(self._listed()["pool"].files), None

    def load(self, cache_dir: Path) -> ImageData:
        """Return the decoded photographs; decoding happens once per machine."""
        sets = {name: _decoded(part, MASK_CLASSES, self, cache_dir) for name, part in self._listed().items()}
        return ImageData(classes=MASK_CLASSES, pool=sets["pool"], public=None, unseen=sets.get("unseen"))

    def _listed(self) -> dict[str, _Listing]:
        root = _root(self.check(), self.root)
        folders = [root / name for name in ("pool", "unseen")]
        classes_of({folder: _subfolders(folder) for folder in folders}, MASK_CLASSES)
        parts = {folder.name: _labelled(folder, MASK_CLASSES) for folder in folders}
        listed = {name: part for name, part in parts.items() if part is not None}
        if "pool" not in listed:
            raise DataError(
                f"data.root: {root} has no pool folder: set it to the folder with pool/ and unseen/"
            )
        return listed


@dataclass(frozen=True)
class _Listing:
    """The files of one folder, sorted by name, with labels and natural ids."""

    folder: Path
    files: list[ImageFile]
    labels: np.ndarray[tuple[int], np.dtype[np.int64]]
    groups: tuple[str, ...] | None = None
    notice: str = ""  # what was skipped


def _root_problem(root: str | None, layout: str) -> str | None:
    if root is None:
        return f"root: no folder given: set data.root=DIR (or the node's data-dir) to a folder with {layout}"
    if not Path(root).is_dir():
        return f"root: {root} is not a folder: set data.root=DIR to a folder with {layout}"
    return None


def _root(problem: str | None, root: str | None) -> Path:
    if problem is not None or root is None:
        raise DataError(f"data.{problem}")
    return Path(root)


def _no_part(root: Path) -> str:
    """Say what is missing in a folder without images, and where it may be."""
    below = [name for name in _subfolders(root) if {"train", "public"} & set(_subfolders(root / name))]
    other = [name for name in _subfolders(root) if name.casefold() in ("train", "public")]
    text = f"data.root: {shown(root)} has neither a train nor a public folder: "
    if other:
        return f"{text}rename {shown(other[0])} to {other[0].lower()}"
    if below:
        return f"{text}did you mean {shown(root / below[0])}?"
    return f"{text}put images into train/<class>/"


def _subfolders(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not is_system(entry.name))


def _labelled(folder: Path, classes: Sequence[str]) -> _Listing | None:
    """List ``folder/<class>/**``; return None if the folder does not exist."""
    if not folder.is_dir():
        return None
    files, notice = _scanned(folder)
    loose = [file.path for file in files if "/" not in file.name]
    if loose:
        raise DataError(
            f"{shown(loose[0])} is outside the class folders: move it into one of {list(classes)}"
        )
    parts = [file.name.split("/") for file in files]
    labels = np.asarray([classes.index(class_name(part[0])) for part in parts], dtype=np.int64)
    groups = tuple(part[1] if len(part) > 2 else "" for part in parts)
    return _Listing(folder, files, labels, groups if any(groups) else None, notice)


def _flat(folder: Path) -> _Listing:
    files, notice = _scanned(folder)
    return _Listing(folder, files, np.full(len(files), -1, dtype=np.int64), notice=notice)


def _scanned(folder: Path) -> tuple[list[ImageFile], str]:
    """Return a folder's images, at least one, and a text about files of unsupported kinds (empty: none)."""
    scan = scan_images(folder)
    notice = skipped_text(folder, scan.skipped) if scan.skipped else ""
    if not scan.files:
        told = f" ({notice})" if notice else ""
        raise DataError(f"{folder} has no images: add some (jpg, png, ...), or remove the folder{told}")
    return scan.files, notice


@overload
def _decoded(
    listing: _Listing, classes: Sequence[str], settings: PictureSettings, cache_dir: Path
) -> ImageSet: ...
@overload
def _decoded(listing: None, classes: Sequence[str], settings: PictureSettings, cache_dir: Path) -> None: ...
def _decoded(
    listing: _Listing | None, classes: Sequence[str], settings: PictureSettings, cache_dir: Path
) -> ImageSet | None:
    if listing is None:
        return None
    files, labels, groups = listing.files, listing.labels, listing.groups
    present = np.bincount(labels[labels >= 0], minlength=len(classes))
    for name in (
        name for name, count in zip(classes, present, strict=True) if count == 0 and labels.max() >= 0
    ):
        logger.warning("%s has no images of class %s", listing.folder, name)
    # by class index, then name: equal folders give equal sets, however the class names sort
    order = np.lexsort((np.arange(len(files)), labels))
    entry, kept = decode_files(
        [files[i] for i in order],
        settings.image_size,
        cache_dir,
        settings.max_megapixels,
        listing.notice,
        settings.interpolation,
        settings.picture.window,
    )
    chosen = order[kept]
    return ImageSet(
        images=entry.images,
        labels=labels[chosen],
        groups=None if groups is None else tuple(groups[i] for i in chosen),
        names=tuple(files[i].name for i in chosen),
        hashes=entry.hashes,
        facts=entry.index["facts"].astype(np.float64),
    )
