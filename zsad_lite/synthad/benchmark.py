"""synthad: a procedural benchmark of twelve inspection categories, seven kinds of defect and exact masks.

The same seed gives the same bytes on every machine (see `canvas`). Group A and group B play the parts that
VisA and MVTec AD play in DZAD's cross protocol: train on one, test on the other. Training images are drawn with
seeds that start with "train"; the benchmark's own start with "test", so no model here has seen a test image.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from zsad_lib import store
from zsad_lib.errors import DataError
from zsad_lite.synthad import objects, textures
from zsad_lite.synthad.canvas import Canvas, Dice, photograph
from zsad_lite.synthad.defects import DEFECTS, damage
from zsad_lite.synthad.scene import Category

VERSION = 1
IMAGES = {"train": 8, "good": 10, "defects": 3}  # of each category; defects: of each kind

CATEGORIES = {  # the order counts: in the training pools, in tables
    category.name: category
    for category in (
        Category("woven_fabric", "A", "texture", textures.sample_woven, textures.render_woven),
        Category("wood", "A", "texture", textures.sample_wood, textures.render_wood),
        Category("perforated_sheet", "A", "texture", textures.sample_perforated, textures.render_perforated),
        Category("bottle", "A", "object", objects.sample_bottle, objects.render_bottle),
        Category("screw", "A", "object", objects.sample_screw, objects.render_parts),
        Category("circuit_board", "A", "object", objects.sample_board, objects.render_board),
        Category("tile_floor", "B", "texture", textures.sample_tiles, textures.render_tiles),
        Category("leather", "B", "texture", textures.sample_leather, textures.render_leather),
        Category("brushed_metal", "B", "texture", textures.sample_brushed, textures.render_brushed),
        Category("capsule", "B", "object", objects.sample_capsule, objects.render_capsule),
        Category("connector", "B", "object", objects.sample_connector, objects.render_parts),
        Category("gauge", "B", "object", objects.sample_gauge, objects.render_parts),
    )
}
GROUPS = {group: tuple(name for name, c in CATEGORIES.items() if c.group == group) for group in ("A", "B")}


@dataclass(frozen=True)
class Drawing:
    image: np.ndarray  # uint8 [S, S, 3]
    mask: np.ndarray  # bool [S, S]
    category: str
    defect: str
    words: dict[str, str]  # attribute -> word
    caption: str  # what a captioner should say: "An image of a bottle, glass green, label cream"


def draw(category: str, seed: str, defect: str = "good", size: int = 64) -> Drawing:
    """One image, of a key of CATEGORIES and "good" or one of DEFECTS, `size` pixels wide; the seed is any text.

    The good and the defective image of one seed share everything but the defect.
    """
    if category not in CATEGORIES:
        raise DataError(f"unknown synthad category {category!r}; there are: {', '.join(CATEGORIES)}")
    if defect not in ("good", *DEFECTS):
        raise DataError(f"unknown synthad defect {defect!r}; there are: good, {', '.join(DEFECTS)}")
    kind, seed = CATEGORIES[category], f"synthad-{VERSION}/{category}/{seed}"
    d, canvas = Dice(seed), Canvas(size)
    scene = kind.sample(d)
    light = (d.uniform(0.85, 1.08), d.uniform(-0.22, 0.22), d.uniform(-0.22, 0.22))
    grain = d.uniform(0.008, 0.03)
    noise = grain * (d.grid(size, size, 3) + d.grid(size, size, 3) - 1.0)
    picture, region = kind.render(canvas, scene)
    mask = np.zeros((size, size), dtype=bool)
    if defect != "good":
        picture, mask = damage(seed, defect, kind, canvas, scene, picture, region)
    caption = f"An image of a {kind.noun}, " + ", ".join(f"{name} {word}" for name, word in scene.words.items())
    return Drawing(photograph(canvas, picture, light, noise), mask, category, defect, scene.words, caption)


def layout(category: str) -> Iterator[tuple[str, str, int, str]]:
    """(split, defect, index, seed) of every image of a category."""
    for split, count in (("train", IMAGES["train"]), ("test", IMAGES["good"])):
        for index in range(count):
            yield split, "good", index, f"test/{split}/good/{index}"
    for defect in DEFECTS:
        for index in range(IMAGES["defects"]):
            yield "test", defect, index, f"test/test/{defect}/{index}"


def export(root: str | Path, size: int = 64) -> Path:
    """Write the benchmark in MVTec AD's layout, with `attributes.jsonl` (one line an image: file, caption, words).

    A complete one is kept. The folder takes its name once complete.
    """
    root = Path(root)
    if (root / "attributes.jsonl").exists():
        return root
    if root.exists():
        raise DataError(f"{root} exists and is not synthad; choose another folder or delete it")
    lines = []
    with store.writing_folder(root) as new:
        for category in tqdm(CATEGORIES, desc="drawing synthad", unit="category"):
            for split, defect, index, seed in layout(category):
                drawing = draw(category, seed, defect, size)
                file = f"{category}/{split}/{defect}/{index:03d}.png"
                _save(new / file, drawing.image)
                if defect != "good":
                    _save(new / category / "ground_truth" / defect / f"{index:03d}_mask.png", drawing.mask)
                lines.append({"file": file, "caption": drawing.caption, **drawing.words})
        (new / "attributes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def _save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8) * 255 if pixels.dtype == bool else pixels).save(path)
