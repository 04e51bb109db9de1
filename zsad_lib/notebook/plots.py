"""Pictures and tables for notebooks and the report."""

import io
import json
import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from IPython import get_ipython
from IPython.display import Markdown, display
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from PIL import Image

from zsad_lib.data.images import read_image
from zsad_lib.diffusion.guidance import GuidedModel
from zsad_lib.toy import LineModel

sns.set_theme(context="notebook", style="white", font_scale=0.9)
plt.rcParams.update({"figure.dpi": 90, "savefig.dpi": 160, "image.interpolation": "nearest", "svg.hashsalt": "zsad"})


class Gallery:
    """Shows exhibits in a notebook and, with ``out``, also writes them for the report.

    out: the report's folder or "" (show only); source: the notebook's name. Figures go to ``out/figures`` as PNG
    and SVG, tables to ``out/tables`` as CSV, Markdown and LaTeX; ``out/exhibits/SOURCE.jsonl`` lists them.
    """

    def __init__(self, source: str, out: str | Path = ""):
        self.source, self.out = source, Path(out) if out else None
        if self.out:
            for folder in ("figures", "tables", "exhibits"):
                (self.out / folder).mkdir(parents=True, exist_ok=True)
            self._list().write_text("")

    def _list(self) -> Path:
        return self.out / "exhibits" / f"{self.source}.jsonl"

    def _record(self, kind: str, name: str, caption: str) -> str:
        if not re.fullmatch(r"[a-z0-9_]+", name):
            raise ValueError(f"exhibit names are lower case letters, digits and _, not {name!r}")
        entry = {"kind": kind, "name": f"{self.source}_{name}", "caption": caption, "source": self.source}
        with self._list().open("a") as lines:
            lines.write(json.dumps(entry) + "\n")
        return entry["name"]

    def figure(self, name: str, figure: Figure, caption: str) -> None:
        if self.out:
            target = self.out / "figures" / self._record("figure", name, caption)
            figure.savefig(f"{target}.png", bbox_inches="tight")
            figure.savefig(f"{target}.svg", bbox_inches="tight", metadata={"Date": None})
        _show(figure, caption)
        plt.close(figure)

    def table(self, name: str, frame: pd.DataFrame, caption: str) -> None:
        if self.out:
            target = self.out / "tables" / self._record("table", name, caption)
            Path(f"{target}.csv").write_text(frame.to_csv())
            Path(f"{target}.md").write_text(frame.to_markdown() + "\n")
            latex = frame.to_latex(escape=True, caption=caption, label=f"tab:{target.name}")
            Path(f"{target}.tex").write_text(latex)
        _show(frame, caption)


def _show(exhibit, caption: str) -> None:
    if get_ipython() is not None:  # on the command line the report's files are enough
        display(exhibit, Markdown(f"*{caption}*"))


def to_picture(image: torch.Tensor) -> np.ndarray:
    """float [3, H, W] (or a mask or map [H, W]) -> array for ``imshow``."""
    array = image.detach().float().cpu().numpy()
    return array.transpose(1, 2, 0) if array.ndim == 3 else array


def picture_grid(
    rows: Sequence[Sequence],
    titles: Sequence[str] = (),
    labels: Sequence[str] = (),
    size: float = 1.25,
    cmaps: Sequence[str | None] = (),
    shared_scale: bool = False,
) -> Figure:
    """A grid of pictures: images [3, H, W] in [0, 1], and masks or maps [H, W].

    titles stand above the columns, labels left of the rows; cmaps names a colour map for each column's maps
    (default magma). With ``shared_scale`` the maps of a column share their colour scale.
    """
    columns = max(len(row) for row in rows)
    figure, axes = plt.subplots(len(rows), columns, figsize=(size * columns, size * len(rows) + 0.25), squeeze=False)
    for c in range(columns):
        maps = [row[c] for row in rows if c < len(row) and row[c] is not None and row[c].ndim == 2]
        top = max((float(m.max()) for m in maps), default=1.0) if shared_scale else None
        for r, row in enumerate(rows):
            axis = axes[r, c]
            axis.set_xticks([])
            axis.set_yticks([])
            sns.despine(ax=axis, left=True, bottom=True)
            if c < len(row) and row[c] is not None:
                cmap = cmaps[c] if c < len(cmaps) and cmaps[c] else "magma"
                axis.imshow(to_picture(row[c]).clip(0, None), cmap=cmap, vmin=0, vmax=top)
            if r == 0 and c < len(titles):
                axis.set_title(titles[c], fontsize=9)
            if c == 0 and r < len(labels):
                axis.set_ylabel(labels[r], fontsize=9, rotation=0, ha="right", va="center")
    figure.tight_layout(pad=0.3)
    return figure


