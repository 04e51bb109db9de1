"""DIVAD: training-free anomaly detection by DDIM inversion and denoising (arXiv 2601.08022).

Mirrors the authors' `ddim_inversion.py` (reconstruction) and `test.py` (map, image score).
"""

import torch

from zsad_lib.anomaly import maps
from zsad_lib.diffusion import ddim
from zsad_lib.diffusion.noise import image_noise
from zsad_lib.errors import MethodError
from zsad_lib.methods.base import check_batch, redrawn_scores

PROMPT = "An image of a {category}"


def start_levels(
    start="official",
    inversion_steps=50,
    inference_steps=100,
    start_step=40,
    T=1000,
    offset=1,
    t_latent=None,
    t_denoise=None,
):
    """The pair (t_latent, t_denoise): the level the latent is inverted to, and the level denoising starts at.

    t_denoise is the timestep of denoising step `start_step` of `inference_steps`. t_latent, on the inversion
    grid:

    - "official": the authors' `inverted_latents[-(start_step + 1)]`. With their 50/100/40 that is t=161
      against t=591: the latent is treated as far noisier than it is, which scales up and smooths what comes
      out.
    - "matched": the level of denoising's start itself; when the two grids do not share it, the nearest
      inversion level (of two equally near ones the lower).

    An explicit `t_latent` or `t_denoise` takes the place of its value; t_latent may also be the grid's lowest
    level (1 for Stable Diffusion), where nothing is inverted. MethodError lists the allowed levels.
    """
    if start not in ("official", "matched"):
        raise MethodError(f"start {start!r} is unknown; use 'official' or 'matched'")
    try:
        clean = ddim.ascending_grid(inversion_steps, T, offset)[0]
        latent_levels = [clean, *(t for _, t in ddim.inversion_steps(inversion_steps, T, offset))]
        denoise_levels = [t for t, _ in ddim.denoising_steps(inference_steps, 0, T, offset)]
        if t_denoise is None:
            t_denoise = ddim.denoising_steps(inference_steps, start_step, T, offset)[0][0]
    except ValueError as error:
        raise MethodError(str(error)) from error
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


