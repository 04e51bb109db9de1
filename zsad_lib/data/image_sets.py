"""Sets of small colour images by name, for telling one distribution from another.

Each has a "train" and a "test" split that share no image (and no part of one), always the same ones in the same order.
"""

from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch

from zsad_lib.anomaly.resize import resize
from zsad_lib.data.datasets import data_folder, load_dataset
from zsad_lib.data.images import read_image
from zsad_lib.errors import DataError
from zsad_lib.manifest import dataset_entry, named_function

SPLITS = ("train", "test")
DRAWN = 500  # images of a set that has no end, unless told
PATCH = 64  # pixels of a photograph or a tile that become one image
ORDER_SEED = 0
PHOTOGRAPHS = "astronaut brick camera chelsea coffee coins grass gravel moon page rocket".split()


@dataclass(frozen=True)
class ImageSet:
    name: str
    split: str
    images: torch.Tensor  # float32 RGB [N,3,size,size] in [0,1]
    ids: tuple[str, ...]  # N, unique, the same for the same image

    def __len__(self) -> int:
        return len(self.ids)


def load_image_set(
    name: str, split: str = "test", count: int | None = 500, size: int = 32, root: Path | str | None = None
) -> ImageSet:
    """At most `count` images (None: all there are) of one of IMAGE_SETS; root: the folder of one of ROOTED."""
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


def available() -> list[str]:
    """The names that can be loaded here without a root."""
    return [*UNROOTED, *(name for name in ROOTED if name != "folder" and (data_folder() / name).is_dir())]


# --- drawn


def _synthad(groups):
    """Normal drawings, the categories taking turns; from seeds that no training and no benchmark uses."""

    def load(split, count, size):
        entry = dataset_entry("synthad")
        draw, categories = named_function(entry, "draw"), [c for g in groups for c in entry["groups"][g]]
        for k in range(count or DRAWN):
            turn, place = divmod(k, len(categories))
            drawing = draw(categories[place], f"set/{split}/{turn}", size=size)
            yield f"{categories[place]}/{turn}", _from_bytes(drawing.image)

    return load


def _random(*shape):
    """Values uniform in [0,1], drawn for `shape` and repeated over the image."""

    def load(split, count, size):
        for k in range(count or DRAWN):
            generator = torch.Generator().manual_seed(SPLITS.index(split) + 2 * k)
            yield str(k), torch.rand(3, *(shape or (size, size)), generator=generator).expand(3, size, size)

    return load


# --- what scikit-learn and scikit-image ship


def _digits(split, count, size):
    """Handwritten digits, 8x8 grey values 0 to 16, enlarged."""
    from sklearn.datasets import load_digits

    return _grey(load_digits().images / 16, split, count, size)


def _faces(split, count, size):
    """The 100 faces of lfw_subset (its other 100 pictures are none), 25x25 grey."""
    from skimage.data import lfw_subset

    return _grey(lfw_subset()[:100], split, count, size)


def _grey(pictures, split, count, size):
    for k in _mixed(_half(range(len(pictures)), split), count):
        yield str(k), _fit(torch.from_numpy(pictures[k]).expand(3, -1, -1), size)


def _photographs(split, count, size):
    """Squares of PATCH pixels from the left half (train) or the right half (test) of scikit-image's photographs."""
    from skimage import data

    pictures, places = {name: getattr(data, name)() for name in PHOTOGRAPHS}, []
    for name, picture in pictures.items():
        height, width = picture.shape[:2]
        start, end = (0, width // 2) if split == "train" else (width // 2, width)
        tops, lefts = range(0, height - PATCH + 1, PATCH), range(start, end - PATCH + 1, PATCH)
        places += product([name], tops, lefts)
    for name, top, left in _mixed(places, count):
        square = pictures[name][top : top + PATCH, left : left + PATCH]
        square = np.repeat(square[:, :, None], 3, axis=2) if square.ndim == 2 else square[:, :, :3]
        yield f"{name}/{top}-{left}", _fit(_from_bytes(square), size)


# --- folders


def _magnetic_tile(split, count, size, root):
    """The middle PATCH x PATCH pixels of each flawless tile."""
    samples = load_dataset("magnetic_tile", root).select(defects="good").samples
    for sample in _mixed(_half(samples, split), count):
        tile = read_image(sample.image_path)
        top, left = ((extent - PATCH) // 2 for extent in tile.shape[1:])
        if min(top, left) < 0:
            raise DataError(f"{sample.image_path} is smaller than {PATCH} px: remove it")
        yield sample.image_path.stem, _fit(tile[:, top : top + PATCH, left : left + PATCH], size)


def _cifar10(split, count, size, root):
    """{train,test}/{class}/NNNN.jpg"""
    if not (root / split).is_dir():
        raise DataError(f"no folder at {root / split} for image set cifar10. {dataset_entry('cifar10')['fetch']}")
    return _folder(split, count, size, root)


def _folder(split, count, size, root):
    """The images in and below root/train or root/test, where there are such folders."""
    own = (root / split).is_dir()
    samples = load_dataset("folder", root / split if own else root).samples
    for sample in _mixed(samples if own else _half(samples, split), count):
        yield sample.id.split("/", 3)[3], read_image(sample.image_path, size)


# --- helpers


def _half(items, split):
    """Every second one is for testing."""
    return items[SPLITS.index(split) :: 2]


def _mixed(items, count):
    """The first `count` items (None: all) of one fixed random order."""
    return [items[k] for k in np.random.default_rng(ORDER_SEED).permutation(len(items))[:count]]


def _from_bytes(image):
    """uint8 [H,W,3] -> float32 [3,H,W] in [0,1]."""
    return torch.from_numpy(image).permute(2, 0, 1).float() / 255


def _fit(image, size):
    """[3,H,W] -> float32 [3,size,size] in [0,1]"""
    return resize(image[None].float(), size)[0].clamp(0, 1)


# name -> loader(split, count, size) or, of those in a folder, loader(split, count, size, root): (id, image) pairs
UNROOTED = {
    "synthad": _synthad("AB"),
    "synthad-a": _synthad("A"),
    "synthad-b": _synthad("B"),
    "digits": _digits,
    "faces": _faces,
    "photographs": _photographs,
    "constant": _random(1, 1),  # one colour an image
    "noise": _random(),
}
ROOTED = {"cifar10": _cifar10, "magnetic_tile": _magnetic_tile, "folder": _folder}
IMAGE_SETS = (*UNROOTED, *ROOTED)
