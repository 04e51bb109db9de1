"""Pictures in general: random textures and arrangements of shapes, as many as wanted, none of them of a product.

What Stable Diffusion has from the photographs of the web: a notion of what pictures look like, which carries over to
products never seen. A model trained on one group of synthad learns from these besides. They share its drawing
primitives (see ``canvas``), not its scenes: nothing here knows a category, its colours or its parts.
"""

import numpy as np

from zsad_lite.synthad.canvas import (
    Canvas,
    Dice,
    blend,
    box_distance,
    cover,
    disc_distance,
    photograph,
    rotate,
    value_noise,
    wave,
)

SHAPES = ("disc", "box", "ring", "square", "tile")
LATTICES = ((8, 8), (20, 20), (48, 48), (60, 4), (40, 8), (30, 3), (64, 64))


def draw(seed: str, size: int = 64) -> np.ndarray:
    """One picture, uint8 [size, size, 3]; the same seed (any text) gives the same bytes on every machine."""
    d, canvas = Dice(f"pictures/{seed}"), Canvas(size)
    light = (d.uniform(0.85, 1.08), d.uniform(-0.22, 0.22), d.uniform(-0.22, 0.22))
    grain, kind = d.uniform(0.0, 0.03), d.uniform(0, 1)
    picture = _leaves(d, canvas) if kind < 0.08 else _texture(d, canvas)
    for _ in range((kind > 0.5) + (kind > 0.8)):
        _arrange(d, canvas, picture)
    noise = grain * (d.grid(size, size, 3) + d.grid(size, size, 3) - 1.0)
    return photograph(canvas, picture, light, noise)


def draw_surface(seed: str, size: int = 64) -> np.ndarray:
    """A bare surface under uneven light, uint8 [size, size, 3]: bands of shading, streaks along it, brighter or darker
    edges, grain; grey or almost. What cameras above a production line see most of the time."""
    d, c = Dice(f"surfaces/{seed}"), Canvas(size)
    u, v = rotate(c.x - 0.5, c.y - 0.5, d.choice((0, 0, 0.25, d.uniform(0, 1))))
    u, v = 0.7 * u + 0.5, 0.7 * v + 0.5
    relief = d.uniform(0.1, 0.7) * (value_noise(d.grid(d.integer(2, 3), d.integer(2, 5)), u, v) - 0.5)
    for _ in range(d.integer(1, 3)):
        streaks = value_noise(d.grid(d.integer(2, 6), d.integer(10, 70)), u, v)
        relief += d.uniform(0.02, 0.25) * (streaks - 0.5)
    relief += d.uniform(0.0, 0.15) * (value_noise(d.grid(40, 40), u, v) - 0.5)
    for distance in (c.x, 1 - c.x):
        reach = d.uniform(0.03, 0.25)
        relief += d.uniform(-0.7, 0.7) * _often(d, 0.6) * np.clip(1 - distance / reach, 0, 1) ** 2
    tint = 1 + d.choice((0, 0, 0.06)) * (d.grid(3) - 0.5)
    picture = d.uniform(0.12, 0.7) * (1 + relief)[:, :, None] * tint
    grain, light = d.uniform(0, 0.03), (1.0, d.uniform(-0.2, 0.2), d.uniform(-0.2, 0.2))
    return photograph(c, picture, light, grain * (d.grid(size, size, 1) + d.grid(size, size, 1) - 1.0))


def _often(d: Dice, chance: float) -> bool:
    return d.uniform(0, 1) < chance


def _colour(d: Dice) -> np.ndarray:
    grey, spread = d.uniform(0.12, 0.92), d.uniform(0, 0.45)
    return np.clip(np.array([grey + spread * d.uniform(-1, 1) for _ in range(3)]), 0.05, 0.95)


# --- textures: a number in [0, 1] for every pixel -----------------------------------------------------------------


def _grid(d: Dice, c: Canvas, few: float, many: float):
    """Coordinates counted in cells (turned, stretched, sometimes bent), and how many cells the image is wide."""
    turns = d.uniform(0, 1) if _often(d, 0.6) else d.choice((0, 0.25, 0.125))
    u, v = rotate(c.x - 0.5, c.y - 0.5, turns)
    count = few / (1 - (1 - few / many) * d.uniform(0, 1))
    u, v = u * count + d.uniform(40, 41), v * count * d.uniform(0.5, 1.6) + d.uniform(40, 41)
    if _often(d, 0.5):
        bend = d.uniform(0, 0.5)
        u, v = (w + bend * value_noise(d.grid(4, 4), c.x, c.y) for w in (u, v))
    return u, v, count


