"""Networks as boxes and arrows, with the numbers of a loaded model."""

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from zsad_lib.diffusion.guidance import GuidedModel

FROZEN, TRAINED, PLAIN = "0.88", "#fdd0a2", "white"
ZERO = {"color": "#c0392b", "lw": 1.4}  # arrows that are convolutions which start at zero


def guided_network(model: GuidedModel) -> Figure:
    """DZAD's network with the channels of a loaded model: Stable Diffusion above, the guide below."""
    widths = list(model.backbone.unet.config.block_out_channels)
    last = 2 * len(widths) + 2
    figure, axis = plt.subplots(figsize=(1.15 * (last + 2), 3.6))
    _boxes(axis, model, widths)
    _arrows(axis, len(widths))
    right = {"x": last + 0.4, "ha": "right", "fontsize": 8}
    axis.text(y=0.3, s="Stable Diffusion: grey is frozen, orange trained", **right)
    axis.text(y=-0.1, s="SG network: trained as a whole", **right)
    axis.text(y=-0.5, s="red: convolutions that start at zero", color=ZERO["color"], **right)
    axis.set(xlim=(-0.6, last + 0.6), ylim=(-1.6, 3.4))
    axis.axis("off")
    figure.tight_layout(pad=0.2)
    return figure


def _boxes(axis: Axes, model: GuidedModel, widths: list[int]) -> None:
    channels, height, width = model.backbone.latent_shape
    latent, size, hint = f"[{channels},{height},{width}]", model.backbone.image_size, model.guide.hint
    above = [(f"noisy latent\n{latent}", PLAIN), *((f"encoder\n{c}", FROZEN) for c in widths)]
    above += [(f"middle\n{widths[-1]}", FROZEN), *((f"decoder\n{c}", TRAINED) for c in widths[::-1])]
    above += [(f"noise\n{latent}", PLAIN)]
    stack = [layer.out_channels for layer in (hint.conv_in, *hint.blocks, hint.conv_out)]
    below = ["hint stack\n" + ",".join(map(str, stack[:3])) + f" …\n{stack[-2]} → {stack[-1]}"]
    below += [f"copy of\nencoder\n{c}" for c in widths] + [f"copy of\nmiddle\n{widths[-1]}", "SFF"]
    _box(axis, 0, -1.2, f"image\n[3,{size},{size}]", PLAIN)
    for x, (text, colour) in enumerate(above):
        _box(axis, x, 2, text, colour)
    for x, text in enumerate(below):
        _box(axis, x, 0, text, TRAINED)


def _arrows(axis: Axes, levels: int) -> None:
    middle, last = levels + 1, 2 * levels + 2
    for k in range(levels):  # the skips of the U-Net
        _arrow(axis, (1 + k, 2.34), (last - 1 - k, 2.34), -0.3 / (levels - k) ** 0.7, color="0.75")
    for x in range(last):
        _arrow(axis, (x + 0.44, 2), (x + 0.56, 2))
    for x in range(middle):
        _arrow(axis, (x + 0.44, 0), (x + 0.56, 0), **(ZERO if x == 0 else {}))
    _arrow(axis, (0, -0.86), (0, -0.34))
    _arrow(axis, (0.3, 1.66), (0.8, 0.34))
    _arrow(axis, (middle, 0.34), (middle, 1.66), **ZERO)
    for k, x in enumerate((levels - 1, levels)):  # what the feature fusion reads
        _arrow(axis, (x, -0.34), (middle + 0.8 + 0.3 * k, -0.34), 0.35 - 0.05 * k, **ZERO)
    _arrow(axis, (middle + 1, 0.34), (middle + 1, 1.66))


def _box(axis: Axes, x: float, y: float, text: str, colour: str) -> None:
    style = {"boxstyle": "round,pad=0.02,rounding_size=0.06", "facecolor": colour, "edgecolor": "0.3", "linewidth": 0.8}
    axis.add_patch(FancyBboxPatch((x - 0.42, y - 0.32), 0.84, 0.64, **style))
    axis.text(x, y, text, ha="center", va="center", fontsize=7)


def _arrow(axis: Axes, start: tuple, end: tuple, bend: float = 0.0, **style) -> None:
    curve = {"connectionstyle": f"arc3,rad={bend}", "shrinkA": 2, "shrinkB": 2}
    shape = {"arrowstyle": "-|>", "mutation_scale": 8, "color": "0.3", "lw": 0.9}
    axis.annotate("", end, start, arrowprops={**curve, **shape, **style})
