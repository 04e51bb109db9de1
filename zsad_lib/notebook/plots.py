"""Pictures and tables for notebooks and the report."""

import re
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from IPython import get_ipython
from IPython.display import Markdown, display
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from zsad_lib import store
from zsad_lib.data.images import read_image
from zsad_lib.data.readers import Sample
from zsad_lib.evaluation.runs import Results
from zsad_lib.evaluation.tables import markdown

sns.set_theme(context="notebook", style="white", font_scale=0.9)
plt.rcParams.update({"figure.dpi": 90, "savefig.dpi": 160, "image.interpolation": "nearest", "svg.hashsalt": "zsad"})

LATEX = str.maketrans({"\\": r"\textbackslash{}", **{mark: f"\\{mark}" for mark in "&%$#_{}"}})


class Gallery:
    """Shows exhibits in a notebook and, with ``out``, also writes them for the report.

    out: the report's folder or "" (show only); source: the notebook's name. Figures go to ``out/figures`` as PNG
    and SVG, tables to ``out/tables`` as CSV, Markdown, LaTeX and HTML; ``out/exhibits/SOURCE.jsonl`` lists them.
    """

    def __init__(self, source: str, out: str | Path = ""):
        self.source, self.out = source, Path(out) if out else None
        if self.out:
            for folder in ("figures", "tables", "exhibits"):
                (self.out / folder).mkdir(parents=True, exist_ok=True)
            self._listing = self.out / "exhibits" / f"{source}.jsonl"
            self._listing.write_bytes(b"")

    def figure(self, name: str, figure: Figure, caption: str) -> None:
        """Show a figure and close it."""
        if self.out:
            target = self.out / "figures" / self._record("figure", name, caption)
            figure.savefig(f"{target}.png", bbox_inches="tight")
            figure.savefig(f"{target}.svg", bbox_inches="tight", metadata={"Date": None})
        _show(figure, caption)
        plt.close(figure)

    def table(self, name: str, frame: pd.DataFrame, caption: str) -> None:
        """Show a table."""
        if self.out:
            target = self.out / "tables" / self._record("table", name, caption)
            latex = frame.to_latex(escape=True, caption=caption.translate(LATEX), label=f"tab:{target.name}")
            written = {"csv": store.csv_text(frame), "md": markdown(frame) + "\n", "tex": latex}
            for suffix, text in {**written, "html": page_table(frame, f"table-{target.name}")}.items():
                Path(f"{target}.{suffix}").write_text(text, encoding="utf-8", errors="replace")
        _show(frame, caption)

    def _record(self, kind: str, name: str, caption: str) -> str:
        if not re.fullmatch(r"[a-z0-9_]+", name):
            raise ValueError(f"exhibit names are lower case letters, digits and _, not {name!r}")
        entry = {"kind": kind, "name": f"{self.source}_{name}", "caption": caption, "source": self.source}
        with self._listing.open("ab") as lines:
            store.append_line(lines, entry)
        return entry["name"]


def _show(exhibit: Figure | pd.DataFrame, caption: str) -> None:
    if get_ipython() is not None:  # on the command line the report's files are enough
        plain = re.sub(r"[\\`<$]|(?<=\])\(", r"\\\g<0>", caption)  # no tag, code, formula or link
        display(exhibit, Markdown(f"*{plain}*"))


def page_table(frame: pd.DataFrame, name: str) -> str:
    """A table as HTML for the report's page, with the id `name`; what is no number stands left."""
    levels = frame.index.nlevels
    words = [k for k in range(frame.shape[1]) if not frame.iloc[:, k].astype(str).str.match(r"[-+]?\d").any()]
    places = [*range(1, levels + 1), *(levels + 1 + k for k in words)]
    left = ", ".join(f"#{name} :is(th, td):nth-child({place})" for place in places)
    if levels == frame.columns.nlevels == 1:  # the index's name beside the columns', not below them
        frame = frame.rename_axis(index=None, columns=frame.index.name)
    with pd.option_context("display.max_colwidth", None):
        table = frame.to_html(table_id=name, border=0, sparsify=False, na_rep="", float_format="{:.6g}".format)
    return f"<style>{left} {{ text-align: left }}</style>\n{table}"


