"""Drawing primitives whose bytes do not depend on the machine.

Everything here is built from element-wise +, -, *, /, sqrt, floor, min, max and comparisons on float64 arrays,
which IEEE 754 fixes to the last bit. Library sines, exponentials, matrix products and vectorised sums are left
out on purpose: they differ between processors, and one unit in the last place is enough to flip a byte.
"""

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np

OVERSAMPLE = 2  # scenes are drawn this many times larger and averaged down, for smooth edges


class Dice:
    """Uniform random numbers from a text seed (PCG64 seeded by SHA-256), the same on every machine."""

    def __init__(self, seed: str):
        digest = hashlib.sha256(seed.encode()).digest()
        self.generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:8], "little")))

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * float(self.generator.random())

    def integer(self, low: int, high: int) -> int:
        """An integer in [low, high], both ends included."""
        return low + int(self.generator.random() * (high - low + 1))

    def choice(self, options: Iterable) -> Any:
        options = list(options)
        return options[self.integer(0, len(options) - 1)]

    def sample(self, options: Iterable, count: int) -> list:
        """``count`` different members of ``options``."""
        left = list(options)
        return [left.pop(self.integer(0, len(left) - 1)) for _ in range(count)]

    def grid(self, *shape: int) -> np.ndarray:
        """float64 uniform in [0, 1)."""
        return self.generator.random(shape)


class Canvas:
    """Pixel-centre coordinates ``x``, ``y`` in [0, 1] of an oversampled square image, and its pixel width."""

    def __init__(self, size: int):
        self.n = size * OVERSAMPLE
        ramp = (np.arange(self.n) + 0.5) / self.n
        self.x = np.ascontiguousarray(np.broadcast_to(ramp[None, :], (self.n, self.n)))
        self.y = np.ascontiguousarray(np.broadcast_to(ramp[:, None], (self.n, self.n)))
        self.pixel = 1.0 / size

    def reduce(self, picture: np.ndarray) -> np.ndarray:
        """Average OVERSAMPLE x OVERSAMPLE blocks: [n, n, C] -> [size, size, C]."""
        a = (picture[0::2, 0::2] + picture[1::2, 0::2]) * 0.5
        b = (picture[0::2, 1::2] + picture[1::2, 1::2]) * 0.5
        return (a + b) * 0.5


def wave(turns: Any) -> Any:
    """A sine of an angle in turns (error below 0.0011), from parabolas."""
    s = 2.0 * (turns - np.floor(turns)) - 1.0
    p = 4.0 * s * (1.0 - np.abs(s))
    return -(0.775 * p + 0.225 * p * np.abs(p))


def rotate(u: Any, v: Any, turns: float) -> tuple[Any, Any]:
    """Coordinates (u, v) turned by ``turns``; the approximate sine is normalised so that lengths stay."""
    s, c = float(wave(turns)), float(wave(turns + 0.25))
    norm = float(np.sqrt(s * s + c * c))
    s, c = s / norm, c / norm
    return c * u + s * v, c * v - s * u


def soften(t: np.ndarray) -> np.ndarray:
    return t * t * (3.0 - 2.0 * t)


def value_noise(lattice: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Smooth noise in [0, 1): ``lattice`` [rows, cols] interpolated at x, y in [0, 1] (clipped at the border)."""
    rows, cols = lattice.shape
    fy = np.clip(y, 0.0, 1.0) * (rows - 1.001)
    fx = np.clip(x, 0.0, 1.0) * (cols - 1.001)
    iy, ix = np.floor(fy).astype(np.int64), np.floor(fx).astype(np.int64)
    ty, tx = soften(fy - iy), soften(fx - ix)
    top = lattice[iy, ix] * (1.0 - tx) + lattice[iy, ix + 1] * tx
    bottom = lattice[iy + 1, ix] * (1.0 - tx) + lattice[iy + 1, ix + 1] * tx
    return top * (1.0 - ty) + bottom * ty


def cover(distance: np.ndarray, pixel: float) -> np.ndarray:
    """Coverage in [0, 1] of a shape whose signed distance (negative inside) is given in image units."""
    return np.clip(0.5 - distance / pixel, 0.0, 1.0)


def disc_distance(c: Canvas, x: float, y: float, radius: float) -> np.ndarray:
    dx, dy = c.x - x, c.y - y
    return np.sqrt(dx * dx + dy * dy) - radius


def box_distance(
    c: Canvas, x: float, y: float, w: float, h: float, turns: float = 0.0, corner: float = 0.0
) -> np.ndarray:
    """Rounded box centred at (x, y), full width ``w`` and height ``h``, turned by ``turns``."""
    u, v = rotate(c.x - x, c.y - y, turns)
    du, dv = np.abs(u) - (0.5 * w - corner), np.abs(v) - (0.5 * h - corner)
    ou, ov = np.maximum(du, 0.0), np.maximum(dv, 0.0)
    return np.sqrt(ou * ou + ov * ov) + np.minimum(np.maximum(du, dv), 0.0) - corner


def segment_distance(c: Canvas, x0: float, y0: float, x1: float, y1: float) -> np.ndarray:
    """Distance to the segment (x0, y0)-(x1, y1)."""
    ex, ey = x1 - x0, y1 - y0
    px, py = c.x - x0, c.y - y0
    t = np.clip((px * ex + py * ey) / (ex * ex + ey * ey + 1e-12), 0.0, 1.0)
    dx, dy = px - t * ex, py - t * ey
    return np.sqrt(dx * dx + dy * dy)


def blend(picture: np.ndarray, alpha: np.ndarray, colour: Any) -> None:
    """Paint ``colour`` (triple, or picture [n, n, 3]) over ``picture`` in place with coverage ``alpha`` [n, n]."""
    picture += alpha[:, :, None] * (np.asarray(colour, dtype=np.float64) - picture)


def photograph(c: Canvas, picture: np.ndarray, light: tuple, noise: np.ndarray) -> np.ndarray:
    """Uneven light (gain, gain across, gain down) and sensor noise [size, size, 3], then 8 bits: uint8 like noise."""
    gain, gx, gy = light
    shade = gain + gx * (c.x - 0.5) + gy * (c.y - 0.5)
    reduced = c.reduce(np.clip(picture, 0.0, 1.0) * shade[:, :, None]) + noise
    return np.floor(np.clip(reduced, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)
