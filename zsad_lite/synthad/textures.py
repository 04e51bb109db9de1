"""The six textures of synthad: how each is sampled (a Scene) and rendered (pixels, and where defects may lie)."""

import numpy as np

from zsad_lite.synthad.canvas import Canvas, Dice, blend, cover, disc_distance, rotate, value_noise, wave
from zsad_lite.synthad.scene import Part, Rendering, Scene, grid_cells, paint, paint_parts, tone_of, whole


def sample_woven(d: Dice) -> Scene:
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
        colours={"tints": np.array([tone_of(d, ground), tone_of(d, accent)])},
        cells=grid_cells(count, count, tint),
        run=3,
        data={"count": count, "over": over, "phase": d.uniform(0, 1), "phase_y": d.uniform(0, 1),
              "bend": d.grid(4, 4), "grain": d.grid(48, 48), "depth": d.uniform(0.45, 0.7)},
    )  # fmt: skip


def render_woven(c: Canvas, s: Scene) -> Rendering:
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
    return light[:, :, None] * s.colours["tints"][s.cells["tint"][i, j]], whole(c)


def sample_wood(d: Dice) -> Scene:
    boards, pieces = d.integer(3, 5), 2
    light, dark = d.choice((("cream", "brown"), ("orange", "brown"), ("brown", "black"), ("grey", "brown")))
    base, line = np.array(tone_of(d, light)), np.array(tone_of(d, dark))
    tints = np.array([base * g for g in (1.0, d.uniform(0.82, 0.92), d.uniform(0.45, 0.60))])
    tint = np.array([[0 if d.uniform(0, 1) < 0.6 else 1] * pieces for _ in range(boards)])
    return Scene(
        words={"light": light, "grain": dark, "boards": str(boards)},
        colours={"tints": tints, "line": line},
        cells=grid_cells(boards, pieces, tint),
        data={"boards": boards, "phase": d.grid(boards), "freq": d.uniform(5, 9),
              "knot": d.grid(boards, 3), "grain": d.grid(60, 6), "joint": d.grid(boards)},
    )  # fmt: skip


def render_wood(c: Canvas, s: Scene) -> Rendering:
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
    return np.where((s.cells["on"][i, j] > 0.5)[:, :, None], picture, hollow[:, :, None]), whole(c)


def sample_perforated(d: Dice) -> Scene:
    count = d.integer(5, 7)
    metal, behind = d.sample(("grey", "white", "blue", "green", "orange"), 1)[0], d.choice(("black", "brown", "teal"))
    layout = d.choice(("square", "staggered"))
    return Scene(
        words={"sheet": metal, "behind": behind, "layout": layout},
        colours={"tints": np.array([tone_of(d, metal), tone_of(d, behind)]), "behind": np.array(tone_of(d, behind))},
        cells=grid_cells(count + 2, count + 2),
        data={"count": count, "stagger": 0.5 if layout == "staggered" else 0.0, "px": d.uniform(0, 1),
              "py": d.uniform(0, 1), "radius": d.uniform(0.24, 0.34), "streak": d.grid(70, 4),
              "shade": d.grid(4, 4), "angle": d.uniform(-0.012, 0.012)},
    )  # fmt: skip


def render_perforated(c: Canvas, s: Scene) -> Rendering:
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
    plate = (1.0 + streak)[:, :, None] * s.colours["tints"][0]
    rim = cover((np.abs(radius - data["radius"]) - 0.07) / n, c.pixel)
    plate = plate * (1.0 + 0.35 * rim * np.where(du + dv < 0, -1.0, 1.0) * s.cells["on"][i, j])[:, :, None]
    hole = cover((radius - data["radius"]) / n, c.pixel) * s.cells["on"][i, j]
    depth = 0.55 + 0.45 * np.clip(0.5 + du + dv, 0.0, 1.0)
    inside = np.where((s.cells["tint"][i, j] > 0)[:, :, None], s.colours["tints"][0] * 0.8, s.colours["behind"])
    blend(plate, hole, depth[:, :, None] * inside)
    return plate, whole(c)