# --- images and maps


def to_picture(image: torch.Tensor) -> np.ndarray:
    """float [3, H, W] (or a mask or map [H, W]) -> array for ``imshow``."""
    array = image.detach().float().cpu().numpy()
    return array.transpose(1, 2, 0) if array.ndim == 3 else array


def picture_grid(
    rows: Sequence[Sequence[torch.Tensor | None]],
    titles: Sequence[str] = (),  # above the columns
    labels: Sequence[str] = (),  # left of the rows
    size: float = 1.25,  # inches a picture
    cmaps: Sequence[str | None] = (),  # of each column's maps; magma without
    shared_scale: bool = False,  # the maps of a column share their colour scale
) -> Figure:
    """A grid of pictures: images [3, H, W] in [0, 1], and masks or maps [H, W]; None leaves a place empty."""
    columns = max(len(row) for row in rows)
    figure, axes = plt.subplots(len(rows), columns, figsize=(size * columns, size * len(rows) + 0.25), squeeze=False)
    for c, column in enumerate(zip_longest(*rows)):
        maps = [picture for picture in column if picture is not None and picture.ndim == 2]
        top = max((float(m.max()) for m in maps), default=1.0) if shared_scale else None
        for axis, picture in zip(axes[:, c], column, strict=True):
            _draw(axis, picture, cmaps[c] if c < len(cmaps) else None, top)
            sns.despine(ax=axis, left=True, bottom=True)
    for axis, title in zip(axes[0], titles, strict=False):
        axis.set_title(title, fontsize=9)
    for axis, label in zip(axes[:, 0], labels, strict=False):
        axis.set_ylabel(label, fontsize=9, rotation=0, ha="right", va="center")
    figure.tight_layout(pad=0.3)
    return figure


def _draw(axis: Axes, picture: torch.Tensor | None, cmap: str | None = None, top: float | None = None) -> None:
    axis.set(xticks=[], yticks=[])
    if picture is not None:
        axis.imshow(to_picture(picture).clip(0, None), cmap=cmap or "magma", vmin=0, vmax=top)


def overlay(image: torch.Tensor, anomaly_map: torch.Tensor, top: float | None = None) -> torch.Tensor:
    """A map's square root (or weak spots would not show) as heat over the grey image, [3, H, W] in [0, 1].

    top: the value that is hottest (default: the map's own highest).
    """
    heat = (anomaly_map / (top or anomaly_map.max().clamp_min(1e-12))).clamp(0, 1).sqrt()
    colours = torch.tensor(plt.get_cmap("magma")(heat.numpy())[..., :3]).permute(2, 0, 1).float()
    grey = image.mean(0, keepdim=True).expand(3, -1, -1)
    return 0.45 * grey + 0.55 * colours


def save_heatmaps(results: Results, samples: Sequence[Sample], folder: str | Path) -> Path:
    """Write image and overlay side by side for every sample of a run, named by rank and score, hottest first.

    One colour scale for all, so that a normal image looks cool. Returns the folder.
    """
    folder, maps = Path(folder), torch.from_numpy(results.maps)
    folder.mkdir(parents=True, exist_ok=True)
    top = float(maps.max().clamp_min(1e-12))
    scores = results.frame["pred_score"].to_numpy()
    for rank, k in enumerate(scores.argsort()[::-1]):
        image = read_image(samples[k].image_path, maps.shape[-1])
        pair = torch.cat([image, overlay(image, maps[k], top)], dim=2)
        pixels = (to_picture(pair) * 255).round().astype(np.uint8)
        shown = Image.fromarray(pixels).resize((512, 256), Image.Resampling.NEAREST)
        name = store.file_name(f"{rank:04d}_{scores[k]:.4f}_{samples[k].image_path.stem}")
        shown.save(folder / f"{name}.png")
    return folder


