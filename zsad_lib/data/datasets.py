"""Reading images, masks and the folder layouts of anomaly-detection datasets.

A dataset is a tuple of `Sample` (paths and labels); pixels are read only when asked for.
"""

import os
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

from zsad_lib.data.readers import READERS, Sample
from zsad_lib.errors import DataError
from zsad_lib.manifest import load_manifest


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
        Raises DataError for a name that no sample has, and when nothing is left.
        """
        kept = self.samples
        for field, wanted in (("category", categories), ("split", split), ("defect", defects)):
            if wanted is not None:
                kept = self._keep(kept, field, [wanted] if isinstance(wanted, str) else list(wanted))
        if limit is not None:
            kept = _first(kept, limit)
        if not kept:
            raise DataError(
                f"no sample of {self.name} in {self.root} is left with categories={categories}, "
                f"split={split}, defects={defects}, limit={limit}"
            )
        return replace(self, samples=tuple(kept))

    def _keep(self, samples, field, wanted):
        known = dict.fromkeys(getattr(sample, field) for sample in self.samples)
        unknown = [name for name in wanted if name not in known]
        if unknown:
            raise DataError(
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
    Raises DataError for an unknown name, a missing root (with what the manifest says about fetching it), a
    root or a category without images, a defective image without a mask, and a list that is missing, broken or
    names an image that is not there.
    """
    entry = _known_datasets().get(name)
    if entry is None or entry["reader"] is None:
        readable = [known for known, other in _known_datasets().items() if other["reader"]]
        why = "is in no manifest" if entry is None else "has no reader yet"
        raise DataError(f"dataset `{name}` {why}; readable: {', '.join(readable)}")
    root = Path(root or data_folder() / name)
    if name == "synthad" and not root.exists():
        _export_synthad(root)
    if not root.is_dir():
        raise DataError(f"no folder at {root} for dataset {name}. {entry['fetch'].strip()}")
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
    from zsad_lite import synthad

    synthad.export(root)


def _require_unique_ids(samples):
    seen = {}
    for sample in samples:
        other = seen.setdefault(sample.id, sample)
        if other is not sample:
            raise DataError(f"{other.image_path} and {sample.image_path} would share the id {sample.id}: rename one")


# --- pixels
