"""The images that methods are fitted on: labelled ones of an auxiliary set, normal ones of an image set."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from typing import Any

import torch

from zsad_lib import store
from zsad_lib.data.datasets import load_dataset
from zsad_lib.data.image_sets import IMAGE_SETS, UNROOTED, ImageSet, load_image_set
from zsad_lib.data.images import load_images
from zsad_lib.data.readers import Sample
from zsad_lib.errors import DataError

Batch = tuple[torch.Tensor, list[str], list[int]]  # images [B,3,size,size] in [0,1], ids, labels


@dataclass(frozen=True)
class LabelledImages:
    """The labelled images of an auxiliary set: DZAD's class features are collected on them."""

    samples: list[Sample]
    record: dict[str, Any]  # which they are, for a method's record

    def batches(self, size: int, count: int = 16) -> Iterator[Batch]:
        for part in (self.samples[k : k + count] for k in range(0, len(self.samples), count)):
            yield load_images(part, size), [sample.id for sample in part], [sample.label for sample in part]


@dataclass(frozen=True)
class NormalImages:
    """An image set, or the first `count` training images of the one of that name: the reference of a density."""

    images: ImageSet | str
    count: int = 500

    @property
    def record(self) -> dict[str, Any]:
        if isinstance(self.images, str):
            named = {"name": self.images, "split": "train", "images": self.count}
            return {"reference": named if self.images in UNROOTED else named | {"pixels": self._pixels}}
        known = self.images
        named = {"name": known.name, "split": known.split, "images": len(known), "pixels": self._pixels}
        return {"reference": named}

    @cached_property
    def _pixels(self):
        images = self.images
        return pixels_digest(load_image_set(images, "train", self.count) if isinstance(images, str) else images)

    def batches(self, size: int, count: int = 64) -> Iterator[Batch]:
        named = isinstance(self.images, str)
        images = load_image_set(self.images, "train", self.count, size) if named else self.images
        for k in range(0, len(images), count):
            ids = list(images.ids[k : k + count])
            yield images.images[k : k + count], ids, [0] * len(ids)


def labelled_images(name: str, limit: int | None = None) -> LabelledImages:
    """`reference_samples` as a reference."""
    samples = reference_samples(name, limit)
    content = store.fingerprint([[s.id, s.label, store.file_hash(s.image_path)] for s in samples])[:16]
    return LabelledImages(samples, {"reference": name, "limit": limit, "content": content})


def pixels_digest(images: ImageSet) -> str:
    """Sixteen digits for the pixels of an image set."""
    return store.digest(images.images.numpy().tobytes())[:16]


def normal_images(images: ImageSet | str, count: int = 500) -> NormalImages:
    """A NormalImages, once the name is known to be an image set's."""
    if isinstance(images, str) and images not in IMAGE_SETS:
        raise DataError(f"reference {images!r} is unknown; give an ImageSet, or one of {', '.join(IMAGE_SETS)}")
    return NormalImages(images, count)


def labelled_samples(name: str, limit: int | None = None) -> list[Sample]:
    """The test images of a data set or of a group ("synthad-A"), at most `limit` of each category and defect."""
    return list(load_dataset(name, limit=limit).samples)


def reference_samples(name: str, limit: int | None = None) -> list[Sample]:
    """The labelled images of an auxiliary set, at most `limit` of each category and defect.

    In each category as many normal ones as anomalous: the nearest of many is nearer by number alone, and eq. 10 asks
    for no prior in favour of one class.
    """
    by_category = defaultdict(lambda: defaultdict(list))
    for sample in labelled_samples(name):
        by_category[sample.category][sample.defect].append(sample)
    kept = []
    for kinds in by_category.values():
        normal = kinds.pop("good", [])
        # the first of every defect, then the second, and so on
        turns = zip_longest(*(samples[:limit] for samples in kinds.values()))
        anomalous = [sample for turn in turns for sample in turn if sample is not None]
        count = min(len(normal), len(anomalous))
        kept += normal[:count] + anomalous[:count]
    return kept
