"""A CompVis (LDM) checkpoint: its names, written from `openaimodel.py`, `sgn.py` and `autoencoder.py`; its weights by
the golden files' rule; how far networks with these weights are from the authors'."""

import re
import zlib
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from helpers import arrays

from zsad_lib.diffusion import ddim
from zsad_lib.diffusion.guidance import GuidedBackbone, guided_unet
from zsad_lib.diffusion.latent import Backbone
from zsad_lite.training.pipeline import build_scheduler

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE = {
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "down_blocks": "down",
    "up_blocks": "up",
    "resnets": "block",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
}


def _replaced(name, words):
    for ours, theirs in words.items():
        name = re.sub(rf"(^|\.){re.escape(ours)}\.", rf"\g<1>{theirs}.", name)
    return name


def _ldm_unet(name, unet):
    step = unet.config.layers_per_block + 1  # input and output blocks of a level
    if ".resnets." in name:  # an attention block has norms of the same names
        name = _replaced(name, RESNET)
    block = re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name)
    if not block:
        return _replaced(name, UNET)
    way, level, kind, k, rest = block[1], int(block[2]), block[3], int(block[4]), block[5]
    if kind == "downsamplers":
        return f"input_blocks.{(level + 1) * step}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"output_blocks.{(level + 1) * step - 1}.{1 + ('Attn' in unet.config.up_block_types[level])}.{rest}"
    place = f"input_blocks.{1 + level * step + k}" if way == "down" else f"output_blocks.{level * step + k}"
    return f"{place}.{('resnets', 'attentions').index(kind)}.{rest}"


def _ldm_guide(name, guide):
    part, _, rest = name.partition(".")
    if part == "fusion":
        _, i, j, _ = rest.split(".")
        return f"down{int(i) + 1}{int(j) + 1}.0.weight"
    if part == "hint":  # every second module of the stack is an activation
        layers = ["conv_in", *(f"blocks.{k}" for k in range(len(guide.hint.blocks))), "conv_out"]
        layer, _, kind = rest.rpartition(".")
        return f"input_hint_block.{2 * layers.index(layer)}.{kind}"
    rest = re.sub(r"^controlnet_down_blocks\.(\d+)\.", r"zero_convs.\1.0.", rest)
    return _ldm_unet(re.sub(r"^controlnet_mid_block\.", "middle_block_out.0.", rest), guide.encoder)


def _ldm_vae(name, vae):
    last = len(vae.config.block_out_channels) - 1  # the decoder's levels are counted from the image
    return _replaced(re.sub(r"\.up_blocks\.(\d+)\.", lambda m: f".up_blocks.{last - int(m[1])}.", name), VAE)


def ldm_names(part, model):
    """{name of a tensor of the model: its name in a CompVis checkpoint}, without `diffusion.convert`."""
    prefix, name_of = {
        "unet": ("model.diffusion_model.", _ldm_unet),
        "guide": ("control_model.", _ldm_guide),
        "vae": ("first_stage_model.", _ldm_vae),
        "text_encoder": ("cond_stage_model.transformer.text_model.", lambda name, _: name.removeprefix("text_model.")),
    }[part]
    return {name: prefix + name_of(name, model) for name in model.state_dict()}


RAW = {"hint_mean": (0, 0, 0), "hint_std": (1, 1, 1)}  # the golden hints are given as the network takes them


SHAPES = {"a": (1, 16, 16), "b": (2, 16, 16), "c": (1, 16, 24), "d": (1, 32, 32)}


def sd_unet(widths=(320, 640, 1280, 1280), **options):
    """Stable Diffusion 1.5's U-Net, of any width."""
    return UNet2DConditionModel(sample_size=64, block_out_channels=widths, **({"cross_attention_dim": 768} | options))


def sd_vae(widths=(128, 256, 512, 512), **options):
    """Stable Diffusion 1.5's autoencoder, of any width."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * len(widths)}
    blocks |= {"up_block_types": ("UpDecoderBlock2D",) * len(widths), "layers_per_block": 2, "sample_size": 512}
    return AutoencoderKL(block_out_channels=widths, **blocks | options)


def gaussian(name, shape, scale=1.0):
    """The numbers that the golden files' rule gives for a name."""
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    return torch.from_numpy(np.float32(scale) * generator.standard_normal(shape, dtype=np.float32))


def filled(key, shape):
    """The tensor of a CompVis name, as the golden files' README says."""
    if len(shape) >= 2:
        gain = 1.6 if ".input_hint_block." in key else 1
        return gaussian(key, shape, gain / np.sqrt(np.prod(shape[1:])))
    return 1 + gaussian(key, shape, 0.1) if key.endswith("weight") else gaussian(key, shape, 0.02)