def _shading(d: Dice, c: Canvas):
    return value_noise(d.grid(4, 4), c.x, c.y)


def _grain(d: Dice, c: Canvas):
    u, v = rotate(c.x - 0.5, c.y - 0.5, d.choice((0, 0.25, d.uniform(0, 1))))
    rows, cols = d.choice(LATTICES)
    octaves = d.integer(1, 3)
    layers = (
        value_noise(d.grid(max(2, rows >> k), max(2, cols >> k)), 0.7 * u + 0.5, 0.7 * v + 0.5) for k in range(octaves)
    )
    return sum(layers) / octaves


def _stripes(d: Dice, c: Canvas):
    u, _, _ = _grid(d, c, 2, 16)
    level = 0.5 + 0.5 * wave(u)
    return np.clip((level - d.uniform(0.3, 0.7)) * d.uniform(2, 6) + 0.5, 0, 1) if _often(d, 0.4) else level


def _cells(d: Dice, c: Canvas):
    """The same shape in every cell of a lattice, all alike or alternating."""
    u, v, count = _grid(d, c, 3, 11)
    i = np.floor(v)
    u = u + d.choice((0, 0, 0.5, 1 / 3)) * (i % 2)
    j = np.floor(u)
    fu, fv, r = u - j - 0.5, v - i - 0.5, d.uniform(0.2, 0.46)
    radius, au, av = np.sqrt(fu * fu + fv * fv), np.abs(fu), np.abs(fv)
    gaps = (radius - r, np.maximum(au, av) - r, au + av - r, np.abs(radius - r) - 0.08, np.minimum(au, av) - 0.3 * r)
    level, rule = cover(d.choice(gaps) / count, c.pixel), d.integer(0, 3)
    if rule == 1:
        level = level * np.where((i + j) % 2 == 0, 1.0, d.uniform(0.3, 0.8))
    elif rule == 2:
        level = level * np.where((i + d.integer(0, 2)) % d.integer(2, 4) == 0, 1.0, d.uniform(0.3, 0.8))
    elif rule == 3:
        level = level * (1.0 - d.uniform(0, 0.5) * value_noise(d.grid(24, 24), (i % 23) / 23, (j % 23) / 23))
    return level * (1 - 0.5 * np.clip(fu + fv, -0.5, 0.8)) if _often(d, 0.5) else level


def _checks(d: Dice, c: Canvas):
    u, v, _ = _grid(d, c, 3, 12)
    level = (np.floor(u) + np.floor(v) * d.choice((1, 1, 2))) % d.choice((2, 2, 3, 4)) / 3.0
    return level * (0.6 + 0.4 * (1 - 4 * (u - np.floor(u) - 0.5) ** 2)) if _often(d, 0.5) else level


def _pebbles(d: Dice, c: Canvas):
    """The cells of random points, with a gap between neighbours."""
    points = d.grid(d.integer(12, 70), 3)
    nearest, second = (np.full((c.n, c.n), 9.0) for _ in range(2))
    tone = np.zeros((c.n, c.n))
    for x, y, own in points:
        squared = (c.x - x) ** 2 + (c.y - y) ** 2
        closer = squared < nearest
        second = np.where(closer, nearest, np.minimum(second, squared))
        nearest, tone = np.minimum(nearest, squared), np.where(closer, own, tone)
    gap = np.clip((np.sqrt(second) - np.sqrt(nearest)) / (d.uniform(0.5, 4) * c.pixel), 0, 1)
    return gap * (1 - d.uniform(0, 0.6) * tone)


TEXTURES = (_grain, _grain, _grain, _stripes, _cells, _cells, _checks, _pebbles, _shading)


