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
from PIL import Image

from zsad_lib.datasets import read_image

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
    """A table of numbers as coloured cells."""
    figure, axis = plt.subplots(figsize=(1.0 + 0.8 * frame.shape[1], 0.9 + 0.5 * frame.shape[0]))
    sns.heatmap(frame, annot=True, fmt=fmt, cmap=cmap, cbar=False, linewidths=0.5, ax=axis)
    axis.set_title(title, fontsize=10)
    figure.tight_layout()
    return figure


def png_bytes(figure: Figure, dpi: int = 80) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    plt.close(figure)
    return buffer.getvalue()
