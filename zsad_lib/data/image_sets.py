"""Sets of small colour images by name, for telling one distribution from another.

Each set has a "train" and a "test" split that share no image (and no part of one), always the same ones, in a fixed
mixed order: the first `count` images of a larger request are those of a smaller one.
"""

from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from zsad_lib.data.datasets import data_folder, load_dataset
from zsad_lib.data.images import read_image
from zsad_lib.errors import DataError
from zsad_lib.manifest import dataset_entry
from zsad_lite import synthad

SPLITS = ("train", "test")
PATCH = 64  # pixels of a photograph or a tile that become one image
ORDER_SEED = 0
PHOTOGRAPHS = "astronaut brick camera chelsea coffee coins grass gravel moon page rocket".split()


@dataclass(frozen=True)
class ImageSet:
    """images: float32 RGB [N,3,size,size] in [0,1]; ids: N texts, unique, the same for the same image."""

    name: str
    split: str
    images: torch.Tensor
    ids: tuple[str, ...]

    def __len__(self):
        return len(self.ids)


def load_image_set(name, split="test", count=500, size=32, root=None):
    """At most `count` images of a set (None: all there are; of a drawn set 500) as an ImageSet.

    name: one of IMAGE_SETS. root: the folder of "folder", "cifar10" and "magnetic_tile" (default of the latter two:
    their name under $ZSAD_DATA, or under `data` in the current folder). DataError: unknown name or split, a folder
    that is missing or holds no image.
    """
    if name not in IMAGE_SETS:
        raise DataError(f"no image set {name!r}; there are: {', '.join(IMAGE_SETS)}")
    if split not in SPLITS:
        raise DataError(f"no split {split!r}; there are: {', '.join(SPLITS)}")
    if count is not None and count < 1:
        raise DataError(f"count must be 1 or more, or None for all, not {count}")
    if name in UNROOTED and root is not None:
        raise DataError(f"image set {name!r} has no folder; root is for {', '.join(ROOTED)}")
    if name == "folder" and root is None:
        raise DataError("image set 'folder' needs root=, an existing folder of images")
    if name in UNROOTED:
        pairs = list(UNROOTED[name](split, count, size))
    else:
        pairs = list(ROOTED[name](split, count, size, Path(root or data_folder() / name)))
    if not pairs:
        raise DataError(f"image set {name!r} in {root} has no image left for the split {split!r}: it needs two")
    ids, images = zip(*pairs, strict=True)
    return ImageSet(name, split, torch.stack(images), tuple(f"{name}/{split}/{i}" for i in ids))


def available():
    """The names that can be loaded here without a root: all but "folder", and those whose folder is missing."""
    return [name for name in IMAGE_SETS if name in UNROOTED or (name != "folder" and (data_folder() / name).is_dir())]


# --- drawn


def _synthad(categories):
    """Normal drawings, the categories taking turns; drawn from seeds that no training and no benchmark uses."""

    def load(split, count, size):
        for k in range(count or 500):
            category = categories[k % len(categories)]
            image = synthad.draw(category, f"set/{split}/{k // len(categories)}", size=size).image
            yield f"{category}/{k // len(categories)}", _from_bytes(image)

    return load


def _constant(split, count, size):
    """One colour an image, uniform in the RGB cube."""
    for k in range(count or 500):
        yield str(k), torch.rand(3, 1, 1, generator=_generator(split, k)).expand(3, size, size)


def _noise(split, count, size):
    """Every value uniform in [0,1]."""
    for k in range(count or 500):
        yield str(k), torch.rand(3, size, size, generator=_generator(split, k))


def _generator(split, k):
    return torch.Generator().manual_seed(SPLITS.index(split) + 2 * k)


# --- what scikit-learn and scikit-image ship


def _digits(split, count, size):
    """Handwritten digits, 8x8 grey values 0 to 16, enlarged; every second one is for testing."""
    from sklearn.datasets import load_digits

    digits = load_digits().images
    for k in _mixed(range(SPLITS.index(split), len(digits), 2), count):
        yield str(k), _resized(torch.from_numpy(digits[k] / 16).expand(3, 8, 8), size)


