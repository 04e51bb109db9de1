"""Stein-score errors amplified by SSIM: one base model against any other distribution.

Source: Abdi et al., "Zero-Shot Image Anomaly Detection Using Generative Foundation Models" (ICCV workshops 2025, arXiv
2507.22692), of which only the abstract and a summary were at hand. They fix one unconditional diffusion model that is
never retrained, errors of its Stein score as features, and SSIM as their amplifier. They do not fix which error, which
product, which decision: those are named here (`Reading`), and all of them follow from one pass over the images.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import product
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from tqdm.auto import tqdm

from zsad_lib.anomaly import density as densities
from zsad_lib.anomaly.ssim import RADIUS, ssim, ssim_map
from zsad_lib.diffusion import ddim
from zsad_lib.diffusion.noise import image_noise, to_host
from zsad_lib.diffusion.pixel import PixelModel
from zsad_lib.errors import MethodError
from zsad_lib.methods.base import Method, Scores, check_batch
from zsad_lib.methods.diffpath import ddim_timesteps, noise_path, path_powers
from zsad_lib.settings import AboveZero, Positive, check_settings

Error = Literal["denoising", "trajectory"]
Scale = Literal["noise", "score"]
Amplification = Literal["product", "ratio", "none", "joint"]
Decision = Literal["sum", "typicality"]
Density = Literal["gmm", "kde"]
ERRORS, SCALES, AMPLIFICATIONS = get_args(Error), get_args(Scale), get_args(Amplification)
DECISIONS, DENSITIES = get_args(Decision), get_args(Density)
WEIGHTS = ("dissimilarity", "similarity")  # of an error at a place: 1 − SSIM, or SSIM
COMPONENTS, FOLDS = (1, 2, 5, 10), 5  # the mixtures that "gmm" chooses from
Features = dict[str, np.ndarray]  # of `extract`


# --- one pass over the images


@torch.inference_mode()
def extract(
    model: PixelModel,
    images: torch.Tensor,
    ids: Sequence[str],
    steps: int = 10,
    seed: int = 0,
    errors: Sequence[Error] = ERRORS,
    clip: bool = True,
    batch_size: int = 64,
    progress: bool = False,
) -> Features:
    """What every reading needs of images [N,3,H,W] or [N,1,H,W] in [0,1] with N ids: a dict of arrays.

    The timesteps are DiffPath's (`ddim_timesteps`), with one network call each per error.

    - "denoising": at each of the K timesteps the image gets noise ε, drawn from its id, the timestep and `seed`:
      "denoising_noise" [N,K], the mean of (ε − ε_θ)² over channels and pixels; "denoising_score", the same over
      1 − ᾱ_t, for the Stein score is −ε/√(1 − ᾱ_t); "denoising_ssim", image against its one-step estimate; and of the
      error ε − ε_θ times each of WEIGHTS what `path_powers` gives: "WEIGHT_noise_powers" [N,K,3]
      and "WEIGHT_change_powers" [N,K−1,3].
    - "trajectory": along `noise_path` (clip: as there): "trajectory_noise" [N,K−1], the mean of (K·Δε)²;
      "trajectory_score", likewise of the score; "trajectory_ssim", image against the estimate at the later step; and
      "noise_powers" [N,K,3] and "change_powers" [N,K−1,3], from which `diffpath.path_statistics` follow.

    The estimates are clamped to [0,1] before SSIM (data range 1). Also "ids".
    """
    for error in errors:
        if error not in ERRORS:
            raise MethodError(f"error {error!r} is unknown; use one of {list(ERRORS)}")
    if len(images) != len(ids):
        raise MethodError(f"{len(images)} images came with {len(ids)} ids")
    grid, parts = ddim_timesteps(steps, len(model.alphas_cumprod)), []
    for first in tqdm(range(0, len(ids), batch_size), disable=not progress, desc=model.name, unit="batch"):
        pixels, some = model.to_pixels(images[first : first + batch_size]), ids[first : first + batch_size]
        part = _denoising(model, pixels, some, grid, seed) if "denoising" in errors else {}
        parts.append(part | (_trajectory(model, pixels, grid, clip) if "trajectory" in errors else {}))
    return join([{key: tensor.cpu().numpy() for key, tensor in part.items()} for part in parts]) | {
        "ids": np.array(ids)
    }


def join(parts: list[Features]) -> Features:
    """One dict of arrays for the images of all parts."""
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def one_step(
    model: PixelModel, pixels: torch.Tensor, noise: torch.Tensor, t: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(noisy, predicted, estimate), each [B,C,H,W]: pixels with `noise` at timestep t, the noise predicted there, and
    the estimate of the pixels from it, in their units and not clamped."""
    alpha = float(model.alphas_cumprod[t])
    noisy = ddim.add_noise(pixels, noise, alpha)
    predicted = model.predict_noise(noisy, t)
    return noisy, predicted, ddim.predict_x0(noisy, predicted, alpha)


