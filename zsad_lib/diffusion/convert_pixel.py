"""From improved-diffusion's checkpoints of pixels, DiffPath's bases among them, to a DDPMPipeline folder.

Source of their layout: openai/improved-diffusion, `unet.py`, `script_util.py`, `gaussian_diffusion.py` and `respace.py`
(Nichol and Dhariwal, "Improved Denoising Diffusion Probabilistic Models", 2021).
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor

from zsad_lib import store
from zsad_lib.diffusion.convert import Key, check_new, fitting, read_checkpoint, unet_names
from zsad_lib.errors import ModelError


@dataclass(frozen=True)
class ImprovedDiffusion:
    """What an unconditional checkpoint does not say about itself, by improved-diffusion's names and defaults."""

    image_size: int
    channel_mult: tuple[int, ...]  # width of each level, in num_channels
    num_channels: int = 128
    num_res_blocks: int = 2
    num_heads: int = 4
    attention_resolutions: tuple[int, ...] = (16, 8)  # px
    learn_sigma: bool = False
    use_scale_shift_norm: bool = True
    diffusion_steps: int = 1000
    noise_schedule: str = "linear"  # or "cosine"
    rescale_timesteps: bool = True  # the network is told t·1000/diffusion_steps


_DIFFPATH = {"num_res_blocks": 3, "learn_sigma": True, "diffusion_steps": 4000, "noise_schedule": "cosine"}
PRESETS = {  # the two bases of DiffPath (clear-nus/diffpath, configs/): CelebA, and improved-diffusion's ImageNet
    "diffpath-celeba32": ImprovedDiffusion(32, (1, 2, 2, 2), **_DIFFPATH),
    "imagenet64": ImprovedDiffusion(64, (1, 2, 3, 4), **_DIFFPATH),  # its heads cannot be stored: refused
}


def convert_pixel_checkpoint(checkpoint: str | Path, out: str | Path, preset: str | ImprovedDiffusion) -> None:
    """Write a checkpoint file (.pt, .safetensors) as the new DDPMPipeline folder `out`, for `load_pixel_model`."""
    if isinstance(preset, str) and preset not in PRESETS:
        raise ModelError(f"preset {preset!r} is unknown; use one of {list(PRESETS)}")
    check_new(out)
    settings = PRESETS[preset] if isinstance(preset, str) else preset
    unet, scheduler = build_unet(settings), improved_diffusion_schedule(settings)
    fill_unet(unet, read_checkpoint(checkpoint), settings.num_heads)
    with store.writing_folder(out) as new:
        DDPMPipeline(unet, scheduler).save_pretrained(new)


def build_unet(settings: ImprovedDiffusion) -> UNet2DModel:
    """The network of a checkpoint, its weights still random."""
    widths = [factor * settings.num_channels for factor in settings.channel_mult]
    sizes = [settings.image_size // 2**level for level in range(len(widths))]
    kinds = ["Attn" if size in settings.attention_resolutions else "" for size in sizes]
    attended = {width for width, kind in zip(widths, kinds, strict=True) if kind} | {widths[-1]}
    if len(attended) > 1 or widths[-1] % settings.num_heads:
        raise ModelError(
            f"{settings.num_heads} heads of attention at the widths {sorted(attended)}: a UNet2DModel stores one "
            "number of channels a head for all widths, so that this network cannot be saved"
        )
    return UNet2DModel(
        sample_size=settings.image_size,
        out_channels=6 if settings.learn_sigma else 3,
        layers_per_block=settings.num_res_blocks,
        block_out_channels=tuple(widths),
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        attention_head_dim=widths[-1] // settings.num_heads,
        attn_norm_num_groups=32,
        resnet_time_scale_shift="scale_shift" if settings.use_scale_shift_norm else "default",
    )


def fill_unet(unet: UNet2DModel, state: dict[str, Tensor], heads: int) -> None:
    """Load a checkpoint's tensors, every one of them."""
    own, tensors, placed = unet.state_dict(), {}, set()
    for name, key in unet_names({key: Key(key) for key in state}, unet).items():
        found = _targets(name, state[key], heads)
        tensors |= found
        if found.keys() <= own.keys():
            placed.add(key)
    fitted, unplaced = fitting(unet, tensors), sorted(state.keys() - placed)
    if unplaced:
        raise ModelError(f"{len(unplaced)} tensors of the checkpoint have no place: {', '.join(unplaced[:4])}")
    unet.load_state_dict(fitted)


def _targets(name: str, tensor: Tensor, heads: int) -> dict[str, Tensor]:
    """Where a tensor goes: its attention has a joint projection [3·C, ...], q, k and v of one head side by side."""
    if ".attentions." in name:
        name = name.replace(".norm.", ".group_norm.").replace(".proj_out.", ".to_out.0.")
    if ".qkv." not in name or len(tensor) % (3 * heads):
        return {name: tensor}
    parts = tensor.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(1, 2)
    return {name.replace("qkv", f"to_{part}"): rows for part, rows in zip("qkv", parts, strict=True)}


def improved_diffusion_schedule(settings: ImprovedDiffusion) -> DDPMScheduler:
    """The schedule of a checkpoint. Of 4000 rescaled timesteps every fourth is kept ("respaced").

    Timestep k here is then timestep 4k there, at the same noise level and told to the network as the same number.
    """
    steps = settings.diffusion_steps
    if settings.rescale_timesteps and steps % 1000:
        raise ModelError(f"diffusion_steps={steps} rescaled to 1000 are no integers; only multiples of 1000 convert")
    # in float64: diffusers' own β are float32, and four of them are multiplied here
    if settings.noise_schedule == "linear":
        betas = torch.linspace(0.1 / steps, 20 / steps, steps, dtype=torch.float64)
    elif settings.noise_schedule == "cosine":
        level = [math.cos((k / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for k in range(steps + 1)]
        betas = torch.tensor([min(1 - level[k + 1] / level[k], 0.999) for k in range(steps)], dtype=torch.float64)
    else:
        raise ModelError(f"noise_schedule {settings.noise_schedule!r} is unknown; use 'linear' or 'cosine'")
    kept = (1 - betas).cumprod(0)[:: steps // 1000 if settings.rescale_timesteps else 1]
    betas = 1 - kept / torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])
    return DDPMScheduler(
        num_train_timesteps=len(betas),
        trained_betas=betas.tolist(),
        variance_type="learned_range" if settings.learn_sigma else "fixed_large",
    )
