"""Tiny random models of every kind, and made-up measurements of DZAD."""

from functools import cache

import numpy as np
import torch
from compvis import fill, sd_unet, sd_vae
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel, UNet2DModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from zsad_lib.anomaly.noise_errors import NoiseErrors, timestep_grid
from zsad_lib.diffusion.guidance import GuidedBackbone, GuidedModel, SemanticGuide
from zsad_lib.diffusion.latent import Backbone
from zsad_lib.diffusion.pixel import PixelModel
from zsad_lib.methods.dzad import Measured
from zsad_lite.training.pipeline import build_unet

SMALL = {"stages": 5, "per_stage": 2, "steps": 5, "sigma": 1.0, "pool": 2}
IDS = [f"plate/{k}" for k in range(4)]


def tiny_parts(text_width=16, in_channels=4):
    """vae, unet, text_encoder, tokenizer of a tiny random model: 32 px images, latents 4x8x8."""
    torch.manual_seed(1)
    blocks = {"layers_per_block": 1, "norm_num_groups": 4}
    vae = sd_vae((8, 8, 8), sample_size=32, scaling_factor=0.9, **blocks)
    levels = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (8, 16),
    }
    attention = {"cross_attention_dim": 16, "attention_head_dim": 4}
    unet = UNet2DConditionModel(sample_size=8, in_channels=in_channels, **levels, **attention, **blocks)
    letters = [*"abcdefghijklmnopqrstuvwxyz_0123456789"]
    symbols = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>", "!"]
    vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], pad_token="!", model_max_length=24)
    size = {"hidden_size": text_width, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"bos_token_id": len(symbols) - 3, "eos_token_id": len(symbols) - 2, "pad_token_id": len(symbols) - 1}
    config = CLIPTextConfig(vocab_size=len(symbols), max_position_embeddings=24, **size, **special)
    parts = (vae, unet, CLIPTextModel(config))
    return (*(part.eval().requires_grad_(False) for part in parts), tokenizer)


def tiny_scheduler(**changes):
    options = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    return DDIMScheduler(**options, clip_sample=False, **changes)


@cache
def tiny_backbone(prediction_type="epsilon"):
    return Backbone(*tiny_parts(), tiny_scheduler(prediction_type=prediction_type), name="tiny")


def tiny_unet(**changes):
    options = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 8,
    }
    torch.manual_seed(3)
    return UNet2DModel(**{"sample_size": 16} | options | changes).eval().requires_grad_(False)


@cache
def tiny_pixel_model(**changes):
    return PixelModel(tiny_unet(**changes), DDPMScheduler(), "tiny")


def tiny_guided(count=2, mode="only mid", prediction_type="epsilon"):
    """(backbone, the backbone with a filled guide that sees `count` random images)."""
    backbone = tiny_backbone(prediction_type)
    guide = fill("guide", SemanticGuide.from_unet(backbone.unet, 2))
    images = torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    return backbone, GuidedBackbone(backbone, guide, images, mode)


def guided_model(**changes):
    """(GuidedModel, images of IDS)."""
    backbone, guided = tiny_guided(len(IDS))
    return GuidedModel(backbone, guided.guide, **changes), guided.images


def small(kind="compact", filled=True, initialisation="trainable"):
    """(unet, guide, inputs): Stable Diffusion's structure or the compact models', narrow; inputs for `guided_unet`."""
    options = {"norm_num_groups": 8, "attention_head_dim": 4, "cross_attention_dim": 24}
    unet = sd_unet((16, 24, 32, 32), **options) if kind == "sd" else build_unet((16, 32, 32))
    halvings = {"sd": 3, "compact": 2}[kind]
    guide = SemanticGuide.from_unet(unet, halvings, initialisation)
    if filled:
        fill("unet", unet), fill("guide", guide)
    z = torch.randn(2, unet.config.in_channels, 16, 16)
    text = torch.randn(2, 5, unet.config.cross_attention_dim)
    images = torch.rand(2, 3, 16 * 2**halvings, 16 * 2**halvings)
    return unet, guide, (z, torch.tensor([999, 321]), text, images)


def made_up(images=6, seed=0, shift=2.0):
    """A Measured of random errors; the second half of the images is anomalous and higher by `shift` at the last stage
    and at one position, where also the features of the reconstruction differ."""
    rng = np.random.default_rng(seed)
    labels = (np.arange(images) >= images // 2).astype(int)
    positions = rng.uniform(0.5, 1.0, (images, 5, 2, 4, 4)).astype(np.float32)
    positions[labels == 1, -1, :, 1, 2] += shift * 16
    similarity = rng.uniform(1.8, 2.0, (images, 8, 8)).astype(np.float32)
    similarity[labels == 1, 2:4, 4:6] = 0.5
    alphas = torch.linspace(0.999, 0.01, 1000).numpy()
    errors = NoiseErrors(
        np.array([f"{seed}/{k}" for k in range(images)]), timestep_grid(1000, 5, 2), np.arange(1), alphas,
        positions.mean((3, 4))[..., None], positions,
    )  # fmt: skip
    return Measured(errors, similarity, 2, labels, 8)
