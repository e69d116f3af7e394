"""Predict the classes of pictures with one model or an ensemble."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from fedmutual.data.decoding import MAX_MEGAPIXELS, to_rgb
from fedmutual.inference.pictures import find_pictures, read_pictures
from fedmutual.learning.evaluation import ensemble, predict
from fedmutual.models.stored import StoredModel


@dataclass(frozen=True, eq=False)
class Prediction:
    """The prediction for one picture.

    Attributes
    ----------
    path : Path
    probabilities : float array [C]
        Class probabilities of the model, or of the mean-logit ensemble of several.
    votes : int
        Number of models that agree with the ensemble's class.
    error : str
        Why the picture cannot be read; empty if it was read.
    """

    path: Path
    probabilities: NDArray[np.floating]
    votes: int
    error: str = ""


def predict_pictures(
    models: Sequence[StoredModel],
    paths: Sequence[Path],
    device: torch.device,
    batch_size: int = 32,
    max_megapixels: float = MAX_MEGAPIXELS,
) -> Iterator[Prediction]:
    """Yield predictions in order, a batch at a time; an unreadable picture has an error instead."""
    for stored in models:
        stored.model.to(device)
    for start in range(0, len(paths), batch_size):
        yield from _batch(models, paths[start : start + batch_size], batch_size, max_megapixels)


def predict_images(models: Sequence[StoredModel], images: Any) -> NDArray[np.floating]:
    """Return probabilities [n, C] of the models' ensemble.

    Parameters
    ----------
    models : sequence of StoredModel
    images : path, sequence of paths, or uint8 array [n, H, W, 3]

    Raises
    ------
    ValueError
        A picture cannot be read; the message names it and the reason.
    """
    if isinstance(images, np.ndarray):
        return _predict_arrays(models, images)
    names = [images] if isinstance(images, str | os.PathLike) else list(images)
    paths = find_pictures(os.fspath(name) for name in names)
    found = list(predict_pictures(models, paths, torch.device("cpu")))
    for prediction in found:
        if prediction.error:
            raise ValueError(f"{prediction.path}: {prediction.error}")
    return np.stack([prediction.probabilities for prediction in found])


def _predict_arrays(models: Sequence[StoredModel], images: NDArray[np.generic]) -> NDArray[np.floating]:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or len(images) == 0:
        raise ValueError(f"images: {images.dtype} {images.shape}, not uint8 [n, H, W, 3]")
    said = []
    for stored in models:
        wanted = stored.picture
        pixels = np.stack(
            [to_rgb(Image.fromarray(image), wanted.size, wanted.interpolation) for image in images]
        )
        said.append(predict(stored.model, torch.from_numpy(pixels).permute(0, 3, 1, 2), 32).numpy())
    return np.asarray(np.exp(ensemble(said)))


def _batch(
    models: Sequence[StoredModel], paths: Sequence[Path], batch_size: int, max_megapixels: float
) -> Iterator[Prediction]:
    inputs = list(dict.fromkeys(stored.picture for stored in models))
    pixels, kept, failures = read_pictures(paths, inputs, max_megapixels)
    found: dict[Path, Prediction] = {}
    if kept:
        said = [
            predict(m.model, torch.from_numpy(pixels[m.picture]).permute(0, 3, 1, 2), batch_size).numpy()
            for m in models
        ]
        together = ensemble(said)
        chosen = together.argmax(axis=1)
        votes = sum((log_p.argmax(axis=1) == chosen).astype(int) for log_p in said)
        for i, path in enumerate(kept):
            found[path] = Prediction(path, np.exp(together[i]), int(np.asarray(votes)[i]))
    for path in paths:
        yield found.get(path) or Prediction(path, np.zeros(0), 0, failures[path])
