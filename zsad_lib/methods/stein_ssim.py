"""Stein-score errors amplified by SSIM: one base model against any other distribution.

Source: Abdi et al., "Zero-Shot Image Anomaly Detection Using Generative Foundation Models" (ICCV workshops 2025, arXiv
2507.22692), of which only the abstract and a summary were at hand. They fix one unconditional diffusion model that is
never retrained, errors of its Stein score as features, and SSIM as their amplifier. They do not fix which error, which
product, which decision: those are named here (`Reading`), and all of them follow from one pass over the images.
"""

import io
import json
import os
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from zsad_lib.anomaly.density import atypicality, describe, fit_kernel, fit_mixture, reference_set
from zsad_lib.anomaly.ssim import RADIUS, ssim
from zsad_lib.diffusion import ddim
from zsad_lib.diffusion.noise import image_noise, to_host
from zsad_lib.errors import MethodError
from zsad_lib.methods.base import Scores
from zsad_lib.methods.diffpath import ddim_timesteps, noise_path, path_powers

ERRORS = ("denoising", "trajectory")
SCALES = ("noise", "score")
AMPLIFICATIONS = ("product", "ratio", "none", "joint")
DECISIONS = ("sum", "typicality")
DENSITIES = ("gmm", "kde")
COMPONENTS, FOLDS = (1, 2, 5, 10), 5  # the mixtures that "gmm" chooses from


# --- one pass over the images


@torch.inference_mode()
def extract(model, images, ids, steps=10, seed=0, errors=ERRORS, clip=True, batch_size=64, progress=False):
    """What every reading needs of images [N,3,H,W] or [N,1,H,W] in [0,1] with N ids: a dict of arrays.

    model: a `PixelModel`; the timesteps are DiffPath's (`ddim_timesteps`), with one network call each per error.

    - "denoising": at each of the K timesteps the image gets noise ε, drawn from its id, the timestep and `seed`:
      "denoising_noise" [N,K], the mean of (ε − ε_θ)² over channels and pixels; "denoising_score", the same over
      1 − ᾱ_t, for the Stein score is −ε/√(1 − ᾱ_t); "denoising_ssim", image against its one-step estimate.
    - "trajectory": along `noise_path` (clip: as there): "trajectory_noise" [N,K−1], the mean of (K·Δε)²;
      "trajectory_score", likewise of the score; "trajectory_ssim", image against the estimate at the later step; and
      "noise_powers" [N,K,3] and "change_powers" [N,K−1,3], from which `diffpath.path_statistics` follow.

    The estimates are clamped to [0,1] before SSIM (data range 1). Also "ids", and "settings": a JSON text of the model
    and the options. MethodError: unknown error or steps; ValueError: images that the model or SSIM cannot take.
    """
    for error in errors:
        _require("error", error, ERRORS)
    if len(images) != len(ids):
        raise ValueError(f"{len(images)} images came with {len(ids)} ids")
    grid = ddim_timesteps(steps, len(model.alphas_cumprod))
    parts = []
    for first in tqdm(range(0, len(ids), batch_size), disable=not progress, desc=model.name, unit="batch"):
        pixels, some = model.to_pixels(images[first : first + batch_size]), ids[first : first + batch_size]
        part = _denoising(model, pixels, some, grid, seed) if "denoising" in errors else {}
        parts.append(part | (_trajectory(model, pixels, grid, clip) if "trajectory" in errors else {}))
    features = {key: torch.cat([part[key] for part in parts]).cpu().numpy() for key in parts[0]}
    return features | {"ids": np.array(ids), "settings": np.array(_settings(model, steps, seed, errors, clip))}


def one_step(model, pixels, noise, t):
    """Pixels [B,C,H,W] with `noise` at timestep t, the noise predicted there, and the estimate of the pixels from it.

    Returns (noisy, predicted, estimate), each [B,C,H,W] in units of the pixels; the estimate is not clamped.
    """
    alpha = float(model.alphas_cumprod[t])
    noisy = ddim.add_noise(pixels, noise, alpha)
    predicted = model.predict_noise(noisy, t)
    return noisy, predicted, ddim.predict_x0(noisy, predicted, alpha)


