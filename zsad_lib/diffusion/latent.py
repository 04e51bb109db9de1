"""Latent diffusion of the Stable Diffusion kind: a U-Net, its autoencoder, its text encoder and a noise schedule."""

import hashlib
import json
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zsad_lib import store
from zsad_lib.diffusion.loading import (
    MAX_TIMESTEPS,
    Location,
    check_control,
    configuration,
    fetch,
    fingerprint,
    locate,
    pick_device,
    pick_dtype,
    read_scheduler,
    read_weights,
    reinitialised,
)
from zsad_lib.diffusion.noise import NoisePredictor
from zsad_lib.errors import ModelError

PIPELINE_FILES = (
    "model_index.json",
    "vae/config.json",
    "unet/config.json",
    "text_encoder/config.json",
    "tokenizer/tokenizer_config.json",
    "scheduler/scheduler_config.json",
)
TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))  # the ones or the others
EXTENSIONS = ("rebuilt", "continued")  # readings of a schedule of another length


@dataclass
class Backbone(NoisePredictor):
    """A text-conditional latent diffusion model.

    Images are float32 RGB [B,3,H,W] in [0,1], H and W multiples of `scale_factor`; latents float32 [B,C,h,w], scaled by
    the VAE's scaling factor. The VAE, easily overflown in half precision, stays in float32.
    """

    vae: Any
    unet: Any
    text_encoder: Any
    tokenizer: Any  # None where text comes embedded
    scheduler: Any  # DDIMScheduler: only its schedule and configuration are used
    name: str
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32  # of the U-Net and the text encoder
    evaluations: int = 0  # samples that went through the U-Net so far
    control: str | None = None  # what is random: "unet", or "all" (U-Net, VAE and text encoder)

    def __post_init__(self) -> None:
        super().__post_init__()
        unet, vae, text = self.unet.config, self.vae.config, self.text_encoder.config
        if not unet.in_channels == unet.out_channels == vae.latent_channels:
            raise ModelError(
                f"{self.name}: the U-Net has {unet.in_channels} channels in and {unet.out_channels} out, the "
                f"VAE has {vae.latent_channels}; inpainting and image-conditioned U-Nets are not supported"
            )
        if unet.cross_attention_dim != text.hidden_size:
            raise ModelError(
                f"{self.name}: the U-Net attends to {unet.cross_attention_dim} text channels, the text "
                f"encoder has {text.hidden_size}; these parts are not of one model (SDXL is not supported)"
            )
        if self.tokenizer is not None and len(self.tokenizer) > text.vocab_size:
            raise ModelError(
                f"{self.name}: the tokenizer has {len(self.tokenizer)} tokens, its encoder {text.vocab_size}"
            )
        if not (type(vae.scaling_factor) in (int, float) and 0 < vae.scaling_factor < math.inf):
            raise ModelError(f"{self.name}: the VAE has a scaling_factor of {vae.scaling_factor!r}, not above 0")

    @property
    def alphas_cumprod(self) -> Tensor:
        """ᾱ_t of the T training timesteps, float32 [T], on the model's device."""
        return self.scheduler.alphas_cumprod.to(self.device, torch.float32)

    @property
    def steps_offset(self) -> int:
        """The first timestep of a sampling grid: 1 for Stable Diffusion."""
        return self.scheduler.config.steps_offset

    @property
    def scale_factor(self) -> int:
        """Pixels to a latent position, along each side: 8 for Stable Diffusion."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the latents the U-Net was trained on."""
        size = self.unet.config.sample_size
        return (self.unet.config.in_channels, *((size, size) if isinstance(size, int) else size))

    @property
    def image_size(self) -> int:
        """The image height in pixels that `latent_shape` stands for."""
        return self.latent_shape[1] * self.scale_factor

    @property
    def config(self) -> dict:
        """JSON-able: what of this model changes a method's numbers, fingerprints of schedule and weights included."""
        return {
            "name": self.label,
            "dtype": str(self.dtype).removeprefix("torch."),
            "prediction_type": self.prediction_type,
            "schedule": hashlib.sha256(self.scheduler.alphas_cumprod.numpy().round(6).tobytes()).hexdigest()[:8],
            "weights": fingerprint(self.vae, self.unet, self.text_encoder),
            "configuration": configuration(self.vae, self.unet, self.text_encoder),
            "betas": self.betas,
            "steps_offset": self.steps_offset,
            "tokenizer": _tokenizer_digest(self.tokenizer),
        }

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The VAE's posterior of images [B,3,H,W] in [0,1]: (mean, std), each [B,C,h,w], not scaled."""
        height, width = images.shape[-2:]
        if height % self.scale_factor or width % self.scale_factor:
            raise ModelError(f"images of {height}x{width} px: both sides must be multiples of {self.scale_factor}")
        posterior = self.vae.encode(2 * images.to(self.device, torch.float32) - 1).latent_dist
        return posterior.mean, posterior.std

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Images [B,3,H,W] in [0,1] -> scaled latents [B,C,h,w]: the posterior's mode or mean + std·noise."""
        mean, std = self.posterior(images)
        latents = mean if noise is None else mean + std * noise.to(mean)
        return self.vae.config.scaling_factor * latents

    def decode(self, latents: Tensor, clamp: bool = True) -> Tensor:
        """Scaled latents [B,C,h,w] -> images [B,3,H,W], clamped to [0,1] unless `clamp` is False."""
        latents = latents.to(self.device, torch.float32) / self.vae.config.scaling_factor
        images = self.vae.decode(latents).sample / 2 + 0.5
        return images.clamp(0, 1) if clamp else images

    def embed(self, prompts: list[str]) -> Tensor:
        """Prompts (list of B strings) -> text embeddings [B,L,D]; warns when a prompt exceeds L tokens."""
        length = min(self.tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings)
        for prompt, ids in zip(prompts, self.tokenizer(prompts).input_ids, strict=True):
            if len(ids) > length:
                warnings.warn(f"prompt cut from {len(ids)} to {length} tokens: {prompt!r}", stacklevel=2)
        tokens = self.tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return self.text_encoder(tokens.input_ids.to(self.device))[0]

    def predict_noise(
        self,
        z: Tensor,  # [B,C,h,w]
        t: int | Tensor,  # one timestep, or one for each latent [B]
        cond: Tensor,  # text [B,L,D]
        uncond: Tensor | None = None,
        guidance_scale: float = 1.0,
        network: Callable | None = None,  # (z, timesteps, text) -> [B,C,h,w] in the U-Net's place (guidance.py)
    ) -> Tensor:
        """ε_θ(z, t, c), float32 [B,C,h,w], with classifier-free guidance uncond + guidance_scale·(cond − uncond).

        Both halves go through the U-Net as one batch of 2B; without `uncond`, or at a scale of 1, only `cond` does.
        """
        guided = uncond is not None and guidance_scale != 1
        times = torch.as_tensor(t, dtype=torch.long, device=self.device).expand(len(z))
        inputs, text, timesteps = z, cond, times
        if guided:
            inputs, text, timesteps = torch.cat([z, z]), torch.cat([uncond, cond]), torch.cat([times, times])
        self.evaluations += len(inputs)
        inputs, text = (tensor.to(self.device, self.dtype) for tensor in (inputs, text))
        network = network or (lambda *arguments: self.unet(*arguments).sample)
        out = network(inputs, timesteps, text).float()
        if guided:
            without, with_text = out.chunk(2)
            out = without + guidance_scale * (with_text - without)
        return self._noise(out, z, times)