class DIVAD:
    """Reconstruct an image through a half-noised latent and compare the features of the two.

    backbone: a `Backbone`; features: a `FeatureExtractor`. Defaults are the authors' setting. start,
    inversion_steps, inference_steps, start_step, t_latent, t_denoise: see `start_levels`. guidance_scale
    applies to inversion and denoising alike (1 halves the cost). prompt: a template with {category}.
    posterior: "mode" of the VAE, or "sample" with noise drawn for each image from its id and `seed` (what the
    authors do, with one global generator). The map is [map_size, map_size] (default: the backbone's image
    size, at most 256), the layers combined by `mode` ("sum" or "product"), blurred with `sigma` pixels, and
    pooled eight times by `pool` pixels for the image score: sigma 5 and pool 8 are meant for 256 px and do
    not scale by themselves. callback(stage, t, latent) after each network call, with stage "invert" or
    "denoise". MethodError on values that cannot work.
    """

    name = "divad"

    def __init__(
        self,
        backbone,
        features,
        start="official",
        inversion_steps=50,
        inference_steps=100,
        start_step=40,
        guidance_scale=3.5,
        prompt=PROMPT,
        posterior="mode",
        seed=0,
        map_size=None,
        sigma=5,
        pool=8,
        mode="sum",
        t_latent=None,
        t_denoise=None,
        callback=None,
    ):
        self.backbone, self.features, self.callback = backbone, features, callback
        self.alphas_cumprod = backbone.alphas_cumprod
        self.t_latent, self.t_denoise = start_levels(
            start,
            inversion_steps,
            inference_steps,
            start_step,
            len(self.alphas_cumprod),
            backbone.steps_offset,
            t_latent,
            t_denoise,
        )
        self.size = backbone.image_size
        map_size = map_size or min(256, self.size)
        if posterior not in ("mode", "sample"):
            raise MethodError(f"posterior {posterior!r} is unknown; use 'mode' or 'sample'")
        try:
            prompt.format(category="")
        except (KeyError, IndexError, ValueError) as error:
            raise MethodError(f"prompt {prompt!r} is no template; its only field is {{category}}") from error
        try:
            maps.check_comparison(map_size, sigma, pool, mode)
        except ValueError as error:
            raise MethodError(str(error)) from error
        self.config = {
            "method": self.name,
            "backbone": backbone.config,
            "features": features.config,
            "start": start,
            "inversion_steps": inversion_steps,
            "inference_steps": inference_steps,
            "start_step": start_step,
            "t_latent": self.t_latent,
            "t_denoise": self.t_denoise,
            "guidance_scale": float(guidance_scale),
            "prompt": prompt,
            "posterior": posterior,
            "seed": seed,
            "map_size": map_size,
            "sigma": float(sigma),
            "pool": pool,
            "mode": mode,
        }
        self._embeddings = {}

    def embed(self, categories):
        """Text embeddings [B,L,D] of the prompt of each category; each distinct prompt is encoded once.

        A folder name such as "metal_nut" is read as words: "metal nut".
        """
        words = (category.replace("_", " ") for category in categories)
        prompts = [self.config["prompt"].format(category=name).strip() for name in words]
        return torch.stack([self._embed(prompt) for prompt in prompts])

    def _embed(self, prompt):
        if prompt not in self._embeddings:
            self._embeddings[prompt] = self.backbone.embed([prompt])[0]
        return self._embeddings[prompt]

    def predictor(self, categories):
        """The guided noise prediction for a batch of these categories: a function (z, t) -> eps."""
        cond, scale = self.embed(categories), self.config["guidance_scale"]
        uncond = self._embed("").expand_as(cond)
        return lambda z, t: self.backbone.predict_noise(z, t, cond, uncond, scale)

    @torch.no_grad()
    def reconstruct(self, images, ids, categories):
        """(reconstructions [B,3,H,W] in [0,1], latents [B,C,h,w] that denoising started from).

        Both on the backbone's device. Inverts no further than t_latent and leaves out the last, idle
        denoising step.
        """
        backbone, config, offset = self.backbone, self.config, self.backbone.steps_offset
        noise = None
        if config["posterior"] == "sample":
            shape = (backbone.latent_shape[0], *(n // backbone.scale_factor for n in images.shape[-2:]))
            noise = image_noise(ids, "divad-posterior", config["seed"], shape)
        latent = backbone.encode(images, noise)
        predict = self.predictor(categories)
        if self.t_latent > offset:
            path = ddim.invert(
                predict,
                latent,
                self.alphas_cumprod,
                config["inversion_steps"],
                stop=self.t_latent,
                offset=offset,
                callback=self._report("invert"),
            )
            latent = path[-1][1]
        grid = ddim.ascending_grid(config["inference_steps"], len(self.alphas_cumprod), offset)
        clean = ddim.denoise(
            predict,
            latent,
            self.alphas_cumprod,
            config["inference_steps"],
            start_step=len(grid) - 1 - grid.index(self.t_denoise),
            offset=offset,
            callback=self._report("denoise"),
        )
        return backbone.decode(clean), latent

    def _report(self, stage):
        return self.callback and (lambda t, latent: self.callback(stage, t, latent))

    def score(self, images, ids, categories):
        """images [B,3,H,W] in [0,1] (square: the features stretch any other); ids, categories: B strings
        each.

        Gives image [B]; map [B,map_size,map_size], in [0, 2·layers] before the blur for mode "sum";
        details: reconstruction [B,3,H,W], latent [B,C,h,w] (the one denoising started from), evaluations [B]
        (samples that went through the U-Net for each image).
        """
        check_batch(images, ids, categories)
        before = self.backbone.evaluations
        with torch.inference_mode():
            reconstruction, latent = self.reconstruct(images, ids, categories)
            settings = [self.config[key] for key in ("map_size", "sigma", "pool", "mode")]
            distance, image = maps.compare(self.features(images), self.features(reconstruction), *settings)
        evaluations = (self.backbone.evaluations - before) / len(images)
        return redrawn_scores(image, distance, reconstruction, latent, evaluations)
