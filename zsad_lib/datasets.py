"""Reading images, masks and the folder layouts of anomaly-detection datasets.

A dataset is a tuple of `Sample` (paths and labels); pixels are read only when asked for.
"""

import json
import os
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from zsad_lib.manifest import load_manifest

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm"}
COCO_SPLITS = 4
GREY16_MODES = {"I", "I;16", "I;16B", "I;16L", "I;16N"}
EXIF_ORIENTATION = 0x0112


class DatasetError(ValueError):
    """A dataset folder, an image or a mask cannot be used; the message names it and says what to do."""


@dataclass(frozen=True)
class Sample:
    """One image of a dataset. `label`: 0 normal, 1 anomalous, -1 unknown. `defect`: "good" when normal."""

    id: str  # unique in its dataset: category/split/defect/stem
    image_path: Path
    category: str
    label: int
    defect: str
    mask_path: Path | None
    split: str


@dataclass(frozen=True)
class AnomalyDataset:
    """The samples of a dataset, in a fixed order (by category, split, defect and file name)."""

    name: str
    root: Path
    samples: tuple[Sample, ...]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]

    @property
    def categories(self):
        """Names of the categories present, in order."""
        return tuple(dict.fromkeys(sample.category for sample in self.samples))

    def select(self, categories=None, split=None, limit=None, defects=None):
        """A dataset with a part of the samples; None keeps all.

        `categories`, `split`, `defects`: a name or a list of names. `limit`: at most that many of each
        category, split and defect, the first in order, so that a larger limit only adds samples.
        Raises DatasetError for a name that no sample has, and when nothing is left.
        """
        kept = self.samples
        for field, wanted in (("category", categories), ("split", split), ("defect", defects)):
            if wanted is not None:
                kept = self._keep(kept, field, [wanted] if isinstance(wanted, str) else list(wanted))
        if limit is not None:
            kept = _first(kept, limit)
        if not kept:
            raise DatasetError(
                f"no sample of {self.name} in {self.root} is left with categories={categories}, "
                f"split={split}, defects={defects}, limit={limit}"
            )
        return replace(self, samples=tuple(kept))

    def _keep(self, samples, field, wanted):
        known = dict.fromkeys(getattr(sample, field) for sample in self.samples)
        unknown = [name for name in wanted if name not in known]
        if unknown:
            raise DatasetError(
                f"{self.name} in {self.root} has no {field} {', '.join(map(repr, unknown))}; it has: {', '.join(known)}"
            )
        return [sample for sample in samples if getattr(sample, field) in wanted]


def _first(samples, limit):
    seen = defaultdict(int)
    kept = []
    for sample in samples:
        group = (sample.category, sample.split, sample.defect)
        seen[group] += 1
        if seen[group] <= limit:
            kept.append(sample)
    return kept


# --- layouts


def load_dataset(name, root=None, categories=None, split="test", limit=None):
    """An `AnomalyDataset` by its name in the manifest, or "folder" for any folder of images without truth.

    `root`: its folder; by default `<name>` under $ZSAD_DATA, or under `data` in the current folder. synthad
    is generated there when the folder does not exist. `mvtec_ad` reads any folder in the MVTec layout.
    `split`: "test", "train", or None for both. `categories` and `limit`: see `AnomalyDataset.select`.
    Raises DatasetError for an unknown name, a missing root (with what the manifest says about fetching it), a
    root or a category without images, a defective image without a mask, and a list that is missing, broken or
    names an image that is not there.
    """
    entry = _known_datasets().get(name)
    if entry is None or entry["reader"] is None:
        readable = [known for known, other in _known_datasets().items() if other["reader"]]
        why = "is in no manifest" if entry is None else "has no reader yet"
        raise DatasetError(f"dataset `{name}` {why}; readable: {', '.join(readable)}")
    root = Path(root or data_folder() / name)
    if name == "synthad" and not root.exists():
        _export_synthad(root)
    if not root.is_dir():
        raise DatasetError(f"no folder at {root} for dataset {name}. {entry['fetch'].strip()}")
    samples = tuple(READERS[entry["reader"]](root))
    _require_unique_ids(samples)
    return AnomalyDataset(name, root, samples).select(categories, split, limit)


def data_folder():
    """Where datasets lie by default: $ZSAD_DATA, or `data` in the current folder."""
    return Path(os.environ.get("ZSAD_DATA") or "data")


