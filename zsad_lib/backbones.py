"""Pretrained networks: a latent diffusion model (`Backbone`) and a feature extractor (`FeatureExtractor`).

Both are read from the standard Hugging Face directory layouts, whether the folder holds Stable Diffusion or
one of this project's compact checkpoints. A name is a local folder, a checkpoint of data_manifest.yaml, or a
hub id.
"""

import hashlib
import json
import math
import re
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from zsad_lib import manifest

PIPELINE_FILES = (
    "model_index.json",
    "vae/config.json",
    "unet/config.json",
    "text_encoder/config.json",
    "tokenizer/tokenizer_config.json",
    "scheduler/scheduler_config.json",
)
FEATURE_FILES = ("config.json", "preprocessor_config.json")
FEATURE_SIZES = {"dino_vits8": 256, "resnet50": 256}  # DIVAD's input, larger than the files' own 224
RANDOM_SEED = 0  # of the re-initialised control models


EXTENSIONS = ("rebuilt", "continued")  # readings of a schedule of another length


class BackboneError(ValueError):
    """A model cannot be loaded or used; the message says what is wrong with which folder, and what to do."""


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
            raise BackboneError(
                f"{self.name}: prediction type {self.prediction_type!r} is not supported; "
                "use a model that predicts 'epsilon' or 'v_prediction'"
            )
        if not unet.in_channels == unet.out_channels == vae.latent_channels:
            raise BackboneError(
                f"{self.name}: the U-Net has {unet.in_channels} channels in and {unet.out_channels} out, the "
                f"VAE has {vae.latent_channels}; inpainting and image-conditioned U-Nets are not supported"
            )
        if unet.cross_attention_dim != text.hidden_size:
            raise BackboneError(
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
    ones, the same ones every time: a control; the name says so. BackboneError: missing parts, weights that do
    not fit their configuration, a hub id that is not in the local cache while the hub cannot be reached, an
    unsupported kind of model.
    """
    if random_weights not in (None, "unet", "all"):
        raise BackboneError(f"random_weights {random_weights!r} is unknown; use None, 'unet' or 'all'")
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    device = pick_device(device)
    dtype = _pick_dtype(dtype, device)
    where = locate(name_or_path, PIPELINE_FILES, "StableDiffusionPipeline")
    scheduler = DDIMScheduler.from_config(fetch(where, "scheduler", DDIMScheduler.load_config))
    tokenizer = fetch(where, "tokenizer", CLIPTokenizer.from_pretrained)
    vae = read_weights(where, "vae", AutoencoderKL, torch_dtype=torch.float32)
    unet = read_weights(where, "unet", UNet2DConditionModel, torch_dtype=dtype)
    text_encoder = read_weights(where, "text_encoder", CLIPTextModel, dtype=dtype)
    if random_weights:
        unet = _reinitialised(unet, UNet2DConditionModel.from_config)
    if random_weights == "all":
        vae = _reinitialised(vae, AutoencoderKL.from_config)
        text_encoder = _reinitialised(text_encoder, CLIPTextModel)
    name = where.name + {None: "", "unet": " (random U-Net)", "all": " (random weights)"}[random_weights]
    parts = (part.to(device).eval().requires_grad_(False) for part in (vae, unet, text_encoder))
    return Backbone(*parts, tokenizer, scheduler, name, device, dtype)


def extend_schedule(scheduler, T, reading="rebuilt"):
    """The DDIMScheduler of a model, with T timesteps in place of its own number.

    DZAD starts at T = 1400, though such models are trained with 1000 and the paper does not say how its schedule goes
    on. Readings: "rebuilt", the schedule's formula from its first to its last β in T steps (what `timesteps: 1400` in
    an LDM configuration does; every level moves); "continued", the schedule as it is, √β going on with its last slope
    (the levels below 1000 stay). Fewer timesteps: a coarser schedule, or its beginning. Use it as
    `dataclasses.replace(backbone, scheduler=...)`, for training and for testing alike. BackboneError: another
    reading.
    """
    if reading not in EXTENSIONS:
        raise BackboneError(f"schedule reading {reading!r} is unknown; use one of {list(EXTENSIONS)}")
    if T < 2:
        raise BackboneError(f"a schedule needs at least 2 timesteps, not {T}")
    changes = {"num_train_timesteps": T}
    if reading == "rebuilt" and scheduler.config.trained_betas is not None:
        raise BackboneError("this schedule is a list of β without a formula: only 'continued' can extend it")
    if reading == "continued":
        roots = scheduler.betas.double().sqrt()
        further = roots[-1] + (roots[-1] - roots[-2]) * torch.arange(1, max(0, T - len(roots)) + 1)
        changes["rescale_betas_zero_snr"] = False  # these β have been rescaled already
        changes["trained_betas"] = torch.cat([roots, further])[:T].square().clamp(max=0.999).tolist()
    return type(scheduler).from_config(scheduler.config, **changes)


@dataclass
class FeatureExtractor:
    """Callable: images float32 RGB [B,3,H,W] in [0,1] -> list of features [B,C,h,w], one entry a layer.

    It resizes the whole image, never cropping, to size x size (bilinear, antialiased; None: as it is) and
    normalises it. `config` is JSON-able: what changes the features.
    """

    forward: Callable
    name: str
    size: int | None
    mean: tuple = (0.0, 0.0, 0.0)
    std: tuple = (1.0, 1.0, 1.0)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    config: dict = field(default_factory=dict)

    def __call__(self, images):
        images = images.to(self.device, torch.float32)
        if self.size is not None and images.shape[-2:] != (self.size, self.size):
            images = F.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True)
        mean, std = (images.new_tensor(values).view(1, 3, 1, 1) for values in (self.mean, self.std))
        return self.forward((images - mean) / std)


def load_features(name_or_path, device="auto", size=None, layers=None, random_weights=None):
    """Read a transformers vision model (ViT, DINOv2 or ResNet) as a FeatureExtractor.

    `name_or_path`: a local folder, a checkpoint of data_manifest.yaml, a hub id, "dino_vits8", "resnet50",
    "pixels" (no network: R, G, B and a constant 1, because the cosine of bare colours would not see
    brightness), "unet:MODEL" (what the U-Net of that pipeline computes, see `_unet_features`), or several
    joined by "+" ("lite-features+pixels"), which gives the layers of all. A ViT gives its last layer's patch
    tokens as a grid, CLS dropped; a ResNet the stages named in `layers` (1 to 4; default: the last three).
    `size`: the input in pixels (default: 256 for the two short names, else what preprocessor_config.json says).
    `random_weights` "all" re-initialises the networks: a control. BackboneError as for `load_backbone`.
    """
    if random_weights not in (None, "all"):
        raise BackboneError(f"random_weights {random_weights!r} of features is unknown; use None or 'all'")
    device = pick_device(device)
    if "+" in str(name_or_path):
        names = str(name_or_path).split("+")
        return _joined([load_features(name, device, size, layers, random_weights) for name in names], device)
    if str(name_or_path) == "pixels":
        config = {"name": "pixels", "size": size}
        return FeatureExtractor(_pixels, "pixels", size, device=device, config=config)
    if str(name_or_path).startswith("unet:"):
        backbone = load_backbone(
            str(name_or_path).removeprefix("unet:"), device, random_weights=random_weights and "unet"
        )
        name, size = f"unet:{backbone.name}", size or backbone.image_size
        config = {"name": name, "size": size, "weights": fingerprint(backbone.vae, backbone.unet)}
        return FeatureExtractor(_unet_features(backbone), name, size, device=device, config=config)
    from transformers import AutoConfig, AutoModel
    from transformers.utils import cached_file

    where = locate(name_or_path, FEATURE_FILES, "transformers vision model")
    kind = fetch(where, None, AutoConfig.from_pretrained, trust_remote_code=False).model_type
    if kind not in ("vit", "dinov2", "resnet"):
        raise BackboneError(f"{where.name} is a {kind!r} model; features come from 'vit', 'dinov2' or 'resnet' models")
    if kind != "resnet" and layers is not None:
        raise BackboneError(f"{where.name} is a {kind!r} model: its last layer is used, `layers` is for ResNets")
    options = {"add_pooling_layer": False} if kind == "vit" else {}  # DINO's files have no pooler
    model = read_weights(where, None, AutoModel, True, dtype=torch.float32, trust_remote_code=False, **options)
    if random_weights:
        model = _reinitialised(model, type(model), **options)
    model = model.to(device).eval().requires_grad_(False)
    own_size, mean, std = preprocessing(fetch(where, None, cached_file, "preprocessor_config.json"))
    size = size or FEATURE_SIZES.get(where.name) or own_size
    if kind == "resnet":
        stages = len(model.config.depths)
        layers = tuple(layers or range(max(1, stages - 2), stages + 1))
        if not all(1 <= layer <= stages for layer in layers):
            raise BackboneError(f"{where.name} has stages 1 to {stages}, not {list(layers)}")
        forward = _resnet_stages(model, layers)
    else:
        forward = _patch_tokens(model, kind)
        if size % model.config.patch_size:
            raise BackboneError(
                f"{where.name}: input size {size} is no multiple of its patch {model.config.patch_size}"
            )
    name = where.name + (" (random weights)" if random_weights else "")
    config = {"name": name, "size": size, "layers": layers and list(layers), "weights": fingerprint(model)}
    return FeatureExtractor(forward, name, size, mean, std, device, config)


def fingerprint(*modules, values=64):
    """16 hex digits that tell two sets of weights apart.

    From the names, the shapes and `values` evenly spread numbers of each tensor. The same on every device; a
    change of dtype changes it.
    """
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            flat = tensor.detach().flatten()
            picked = flat[:: max(1, math.ceil(len(flat) / values))].cpu().double()
            digest.update(f"{name} {tuple(tensor.shape)}".encode() + picked.numpy().tobytes())
    return digest.hexdigest()[:16]


def pick_device(device="auto"):
    """A torch.device; "auto" is CUDA when there is one, else the CPU. BackboneError: CUDA without a GPU."""
    cuda = torch.cuda.is_available()
    device = torch.device(("cuda" if cuda else "cpu") if device == "auto" else device)
    if device.type == "cuda" and not cuda:
        raise BackboneError("device 'cuda' was asked for, but torch finds no CUDA GPU; use device='auto' or 'cpu'")
    return device


def _pick_dtype(dtype, device):
    names = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if dtype == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    if dtype not in names and dtype not in names.values():
        raise BackboneError(f"dtype {dtype!r} is unknown; use 'auto' or one of {list(names)}")
    return names.get(dtype, dtype)


@dataclass
class Location:
    """Where a model is read from: a local folder, or a hub id at a revision."""

    name: str
    source: str
    local: bool
    revision: str | None = None


def locate(name_or_path, needed, layout):
    """Where to read a model from; a folder is checked for the files that its layout needs."""
    name = str(name_or_path)
    path = Path(name_or_path)
    if not path.is_dir():  # a name then
        if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
            return Location(name, name, local=False)
        if path.name != name:
            raise BackboneError(f"no folder at {path}; give a folder, a checkpoint of data_manifest.yaml or a hub id")
        try:
            entry = manifest.checkpoint_entry(name)
        except manifest.ManifestError as error:
            raise BackboneError(f"{name!r} is no folder, no hub id (owner/name), and: {error}") from error
        path = manifest.local_path(entry)
        if path is None:
            return Location(name, entry["hub_id"], local=False, revision=entry["revision"])
        if not path.is_dir():
            raise BackboneError(f"checkpoint {name!r} is not at {path}. {entry.get('fetch', '')}".strip())
    missing = [part for part in needed if not (path / part).is_file()]
    if missing:
        raise BackboneError(f"{path} is not a {layout} folder: it lacks {', '.join(missing)}")
    return Location(path.resolve().name, str(path), local=True)


def fetch(where, part, loader, *args, **kwargs):
    """loader(source, ...) with its reports silenced and its failure turned into a BackboneError."""
    if part:
        kwargs["subfolder"] = part
    if where.revision:
        kwargs["revision"] = where.revision
    try:
        with quiet(bars=where.local):
            return loader(where.source, *args, **kwargs)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        if where.local:
            what = f"{where.source}/{part}" if part else where.source
            raise BackboneError(f"{what} cannot be read: {reason}. Restore the folder or download it again") from error
        raise BackboneError(
            f"{where.source} is neither a folder here nor complete in the local hub cache, and fetching "
            f"it failed: {reason} Fetch it once where there is a network (hf download {where.source}), or "
            "pass the path of a folder"
        ) from error


def read_weights(where, part, cls, heads=False, **kwargs):
    """A model whose weights are all read from its files: the libraries would fill gaps with random numbers.

    `heads`: the files may hold more than the model has (a classifier, a pooler).
    """
    model, info = fetch(where, part, cls.from_pretrained, output_loading_info=True, **kwargs)
    wrong = {
        "missing": set(info["missing_keys"]),
        "mismatched": {str(key) for key in info["mismatched_keys"]},
        "unexpected": set() if heads else set(info["unexpected_keys"]),
    }
    found = [f"{len(keys)} {kind} ({', '.join(sorted(keys)[:3])} ...)" for kind, keys in wrong.items() if keys]
    if found:
        raise BackboneError(
            f"{where.source}{'/' + part if part else ''}: the weights do not fit config.json: "
            f"{'; '.join(found)}. Restore the folder or download it again"
        )
    return model


@contextmanager
def quiet(bars):
    """The libraries' warnings (and progress `bars`) off: what they report is checked here and raised."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    levels = [library.get_verbosity() for library in libraries]
    shown = [library for library in libraries if bars and library.is_progress_bar_enabled()]
    for library in libraries:
        library.set_verbosity_error()
    for library in shown:
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # an argument that diffusers still passes to the hub's client
            warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")
            yield
    finally:
        for library, level in zip(libraries, levels, strict=True):
            library.set_verbosity(level)
        for library in shown:
            library.enable_progress_bar()


