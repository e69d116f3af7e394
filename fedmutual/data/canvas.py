"""Soft-edged shapes on a small canvas, from which the generated faces are drawn.

Pixels are computed with +, -, *, / and sqrt in float32 only. Every CPU rounds these alike, so a picture has
the same bytes, and a public set the same digest, on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Plane = NDArray[np.float32]
Colour = Sequence[float]


class Canvas:
    """A square picture; x (right) and y (down) run from -1 to 1.

    Parameters
    ----------
    size : int
        Side length in pixels.

    Attributes
    ----------
    rgb : float32 array [size, size, 3], 0 to 1
    x, y : float32 arrays [size, size]
    """

    def __init__(self, size: int) -> None:
        line = ((np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32(2 / size)) - np.float32(1)
        self.size = size
        self.x: Plane = np.broadcast_to(line, (size, size))
        self.y: Plane = np.broadcast_to(line[:, None], (size, size))
        self.rgb = np.zeros((size, size, 3), dtype=np.float32)

    def paint(self, cover: Plane, colour: Colour | NDArray[np.float32], shade: Plane | None = None) -> None:
        """Blend a colour (or picture) over the canvas with opacity ``cover``; ``shade`` multiplies it."""
        tone = np.asarray(colour, dtype=np.float32)
        layer = tone if shade is None else tone * shade[..., None]
        self.rgb += (layer - self.rgb) * cover[..., None]

    def turned(self, centre: tuple[float, float], angle: float, scale: float) -> Frame:
        """Return a frame with origin ``centre``, rotated by ``angle`` (radians) and scaled."""
        cos, sin = np.float32(math.cos(angle) / scale), np.float32(math.sin(angle) / scale)
        x, y = self.x - np.float32(centre[0]), self.y - np.float32(centre[1])
        return Frame(x * cos + y * sin, y * cos - x * sin, self.size / 2 * scale)


class Frame:
    """Coordinates of an object on a canvas: shapes in the object's own units.

    Parameters
    ----------
    u, v : float32 arrays [size, size]
        Right and down in the object's own frame.
    pixels : float
        Pixels per unit; sets how sharp an edge can be.
    """

    def __init__(self, u: Plane, v: Plane, pixels: float) -> None:
        self.u, self.v, self.pixels = u, v, pixels

    def radius(self, cu: float, cv: float, a: float, b: float) -> Plane:
        """Return the distance from (cu, cv) in units of the half-axes a and b: 1 on the ellipse."""
        du = (self.u - np.float32(cu)) * np.float32(1 / a)
        dv = (self.v - np.float32(cv)) * np.float32(1 / b)
        distance: Plane = np.sqrt(du * du + dv * dv)
        return distance

    def ellipse(self, cu: float, cv: float, a: float, b: float, soft: float = 1.0) -> Plane:
        """Return the cover of a filled ellipse; ``soft`` is the width of its edge in pixels."""
        return self.inside((1 - self.radius(cu, cv, a, b)) * np.float32(min(a, b)), soft)

    def box(self, cu: float, cv: float, a: float, b: float, soft: float = 1.0) -> Plane:
        """Return the cover of a filled rectangle with half-sides a and b."""
        du = np.float32(a) - np.abs(self.u - np.float32(cu))
        dv = np.float32(b) - np.abs(self.v - np.float32(cv))
        return self.inside(np.minimum(du, dv), soft)

    def line(self, start: tuple[float, float], end: tuple[float, float], width: float) -> Plane:
        """Return the cover of a straight stroke with round ends; ``width`` is half its thickness."""
        au, av = start
        du, dv = end[0] - au, end[1] - av
        length = du * du + dv * dv or 1.0
        pu, pv = self.u - np.float32(au), self.v - np.float32(av)
        along = np.clip(pu * np.float32(du / length) + pv * np.float32(dv / length), 0, 1)
        qu, qv = pu - along * np.float32(du), pv - along * np.float32(dv)
        return self.inside(np.float32(width) - np.sqrt(qu * qu + qv * qv), 1.0)

    def inside(self, distance: Plane, soft: float = 1.0) -> Plane:
        """Return the cover of the region where ``distance`` (in the frame's units) is positive."""
        cover: Plane = np.clip(distance * np.float32(self.pixels / soft) + np.float32(0.5), 0, 1)
        return cover
