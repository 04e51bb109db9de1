"""Golden arrays, trees of small images in the layouts of datasets, the imports of a module."""

import ast
import json
from multiprocessing import get_context

import numpy as np
import torch
from PIL import Image

from conftest import shared_path


def arrays(name):
    """A golden file's arrays, as tensors."""
    with np.load(shared_path(f"golden/{name}.npz")) as file:
        return {key: torch.from_numpy(file[key]) for key in file}


def forked(function, *args, **options):
    """A running process of its own that calls the function: what is imported here is imported there."""
    process = get_context("fork").Process(target=function, args=args, kwargs=options)
    process.start()
    return process


def save_image(path, array, mode=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def write_tree(root, per_class=6, categories=("box", "lid")):
    """A dataset in the MVTec layout, 16 px, with a bright square as the defect."""
    rng = np.random.default_rng(0)
    for category in categories:
        for defect in ("good", "spot"):
            for i in range(per_class):
                pixels = rng.integers(60, 120, (16, 16, 3)).astype(np.uint8)
                mask = np.zeros((16, 16), np.uint8)
                if defect == "spot":
                    mask[4:9, 2 + i % 4 : 8 + i % 4] = 255
                    pixels[mask > 0] += 100
                    save_image(root / category / "ground_truth" / defect / f"{i:03}_mask.png", mask)
                save_image(root / category / "test" / defect / f"{i:03}.png", pixels)
    return root


def coco_ad_tree(root, splits=(0, 1)):
    """Two training and three validation images; split i takes validation image i for anomalous."""
    for folder, names in (("train2017", (9, 30)), ("val2017", (139, 285, 632))):
        for name in names:
            save_image(root / folder / f"{name:012}.jpg", np.full((4, 6, 3), 100, np.uint8))
    for i in splits:

        def entry(folder, name, anomaly, i=i):
            mask = f"val2017_mask_ad_20_{i}/{name:012}.png" if anomaly else ""
            if mask:
                save_image(root / mask, np.full((4, 6, 3), 255, np.uint8))
            path = f"{folder}/{name:012}.jpg"
            return {"img_path": path, "mask_path": mask, "cls_name": "coco", "specie_name": "", "anomaly": anomaly}

        train = [entry("train2017", 9 if i else 30, 0)]
        test = [entry("val2017", name, int(i == k)) for k, name in enumerate((139, 285, 632))]
        meta = {"train": {"coco": train}, "test": {"coco": test}}
        (root / f"meta_20_{i}.json").write_text(json.dumps(meta))
    return root


def imports(tree: ast.AST, package: list[str]) -> set[str]:
    """Dotted names that a module of `package` (its names from the top) imports, inside functions too."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            outer = package[: len(package) - node.level + 1] if node.level else []
            base = [*outer, *([node.module] if node.module else [])]
            names |= {".".join([*base, alias.name]) for alias in node.names}
    return names
