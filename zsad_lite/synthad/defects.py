"""The seven kinds of defect of synthad, each with its exact mask: four painted on the surface, three of structure."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from scipy import ndimage

from zsad_lib.errors import DataError
from zsad_lite.synthad.canvas import Canvas, Dice, blend, cover, disc_distance, segment_distance, value_noise
from zsad_lite.synthad.scene import PALETTE, Category, Scene

MASK_THRESHOLD = 0.03  # a pixel is anomalous when the defect changes a channel by more than this
MASK_AREA = (0.0025, 0.20)  # accepted defect areas, as a fraction of the image
MASK_CONTRAST = 0.10  # at least a quarter of the mask must change by this much, or the defect is drawn again

# --- defects on the surface: painted over the finished picture -------------------------------------------------


def _place(d: Dice, region: np.ndarray) -> tuple[float, float]:
    """A point well inside the region (rejection sampling)."""
    n = region.shape[0]
    for _ in range(200):
        x, y = d.uniform(0.12, 0.88), d.uniform(0.12, 0.88)
        if region[int(y * n), int(x * n)] > 0.9:
            break
    return x, y


def _tint(d: Dice, contrast: float) -> np.ndarray:
    """What a surface defect adds to the colour: darker or lighter, a little coloured."""
    sign = -1.0 if d.uniform(0, 1) < 0.6 else 1.0
    return sign * contrast * np.array([d.uniform(0.7, 1.0) for _ in range(3)])


def _scratch(d: Dice, c: Canvas, picture: np.ndarray, region: np.ndarray, size: float, contrast: float) -> None:
    x, y = _place(d, region)
    dx, dy = d.uniform(-1, 1), d.uniform(-1, 1)
    norm = float(np.sqrt(dx * dx + dy * dy)) + 1e-9
    half = size * d.uniform(0.9, 1.4)
    dx, dy = dx / norm * half, dy / norm * half
    bow = d.uniform(-0.15, 0.15)
    mx, my = x - bow * dy, y + bow * dx
    near = np.minimum(segment_distance(c, x - dx, y - dy, mx, my), segment_distance(c, mx, my, x + dx, y + dy))
    alpha = cover(near - d.uniform(0.35, 0.8) * c.pixel, c.pixel) * region
    blend(picture, alpha, picture + _tint(d, contrast))


def _crack(d: Dice, c: Canvas, picture: np.ndarray, region: np.ndarray, size: float, contrast: float) -> None:
    x, y = _place(d, region)
    hx, hy = d.uniform(-1, 1), d.uniform(-1, 1)
    near = np.full((c.n, c.n), 9.0)
    for k in range(7):
        nx, ny = x + (hx + d.uniform(-0.9, 0.9)) * size * 0.3, y + (hy + d.uniform(-0.9, 0.9)) * size * 0.3
        near = np.minimum(near, segment_distance(c, x, y, nx, ny))
        if k in (2, 4):
            bx, by = nx + d.uniform(-0.5, 0.5) * size, ny + d.uniform(-0.5, 0.5) * size
            near = np.minimum(near, segment_distance(c, nx, ny, bx, by))
        x, y = nx, ny
    alpha = cover(near - 0.45 * c.pixel, c.pixel) * region
    blend(picture, alpha, picture * (1.0 - min(0.9, 1.6 * contrast)) - 0.1 * contrast)


def _hole(d: Dice, c: Canvas, picture: np.ndarray, region: np.ndarray, size: float, contrast: float) -> None:
    x, y = _place(d, region)
    ragged = 0.5 * size * (value_noise(d.grid(10, 10), c.x, c.y) - 0.5)
    gap = disc_distance(c, x, y, 0.35 * size) + ragged
    alpha = cover(gap, c.pixel) * region
    depth = np.clip(0.25 + 0.4 * (c.x - x + c.y - y) / size, 0.05, 0.5) + max(0.0, 0.35 - contrast)
    blend(picture, alpha, depth[:, :, None] * picture)


def _stain(d: Dice, c: Canvas, picture: np.ndarray, region: np.ndarray, size: float, contrast: float) -> None:
    x, y = _place(d, region)
    ragged = 1.1 * size * (value_noise(d.grid(7, 7), c.x, c.y) - 0.5)
    spot = disc_distance(c, x, y, 0.55 * size) + ragged
    alpha = cover(spot, 5.0 * c.pixel) * region
    blend(picture, alpha, picture + _tint(d, 0.75 * contrast))


SURFACE: dict[str, Callable] = {"scratch": _scratch, "crack": _crack, "hole": _hole, "stain": _stain}


# --- defects of structure: edits of the scene, locally normal ---------------------------------------------------


def edit_cells(d: Dice, scene: Scene, kind: str) -> Scene:
    rows, cols = scene.cells["on"].shape
    run = d.integer(1, scene.run)
    vertical = d.uniform(0, 1) < 0.5
    i, j = d.integer(1, max(1, rows - 2)), d.integer(1, max(1, cols - 2))
    spots = [((i + k) % rows, j) if vertical else (i, (j + k) % cols) for k in range(run)]
    cells = {k: v.copy() for k, v in scene.cells.items()}
    dx, dy = (s * d.uniform(0.05, 0.10) for s in (d.choice((-1, 1)), d.choice((-1, 1))))
    for spot in spots:
        if kind == "missing":
            cells["on"][spot] = 0.0
        elif kind == "misplaced":
            cells["dx"][spot], cells["dy"][spot] = dx, dy
        else:
            tints = len(scene.colours["tints"])
            cells["tint"][spot] = (cells["tint"][spot] + d.integer(1, tints - 1)) % tints
    return replace(scene, cells=cells)


def _differ(one, two) -> bool:
    return max(abs(a - b) for a, b in zip(one, two, strict=True)) > 0.25


def edit_parts(d: Dice, scene: Scene, kind: str) -> Scene:
    k = d.choice([k for k, p in enumerate(scene.parts) if p.fault])
    part = scene.parts[k]
    if kind == "missing":
        return replace(scene, parts=scene.parts[:k] + scene.parts[k + 1 :])
    if kind == "misplaced":
        reach = 0.5 * min(0.14, max(part.w, part.h) * 0.9) + 0.02
        dx, dy = d.choice((-1, 1)) * d.uniform(0.4, 1.0) * reach, d.choice((-1, 1)) * d.uniform(0.4, 1.0) * reach
        changed = replace(part, x=part.x + dx, y=part.y + dy, turns=part.turns + d.choice((0.0, 0.04, -0.04)))
    else:
        others = [p.colour for p in scene.parts if _differ(p.colour, part.colour)]
        others = others or [tone for tone in PALETTE.values() if _differ(tone, part.colour)]
        changed = replace(part, colour=d.choice(others))
    return replace(scene, parts=scene.parts[:k] + [changed] + scene.parts[k + 1 :])


STRUCTURE = ("missing", "misplaced", "colour")
DEFECTS = (*SURFACE, *STRUCTURE)


# --- one defect, and where it is -----------------------------------------------------------------------------


def damage(
    seed: str, defect: str, category: Category, canvas: Canvas, scene: Scene, normal: np.ndarray, region: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The normal picture with one defect [n, n, 3], and its mask [size, size] bool.

    Drawn again until the mask is neither tiny, huge nor faint.
    """
    for attempt in range(100):
        d = Dice(f"{seed}/{defect}/{attempt}")
        if defect in SURFACE:
            size, contrast = d.choice((0.09, 0.15, 0.24)), d.choice((0.13, 0.22, 0.38))
            picture = normal.copy()
            SURFACE[defect](d, canvas, picture, region, size, contrast)
        else:
            edit = edit_parts if scene.parts else edit_cells
            picture, _ = category.render(canvas, edit(d, scene, defect))
        change = np.abs(canvas.reduce(picture) - canvas.reduce(normal)).max(axis=2)
        changed = np.pad(change > MASK_THRESHOLD, 1, mode="edge")
        mask = ndimage.binary_closing(changed, np.ones((3, 3)))[1:-1, 1:-1]  # no pin-holes where both happen to agree
        count = int(np.count_nonzero(mask))
        strong = int(np.count_nonzero(change > MASK_CONTRAST))
        visible = 4 * strong >= count or attempt >= 50  # a scene may hold no strong contrast: then any will do
        if visible and MASK_AREA[0] * mask.size < count < MASK_AREA[1] * mask.size:
            return picture, mask
    raise DataError(f"no {defect} could be placed on the scene of {seed}")
