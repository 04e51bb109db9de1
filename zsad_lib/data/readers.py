"""zsad_lib.data.readers"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from zsad_lib.data.images import IMAGE_SUFFIXES
from zsad_lib.errors import DataError

COCO_SPLITS = 4


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
        raise DataError(f"no category in {root}: expected folders such as {root}/bottle/test; {hint}")
    for category in categories:
        samples = list(_read_mvtec_category(category))
        if not samples:
            raise DataError(f"category {category} has no image in train or test: restore or remove it")
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
        raise DataError(f"no folder MT_Free in {root}: expected MT_Free/Imgs, MT_Blowhole/Imgs, ...")
    for folder in folders:
        inner = folder / "Imgs"
        images = _image_files(inner) if inner.is_dir() else []
        photos = [path for path in images if path.suffix.lower() != ".png"]
        if not photos:
            raise DataError(f"{inner} holds no .jpg image: restore it, or remove {folder.name}")
        defect = "good" if folder.name == "MT_Free" else folder.name.removeprefix("MT_")
        for path in photos:
            yield _sample(path, "magnetic_tile", "test", defect, path.with_suffix(".png"))


def _read_folder(root):
    """Every image in and below a folder, with no truth: label -1, defect "unknown", split "test"."""
    folders = [root, *sorted(path for path in root.rglob("*") if path.is_dir())]
    paths = [path for folder in folders for path in _image_files(folder)]
    if not paths:
        raise DataError(f"no image in {root}: expected files in {', '.join(sorted(IMAGE_SUFFIXES))}")
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
        raise DataError(
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
        raise DataError(
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
        raise DataError(f"no list at {path}: it says what is normal and which mask is whose, restore it") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}): restore it") from error
    lists = {}
    for split in ("train", "test"):
        part = content.get(split) if isinstance(content, dict) else None
        classes = {"": part} if isinstance(part, list) else part
        if not isinstance(classes, dict) or not all(isinstance(entries, list) for entries in classes.values()):
            raise DataError(f'{path} must hold lists under "train" and "test": restore it')
        lists[split] = [entry for entries in classes.values() for entry in entries]
    if not any(lists.values()):
        raise DataError(f"{path} lists no image: restore it")
    return lists


def _values(source, entry, path, truth):
    """The values of an entry under two names, of which the first is a path."""
    if not isinstance(entry, dict) or not isinstance(entry.get(path), str) or truth not in entry:
        raise DataError(f"{source} has an entry without {path} or {truth}: {json.dumps(entry)[:200]}: restore it")
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
        raise DataError(f"{source} lists {path}, which is not there: restore it, or remove the entry")
    if defect != "good" and not mask:
        raise DataError(f"{source} lists {path} as defective without a mask: restore it, or remove the entry")
    return _sample(path, category, split, defect, root / mask if mask else None)


def _sample(path, category, split, defect, mask):
    name = f"{category}/{split}/{defect}/{path.stem}"
    if defect == "good":
        return Sample(name, path, category, 0, defect, None, split)
    if not mask.is_file():
        raise DataError(f"defective image {path} has no mask at {mask}: restore it, or remove the image")
    return Sample(name, path, category, 1, defect, mask, split)


READERS = {
    "mvtec": _read_mvtec,
    "magnetic_tile": _read_magnetic_tile,
    "real_iad": _read_real_iad,
    "coco_ad": _read_coco_ad,
    "folder": _read_folder,
}
