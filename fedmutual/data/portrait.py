"""One generated portrait: a head in some pose and light, with or without a mask."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedmutual.data.canvas import Canvas, Colour, Frame, Plane

RNG = np.random.Generator

SKIN = (
    (0.96, 0.80, 0.69),
    (0.90, 0.70, 0.56),
    (0.80, 0.58, 0.43),
    (0.65, 0.45, 0.32),
    (0.48, 0.32, 0.22),
    (0.38, 0.25, 0.18),
)
HAIR = (
    (0.08, 0.06, 0.05),
    (0.22, 0.14, 0.09),
    (0.42, 0.27, 0.15),
    (0.72, 0.55, 0.32),
    (0.58, 0.57, 0.56),
    (0.45, 0.18, 0.10),
)


@dataclass(frozen=True)
class Domain:
    """The appearance of one source of pictures: ranges (low, high) to draw from, and probabilities.

    Parameters
    ----------
    scale, turn, shift, yaw : float ranges
        Head size, roll in radians, offset of the head, sideways turn of the face.
    light, contrast, warmth, side_light : float ranges
        Gain, tone curve, red-blue balance, light from one side.
    blur, noise : float ranges
        Blur radius as a share of the image side; noise standard deviation in grey levels.
    busy : float range
        Number of shapes in the background.
    plain : float
        Probability of a plain background.
    masks : weights of surgical, cloth, patterned, ffp2 masks
    """

    scale: tuple[float, float]
    turn: tuple[float, float]
    shift: tuple[float, float]
    yaw: tuple[float, float]
    light: tuple[float, float]
    contrast: tuple[float, float]
    warmth: tuple[float, float]
    side_light: tuple[float, float]
    blur: tuple[float, float]
    noise: tuple[float, float]
    busy: tuple[float, float]
    plain: float
    masks: tuple[float, float, float, float]


@dataclass(frozen=True)
class Look:
    """The features of a person that do not depend on what is worn."""

    skin: Colour
    hair: Colour
    width: float
    jaw: float
    light: tuple[float, float]


class Portrait:
    """A face, drawn part by part; all random choices come from its own generator."""

    def __init__(self, rng: RNG, domain: Domain, size: int) -> None:
        self.rng, self.domain = rng, domain
        self.canvas = Canvas(size)
        centre = (self.span(domain.shift), self.span(domain.shift) * 0.8 + 0.05)
        self.head = self.canvas.turned(centre, self.span(domain.turn), self.span(domain.scale))
        self.look = Look(
            skin=self.near(SKIN, 0.04),
            hair=self.near(HAIR, 0.03),
            width=self.within(0.66, 0.80),
            jaw=self.within(0.10, 0.34),
            light=(self.span(domain.side_light), self.within(-0.15, 0.1)),
        )
        self.face = self._face_frame(self.span(domain.yaw))
        self.outline = self._outline()
        self.shade = self._shade()

    # random choices

    def within(self, low: float, high: float) -> float:
        return float(low + (high - low) * self.rng.random())

    def span(self, limits: tuple[float, float]) -> float:
        return self.within(*limits)

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def near(self, palette: tuple[Colour, ...], spread: float) -> Colour:
        base = palette[int(self.rng.integers(len(palette)))]
        return tuple(min(max(c + self.within(-spread, spread), 0.0), 1.0) for c in base)

    def colour(self) -> Colour:
        grey = self.within(0.1, 0.9)
        return tuple(0.2 * grey + 0.8 * self.within(0.05, 0.95) for _ in range(3))

    # geometry

    def _face_frame(self, yaw: float) -> Frame:
        """Return the features' frame: as the head turns, they shift, most in the middle, not at the rim."""
        u, v = self.head.u, self.head.v
        bulge = np.maximum(1 - u * u * np.float32(1.2), 0)
        return Frame(u - np.float32(yaw) * bulge, v, self.head.pixels)

    def _outline(self) -> Plane:
        """Return the signed distance to the rim of the face; the jaw narrows towards the chin."""
        u, v = self.head.u, self.head.v
        low = np.maximum(v, 0)
        half = np.float32(self.look.width) * (1 - np.float32(self.look.jaw) * low * low)
        du, dv = u / np.maximum(half, np.float32(0.1)), v * np.float32(1 / 0.98)
        distance: Plane = (1 - np.sqrt(du * du + dv * dv)) * np.float32(self.look.width)
        return distance

    def _shade(self) -> Plane:
        """Return the shading: light from one side, darker towards the rim."""
        lu, lv = self.look.light
        rim = 1 - np.clip(self.outline * 2, 0, 1)
        light = 1 + np.float32(lu) * self.head.u + np.float32(lv) * self.head.v - np.float32(0.28) * rim * rim
        shade: Plane = np.clip(light, np.float32(0.25), np.float32(1.5))
        return shade

    # parts

    def background(self) -> None:
        from PIL import Image

        if self.chance(self.domain.plain):
            grid = np.broadcast_to(np.asarray(self.colour()) * 255, (2, 2, 3))
            grid = grid + self.rng.uniform(-18, 18, (2, 2, 3))
        else:
            side = int(self.rng.integers(2, 8))
            grey = self.rng.uniform(-80, 80, (side, side, 1))
            grid = np.asarray(self.colour()) * 255 + grey + self.rng.uniform(-35, 35, (side, side, 3))
        small = Image.fromarray(np.clip(grid, 0, 255).astype(np.uint8))
        size = (self.canvas.size, self.canvas.size)
        smooth = np.asarray(small.resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
        self.canvas.rgb[:] = smooth * np.float32(1 / 255)
        for _ in range(int(self.span(self.domain.busy))):
            place = (self.within(-1.2, 1.2), self.within(-1.2, 1.2))
            frame = self.canvas.turned(place, self.within(-1.6, 1.6), 1.0)
            a, b = self.within(0.05, 0.7), self.within(0.05, 0.4)
            shape = frame.box if self.chance(0.6) else frame.ellipse
            self.canvas.paint(shape(0, 0, a, b) * np.float32(self.within(0.4, 1)), self.colour())

    def body(self) -> None:
        """Draw back hair, neck, ears and clothes."""
        head, paint = self.head, self.canvas.paint
        length = self.within(0.9, 2.2) if self.chance(0.45) else 0.0
        if length:
            paint(
                head.box(0, length / 2 - 0.2, self.look.width * 1.12, length / 2, soft=4),
                self.look.hair,
                self.shade,
            )
        shadow = [c * 0.72 for c in self.look.skin]
        paint(head.box(0, 1.1, self.look.width * 0.55, 0.6), shadow)
        paint(head.ellipse(0, 2.05, self.within(1.2, 1.7), self.within(0.85, 1.0)), self.colour())
        for side in (-1, 1):
            paint(head.ellipse(side * self.look.width * 1.0, 0.08, 0.11, 0.2), shadow)
        if self.chance(0.20):  # a scarf around the neck, below the mouth
            paint(head.ellipse(0, 1.25, self.within(0.6, 0.9), self.within(0.28, 0.38)), self.colour())

    def skin(self) -> None:
        paint, face = self.canvas.paint, self.face
        paint(self.head.inside(self.outline), self.look.skin, self.shade)
        dark = [c * 0.62 for c in self.look.skin]
        flush = [min(c * f, 1) for c, f in zip(self.look.skin, (1.05, 0.86, 0.84), strict=True)]
        for side in (-1, 1):
            paint(face.ellipse(side * 0.36, 0.30, 0.2, 0.16, soft=6) * np.float32(0.35), flush, self.shade)
            paint(face.line((side * 0.08, -0.05), (side * 0.10, 0.25), 0.02) * np.float32(0.35), dark)
        paint(face.ellipse(0, 0.27, 0.13, 0.07, soft=3) * np.float32(0.5), dark)
        paint(
            face.ellipse(0, 0.20, 0.07, 0.12, soft=4) * np.float32(0.4),
            [min(c * 1.15, 1) for c in self.look.skin],
        )

    def eyes(self) -> None:
        paint, face = self.canvas.paint, self.face
        height, gaze = self.within(0.03, 0.085), self.within(-0.04, 0.04)
        lift = self.within(-0.37, -0.27)
        iris = self.near(((0.15, 0.09, 0.05), (0.25, 0.38, 0.5), (0.25, 0.35, 0.2)), 0.03)
        socket = [c * 0.75 for c in self.look.skin]
        for side in (-1, 1):
            cu = side * 0.31
            paint(face.ellipse(cu, -0.13, 0.2, 0.13, soft=5) * np.float32(0.5), socket, self.shade)
            paint(face.ellipse(cu, -0.12, 0.13, height), (0.93, 0.92, 0.9), self.shade)
            paint(face.ellipse(cu + gaze, -0.12, 0.06, min(height, 0.06)), iris)
            tilt = self.within(-0.03, 0.05)
            paint(
                face.line(
                    (cu - side * 0.14, lift + tilt), (cu + side * 0.15, lift - tilt), self.within(0.02, 0.045)
                ),
                self.look.hair,
            )

    def mouth(self) -> None:
        paint, face = self.canvas.paint, self.face
        width, open_ = self.within(0.17, 0.30), self.within(0.0, 0.13) if self.chance(0.4) else 0.0
        lips = [min(c * f, 1) for c, f in zip(self.look.skin, (0.86, 0.58, 0.58), strict=True)]
        thick = self.within(0.03, 0.065)
        paint(face.ellipse(0, 0.52, width, thick + open_), lips, self.shade)
        if open_ > 0.03:
            teeth = self.chance(0.6)
            paint(
                face.ellipse(0, 0.52, width * 0.85, open_),
                (0.93, 0.92, 0.88) if teeth else (0.25, 0.08, 0.08),
            )
        else:
            paint(face.line((-width, 0.52), (width, 0.52), 0.012), [c * 0.5 for c in lips])

    def beard(self) -> None:
        """Draw a full beard (mouth left free), a moustache or stubble."""
        kind = self.rng.random()
        if kind > 0.30:
            return
        paint, face = self.canvas.paint, self.face
        inside = self.head.inside(self.outline)
        if kind < 0.17:
            strength = np.float32(self.within(0.35, 1.0))
            top = np.float32(self.within(0.2, 0.45)) - np.abs(face.u) * np.float32(self.within(-0.3, 0.3))
            cover = inside * face.inside(face.v - top, soft=4)
            grow = self.head.ellipse(0, 0.85, self.look.width * 0.75, self.within(0.2, 0.45), soft=3)
            paint(np.maximum(cover, grow) * strength, self.look.hair, self.shade)
            paint(face.ellipse(0, 0.5, self.within(0.2, 0.3), 0.1, soft=3), self.look.skin, self.shade)
        if kind < 0.24:
            paint(face.ellipse(0, 0.39, self.within(0.2, 0.32), 0.055), self.look.hair, self.shade)
        else:
            paint(
                face.ellipse(0, 0.78, self.within(0.1, 0.25), self.within(0.1, 0.2)),
                self.look.hair,
                self.shade,
            )

    def hair(self) -> None:
        """Draw front hair, a cap, a head scarf, or nothing."""
        head, paint, kind = self.head, self.canvas.paint, self.rng.random()
        width = self.look.width
        if kind < 0.08:
            return
        skull = head.ellipse(0, -0.12, width * 1.12, 0.98)
        top = self.within(-0.62, -0.42)
        line = np.float32(top) + head.u * np.float32(self.within(-0.35, 0.35))
        if kind < 0.70:
            curve = head.u * head.u * np.float32(self.within(-0.2, 1.0))
            paint(skull * head.inside(line + curve - head.v, soft=2.5), self.look.hair, self.shade)
        elif kind < 0.84:  # cap or hat, sometimes with a brim
            paint(
                head.ellipse(0, -0.25, width * 1.12, 0.88) * head.inside(line - head.v),
                self.colour(),
                self.shade,
            )
            if self.chance(0.6):
                paint(head.ellipse(0, top, width * 1.15, 0.1), self.colour())
        else:  # head scarf: all around the face
            opening = head.ellipse(0, 0.08, width * self.within(0.78, 0.92), self.within(0.72, 0.88))
            cloth = np.maximum(
                head.ellipse(0, -0.05, width * 1.2, 1.1), head.box(0, 1.1, width * 1.0, 0.6, soft=5)
            )
            paint(cloth * (1 - opening), self.colour(), self.shade)

    def glasses(self) -> None:
        if not self.chance(0.25):
            return
        paint, face = self.canvas.paint, self.face
        a, b, dark = self.within(0.17, 0.23), self.within(0.12, 0.2), self.chance(0.35)
        frame = self.near(((0.05, 0.05, 0.05), (0.4, 0.3, 0.2), (0.6, 0.6, 0.6)), 0.05)
        for side in (-1, 1):
            lens, rim = (
                face.ellipse(side * 0.31, -0.11, a, b),
                face.ellipse(side * 0.31, -0.11, a + 0.03, b + 0.03),
            )
            paint(rim - lens, frame)
            if dark:
                paint(lens * np.float32(0.9), (0.08, 0.08, 0.1))
            paint(face.line((side * (0.31 + a), -0.13), (side * self.look.width, -0.08), 0.015), frame)
        paint(face.line((-0.1, -0.12), (0.1, -0.12), 0.018), frame)
