"""VLMDiff: an image is noised almost completely and drawn anew by a diffusion model that sees it (WACV 2026).

Mirrors the authors' test-time sampling (`log_images_test` of `sgn.py` with `ddim.py`, which come from DiAD, He et al.,
AAAI 2024) and DIVAD's map and image score. The captions of a vision-language model are the text in training; in testing
the authors use them for COCO-AD only and leave the text empty elsewhere.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch

from zsad_lib import store
from zsad_lib.anomaly.features import FeatureExtractor
from zsad_lib.diffusion import ddim
from zsad_lib.diffusion.guidance import GuidedModel
from zsad_lib.diffusion.noise import image_noise
from zsad_lib.errors import MethodError
from zsad_lib.methods.base import Redrawing, setting
from zsad_lib.settings import NotNegative, Positive

Start = Literal["official", "matched"]
STARTS = get_args(Start)
NORMALISATIONS = {  # (mean, std) of the images that the autoencoder is given
    "symmetric": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def start_levels(
    start: Start = "official", steps: int = 10, start_step: int = 0, T: int = 1000, offset: int = 1
) -> tuple[int, int]:
    """(t_latent, t_denoise): the level the latent is noised to, and the level denoising starts at.

    t_denoise is the timestep of step `start_step` of `steps`: 901 by default. t_latent:

    - "official": the last timestep, 999. The sampler takes this latent for one of t=901, which has less noise: even a
      perfect prediction would give back 0.58 of the clean latent and 0.07 of the noise.
    - "matched": t_denoise itself.

    Steps that do not divide T are as many as asked for; the authors' sampler adds one to 7 and fails with 3.
    """
    if start not in STARTS:
        raise MethodError(f"start {start!r} is unknown; use 'official' or 'matched'")
    ddim.ascending_grid(steps, T, offset)  # before start_step is judged by it
    t_denoise = ddim.denoising_steps(steps, start_step, T, offset)[0][0]
    return (T - 1 if start == "official" else t_denoise), t_denoise


def normalise(images: torch.Tensor, normalisation: str) -> torch.Tensor:
    """What `Backbone.encode` must be given so that its autoencoder sees (images − mean) / std: [B,3,H,W].

    images in [0,1]. "symmetric", the range [-1,1] that Stable Diffusion's autoencoder was trained with, leaves them as
    they are; "imagenet" is what the authors' code does, about [-2.1,2.6].
    """
    mean, std = _scale(images, normalisation)
    return (images - mean) / (2 * std) + 0.5


def denormalise(decoded: torch.Tensor, normalisation: str) -> torch.Tensor:
    """Undo `normalise` for what the autoencoder decoded without clamping: images [B,3,H,W], clamped to [0,1]."""
    mean, std = _scale(decoded, normalisation)
    return ((decoded - 0.5) * (2 * std) + mean).clamp(0, 1)


def _scale(images, normalisation):
    return (images.new_tensor(values).view(1, 3, 1, 1) for values in NORMALISATIONS[normalisation])


def identity(captions: Any) -> dict | None:
    """JSON-able: which captions these are."""
    if captions is None:
        return None
    if isinstance(captions, Mapping):
        return {"images": len(captions), "sha256": store.fingerprint(sorted(captions.items()))[:16]}
    return {"captioner": getattr(captions, "config", None) or getattr(captions, "name", None)}


@dataclass(kw_only=True)
class VLMDiff(Redrawing):
    """Draw an image anew from noise, guided by the image itself, and compare the features of the two."""

    name = "vlmdiff"

    backbone: GuidedModel
    features: FeatureExtractor
    start: Start = "official"  # which latent meets which level: `start_levels`
    steps: Positive = 10  # DDIM steps; the last one ends at level 0
    start_step: int = 0  # steps left out; the paper leaves out none
    # against the empty text, with the same hint in both halves; without captions it has no effect
    guidance_scale: NotNegative = 9.0
    captions: Any = setting(None, identity)  # None (empty text), {image id: caption}, or a captioner
    guidance_mode: Literal["only mid", "all"] | None = setting(None)  # default: as the guide was trained
    normalisation: Literal["symmetric", "imagenet"] = "symmetric"  # as the model was trained: `normalise`
    posterior: Literal["sample", "mode"] = "sample"  # of the autoencoder; the authors sample
    seed: int = 0  # of both noises, drawn for each image from its id
    callback: Callable | None = setting(None)  # (stage, t, latent): "noise" once, "denoise" after each step
    t_latent: int = field(init=False)  # the two levels that follow: `start_levels`
    t_denoise: int = field(init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.backbone, GuidedModel):
            kind = type(self.backbone).__name__
            raise MethodError(f"vlmdiff needs a model with semantic guidance (load_guided), not a {kind}")
        super().__post_init__()
        self.backbone = replace(self.backbone, mode=self.guidance_mode or self.backbone.mode)
        self.latent_model = self.backbone.backbone
        self.alphas_cumprod, self.offset = self.latent_model.alphas_cumprod, self.latent_model.steps_offset
        levels = (self.steps, self.start_step, len(self.alphas_cumprod), self.offset)
        self.t_latent, self.t_denoise = start_levels(self.start, *levels)
        speaks = callable(self.captions) and (hasattr(self.captions, "name") or hasattr(self.captions, "config"))
        if not (self.captions is None or isinstance(self.captions, Mapping) or speaks):
            raise MethodError(
                "captions must be None, a mapping from image ids to captions, or a captioner with a name, "
                f"not {self.captions!r:.80}"
            )
        self._empty = None

    @property
    def size(self) -> int:
        return self.backbone.backbone.image_size

    def read_captions(self, images: torch.Tensor, ids: list[str]) -> list[str]:
        """The caption of each image."""
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

    def predictor(self, images: torch.Tensor, ids: list[str]) -> Callable:
        """The guided noise prediction for these images, a function (z, t) -> eps [B,C,h,w]."""
        guided = self.backbone.condition_on(images)
        if self._empty is None:
            self._empty = self.latent_model.embed([""])
        uncond = self._empty.expand(len(ids), -1, -1)
        if self.captions is None:
            return lambda z, t: guided.predict_noise(z, t, uncond)
        cond = self.latent_model.embed(self.read_captions(images, ids))
        return lambda z, t: guided.predict_noise(z, t, cond, uncond, self.guidance_scale)

    @torch.no_grad()
    def reconstruct(
        self, images: torch.Tensor, ids: list[str], categories: list[str] | None = None
    ) -> tuple[torch.Tensor, ...]:
        """As `Redrawing.reconstruct`; the categories are not used."""
        model, noise = self.latent_model, None
        shape = (model.latent_shape[0], *(side // model.scale_factor for side in images.shape[-2:]))
        if self.posterior == "sample":
            noise = image_noise(ids, "vlmdiff-posterior", self.seed, shape)
        clean = model.encode(normalise(images, self.normalisation), noise)
        noise = image_noise(ids, "vlmdiff-start", self.seed, shape).to(clean)
        latent = ddim.add_noise(clean, noise, self.alphas_cumprod[self.t_latent])
        if self.callback:
            self.callback("noise", self.t_latent, latent)
        report = self.callback and (lambda t, z: self.callback("denoise", t, z))
        predict, schedule = self.predictor(images, ids), (self.alphas_cumprod, self.steps, self.start_step, self.offset)
        drawn = ddim.denoise(predict, latent, *schedule, callback=report, final=0)
        return denormalise(model.decode(drawn, clamp=False), self.normalisation), latent
