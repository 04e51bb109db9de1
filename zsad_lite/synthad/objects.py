"""The six objects of synthad: how each is sampled (a Scene) and rendered (pixels, and where defects may lie)."""

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
from zsad_lite.synthad.scene import (
    PALETTE,
    Part,
    Rendering,
    Scene,
    paint_backdrop,
    paint_parts,
    part_distance,
    sample_backdrop,
    tone_of,
    whole,
)


def _along(x: float, y: float, turns: float, distance: float) -> tuple[float, float]:
    """The point `distance` from (x, y) on an axis turned by `turns`."""
    u, v = rotate(distance, 0.0, -turns)
    return x + float(u), y + float(v)


def _around(x: float, y: float, turns: float, radius: float) -> tuple[float, float]:
    """The point of a circle about (x, y), clockwise from its top."""
    return x + radius * float(wave(turns)), y - radius * float(wave(turns + 0.25))


def sample_bottle(d: Dice) -> Scene:
    glass, label = d.choice(("green", "brown", "blue", "purple")), d.choice(("cream", "white", "yellow", "red", "pink"))
    stripe = d.choice([w for w in ("red", "blue", "black", "green", "orange") if w not in (glass, label)])
    ground, backdrop = sample_backdrop(d, ("white", "grey", "cream", "teal"))
    x, width, shoulder = 0.5 + d.uniform(-0.03, 0.03), d.uniform(0.34, 0.44), d.uniform(0.30, 0.36)
    neck, bottom = d.uniform(0.12, 0.16), d.uniform(0.92, 0.96)
    paper, ink, dark = tone_of(d, label), tone_of(d, stripe), tone_of(d, glass)
    top, height = d.uniform(0.48, 0.54), d.uniform(0.24, 0.30)

    def bar(y, w, h, colour):
        return Part("box", x, y, w, h, colour, corner=0.008)

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


def render_bottle(c: Canvas, s: Scene) -> Rendering:
    data = s.data
    picture = paint_backdrop(c, data["backdrop"])
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
        alpha = cover(part_distance(c, part), c.pixel)
        blend(picture, alpha, light[:, :, None] * np.asarray(part.colour))
    x = data["x"] + data["gloss"]
    gloss = cover(segment_distance(c, x, 0.42, x, 0.86) - 0.008, c.pixel)
    blend(picture, 0.5 * gloss * region, (1.0, 1.0, 1.0))
    return picture, region


def sample_screw(d: Dice) -> Scene:
    metal = d.choice(("grey", "yellow", "black", "brown"))
    washer = d.choice([w for w in ("grey", "white", "black", "orange") if w != metal])
    ground, backdrop = sample_backdrop(d, ("white", "cream", "teal", "blue", "grey"))
    turns, tone = d.uniform(-0.06, 0.06), tone_of(d, metal)
    thread = tuple(min(1.0, 1.35 * v + 0.08) for v in tone)
    cx, cy, length, width = 0.5 + d.uniform(-0.04, 0.04), 0.5 + d.uniform(-0.05, 0.05), 0.72, d.uniform(0.13, 0.16)
    count = d.integer(9, 11)

    def box(along, w, h, colour, fault=True, tilt=0.0, corner=0.0):
        return Part("box", *_along(cx, cy, turns, along), w, h, colour, turns + tilt, corner, fault)

    pitch = 0.46 / count
    parts = [box(0.05, length - 0.1, width, tone, fault=False)]
    parts += [box(-0.07 + pitch * (k + 0.5), pitch * 0.55, width + 0.07, thread, tilt=0.03) for k in range(count)]
    parts += [box(-0.21, 0.035, width + 0.19, tone_of(d, washer)),
              box(-0.31, 0.14, width + 0.13, tone, fault=False, corner=0.03),
              box(-0.345, 0.03, width + 0.01, tuple(0.35 * v for v in tone))]  # fmt: skip
    return Scene(words={"metal": metal, "washer": washer, "backdrop": ground}, colours={}, parts=parts,
                 data={"backdrop": backdrop})  # fmt: skip


def render_parts(c: Canvas, s: Scene) -> Rendering:
    """Objects that are nothing but parts on a backdrop."""
    picture = paint_backdrop(c, s.data["backdrop"])
    return picture, paint_parts(c, picture, s)


