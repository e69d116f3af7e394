"""What makes features of pictures, and the key under which they are cached."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedmutual.backbones.weights import Backbone

FORMAT = 1  # increase it when the same pictures get other features
Tell = Callable[[int, int], None]  # images that are done, and all of them


@dataclass(frozen=True)
class Trunk:
    """What makes features of pictures.

    Attributes
    ----------
    backbone : Backbone
    tune : str
        ``head``: features, float32 [n, F]; ``last``: the last stage's inputs, float16 [n, h, w, K].
    views : int
        Augmented views to compute instead of the plain pictures; 0: the plain pictures.
    """

    backbone: Backbone
    tune: str
    views: int = 0

    def key(self, hashes: NDArray[np.uint8]) -> str:
        """Return the cache key of the features of pictures with these hashes."""
        backbone = self.backbone
        what = [FORMAT, backbone.digest, backbone.architecture, backbone.picture.size, backbone.mean]
        what += [backbone.std, self.tune, self.views, hashes.shape]
        state = hashlib.blake2b(json.dumps(what).encode(), digest_size=16)
        state.update(hashes.tobytes())
        return f"features-{state.hexdigest()}"
