"""Torch data sets of one's own code: ``data=custom data._target_=mypkg.my_data``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmutual.data.cache import FORMAT, cached, new_array
from fedmutual.data.decoding import to_rgb
from fedmutual.data.images import DataError, ImageData, ImageSet, empty_set
from fedmutual.settings import DataSettings, setting

PARTS = ("train", "public", "test")


@dataclass(kw_only=True)
class CustomSettings(DataSettings):
    """A function or class of one's own that returns the data sets.

    ``target(**arguments)`` returns a mapping, or an object with attributes: ``train``, optionally ``public``
    and ``test``, each with ``len`` and items ``(image, label)``, as torch's map-style data sets have; and
    optionally ``classes``, the class names. An image is a PIL picture, or a uint8 array or tensor [H, W],
    [H, W, 3] or [3, H, W]. A label is a position in the classes; None or -1 in ``public``: unlabelled.
    """

    version: str | None = setting(
        "name of the data's state: images are read once and cached under it. null: each process reads them"
    )
    target: str = setting("dotted path of the function, as `data._target_` gives it")
    arguments: dict[str, Any] = setting("its arguments, as `+data.NAME=VALUE` gives them")

    def load(self, cache_dir: Path) -> ImageData:
        """Call the function and read its data sets."""
        made = self._made()
        train = _part(made, "train")
        classes = _classes(made, train, self.target)
        sets = {
            name: self._read(name, part, len(classes), cache_dir)
            for name in PARTS
            if (part := _part(made, name)) is not None
        }
        return ImageData(
            classes=classes,
            pool=sets.get("train") or empty_set(self.image_size),
            public=sets.get("public"),
            unseen=sets.get("test"),
        )

    def _made(self) -> Any:
        from hydra.utils import get_method

        try:
            return get_method(self.target)(**self.arguments)
        except Exception as error:  # of somebody else's code
            raise DataError(
                f"data._target_: {self.target} raised {type(error).__name__}: {error}",
                "data._target_: this site's data sets cannot be read",
            ) from error

    def _read(self, name: str, part: Any, num_classes: int, cache_dir: Path) -> ImageSet:
        def build(folder: Path) -> Mapping[str, NDArray[np.generic]]:
            pixels = new_array(folder, len(part), self.image_size)
            return {"labels": fill(pixels)}

        def fill(pixels: NDArray[np.uint8]) -> NDArray[np.int64]:
            labels = np.empty(len(part), dtype=np.int64)
            for position in range(len(part)):
                pixels[position], labels[position] = self._item(name, part, position, num_classes)
            return labels

        names = tuple(f"{name}-{position}" for position in range(len(part)))
        if self.version is None:
            pixels = np.empty((len(part), self.image_size, self.image_size, 3), dtype=np.uint8)
            return ImageSet(pixels, fill(pixels), None, names)
        stamp = [FORMAT, self.target, repr(self.arguments), self.version, name, self.image_size, len(part)]
        key = f"custom-{hashlib.blake2b(json.dumps(stamp).encode(), digest_size=16).hexdigest()}"
        entry = cached(cache_dir, key, build)
        return ImageSet(entry.images, entry.index["labels"].astype(np.int64), None, names, entry.hashes)

    def _item(self, name: str, part: Any, position: int, num_classes: int) -> tuple[NDArray[np.uint8], int]:
        where = f"data._target_: {self.target}, {name}[{position}]"
        try:
            image, label = part[position]
            pixels = to_rgb(_picture(image), self.image_size)
            label = -1 if label is None else int(label)
        except Exception as error:  # of somebody else's code
            raise DataError(f"{where}: {type(error).__name__}: {error}") from error
        if not (0 <= label < num_classes or (name == "public" and label == -1)):
            raise DataError(f"{where} has the label {label}, not one of 0 to {num_classes - 1}")
        return pixels, label


def _part(made: Any, name: str) -> Any:
    return made.get(name) if isinstance(made, Mapping) else getattr(made, name, None)


def _classes(made: Any, train: Any, target: str) -> tuple[str, ...]:
    found: Sequence[str] | None = _part(made, "classes") or getattr(train, "classes", None)
    if found is None or len(found) < 2:
        raise DataError(
            f"data._target_: {target} names no two classes: return classes=[...], or a train data set "
            "that has them, beside train, public and test"
        )
    return tuple(map(str, found))


def _picture(image: Any) -> Any:
    from PIL import Image

    if isinstance(image, Image.Image):
        return image
    array = np.asarray(image)
    if array.ndim == 3 and array.shape[0] == 3 and array.shape[2] != 3:
        array = array.transpose(1, 2, 0)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3):
        raise ValueError(
            f"an image is {array.dtype} {list(array.shape)}, not uint8 [H, W], [H, W, 3] or [3, H, W]"
        )
    return Image.fromarray(np.ascontiguousarray(array))
