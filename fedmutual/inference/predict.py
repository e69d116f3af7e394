"""Classes of pictures, from one model or from several together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fedmutual.inference.pictures import read_pictures
from fedmutual.learning.evaluation import ensemble, predict
from fedmutual.models.stored import StoredModel


@dataclass(frozen=True, eq=False)
class Prediction:
    """What the models say of one picture.

    Attributes
    ----------
    path : Path
    probabilities : float array [C]
        Of the model, or of the mean-logit ensemble of several.
    votes : int
        Models whose own most probable class is that of the ensemble.
    error : str
        Why the picture cannot be read; empty where it was.
    """

    path: Path
    probabilities: NDArray[np.floating]
    votes: int
    error: str = ""


def predict_pictures(
    models: Sequence[StoredModel], paths: Sequence[Path], device: torch.device, batch_size: int = 32
) -> Iterator[Prediction]:
    """Predict pictures in order, a batch at a time; an unreadable one comes with its error and no figures."""
    for stored in models:
        stored.model.to(device)
    for start in range(0, len(paths), batch_size):
        yield from _batch(models, paths[start : start + batch_size], batch_size)


def _batch(models: Sequence[StoredModel], paths: Sequence[Path], batch_size: int) -> Iterator[Prediction]:
    pixels, kept, failures = read_pictures(paths, sorted({stored.image_size for stored in models}))
    found: dict[Path, Prediction] = {}
    if kept:
        said = [
            predict(m.model, torch.from_numpy(pixels[m.image_size]).permute(0, 3, 1, 2), batch_size).numpy()
            for m in models
        ]
        together = ensemble(said)
        chosen = together.argmax(axis=1)
        votes = sum((log_p.argmax(axis=1) == chosen).astype(int) for log_p in said)
        for i, path in enumerate(kept):
            found[path] = Prediction(path, np.exp(together[i]), int(np.asarray(votes)[i]))
    for path in paths:
        yield found.get(path) or Prediction(path, np.zeros(0), 0, failures[path])
