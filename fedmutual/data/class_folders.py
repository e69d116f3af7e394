"""Class folders: which names are one class, which are none, and what is said of the others."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedmutual.data.images import DataError, require_plain
from fedmutual.logs import shown

SPLITS = frozenset(
    (
        "train", "training", "test", "testing", "val", "valid", "validation", "public", "unseen", "images",
        "labels", "data",
    )
)  # fmt: skip


def class_name(folder: str) -> str:
    """Return the class of a folder's name, in one Unicode form: systems write "é" in two ways."""
    return unicodedata.normalize("NFC", folder)


def classes_of(parts: Mapping[Path, Sequence[str]], named: Sequence[str] | None) -> tuple[str, ...]:
    """Return the class names: those that are given, else the sorted ones of the first part with folders.

    Parameters
    ----------
    parts : Mapping[Path, Sequence[str]]
        The class folders in train, public and test, in this order.
    named : sequence of str or None
        ``data.classes``.

    Raises
    ------
    DataError
        Two folders look like one class, or a folder of a later part is no class of the first.
    """
    first, own = next(((part, names) for part, names in parts.items() if names), (Path(), ()))
    classes = tuple(map(class_name, sorted(set(map(class_name, own))) if named is None else named))
    require_plain(classes)
    for part, names in parts.items():
        _refuse_twins(part, names)
    if named is None:
        _refuse_likenesses(first, own)
    for part, names in parts.items():
        for name in names:
            if class_name(name) not in classes:
                raise DataError(_stranger(part / name, classes, named))
    return classes


def _refuse_twins(part: Path, folders: Sequence[str]) -> None:
    """Refuse two folders of one class."""
    known = Counter(map(class_name, folders))
    for name, count in known.items():
        if count > 1:
            raise DataError(
                f"{shown(part)} has {count} folders '{shown(name)}' that differ only in how letters are "
                "encoded (Unicode normal forms): put their images into one"
            )


def _refuse_likenesses(part: Path, folders: Sequence[str]) -> None:
    """Refuse names that only differ in case or in spaces around them."""
    known: dict[str, str] = {}
    for name in folders:
        other = known.setdefault(_key(name), name)
        if other != name:
            raise DataError(
                f"'{shown(part / other)}' and '{shown(part / name)}' differ only in case or spaces: put the "
                "images into one folder, or set data.classes if both are classes"
            )


def _stranger(folder: Path, classes: Sequence[str], named: Sequence[str] | None) -> str:
    """Describe a folder that is no class, and what it may be."""
    alike = [name for name in classes if _key(name) == _key(folder.name)]
    text = f"'{shown(folder)}' is not one of the classes {list(classes)}: "
    if alike:
        return f"{text}rename it to '{alike[0]}' (they differ only in case or spaces)"
    if folder.name.casefold() in SPLITS:
        return f"{text}it looks like a folder too many: move what is in it one level up"
    if named is not None:
        return f"{text}rename it or set data.classes"
    return (
        f"{text}rename or remove it, move what is in it one level up if it is no class, or set "
        f"data.classes=[{','.join([*classes, folder.name])}] if other sites have images of it"
    )


def refuse_splits(root: Path, folders: Sequence[str]) -> None:
    """Refuse folders that look like splits where class folders are expected.

    Raises
    ------
    DataError
        A folder is named as a split is.
    """
    wrong = [name for name in folders if name.casefold() in SPLITS]
    if wrong:
        raise DataError(
            f"data.root: {shown(root)} has a folder {shown(wrong[0])} among {len(folders)} that would be "
            "classes: put the images into train/<class>/, public/ and test/<class>/ (in lower case), or set "
            "data.root to the folder of classes"
        )


def _key(name: str) -> str:
    """What names that look alike have in common."""
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())
