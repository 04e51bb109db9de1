"""The images that methods are fitted on: labelled ones of an auxiliary set, normal ones of an image set."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch

from zsad_lib import store
from zsad_lib.data.datasets import load_dataset
from zsad_lib.data.image_sets import IMAGE_SETS, ImageSet, load_image_set
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
            return {"reference": {"name": self.images, "split": "train", "images": self.count}}
        known, pixels = self.images, self.images.images.numpy().tobytes()
        where = {"name": known.name, "split": known.split, "images": len(known), "pixels": store.digest(pixels)[:16]}
        return {"reference": where}

    def batches(self, size: int, count: int = 64) -> Iterator[Batch]:
        images = self.images
        if isinstance(images, str):
            images = load_image_set(images, "train", self.count, size)
        for k in range(0, len(images), count):
            ids = list(images.ids[k : k + count])
            yield images.images[k : k + count], ids, [0] * len(ids)


def labelled_images(name: str, limit: int | None = None) -> LabelledImages:
    """`reference_samples` as a reference."""
    return LabelledImages(reference_samples(name, limit), {"reference": name, "limit": limit})


def normal_images(images: ImageSet | str, count: int = 500) -> NormalImages:
    """A NormalImages, once the name is known to be an image set's."""
    if isinstance(images, str) and images not in IMAGE_SETS:
        raise DataError(f"reference {images!r} is unknown; give an ImageSet, or one of {', '.join(IMAGE_SETS)}")
    return NormalImages(images, count)


def labelled_samples(name: str, limit: int | None = None) -> list[Sample]:
    """The test images of a data set or of a group ("synthad-A"), at most `limit` of each category and defect."""
    return list(load_dataset(name, limit=limit).samples)


def reference_samples(name: str, limit: int | None = None) -> list[Sample]:
    """The labelled images of an auxiliary set whose matrices are class features.

    At most `limit` of each category and defect, and in each category as many normal images as anomalous ones: the
    nearest of many is nearer by number alone, and eq. 10 asks for no prior in favour of one class.
    """
    kept, images = [], labelled_samples(name)
    for category in dict.fromkeys(sample.category for sample in images):
        normal = [s for s in images if s.category == category and s.label == 0]
        anomalous = _taking_turns([s for s in images if s.category == category and s.label == 1], limit)
        count = min(len(normal), len(anomalous))
        kept += normal[:count] + anomalous[:count]
    return kept


def _taking_turns(samples, limit):
    """At most `limit` of each defect: the first of every one, then the second, and so on."""
    kinds = [[s for s in samples if s.defect == defect][:limit] for defect in dict.fromkeys(s.defect for s in samples)]
    return [sample for turn in zip_longest(*kinds) for sample in turn if sample is not None]
