"""Baselines that need no model at all: what a method must beat before its network has earned anything.

Each looks at one image alone. Their maps are smoothed and pooled like every other method's (`maps.py`).
Images are brought to 64 px, the size of the lite profile, where the defaults sigma 1.5 and pool 2 stand for
the 5 and 8 that the papers use at 256 px.
"""

from abc import abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from zsad_lib.anomaly import maps
from zsad_lib.anomaly.resize import resize
from zsad_lib.diffusion.noise import to_host
from zsad_lib.errors import MethodError
from zsad_lib.methods.base import Method, Scores, check_batch
from zsad_lib.settings import NotNegative, Positive


def contrast_map(images: torch.Tensor, context: float) -> torch.Tensor:
    """|x − blurred x|, mean over channels: [B,3,H,W] -> [B,H,W] in [0,1]; context: the blur's sigma (px)."""
    return (images - maps.smooth(images, context)).abs().mean(1)


def median_map(images: torch.Tensor) -> torch.Tensor:
    """|x − the image's median colour|, mean over channels: [B,3,H,W] -> [B,H,W] in [0,1].

    Of an even number of pixels the lower median counts.
    """
    # contiguous: along an expanded (stride 0) dimension torch 2.13's median returns uninitialised memory
    pixels = images.flatten(2).contiguous()
    return (images - pixels.median(dim=2).values[..., None, None]).abs().mean(1)


def patch_knn_map(images: torch.Tensor, patch: int = 7, stride: int = 2, k: int = 5) -> torch.Tensor:
    """How far each patch is from its k-th nearest patch of the same image: [B,3,H,W] -> [B,H,W].

    Patches of patch x patch RGB pixels around every stride-th pixel, the border mirrored; patches that
    overlap the one in question do not count. Distances are root mean square differences of pixel values, in
    [0,1], computed at the patch centres and interpolated bilinearly between them.
    """
    height, width = images.shape[-2:]
    if patch % 2 == 0:
        raise MethodError(f"patch_knn needs an odd patch, not {patch}")
    if patch // 2 >= min(height, width):
        raise MethodError(f"patches of {patch} px do not fit into {height}x{width} px")
    rows, columns = (torch.arange(0, n, stride, device=images.device) for n in (height, width))
    # float64: in float32 the distance of equal patches is rounding, 1e-4 that changes with the batch
    centred = (images - images.mean(dim=(2, 3), keepdim=True)).double()
    patches = F.unfold(F.pad(centred, [patch // 2] * 4, mode="reflect"), patch, stride=stride).mT
    nearest = []
    for part in torch.cartesian_prod(rows, columns).split(1024):  # bounds the memory
        near_rows, near_columns = (part[:, :1] - rows).abs() < patch, (part[:, 1:] - columns).abs() < patch
        overlapping = (near_rows[:, :, None] & near_columns[:, None]).flatten(1)
        if int((~overlapping).sum(1).min()) < k:
            raise MethodError(f"{height}x{width} px hold fewer than {k} {patch} px patches clear of another")
        first = 1024 * len(nearest)
        distances = [_kth_distance(p[first : first + 1024], p, overlapping, k) for p in patches]
        nearest.append(torch.stack(distances))
    out = torch.cat(nearest, dim=1).view(-1, 1, len(rows), len(columns)).float() / patches.shape[2] ** 0.5
    reach = [int(rows[-1]) + 1, int(columns[-1]) + 1]
    out = F.interpolate(out, reach, mode="bilinear", align_corners=True)
    return F.pad(out, [0, width - reach[1], 0, height - reach[0]], mode="replicate")[:, 0]


def _kth_distance(queries, patches, excluded, k):
    """Euclidean distance of each query [Q,D] to its k-th nearest of the patches [N,D] not excluded [Q,N]."""
    squared = torch.addmm(patches.square().sum(1), queries, patches.T, alpha=-2)
    squared = squared.masked_fill_(excluded, torch.inf).topk(k, largest=False).values[:, -1]
    return (squared + queries.square().sum(1)).clamp(min=0).sqrt()


@dataclass(kw_only=True)
class Baseline(Method):
    """A method that is a function from images [B,3,H,W] in [0,1] to raw maps; it runs where the images are."""

    size: Positive = 64  # pixels: the images are brought to it, and the map has it
    sigma: NotNegative = 1.5  # blur of the map in pixels
    pool: Positive = 2  # `maps.image_score`
    control = "baseline"

    def __post_init__(self) -> None:
        super().__post_init__()
        maps.check_pools(self.size, self.pool)
        self.raw_map(torch.zeros(1, 3, self.size, self.size))  # what cannot work fails here, not on the first batch

    @abstractmethod
    def raw_map(self, images: torch.Tensor) -> torch.Tensor:
        """images [B,3,H,W] in [0,1] -> [B,H,W], not yet smoothed."""

    def score(self, images: torch.Tensor, ids: list[str], categories: list[str]) -> Scores:
        """As `Method.score`; map [B,size,size]."""
        check_batch(images, ids, categories)
        with torch.inference_mode():
            smoothed = maps.smooth(self.raw_map(resize(images, self.size)), self.sigma)
            image = maps.image_score(smoothed, self.pool)
        return Scores(to_host(image), to_host(smoothed))


@dataclass(kw_only=True)
class LocalContrast(Baseline):
    """Distance to the blurred image: `contrast_map`."""

    name = "local_contrast"

    context: NotNegative = 6.0  # the blur's sigma in pixels

    def raw_map(self, images: torch.Tensor) -> torch.Tensor:
        return contrast_map(images, self.context)


@dataclass(kw_only=True)
class Median(Baseline):
    """Distance to the image's median colour: `median_map`."""

    name = "median"

    def raw_map(self, images: torch.Tensor) -> torch.Tensor:
        return median_map(images)


@dataclass(kw_only=True)
class PatchKNN(Baseline):
    """Distance to the k-th nearest patch of the same image: `patch_knn_map`."""

    name = "patch_knn"

    patch: Positive = 7  # pixels, odd
    stride: Positive = 2  # pixels from patch to patch
    k: Positive = 5  # which neighbour counts: the k-th nearest

    def raw_map(self, images: torch.Tensor) -> torch.Tensor:
        return patch_knn_map(images, self.patch, self.stride, self.k)