def _denoising(model, pixels, ids, grid, seed):
    noise_errors, similarities = [], []
    for t in grid:
        noise = image_noise(ids, f"stein_ssim-{t}", seed, pixels.shape[1:]).to(pixels)
        _, predicted, estimate = one_step(model, pixels, noise, t)
        noise_errors.append((predicted - noise).double().square().mean((1, 2, 3)))
        similarities.append(ssim(model.to_images(pixels), model.to_images(estimate)))
    error, similarity = torch.stack(noise_errors, 1).cpu(), torch.stack(similarities, 1)
    scaled = error / (1 - model.alphas_cumprod[grid])
    return {"denoising_noise": error, "denoising_score": scaled, "denoising_ssim": similarity}


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


def save_features(path, features):
    """Write the arrays of `extract` as a compressed .npz, all of it or nothing."""
    path, buffer = Path(path), io.BytesIO()
    np.savez_compressed(buffer, **features)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".writing-{path.name}")
    temporary.write_bytes(buffer.getvalue())
    os.replace(temporary, path)


def load_features(path):
    """The arrays that `save_features` wrote (dict)."""
    with np.load(path) as file:
        return {key: file[key] for key in file}


def features_of(path, model, image_set, batch_size=64, progress=False, **options):
    """`extract` of an ImageSet, kept in the file `path` and read from there the next time.

    options: steps, seed, errors and clip, as for `extract`. MethodError when the file holds features of other images,
    of another model, or with other options.
    """
    if not Path(path).is_file():
        pace = {"batch_size": batch_size, "progress": progress}
        save_features(path, extract(model, image_set.images, image_set.ids, **pace, **options))
    features = load_features(path)
    same_ids = features["ids"].tolist() == list(image_set.ids)
    if not same_ids or str(features["settings"]) != _settings(model, **options):
        raise MethodError(f"{path} holds features of other images or settings: delete it, or choose another path")
    return features


def _settings(model, steps=10, seed=0, errors=ERRORS, clip=True):
    """JSON text of what the features of an image depend on."""
    settings = {"model": model.config, "steps": steps, "seed": seed, "errors": sorted(errors), "clip": clip}
    return json.dumps(settings, sort_keys=True)


# --- readings


@dataclass(frozen=True)
class Reading:
    """One way to read the abstract: from the arrays of `extract` to an anomaly score.

    error: "denoising" or "trajectory"; scale: errors of the "noise", or of the "score" (noise over −√(1 − ᾱ_t)).
    amplification of an error e by the SSIM of the same timestep: "product" e·(1 − SSIM), "ratio" e/max(SSIM, delta),
    "none", and "joint", this project's own: e and SSIM side by side as 2·K features, which only a density can weigh
    against each other. decision: "sum" over the timesteps, which needs no reference, or "typicality", the negative
    log-likelihood of the per-timestep features under a density of the reference's: a Gaussian mixture ("gmm", of
    COMPONENTS components, chosen by held-out likelihood) or a kernel density ("kde", Scott's bandwidth), both on
    standardised features.
    MethodError lists the names there are.
    """

    error: str = "denoising"
    amplification: str = "product"
    decision: str = "sum"
    scale: str = "noise"
    density: str = "gmm"
    delta: float = 0.01

    def __post_init__(self):
        _require("error", self.error, ERRORS)
        _require("amplification", self.amplification, AMPLIFICATIONS)
        _require("decision", self.decision, DECISIONS)
        _require("scale", self.scale, SCALES)
        _require("density", self.density, DENSITIES)
        if self.amplification == "joint" and self.decision == "sum":
            raise MethodError("amplification 'joint' has no sum of errors and similarities; use decision 'typicality'")
        if self.delta <= 0:
            raise MethodError(f"delta must be above 0, not {self.delta}")

    def values(self, features):
        """The amplified error of each image and timestep, float64 [N,K]; "trajectory": [N,K−1]; "joint": twice that."""
        if f"{self.error}_ssim" not in features:
            raise MethodError(f"these features lack the error {self.error!r}: extract them with errors={[self.error]}")
        error, similarity = features[f"{self.error}_{self.scale}"], features[f"{self.error}_ssim"]
        if self.amplification == "product":
            return error * (1 - similarity)
        if self.amplification == "joint":
            return np.concatenate([error, similarity], axis=1)
        return error / np.maximum(similarity, self.delta) if self.amplification == "ratio" else error

    def fit(self, reference, seed=0):
        """The density of the features of normal images (a dict of `extract`), for the decision "typicality"."""
        values = self.values(reference)
        if self.density == "kde":
            return fit_kernel(values)
        return fit_mixture(values, COMPONENTS, FOLDS, seed=seed)

    def scores(self, features, density=None):
        """float32 [N], higher is more anomalous; density: what `fit` gave, for the decision "typicality"."""
        values = self.values(features)
        if self.decision == "sum":
            return values.sum(1).astype(np.float32)
        if density is None:
            raise MethodError("decision 'typicality' needs the density of normal images: give what `fit` returns")
        return atypicality(density, values).astype(np.float32)