def _tokenizer_digest(tokenizer):
    """16 hex digits of the vocabulary, its merges, the special tokens and the length, without what a call leaves."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    return store.fingerprint([rules, tokenizer.special_tokens_map, tokenizer.model_max_length])[:16]


def _read_tokenizer(where: Location, cls: Any) -> Any:
    from transformers.utils import cached_file

    def there(file: str) -> bool:
        try:
            return bool(fetch(where, "tokenizer", cached_file, file))
        except ModelError:
            return False

    if not any(all(map(there, files)) for files in TOKENIZER_FILES):  # the library would make one without words
        raise ModelError(f"{where.source}/tokenizer lacks tokenizer.json, and vocab.json with merges.txt")
    return fetch(where, "tokenizer", cls.from_pretrained)


def load_backbone(
    name_or_path: str | Path,  # a folder, a checkpoint of data_manifest.yaml or a hub id
    device: str | torch.device = "auto",  # CUDA when there is one
    dtype: str | torch.dtype = "auto",  # float16 on CUDA, else float32
    random_weights: str | None = None,  # "unet" or "all": those parts freshly initialised, always alike: a control
) -> Backbone:
    """Read a StableDiffusionPipeline directory; whatever scheduler it has becomes a DDIMScheduler on its schedule."""
    check_control(random_weights)
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    device = pick_device(device)
    dtype = pick_dtype(dtype, device)
    where = locate(name_or_path, PIPELINE_FILES, "StableDiffusionPipeline")
    scheduler = read_scheduler(where, "scheduler", DDIMScheduler)
    tokenizer = _read_tokenizer(where, CLIPTokenizer)
    vae = read_weights(where, "vae", AutoencoderKL, torch_dtype=torch.float32)
    unet = read_weights(where, "unet", UNet2DConditionModel, torch_dtype=dtype)
    text_encoder = read_weights(where, "text_encoder", CLIPTextModel, dtype=dtype)
    if random_weights:
        unet = reinitialised(unet, UNet2DConditionModel.from_config)
    if random_weights == "all":
        vae = reinitialised(vae, AutoencoderKL.from_config)
        text_encoder = reinitialised(text_encoder, CLIPTextModel)
    parts = (part.to(device).eval().requires_grad_(False) for part in (vae, unet, text_encoder))
    return Backbone(*parts, tokenizer, scheduler, where.name, device, dtype, control=random_weights)


def save_pipeline(
    out: Path, vae: Any, text_encoder: Any, tokenizer: Any, unet: Any, scheduler: Any, dtype: torch.dtype = torch.half
) -> None:
    """Write a StableDiffusionPipeline directory; the networks are converted in place."""
    from diffusers import StableDiffusionPipeline  # at the top it would warn of torchvision, which nothing here uses

    StableDiffusionPipeline(
        vae=vae.to(dtype), text_encoder=text_encoder.to(dtype), tokenizer=tokenizer, unet=unet.to(dtype),
        scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(out)  # fmt: skip


def extend_schedule(scheduler: Any, T: int, reading: str = "rebuilt") -> Any:
    """The DDIMScheduler of a model, with T timesteps in place of its own number: DZAD starts at T = 1400.

    The paper does not say how a schedule of 1000 goes on. Readings: "rebuilt", the schedule's formula from its first to
    its last β in T steps (what `timesteps: 1400` in an LDM configuration does; every level moves); "continued", the
    schedule as it is, √β going on with its last slope (the levels below 1000 stay).
    """
    if reading not in EXTENSIONS:
        raise ModelError(f"schedule reading {reading!r} is unknown; use one of {list(EXTENSIONS)}")
    if not 2 <= T <= MAX_TIMESTEPS:
        raise ModelError(f"a schedule needs at least 2 timesteps, not {T}, and at most {MAX_TIMESTEPS}")
    changes = {"num_train_timesteps": T}
    if reading == "rebuilt" and scheduler.config.trained_betas is not None:
        raise ModelError("this schedule is a list of β without a formula: only 'continued' can extend it")
    if reading == "continued":
        roots = scheduler.betas.double().sqrt()
        further = roots[-1] + (roots[-1] - roots[-2]) * torch.arange(1, max(0, T - len(roots)) + 1)
        changes["rescale_betas_zero_snr"] = False  # these β have been rescaled already
        changes["trained_betas"] = torch.cat([roots, further])[:T].square().clamp(max=0.999).tolist()
    return type(scheduler).from_config(scheduler.config, **changes)
