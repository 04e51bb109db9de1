"""DiffPath: the path of an image to noise as its fingerprint (Heng et al., NeurIPS 2024; clear-nus/diffpath).

Mirrors `ddim_reverse_sample_loop` (gaussian_diffusion.py), `save_test_statistics.py`, `eval_1d.py` and `eval_6d.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch

from zsad_lib.anomaly import density
from zsad_lib.diffusion import ddim
from zsad_lib.diffusion.noise import to_host
from zsad_lib.diffusion.pixel import PixelModel
from zsad_lib.errors import MethodError
from zsad_lib.methods.base import Method, Scores, check_batch
from zsad_lib.settings import AboveZero, Positive

Variant = Literal["1d", "6d"]
COMPONENTS = (50, 100)  # of the mixture of the 6-D variant
BANDWIDTH = 5.0  # of the kernel density of the 1-D variant, in units of its statistic


def ddim_timesteps(steps: int, T: int) -> list[int]:
    """`steps` evenly spread timesteps from 0 up, as "ddim{steps}" of improved-diffusion's `respace.py` spaces them."""
    if not 2 <= steps <= T:
        raise MethodError(f"steps must be 2 to {T} (the training timesteps), not {steps}")
    grid = list(range(0, T, -(-T // steps)))
    if len(grid) != steps:
        raise MethodError(f"no whole stride takes {steps} steps through {T} timesteps; {len(grid)} would work")
    return grid


def noise_path(
    model: PixelModel, pixels: torch.Tensor, steps: int = 10, clip: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """(noise, estimates), each [B,steps,3,H,W]: pixels [B,3,H,W] in [-1,1] carried up the noise levels by DDIM.

    One network call a step; the image itself is taken to be at timestep 0. clip: hold each estimate of the image to
    [-1,1] and let the noise follow from it (the authors' clip_denoised).
    """
    grid = ddim_timesteps(steps, len(model.alphas_cumprod))
    alphas = model.alphas_cumprod[grid].tolist()
    x, noises, estimates = pixels, [], []
    for k, t in enumerate(grid):
        if k:
            x = ddim.add_noise(estimates[-1], noises[-1], alphas[k])
        eps = model.predict_noise(x, t)
        estimate = ddim.predict_x0(x, eps, alphas[k])
        if clip:
            held = estimate.clamp(-1, 1)
            implied = (x - alphas[k] ** 0.5 * held) / (1 - alphas[k]) ** 0.5
            eps = torch.where(held == estimate, eps, implied)  # where nothing was clipped, without the rounding
            estimate = held
        noises.append(eps)
        estimates.append(estimate)
    return torch.stack(noises, 1), torch.stack(estimates, 1)


def path_states(model: PixelModel, noise: torch.Tensor, estimates: torch.Tensor) -> torch.Tensor:
    """The noised pixels [B,K,C,H,W] that a path went through, from the (noise, estimates) of `noise_path`."""
    grid = ddim_timesteps(noise.shape[1], len(model.alphas_cumprod))
    return ddim.add_noise(estimates, noise, model.alphas_cumprod[grid].to(noise).view(-1, 1, 1, 1))


def path_powers(noise: torch.Tensor, weight: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over channels and pixels of a path's noise [B,K,C,H,W], and of its change, to the powers 1, 2, 3.

    float64 (noise_powers [B,K,3], change_powers [B,K−1,3]) on the CPU; the change between two steps is multiplied by K,
    the inverse of the step's length. weight [B,K,C,H,W]: of both at every place, a change has its later step's.
    """
    noise = noise.double()
    change = noise.diff(dim=1) * noise.shape[1]
    if weight is not None:
        noise, change = noise * weight, change * weight[:, 1:]
    return tuple(torch.stack([(v**p).sum((2, 3, 4)) for p in (1, 2, 3)], -1).cpu() for v in (noise, change))


def path_statistics(noise_powers: Any, change_powers: Any, variant: Variant = "6d") -> torch.Tensor:
    """DiffPath's statistics of images from the sums of `path_powers`, float64 [B,6] or [B,1].

    "6d": Σε, Σε², Σε³, Σε̇, Σε̇², Σε̇³ over steps, channels and pixels, ε̇ the change; "1d": √Σε̇².
    """
    noise, change = (torch.as_tensor(powers).sum(1) for powers in (noise_powers, change_powers))
    return torch.cat([noise, change], 1) if variant == "6d" else change[:, 1:2].sqrt()


def fit(
    reference: Any,
    variant: Variant = "6d",
    components: Sequence[int] = COMPONENTS,
    bandwidth: float = BANDWIDTH,
    seed: int = 0,
) -> Any:
    """The density of the reference images' statistics [N,6] or [N,1], as the authors fit it (`anomaly.density`)."""
    if variant == "6d":
        return density.fit_mixture(reference, components, seed=seed)
    return density.fit_kernel(reference, bandwidth, standardise=False)


@dataclass(kw_only=True)
class DiffPath(Method):
    """How untypical the statistics of an image's path are; image scores without maps.

    The path of normal images comes through `fit`. Without it the 1-D statistic itself is the score, the higher the
    faster an image's noise changes; the 6-D variant needs it.
    """

    name = "diffpath"
    unfitted = {"reference": None}

    backbone: PixelModel
    variant: Variant = "1d"  # which statistics: `path_statistics`
    steps: Positive = 10  # K timesteps: `ddim_timesteps`
    clip: bool = True  # `noise_path`
    components: tuple[Positive, ...] = COMPONENTS  # of the mixture of "6d", chosen by held-out likelihood
    bandwidth: AboveZero = BANDWIDTH  # of the kernel density of "1d"
    seed: int = 0  # of the mixture's initialisation

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.components:
            raise MethodError("components is empty: give the sizes of the mixtures to choose from")
        ddim_timesteps(self.steps, len(self.backbone.alphas_cumprod))

    @torch.inference_mode()
    def statistics(self, images: torch.Tensor) -> torch.Tensor:
        """The statistics of images [B,3,H,W] or [B,1,H,W] in [0,1], float64 [B,6] or [B,1]."""
        noise, _ = noise_path(self.backbone, self.backbone.to_pixels(images), self.steps, self.clip)
        return path_statistics(*path_powers(noise), self.variant)

    def score(self, images: torch.Tensor, ids: list[str], categories: list[str]) -> Scores:
        """As `Method.score`; the images' ids and categories are not used. details: evaluations [B]."""
        check_batch(images, ids, categories, channels=(1, 3))
        if self.variant == "6d" and self.reference is None:
            raise MethodError("variant '6d' needs a reference of normal images, given by fit; '1d' works without")
        values = self.statistics(images)
        scores = values[:, 0]
        if self.reference:
            scores = torch.from_numpy(density.atypicality(self._density, values))
        return Scores(to_host(scores), details={"evaluations": torch.full((len(images),), float(self.steps))})

    @cached_property
    def _density(self):
        values = torch.cat([self.statistics(images) for images, _, _ in self.reference.batches(self.size)])
        return fit(values, self.variant, self.components, self.bandwidth, self.seed)
