"""DZAD's and VLMDiff's training on new drawings, of synthad or of one of its groups, or on a data set's images."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from zsad_lib.errors import TrainingError
from zsad_lib.settings import Positive
from zsad_lib.training import guides
from zsad_lib.training.guides import TrainingImages
from zsad_lib.training.recipe import Count
from zsad_lite import synthad
from zsad_lite.training.pools import GENERIC, draw_pool

DRAWN = {"synthad": tuple(synthad.CATEGORIES), **{f"synthad-{g}": names for g, names in synthad.GROUPS.items()}}


@dataclass(frozen=True)
class _Drawn(guides.GuideRecipe):
    per_category: Positive = 1600  # drawings of each, where train_on is one of DRAWN

    def check(self) -> None:
        if self.train_on is None:
            raise TrainingError(f"this recipe needs --train-on: {', '.join(DRAWN)}, or a dataset's name")
        super().check()

    def images(self, work: Path, size: int, seed: int) -> TrainingImages:
        if self.train_on not in DRAWN:
            return super().images(work, size, seed)
        categories = DRAWN[self.train_on]
        pixels, _ = draw_pool(work, categories, self.per_category, seed, size=size)
        source = f"{len(pixels)}: {self.per_category} drawings of each of {', '.join(categories)}"
        return TrainingImages(pixels, source, None)


@dataclass(frozen=True)
class DrawnDZAD(_Drawn, guides.DZADRecipe):
    pictures: Count = 0  # of no product, mixed in so that a small decoder does not forget what it knew of them

    def images(self, work: Path, size: int, seed: int) -> TrainingImages:
        images = super().images(work, size, seed)
        if not self.pictures:
            return images
        others, _ = draw_pool(work / "pictures", (), 0, seed, size=size, pictures=self.pictures)
        source = f"{images.source}; {len(others)} {GENERIC}"
        return TrainingImages(np.concatenate([images.pixels, others]), source, images.ids)


@dataclass(frozen=True)
class DrawnVLMDiff(_Drawn, guides.VLMDiffRecipe):
    def check(self) -> None:
        super().check()
        if self.captions and self.train_on in DRAWN:
            raise TrainingError("new drawings have no caption file: leave captions out, the captioner describes them")


# recipe and set it is trained on, of the checkpoints in this repository
SHIPPED = {
    ("dzad", "synthad-A"): "lite-dzad-a",
    ("dzad", "synthad-B"): "lite-dzad-b",
    ("vlmdiff", "synthad"): "lite-vlmdiff",
}
RECIPES = {
    "lite-dzad-a": DrawnDZAD(2000, train_on="synthad-A", base="lite-group-a", learning_rate=3e-4, pictures=6000),
    "lite-dzad-b": DrawnDZAD(2000, train_on="synthad-B", base="lite-group-b", learning_rate=3e-4, pictures=6000),
    "lite-vlmdiff": DrawnVLMDiff(
        2500,
        train_on="synthad",
        base="checkpoints/lite-foundation",
        learning_rate=3e-4,
        per_category=1200,
        captioner="lite-captioner",
        widths=(32, 48, 64),
        unet_steps=3000,  # narrower than its base's: what is shipped must stay small
    ),  # fmt: skip
    # on any data set, with Stable Diffusion: `zsad train dzad --train-on visa`
    "dzad": DrawnDZAD(**vars(guides.RECIPES["dzad"])),
    "vlmdiff": DrawnVLMDiff(**vars(guides.RECIPES["vlmdiff"])),
}