def _reinitialised(model, build, **options):
    """A model of the same configuration with the library's random weights, the same every time."""
    with torch.random.fork_rng(devices=[]), quiet(bars=False):
        torch.default_generator.manual_seed(RANDOM_SEED)
        return build(model.config, **options).to(model.dtype)


def preprocessing(path):
    """(input size, mean, std) of a preprocessor_config.json."""
    values = json.loads(Path(path).read_text(encoding="utf-8"))
    size = values.get("size")
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge")
    if not (isinstance(size, int) and "image_mean" in values and "image_std" in values):
        raise BackboneError(f"{path} must name size, image_mean and image_std")
    return size, tuple(values["image_mean"]), tuple(values["image_std"])


def _pixels(images):
    return [torch.cat([images, torch.ones_like(images[:, :1])], dim=1)]


def _joined(parts, device):
    """One extractor that gives the layers of all `parts`."""
    name = "+".join(part.name for part in parts)
    config = {"name": name, "parts": [part.config for part in parts]}

    def forward(images):
        return [layer for part in parts for layer in part(images)]

    return FeatureExtractor(forward, name, None, device=device, config=config)


def _unet_features(backbone, t=101):
    """The outputs of all but the last block of the U-Net's decoder, for images noised to timestep t.

    With no text and the same noise for every image (Tang et al., "Emergent Correspondence from Image
    Diffusion", 2023: DIFT, which averages several noises).
    """
    noise = torch.randn(backbone.latent_shape, generator=torch.Generator().manual_seed(RANDOM_SEED))
    alpha = backbone.alphas_cumprod[t]

    def forward(images):
        z = backbone.encode(images)
        z = alpha.sqrt() * z + (1 - alpha).sqrt() * noise.to(z)
        layers, blocks = [], backbone.unet.up_blocks[:-1]
        hooks = [block.register_forward_hook(lambda _, __, out: layers.append(out.float())) for block in blocks]
        try:
            backbone.predict_noise(z, t, backbone.embed([""]).expand(len(z), -1, -1))
        finally:
            for hook in hooks:
                hook.remove()
        return layers

    return forward


def _resnet_stages(model, layers):
    def forward(images):
        states = model(images, output_hidden_states=True).hidden_states  # [0] is the stem
        return [states[layer] for layer in layers]

    return forward


def _patch_tokens(model, kind):
    options = {"interpolate_pos_encoding": True} if kind == "vit" else {}  # DINOv2 always interpolates

    def forward(images):
        grid = [side // model.config.patch_size for side in images.shape[-2:]]
        tokens = model(images, **options).last_hidden_state[:, 1:]
        return [tokens.transpose(1, 2).unflatten(2, grid)]

    return forward