def overlay(image: torch.Tensor, anomaly_map: torch.Tensor, top: float | None = None) -> torch.Tensor:
    """The map's square root (or weak spots would not show) as a heat over a grey version of the image: [3, H, W] in
    [0, 1]; ``top`` is the map's hottest value."""
    heat = (anomaly_map / (top or anomaly_map.max().clamp_min(1e-12))).clamp(0, 1).sqrt()
    colours = torch.tensor(plt.get_cmap("magma")(heat.numpy())[..., :3]).permute(2, 0, 1).float()
    grey = image.mean(0, keepdim=True).expand(3, -1, -1)
    return 0.45 * grey + 0.55 * colours


def save_heatmaps(results, samples, folder: str | Path) -> Path:
    """Write image and overlay side by side for every scored sample, named by rank and score, hottest first.

    results: ``scoring.Results`` with maps [N, H, H]; samples: its N samples. One colour scale for all, so that a
    normal image looks cool. Returns the folder.
    """
    folder, maps = Path(folder), torch.from_numpy(results.maps)
    folder.mkdir(parents=True, exist_ok=True)
    top = float(maps.max().clamp_min(1e-12))
    order = results.frame["pred_score"].to_numpy().argsort()[::-1]
    for rank, k in enumerate(order):
        image = read_image(samples[k].image_path, maps.shape[-1])
        pair = torch.cat([image, overlay(image, maps[k], top)], dim=2)
        pixels = (to_picture(pair) * 255).round().astype(np.uint8)
        shown = Image.fromarray(pixels).resize((512, 256), Image.Resampling.NEAREST)
        score = results.frame["pred_score"].iloc[k]
        shown.save(folder / f"{rank:04d}_{score:.4f}_{samples[k].image_path.stem}.png")
    return folder


def heatmap(frame: pd.DataFrame, title: str, fmt: str = ".1f", cmap: str = "viridis") -> Figure:
    """A table of numbers as coloured cells. The parts of a row's name, where it has several, are joined by ": "."""
    if frame.index.nlevels > 1:
        frame = frame.set_axis([": ".join(map(str, row)) for row in frame.index])
    figure, axis = plt.subplots(figsize=(1.0 + 0.8 * frame.shape[1], 0.9 + 0.5 * frame.shape[0]))
    sns.heatmap(frame, annot=True, fmt=fmt, cmap=cmap, cbar=False, linewidths=0.5, ax=axis)
    axis.set_title(title, fontsize=10)
    figure.tight_layout()
    return figure


def interval_dots(measured: pd.DataFrame, metric: str, label: str = "") -> Figure:
    """A dot with its interval, in percent, for each category (rows) and method (colours): a frame of
    ``scoring.measure``, and one of its metrics; what is undefined is left out. label: what the axis says."""
    frame = measured[(measured["metric"] == metric) & measured["value"].notna()]
    categories, methods = frame["category"].unique()[::-1], frame["method"].unique()
    figure, axis = plt.subplots(figsize=(6.5, 0.8 + 0.34 * len(categories)))
    for k, method in enumerate(methods):
        rows = frame[frame["method"] == method].set_index("category").reindex(categories)
        value, low, high = (100 * rows[column].to_numpy(float) for column in ("value", "low", "high"))
        spread = np.nan_to_num(np.stack([value - low, high - value])).clip(0)
        place = np.arange(len(categories)) + 0.24 * ((len(methods) - 1) / 2 - k)
        axis.errorbar(value, place, xerr=spread, fmt="o", ms=4, capsize=2, lw=1, label=method)
    axis.set(yticks=range(len(categories)), yticklabels=categories, xlabel=label or f"{metric}, percent")
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    return figure


