"""The twelve categories of synthad: how each is sampled (a Scene) and drawn (pixels).

A Scene is everything random about one image, so that a defect is a small edit of a Scene followed by the same
drawing: the pixels that change are the exact mask. Lengths are fractions of the image side, colours RGB in [0, 1].
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from zsad_lite.synthad.canvas import (
    Canvas,
    Dice,
    blend,
    box_distance,
    cover,
    disc_distance,
    rotate,
    segment_distance,
    value_noise,
    wave,
)

PALETTE = {
    "red": (0.74, 0.17, 0.15), "orange": (0.87, 0.48, 0.14), "yellow": (0.88, 0.77, 0.24),
    "green": (0.20, 0.52, 0.27), "teal": (0.13, 0.50, 0.52), "blue": (0.17, 0.32, 0.67),
    "purple": (0.46, 0.26, 0.58), "pink": (0.86, 0.52, 0.60), "brown": (0.44, 0.29, 0.18),
    "cream": (0.88, 0.82, 0.68), "white": (0.92, 0.92, 0.90), "grey": (0.54, 0.55, 0.56),
    "black": (0.14, 0.14, 0.15),
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """One drawn piece. Pieces with ``fault=True`` may be missing, misplaced or of the wrong colour."""

    shape: str  # "disc", "ring", "box"
    x: float
    y: float
    w: float
    h: float
    colour: tuple
    turns: float = 0.0
    corner: float = 0.0
    fault: bool = True


@dataclass
class Scene:
    """``words``: attribute name -> word. ``cells``: tables [rows, cols] of a grid texture (on, dx, dy, tint).
    ``run``: how many neighbouring cells a structural defect takes, and along which axis."""

    words: dict[str, str]
    colours: dict[str, tuple]
    parts: list[Part] = field(default_factory=list)
    cells: dict[str, np.ndarray] = field(default_factory=dict)
    run: tuple[int, int] = (1, 1)
    data: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Category:
    name: str
    group: str  # "A" or "B"
    kind: str  # "texture" or "object"
    noun: str
    sample: Callable[[Dice], Scene]
    render: Callable[[Canvas, Scene], tuple[np.ndarray, np.ndarray]]  # -> picture [n, n, 3], region [n, n]


CATEGORIES: dict[str, Category] = {}


def _register(name: str, group: str, kind: str, sample, render) -> None:
    CATEGORIES[name] = Category(name, group, kind, name.replace("_", " "), sample, render)


def _tone(d: Dice, word: str, spread: float = 0.08) -> tuple:
    """A palette colour with a little variation of brightness and of each channel."""
    gain = d.uniform(1.0 - spread, 1.0 + spread)
    return tuple(min(1.0, max(0.0, v * gain + d.uniform(-0.03, 0.03))) for v in PALETTE[word])


def _distance(c: Canvas, p: Part):
    if p.shape == "box":
        return box_distance(c, p.x, p.y, p.w, p.h, p.turns, p.corner)
    radius = disc_distance(c, p.x, p.y, 0.5 * p.w)
    return radius if p.shape == "disc" else np.abs(radius) - 0.5 * p.h


def _paint(c: Canvas, picture, p: Part, bevel: float = 0.25) -> np.ndarray:
    """Draw one part, lit from the top left. Returns its coverage [n, n]."""
    alpha = cover(_distance(c, p), c.pixel)
    reach = max(p.w, p.h if p.shape == "box" else p.w) + 1e-9
    light = 1.0 - bevel * np.clip((c.x - p.x + c.y - p.y) / reach, -1.0, 1.0)
    blend(picture, alpha, light[:, :, None] * np.asarray(p.colour))
    return alpha


def _paint_all(c: Canvas, picture, scene: Scene) -> None:
    for part in scene.parts:
        _paint(c, picture, part)


def _backdrop(d: Dice, words=("cream", "white", "grey", "teal", "brown")) -> tuple[str, dict]:
    word = d.choice(words)
    return word, {"colour": _tone(d, word), "grain": d.grid(9, 9), "spread": d.uniform(0.05, 0.16)}


def _paint_backdrop(c: Canvas, b: dict) -> np.ndarray:
    shade = 1.0 + b["spread"] * (value_noise(b["grain"], c.x, c.y) - 0.5) * 2.0
    return shade[:, :, None] * np.asarray(b["colour"])


def _grid_cells(rows: int, cols: int, tint=None) -> dict[str, np.ndarray]:
    zeros = np.zeros((rows, cols))
    return {
        "on": np.ones((rows, cols)), "dx": zeros, "dy": zeros.copy(),
        "tint": zeros.astype(np.int64) if tint is None else tint,
    }  # fmt: skip


def _whole(c: Canvas) -> np.ndarray:
    return np.ones((c.n, c.n))


# --- group A -------------------------------------------------------------------------------------------------


def _sample_woven(d: Dice) -> Scene:
    count = d.integer(9, 12)
    ground, accent = d.sample(("cream", "blue", "red", "green", "grey", "purple", "brown", "teal"), 2)
    every = d.integer(3, 4)
    offset = d.integer(0, every - 1)
    stripes = (np.arange(count) + offset) % every == 0
    rows, cols = np.meshgrid(np.arange(count), np.arange(count), indexing="ij")
    weave = d.choice(("plain", "twill"))
    over = (rows + cols) % 2 == 0 if weave == "plain" else (rows + cols) % 4 < 2
    tint = np.where(over, stripes[None, :], stripes[:, None]).astype(np.int64)
    return Scene(
        words={"weave": weave, "ground": ground, "accent": accent},
        colours={"tints": np.array([_tone(d, ground), _tone(d, accent)])},
        cells=_grid_cells(count, count, tint),
        run=(1, 3),
        data={"count": count, "over": over, "phase": d.uniform(0, 1), "phase_y": d.uniform(0, 1),
              "bend": d.grid(4, 4), "grain": d.grid(48, 48), "depth": d.uniform(0.45, 0.7)},
    )  # fmt: skip


def _render_woven(c: Canvas, s: Scene):
    n, data = s.data["count"], s.data
    warp = (value_noise(data["bend"], c.x, c.y) - 0.5) * 0.6
    u, v = c.x * (n - 1) + data["phase"] + warp, c.y * (n - 1) + data["phase_y"] - warp
    i, j = np.floor(v).astype(np.int64) % n, np.floor(u).astype(np.int64) % n
    over = data["over"][i, j]
    shift = s.cells["dx"][i, j] * 6.0
    fu, fv = u - np.floor(u) - 0.5, v - np.floor(v) - 0.5
    across = np.where(over, fu, fv) + shift
    along = np.where(over, fv, fu)
    bump = np.clip(1.0 - 4.0 * across * across, 0.0, 1.0) * (1.0 - 1.2 * along * along)
    strands = 0.5 + 0.5 * wave(across * 3.0 + along * 0.7)
    light = 1.0 - data["depth"] + data["depth"] * bump + 0.10 * strands * bump
    light = light + 0.14 * (value_noise(data["grain"], c.x, c.y) - 0.5)
    light = np.where(s.cells["on"][i, j] > 0.5, light, 0.22 + 0.1 * bump)
    return light[:, :, None] * s.colours["tints"][s.cells["tint"][i, j]], _whole(c)


_register("woven_fabric", "A", "texture", _sample_woven, _render_woven)


def _sample_wood(d: Dice) -> Scene:
    boards, pieces = d.integer(3, 5), 2
    light, dark = d.choice((("cream", "brown"), ("orange", "brown"), ("brown", "black"), ("grey", "brown")))
    base, line = np.array(_tone(d, light)), np.array(_tone(d, dark))
    tints = np.array([base * g for g in (1.0, d.uniform(0.82, 0.92), d.uniform(0.45, 0.60))])
    tint = np.array([[0 if d.uniform(0, 1) < 0.6 else 1] * pieces for _ in range(boards)])
    return Scene(
        words={"light": light, "grain": dark, "boards": str(boards)},
        colours={"tints": tints, "line": line},
        cells=_grid_cells(boards, pieces, tint),
        data={"boards": boards, "phase": d.grid(boards), "freq": d.uniform(5, 9),
              "knot": d.grid(boards, 3), "grain": d.grid(60, 6), "joint": d.grid(boards)},
    )  # fmt: skip


def _render_wood(c: Canvas, s: Scene):
    data, n, pieces = s.data, s.data["boards"], s.cells["on"].shape[1]
    v = c.y * n
    i = np.clip(np.floor(v).astype(np.int64), 0, n - 1)
    u = c.x * pieces + data["joint"][i]
    j = np.floor(u).astype(np.int64) % pieces
    moved = (np.abs(s.cells["dx"][i, j]) + np.abs(s.cells["dy"][i, j])) > 0
    fx, fy = np.where(moved, v - i, c.x), np.where(moved, c.x * n, v - i)  # a misplaced piece lies across the grain
    knot = data["knot"][i]
    kx, ky = (fx - knot[:, :, 0]) * 3.0, fy - knot[:, :, 1]
    ring = np.sqrt(kx * kx + ky * ky + 0.02)
    bend = value_noise(data["grain"], 0.5 * fx, c.y)
    figure = 0.5 + 0.5 * wave(fy * data["freq"] * 0.3 + bend * 0.5 + 0.6 * knot[:, :, 2] / ring + data["phase"][i])
    fibre = value_noise(data["grain"], fx, 0.5 * c.y)
    board = s.colours["tints"][s.cells["tint"][i, j]]
    amount = 0.55 * figure * figure + 0.25 * (fibre - 0.5)
    picture = board + np.clip(amount, 0.0, 0.8)[:, :, None] * (s.colours["line"] - board)
    fv, fu = v - np.floor(v), u - np.floor(u)
    edge = np.minimum(np.minimum(fv, 1.0 - fv) / n, np.minimum(fu, 1.0 - fu) / pieces)
    gap = np.clip(1.2 - edge / c.pixel, 0.0, 1.0)
    picture = picture * (1.0 - 0.65 * gap)[:, :, None]
    hollow = 0.20 + 0.08 * value_noise(data["grain"], c.x, c.y)
    return np.where((s.cells["on"][i, j] > 0.5)[:, :, None], picture, hollow[:, :, None]), _whole(c)


_register("wood", "A", "texture", _sample_wood, _render_wood)


def _sample_perforated(d: Dice) -> Scene:
    count = d.integer(5, 7)
    metal, behind = d.sample(("grey", "white", "blue", "green", "orange"), 1)[0], d.choice(("black", "brown", "teal"))
    layout = d.choice(("square", "staggered"))
    return Scene(
        words={"sheet": metal, "behind": behind, "layout": layout},
        colours={"tints": np.array([_tone(d, metal), _tone(d, behind)]), "behind": np.array(_tone(d, behind))},
        cells=_grid_cells(count + 2, count + 2),
        data={"count": count, "stagger": 0.5 if layout == "staggered" else 0.0, "px": d.uniform(0, 1),
              "py": d.uniform(0, 1), "radius": d.uniform(0.24, 0.34), "streak": d.grid(70, 4),
              "shade": d.grid(4, 4), "angle": d.uniform(-0.012, 0.012)},
    )  # fmt: skip


def _render_perforated(c: Canvas, s: Scene):
    data, n = s.data, s.data["count"]
    rx, ry = rotate(c.x - 0.5, c.y - 0.5, data["angle"])
    v = (ry + 0.5) * n + data["py"] + 0.3
    i = np.clip(np.floor(v).astype(np.int64), 0, n + 1)
    u = (rx + 0.5) * n + data["px"] + 0.3 + data["stagger"] * (i % 2)
    j = np.clip(np.floor(u).astype(np.int64), 0, n + 1)
    du = u - j - 0.5 - s.cells["dx"][i, j] * 3.0
    dv = v - i - 0.5 - s.cells["dy"][i, j] * 3.0
    radius = np.sqrt(du * du + dv * dv)
    streak = 0.10 * (value_noise(data["streak"], c.x, c.y) - 0.5) + 0.3 * (value_noise(data["shade"], c.x, c.y) - 0.5)
    plate = (1.0 + streak)[:, :, None] * s.colours["tints"][s.cells["tint"][i, j] * 0]
    rim = cover((np.abs(radius - data["radius"]) - 0.07) / n, c.pixel)
    plate = plate * (1.0 + 0.35 * rim * np.where(du + dv < 0, -1.0, 1.0) * s.cells["on"][i, j])[:, :, None]
    hole = cover((radius - data["radius"]) / n, c.pixel) * s.cells["on"][i, j]
    depth = 0.55 + 0.45 * np.clip(0.5 + du + dv, 0.0, 1.0)
    inside = np.where((s.cells["tint"][i, j] > 0)[:, :, None], s.colours["tints"][0] * 0.8, s.colours["behind"])
    blend(plate, hole, depth[:, :, None] * inside)
    return plate, _whole(c)


_register("perforated_sheet", "A", "texture", _sample_perforated, _render_perforated)


def _sample_bottle(d: Dice) -> Scene:
    glass, label = d.choice(("green", "brown", "blue", "purple")), d.choice(("cream", "white", "yellow", "red", "pink"))
    stripe = d.choice([w for w in ("red", "blue", "black", "green", "orange") if w not in (glass, label)])
    ground, backdrop = _backdrop(d, ("white", "grey", "cream", "teal"))
    x, width, shoulder = 0.5 + d.uniform(-0.03, 0.03), d.uniform(0.34, 0.44), d.uniform(0.30, 0.36)
    neck, bottom = d.uniform(0.12, 0.16), d.uniform(0.92, 0.96)
    paper, ink, dark = _tone(d, label), _tone(d, stripe), _tone(d, glass)
    top, height = d.uniform(0.48, 0.54), d.uniform(0.24, 0.30)
    bar = lambda y, w, h, colour: Part("box", x, y, w, h, colour, corner=0.008)  # noqa: E731
    parts = [
        Part("box", x, 0.11, neck + 0.05, 0.09, ink, corner=0.015),
        bar(top + 0.5 * height, width * 0.98, height, paper),
        bar(top + 0.05, width * 0.98, 0.035, ink),
        bar(top + height - 0.05, width * 0.98, 0.035, ink),
        Part("disc", x, top + 0.5 * height, 0.10, 0.10, ink),
    ]
    return Scene(
        words={"glass": glass, "label": label, "stripe": stripe, "backdrop": ground},
        colours={"glass": dark},
        parts=parts,
        data={"backdrop": backdrop, "x": x, "width": width, "shoulder": shoulder, "neck": neck, "bottom": bottom,
              "level": d.uniform(0.33, 0.45), "gloss": d.uniform(-0.14, -0.08)},
    )  # fmt: skip


def _render_bottle(c: Canvas, s: Scene):
    data = s.data
    picture = _paint_backdrop(c, data["backdrop"])
    height = data["bottom"] - data["shoulder"]
    body = box_distance(c, data["x"], data["shoulder"] + 0.5 * height, data["width"], height, corner=0.07)
    neck = box_distance(c, data["x"], 0.25, data["neck"], 0.3, corner=0.02)
    region = cover(np.minimum(body, neck), c.pixel)
    across = (c.x - data["x"]) / data["width"]
    light = np.maximum(1.05 - 2.2 * across * across, 0.45)
    glass = np.asarray(s.colours["glass"])
    full = np.where(c.y > data["level"], 0.72, 1.12)
    blend(picture, region, (light * full)[:, :, None] * glass)
    for part in s.parts:
        alpha = cover(_distance(c, part), c.pixel)
        blend(picture, alpha, light[:, :, None] * np.asarray(part.colour))
    gloss = cover(
        segment_distance(c, data["x"] + data["gloss"], 0.42, data["x"] + data["gloss"], 0.86) - 0.008, c.pixel
    )
    blend(picture, 0.5 * gloss * region, (1.0, 1.0, 1.0))
    return picture, region


_register("bottle", "A", "object", _sample_bottle, _render_bottle)


def _sample_screw(d: Dice) -> Scene:
    metal = d.choice(("grey", "yellow", "black", "brown"))
    washer = d.choice([w for w in ("grey", "white", "black", "orange") if w != metal])
    ground, backdrop = _backdrop(d, ("white", "cream", "teal", "blue", "grey"))
    turns, tone = d.uniform(-0.06, 0.06), _tone(d, metal)
    thread = tuple(min(1.0, 1.35 * v + 0.08) for v in tone)
    cx, cy, length, width = 0.5 + d.uniform(-0.04, 0.04), 0.5 + d.uniform(-0.05, 0.05), 0.72, d.uniform(0.13, 0.16)
    count = d.integer(9, 11)

    def at(along: float, across: float = 0.0):
        u, v = rotate(along, across, -turns)
        return cx + float(u), cy + float(v)

    def box(along, w, h, colour, fault=True, tilt=0.0, corner=0.0):
        return Part("box", *at(along), w, h, colour, turns + tilt, corner, fault)

    pitch = 0.46 / count
    parts = [box(0.05, length - 0.1, width, tone, fault=False)]
    parts += [box(-0.07 + pitch * (k + 0.5), pitch * 0.55, width + 0.07, thread, tilt=0.03) for k in range(count)]
    parts += [box(-0.21, 0.035, width + 0.19, _tone(d, washer)),
              box(-0.31, 0.14, width + 0.13, tone, fault=False, corner=0.03),
              box(-0.345, 0.03, width + 0.01, tuple(0.35 * v for v in tone))]  # fmt: skip
    return Scene(words={"metal": metal, "washer": washer, "backdrop": ground}, colours={}, parts=parts,
                 data={"backdrop": backdrop})  # fmt: skip


def _render_parts_object(c: Canvas, s: Scene):
    """Objects that are nothing but parts on a backdrop; the region is the union of the parts."""
    picture = _paint_backdrop(c, s.data["backdrop"])
    region = np.zeros((c.n, c.n))
    for part in s.parts:
        region = np.maximum(region, _paint(c, picture, part))
    return picture, region


_register("screw", "A", "object", _sample_screw, _render_parts_object)


_BOARD_SLOTS = (  # kind, x, y, w, h
    ("chip", 0.34, 0.34, 0.28, 0.22), ("chip", 0.70, 0.70, 0.24, 0.24), ("cap", 0.68, 0.22, 0.13, 0.13),
    ("cap", 0.86, 0.22, 0.13, 0.13), ("res", 0.20, 0.60, 0.07, 0.15), ("res", 0.32, 0.60, 0.07, 0.15),
    ("res", 0.44, 0.60, 0.07, 0.15), ("led", 0.22, 0.84, 0.09, 0.09), ("led", 0.38, 0.84, 0.09, 0.09),
    ("res", 0.68, 0.42, 0.15, 0.07), ("res", 0.88, 0.42, 0.07, 0.15),
)  # fmt: skip


def _sample_board(d: Dice) -> Scene:
    mask, led = d.choice(("green", "blue", "red", "black")), d.choice(("yellow", "white", "orange", "pink"))
    cap = d.choice([w for w in ("orange", "grey", "teal", "purple") if w != mask])
    tones = {"chip": _tone(d, "black"), "cap": _tone(d, cap), "res": _tone(d, "cream"), "led": _tone(d, led)}
    parts = []
    for kind, x, y, w, h in _BOARD_SLOTS:
        x, y = x + d.uniform(-0.008, 0.008), y + d.uniform(-0.008, 0.008)
        if kind == "chip":
            pin = tuple(0.9 * v for v in PALETTE["grey"])
            parts += [Part("box", x + (k - 1.5) * w / 4.2, y, 0.03, h + 0.07, pin, fault=False) for k in range(4)]
        shape = "disc" if kind in ("cap", "led") else "box"
        parts.append(Part(shape, x, y, w, h, tones[kind], corner=0.012))
        if kind == "chip":
            parts.append(Part("disc", x - 0.3 * w, y - 0.25 * h, 0.035, 0.035, PALETTE["white"]))
    lanes = [(d.uniform(0.05, 0.95), d.uniform(0.05, 0.95), d.choice((0, 1)), d.uniform(0.2, 0.5)) for _ in range(9)]
    base = _tone(d, mask)
    return Scene(words={"mask": mask, "capacitors": cap, "lamps": led}, colours={}, parts=parts,
                 data={"base": base, "lanes": lanes, "shade": d.grid(5, 5)})  # fmt: skip


def _render_board(c: Canvas, s: Scene):
    base = np.asarray(s.data["base"])
    picture = (0.92 + 0.16 * value_noise(s.data["shade"], c.x, c.y))[:, :, None] * base
    for x, y, vertical, length in s.data["lanes"]:
        ex, ey = (0.0, length) if vertical else (length, 0.0)
        lane = cover(segment_distance(c, x, y, x + ex, y + ey) - 0.010, c.pixel)
        blend(picture, 0.8 * lane, np.clip(base * 1.25 + 0.10, 0.0, 1.0))
        blend(picture, cover(disc_distance(c, x, y, 0.018), c.pixel), (0.80, 0.70, 0.40))
    for x, y in ((0.06, 0.06), (0.94, 0.06), (0.06, 0.94), (0.94, 0.94)):
        blend(picture, cover(disc_distance(c, x, y, 0.04), c.pixel), (0.78, 0.76, 0.70))
        blend(picture, cover(disc_distance(c, x, y, 0.022), c.pixel), (0.10, 0.10, 0.10))
    _paint_all(c, picture, s)
    return picture, _whole(c)


_register("circuit_board", "A", "object", _sample_board, _render_board)


# --- group B -------------------------------------------------------------------------------------------------


def _sample_tiles(d: Dice) -> Scene:
    count = d.integer(4, 5)
    one, two = d.sample(("cream", "blue", "red", "grey", "black", "green", "white", "brown"), 2)
    layout = d.choice(("chequered", "striped"))
    rows, cols = np.meshgrid(np.arange(count + 2), np.arange(count + 2), indexing="ij")
    tint = (rows + cols) % 2 if layout == "chequered" else rows % 2
    return Scene(
        words={"first": one, "second": two, "layout": layout},
        colours={
            "tints": np.array([_tone(d, one), _tone(d, two)]),
            "grout": np.array(_tone(d, d.choice(("grey", "white", "black")))),
        },
        cells=_grid_cells(count + 2, count + 2, tint),
        data={"count": count, "px": d.uniform(0, 1), "py": d.uniform(0, 1), "angle": d.uniform(-0.015, 0.015),
              "marble": d.grid(26, 26), "gain": d.grid(count + 2, count + 2), "grout": d.uniform(0.05, 0.08)},
    )  # fmt: skip


def _render_tiles(c: Canvas, s: Scene):
    data, n = s.data, s.data["count"]
    rx, ry = rotate(c.x - 0.5, c.y - 0.5, data["angle"])
    u, v = (rx + 0.5) * n + data["px"] + 0.3, (ry + 0.5) * n + data["py"] + 0.3
    i, j = np.clip(np.floor(v).astype(np.int64), 0, n + 1), np.clip(np.floor(u).astype(np.int64), 0, n + 1)
    du, dv = u - j - 0.5 - s.cells["dx"][i, j] * 2.0, v - i - 0.5 - s.cells["dy"][i, j] * 2.0
    marble = value_noise(data["marble"], c.x + 0.25 * du, c.y)
    vein = np.clip(1.0 - 9.0 * np.abs(marble - 0.5), 0.0, 1.0)
    light = 0.80 + 0.25 * data["gain"][i, j] + 0.22 * (marble - 0.5) - 0.22 * vein
    picture = light[:, :, None] * s.colours["tints"][s.cells["tint"][i, j]]
    inside = cover((np.maximum(np.abs(du), np.abs(dv)) - 0.5 + data["grout"]) / n, c.pixel) * s.cells["on"][i, j]
    ground = (0.9 + 0.2 * marble)[:, :, None] * s.colours["grout"]
    blend(ground, inside, picture)
    return ground, _whole(c)


_register("tile_floor", "B", "texture", _sample_tiles, _render_tiles)


def _sample_leather(d: Dice) -> Scene:
    hide = d.choice(("brown", "black", "red", "cream", "green", "blue"))
    thread = d.choice([w for w in ("white", "yellow", "black", "orange") if w != hide])
    first, second = d.uniform(0.16, 0.34), d.uniform(0.66, 0.84)
    count, stitch, tilt = d.integer(6, 8), _tone(d, thread), d.uniform(-0.01, 0.01)
    phase = d.uniform(0, 1)
    parts = [
        Part("box", (k + phase) / count, y, 0.62 / count, 0.035, stitch, tilt, 0.012)
        for y in (first, second) for k in range(-1, count + 1)
    ]  # fmt: skip
    parts = [p if 0.05 < p.x < 0.95 else replace(p, fault=False) for p in parts]
    return Scene(words={"hide": hide, "thread": thread}, colours={"hide": np.array(_tone(d, hide))}, parts=parts,
                 data={"pores": d.grid(16, 16, 2), "seams": (first, second), "shade": d.grid(5, 5),
                       "fine": d.grid(50, 50)})  # fmt: skip


def _render_leather(c: Canvas, s: Scene):
    pores, n = s.data["pores"], 14
    u, v = c.x * n, c.y * n
    i, j = np.floor(v).astype(np.int64), np.floor(u).astype(np.int64)
    near = second = np.full((c.n, c.n), 9.0)
    for di in (-1, 0, 1):
        for dj in (-1, 0, 1):
            cell = pores[i + di + 1, j + dj + 1]
            dx, dy = j + dj + cell[:, :, 0] - u, i + di + cell[:, :, 1] - v
            far = np.sqrt(dx * dx + dy * dy)
            second = np.minimum(second, np.maximum(near, far))
            near = np.minimum(near, far)
    crease = np.clip(1.0 - 3.5 * (second - near), 0.0, 1.0)
    light = 1.05 - 0.5 * crease + 0.35 * (value_noise(s.data["shade"], c.x, c.y) - 0.5)
    light = light + 0.12 * (value_noise(s.data["fine"], c.x, c.y) - 0.5)
    picture = light[:, :, None] * s.colours["hide"]
    for seam in s.data["seams"]:
        picture *= (1.0 - 0.35 * cover(np.abs(c.y - seam) - 0.028, c.pixel))[:, :, None]
    _paint_all(c, picture, s)
    return picture, _whole(c)


_register("leather", "B", "texture", _sample_leather, _render_leather)


def _sample_brushed(d: Dice) -> Scene:
    metal, rivet = d.choice(("grey", "white", "orange", "yellow")), d.choice(("black", "grey", "brown", "blue"))
    layout = d.choice(("rows", "corners"))
    tone, jitter = _tone(d, rivet), lambda: d.uniform(-0.012, 0.012)
    spots = [(x, y) for y in (0.2, 0.8) for x in (0.15, 0.38, 0.62, 0.85)] if layout == "rows" else [
        (x, y) for y in (0.16, 0.5, 0.84) for x in (0.16, 0.5, 0.84)]  # fmt: skip
    size = d.uniform(0.10, 0.13)
    parts = []
    for x, y in spots:
        x, y = x + jitter(), y + jitter()
        parts.append(Part("disc", x, y, size, size, tone))
    words = {"metal": metal, "rivets": rivet, "layout": layout}
    return Scene(words=words, colours={"metal": np.array(_tone(d, metal))},
                 parts=parts, data={"streak": d.grid(90, 3), "band": d.grid(7, 3), "glare": d.uniform(0.1, 0.9),
                                    "strength": d.uniform(0.2, 0.45), "seam": d.uniform(0.35, 0.65)})  # fmt: skip


def _render_brushed(c: Canvas, s: Scene):
    data = s.data
    light = (
        0.85 + 0.40 * (value_noise(data["streak"], c.x, c.y) - 0.5) + 0.35 * (value_noise(data["band"], c.x, c.y) - 0.5)
    )
    glare = np.clip(1.0 - np.abs(c.x + 0.3 * c.y - data["glare"] - 0.15) * 3.0, 0.0, 1.0)
    picture = (light + data["strength"] * glare * glare)[:, :, None] * s.colours["metal"]
    groove = np.clip(1.0 - np.abs(c.y - data["seam"]) / (1.2 * c.pixel), 0.0, 1.0)
    picture *= (1.0 - 0.45 * groove)[:, :, None]
    for part in s.parts:
        shadow = cover(disc_distance(c, part.x + 0.012, part.y + 0.014, 0.5 * part.w + 0.01), 2.5 * c.pixel)
        picture *= (1.0 - 0.35 * shadow)[:, :, None]
        _paint(c, picture, part, bevel=0.6)
    return picture, _whole(c)


_register("brushed_metal", "B", "texture", _sample_brushed, _render_brushed)


def _sample_capsule(d: Dice) -> Scene:
    left, right = d.sample(("red", "white", "yellow", "green", "blue", "orange", "purple"), 2)
    ground, backdrop = _backdrop(d, ("grey", "cream", "teal", "black"))
    turns, cx, cy = d.uniform(-0.09, 0.09), 0.5 + d.uniform(-0.03, 0.03), 0.5 + d.uniform(-0.04, 0.04)
    length, width = d.uniform(0.74, 0.82), d.uniform(0.30, 0.36)
    one, two, ink = _tone(d, left), _tone(d, right), _tone(d, "black")

    def at(along: float, across: float = 0.0):
        u, v = rotate(along, across, -turns)
        return cx + float(u), cy + float(v)

    marks = [Part("box", *at(-0.28 + 0.075 * k), 0.035, width * 0.42, ink, turns, 0.005) for k in range(3)]
    dots = [Part("disc", *at(0.14 + 0.1 * k, 0.0), 0.06, 0.06, ink) for k in range(2)]
    band = [Part("box", *at(0.0), 0.035, width + 0.015, tuple(0.6 * v for v in one), turns)]
    pose = {"turns": turns, "x": cx, "y": cy, "length": length, "width": width}
    return Scene(
        words={"left": left, "right": right, "backdrop": ground},
        colours={"left": one, "right": two},
        parts=band + marks + dots,
        data={"backdrop": backdrop, **pose},
    )


def _render_capsule(c: Canvas, s: Scene):
    data = s.data
    picture = _paint_backdrop(c, data["backdrop"])
    pill = (data["length"], data["width"], data["turns"], 0.5 * data["width"])
    shadow = box_distance(c, data["x"] + 0.02, data["y"] + 0.03, *pill)
    picture *= (1.0 - 0.4 * cover(shadow, 5.0 * c.pixel))[:, :, None]
    u, v = rotate(c.x - data["x"], c.y - data["y"], data["turns"])
    region = cover(box_distance(c, data["x"], data["y"], *pill), c.pixel)
    across = v / data["width"]
    light = 1.08 - 1.5 * (across + 0.12) * (across + 0.12)
    shell = np.where((u < 0.0)[:, :, None], np.asarray(s.colours["left"]), np.asarray(s.colours["right"]))
    blend(picture, region, light[:, :, None] * shell)
    _paint_all(c, picture, s)
    gloss = cover(np.abs(across + 0.27) - 0.035, 0.08) * cover(np.abs(u) - 0.36 * data["length"], 4 * c.pixel)
    blend(picture, 0.55 * gloss * region, (1.0, 1.0, 1.0))
    return picture, region


_register("capsule", "B", "object", _sample_capsule, _render_capsule)


def _sample_connector(d: Dice) -> Scene:
    shell = d.choice(("grey", "black", "white", "blue"))
    trio = d.choice((("red", "yellow", "blue"), ("brown", "green", "white"), ("purple", "orange", "teal")))
    ground, backdrop = _backdrop(d, ("cream", "grey", "teal", "brown"))
    turns, cx, cy = d.uniform(-0.05, 0.05), 0.5 + d.uniform(-0.03, 0.03), 0.5 + d.uniform(-0.03, 0.03)
    copper = _tone(d, "orange")
    parts = [Part("disc", cx, cy, 0.84, 0.84, _tone(d, shell), fault=False),
             Part("disc", cx, cy, 0.70, 0.70, tuple(0.6 * v for v in _tone(d, "grey")), fault=False)]  # fmt: skip
    for k, word in enumerate(trio):
        angle = turns + k / 3
        x, y = cx + 0.19 * float(wave(angle)), cy - 0.19 * float(wave(angle + 0.25))
        parts += [Part("disc", x, y, 0.29, 0.29, _tone(d, word)),
                  Part("disc", x, y, 0.185, 0.185, tuple(0.5 * v for v in copper), fault=False)]  # fmt: skip
        parts.append(Part("disc", x, y, 0.055, 0.055, copper))
        for m in range(6):
            sx, sy = float(wave(m / 6 + angle)), float(wave(m / 6 + 0.25 + angle))
            parts.append(Part("disc", x + 0.06 * sx, y + 0.06 * sy, 0.055, 0.055, copper))
    parts.append(Part("box", cx, cy - 0.385, 0.10, 0.06, PALETTE["white"], corner=0.01))
    return Scene(words={"shell": shell, "wires": " ".join(trio), "backdrop": ground}, colours={}, parts=parts,
                 data={"backdrop": backdrop})  # fmt: skip


_register("connector", "B", "object", _sample_connector, _render_parts_object)


def _sample_gauge(d: Dice) -> Scene:
    rim, dial = d.choice(("black", "grey", "brown", "blue")), d.choice(("white", "cream", "black"))
    ink = _tone(d, "white" if dial == "black" else "black")
    zone = d.choice(("red", "orange", "green"))
    ground, backdrop = _backdrop(d, ("grey", "teal", "brown", "white"))
    cx, cy = 0.5 + d.uniform(-0.02, 0.02), 0.5 + d.uniform(-0.02, 0.02)
    parts = [Part("disc", cx, cy, 0.90, 0.90, _tone(d, rim), fault=False),
             Part("disc", cx, cy, 0.76, 0.76, _tone(d, dial), fault=False)]  # fmt: skip

    def around(k: float, radius: float):
        return cx + radius * float(wave(k)), cy - radius * float(wave(k + 0.25))

    for k in range(11):
        turn = -0.375 + 0.075 * k
        long = k % 5 == 0
        parts.append(Part("box", *around(turn, 0.315), 0.030 if long else 0.020, 0.10 if long else 0.06, ink, turn))
    for k in range(4):
        turn = 0.20 + 0.05 * k
        parts.append(Part("disc", *around(turn, 0.215), 0.06, 0.06, _tone(d, zone, 0.02)))
    parts.append(Part("box", cx, cy + 0.22, 0.17, 0.06, ink, corner=0.01))
    turn = d.uniform(-0.375, 0.375)
    parts += [Part("box", *around(turn, 0.11), 0.030, 0.28, _tone(d, "red"), turn, fault=False),
              Part("disc", cx, cy, 0.10, 0.10, _tone(d, rim), fault=False)]  # fmt: skip
    return Scene(words={"rim": rim, "dial": dial, "zone": zone, "backdrop": ground}, colours={}, parts=parts,
                 data={"backdrop": backdrop})  # fmt: skip


_register("gauge", "B", "object", _sample_gauge, _render_parts_object)

GROUPS = {g: tuple(n for n, c in CATEGORIES.items() if c.group == g) for g in ("A", "B")}
