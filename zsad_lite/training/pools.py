"""The images the compact models are trained on: drawings, crops of photographs, pictures of no product."""

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from skimage import data as photographs
from tqdm.auto import tqdm

from zsad_lib import store
from zsad_lib.errors import TrainingError
from zsad_lite import synthad
from zsad_lite.synthad import pictures as generic

PHOTOGRAPHS = (
    "brick", "grass", "gravel", "astronaut", "camera", "chelsea", "coffee", "coins", "moon", "rocket", "page",
)  # fmt: skip
GENERIC = "pictures of no product (zsad_lib.pictures)"  # as model cards name them
PARALLEL = 500  # images from which on it pays to start other processes

Pool = tuple[np.ndarray, list[str]]  # images uint8 [N,size,size,3], and their captions


def _draw_category(category: str, seed: int, count: int, size: int) -> Pool:
    drawings = [synthad.draw(category, f"train/{seed}/{k}", size=size) for k in range(count)]
    return np.stack([d.image for d in drawings]), [d.caption for d in drawings]


def _draw_pictures(part: int, seed: int, count: int, size: int) -> Pool:
    return np.stack([generic.draw(f"train/{seed}/{part}/{k}", size) for k in range(count)]), [""] * count


def _draw_surfaces(part: int, seed: int, count: int, size: int) -> Pool:
    return np.stack([generic.draw_surface(f"train/{seed}/{part}/{k}", size) for k in range(count)]), [""] * count


def photograph_crops(name: str, seed: int, count: int, size: int) -> Pool:
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
    categories: Sequence[str],
    per_category: int,  # drawings of each
    seed: int,
    photos: int = 0,  # crops of each of PHOTOGRAPHS
    size: int = 64,
    pictures: int = 0,  # of no product at all, without a caption; rounded down to a multiple of 8
    surfaces: int = 0,  # bare ones, likewise
) -> Pool:
    """Normal images for training, kept in `folder`."""
    jobs = [(_draw_category, category, per_category) for category in categories]
    jobs += [(photograph_crops, name, photos) for name in PHOTOGRAPHS if photos]
    jobs += [(_draw_pictures, part, pictures // 8) for part in range(8) if pictures >= 8]
    jobs += [(_draw_surfaces, part, surfaces // 8) for part in range(8) if surfaces >= 8]
    if not jobs:
        raise TrainingError("no image to train on: name categories, or ask for 8 pictures or more")
    jobs = [(draw, name, seed, count, size) for draw, name, count in jobs]
    key = store.fingerprint([(draw.__name__, *parameters) for draw, *parameters in jobs])
    pool = store.kept(folder / "pool.npz", key, lambda: _draw(jobs))
    return pool["images"], pool["captions"].tolist()


def _draw(jobs: list[tuple]) -> dict[str, np.ndarray]:
    total, bar = sum(count for *_, count, _ in jobs), {"desc": "drawing training images", "unit": "part"}
    if total < PARALLEL:
        drawn = [draw(*parameters) for draw, *parameters in tqdm(jobs, **bar)]
    else:
        with ProcessPoolExecutor(min(os.cpu_count() or 1, 8)) as processes:
            futures = [processes.submit(*job) for job in jobs]
            drawn = [future.result() for future in tqdm(futures, **bar)]
    images, captions = zip(*drawn, strict=True)
    return {"images": np.concatenate(images), "captions": np.concatenate(captions)}