def _known_datasets():
    folder = {"reader": "folder", "fetch": "Pass root=, an existing folder of images."}
    return {**load_manifest()["datasets"], "folder": folder}


def _export_synthad(root):
    from zsad_lib import synthad  # only this dataset is drawn instead of read

    synthad.export(root)


def _image_files(folder):
    files = (path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    return sorted(path for path in files if path.suffix.lower() in IMAGE_SUFFIXES)


def _folders(folder):
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _read_mvtec(root):
    """{cat}/train/good, {cat}/test/{defect}, {cat}/ground_truth/{defect}/STEM_mask.png"""
    categories = [path for path in _folders(root) if (path / "test").is_dir() or (path / "train").is_dir()]
    if not categories:
        one = (root / "test").is_dir() or (root / "train").is_dir()
        hint = f"it is one category, pass its parent {root.resolve().parent}" if one else "check the path"
        raise DatasetError(f"no category in {root}: expected folders such as {root}/bottle/test; {hint}")
    for category in categories:
        samples = list(_read_mvtec_category(category))
        if not samples:
            raise DatasetError(f"category {category} has no image in train or test: restore or remove it")
        yield from samples


def _read_mvtec_category(category):
    for split in ("train", "test"):
        folders = _folders(category / split) if (category / split).is_dir() else []
        for folder in folders:
            for path in _image_files(folder):
                mask = category / "ground_truth" / folder.name / f"{path.stem}_mask.png"
                yield _sample(path, category.name, split, folder.name, mask)


def _read_magnetic_tile(root):
    """MT_{Free,Blowhole,...}/Imgs: NAME.jpg, with NAME.png its mask. Everything is in the split "test".

    MT_Free becomes the defect "good". A few defective images come with an empty mask: they are kept, and
    their label stays 1.
    """
    folders = [path for path in _folders(root) if path.name.startswith("MT_")]
    if not any(path.name == "MT_Free" for path in folders):
        raise DatasetError(f"no folder MT_Free in {root}: expected MT_Free/Imgs, MT_Blowhole/Imgs, ...")
    for folder in folders:
        inner = folder / "Imgs"
        images = _image_files(inner) if inner.is_dir() else []
        photos = [path for path in images if path.suffix.lower() != ".png"]
        if not photos:
            raise DatasetError(f"{inner} holds no .jpg image: restore it, or remove {folder.name}")
        defect = "good" if folder.name == "MT_Free" else folder.name.removeprefix("MT_")
        for path in photos:
            yield _sample(path, "magnetic_tile", "test", defect, path.with_suffix(".png"))


def _read_folder(root):
    """Every image in and below a folder, with no truth: label -1, defect "unknown", split "test"."""
    folders = [root, *sorted(path for path in root.rglob("*") if path.is_dir())]
    paths = [path for folder in folders for path in _image_files(folder)]
    if not paths:
        raise DatasetError(f"no image in {root}: expected files in {', '.join(sorted(IMAGE_SUFFIXES))}")
    category = root.resolve().name
    for path in paths:
        stem = path.relative_to(root).with_suffix("").as_posix()
        yield Sample(f"{category}/test/unknown/{stem}", path, category, -1, "unknown", None, "test")


def _read_real_iad(root):
    """{cat}/{OK,NG}/.., and realiad_jsons/{cat}.json with the lists "train" and "test" (Wang et al., CVPR 2024).

    An entry of a list has image_path and mask_path, both below {cat}, and anomaly_class: "OK" becomes the defect
    "good", whatever the folder, because a view of a defective part need not show the defect. The loaders of ADer and
    VLMDiff read it so. The archive's realiad_jsons/realiad_jsons/{cat}.json is read as well, its other lists (one view,
    noisy training) are not. A category whose folder is missing is left out.
    """
    lists = root / "realiad_jsons"
    lists = lists / lists.name if (lists / lists.name).is_dir() else lists
    categories = [path for path in _folders(root) if (path / "OK").is_dir() or (path / "NG").is_dir()]
    if not categories:
        raise DatasetError(
            f"no category in {root}: expected folders such as {root}/audiojack/OK; move those of realiad_256, "
            f"realiad_512 or realiad_1024 (one of them) up into it"
        )
    exists = _listing()
    for category in categories:
        source = lists / f"{category.name}.json"
        for split, entries in _read_lists(source).items():
            samples = []
            for entry in entries:
                image, kind = _values(source, entry, "image_path", "anomaly_class")
                defect, mask = "good" if kind == "OK" else kind, entry.get("mask_path")
                samples.append(_listed(source, exists, category, category.name, split, defect, image, mask))
            yield from sorted(samples, key=lambda sample: sample.id)


def _read_coco_ad(root):
    """train2017, val2017, meta_20_{i}.json and val2017_mask_ad_20_{i} for the splits i = 0 to 3 (arXiv 2404.10760).

    In split i the 20 kinds of objects from number 20·i on are anomalous. A meta file is {"train": {"coco": [..]},
    "test": {"coco": [..]}}; an entry has img_path and mask_path, both below the root, specie_name (empty) and anomaly
    (0 or 1): what ADer's script writes and VLMDiff's loader reads. Each split becomes a category, coco_0 to coco_3, so
    that the mean over categories is the mean over splits; an image stands in all of them, each time with the truth of
    that split. Splits whose meta file is missing are left out. The defect is specie_name, "anomalous" when it is empty.
    """
    sources = {f"coco_{i}": root / f"meta_20_{i}.json" for i in range(COCO_SPLITS)}
    sources = {category: source for category, source in sources.items() if source.is_file()}
    if not sources:
        raise DatasetError(
            f"no meta_20_0.json to meta_20_{COCO_SPLITS - 1}.json in {root}: `zsad data list` says how to write them"
        )
    exists = _listing()
    for category, source in sources.items():
        for split, entries in _read_lists(source).items():
            samples = []
            for entry in entries:
                image, anomaly = _values(source, entry, "img_path", "anomaly")
                defect = (entry.get("specie_name") or "anomalous") if anomaly else "good"
                samples.append(_listed(source, exists, root, category, split, defect, image, entry.get("mask_path")))
            yield from sorted(samples, key=lambda sample: sample.id)


def _read_lists(path):
    """{"train": [entry, ..], "test": [..]} of a JSON file that holds lists, or lists by class, under these names."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DatasetError(f"no list at {path}: it says what is normal and which mask is whose, restore it") from None
    except ValueError as error:
        raise DatasetError(f"{path} is not JSON ({error}): restore it") from error
    lists = {}
    for split in ("train", "test"):
        part = content.get(split) if isinstance(content, dict) else None
        classes = {"": part} if isinstance(part, list) else part
        if not isinstance(classes, dict) or not all(isinstance(entries, list) for entries in classes.values()):
            raise DatasetError(f'{path} must hold lists under "train" and "test": restore it')
        lists[split] = [entry for entries in classes.values() for entry in entries]
    if not any(lists.values()):
        raise DatasetError(f"{path} lists no image: restore it")
    return lists


def _values(source, entry, path, truth):
    """The values of an entry under two names, of which the first is a path."""
    if not isinstance(entry, dict) or not isinstance(entry.get(path), str) or truth not in entry:
        raise DatasetError(f"{source} has an entry without {path} or {truth}: {json.dumps(entry)[:200]}: restore it")
    return entry[path], entry[truth]


def _listing():
    """exists(path), which reads each folder once: lists name 10^5 files, too many to ask for one by one."""
    folders = {}

    def exists(path):
        if path.parent not in folders:
            folders[path.parent] = set(os.listdir(path.parent)) if path.parent.is_dir() else set()
        return path.name in folders[path.parent]

    return exists


def _listed(source, exists, root, category, split, defect, image, mask):
    path = root / image
    if not exists(path):
        raise DatasetError(f"{source} lists {path}, which is not there: restore it, or remove the entry")
    if defect != "good" and not mask:
        raise DatasetError(f"{source} lists {path} as defective without a mask: restore it, or remove the entry")
    return _sample(path, category, split, defect, root / mask if mask else None)


def _sample(path, category, split, defect, mask):
    name = f"{category}/{split}/{defect}/{path.stem}"
    if defect == "good":
        return Sample(name, path, category, 0, defect, None, split)
    if not mask.is_file():
        raise DatasetError(f"defective image {path} has no mask at {mask}: restore it, or remove the image")
    return Sample(name, path, category, 1, defect, mask, split)


def _require_unique_ids(samples):
    seen = {}
    for sample in samples:
        other = seen.setdefault(sample.id, sample)
        if other is not sample:
            raise DatasetError(f"{other.image_path} and {sample.image_path} would share the id {sample.id}: rename one")


READERS = {
    "mvtec": _read_mvtec,
    "magnetic_tile": _read_magnetic_tile,
    "real_iad": _read_real_iad,
    "coco_ad": _read_coco_ad,
    "folder": _read_folder,
}


# --- pixels


def read_image(path, size=None):
    """An image file as float32 RGB [3,H,W] in [0,1]; `size` makes it [3,size,size], whatever its aspect.

    Grey is repeated to RGB; 16-bit grey is divided by 65535 (16-bit colour is read by PIL at 8 bits);
    transparent pixels (RGBA, grey with alpha, palette) are laid on white; CMYK goes through PIL's conversion
    without a colour profile; the EXIF orientation is applied. Resizing is PIL's bilinear filter, antialiased
    when it shrinks, on float values, so the range stays in [0,1].
    Raises DatasetError, naming the file, when it is missing, not an image, truncated or of an unknown kind.
    """
    image = _open(path)
    pixels = _grey16(path, image) if image.mode in GREY16_MODES else _colour8(path, image)
    if size is not None:
        pixels = np.stack([_resize_plane(pixels[..., c], size) for c in range(3)], axis=-1)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def read_mask(path, size=None, threshold=127):
    """A mask file as bool [H,W]: True where its grey value (0 to 255) is greater than `threshold`.

    Masks are not always binary (the magnetic tiles have soft edges and compression noise), so the threshold
    is explicit and comes before the resize to [size,size], which takes the nearest pixel. threshold=0 counts
    every non-zero pixel. 16-bit masks are scaled to 0..255 first. Raises DatasetError as `read_image` does.
    """
    image = _open(path)
    if image.mode in GREY16_MODES:
        grey = _grey16(path, image)[..., 0] * 255
    else:
        grey = np.asarray(image.convert("L"))
    mask = grey > threshold
    if size is not None:
        mask = np.asarray(Image.fromarray(mask).resize((size, size), Image.Resampling.NEAREST))
    return torch.from_numpy(mask.copy())


def load_images(samples, size):
    """Images of the samples, float32 [B,3,size,size] in [0,1]; see `read_image`."""
    return torch.stack([read_image(sample.image_path, size) for sample in samples])


def load_masks(samples, size, threshold=127):
    """Masks of the samples, bool [B,size,size]; all False for normal images; see `read_mask`.

    Raises DatasetError for a sample whose truth is unknown (label -1), and for a mask whose pixel size is not
    that of its image.
    """
    return torch.stack([_load_mask(sample, size, threshold) for sample in samples])


def _load_mask(sample, size, threshold):
    if sample.label == 0:
        return torch.zeros(size, size, dtype=torch.bool)
    if sample.mask_path is None:
        raise DatasetError(f"no mask is known for {sample.image_path}: use a dataset that has masks")
    image, mask = _pixel_size(sample.image_path), _pixel_size(sample.mask_path)
    if image != mask:
        raise DatasetError(
            f"mask {sample.mask_path} is {mask[0]}x{mask[1]} pixels, but its image is {image[0]}x{image[1]}: "
            f"they must cover the same frame"
        )
    return read_mask(sample.mask_path, size, threshold)


def _open(path):
    try:
        with Image.open(path) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise DatasetError(f"no file at {path}") from None
    except Exception as error:  # a broken file can raise nearly anything from inside its decoder
        raise DatasetError(f"cannot read image {path} ({error}): restore or remove the file") from error


def _pixel_size(path):
    """(width, height) after the EXIF orientation, from the file's header alone."""
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(EXIF_ORIENTATION, 1) >= 5
            return image.size[::-1] if turned else image.size
    except OSError:
        return _open(path).size  # says what is wrong with the file


def _grey16(path, image):
    values = np.asarray(image).astype(np.float32)
    if values.min() < 0 or values.max() > 65535:
        raise DatasetError(f"{path} holds values outside 0..65535: convert it to 16 or 8 bits")
    return np.repeat(values[..., None] / 65535, 3, axis=-1)


def _colour8(path, image):
    if image.mode == "F":
        raise DatasetError(f"{path} holds floats of unknown range: convert it to 16 or 8 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB")).astype(np.float32) / 255


def _resize_plane(plane, size):
    resized = Image.fromarray(plane).resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(resized).clip(0, 1)
