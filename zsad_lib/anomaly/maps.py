"""From the features of an image and of its reconstruction to an anomaly map and an image score.

Mirrors DIVAD's `cal_anomaly_map` (`test.py`) and `EvalImageMax` (`eval_helper.py`), arXiv 2601.08022, batched, on any
device. Maps are float32 [B,H,W], higher is more anomalous.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F

from zsad_lib.errors import MethodError

MODES = ("sum", "product")


def cosine_distance(f: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """1 − cosine similarity over the channels of two [B,C,h,w] feature maps -> [B,h,w] in [0,2].

    It does not see a change of length, only of direction; a zero vector is at distance 1 from everything.
    """
    return 1 - F.cosine_similarity(f, g, dim=1)


def anomaly_map(
    feats_x: Sequence[torch.Tensor], feats_y: Sequence[torch.Tensor], size: int | tuple[int, int], mode: str = "sum"
) -> torch.Tensor:
    """Feature distance of an image and its reconstruction at every pixel, float32 [B,H,W].

    feats_x, feats_y: lists of [B,C,h,w], one entry a layer. Each layer's distance is brought to `size` (bilinear,
    align_corners=True), then the layers are added ("sum", official "a": range [0, 2·layers]) or multiplied ("product",
    official "mul").
    """
    if mode not in MODES:
        raise MethodError(f"anomaly map mode {mode!r} is unknown; use one of {list(MODES)}")
    if not feats_x or len(feats_x) != len(feats_y):
        raise MethodError(f"expected the same layers on both sides, got {len(feats_x)} and {len(feats_y)}")
    size = (size, size) if isinstance(size, int) else tuple(size)
    layers = [cosine_distance(f.float(), g.float())[:, None] for f, g in zip(feats_x, feats_y, strict=True)]
    layers = torch.cat([F.interpolate(d, size, mode="bilinear", align_corners=True) for d in layers], dim=1)
    return layers.sum(1) if mode == "sum" else layers.prod(1)


@lru_cache(maxsize=64)
def _gaussian_matrix(size, sigma):
    """The 1-D filter as a matrix [size,size], its mirrored border folded in, so any sigma fits any size."""
    radius = int(4 * sigma + 0.5)
    offsets = torch.arange(-radius, radius + 1)
    weights = torch.exp(-0.5 * (offsets.double() / sigma) ** 2)
    source = (torch.arange(size)[:, None] + offsets) % (2 * size)
    source = torch.where(source < size, source, 2 * size - 1 - source)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    return matrix.scatter_add_(1, source, (weights / weights.sum()).expand(size, -1)).float()


def smooth(maps: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian blur of each map [..., H, W]; sigma in pixels, 0 leaves the maps as they are.

    Equals `scipy.ndimage.gaussian_filter` with its defaults (mode "reflect": the edge pixel is repeated; truncate 4).
    """
    if sigma < 0:
        raise MethodError(f"sigma must be 0 or more pixels, not {sigma}")
    if sigma == 0:
        return maps
    rows, columns = (_gaussian_matrix(n, float(sigma)).to(maps) for n in maps.shape[-2:])
    return rows @ maps @ columns.T


def check_pools(size: int, pool: int = 8, repeats: int = 8) -> None:
    """Refuse a map of `size` pixels that is too small for `image_score` with these pools."""
    if pool < 1 or size <= repeats * (pool - 1):
        raise MethodError(
            f"a map of {size} px is too small for {repeats} average pools of {pool}x{pool} px: it needs more "
            f"than {repeats * (pool - 1)} px; give a pool of 1 to {(size - 1) // repeats + 1} or a larger map"
        )


def image_score(maps: torch.Tensor, pool: int = 8, repeats: int = 8) -> torch.Tensor:
    """Image score [B] of each map [B,H,W]: `repeats` average pools of pool x pool at stride 1, then the maximum.

    Defaults as DIVAD's `EvalImageMax`, meant for 256 px maps.
    """
    check_pools(min(maps.shape[-2:]), pool, repeats)
    for _ in range(repeats):
        maps = F.avg_pool2d(maps[:, None], pool, stride=1)[:, 0]
    return maps.amax(dim=(1, 2))


def compare(
    feats_x: Sequence[torch.Tensor],
    feats_y: Sequence[torch.Tensor],
    size: int,
    sigma: float = 5,
    pool: int = 8,
    mode: str = "sum",
) -> tuple[torch.Tensor, torch.Tensor]:
    """(maps [B,size,size], image scores [B]): `anomaly_map`, `smooth` and `image_score` in one."""
    distance = smooth(anomaly_map(feats_x, feats_y, size, mode), sigma)
    return distance, image_score(distance, pool)


def texture(images: torch.Tensor) -> torch.Tensor:
    """How busy images [B,3,H,W] are: the mean squared difference of neighbouring pixels, both ways; float [B]."""
    across, down = images.diff(dim=3), images.diff(dim=2)
    return across.square().mean((1, 2, 3)) + down.square().mean((1, 2, 3))
