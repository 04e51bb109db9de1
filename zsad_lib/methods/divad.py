"""DIVAD: training-free anomaly detection by DDIM inversion and denoising (arXiv 2601.08022).

Mirrors the authors' `ddim_inversion.py` (reconstruction) and `test.py` (map, image score).
"""

from collections.abc import Callable
from dataclasses import dataclass
from string import Formatter
from typing import Literal

import torch

from zsad_lib.anomaly.features import FeatureExtractor
from zsad_lib.diffusion import ddim
from zsad_lib.diffusion.latent import Backbone
from zsad_lib.diffusion.noise import image_noise
from zsad_lib.errors import MethodError
from zsad_lib.methods.base import Redrawing, setting
from zsad_lib.settings import NotNegative, Positive

PROMPT = "An image of a {category}"
Start = Literal["official", "matched"]


def start_levels(
    start: Start = "official",
    inversion_steps: int = 50,
    inference_steps: int = 100,
    start_step: int = 40,
    T: int = 1000,
    offset: int = 1,
    t_latent: int | None = None,
    t_denoise: int | None = None,
) -> tuple[int, int]:
    """(t_latent, t_denoise): the level the latent is inverted to, and the level denoising starts at.

    t_denoise is the timestep of denoising step `start_step` of `inference_steps`. t_latent, on the inversion grid:

    - "official": the authors' `inverted_latents[-(start_step + 1)]`. With their 50/100/40 that is t=161 against t=591:
      the latent is treated as far noisier than it is, which scales up and smooths what comes out.
    - "matched": the level of denoising's start itself, or the nearest inversion level (of two equally near the lower).

    A given t_latent or t_denoise takes the place of its value; t_latent may also be the grid's lowest level (1 for
    Stable Diffusion), where nothing is inverted.
    """
    if start not in ("official", "matched"):
        raise MethodError(f"start {start!r} is unknown; use 'official' or 'matched'")
    clean = ddim.ascending_grid(inversion_steps, T, offset)[0]
    latent_levels = [clean, *(t for _, t in ddim.inversion_steps(inversion_steps, T, offset))]
    denoise_levels = [t for t, _ in ddim.denoising_steps(inference_steps, 0, T, offset)]
    if t_denoise is None:
        t_denoise = ddim.denoising_steps(inference_steps, start_step, T, offset)[0][0]
    if t_denoise not in denoise_levels:
        raise MethodError(f"t_denoise={t_denoise} is no level of {inference_steps} steps: {denoise_levels}")
    if t_latent is None and start == "matched":
        t_latent = min(latent_levels, key=lambda t: (abs(t - t_denoise), t))
    if t_latent is None:
        inverted = latent_levels[1:]
        if not 0 <= start_step < len(inverted):
            raise MethodError(
                f"start='official' with {inversion_steps} inversion steps needs a start_step of 0 to "
                f"{len(inverted) - 1}, not {start_step}; use more inversion steps or start='matched'"
            )
        t_latent = inverted[-(start_step + 1)]
    if t_latent not in latent_levels:
        raise MethodError(f"t_latent={t_latent} is no level of {inversion_steps} inversion steps: {latent_levels}")
    return t_latent, t_denoise


@dataclass(kw_only=True)
class DIVAD(Redrawing):
    """Reconstruct an image through a half-noised latent and compare the features of the two. Defaults: the authors'."""

    name = "divad"

    backbone: Backbone
    features: FeatureExtractor
    start: Start = "official"  # which latent meets which level: `start_levels`
    inversion_steps: Positive = 50  # up to T, of the grid that the latent climbs
    inference_steps: Positive = 100  # up to T, of the grid that denoising descends
    start_step: int = 40  # denoising steps left out: ss of the official code
    guidance_scale: NotNegative = 3.5  # of inversion and denoising alike; 1 halves the cost
    prompt: str = PROMPT  # a template with {category}
    posterior: Literal["mode", "sample"] = "mode"  # of the VAE; the authors sample, with one global generator
    seed: int = 0  # of that sample, drawn for each image from its id
    t_latent: int | None = None  # in place of what `start` gives
    t_denoise: int | None = None  # likewise; both must be levels of their grids
    callback: Callable | None = setting(None)  # (stage, t, latent) after each network call: "invert", "denoise"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.alphas_cumprod, offset = self.backbone.alphas_cumprod, self.backbone.steps_offset
        levels = (self.inversion_steps, self.inference_steps, self.start_step, len(self.alphas_cumprod), offset)
        self.t_latent, self.t_denoise = start_levels(self.start, *levels, self.t_latent, self.t_denoise)
        try:
            parts = {part[1:] for part in Formatter().parse(self.prompt) if part[1] is not None}
        except ValueError:
            parts = {self.prompt}
        if parts - {("category", "", None)}:  # a width of millions would fill the memory
            raise MethodError(f"prompt {self.prompt!r:.200} is no template; its only field is {{category}}")
        self._embeddings: dict[str, torch.Tensor] = {}

    def embed(self, categories: list[str]) -> torch.Tensor:
        """Text embeddings [B,L,D] of the prompts of B categories; "metal_nut" is read as "metal nut"."""
        words = (category.replace("_", " ") for category in categories)
        return torch.stack([self._embed(self.prompt.format(category=name).strip()) for name in words])

    def _embed(self, prompt):
        if prompt not in self._embeddings:
            self._embeddings[prompt] = self.backbone.embed([prompt])[0]
        return self._embeddings[prompt]

    def predictor(self, categories: list[str]) -> Callable:
        """The guided noise prediction for a batch of these categories: a function (z, t) -> eps."""
        cond = self.embed(categories)
        uncond = self._embed("").expand_as(cond)
        return lambda z, t: self.backbone.predict_noise(z, t, cond, uncond, self.guidance_scale)

    @torch.no_grad()
    def reconstruct(self, images: torch.Tensor, ids: list[str], categories: list[str]) -> tuple[torch.Tensor, ...]:
        """As `Redrawing.reconstruct`; inverts no further than t_latent and leaves out the last, idle step."""
        backbone, alphas, offset, noise = self.backbone, self.alphas_cumprod, self.backbone.steps_offset, None
        if self.posterior == "sample":
            shape = (backbone.latent_shape[0], *(n // backbone.scale_factor for n in images.shape[-2:]))
            noise = image_noise(ids, "divad-posterior", self.seed, shape)
        latent, predict = backbone.encode(images, noise), self.predictor(categories)
        if self.t_latent > offset:
            report = self._report("invert")
            latent = ddim.invert(predict, latent, alphas, self.inversion_steps, self.t_latent, offset, report)[-1][1]
        grid = ddim.ascending_grid(self.inference_steps, len(alphas), offset)
        skipped, report = len(grid) - 1 - grid.index(self.t_denoise), self._report("denoise")
        clean = ddim.denoise(predict, latent, alphas, self.inference_steps, skipped, offset, report)
        return backbone.decode(clean), latent

    def _report(self, stage):
        return self.callback and (lambda t, latent: self.callback(stage, t, latent))
