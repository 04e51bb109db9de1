"""What every method shares: the form of a result, the noise of an image, the error a user sees."""

from dataclasses import dataclass, field
from typing import Protocol

import torch

from zsad_lib.diffusion.noise import to_host


@dataclass
class Scores:
    """The result for a batch, on the CPU; higher is more anomalous.

    image: float32 [B]; map: float32 [B,H,W], or None when the method has no map; details: tensors with B as
    their first dimension, named by the method.
    """

    image: torch.Tensor
    map: torch.Tensor | None = None
    details: dict[str, torch.Tensor] = field(default_factory=dict)


class Method(Protocol):
    """What the scoring engine needs of a method.

    name: as in `METHODS`; config: JSON-able, everything that changes the numbers; size: the input resolution
    in pixels.
    """

    name: str
    config: dict
    size: int

    def score(self, images: torch.Tensor, ids: list[str], categories: list[str]) -> Scores:
        """images: float32 RGB [B,3,H,W] in [0,1]; ids, categories: B strings each."""
        ...


def check_batch(images, ids, categories):
    """ValueError unless images are [B,3,H,W] with one id and one category each."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be [B,3,H,W], not {list(images.shape)}")
    if not len(images) == len(ids) == len(categories):
        raise ValueError(f"{len(images)} images came with {len(ids)} ids and {len(categories)} categories")


def redrawn_scores(image, distance, reconstruction, latent, evaluations):
    """The Scores of a method that redraws: image scores [B], maps [B,H,W], what was drawn [B,3,H,W], the latent that it
    was drawn from [B,C,h,w], and how many network evaluations an image cost."""
    details = {
        "reconstruction": to_host(reconstruction),
        "latent": to_host(latent),
        "evaluations": torch.full((len(image),), evaluations),
    }
    return Scores(to_host(image), to_host(distance), details)
