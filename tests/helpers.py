"""Trees of small images in the layouts of datasets, and how they are saved."""

import json

import numpy as np
from PIL import Image


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