def roc_and_pictures(
    labels: Sequence[int],  # [N], 1 is anomalous
    scores: Sequence[float],  # [N]
    title: str,
    pictures: Sequence[torch.Tensor],
    titles: Sequence[str] = (),
) -> Figure:
    """The ROC curve of scores against labels, and beside it pictures as in `picture_grid`."""
    from sklearn.metrics import roc_curve

    false, true, _ = roc_curve(labels, scores)
    width = 2.4 * (1 + len(pictures)) + 0.6
    figure, (curve, *places) = plt.subplots(1, 1 + len(pictures), figsize=(width, 3.2))
    curve.plot(false, true, drawstyle="steps-post")
    curve.plot([0, 1], [0, 1], color="grey", lw=0.8, ls="--")
    curve.set(xlabel="false alarms", ylabel="found", box_aspect=1)
    curve.set_title(title, fontsize=9)
    for axis, picture, name in zip(places, pictures, titles or [""] * len(pictures), strict=True):
        _draw(axis, picture)
        axis.set_title(name, fontsize=9)
    # fixed margins: a tight layout would take as long as all the rest
    figure.subplots_adjust(left=0.75 / width, right=1 - 0.05 / width, bottom=0.19, top=0.91, wspace=0.08)
    return figure


# --- tables of numbers as cells, dots and bars


def heatmap(frame: pd.DataFrame, title: str, fmt: str = ".1f", cmap: str = "viridis") -> Figure:
    """A table of numbers as coloured cells. The parts of a row's name, where it has several, are joined by ": "."""
    if frame.index.nlevels > 1:
        frame = frame.set_axis([": ".join(map(str, row)) for row in frame.index])
    figure, axis = plt.subplots(figsize=(1.0 + 0.8 * frame.shape[1], 0.9 + 0.5 * frame.shape[0]))
    sns.heatmap(frame, annot=True, fmt=fmt, cmap=cmap, cbar=False, linewidths=0.5, ax=axis)
    axis.set_title(title, fontsize=10)
    return _finished(figure)


def matrices(panels: dict[str, np.ndarray], label: str = "", fmt: str = ".2f") -> Figure:
    """Matrices [N,M] of N stages side by side as coloured cells on one scale, stage 1 above: {title: matrix}."""
    top = max(float(np.max(matrix)) for matrix in panels.values())
    width = sum(0.75 * matrix.shape[1] + 0.9 for matrix in panels.values())
    figure, axes = plt.subplots(1, len(panels), figsize=(max(width, 4.5), 3.6), squeeze=False, sharey=True)
    for axis, (title, matrix) in zip(axes.flat, panels.items(), strict=True):
        frame = pd.DataFrame(matrix, *(range(1, n + 1) for n in matrix.shape))
        annotate = matrix.shape[1] <= 4
        sns.heatmap(frame, annot=annotate, fmt=fmt, cmap="viridis", vmin=0, vmax=top, cbar=False, ax=axis)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel(label)
        axis.tick_params(axis="y", rotation=0, labelsize=8)
    axes[0, 0].set_ylabel("stage")
    return _finished(figure)


def interval_dots(measured: pd.DataFrame, metric: str, label: str = "") -> Figure:
    """A dot with its interval, in percent, for each category (rows) and method (colours).

    measured: a frame of `evaluate_runs`, of which one metric is shown; what is undefined is left out.
    label: what the axis says.
    """
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
    return _finished(figure)


def bars(frame: pd.DataFrame, ylabel: str, chance: float | None = None) -> Figure:
    """A table of numbers as bars, a group for each row and a colour for each column; chance: a dashed line."""
    axis = frame.plot.bar(figsize=(1.4 + 1.15 * len(frame), 2.8), width=0.8, rot=20, legend=False)
    axis.set(ylabel=ylabel, xlabel="")
    if chance is not None:
        axis.axhline(chance, color="grey", lw=1, ls="--")
    return _finished(axis.figure)


# --- curves, points and histograms


def curves(x: Sequence, lines: dict[str, Sequence], xlabel: str, ylabel: str, log: bool = False) -> Figure:
    """Lines over a shared x: {name: values}."""
    frame = pd.DataFrame(lines, index=pd.Index(x, name=xlabel))
    axis = frame.plot(figsize=(7, 2.8), marker=".", ylabel=ylabel, logy=log, legend=False)
    return _finished(axis.figure)