def histograms(panels: dict[str, dict], label: str = "", bins: int = 40, size=(5.25, 2.9)) -> Figure:
    """Histograms over each other, one panel a title: {title: {name: values [N]}}.

    label: what the values are; bins: how many, from the lowest to the highest value of a panel; size: inches a panel.
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(size[0] * len(panels), size[1]), squeeze=False)
    for axis, (title, groups) in zip(axes.flat, panels.items(), strict=True):
        _overlaid(axis, groups, bins)
        axis.set(title=title, xlabel=label)
    axes[0, 0].legend()
    figure.tight_layout()
    return figure


def _overlaid(axis, groups, bins):
    edges = np.histogram_bin_edges(np.concatenate(list(groups.values())), bins)
    for name, values in groups.items():
        axis.hist(values, bins=edges, alpha=0.6, label=name)


def log_scale(groups: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """log₁₀(1 + value) of {name: values [N]}, all moved up by as much as the lowest is below 0; the order stays."""
    lowest = min(0.0, *(values.min() for values in groups.values()))
    return {name: np.log10(values - lowest + 1) for name, values in groups.items()}


def quartile_curves(timesteps: Sequence[int], panels: dict[str, dict], linear: Sequence[str] = ()) -> Figure:
    """Median and quartiles over images by timestep, two panels a row: {title: {name: values [N,K]}}.

    Fewer values than timesteps belong to the last ones. linear: the titles without a logarithmic scale.
    """
    rows = -(-len(panels) // 2)
    figure, axes = plt.subplots(rows, 2, figsize=(10.5, 2.8 * rows), sharex=True, squeeze=False)
    for axis, (title, groups) in zip(axes.flat, panels.items(), strict=False):
        for name, values in groups.items():
            low, middle, high = np.quantile(values, [0.25, 0.5, 0.75], axis=0)
            steps = timesteps[len(timesteps) - len(middle) :]
            (drawn,) = axis.plot(steps, middle, marker=".", label=name)
            axis.fill_between(steps, low, high, color=drawn.get_color(), alpha=0.15)
        axis.set_title(title, fontsize=10)
        axis.set_yscale("linear" if title in linear else "log")
    for axis in axes[-1]:
        axis.set_xlabel("t")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9)
    figure.tight_layout()
    return figure


def interval_curves(panels: dict[str, dict], label: str = "") -> Figure:
    """Values with their intervals, one panel a title: {title: {name: (x, value, low, high)}}, four arrays [K] each.

    label: what x is. The curves stand a little apart, so that their intervals can be told.
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(5.25 * len(panels), 3.2), squeeze=False)
    for axis, (title, curves) in zip(axes.flat, panels.items(), strict=True):
        for k, (name, (x, value, low, high)) in enumerate(curves.items()):
            x = np.asarray(x) + (k - (len(curves) - 1) / 2) * 0.01 * np.ptp(x)
            spread = np.stack([np.subtract(value, low), np.subtract(high, value)]).clip(0)
            axis.errorbar(x, value, spread, marker="o", capsize=3, label=name)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(label)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9)
    figure.tight_layout()
    return figure


def _box(axis, x, y, text, colour):
    style = {"boxstyle": "round,pad=0.02,rounding_size=0.06", "facecolor": colour, "edgecolor": "0.3", "linewidth": 0.8}
    axis.add_patch(FancyBboxPatch((x - 0.42, y - 0.32), 0.84, 0.64, **style))
    axis.text(x, y, text, ha="center", va="center", fontsize=7)


def _arrow(axis, start, end, bend=0.0, **style):
    style = {"color": "0.3", "lw": 0.9, "arrowstyle": "-|>", "mutation_scale": 8, **style}
    axis.add_patch(FancyArrowPatch(start, end, connectionstyle=f"arc3,rad={bend}", **style))


