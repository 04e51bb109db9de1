"""Structural similarity of images, batched, in torch."""

import torch
import torch.nn.functional as F

from zsad_lib.errors import MethodError

SIGMA, RADIUS = 1.5, 5  # the window of Wang et al.: 11 x 11


def ssim(x: torch.Tensor, y: torch.Tensor, data_range: float = 1.0) -> torch.Tensor:
    """Structural similarity of images x, y [B,C,H,W], float64 [B] in [−1,1]; exactly 1 where they are equal.

    Wang et al., "Image Quality Assessment", 2004: a Gaussian window of 11 x 11 with σ = 1.5, K₁ = 0.01, K₂ = 0.03, the
    mean over the places where the window fits and over the channels. data_range: the largest difference two values can
    have. The same as scikit-image's structural_similarity with gaussian_weights=True and use_sample_covariance=False.
    """
    if min(x.shape[2:]) <= 2 * RADIUS:
        raise MethodError(f"SSIM needs images of {2 * RADIUS + 1} px or more, not {list(x.shape[2:])}")
    return _similarity(x, y, data_range).mean((1, 2, 3))


def ssim_map(x: torch.Tensor, y: torch.Tensor, data_range: float = 1.0) -> torch.Tensor:
    """The structural similarity at every place, float64 [B,C,H,W]: `ssim` before its mean, the images mirrored at
    their borders. The same as scikit-image's with full=True."""
    size = x.shape[2:]
    if min(size) < RADIUS:
        raise MethodError(f"an SSIM map needs images of {RADIUS} px or more, not {list(size)}")
    rows, columns = (_mirrored(side).to(x.device) for side in size)
    return _similarity(*(images[:, :, rows][..., columns] for images in (x, y)), data_range)


def _mirrored(side):
    """Indices of a row of `side` places and RADIUS more at each end, the border place repeated."""
    places = torch.arange(-RADIUS, side + RADIUS) % (2 * side)
    return torch.where(places < side, places, 2 * side - 1 - places)


def _similarity(x, y, data_range):
    """[B,C,h,w], where the window fits."""
    x, y = x.double(), y.double()
    mean_x, mean_y, xx, yy, xy = (_window(values) for values in (x, y, x * x, y * y, x * y))
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    similar = (2 * mean_x * mean_y + c1) * (2 * (xy - mean_x * mean_y) + c2)
    return similar / ((mean_x**2 + mean_y**2 + c1) * (xx - mean_x**2 + yy - mean_y**2 + c2))


def _window(values):
    """Gaussian means of [B,C,H,W] where the window fits."""
    places = torch.arange(-RADIUS, RADIUS + 1, dtype=values.dtype, device=values.device)
    weights = torch.exp(-(places**2) / (2 * SIGMA**2))
    weights = (weights / weights.sum()).view(1, 1, 1, -1)
    flat = F.conv2d(F.conv2d(values.flatten(0, 1)[:, None], weights), weights.mT)
    return flat.view(*values.shape[:2], *flat.shape[2:])