def fill(part, model):
    """Fill every tensor by its CompVis name."""
    names = ldm_names(part, model)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(filled(names[name], tensor.shape))
    return model


def full_size(build, part):
    """A model of Stable Diffusion 1.5's size, filled by name, without the time that random weights take."""
    with torch.device("meta"):
        model = build()
    return fill(part, model.to_empty(device="cpu")).eval().requires_grad_(False)


def slice_error(stored, key, tensor):
    """The largest difference at the 64 stored places of a large array."""
    assert tuple(tensor.shape) == tuple(stored[f"{key}/shape"].tolist()), key
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(f"slice/{key}".encode())))
    places = torch.from_numpy(generator.integers(0, tensor.numel(), 64))
    return (tensor.flatten()[places] - stored[f"{key}/slice"]).abs().max().item()


def network_errors(unet, guide, case):
    """{quantity: largest difference to the authors' network} for one of the stored inputs."""
    stored, (count, height, width) = arrays(f"vlmdiff/network_{case}"), SHAPES[case]
    z = gaussian(f"input/{case}/x", (count, 4, height, width))
    text, t = gaussian(f"input/{case}/context", (count, 77, 768)), stored["timesteps"].long()
    hint = guide.embed(gaussian(f"input/{case}/hint", (count, 3, 8 * height, 8 * width)))
    before, _ = guide.encoder(z, t, text, hint, return_dict=False)
    after, middle = guide(z, t, text, hint)
    fused = range(9, 12)
    errors = {
        "controls 0-8, 12": max(slice_error(stored, f"{case}/out{k}", after[k]) for k in range(9)),
        "before fusion": max(slice_error(stored, f"{case}/before_sff{k}", before[k]) for k in fused),
        "controls 9-11": max(slice_error(stored, f"{case}/out{k}", after[k]) for k in fused),
    }
    errors["controls 0-8, 12"] = max(errors["controls 0-8, 12"], slice_error(stored, f"{case}/out12", middle))
    if case in "ac":
        whole = [after[k] - stored[f"full/out{k}"] for k in fused] + [middle - stored["full/out12"]]
        errors["controls 9-12, whole"] = max(difference.abs().max().item() for difference in whole)
    predictions = {"plain": unet(z, t, text).sample}
    for mode, name in (("only mid", "mid"), ("all", "all")):
        predictions[name] = guided_unet(unet, guide, z, t, text, hint, mode)
    return errors | {f"eps {k}": (eps - stored[f"eps_{k}"]).abs().max().item() for k, eps in predictions.items()}


def sampler_errors(unet, guide, vae, mode):
    """The authors' test-time sampling with GuidedBackbone: largest differences of latents, of decoded images.

    Ten DDIM steps and guidance 9, from a latent noised at 999 and taken for 901, down to level 0.
    """
    stored = arrays(f"vlmdiff/e2e_{mode.replace(' ', '_')}")
    stub = SimpleNamespace(config=SimpleNamespace(hidden_size=768))
    backbone = Backbone(vae, unet, stub, None, build_scheduler(), "filled")
    image = gaussian("e2e/image", (1, 3, 128, 128), 0.5)
    guided = GuidedBackbone(backbone, guide, image, mode)
    texts = [gaussian(f"context/{prompt}", (1, 77, 768)) for prompt in ("a photo of a bottle", "")]
    alphas, z = backbone.alphas_cumprod, stored["x_T"]
    noised = ddim.add_noise(stored["z"], stored["noise"], alphas[999])
    errors = [(noised - z).abs().max().item()]
    for t, latent in zip(stored["t"].flatten().tolist(), stored["latents"], strict=True):
        eps = guided.predict_noise(z, int(t), *texts, 9.0)
        z = ddim.ddim_step(z, eps, alphas[int(t)], alphas[max(0, int(t) - 100)])
        errors.append((z - latent).abs().max().item())
    mean, _ = backbone.posterior(image / 2 + 0.5)
    decoded = F.avg_pool2d(vae.decode(z / 0.18215).sample, 8)
    pictures = max((mean - stored["posterior_mean"]).abs().max(), (decoded - stored["samples_16"]).abs().max())
    return max(errors), pictures.item()


def autoencoder_errors(vae, case, shape):
    stored = arrays("vlmdiff/vae")
    posterior = vae.encode(gaussian(f"input/vae_{case}/image", shape, 0.5)).latent_dist
    found = {"mean": posterior.mean, "logvar": posterior.logvar, "decode_mean": vae.decode(posterior.mean).sample}
    return {key: (tensor - stored[f"{case}/{key}"]).abs().max().item() for key, tensor in found.items()}
