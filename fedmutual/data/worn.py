"""Covers of the lower half of a generated face: several kinds of masks, and other objects."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedmutual.data.canvas import Colour, Plane
from fedmutual.data.portrait import HAIR, SKIN, Portrait

SURGICAL = (
    (0.62, 0.80, 0.90),
    (0.55, 0.76, 0.84),
    (0.90, 0.93, 0.95),
    (0.58, 0.80, 0.72),
    (0.93, 0.72, 0.76),
    (0.12, 0.12, 0.13),
    (0.13, 0.17, 0.30),
    (0.25, 0.33, 0.30),
)
FFP2 = ((0.93, 0.93, 0.92), (0.86, 0.87, 0.88), (0.30, 0.31, 0.33), (0.85, 0.80, 0.72))


def wear_mask(portrait: Portrait) -> None:
    """Draw a surgical, cloth, patterned or FFP2 mask; a few slip below the nose."""
    rng = portrait.rng
    kind = int(rng.choice(4, p=portrait.domain.masks))
    slipped = portrait.chance(0.03)
    top = portrait.within(0.30, 0.36) if slipped else portrait.within(-0.02, 0.16)
    cover = _mask_shape(portrait, top, narrow=kind == 3)
    _loops(portrait, top)
    _shadow(portrait, cover)
    shade = portrait.shade * np.float32(portrait.within(0.9, 1.08))
    if kind == 0:
        shade = shade * _pleats(portrait)
        portrait.canvas.paint(cover, portrait.near(SURGICAL, 0.04), shade)
    elif kind == 1:
        tone = portrait.near(SKIN + HAIR, 0.08) if portrait.chance(0.08) else portrait.colour()
        portrait.canvas.paint(cover, tone, shade * _seam(portrait, 0.12))
    elif kind == 2:
        portrait.canvas.paint(cover, _pattern(portrait), shade)
    else:
        portrait.canvas.paint(cover, portrait.near(FFP2, 0.03), shade * _seam(portrait, 0.25))
        if portrait.chance(0.3):
            portrait.canvas.paint(
                portrait.face.ellipse(portrait.within(0.1, 0.3), 0.6, 0.09, 0.09), (0.75, 0.76, 0.78)
            )


def occlude(portrait: Portrait) -> None:
    """Draw something else in front of the mouth (a hand, a cup, a microphone), or a mask on the chin."""
    kind = portrait.rng.random()
    if kind < 0.05:
        _hand(portrait)
    elif kind < 0.08:
        _cup(portrait)
    elif kind < 0.11:
        _microphone(portrait)
    elif kind < 0.13:
        _chin_mask(portrait)


def _mask_shape(portrait: Portrait, top: float, narrow: bool) -> Plane:
    """Return the mask's cover, from nose bridge to below the chin; its upper edge slopes to the ears."""
    face, head = portrait.face, portrait.head
    fall = np.float32(portrait.within(0.1, 0.45 if narrow else 0.3))
    bottom = portrait.within(0.88, 1.08)
    side = portrait.look.width * portrait.within(0.72, 0.86 if narrow else 0.98)
    upper = face.v - np.float32(top) - fall * face.u * face.u
    lower = np.float32(bottom) - face.v - np.float32(portrait.within(0.1, 0.7)) * face.u * face.u
    half = np.float32(side) - np.abs(face.u) - np.float32(0.25) * np.maximum(face.v - np.float32(0.5), 0)
    cover = face.inside(np.minimum(np.minimum(upper, lower), half), soft=1.2)
    return np.minimum(cover, head.inside(portrait.outline + np.float32(0.07)))