def _texture(d: Dice, c: Canvas) -> np.ndarray:
    """A coloured texture [n, n, 3], sometimes with another one over it."""
    one = _colour(d)
    two = one * d.uniform(0.3, 0.85) if _often(d, 0.35) else _colour(d)
    picture = one + (d.uniform(0.15, 1.0) * d.choice(TEXTURES)(d, c))[:, :, None] * (two - one)
    if _often(d, 0.6):
        picture = picture * (1 + d.uniform(0.05, 0.5) * (d.choice(TEXTURES)(d, c) - 0.5))[:, :, None]
    if _often(d, 0.4):
        picture = picture * (1 + d.uniform(0.05, 0.3) * (_grain(d, c) - 0.5))[:, :, None]
    return picture


# --- things: shapes in an order -----------------------------------------------------------------------------------


def _outline(c: Canvas, shape: str, x, y, r, turns):
    if shape == "box":
        return box_distance(c, x, y, 2 * r, 1.1 * r, turns, 0.2 * r)
    if shape == "square":
        return box_distance(c, x, y, 1.6 * r, 1.6 * r, turns)
    if shape == "tile":  # a square with its corners cut round
        return np.maximum(box_distance(c, x, y, 2 * r, 2 * r, turns), disc_distance(c, x, y, 1.15 * r))
    disc = disc_distance(c, x, y, r)
    return disc if shape == "disc" else np.abs(disc) - 0.25 * r


def _places(d: Dice, count: int):
    """Where ``count`` things stand relative to their centre, and how large each is, in one of six orders."""
    order = d.choice(("row", "ring", "block", "stack", "mirror", "free"))
    turns, reach = d.uniform(0, 1), d.uniform(0.2, 0.36)
    across, down = (d.grid(count) for _ in range(2))
    for k in range(count):
        size = 1.0
        if order == "row":
            dx, dy = rotate((k - (count - 1) / 2) * min(0.3, 0.8 / count), 0.0, turns)
        elif order == "ring":
            dx, dy = rotate(reach, 0.0, turns + k / count)
        elif order == "block":
            dx, dy = (k % 3 - 1) * 0.27, (k // 3 - 1) * 0.27
        elif order == "stack":
            dx, dy, size = 0.0, 0.0, 1.5 * (1 - k / count)
        elif order == "mirror":  # the odd ones are the even ones' images
            side, twin = (1, -1)[k % 2], k - k % 2
            dx, dy = side * (0.08 + 0.28 * across[twin]), 0.72 * down[twin] - 0.36
        else:
            dx, dy = 0.8 * across[k] - 0.4, 0.8 * down[k] - 0.4
        yield float(dx), float(dy), size


def _arrange(d: Dice, c: Canvas, picture: np.ndarray) -> None:
    """Paint one to eight things over the picture: alike or not, plain or textured, lit from the top left or flat."""
    light, count, alike = 1.0 - d.uniform(0, 0.4) * (c.x + c.y - 1), d.choice((1, 1, 2, 3, 4, 6, 8)), _often(d, 0.7)
    radius = d.uniform(0.06, 0.2) if count > 2 else d.uniform(0.12, 0.36)
    shape, turns, tone = d.choice(SHAPES), d.uniform(0, 1), _colour(d)
    cloth = _texture(d, c) if _often(d, 0.4) else None
    x0, y0, bevel = d.uniform(0.4, 0.6), d.uniform(0.4, 0.6), 0.25 * _often(d, 0.5)
    for dx, dy, size in _places(d, count):
        if not alike:
            shape, tone, size = d.choice(SHAPES), _colour(d), size * d.uniform(0.6, 1.3)
        x, y, r = x0 + dx, y0 + dy, radius * size
        fill = light[:, :, None] * tone if cloth is None else cloth
        fill = fill * (1 - bevel * np.clip((c.x - x + c.y - y) / r, -1, 1))[:, :, None]
        blend(picture, cover(_outline(c, shape, x, y, r, turns), c.pixel), fill)


def _leaves(d: Dice, c: Canvas) -> np.ndarray:
    """Shapes of all sizes over one another: a dead-leaves image, whose statistics are those of photographs."""
    picture = np.full((c.n, c.n, 3), _colour(d))
    for _ in range(d.integer(15, 60)):
        x, y, r, turns = d.uniform(0, 1), d.uniform(0, 1), 0.03 / (1 - 0.9 * d.uniform(0, 1)), d.uniform(0, 1)
        blend(picture, cover(_outline(c, d.choice(SHAPES), x, y, r, turns), c.pixel), _colour(d))
    return picture
