"""Unconditional diffusion models of pixels (`PixelModel`): the base models of the image-level methods.

`load_pixel_model` reads a DDPMPipeline directory or hub id, as `load_backbone` reads a Stable Diffusion one, or a
checkpoint file with improved-diffusion's key names, which `convert_improved_diffusion` turns into a UNet2DModel.
Source of that layout: openai/improved-diffusion, `unet.py`, `script_util.py`, `gaussian_diffusion.py` and `respace.py`
(Nichol and Dhariwal, "Improved Denoising Diffusion Probabilistic Models", 2021).
"""

import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from zsad_lib.diffusion.loading import RANDOM_SEED, fetch, fingerprint, locate, pick_device, read_weights
from zsad_lib.errors import ModelError

RANDOM_NAMES = {None: "", "unet": " (random U-Net)", "all": " (random weights)"}  # one network: both are the same
SCHEDULE_KEYS = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "trained_betas")

# --- the model


@dataclass
class PixelModel:
    """An unconditional U-Net that predicts the noise of RGB images, with its schedule. All of it runs in float32.

    Pixels are float32 [B,3,H,W] in [-1,1] (`to_pixels`), images RGB or grey in [0,1]. A network with six output
    channels learned its variances too: the first three are the noise. `evaluations` counts the samples that went
    through the network so far. ModelError: a network of another kind.
    """

    unet: Any  # UNet2DModel
    scheduler: Any  # DDPMScheduler: only its schedule and configuration are used
    name: str
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    evaluations: int = 0

    def __post_init__(self):
        config = self.unet.config
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ModelError(
                f"{self.name}: prediction type {self.prediction_type!r} is not supported; "
                "use a model that predicts 'epsilon' or 'v_prediction'"
            )
        if config.in_channels != 3 or config.out_channels not in (3, 6):
            raise ModelError(
                f"{self.name}: the U-Net has {config.in_channels} channels in and {config.out_channels} out; a pixel "
                "model takes 3 (RGB) and gives 3, or 6 when it learned its variances"
            )
        if config.get("class_embed_type") or config.get("num_class_embeds"):
            raise ModelError(f"{self.name}: the U-Net is conditional on a class; use an unconditional one")

    @property
    def prediction_type(self):
        """What the U-Net predicts: "epsilon" or "v_prediction"."""
        return self.scheduler.config.prediction_type

    @property
    def alphas_cumprod(self):
        """ᾱ_t of the T training timesteps, float64 [T] on the CPU: near t = 0 float32 would lose 1 − ᾱ."""
        return (1 - self.scheduler.betas.double()).cumprod(0)

    @property
    def image_size(self):
        """Height and width in pixels of the images that the network was trained on."""
        size = self.unet.config.sample_size
        return size if isinstance(size, int) else size[0]

    @property
    def config(self):
        """JSON-able: what of this model changes a method's numbers, a fingerprint of the weights included."""
        schedule = {key: self.scheduler.config.get(key) for key in SCHEDULE_KEYS}
        return {
            "name": self.name,
            "prediction_type": self.prediction_type,
            "timesteps": schedule["num_train_timesteps"],
            "schedule": hashlib.sha256(json.dumps(schedule, default=list).encode()).hexdigest()[:16],
            "weights": fingerprint(self.unet),
        }

    def to_pixels(self, images):
        """Images [B,3,H,W] or grey [B,1,H,W] in [0,1] -> pixels [B,3,H,W] in [-1,1], on the model's device.

        ValueError unless H and W are the size that the model was trained on.
        """
        if images.ndim != 4 or images.shape[1] not in (1, 3) or set(images.shape[2:]) != {self.image_size}:
            size = self.image_size
            raise ValueError(f"{self.name} takes images [B,3,{size},{size}] or grey ones, not {list(images.shape)}")
        return 2 * images.to(self.device, torch.float32).expand(-1, 3, -1, -1) - 1

    def to_images(self, pixels):
        """Pixels [B,3,H,W] -> images clamped to [0,1]."""
        return (pixels / 2 + 0.5).clamp(0, 1)

    def predict_noise(self, x, t):
        """ε_θ(x, t), float32 [B,3,H,W], for noisy pixels x [B,3,H,W] and timestep t: an int, or int64 [B].

        A v-prediction v is turned into ε = √ᾱ·v + √(1 − ᾱ)·x, as in `Backbone.predict_noise`.
        """
        x = x.to(self.device, torch.float32)
        timesteps = torch.as_tensor(t, device=self.device).expand(len(x))
        self.evaluations += len(x)
        out = self.unet(x, timesteps).sample[:, :3].float()
        if self.prediction_type == "v_prediction":
            alpha = self.alphas_cumprod[timesteps.cpu()].to(x)[:, None, None, None]
            out = alpha.sqrt() * out + (1 - alpha).sqrt() * x
        return out


