"""Pretrained networks: a latent diffusion model (`Backbone`) and a feature extractor (`FeatureExtractor`).

Both are read from the standard Hugging Face directory layouts, whether the folder holds Stable Diffusion or
one of this project's compact checkpoints. A name is a local folder, a checkpoint of data_manifest.yaml, or a
hub id.
"""

import hashlib
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch

from zsad_lib.diffusion.loading import fetch, fingerprint, locate, pick_device, pick_dtype, read_weights, reinitialised
from zsad_lib.errors import ModelError

PIPELINE_FILES = (
    "model_index.json",
    "vae/config.json",
    "unet/config.json",
    "text_encoder/config.json",
    "tokenizer/tokenizer_config.json",
    "scheduler/scheduler_config.json",
)


EXTENSIONS = ("rebuilt", "continued")  # readings of a schedule of another length


@dataclass
class Backbone:
    """A text-conditional latent diffusion model of the Stable Diffusion kind, with its noise schedule.

    Images are float32 RGB [B,3,H,W] in [0,1], H and W multiples of `scale_factor`; latents float32 [B,C,h,w],
    scaled by the VAE's scaling factor. The U-Net and the text encoder run in `dtype`; the VAE, cheap and
    easily overflown in half precision, and all arithmetic on latents stay in float32. `evaluations` counts
    the samples that went through the U-Net so far.
    """

    vae: Any
    unet: Any
    text_encoder: Any
    tokenizer: Any
    scheduler: Any  # DDIMScheduler: only its schedule and configuration are used
    name: str
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    evaluations: int = 0

    def __post_init__(self):
        unet, vae, text = self.unet.config, self.vae.config, self.text_encoder.config
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ModelError(
                f"{self.name}: prediction type {self.prediction_type!r} is not supported; "
                "use a model that predicts 'epsilon' or 'v_prediction'"
            )
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

    @property
    def prediction_type(self):
        """What the U-Net predicts: "epsilon" or "v_prediction"."""
        return self.scheduler.config.prediction_type

    @property
    def alphas_cumprod(self):
        """ᾱ_t of the T training timesteps, float32 [T], on the model's device."""
        return self.scheduler.alphas_cumprod.to(self.device, torch.float32)

    @property
    def steps_offset(self):
        """The first timestep of a sampling grid: 1 for Stable Diffusion."""
        return self.scheduler.config.steps_offset

    @property
    def scale_factor(self):
        """Pixels to a latent position, along each side: 8 for Stable Diffusion."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def latent_shape(self):
        """(C, h, w) of the latents the U-Net was trained on."""
        size = self.unet.config.sample_size
        return (self.unet.config.in_channels, *((size, size) if isinstance(size, int) else size))

    @property
    def image_size(self):
        """The image height in pixels that `latent_shape` stands for."""
        return self.latent_shape[1] * self.scale_factor

    @property
    def config(self):
        """JSON-able: what of this model changes a method's numbers, fingerprints of schedule and weights included."""
        return {
            "name": self.name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "prediction_type": self.prediction_type,
            "schedule": hashlib.sha256(self.scheduler.alphas_cumprod.numpy().round(6).tobytes()).hexdigest()[:8],
            "weights": fingerprint(self.vae, self.unet, self.text_encoder),
        }

    def posterior(self, images):
        """The VAE's posterior of images [B,3,H,W] in [0,1]: (mean, std), each [B,C,h,w], not scaled."""
        height, width = images.shape[-2:]
        if height % self.scale_factor or width % self.scale_factor:
            raise ValueError(f"images of {height}x{width} px: both sides must be multiples of {self.scale_factor}")
        posterior = self.vae.encode(2 * images.to(self.device, torch.float32) - 1).latent_dist
        return posterior.mean, posterior.std

    def encode(self, images, noise=None):
        """Images [B,3,H,W] in [0,1] -> scaled latents [B,C,h,w]: the posterior's mode or mean + std·noise."""
        mean, std = self.posterior(images)
        latents = mean if noise is None else mean + std * noise.to(mean)
        return self.vae.config.scaling_factor * latents

    def decode(self, latents, clamp=True):
        """Scaled latents [B,C,h,w] -> images [B,3,H,W], clamped to [0,1] unless `clamp` is False."""
        latents = latents.to(self.device, torch.float32) / self.vae.config.scaling_factor
        images = self.vae.decode(latents).sample / 2 + 0.5
        return images.clamp(0, 1) if clamp else images

    def embed(self, prompts):
        """Prompts (list of B strings) -> text embeddings [B,L,D]; warns when a prompt exceeds L tokens."""
        length = min(self.tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings)
        for prompt, ids in zip(prompts, self.tokenizer(prompts).input_ids, strict=True):
            if len(ids) > length:
                warnings.warn(f"prompt cut from {len(ids)} to {length} tokens: {prompt!r}", stacklevel=2)
        tokens = self.tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return self.text_encoder(tokens.input_ids.to(self.device))[0]

    def predict_noise(self, z, t, cond, uncond=None, guidance_scale=1.0, network=None):
        """ε_θ(z, t, c), float32 [B,C,h,w], for latents z [B,C,h,w], text `cond` [B,L,D] and timestep t: an int,
        or a tensor [B] with the timestep of each latent.

        Classifier-free guidance: uncond + guidance_scale·(cond − uncond) from one batched call of 2B samples.
        With `uncond` None or a guidance_scale of 1 only the conditional half is run. A v-prediction v is
        turned into ε = √ᾱ·v + √(1 − ᾱ)·z (Salimans and Ho, "Progressive Distillation", appendix D).
        `network(z, timesteps, text)` -> [B,C,h,w] takes the U-Net's place (see guidance.py) and counts as it does.
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
        if self.prediction_type == "v_prediction":
            alpha = self.alphas_cumprod[times].view(-1, 1, 1, 1)
            out = alpha.sqrt() * out + (1 - alpha).sqrt() * z.to(out)
        return out


def load_backbone(name_or_path, device="auto", dtype="auto", random_weights=None):
    """Read a StableDiffusionPipeline directory as a Backbone.

    `name_or_path`: a local folder, a checkpoint of data_manifest.yaml or a hub id. Whatever scheduler it
    comes with becomes a DDIMScheduler on the same schedule. `device` "auto" is CUDA when there is one;
    `dtype` "auto" is float16 on CUDA and float32 elsewhere (half-precision files are widened).
    `random_weights` "unet" or "all" (U-Net, VAE and text encoder) replaces those parts by freshly initialised
    ones, the same ones every time: a control; the name says so. ModelError: missing parts, weights that do
    not fit their configuration, a hub id that is not in the local cache while the hub cannot be reached, an
    unsupported kind of model.
    """
    if random_weights not in (None, "unet", "all"):
        raise ModelError(f"random_weights {random_weights!r} is unknown; use None, 'unet' or 'all'")
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    device = pick_device(device)
    dtype = pick_dtype(dtype, device)
    where = locate(name_or_path, PIPELINE_FILES, "StableDiffusionPipeline")
    scheduler = DDIMScheduler.from_config(fetch(where, "scheduler", DDIMScheduler.load_config))
    tokenizer = fetch(where, "tokenizer", CLIPTokenizer.from_pretrained)
    vae = read_weights(where, "vae", AutoencoderKL, torch_dtype=torch.float32)
    unet = read_weights(where, "unet", UNet2DConditionModel, torch_dtype=dtype)
    text_encoder = read_weights(where, "text_encoder", CLIPTextModel, dtype=dtype)
    if random_weights:
        unet = reinitialised(unet, UNet2DConditionModel.from_config)
    if random_weights == "all":
        vae = reinitialised(vae, AutoencoderKL.from_config)
        text_encoder = reinitialised(text_encoder, CLIPTextModel)
    name = where.name + {None: "", "unet": " (random U-Net)", "all": " (random weights)"}[random_weights]
    parts = (part.to(device).eval().requires_grad_(False) for part in (vae, unet, text_encoder))
    return Backbone(*parts, tokenizer, scheduler, name, device, dtype)


def extend_schedule(scheduler, T, reading="rebuilt"):
    """The DDIMScheduler of a model, with T timesteps in place of its own number.

    DZAD starts at T = 1400, though such models are trained with 1000 and the paper does not say how its schedule goes
    on. Readings: "rebuilt", the schedule's formula from its first to its last β in T steps (what `timesteps: 1400` in
    an LDM configuration does; every level moves); "continued", the schedule as it is, √β going on with its last slope
    (the levels below 1000 stay). Fewer timesteps: a coarser schedule, or its beginning. Use it as
    `dataclasses.replace(backbone, scheduler=...)`, for training and for testing alike. ModelError: another
    reading.
    """
    if reading not in EXTENSIONS:
        raise ModelError(f"schedule reading {reading!r} is unknown; use one of {list(EXTENSIONS)}")
    if T < 2:
        raise ModelError(f"a schedule needs at least 2 timesteps, not {T}")
    changes = {"num_train_timesteps": T}
    if reading == "rebuilt" and scheduler.config.trained_betas is not None:
        raise ModelError("this schedule is a list of β without a formula: only 'continued' can extend it")
    if reading == "continued":
        roots = scheduler.betas.double().sqrt()
        further = roots[-1] + (roots[-1] - roots[-2]) * torch.arange(1, max(0, T - len(roots)) + 1)
        changes["rescale_betas_zero_snr"] = False  # these β have been rescaled already
        changes["trained_betas"] = torch.cat([roots, further])[:T].square().clamp(max=0.999).tolist()
    return type(scheduler).from_config(scheduler.config, **changes)