def sample_tiles(d: Dice) -> Scene:
    count = d.integer(4, 5)
    one, two = d.sample(("cream", "blue", "red", "grey", "black", "green", "white", "brown"), 2)
    layout = d.choice(("chequered", "striped"))
    rows, cols = np.meshgrid(np.arange(count + 2), np.arange(count + 2), indexing="ij")
    tint = (rows + cols) % 2 if layout == "chequered" else rows % 2
    return Scene(
        words={"first": one, "second": two, "layout": layout},
        colours={
            "tints": np.array([tone_of(d, one), tone_of(d, two)]),
            "grout": np.array(tone_of(d, d.choice(("grey", "white", "black")))),
        },
        cells=grid_cells(count + 2, count + 2, tint),
        data={"count": count, "px": d.uniform(0, 1), "py": d.uniform(0, 1), "angle": d.uniform(-0.015, 0.015),
              "marble": d.grid(26, 26), "gain": d.grid(count + 2, count + 2), "grout": d.uniform(0.05, 0.08)},
    )  # fmt: skip


def render_tiles(c: Canvas, s: Scene) -> Rendering:
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
    return ground, whole(c)


def sample_leather(d: Dice) -> Scene:
    hide = d.choice(("brown", "black", "red", "cream", "green", "blue"))
    thread = d.choice([w for w in ("white", "yellow", "black", "orange") if w != hide])
    first, second = d.uniform(0.16, 0.34), d.uniform(0.66, 0.84)
    count, stitch, tilt = d.integer(6, 8), tone_of(d, thread), d.uniform(-0.01, 0.01)
    phase = d.uniform(0, 1)
    parts = [
        Part("box", x, y, 0.62 / count, 0.035, stitch, tilt, 0.012, fault=0.05 < x < 0.95)
        for y in (first, second)
        for x in ((k + phase) / count for k in range(-1, count + 1))
    ]
    return Scene(words={"hide": hide, "thread": thread}, colours={"hide": np.array(tone_of(d, hide))}, parts=parts,
                 data={"pores": d.grid(16, 16, 2), "seams": (first, second), "shade": d.grid(5, 5),
                       "fine": d.grid(50, 50)})  # fmt: skip


def render_leather(c: Canvas, s: Scene) -> Rendering:
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
    paint_parts(c, picture, s)
    return picture, whole(c)


def sample_brushed(d: Dice) -> Scene:
    metal, rivet = d.choice(("grey", "white", "orange", "yellow")), d.choice(("black", "grey", "brown", "blue"))
    layout = d.choice(("rows", "corners"))
    tone = tone_of(d, rivet)
    spots = [(x, y) for y in (0.2, 0.8) for x in (0.15, 0.38, 0.62, 0.85)] if layout == "rows" else [
        (x, y) for y in (0.16, 0.5, 0.84) for x in (0.16, 0.5, 0.84)]  # fmt: skip
    size = d.uniform(0.10, 0.13)
    parts = [
        Part("disc", x + d.uniform(-0.012, 0.012), y + d.uniform(-0.012, 0.012), size, size, tone) for x, y in spots
    ]
    words = {"metal": metal, "rivets": rivet, "layout": layout}
    return Scene(words=words, colours={"metal": np.array(tone_of(d, metal))},
                 parts=parts, data={"streak": d.grid(90, 3), "band": d.grid(7, 3), "glare": d.uniform(0.1, 0.9),
                                    "strength": d.uniform(0.2, 0.45), "seam": d.uniform(0.35, 0.65)})  # fmt: skip


def render_brushed(c: Canvas, s: Scene) -> Rendering:
    data = s.data
    streak, band = (value_noise(data[name], c.x, c.y) - 0.5 for name in ("streak", "band"))
    light = 0.85 + 0.40 * streak + 0.35 * band
    glare = np.clip(1.0 - np.abs(c.x + 0.3 * c.y - data["glare"] - 0.15) * 3.0, 0.0, 1.0)
    picture = (light + data["strength"] * glare * glare)[:, :, None] * s.colours["metal"]
    groove = np.clip(1.0 - np.abs(c.y - data["seam"]) / (1.2 * c.pixel), 0.0, 1.0)
    picture *= (1.0 - 0.45 * groove)[:, :, None]
    for part in s.parts:
        shadow = cover(disc_distance(c, part.x + 0.012, part.y + 0.014, 0.5 * part.w + 0.01), 2.5 * c.pixel)
        picture *= (1.0 - 0.35 * shadow)[:, :, None]
        paint(c, picture, part, bevel=0.6)
    return picture, whole(c)