def _denoising(model, pixels, ids, grid, seed):
    clean, errors, estimates = model.to_images(pixels), [], []
    for t in grid:
        noise = image_noise(ids, f"stein_ssim-{t}", seed, pixels.shape[1:]).to(pixels)
        _, predicted, estimate = one_step(model, pixels, noise, t)
        errors.append((predicted - noise).double())
        estimates.append(model.to_images(estimate))
    error = torch.stack([e.square().mean((1, 2, 3)) for e in errors], 1).cpu()
    found = {
        "denoising_noise": error,
        "denoising_score": error / (1 - model.alphas_cumprod[grid]),
        "denoising_ssim": torch.stack([ssim(clean, estimate) for estimate in estimates], 1),
    }
    errors, similarity = -torch.stack(errors, 1), torch.stack([ssim_map(clean, e) for e in estimates], 1)
    for weight, factor in zip(WEIGHTS, (1 - similarity, similarity), strict=True):
        found[f"{weight}_noise_powers"], found[f"{weight}_change_powers"] = path_powers(errors, factor)
    return found


def _trajectory(model, pixels, grid, clip):
    noise, estimates = noise_path(model, pixels, len(grid), clip)
    spread = (1 - model.alphas_cumprod[grid]).sqrt().to(noise.device).view(-1, 1, 1, 1)
    changes = {"noise": noise.double().diff(dim=1), "score": (noise / spread).diff(dim=1)}
    later, clean = model.to_images(estimates[:, 1:]), model.to_images(pixels)
    noise_powers, change_powers = path_powers(noise)
    return {
        **{f"trajectory_{name}": (len(grid) * c).square().mean((2, 3, 4)) for name, c in changes.items()},
        "trajectory_ssim": torch.stack([ssim(clean, estimate) for estimate in later.unbind(1)], 1),
        "noise_powers": noise_powers,
        "change_powers": change_powers,
    }


# --- readings


@dataclass
class Reading:
    """One way to read the abstract: from the arrays of `extract` to an anomaly score."""

    error: Error = "denoising"  # of noise drawn for the image, or the change along its DDIM path: `extract`
    # of an error e by the SSIM of the same timestep: e·(1 − SSIM), e/max(SSIM, delta), e alone; "joint", this project's
    # own: both side by side as 2·K features, which only a density can weigh against each other
    amplification: Amplification = "product"
    # "sum" over the timesteps needs no reference; "typicality" is the negative log-likelihood of the per-timestep
    # features under a density of the reference's
    decision: Decision = "sum"
    scale: Scale = "noise"  # errors of the noise, or of the score: noise over −√(1 − ᾱ_t)
    density: Density = "gmm"  # a Gaussian mixture of COMPONENTS, or a kernel density (Scott's bandwidth), standardised
    delta: AboveZero = 0.01  # the least similarity that "ratio" divides by

    def __post_init__(self) -> None:
        check_settings(self)
        if self.amplification == "joint" and self.decision == "sum":
            raise MethodError("amplification 'joint' has no sum of errors and similarities; use decision 'typicality'")

    def values(self, features: Features) -> np.ndarray:
        """The amplified error of each image and timestep, float64 [N,K]; "trajectory": [N,K−1]; "joint": twice that."""
        if f"{self.error}_ssim" not in features:
            raise MethodError(f"these features lack the error {self.error!r}: extract them with errors={[self.error]}")
        error, similarity = features[f"{self.error}_{self.scale}"], features[f"{self.error}_ssim"]
        if self.amplification == "product":
            return error * (1 - similarity)
        if self.amplification == "joint":
            return np.concatenate([error, similarity], axis=1)
        return error / np.maximum(similarity, self.delta) if self.amplification == "ratio" else error

    def fit(self, reference: Features, seed: int = 0) -> Any:
        """The density of the features of normal images, for the decision "typicality"."""
        values = self.values(reference)
        if self.density == "kde":
            return densities.fit_kernel(values)
        return densities.fit_mixture(values, COMPONENTS, FOLDS, seed=seed)

    def scores(self, features: Features, density: Any = None) -> np.ndarray:
        """float32 [N], higher is more anomalous; density: what `fit` gave, for the decision "typicality"."""
        values = self.values(features)
        if self.decision == "sum":
            return values.sum(1).astype(np.float32)
        if density is None:
            raise MethodError("decision 'typicality' needs the density of normal images: give what `fit` returns")
        return densities.atypicality(density, values).astype(np.float32)