def _shadow(portrait: Portrait, cover: Plane) -> None:
    """Draw the mask's shadow on the skin: the same shape, shifted slightly down and up."""
    step = max(portrait.canvas.size // 32, 1)
    around = np.maximum(np.roll(cover, -step, axis=0), np.roll(cover, step, axis=0))
    dark = [c * 0.5 for c in portrait.look.skin]
    portrait.canvas.paint(around * np.float32(portrait.within(0.3, 0.8)), dark)


def _loops(portrait: Portrait, top: float) -> None:
    tone = (0.92, 0.92, 0.92) if portrait.chance(0.7) else (0.1, 0.1, 0.1)
    ear = portrait.look.width * 0.98
    for side in (-1, 1):
        edge = side * portrait.look.width * 0.8
        upper = portrait.face.line((edge, top + 0.2), (side * ear, portrait.within(-0.1, 0.0)), 0.014)
        lower = portrait.face.line((edge, 0.72), (side * ear, 0.18), 0.014)
        portrait.canvas.paint(np.maximum(upper, lower), tone)


def _pleats(portrait: Portrait) -> Plane:
    """Return three horizontal folds, as darker stripes."""
    folds = np.zeros_like(portrait.face.v)
    for height in (0.36, 0.5, 0.64):
        folds = np.maximum(folds, portrait.face.box(0, height, 0.55, 0.02, soft=2))
    return 1 - np.float32(portrait.within(0.05, 0.25)) * folds


def _seam(portrait: Portrait, strength: float) -> Plane:
    """Return a vertical seam in the middle and the shading of the curved cloth beside it."""
    away = np.abs(portrait.face.u)
    seam = (away < np.float32(0.025)).astype(np.float32)
    return 1 + np.float32(strength) * (np.float32(0.3) - away - seam)


def _pattern(portrait: Portrait) -> NDArray[np.float32]:
    """Return stripes, dots or checks in two colours, float32 [size, size, 3]."""
    first, second = (np.asarray(portrait.colour(), dtype=np.float32) for _ in range(2))
    frame = portrait.canvas.turned((0, 0), portrait.within(-1.6, 1.6), portrait.within(0.10, 0.22))
    u, v = frame.u - np.floor(frame.u), frame.v - np.floor(frame.v)
    kind = portrait.rng.integers(3)
    if kind == 0:
        second_here = u < np.float32(0.5)
    elif kind == 1:
        second_here = (u - np.float32(0.5)) ** 2 + (v - np.float32(0.5)) ** 2 < np.float32(0.1)
    else:
        second_here = (u < np.float32(0.5)) != (v < np.float32(0.5))
    return np.where(second_here[..., None], second, first)


def _hand(portrait: Portrait) -> None:
    """Draw the person's own hand: palm and fingers in the skin's colour."""
    side = 1 if portrait.chance(0.5) else -1
    place = (side * portrait.within(0.05, 0.3), portrait.within(0.5, 0.75))
    tone: Colour = [min(c * portrait.within(0.88, 1.1), 1) for c in portrait.look.skin]
    gap = [c * 0.6 for c in tone]
    paint, face = portrait.canvas.paint, portrait.face
    paint(face.ellipse(place[0] + side * 0.25, place[1] + 0.3, 0.3, 0.34), tone, portrait.shade)
    lean = portrait.within(0.1, 0.4)
    for finger in range(4):
        root = (place[0] + side * 0.3, place[1] + 0.05 + finger * 0.13)
        tip = (root[0] - side * portrait.within(0.5, 0.65), root[1] - lean)
        paint(face.line(root, tip, 0.085), gap)
        paint(face.line(root, tip, 0.07), tone)


def _cup(portrait: Portrait) -> None:
    tone, face = portrait.colour(), portrait.face
    u, v, width = portrait.within(-0.15, 0.15), portrait.within(0.75, 0.95), portrait.within(0.2, 0.32)
    portrait.canvas.paint(face.box(u, v, width, 0.33), tone)
    portrait.canvas.paint(face.ellipse(u, v - 0.33, width, 0.07), [c * 0.6 for c in tone])
    portrait.canvas.paint(face.line((u + 0.1, v + 0.1), (u + 0.6, v + 0.5), 0.12), portrait.look.skin)


def _microphone(portrait: Portrait) -> None:
    u, v = portrait.within(-0.2, 0.2), portrait.within(0.6, 0.8)
    face, dark = portrait.face, (0.16, 0.16, 0.18)
    portrait.canvas.paint(face.line((u, v), (u + portrait.within(-0.5, 0.5), 1.8), 0.09), (0.25, 0.25, 0.27))
    portrait.canvas.paint(face.ellipse(u, v, 0.17, 0.17), portrait.colour() if portrait.chance(0.3) else dark)


def _chin_mask(portrait: Portrait) -> None:
    """Draw a mask pulled down below the mouth; the face is uncovered."""
    cover = _mask_shape(portrait, portrait.within(0.68, 0.78), narrow=False)
    portrait.canvas.paint(cover, portrait.near(SURGICAL, 0.04), portrait.shade)