def load_pixel_model(name_or_path, device="auto", random_weights=None, hyperparameters=None):
    """Read an unconditional pixel model as a PixelModel.

    `name_or_path`: a DDPMPipeline folder (its parts in the subfolders unet and scheduler, or side by side as in
    google/ddpm-*), a checkpoint of data_manifest.yaml, a hub id, or an improved-diffusion checkpoint file; a file
    needs `hyperparameters`, a name of PRESETS or a dict for `convert_improved_diffusion`. `random_weights` "unet" (or
    "all") replaces the weights by freshly initialised ones, the same ones every time: a control; the name says so.
    ModelError as for `load_backbone`.
    """
    if random_weights not in RANDOM_NAMES:
        raise ModelError(f"random_weights {random_weights!r} is unknown; use None, 'unet' or 'all'")
    device = pick_device(device)
    if Path(name_or_path).is_file():
        name = Path(name_or_path).stem
        unet, scheduler = convert_improved_diffusion(read_state(name_or_path), **_preset(hyperparameters))
    elif hyperparameters is not None:
        raise ModelError(f"hyperparameters are for a checkpoint file; {name_or_path} is none")
    else:
        name, unet, scheduler = _read_pipeline(name_or_path)
    if random_weights:
        _reinitialise(unet)
    unet = unet.to(device).eval().requires_grad_(False)
    return PixelModel(unet, scheduler, name + RANDOM_NAMES[random_weights], device)


def _read_pipeline(name_or_path):
    from diffusers import DDPMScheduler, UNet2DModel

    where = locate(name_or_path, ("model_index.json",), "DDPMPipeline")
    unet_part, scheduler_part = ("unet", "scheduler") if _has_subfolders(where, UNet2DModel) else (None, None)
    if where.local:
        files = [f"{unet_part or '.'}/config.json", f"{scheduler_part or '.'}/scheduler_config.json"]
        missing = [file.removeprefix("./") for file in files if not (Path(where.source) / file).is_file()]
        if missing:
            raise ModelError(f"{where.source} is not a DDPMPipeline folder: it lacks {', '.join(missing)}")
        parts = json.loads((Path(where.source) / "model_index.json").read_text(encoding="utf-8"))
        foreign = sorted(key for key in parts if not key.startswith("_") and key not in ("unet", "scheduler"))
        if foreign:
            raise ModelError(
                f"{where.source} has the parts {', '.join(foreign)} besides unet and scheduler: its U-Net does not see "
                "pixels; use a DDPMPipeline"
            )
    config = fetch(where, scheduler_part, DDPMScheduler.load_config)
    if "beta_schedule" not in config:
        raise ModelError(f"{where.name} has a {config.get('_class_name')}, which has no beta schedule; use a DDPM")
    unet = read_weights(where, unet_part, UNet2DModel, torch_dtype=torch.float32)
    return where.name, unet, DDPMScheduler.from_config(config)


def _has_subfolders(where, cls):
    """Whether the parts lie in subfolders; the older pipelines of the hub keep everything at the top."""
    if where.local:
        return (Path(where.source) / "unet").is_dir()
    try:
        fetch(where, "unet", cls.load_config)
    except ModelError:
        return False
    return True


