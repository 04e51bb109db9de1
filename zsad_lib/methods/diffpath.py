"""DiffPath: the path of an image to noise as its fingerprint (Heng et al., NeurIPS 2024; clear-nus/diffpath).

Mirrors `ddim_reverse_sample_loop` (gaussian_diffusion.py), `save_test_statistics.py`, `eval_1d.py` and `eval_6d.py`.
"""

import torch

from zsad_lib.anomaly.density import atypicality, describe, fit_kernel, fit_mixture, reference_set
from zsad_lib.diffusion import ddim
from zsad_lib.diffusion.noise import to_host
from zsad_lib.errors import MethodError
from zsad_lib.methods.base import Scores

VARIANTS = ("1d", "6d")
COMPONENTS = (50, 100)  # of the mixture of the 6-D variant
BANDWIDTH = 5.0  # of the kernel density of the 1-D variant, in units of its statistic


def ddim_timesteps(steps, T):
    """`steps` evenly spread timesteps from 0 up, as "ddim{steps}" of improved-diffusion's `respace.py` spaces them.

    MethodError when no whole stride gives exactly that many.
    """
    if not 2 <= steps <= T:
        raise MethodError(f"steps must be 2 to {T} (the training timesteps), not {steps}")
    grid = list(range(0, T, -(-T // steps)))
    if len(grid) != steps:
        raise MethodError(f"no whole stride takes {steps} steps through {T} timesteps; {len(grid)} would work")
    return grid


def noise_path(model, pixels, steps=10, clip=True):
    """Carry pixels [B,3,H,W] in [-1,1] up the noise levels by DDIM; one network call a step.

    The image itself is taken to be at timestep 0. clip: hold each estimate of the image to [-1,1] and let the noise
    follow from it (the authors' clip_denoised). Returns (noise, estimates), each [B,steps,3,H,W] on the model's device.
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


def path_states(model, noise, estimates):
    """The noised pixels [B,K,C,H,W] that a path went through, from the (noise, estimates) that `noise_path` gave."""
    grid = ddim_timesteps(noise.shape[1], len(model.alphas_cumprod))
    return ddim.add_noise(estimates, noise, model.alphas_cumprod[grid].to(noise).view(-1, 1, 1, 1))


def path_powers(noise):
    """Sums over channels and pixels of a path's noise [B,K,C,H,W], and of its change, to the powers 1, 2, 3.

    Returns float64 (noise_powers [B,K,3], change_powers [B,K−1,3]) on the CPU; the change between two steps is
    multiplied by K, the inverse of the step's length.
    """
    noise = noise.double()
    change = noise.diff(dim=1) * noise.shape[1]
    return tuple(torch.stack([(v**p).sum((2, 3, 4)) for p in (1, 2, 3)], -1).cpu() for v in (noise, change))


def path_statistics(noise_powers, change_powers, variant="6d"):
    """DiffPath's statistics of images from the sums of `path_powers`, float64 [B,6] or [B,1].

    "6d": Σε, Σε², Σε³, Σε̇, Σε̇², Σε̇³ over steps, channels and pixels, ε̇ the change; "1d": √Σε̇².
    """
    _check(variant)
    noise, change = (torch.as_tensor(powers).sum(1) for powers in (noise_powers, change_powers))
    return torch.cat([noise, change], 1) if variant == "6d" else change[:, 1:2].sqrt()


def fit(reference, variant="6d", components=COMPONENTS, bandwidth=BANDWIDTH, seed=0):
    """The density of the reference images' statistics [N,6] or [N,1], as the authors fit it (`typicality`)."""
    _check(variant)
    if variant == "6d":
        return fit_mixture(reference, components, seed=seed)
    return fit_kernel(reference, bandwidth, standardise=False)


def _check(variant):
    if variant not in VARIANTS:
        raise MethodError(f"variant {variant!r} is unknown; use one of {list(VARIANTS)}")


class DiffPath:
    """Method "diffpath", image scores without maps: how untypical the statistics of an image's path are.

    backbone: a `PixelModel`; variant: "1d" or "6d"; steps, clip: see `noise_path`. reference: normal images, an
    `ImageSet` or the name of one, whose training split (`count` images) is fitted on the first use. Without it the 1-D
    statistic itself is the score, the higher the faster an image's noise changes, and the 6-D variant is a
    MethodError. components, bandwidth: see `fit`.
    """

    name = "diffpath"

    def __init__(
        self,
        backbone,
        variant="1d",
        steps=10,
        clip=True,
        reference=None,
        count=500,
        components=COMPONENTS,
        bandwidth=BANDWIDTH,
        seed=0,
    ):
        _check(variant)
        if variant == "6d" and reference is None:
            raise MethodError("variant '6d' needs reference=, an image set of normal images; '1d' works without")
        ddim_timesteps(steps, len(backbone.alphas_cumprod))
        self.backbone, self.size, self.reference = backbone, backbone.image_size, reference
        self.config = {
            "method": self.name,
            "backbone": backbone.config,
            "variant": variant,
            "steps": steps,
            "clip": clip,
            "reference": describe(reference, count),
            "components": list(components),
            "bandwidth": float(bandwidth),
            "seed": seed,
        }
        self._density = None

    @torch.inference_mode()
    def statistics(self, images):
        """The statistics of images [B,3,H,W] or [B,1,H,W] in [0,1], float64 [B,6] or [B,1]."""
        noise, _ = noise_path(self.backbone, self.backbone.to_pixels(images), self.config["steps"], self.config["clip"])
        return path_statistics(*path_powers(noise), self.config["variant"])

    def score(self, images, ids, categories):
        """images [B,3,H,W] in [0,1]; ids, categories: not used. Gives image [B] and details: evaluations [B]."""
        values = self.statistics(images)
        if self.reference is None:
            scores = values[:, 0]
        else:
            scores = torch.from_numpy(atypicality(self._fitted(), values))
        return Scores(to_host(scores), details={"evaluations": torch.full((len(images),), float(self.config["steps"]))})

    def _fitted(self):
        if self._density is None:
            described = self.config["reference"]
            normal = reference_set(self.reference, described["images"], self.size)
            values = torch.cat([self.statistics(part) for part in normal.images.split(64)])
            config = self.config
            self._density = fit(values, config["variant"], config["components"], config["bandwidth"], config["seed"])
        return self._density
