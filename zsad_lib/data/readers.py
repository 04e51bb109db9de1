"""The folder layouts of anomaly-detection datasets, a reader each: a root folder -> its samples, in a fixed order."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from zsad_lib.errors import DataError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm"}
COCO_SPLITS = 4


@dataclass(frozen=True)
class Sample:
    """One image of a dataset."""

    id: str  # unique in its dataset: category/split/defect/stem
    image_path: Path
    category: str
    label: int  # 0 normal, 1 anomalous, -1 unknown
    defect: str  # "good" when normal
    mask_path: Path | None
    split: str


def _read_mvtec(root):
    """{cat}/train/good, {cat}/test/{defect}, {cat}/ground_truth/{defect}/STEM_mask.png"""
    categories = [path for path in _folders(root) if (path / "test").is_dir() or (path / "train").is_dir()]
    if not categories:
        one = (root / "test").is_dir() or (root / "train").is_dir()
        hint = f"it is one category, pass its parent {root.resolve().parent}" if one else "check the path"
        raise DataError(f"no category in {root}: expected folders such as {root}/bottle/test; {hint}")
    for category in categories:
        truth = category / "ground_truth"
        samples = [
            _sample(path, category.name, split, folder.name, truth / folder.name / f"{path.stem}_mask.png")
            for split in ("train", "test")
            for folder in _folders(category / split)
            for path in _image_files(folder)
        ]
        if not samples:
            raise DataError(f"category {category} has no image in train or test: restore or remove it")
        yield from samples


def _read_magnetic_tile(root):
    """MT_{Free,Blowhole,...}/Imgs: NAME.jpg, with NAME.png its mask; all in the split "test", MT_Free is "good".

    A few defective images come with an empty mask: they are kept, and their label stays 1.
    """
    folders = [path for path in _folders(root) if path.name.startswith("MT_")]
    if not any(path.name == "MT_Free" for path in folders):
        raise DataError(f"no folder MT_Free in {root}: expected MT_Free/Imgs, MT_Blowhole/Imgs, ...")
    for folder in folders:
        photos = [path for path in _image_files(folder / "Imgs") if path.suffix.lower() != ".png"]
        if not photos:
            raise DataError(f"{folder}/Imgs holds no .jpg image: restore it, or remove {folder.name}")
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
    """{cat}/{OK,NG}/.., and realiad_jsons/{cat}.json of {image_path, mask_path, anomaly_class}, the paths below {cat}.

    Wang et al., CVPR 2024. The class "OK" becomes the defect "good", whatever the folder, as ADer and VLMDiff read it:
    a view of a defective part need not show the defect. A category without its folder is left out.
    """
    lists = root / "realiad_jsons"
    lists = lists / lists.name if (lists / lists.name).is_dir() else lists
    categories = [path for path in _folders(root) if (path / "OK").is_dir() or (path / "NG").is_dir()]
    if not categories:
        raise DataError(
            f"no category in {root}: expected folders such as {root}/audiojack/OK; move those of realiad_256, "
            f"realiad_512 or realiad_1024 (one of them) up into it"
        )

    def defect(entry):
        return "good" if entry.get("anomaly_class") == "OK" else entry.get("anomaly_class")

    for category in categories:
        source = lists / f"{category.name}.json"
        yield from _read_lists(source, category, category.name, ("image_path", "anomaly_class"), defect)


def _read_coco_ad(root):
    """train2017, val2017, meta_20_{i}.json of {img_path, mask_path, specie_name, anomaly}, val2017_mask_ad_20_{i}.

    What ADer's script writes (arXiv 2404.10760) and VLMDiff's loader reads: in split i = 0 to 3 the 20 kinds of objects
    from number 20·i on are anomalous. Each split becomes a category, coco_0 to coco_3: the mean over categories is the
    mean over splits. A split without its meta file is left out.
    """
    sources = {f"coco_{i}": root / f"meta_20_{i}.json" for i in range(COCO_SPLITS)}
    sources = {category: source for category, source in sources.items() if source.is_file()}
    if not sources:
        raise DataError(
            f"no meta_20_0.json to meta_20_{COCO_SPLITS - 1}.json in {root}: `zsad data list` says how to write them"
        )

    def defect(entry):
        if entry.get("anomaly") not in (0, 1):
            return None
        return (entry.get("specie_name") or "anomalous") if entry["anomaly"] else "good"

    for category, source in sources.items():
        yield from _read_lists(source, root, category, ("img_path", "anomaly"), defect)


READERS: dict[str, Callable[[Path], Iterator[Sample]]] = {
    "mvtec": _read_mvtec,
    "magnetic_tile": _read_magnetic_tile,
    "real_iad": _read_real_iad,
    "coco_ad": _read_coco_ad,
    "folder": _read_folder,
}


def _read_lists(source, root, category, keys, defect_of):
    """The samples of a JSON file of lists (or lists by class) "train" and "test", by split and id.

    keys: what an entry must have, its image's path below `root` first; defect_of(entry) -> its defect, no text where
    the entry does not say. A path that leads out of the root, over a symbolic link too, is refused.
    """
    top = root.resolve()

    @cache  # lists name 10^5 files, too many to ask for one by one
    def below(folder):
        """{name: whether it lies below the root} of what is in a folder."""
        if not folder.is_dir():
            return {}
        inside = folder.resolve().is_relative_to(top)
        with os.scandir(folder) as files:
            return {f.name: Path(f).resolve().is_relative_to(top) if f.is_symlink() else inside for f in files}

    for split, entries in _entries(source).items():
        samples = []
        for entry in entries:
            texts = [entry.get(keys[0]), entry.get("mask_path") or ""] if isinstance(entry, dict) else [None]
            defect = defect_of(entry) if all(isinstance(text, str) for text in texts) else None
            if not isinstance(defect, str) or "/" in defect:
                shown = f"{source} has an entry whose {keys[0]} or {keys[1]} or mask_path cannot be used"
                raise DataError(f"{shown}: {json.dumps(entry)[:200]}: restore it")
            path, mask = root / texts[0], root / texts[1] if texts[1] else None
            if path.name not in below(path.parent):
                raise DataError(f"{source} lists {path}, which is not there: restore it, or remove the entry")
            if defect != "good" and not mask:
                raise DataError(f"{source} lists {path} as defective without a mask: restore it, or remove the entry")
            for file in (path, mask):
                if file and below(file.parent).get(file.name) is False:
                    raise DataError(f"{source} lists {file}, which is not below {root}: remove the entry")
            samples.append(_sample(path, category, split, defect, mask))
        yield from sorted(samples, key=lambda sample: sample.id)


def _entries(source):
    """{"train": [entry, ..], "test": [..]} of a JSON file."""
    try:
        content = json.loads(source.read_text(encoding="utf-8"))
        parts = {split: content[split] for split in ("train", "test")}
        classes = {split: part.values() if isinstance(part, dict) else [part] for split, part in parts.items()}
        lists = {split: [entry for part in classes[split] for entry in part] for split in classes}
    except FileNotFoundError:
        raise DataError(f"no list at {source}: it says what is normal and which mask is whose, restore it") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f'{source} must be JSON with lists under "train" and "test" ({error}): restore it') from error
    if not any(lists.values()):
        raise DataError(f"{source} lists no image: restore it")
    return lists


def _sample(path, category, split, defect, mask):
    name = f"{category}/{split}/{defect}/{path.stem}"
    if defect == "good":
        return Sample(name, path, category, 0, defect, None, split)
    if not mask.is_file():
        raise DataError(f"defective image {path} has no mask at {mask}: restore it, or remove the image")
    return Sample(name, path, category, 1, defect, mask, split)


def _image_files(folder):
    return [path for path in _visible(folder) if path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES]


def _folders(folder):
    return [path for path in _visible(folder) if path.is_dir()]


def _visible(folder):
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".")) if folder.is_dir() else []