def _reinitialise(unet):
    """Fresh weights in place, from torch's own initialisation, the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(RANDOM_SEED)
        for module in unet.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()


# --- improved-diffusion checkpoints

DEFAULTS = {  # improved-diffusion's own (`model_and_diffusion_defaults`), and guided-diffusion's order of attention
    "image_size": 64,
    "num_channels": 128,
    "num_res_blocks": 2,
    "channel_mult": None,  # by the image size
    "num_heads": 4,
    "num_heads_upsample": -1,  # as num_heads
    "attention_resolutions": "16,8",
    "learn_sigma": False,
    "class_cond": False,
    "diffusion_steps": 1000,
    "noise_schedule": "linear",
    "predict_xstart": False,
    "rescale_timesteps": True,
    "use_scale_shift_norm": True,
    "use_new_attention_order": False,
}
CHANNEL_MULT = {32: (1, 2, 2, 2), 64: (1, 2, 3, 4), 256: (1, 1, 2, 2, 4, 4)}
_DIFFPATH = {"num_res_blocks": 3, "learn_sigma": True, "diffusion_steps": 4000, "noise_schedule": "cosine"}
PRESETS = {  # the two bases of DiffPath (clear-nus/diffpath, configs/): CelebA, and improved-diffusion's ImageNet
    "diffpath-celeba32": {**_DIFFPATH, "image_size": 32},
    "imagenet64": {**_DIFFPATH, "image_size": 64},
}
RESNET_KEYS = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
OUTER_KEYS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


def read_state(path):
    """The tensors of a checkpoint file (.safetensors, or torch's pickle) by name, on the CPU.

    Nothing in the file is executed: of a pickle only tensors and plain containers are read. ModelError when it
    holds anything else or cannot be read.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise ModelError(f"{path} cannot be read as a file of tensors, and nothing else is: {reason}") from error
    if not isinstance(state, dict) or not state or not all(torch.is_tensor(value) for value in state.values()):
        raise ModelError(f"{path} is no state dict (names -> tensors); save model.state_dict() alone")
    return state


def convert_improved_diffusion(state, **hyperparameters):
    """(UNet2DModel, DDPMScheduler) that compute what an improved-diffusion checkpoint computes.

    state: its state dict; hyperparameters: by improved-diffusion's names, over DEFAULTS. Attention there has a number
    of heads, here a number of channels a head: where the levels would need different ones, the heads are set on the
    built modules and `save_pretrained` would lose them. ModelError lists every key that has no place, that is
    missing, or that has the wrong shape; and refuses what a UNet2DModel cannot do: classes, prediction of x0,
    rescaled timesteps that fall between integers.
    """
    from diffusers import UNet2DModel

    h = _checked(hyperparameters)
    mult = tuple(h["channel_mult"] or CHANNEL_MULT[h["image_size"]])
    sizes = {int(size) for size in str(h["attention_resolutions"]).split(",")}
    attention = {level for level in range(len(mult)) if h["image_size"] // 2**level in sizes}
    widths = tuple(factor * h["num_channels"] for factor in mult)
    equal = {widths[level] for level in attention} <= {widths[-1]}
    kinds = ["Attn" if level in attention else "" for level in range(len(mult))]
    unet = UNet2DModel(
        sample_size=h["image_size"],
        in_channels=3,
        out_channels=6 if h["learn_sigma"] else 3,
        layers_per_block=h["num_res_blocks"],
        block_out_channels=widths,
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        # right as it stands when all levels with attention are equally wide; else it fits, and the heads are set below
        attention_head_dim=(widths[-1] if equal else h["num_channels"]) // h["num_heads"],
        norm_num_groups=32,
        attn_norm_num_groups=32,
        norm_eps=1e-5,
        resnet_time_scale_shift="scale_shift" if h["use_scale_shift_norm"] else "default",
    )
    _set_heads(unet.down_blocks, h["num_heads"])
    _set_heads(unet.mid_block, h["num_heads"])
    _set_heads(unet.up_blocks, h["num_heads"] if h["num_heads_upsample"] == -1 else h["num_heads_upsample"])
    renamed = _renamed(state, len(mult), h["num_res_blocks"], attention)
    _place(unet, state, renamed, h["use_new_attention_order"])
    return unet, improved_diffusion_schedule(
        h["noise_schedule"], h["diffusion_steps"], h["rescale_timesteps"], h["learn_sigma"]
    )


def improved_diffusion_schedule(noise_schedule="linear", steps=1000, rescale_timesteps=True, learn_sigma=False):
    """The DDPMScheduler of an improved-diffusion model: "linear", or "cosine" with its betas capped at 0.999.

    With `rescale_timesteps` such a network is told t·1000/steps. Of 4000 steps every fourth is kept ("respaced"):
    timestep k here is timestep 4k there, at the same noise level and told to the network as the same number.
    ModelError: an unknown schedule, or rescaled timesteps that are no integers.
    """
    from diffusers import DDPMScheduler

    if noise_schedule == "linear":
        betas = torch.linspace(0.1 / steps, 20 / steps, steps, dtype=torch.float64)
    elif noise_schedule == "cosine":
        level = [math.cos((k / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for k in range(steps + 1)]
        betas = torch.tensor([min(1 - level[k + 1] / level[k], 0.999) for k in range(steps)], dtype=torch.float64)
    else:
        raise ModelError(f"noise_schedule {noise_schedule!r} is unknown; use 'linear' or 'cosine'")
    stride = 1
    if rescale_timesteps:
        if steps % 1000:
            raise ModelError(
                f"diffusion_steps={steps} with rescale_timesteps: the network is told t·1000/{steps}, which is no "
                "integer; only multiples of 1000 steps can be converted"
            )
        stride = steps // 1000
    kept = (1 - betas).cumprod(0)[::stride]
    betas = 1 - kept / torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])
    return DDPMScheduler(
        num_train_timesteps=len(betas),
        trained_betas=betas.tolist(),
        variance_type="learned_range" if learn_sigma else "fixed_large",
    )


def _preset(hyperparameters):
    if isinstance(hyperparameters, str) and hyperparameters in PRESETS:
        return PRESETS[hyperparameters]
    if not isinstance(hyperparameters, dict):
        raise ModelError(
            f"a checkpoint file needs hyperparameters, not {hyperparameters!r}: one of {', '.join(PRESETS)}, or a dict "
            f"with names of {', '.join(DEFAULTS)}"
        )
    return hyperparameters


def _checked(hyperparameters):
    """All hyperparameters, once it is known that a UNet2DModel can stand for them."""
    unknown = sorted(set(hyperparameters) - set(DEFAULTS))
    if unknown:
        raise ModelError(f"no hyperparameter {', '.join(unknown)}; there are: {', '.join(DEFAULTS)}")
    h = DEFAULTS | hyperparameters
    if h["class_cond"] or h["predict_xstart"]:
        raise ModelError("class_cond and predict_xstart cannot be converted: use an unconditional noise predictor")
    if not h["channel_mult"] and h["image_size"] not in CHANNEL_MULT:
        raise ModelError(f"image_size {h['image_size']} needs channel_mult; known are those of {list(CHANNEL_MULT)}")
    if h["num_channels"] % 32 or h["num_channels"] % h["num_heads"]:
        raise ModelError(
            f"num_channels={h['num_channels']} must be a multiple of 32 (the groups of its norms) and of "
            f"num_heads={h['num_heads']}"
        )
    return h


def _set_heads(blocks, heads):
    from diffusers.models.attention_processor import Attention

    for module in blocks.modules():
        if isinstance(module, Attention):
            module.heads = module.sliceable_head_dim = heads
            module.scale = (module.inner_dim / heads) ** -0.5


def _blocks(levels, layers, attention):
    """(their prefix, our prefix, kind) of every block, kind "resnet", "attention" or "resample"."""
    n = 1  # input_blocks.0 is the first convolution
    for level in range(levels):
        for layer in range(layers):
            yield f"input_blocks.{n}.0", f"down_blocks.{level}.resnets.{layer}", "resnet"
            if level in attention:
                yield f"input_blocks.{n}.1", f"down_blocks.{level}.attentions.{layer}", "attention"
            n += 1
        if level < levels - 1:
            yield f"input_blocks.{n}.0.op", f"down_blocks.{level}.downsamplers.0.conv", "resample"
            n += 1
    yield "middle_block.0", "mid_block.resnets.0", "resnet"
    yield "middle_block.1", "mid_block.attentions.0", "attention"
    yield "middle_block.2", "mid_block.resnets.1", "resnet"
    for n in range(levels * (layers + 1)):
        up, layer = divmod(n, layers + 1)
        level = levels - 1 - up
        yield f"output_blocks.{n}.0", f"up_blocks.{up}.resnets.{layer}", "resnet"
        if level in attention:
            yield f"output_blocks.{n}.1", f"up_blocks.{up}.attentions.{layer}", "attention"
        if level > 0 and layer == layers:
            last = 2 if level in attention else 1
            yield f"output_blocks.{n}.{last}.conv", f"up_blocks.{up}.upsamplers.0.conv", "resample"


def _renamed(state, levels, layers, attention):
    """{their key: our keys}: one each, but three for the joint projection of an attention."""
    prefixes = {theirs: (ours,) for theirs, ours in OUTER_KEYS.items()}
    for theirs, ours, kind in _blocks(levels, layers, attention):
        if kind == "resnet":
            prefixes |= {f"{theirs}.{key}": (f"{ours}.{value}",) for key, value in RESNET_KEYS.items()}
        elif kind == "attention":
            prefixes |= {f"{theirs}.norm": (f"{ours}.group_norm",), f"{theirs}.proj_out": (f"{ours}.to_out.0",)}
            prefixes[f"{theirs}.qkv"] = tuple(f"{ours}.to_{part}" for part in "qkv")
        else:
            prefixes[theirs] = (ours,)
    starts = {key: key.rpartition(".")[0] for key in state}
    return {
        key: tuple(ours + key.removeprefix(start) for ours in prefixes[start])
        for key, start in starts.items()
        if start in prefixes
    }


def _place(unet, state, renamed, new_order):
    """Load the renamed tensors into the U-Net; ModelError unless every key and every shape fits."""
    own = unet.state_dict()
    placed, wrong = {}, set()
    for key, targets in renamed.items():
        if not all(target in own for target in targets):
            continue
        heads = unet.get_submodule(targets[0].rpartition(".to_q")[0]).heads if len(targets) == 3 else 1
        for target, tensor in zip(targets, _parts(state[key], len(targets), heads, new_order), strict=True):
            if tensor.squeeze().shape != own[target].squeeze().shape:  # a 1 x 1 convolution is a linear layer
                wrong.add(f"{key} {list(state[key].shape)}")
            placed[target] = tensor
    unplaced = sorted(key for key in state if not set(renamed.get(key, ("",))) <= set(placed))
    missing = sorted(set(own) - set(placed))
    found = {
        "have no place": unplaced,
        "are missing (by their new names)": missing,
        "have another shape": sorted(wrong),
    }
    if any(found.values()):
        listed = "; ".join(f"{len(keys)} {what}: {', '.join(keys)}" for what, keys in found.items() if keys)
        raise ModelError(f"the checkpoint does not fit its hyperparameters. Keys that {listed}")
    unet.load_state_dict({key: tensor.reshape(own[key].shape).to(own[key].dtype) for key, tensor in placed.items()})


def _parts(tensor, count, heads, new_order):
    """The tensor itself, or the rows of q, k and v out of a joint projection [3·C, ...].

    improved-diffusion keeps q, k and v of one head together; guided-diffusion's new order keeps all q together.
    """
    if count == 1:
        return (tensor,)
    if len(tensor) % (3 * heads):
        return (tensor,) * 3  # no shape of a projection: reported by the caller
    if new_order:
        return tensor.chunk(3)
    return tensor.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(1, 2).unbind(0)