def readings(**fixed: Any) -> list[Reading]:
    """Every Reading there is with the fields in `fixed` held; a "sum" appears once, for it has no density."""
    known = {"error": ERRORS, "amplification": AMPLIFICATIONS, "decision": DECISIONS, "scale": SCALES}
    known |= {"density": DENSITIES} | {key: (value,) for key, value in fixed.items()}
    chosen = (dict(zip(known, values, strict=True)) for values in product(*known.values()))
    return [Reading(**c) for c in chosen if c["decision"] == "typicality" or _is_a_sum(c, known["density"][0])]


def _is_a_sum(chosen, density):
    return chosen["amplification"] != "joint" and chosen["density"] == density


DEFAULTS = {  # by decision: the best of what the abstract allows in the mean over two bases and two sets (`zsad ood`)
    "sum": Reading("denoising", "product", "sum", "score"),
    "typicality": Reading("trajectory", "none", "typicality", "score", "kde"),
}


@dataclass(kw_only=True)
class SteinSSIM(Method):
    """One reading as a method, image scores without maps; the normal images of a "typicality" come through `fit`."""

    name = "stein_ssim"
    unfitted = {"reference": None}

    backbone: PixelModel
    # as in `Reading`; None: "typicality" when fitted, else "sum", and what DEFAULTS has for that decision
    error: Error | None = None
    amplification: Amplification | None = None
    decision: Decision | None = None
    scale: Scale | None = None
    density: Density | None = None
    delta: AboveZero = 0.01
    steps: Positive = 10  # K timesteps of DiffPath's grid: `ddim_timesteps`
    clip: bool = True  # `diffpath.noise_path`
    seed: int = 0  # of the noise, drawn for each image from its id, and of the mixture

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.reading  # refuses what cannot work
        ddim_timesteps(self.steps, len(self.backbone.alphas_cumprod))
        if self.size <= 2 * RADIUS:
            raise MethodError(f"SSIM needs images above {2 * RADIUS} px; {self.backbone.name} is for {self.size} px")

    @property
    def reading(self) -> Reading:
        """The settings of the `Reading`, its defaults filled in."""
        decision = self.decision or ("sum" if self.reference is None else "typicality")
        given = {f.name: getattr(self, f.name) for f in fields(Reading)} | {"decision": decision}
        return replace(DEFAULTS[decision], **{key: value for key, value in given.items() if value is not None})

    @property
    def config(self) -> dict[str, Any]:
        return super().config | vars(self.reading)

    def fit(self, reference: Any) -> Self:
        if self.decision == "sum":
            raise MethodError("decision 'sum' takes no reference images; leave it out or use 'typicality'")
        return super().fit(reference)

    def _extract(self, images, ids):
        reading = self.reading
        return extract(self.backbone, images, ids, self.steps, self.seed, (reading.error,), self.clip)

    def score(self, images: torch.Tensor, ids: list[str], categories: list[str]) -> Scores:
        """As `Method.score`; the categories are not used. details: evaluations [B]."""
        check_batch(images, ids, categories, channels=(1, 3))
        if self.reading.decision == "typicality" and self.reference is None:
            raise MethodError("decision 'typicality' needs a reference of normal images, given by fit; 'sum' does not")
        scores = torch.from_numpy(self.reading.scores(self._extract(images, ids), self._density))
        return Scores(to_host(scores), details={"evaluations": torch.full((len(ids),), float(self.steps))})

    @cached_property
    def _density(self):
        if self.reading.decision == "sum":
            return None
        parts = [self._extract(images, ids) for images, ids, _ in self.reference.batches(self.size)]
        return self.reading.fit(join(parts), self.seed)
