"""VLMDiff: an image is noised almost completely and drawn anew by a diffusion model that sees it (WACV 2026).

Mirrors the authors' test-time sampling (`log_images_test` of `sgn.py` with `ddim.py`, which come from DiAD, He et al.,
AAAI 2024) and DIVAD's map and image score. The captions of a vision-language model are the text in training; in testing
the authors use them for COCO-AD only and leave the text empty elsewhere.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace

import torch

from zsad_lib.anomaly import maps
from zsad_lib.diffusion import ddim
from zsad_lib.diffusion.guidance import GuidedModel, check_mode
from zsad_lib.diffusion.noise import image_noise
from zsad_lib.errors import MethodError, ModelError
from zsad_lib.methods.base import check_batch, redrawn_scores

STARTS = ("official", "matched")
NORMALISATIONS = {  # (mean, std) of the images that the autoencoder is given
    "symmetric": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def start_levels(start="official", steps=10, start_step=0, T=1000, offset=1):
    """The pair (t_latent, t_denoise): the level the latent is noised to, and the level denoising starts at.

    t_denoise is the timestep of step `start_step` of `steps`: 901 by default. t_latent:

    - "official": the last timestep, 999. The sampler takes this latent for one of t=901, which has less noise: even a
      perfect prediction would give back 0.58 of the clean latent and 0.07 of the noise.
    - "matched": t_denoise itself.

    `steps` that do not divide T are as many as asked for; the authors' sampler adds one to 7 and fails with 3.
    MethodError when they do not fit into T.
    """
    if start not in STARTS:
        raise MethodError(f"start {start!r} is unknown; use 'official' or 'matched'")
    try:
        ddim.ascending_grid(steps, T, offset)  # before start_step is judged by it
        t_denoise = ddim.denoising_steps(steps, start_step, T, offset)[0][0]
    except ValueError as error:
        raise MethodError(str(error)) from error
    return (T - 1 if start == "official" else t_denoise), t_denoise


def normalise(images, normalisation):
    """What `Backbone.encode` must be given so that its autoencoder sees (images − mean) / std: [B,3,H,W].

    images in [0,1]. "symmetric", the range [-1,1] that Stable Diffusion's autoencoder was trained with, leaves them as
    they are; "imagenet" is what the authors' code does, about [-2.1,2.6].
    """
    mean, std = _scale(images, normalisation)
    return (images - mean) / (2 * std) + 0.5


def denormalise(decoded, normalisation):
    """Undo `normalise` for what the autoencoder decoded without clamping: images [B,3,H,W], clamped to [0,1]."""
    mean, std = _scale(decoded, normalisation)
    return ((decoded - 0.5) * (2 * std) + mean).clamp(0, 1)


def _scale(images, normalisation):
    return (images.new_tensor(values).view(1, 3, 1, 1) for values in NORMALISATIONS[normalisation])


class VLMDiff:
    """Draw an image anew from noise, guided by the image itself, and compare the features of the two.

    backbone: a `GuidedModel`; features: a `FeatureExtractor`. start, steps, start_step: see `start_levels`; the last
    step ends at level 0 of the schedule. guidance_scale: against the empty text, with the same hint in both halves (1
    halves the cost). captions: None, empty text for every image; a mapping {image id: caption}; or a captioner, a
    callable of images [B,3,H,W] in [0,1] that gives B captions, with a `name` or a JSON-able `config` for the record.
    Without captions both halves are equal and guidance_scale has no effect, so only one is computed. guidance_mode:
    "only mid" or "all" (default: as the guide was trained). normalisation: see `normalise`; choose the one that the
    model was trained with. The hint is scaled as the guide's own configuration says. posterior: "sample" of the
    autoencoder, as the authors do, or its "mode"; both noises are drawn for each image from its id and `seed`.
    map_size, sigma, pool, mode: as for DIVAD. callback(stage, t, latent): stage "noise" once, then "denoise" after
    each step. MethodError on values that cannot work.
    """

    name = "vlmdiff"

    def __init__(
        self,
        backbone,
        features,
        start="official",
        steps=10,
        start_step=0,
        guidance_scale=9.0,
        captions=None,
        guidance_mode=None,
        normalisation="symmetric",
        posterior="sample",
        seed=0,
        map_size=None,
        sigma=5,
        pool=8,
        mode="sum",
        callback=None,
    ):
        if not isinstance(backbone, GuidedModel):
            raise MethodError(
                f"vlmdiff needs a model with semantic guidance (load_guided), not a {type(backbone).__name__}"
            )
        self.model = replace(backbone, mode=guidance_mode or backbone.mode)
        self.backbone, self.features, self.callback = backbone.backbone, features, callback
        self.size, self.captions = self.backbone.image_size, captions
        map_size = map_size or min(256, self.size)
        self.alphas_cumprod, self.offset = self.backbone.alphas_cumprod, self.backbone.steps_offset
        T = len(self.alphas_cumprod)
        self.t_latent, self.t_denoise = start_levels(start, steps, start_step, T, self.offset)
        if posterior not in ("mode", "sample"):
            raise MethodError(f"posterior {posterior!r} is unknown; use 'mode' or 'sample'")
        if normalisation not in NORMALISATIONS:
            raise MethodError(f"normalisation {normalisation!r} is unknown; use one of {list(NORMALISATIONS)}")
        try:
            check_mode(self.model.mode)
            maps.check_comparison(map_size, sigma, pool, mode)
        except (ModelError, ValueError) as error:
            raise MethodError(str(error)) from error
        self.config = {
            "method": self.name,
            "backbone": self.model.config,
            "features": features.config,
            "start": start,
            "steps": steps,
            "start_step": start_step,
            "t_latent": self.t_latent,
            "t_denoise": self.t_denoise,
            "guidance_scale": float(guidance_scale),
            "captions": _identity(captions),
            "normalisation": normalisation,
            "posterior": posterior,
            "seed": seed,
            "map_size": map_size,
            "sigma": float(sigma),
            "pool": pool,
            "mode": mode,
        }
        self._empty = None

    def read_captions(self, images, ids):
        """The caption of each image, a list of B strings. MethodError names the ids that have none."""
        if self.captions is None:
            return [""] * len(ids)
        if isinstance(self.captions, Mapping):
            missing = [i for i in ids if not isinstance(self.captions.get(i), str)]
            if missing:
                raise MethodError(f"no caption for {len(missing)} of {len(ids)} images: {', '.join(missing[:5])}")
            return [self.captions[i] for i in ids]
        said = list(self.captions(images))
        if len(said) != len(ids):
            raise MethodError(f"the captioner gave {len(said)} captions for {len(ids)} images")
        return said

    def predictor(self, images, ids):
        """The guided noise prediction for these images, a function (z, t) -> eps [B,C,h,w]."""
        seeing, scale = self.model.seeing(images), self.config["guidance_scale"]
        if self._empty is None:
            self._empty = self.backbone.embed([""])
        uncond = self._empty.expand(len(ids), -1, -1)
        if self.captions is None:
            return lambda z, t: seeing.predict_noise(z, t, uncond)
        cond = self.backbone.embed(self.read_captions(images, ids))
        return lambda z, t: seeing.predict_noise(z, t, cond, uncond, scale)

    @torch.no_grad()
    def reconstruct(self, images, ids):
        """(reconstructions [B,3,H,W] in [0,1], noised latents [B,C,h,w] that denoising started from).

        Both on the backbone's device.
        """
        config, backbone = self.config, self.backbone
        shape = (backbone.latent_shape[0], *(side // backbone.scale_factor for side in images.shape[-2:]))
        noise = None
        if config["posterior"] == "sample":
            noise = image_noise(ids, "vlmdiff-posterior", config["seed"], shape)
        clean = backbone.encode(normalise(images, config["normalisation"]), noise)
        noise = image_noise(ids, "vlmdiff-start", config["seed"], shape).to(clean)
        latent = ddim.add_noise(clean, noise, self.alphas_cumprod[self.t_latent])
        if self.callback:
            self.callback("noise", self.t_latent, latent)
        drawn = ddim.denoise(
            self.predictor(images, ids),
            latent,
            self.alphas_cumprod,
            config["steps"],
            config["start_step"],
            self.offset,
            callback=self.callback and (lambda t, z: self.callback("denoise", t, z)),
            final=0,
        )
        return denormalise(backbone.decode(drawn, clamp=False), config["normalisation"]), latent

    def score(self, images, ids, categories):
        """images [B,3,H,W] in [0,1] (square: the features stretch any other); ids, categories: B strings each.

        Gives image [B]; map [B,map_size,map_size], in [0, 2·layers] before the blur for mode "sum"; details:
        reconstruction [B,3,H,W], latent [B,C,h,w] (the one denoising started from), evaluations [B] (samples that went
        through the U-Net for each image). The categories are not used.
        """
        check_batch(images, ids, categories)
        before = self.backbone.evaluations
        with torch.inference_mode():
            reconstruction, latent = self.reconstruct(images, ids)
            settings = [self.config[key] for key in ("map_size", "sigma", "pool", "mode")]
            distance, image = maps.compare(self.features(images), self.features(reconstruction), *settings)
        evaluations = (self.backbone.evaluations - before) / len(images)
        return redrawn_scores(image, distance, reconstruction, latent, evaluations)


def _identity(captions):
    """JSON-able: which captions these are. MethodError unless they are None, a mapping or a captioner."""
    if captions is None:
        return None
    if isinstance(captions, Mapping):
        text = json.dumps(sorted(captions.items()))
        return {"images": len(captions), "sha256": hashlib.sha256(text.encode()).hexdigest()[:16]}
    known = getattr(captions, "config", None) or getattr(captions, "name", None)
    if not callable(captions) or known is None:
        raise MethodError(
            "captions must be None, a mapping from image ids to captions, or a captioner with a name, "
            f"not {captions!r:.80}"
        )
    return {"captioner": known}