def interval_curves(
    panels: dict[str, dict[str, tuple]],
    label: str = "",  # what x is
    log: Sequence[str] = (),  # titles of the panels with a logarithmic scale
    height: float = 3.2,  # inches a row
) -> Figure:
    """Values and the bands of their intervals, two panels a row: {title: {name: (x, value, low, high)}}, each [K]."""
    rows = -(-len(panels) // 2)
    figure, axes = plt.subplots(rows, 2, figsize=(10.5, height * rows), sharex=True, squeeze=False)
    for axis, (title, lines) in zip(axes.flat, panels.items(), strict=False):
        for name, (x, value, low, high) in lines.items():
            (drawn,) = axis.plot(x, value, marker=".", label=name)
            axis.fill_between(x, low, high, color=drawn.get_color(), alpha=0.15)
        axis.set_title(title, fontsize=10)
        axis.set_yscale("log" if title in log else "linear")
    for axis in axes[-1]:
        axis.set_xlabel(label)
    return _finished(figure)


def quartile_curves(timesteps: Sequence[int], panels: dict[str, dict], linear: Sequence[str] = ()) -> Figure:
    """Median and quartiles over images by timestep, two panels a row: {title: {name: values [N,K]}}.

    Fewer values than timesteps belong to the last ones. linear: the titles without a logarithmic scale.
    """

    def quartiles(values):
        return timesteps[-values.shape[1] :], *np.quantile(values, [0.5, 0.25, 0.75], axis=0)

    found = {title: {name: quartiles(v) for name, v in groups.items()} for title, groups in panels.items()}
    return interval_curves(found, "t", [title for title in panels if title not in linear], height=2.8)


def scatter(
    groups: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]],  # {name: (x [n], y [n], hollow bool [n])}
    markers: tuple[str, str],  # what full and hollow points are
    labels: tuple[str, str],  # of the axes
    log: bool = False,
) -> Figure:
    """Points by group (colours), full and hollow ones."""
    figure, axis = plt.subplots(figsize=(6.6, 3.2))
    for k, (name, (x, y, hollow)) in enumerate(groups.items()):
        axis.scatter(x[~hollow], y[~hollow], s=22, color=f"C{k}", label=name)
        axis.scatter(x[hollow], y[hollow], s=22, facecolor="none", edgecolor=f"C{k}", linewidth=1)
    for face, name in zip(("0.4", "none"), markers, strict=True):
        axis.scatter([], [], s=22, facecolor=face, edgecolor="0.4", label=name)
    scale = "log" if log else "linear"
    axis.set(xlabel=labels[0], ylabel=labels[1], xscale=scale, yscale=scale)
    return _finished(figure)


def histograms(
    panels: dict[str, dict[str, np.ndarray]],  # {title: {name: values [N]}}
    label: str = "",  # what the values are
    bins: int = 40,  # from the lowest to the highest value of a panel
    size: tuple[float, float] = (5.25, 2.9),  # inches a panel
) -> Figure:
    """Histograms over each other, one panel a title."""
    figure, axes = plt.subplots(1, len(panels), figsize=(size[0] * len(panels), size[1]), squeeze=False)
    for axis, (title, groups) in zip(axes.flat, panels.items(), strict=True):
        edges = np.histogram_bin_edges(np.concatenate(list(groups.values())), bins)
        for name, values in groups.items():
            axis.hist(values, bins=edges, alpha=0.6, label=name)
        axis.set(title=title, xlabel=label)
    axes[0, 0].legend()
    figure.tight_layout()
    return figure


def log_scale(groups: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """log₁₀(1 + value) of {name: values [N]}, all moved up by as much as the lowest is below 0; the order stays."""
    lowest = min(0.0, *(values.min() for values in groups.values()))
    return {name: np.log10(values - lowest + 1) for name, values in groups.items()}


def _finished(figure: Figure) -> Figure:
    """The figure with the legend of its first axes, where these have one, at its right."""
    handles, names = figure.axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, names, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9)
    figure.tight_layout()
    return figure