BOARD_SLOTS = (  # kind, x, y, w, h
    ("chip", 0.34, 0.34, 0.28, 0.22), ("chip", 0.70, 0.70, 0.24, 0.24), ("cap", 0.68, 0.22, 0.13, 0.13),
    ("cap", 0.86, 0.22, 0.13, 0.13), ("res", 0.20, 0.60, 0.07, 0.15), ("res", 0.32, 0.60, 0.07, 0.15),
    ("res", 0.44, 0.60, 0.07, 0.15), ("led", 0.22, 0.84, 0.09, 0.09), ("led", 0.38, 0.84, 0.09, 0.09),
    ("res", 0.68, 0.42, 0.15, 0.07), ("res", 0.88, 0.42, 0.07, 0.15),
)  # fmt: skip


def sample_board(d: Dice) -> Scene:
    mask, led = d.choice(("green", "blue", "red", "black")), d.choice(("yellow", "white", "orange", "pink"))
    cap = d.choice([w for w in ("orange", "grey", "teal", "purple") if w != mask])
    tones = {"chip": tone_of(d, "black"), "cap": tone_of(d, cap), "res": tone_of(d, "cream"), "led": tone_of(d, led)}
    parts = []
    for kind, x, y, w, h in BOARD_SLOTS:
        x, y = x + d.uniform(-0.008, 0.008), y + d.uniform(-0.008, 0.008)
        if kind == "chip":
            pin = tuple(0.9 * v for v in PALETTE["grey"])
            parts += [Part("box", x + (k - 1.5) * w / 4.2, y, 0.03, h + 0.07, pin, fault=False) for k in range(4)]
        shape = "disc" if kind in ("cap", "led") else "box"
        parts.append(Part(shape, x, y, w, h, tones[kind], corner=0.012))
        if kind == "chip":
            parts.append(Part("disc", x - 0.3 * w, y - 0.25 * h, 0.035, 0.035, PALETTE["white"]))
    lanes = [(d.uniform(0.05, 0.95), d.uniform(0.05, 0.95), d.choice((0, 1)), d.uniform(0.2, 0.5)) for _ in range(9)]
    base = tone_of(d, mask)
    return Scene(words={"mask": mask, "capacitors": cap, "lamps": led}, colours={}, parts=parts,
                 data={"base": base, "lanes": lanes, "shade": d.grid(5, 5)})  # fmt: skip


def render_board(c: Canvas, s: Scene) -> Rendering:
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
    paint_parts(c, picture, s)
    return picture, whole(c)


def sample_capsule(d: Dice) -> Scene:
    left, right = d.sample(("red", "white", "yellow", "green", "blue", "orange", "purple"), 2)
    ground, backdrop = sample_backdrop(d, ("grey", "cream", "teal", "black"))
    turns, cx, cy = d.uniform(-0.09, 0.09), 0.5 + d.uniform(-0.03, 0.03), 0.5 + d.uniform(-0.04, 0.04)
    length, width = d.uniform(0.74, 0.82), d.uniform(0.30, 0.36)
    one, two, ink = tone_of(d, left), tone_of(d, right), tone_of(d, "black")

    axis = (cx, cy, turns)
    marks = [Part("box", *_along(*axis, -0.28 + 0.075 * k), 0.035, width * 0.42, ink, turns, 0.005) for k in range(3)]
    dots = [Part("disc", *_along(*axis, 0.14 + 0.1 * k), 0.06, 0.06, ink) for k in range(2)]
    band = [Part("box", *_along(*axis, 0.0), 0.035, width + 0.015, tuple(0.6 * v for v in one), turns)]
    pose = {"turns": turns, "x": cx, "y": cy, "length": length, "width": width}
    return Scene(
        words={"left": left, "right": right, "backdrop": ground},
        colours={"left": one, "right": two},
        parts=band + marks + dots,
        data={"backdrop": backdrop, **pose},
    )


