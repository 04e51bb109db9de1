"""Baselines that need no model at all: what a method must beat before its network has earned anything.

Each looks at one image alone. Their maps are smoothed and pooled like every other method's (`maps.py`).
Images are brought to 64 px, the size of the lite profile, where the defaults sigma 1.5 and pool 2 stand for
the 5 and 8 that the papers use at 256 px.
"""

from functools import partial

import torch
import torch.nn.functional as F

from zsad_lib.anomaly import maps
from zsad_lib.diffusion.noise import to_host
from zsad_lib.errors import MethodError
from zsad_lib.methods.base import Scores, check_batch


def contrast_map(images, context):
    """|x − blurred x|, mean over channels: [B,3,H,W] -> [B,H,W] in [0,1]; context: the blur's sigma (px)."""
    return (images - maps.smooth(images, context)).abs().mean(1)


def median_map(images):
    """|x − the image's median colour|, mean over channels: [B,3,H,W] -> [B,H,W] in [0,1].

    Of an even number of pixels the lower median counts.
    """
    # contiguous: along an expanded (stride 0) dimension torch 2.13's median returns uninitialised memory
    pixels = images.flatten(2).contiguous()
    return (images - pixels.median(dim=2).values[..., None, None]).abs().mean(1)


def patch_knn_map(images, patch=7, stride=2, k=5):
    """How far each patch is from its k-th nearest patch of the same image: [B,3,H,W] -> [B,H,W].

    Patches of patch x patch RGB pixels around every stride-th pixel, the border mirrored; patches that
    overlap the one in question do not count. Distances are root mean square differences of pixel values, in
    [0,1], computed at the patch centres and interpolated bilinearly between them. ValueError when k patches
    do not fit beside one.
    """
    height, width = images.shape[-2:]
    if patch // 2 >= min(height, width):
        raise ValueError(f"patches of {patch} px do not fit into {height}x{width} px")
    rows, columns = (torch.arange(0, n, stride, device=images.device) for n in (height, width))
    # float64: in float32 the distance of equal patches is rounding, 1e-4 that changes with the batch
    centred = (images - images.mean(dim=(2, 3), keepdim=True)).double()
    patches = F.unfold(F.pad(centred, [patch // 2] * 4, mode="reflect"), patch, stride=stride).mT
    nearest = []
    for part in torch.cartesian_prod(rows, columns).split(1024):  # bounds the memory
        near_rows, near_columns = (part[:, :1] - rows).abs() < patch, (part[:, 1:] - columns).abs() < patch
        overlapping = (near_rows[:, :, None] & near_columns[:, None]).flatten(1)
        if int((~overlapping).sum(1).min()) < k:
            raise ValueError(f"{height}x{width} px hold fewer than {k} {patch} px patches clear of another")
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


class Baseline:
    """A method made of a function from images [B,3,H,W] in [0,1] to raw maps [B,H,W].

    settings: what of the function changes the numbers; size: the resolution the images are brought to, and
    the map's; sigma: blur of the map in pixels; pool: see `maps.image_score`. Runs where the images are.
    """

    def __init__(self, name, raw_map, settings, size, sigma, pool):
        if sigma < 0 or size < 1:
            raise MethodError(f"{name}: sigma must be 0 or more and size 1 or more pixels, not {sigma} and {size}")
        try:
            maps.check_pools(size, pool)
            raw_map(torch.zeros(1, 3, size, size))  # what cannot work fails here, not on the first batch
        except ValueError as error:
            raise MethodError(f"{name}: {error}") from error
        self.name, self.raw_map, self.size = name, raw_map, size
        self.config = {"method": name, **settings, "size": size, "sigma": float(sigma), "pool": pool}

    def score(self, images, ids, categories):
        """images [B,3,H,W] in [0,1]; ids, categories: B strings each. Gives image [B], map [B,size,size]."""
        check_batch(images, ids, categories)
        with torch.inference_mode():
            if images.shape[-2:] != (self.size, self.size):
                images = F.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True)
            smoothed = maps.smooth(self.raw_map(images), self.config["sigma"])
            image = maps.image_score(smoothed, self.config["pool"])
        return Scores(to_host(image), to_host(smoothed))


def local_contrast(size=64, sigma=1.5, pool=2, context=6.0):
    """Method "local_contrast": distance to the blurred image; see `contrast_map` and `Baseline`."""
    raw_map = partial(contrast_map, context=context)
    return Baseline("local_contrast", raw_map, {"context": float(context)}, size, sigma, pool)


def median(size=64, sigma=1.5, pool=2):
    """Method "median": distance to the image's median colour; see `median_map` and `Baseline`."""
    return Baseline("median", median_map, {}, size, sigma, pool)


def patch_knn(size=64, sigma=1.5, pool=2, patch=7, stride=2, k=5):
    """Method "patch_knn": distance to the k-th nearest patch; see `patch_knn_map` and `Baseline`."""
    settings = {"patch": patch, "stride": stride, "k": k}
    if patch < 1 or patch % 2 == 0 or stride < 1 or k < 1:
        raise MethodError(f"patch_knn needs an odd patch, and stride and k of 1 or more, not {settings}")
    return Baseline("patch_knn", partial(patch_knn_map, **settings), settings, size, sigma, pool)