def guided_network(model: GuidedModel) -> Figure:
    """DZAD's network as boxes and arrows, with the channels of a loaded model: Stable Diffusion above, the guide below.

    Grey is frozen, orange is trained; red arrows are convolutions that start at zero.
    """
    frozen, trained, plain, zero = "0.88", "#fdd0a2", "white", {"color": "#c0392b", "lw": 1.4}
    widths = list(model.backbone.unet.config.block_out_channels)
    levels, (channels, height, width) = len(widths), model.backbone.latent_shape
    size, middle, last = model.backbone.image_size, levels + 1, 2 * levels + 2
    embedding = model.guide.hint
    hint = [
        embedding.conv_in.out_channels,
        *(c.out_channels for c in embedding.blocks),
        embedding.conv_out.out_channels,
    ]
    figure, axis = plt.subplots(figsize=(1.15 * (last + 2), 3.6))
    latent = f"[{channels},{height},{width}]"
    top = [("noisy latent\n" + latent, plain), *((f"encoder\n{c}", frozen) for c in widths)]
    top += [(f"middle\n{widths[-1]}", frozen), *((f"decoder\n{c}", trained) for c in widths[::-1])]
    top += [("noise\n" + latent, plain)]
    for x, (text, colour) in enumerate(top):
        _box(axis, x, 2, text, colour)
    for k in range(levels):
        _arrow(axis, (1 + k, 2.34), (last - 1 - k, 2.34), -0.3 / (levels - k) ** 0.7, color="0.75")
    bottom = [f"copy of\nencoder\n{c}" for c in widths] + [f"copy of\nmiddle\n{widths[-1]}", "SFF"]
    _box(axis, 0, -1.2, f"image\n[3,{size},{size}]", plain)
    _box(axis, 0, 0, "hint stack\n" + ",".join(map(str, hint[:3])) + " …\n" + f"{hint[-2]} → {hint[-1]}", trained)
    for x, text in enumerate(bottom, 1):
        _box(axis, x, 0, text, trained)
    for row, end in ((2, last), (0, middle)):
        for x in range(row == 0, end):
            _arrow(axis, (x + 0.44, row), (x + 0.56, row))
    _arrow(axis, (0.44, 0), (0.56, 0), **zero)
    _arrow(axis, (0, -0.86), (0, -0.34))
    _arrow(axis, (0.3, 1.66), (0.8, 0.34))
    _arrow(axis, (middle, 0.34), (middle, 1.66), **zero)
    for k, x in enumerate((levels - 1, levels)):
        _arrow(axis, (x, -0.34), (middle + 0.8 + 0.3 * k, -0.34), 0.35 - 0.05 * k, **zero)
    _arrow(axis, (middle + 1, 0.34), (middle + 1, 1.66))
    axis.text(last + 0.4, 0.3, "Stable Diffusion: grey is frozen, orange trained", ha="right", fontsize=8)
    axis.text(last + 0.4, -0.1, "SG network: trained as a whole", ha="right", fontsize=8)
    axis.text(last + 0.4, -0.5, "red: convolutions that start at zero", ha="right", fontsize=8, color="#c0392b")
    axis.set(xlim=(-0.6, last + 0.6), ylim=(-1.6, 3.4))
    axis.axis("off")
    figure.tight_layout(pad=0.2)
    return figure


def matrices(panels: dict[str, np.ndarray], label: str = "", fmt: str = ".2f") -> Figure:
    """Matrices [N,M] of N stages side by side as coloured cells on one scale, stage 1 above: {title: matrix}."""
    top = max(float(np.max(matrix)) for matrix in panels.values())
    width = sum(0.75 * matrix.shape[1] + 0.9 for matrix in panels.values())
    figure, axes = plt.subplots(1, len(panels), figsize=(max(width, 4.5), 3.6), squeeze=False, sharey=True)
    for axis, (title, matrix) in zip(axes.flat, panels.items(), strict=True):
        stages, steps = (range(1, n + 1) for n in matrix.shape)
        annotate = matrix.shape[1] <= 4
        frame = pd.DataFrame(matrix, stages, steps)
        sns.heatmap(frame, annot=annotate, fmt=fmt, cmap="viridis", vmin=0, vmax=top, cbar=False, ax=axis)
        axis.set(title=title, xlabel=label)
        axis.tick_params(axis="y", rotation=0, labelsize=8)
        axis.title.set_fontsize(9)
    axes[0, 0].set_ylabel("stage")
    figure.tight_layout()
    return figure


def curves(x: Sequence, lines: dict[str, Sequence], xlabel: str, ylabel: str, log: bool = False) -> Figure:
    """Lines over a shared x: {name: values}."""
    figure, axis = plt.subplots(figsize=(7, 2.8))
    for name, values in lines.items():
        axis.plot(x, values, marker=".", label=name)
    axis.set(xlabel=xlabel, ylabel=ylabel, yscale="log" if log else "linear")
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    return figure


def bars(frame: pd.DataFrame, ylabel: str, chance: float | None = None) -> Figure:
    """A table of numbers as bars, a group for each row and a colour for each column; chance: a dashed line."""
    figure, axis = plt.subplots(figsize=(1.4 + 1.15 * len(frame), 2.8))
    frame.plot.bar(ax=axis, width=0.8, rot=20)
    if chance is not None:
        axis.axhline(chance, color="grey", lw=1, ls="--")
    axis.set(ylabel=ylabel, xlabel="")
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    return figure