def readings(**fixed):
    """Every Reading there is with the fields in `fixed` held, a list; a "sum" appears once, for it has no density."""
    fields = {"error": ERRORS, "amplification": AMPLIFICATIONS, "decision": DECISIONS, "scale": SCALES}
    fields |= {"density": DENSITIES} | {key: (value,) for key, value in fixed.items()}
    chosen = (dict(zip(fields, values, strict=True)) for values in product(*fields.values()))
    return [Reading(**c) for c in chosen if c["decision"] == "typicality" or _is_a_sum(c, fields["density"][0])]


def _is_a_sum(chosen, density):
    return chosen["amplification"] != "joint" and chosen["density"] == density


def _require(what, name, known):
    if name not in known:
        raise MethodError(f"{what} {name!r} is unknown; use one of {list(known)}")


DEFAULTS = {  # by decision: the best of what the abstract allows in the mean over two bases and two sets (`zsad ood`)
    "sum": Reading("denoising", "product", "sum", "score"),
    "typicality": Reading("trajectory", "none", "typicality", "score", "kde"),
}


class SteinSSIM:
    """Method "stein_ssim": one reading as a method, image scores without maps.

    backbone: a `PixelModel`; error, amplification, decision, scale, density, delta: see `Reading`; steps, clip, seed:
    see `extract`. reference: normal images for the decision "typicality", an `ImageSet` or the name of one, whose
    training split (`count` images) is fitted on the first use. "sum" takes none. What is None follows: the decision
    from whether there is a reference, the rest from DEFAULTS of that decision.
    """

    name = "stein_ssim"

    def __init__(
        self,
        backbone,
        error=None,
        amplification=None,
        decision=None,
        scale=None,
        density=None,
        delta=0.01,
        steps=10,
        clip=True,
        reference=None,
        count=500,
        seed=0,
    ):
        decision = decision or ("sum" if reference is None else "typicality")
        _require("decision", decision, DECISIONS)
        given = {"error": error, "amplification": amplification, "scale": scale, "density": density}
        given = {key: value for key, value in given.items() if value is not None}
        self.reading = replace(DEFAULTS[decision], delta=delta, **given)
        if (decision == "typicality") != (reference is not None):
            raise MethodError("decision 'typicality' needs reference=, an image set of normal images; 'sum' takes none")
        ddim_timesteps(steps, len(backbone.alphas_cumprod))
        if backbone.image_size <= 2 * RADIUS:
            raise MethodError(
                f"SSIM needs images above {2 * RADIUS} px; {backbone.name} is for {backbone.image_size} px"
            )
        self.backbone, self.size, self.reference = backbone, backbone.image_size, reference
        self.options = {"steps": steps, "seed": seed, "errors": (self.reading.error,), "clip": clip}
        self.config = {
            "method": self.name,
            "backbone": backbone.config,
            **asdict(self.reading),
            "steps": steps,
            "clip": clip,
            "reference": describe(reference, count),
            "seed": seed,
        }
        self._density = None

    def score(self, images, ids, categories):
        """images [B,3,H,W] in [0,1]; ids: B strings; categories: not used. Gives image [B] and evaluations [B]."""
        features = extract(self.backbone, images, ids, **self.options)
        scores = torch.from_numpy(self.reading.scores(features, self._fitted()))
        return Scores(to_host(scores), details={"evaluations": torch.full((len(ids),), float(self.options["steps"]))})

    def _fitted(self):
        if self._density is None and self.reading.decision == "typicality":
            described = self.config["reference"]
            normal = reference_set(self.reference, described["images"], self.size)
            features = extract(self.backbone, normal.images, list(normal.ids), **self.options)
            self._density = self.reading.fit(features, self.config["seed"])
        return self._density
