"""Datasets by name: paths and labels, in a fixed order; pixels are read only when asked for (`data.images`)."""

import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

from zsad_lib.data.readers import READERS, Sample
from zsad_lib.errors import DataError
from zsad_lib.manifest import dataset_groups, load_manifest, named_function

Names = str | Iterable[str] | None  # one, some or all
FOLDER = {"reader": "folder", "fetch": "Pass root=, an existing folder of images."}


@dataclass(frozen=True)
class AnomalyDataset:
    """The samples of a dataset, by category, split, defect and file name."""

    name: str
    root: Path
    samples: tuple[Sample, ...]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]

    @property
    def categories(self) -> tuple[str, ...]:
        """The categories present, in order."""
        return tuple(dict.fromkeys(sample.category for sample in self.samples))

    def select(
        self, categories: Names = None, split: Names = None, limit: int | None = None, defects: Names = None
    ) -> "AnomalyDataset":
        """The samples of these categories, splits and defects (None: all), in the same order.

        limit: at most the first so many of each category, split and defect, so a larger one only adds samples.
        """
        kept, here = self.samples, f"{self.name} in {self.root}"
        for field, names in {"category": categories, "split": split, "defect": defects}.items():
            if names is None:
                continue
            names = [names] if isinstance(names, str) else list(names)
            known = dict.fromkeys(getattr(sample, field) for sample in self.samples)
            unknown = [repr(name) for name in names if name not in known]
            if unknown:
                raise DataError(f"{here} has no {field} {', '.join(unknown)}; it has: {', '.join(known)}")
            kept = [sample for sample in kept if getattr(sample, field) in names]
        if limit is not None:
            rank = defaultdict(count)
            kept = [s for s in kept if next(rank[s.category, s.split, s.defect]) < limit]
        if not kept:
            asked = f"categories={categories}, split={split}, defects={defects}, limit={limit}"
            raise DataError(f"no sample of {here} is left with {asked}")
        return replace(self, samples=tuple(kept))


def load_dataset(
    name: str,
    root: Path | str | None = None,
    categories: Names = None,
    split: Names = "test",
    limit: int | None = None,
) -> AnomalyDataset:
    """A dataset of the manifest, a group of one ("synthad-A"), or "folder" for any folder of images without truth.

    root: its folder, by default the dataset's name under `data_folder`; written first where the manifest has a
    generator. split: "test", "train", or None for both. categories, limit: `AnomalyDataset.select`.
    """
    known, groups = load_manifest()["datasets"] | {"folder": FOLDER}, dataset_groups()
    name, group = groups.get(name, (name, None))
    entry = known.get(name)
    if entry is None or entry.get("reader") not in READERS:
        readable = [other for other in known if known[other].get("reader") in READERS] + list(groups)
        why = "is in no manifest" if entry is None else "has no reader yet"
        raise DataError(f"dataset `{name}` {why}; readable: {', '.join(readable)}")
    root = Path(root or data_folder() / name)
    if "generator" in entry and not root.exists():
        named_function(entry, "generator")(root)
    if not root.is_dir():
        raise DataError(f"no folder at {root} for dataset {name}. {entry['fetch'].strip()}")
    samples = {}
    try:
        for sample in READERS[entry["reader"]](root):
            other = samples.setdefault(sample.id, sample)
            if other is not sample:
                paths = f"{other.image_path} and {sample.image_path}"
                raise DataError(f"{paths} would share the id {sample.id}: rename one")
    except OSError as error:
        raise DataError(f"cannot read {root} ({error}): check that it may be read, and its layout") from error
    dataset = AnomalyDataset(name, root, tuple(samples.values()))
    return dataset.select(group).select(categories, split, limit)


def data_folder() -> Path:
    """Where datasets lie by default: $ZSAD_DATA, or `data` in the current folder."""
    return Path(os.environ.get("ZSAD_DATA") or "data")