def scatter(groups: dict[str, tuple], markers: tuple[str, str], labels: tuple[str, str], log: bool = False) -> Figure:
    """Points by group, {name: (x [n], y [n], hollow bool [n])}; markers: what full and hollow ones mean."""
    figure, axis = plt.subplots(figsize=(6.6, 3.2))
    for k, (name, (x, y, empty)) in enumerate(groups.items()):
        for chosen, face in ((~empty, f"C{k}"), (empty, "none")):
            shown = name if face != "none" else None
            axis.scatter(x[chosen], y[chosen], s=22, facecolor=face, edgecolor=f"C{k}", linewidth=1, label=shown)
    for face, name in zip(("0.4", "none"), markers, strict=True):
        axis.scatter([], [], s=22, facecolor=face, edgecolor="0.4", label=name)
    axis.set(xlabel=labels[0], ylabel=labels[1], xscale="log" if log else "linear", yscale="log" if log else "linear")
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    return figure


def roc_and_pictures(labels, scores, title: str, pictures: Sequence, titles: Sequence[str] = ()) -> Figure:
    """The ROC curve of scores [N] against labels [N] (1 anomalous), and beside it pictures as in `picture_grid`."""
    from sklearn.metrics import roc_curve

    false, true, _ = roc_curve(labels, scores)
    width = 2.4 * (1 + len(pictures)) + 0.6
    figure, axes = plt.subplots(1, 1 + len(pictures), figsize=(width, 3.2))
    axes[0].plot(false, true, drawstyle="steps-post")
    axes[0].plot([0, 1], [0, 1], color="grey", lw=0.8, ls="--")
    axes[0].set(xlabel="false alarms", ylabel="found", box_aspect=1)
    axes[0].set_title(title, fontsize=9)
    for axis, picture, name in zip(axes[1:], pictures, titles or [""] * len(pictures), strict=True):
        axis.imshow(to_picture(picture).clip(0, None), cmap="magma", vmin=0)
        axis.set_title(name, fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
    # fixed margins: a tight layout would take as long as all the rest
    figure.subplots_adjust(left=0.75 / width, right=1 - 0.05 / width, bottom=0.19, top=0.91, wspace=0.08)
    return figure


def score_on_a_line(line: LineModel, levels: Sequence[int]) -> Figure:
    """The density of a line model at the timesteps `levels`, and below it the score; arrows show where it points."""
    x = torch.linspace(-2.5, 2.5, 501, dtype=torch.float64)
    places = torch.linspace(-2, 2, 13, dtype=torch.float64)
    figure, axes = plt.subplots(2, len(levels), figsize=(2.5 * len(levels), 4), sharex=True, squeeze=False)
    for top, bottom, t in zip(*axes, levels, strict=True):
        top.fill_between(x, line.log_density(x, t).exp(), color="C0", alpha=0.4)
        top.set_title(f"t = {t}", fontsize=10)
        bottom.plot(x, line.score(x, t), color="C3")
        bottom.axhline(0, color="grey", lw=0.5)
        bottom.quiver(places, 0 * places, line.score(places, t).sign(), 0 * places, scale=22, width=0.008)
    axes[0, 0].set_ylabel("density")
    axes[1, 0].set_ylabel("score")
    figure.tight_layout()
    return figure


def paths_on_a_line(timesteps: Sequence[int], groups: dict[str, tuple]) -> Figure:
    """Points on their way to noise, the noise predicted for them, and histograms of how fast that noise changes.

    timesteps: K of them; groups: {name: (points [N,K], noise [N,K], mean squared change of the noise [N])}, tensors.
    """
    figure, axes = plt.subplots(1, 3, figsize=(11, 3))
    for k, (points, noise, _) in enumerate(groups.values()):
        axes[0].plot(timesteps, points.T, color=f"C{k}", lw=0.8)
        axes[1].plot(timesteps, noise.T, color=f"C{k}", lw=0.8)
    _overlaid(axes[2], {name: change.log10() for name, (_, _, change) in groups.items()}, 20)
    axes[0].set(xlabel="t", title="the point")
    axes[1].set(xlabel="t", title="its predicted noise")
    axes[2].set(xlabel="log₁₀ mean (change of the noise)²", title="how fast it changes")
    axes[2].legend()
    figure.tight_layout()
    return figure


def png_bytes(figure: Figure, dpi: int = 80) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    plt.close(figure)
    return buffer.getvalue()
