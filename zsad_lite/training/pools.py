"""zsad_lite.training.pools"""

import json
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from skimage import data as photographs
from tqdm.auto import tqdm

from zsad_lib.training.fit import write_json
from zsad_lite import synthad
from zsad_lite.synthad import pictures as generic

PHOTOGRAPHS = (
    "brick",
    "grass",
    "gravel",
    "astronaut",
    "camera",
    "chelsea",
    "coffee",
    "coins",
    "moon",
    "rocket",
    "page",
)


GENERIC = "pictures of no product (zsad_lib.pictures)"


def _draw_many(category: str, seed: int, count: int, size: int) -> tuple[np.ndarray, list[str]]:
    drawings = [synthad.draw(category, f"train/{seed}/{k}", size=size) for k in range(count)]
    return np.stack([d.image for d in drawings]), [d.caption for d in drawings]


def _draw_pictures(part: int, seed: int, count: int, size: int) -> tuple[np.ndarray, list[str]]:
    return np.stack([generic.draw(f"train/{seed}/{part}/{k}", size) for k in range(count)]), [""] * count


def _draw_surfaces(part: int, seed: int, count: int, size: int) -> tuple[np.ndarray, list[str]]:
    return np.stack([generic.draw_surface(f"train/{seed}/{part}/{k}", size) for k in range(count)]), [""] * count


def photograph_crops(name: str, seed: int, count: int, size: int) -> tuple[np.ndarray, list[str]]:
    """Square crops of a photograph that scikit-image ships, between one third and the whole of its height."""
    picture = getattr(photographs, name)()
    picture = np.repeat(picture[:, :, None], 3, 2) if picture.ndim == 2 else picture[:, :, :3]
    pixels = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float()
    rng = np.random.default_rng([seed, len(name)])
    crops = []
    for _ in range(count):
        side = int(min(pixels.shape[2:]) * rng.uniform(0.33, 1.0))
        top, left = (int(rng.integers(0, extent - side + 1)) for extent in pixels.shape[2:])
        crop = pixels[:, :, top : top + side, left : left + side]
        crop = F.interpolate(crop, (size, size), mode="bilinear", antialias=True)
        crops.append(crop[0].round().clamp(0, 255).byte().permute(1, 2, 0).numpy())
    return np.stack(crops), [f"A photograph of {name}"] * count


def draw_pool(
    folder: Path,
    categories,
    per_category: int,
    seed: int,
    photos: int = 0,
    size: int = 64,
    pictures: int = 0,
    surfaces: int = 0,
):
    """Normal images for training: uint8 [N, size, size, 3] and their captions [N].

    per_category drawings of each category, ``photos`` crops of each of PHOTOGRAPHS, and ``pictures`` of no product at
    all and bare ``surfaces`` (see `zsad_lib.pictures`; rounded down to a multiple of 8), which have no caption. Drawn
    once, kept in ``folder``.
    """
    target, meta = folder / "pool.npy", folder / "pool.json"
    if not meta.exists():
        folder.mkdir(parents=True, exist_ok=True)
        jobs = [(_draw_many, c, per_category) for c in categories]
        jobs += [(photograph_crops, p, photos) for p in PHOTOGRAPHS] if photos else []
        jobs += [(_draw_pictures, part, pictures // 8) for part in range(8)] if pictures >= 8 else []
        jobs += [(_draw_surfaces, part, surfaces // 8) for part in range(8)] if surfaces >= 8 else []
        with ProcessPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
            futures = [pool.submit(job, name, seed, count, size) for job, name, count in jobs]
            drawn = [f.result() for f in tqdm(futures, desc="drawing training images", unit="category")]
        np.save(target, np.concatenate([images for images, _ in drawn]))
        write_json(meta, {"captions": [c for _, group in drawn for c in group]})
    return np.load(target), json.loads(meta.read_text())["captions"]