def render_capsule(c: Canvas, s: Scene) -> Rendering:
    data = s.data
    picture = paint_backdrop(c, data["backdrop"])
    pill = (data["length"], data["width"], data["turns"], 0.5 * data["width"])
    shadow = box_distance(c, data["x"] + 0.02, data["y"] + 0.03, *pill)
    picture *= (1.0 - 0.4 * cover(shadow, 5.0 * c.pixel))[:, :, None]
    u, v = rotate(c.x - data["x"], c.y - data["y"], data["turns"])
    region = cover(box_distance(c, data["x"], data["y"], *pill), c.pixel)
    across = v / data["width"]
    light = 1.08 - 1.5 * (across + 0.12) * (across + 0.12)
    shell = np.where((u < 0.0)[:, :, None], np.asarray(s.colours["left"]), np.asarray(s.colours["right"]))
    blend(picture, region, light[:, :, None] * shell)
    paint_parts(c, picture, s)
    gloss = cover(np.abs(across + 0.27) - 0.035, 0.08) * cover(np.abs(u) - 0.36 * data["length"], 4 * c.pixel)
    blend(picture, 0.55 * gloss * region, (1.0, 1.0, 1.0))
    return picture, region


def sample_connector(d: Dice) -> Scene:
    shell = d.choice(("grey", "black", "white", "blue"))
    trio = d.choice((("red", "yellow", "blue"), ("brown", "green", "white"), ("purple", "orange", "teal")))
    ground, backdrop = sample_backdrop(d, ("cream", "grey", "teal", "brown"))
    turns, cx, cy = d.uniform(-0.05, 0.05), 0.5 + d.uniform(-0.03, 0.03), 0.5 + d.uniform(-0.03, 0.03)
    copper = tone_of(d, "orange")
    parts = [Part("disc", cx, cy, 0.84, 0.84, tone_of(d, shell), fault=False),
             Part("disc", cx, cy, 0.70, 0.70, tuple(0.6 * v for v in tone_of(d, "grey")), fault=False)]  # fmt: skip
    for k, word in enumerate(trio):
        angle = turns + k / 3
        x, y = _around(cx, cy, angle, 0.19)
        parts += [Part("disc", x, y, 0.29, 0.29, tone_of(d, word)),
                  Part("disc", x, y, 0.185, 0.185, tuple(0.5 * v for v in copper), fault=False)]  # fmt: skip
        parts.append(Part("disc", x, y, 0.055, 0.055, copper))
        for m in range(6):
            sx, sy = float(wave(m / 6 + angle)), float(wave(m / 6 + 0.25 + angle))
            parts.append(Part("disc", x + 0.06 * sx, y + 0.06 * sy, 0.055, 0.055, copper))
    parts.append(Part("box", cx, cy - 0.385, 0.10, 0.06, PALETTE["white"], corner=0.01))
    return Scene(words={"shell": shell, "wires": " ".join(trio), "backdrop": ground}, colours={}, parts=parts,
                 data={"backdrop": backdrop})  # fmt: skip


def sample_gauge(d: Dice) -> Scene:
    rim, dial = d.choice(("black", "grey", "brown", "blue")), d.choice(("white", "cream", "black"))
    ink = tone_of(d, "white" if dial == "black" else "black")
    zone = d.choice(("red", "orange", "green"))
    ground, backdrop = sample_backdrop(d, ("grey", "teal", "brown", "white"))
    cx, cy = 0.5 + d.uniform(-0.02, 0.02), 0.5 + d.uniform(-0.02, 0.02)
    parts = [Part("disc", cx, cy, 0.90, 0.90, tone_of(d, rim), fault=False),
             Part("disc", cx, cy, 0.76, 0.76, tone_of(d, dial), fault=False)]  # fmt: skip

    for k in range(11):
        turn = -0.375 + 0.075 * k
        long = k % 5 == 0
        parts.append(
            Part("box", *_around(cx, cy, turn, 0.315), 0.030 if long else 0.020, 0.10 if long else 0.06, ink, turn)
        )
    for k in range(4):
        turn = 0.20 + 0.05 * k
        parts.append(Part("disc", *_around(cx, cy, turn, 0.215), 0.06, 0.06, tone_of(d, zone, 0.02)))
    parts.append(Part("box", cx, cy + 0.22, 0.17, 0.06, ink, corner=0.01))
    turn = d.uniform(-0.375, 0.375)
    parts += [Part("box", *_around(cx, cy, turn, 0.11), 0.030, 0.28, tone_of(d, "red"), turn, fault=False),
              Part("disc", cx, cy, 0.10, 0.10, tone_of(d, rim), fault=False)]  # fmt: skip
    return Scene(words={"rim": rim, "dial": dial, "zone": zone, "backdrop": ground}, colours={}, parts=parts,
                 data={"backdrop": backdrop})  # fmt: skip