def _faces(split, count, size):
    """The 100 faces of lfw_subset (its other 100 pictures are none), 25x25 grey; every second one is for testing."""
    from skimage.data import lfw_subset

    faces = lfw_subset()[:100]
    for k in _mixed(range(SPLITS.index(split), len(faces), 2), count):
        yield str(k), _resized(torch.from_numpy(faces[k]).expand(3, 25, 25), size)


def _photographs(split, count, size):
    """Squares of PATCH pixels from the left half (train) or the right half (test) of scikit-image's photographs."""
    from skimage import data

    pictures = {name: getattr(data, name)() for name in PHOTOGRAPHS}
    places = [(name, *place) for name, p in pictures.items() for place in _halves(p.shape[:2], split)]
    for name, top, left in _mixed(places, count):
        square = pictures[name][top : top + PATCH, left : left + PATCH]
        square = np.repeat(square[:, :, None], 3, axis=2) if square.ndim == 2 else square[:, :, :3]
        yield f"{name}/{top}-{left}", _resized(_from_bytes(square), size)


def _halves(shape, split):
    """Corners of the squares of one half of a picture, side by side."""
    height, width = shape
    start, end = (0, width // 2) if split == "train" else (width // 2, width)
    return product(range(0, height - PATCH + 1, PATCH), range(start, end - PATCH + 1, PATCH))


# --- folders


def _magnetic_tile(split, count, size, root):
    """The middle PATCH x PATCH pixels of each flawless tile; every second tile is for testing."""
    samples = load_dataset("magnetic_tile", root).select(defects="good").samples[SPLITS.index(split) :: 2]
    for sample in _mixed(samples, count):
        tile = read_image(sample.image_path)
        top, left = ((extent - PATCH) // 2 for extent in tile.shape[1:])
        if min(top, left) < 0:
            raise DataError(f"{sample.image_path} is smaller than {PATCH} px: remove it")
        yield sample.image_path.stem, _resized(tile[:, top : top + PATCH, left : left + PATCH], size)


def _cifar10(split, count, size, root):
    """{train,test}/{class}/NNNN.jpg"""
    if not (root / split).is_dir():
        raise DataError(f"no folder at {root / split} for image set cifar10. {dataset_entry('cifar10')['fetch']}")
    return _folder(split, count, size, root)


def _folder(split, count, size, root):
    """The images in and below root/train or root/test; without such folders every second image is for testing."""
    own = (root / split).is_dir()
    samples = load_dataset("folder", root / split if own else root).samples
    for sample in _mixed(samples if own else samples[SPLITS.index(split) :: 2], count):
        yield sample.id.split("/", 3)[3], read_image(sample.image_path, size)


# --- helpers


def _mixed(items, count):
    """The first `count` items (None: all) of one fixed random order."""
    items = list(items)
    return [items[k] for k in np.random.default_rng(ORDER_SEED).permutation(len(items))[:count]]


def _from_bytes(image):
    """uint8 [H,W,3] -> float32 [3,H,W] in [0,1]."""
    return torch.from_numpy(image).permute(2, 0, 1).float() / 255


def _resized(image, size):
    """[3,H,W] -> float32 [3,size,size], bilinear, antialiased when it shrinks, within [0,1]."""
    image = F.interpolate(image[None].float(), (size, size), mode="bilinear", antialias=True)
    return image[0].clamp(0, 1)


UNROOTED = {
    "synthad": _synthad(tuple(synthad.CATEGORIES)),
    "synthad-a": _synthad(tuple(synthad.GROUPS["A"])),
    "synthad-b": _synthad(tuple(synthad.GROUPS["B"])),
    "digits": _digits,
    "faces": _faces,
    "photographs": _photographs,
    "constant": _constant,
    "noise": _noise,
}
ROOTED = {"cifar10": _cifar10, "magnetic_tile": _magnetic_tile, "folder": _folder}
IMAGE_SETS = (*UNROOTED, *ROOTED)
