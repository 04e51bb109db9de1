"""What is common to the categories of synthad: a Scene of Parts, the palette, and how parts and backdrops are painted.

A Scene is everything random about one image, so that a defect is a small edit of a Scene followed by the same
drawing: the pixels that change are the exact mask. Lengths are fractions of the image side, colours RGB in [0, 1].
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from zsad_lite.synthad.canvas import Canvas, Dice, blend, box_distance, cover, disc_distance, value_noise

PALETTE = {
    "red": (0.74, 0.17, 0.15), "orange": (0.87, 0.48, 0.14), "yellow": (0.88, 0.77, 0.24),
    "green": (0.20, 0.52, 0.27), "teal": (0.13, 0.50, 0.52), "blue": (0.17, 0.32, 0.67),
    "purple": (0.46, 0.26, 0.58), "pink": (0.86, 0.52, 0.60), "brown": (0.44, 0.29, 0.18),
    "cream": (0.88, 0.82, 0.68), "white": (0.92, 0.92, 0.90), "grey": (0.54, 0.55, 0.56),
    "black": (0.14, 0.14, 0.15),
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """One drawn piece."""

    shape: str  # "disc" (w is its diameter) or "box"
    x: float
    y: float
    w: float
    h: float
    colour: tuple
    turns: float = 0.0
    corner: float = 0.0
    fault: bool = True  # whether it may be missing, misplaced or of the wrong colour


@dataclass(frozen=True)
class Scene:
    words: dict[str, str]  # attribute -> word, for the caption
    colours: dict[str, tuple]
    parts: list[Part] = field(default_factory=list)
    cells: dict[str, np.ndarray] = field(default_factory=dict)  # tables [rows, cols] of a grid: on, dx, dy, tint
    run: int = 1  # how many neighbouring cells a defect of structure takes at most
    data: dict = field(default_factory=dict)  # everything else the drawing needs


Rendering = tuple[np.ndarray, np.ndarray]  # picture [n, n, 3], and the region [n, n] of surface defects


@dataclass(frozen=True)
class Category:
    name: str
    group: str  # "A" or "B"
    kind: str  # "texture" or "object"
    sample: Callable[[Dice], Scene]
    render: Callable[[Canvas, Scene], Rendering]

    @property
    def noun(self) -> str:
        return self.name.replace("_", " ")


def tone_of(d: Dice, word: str, spread: float = 0.08) -> tuple:
    """A palette colour with a little variation of brightness and of each channel."""
    gain = d.uniform(1.0 - spread, 1.0 + spread)
    return tuple(min(1.0, max(0.0, v * gain + d.uniform(-0.03, 0.03))) for v in PALETTE[word])


def part_distance(c: Canvas, p: Part) -> np.ndarray:
    """Signed distance [n, n] to the outline of a part, negative inside."""
    if p.shape == "box":
        return box_distance(c, p.x, p.y, p.w, p.h, p.turns, p.corner)
    return disc_distance(c, p.x, p.y, 0.5 * p.w)


def paint(c: Canvas, picture: np.ndarray, p: Part, bevel: float = 0.25) -> np.ndarray:
    """Draw one part, lit from the top left. Returns its coverage [n, n]."""
    alpha = cover(part_distance(c, p), c.pixel)
    reach = max(p.w, p.h if p.shape == "box" else p.w) + 1e-9
    light = 1.0 - bevel * np.clip((c.x - p.x + c.y - p.y) / reach, -1.0, 1.0)
    blend(picture, alpha, light[:, :, None] * np.asarray(p.colour))
    return alpha


def paint_parts(c: Canvas, picture: np.ndarray, scene: Scene) -> np.ndarray:
    """Draw every part. Returns the coverage of all of them [n, n]."""
    covered = np.zeros((c.n, c.n))
    for part in scene.parts:
        covered = np.maximum(covered, paint(c, picture, part))
    return covered


def sample_backdrop(d: Dice, words: tuple[str, ...]) -> tuple[str, dict]:
    """The word of its colour, and what `paint_backdrop` needs."""
    word = d.choice(words)
    return word, {"colour": tone_of(d, word), "grain": d.grid(9, 9), "spread": d.uniform(0.05, 0.16)}


def paint_backdrop(c: Canvas, b: dict) -> np.ndarray:
    shade = 1.0 + b["spread"] * (value_noise(b["grain"], c.x, c.y) - 0.5) * 2.0
    return shade[:, :, None] * np.asarray(b["colour"])


def grid_cells(rows: int, cols: int, tint: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """The cells of a Scene, all in place."""
    zeros = np.zeros((rows, cols))
    tint = zeros.astype(np.int64) if tint is None else tint
    return {"on": np.ones((rows, cols)), "dx": zeros, "dy": zeros.copy(), "tint": tint}


def whole(c: Canvas) -> np.ndarray:
    """The region of a picture that is surface everywhere."""
    return np.ones((c.n, c.n))
