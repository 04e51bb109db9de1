"""From checkpoints with CompVis (LDM) key names, as the DiAD family releases them, to diffusers and transformers.

Every tensor of a model here asks the checkpoint for the name that the same tensor has there, so that what is missing
and what is left over are both known. Nothing depends on a width: Stable Diffusion 1.5 and small models convert alike.
The names follow from the structure of that code (`openaimodel.py`, `sgn.py`, `autoencoder.py`).
"""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file

from zsad_lib.diffusion.guidance import SETTINGS, SemanticGuide
from zsad_lib.diffusion.latent import load_backbone
from zsad_lib.errors import ModelError

# the noise schedule, a table that newer transformers rebuild, and the ResNet-50 that a validation leaves behind
NO_WEIGHTS = re.compile(
    r"betas|logvar|lvlb_weights|(sqrt_|log_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?|posterior_\w+"
    r"|cond_stage_model\..*\.position_ids|pretrained_model\..*"
)
RESNET = (
    (r"\.norm1\.", ".in_layers.0."),
    (r"\.conv1\.", ".in_layers.2."),
    (r"\.time_emb_proj\.", ".emb_layers.1."),
    (r"\.norm2\.", ".out_layers.0."),
    (r"\.conv2\.", ".out_layers.3."),
    (r"\.conv_shortcut\.", ".skip_connection."),
)
UNET = (
    (r"^time_embedding\.linear_1\.", "time_embed.0."),
    (r"^time_embedding\.linear_2\.", "time_embed.2."),
    (r"^conv_in\.", "input_blocks.0.0."),
    (r"^mid_block\.resnets\.0\.", "middle_block.0."),
    (r"^mid_block\.attentions\.0\.", "middle_block.1."),
    (r"^mid_block\.resnets\.1\.", "middle_block.2."),
    (r"^conv_norm_out\.", "out.0."),
    (r"^conv_out\.", "out.2."),
)
VAE = (
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.group_norm\.", ".norm."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".proj_out."),
    (r"\.down_blocks\.", ".down."),
    (r"\.up_blocks\.", ".up."),
    (r"\.resnets\.", ".block."),
    (r"\.(down|up)samplers\.0\.", r".\1sample."),
)


HINTS = {  # how the images are scaled that the guide was trained on
    "imagenet": {"hint_mean": (0.485, 0.456, 0.406), "hint_std": (0.229, 0.224, 0.225)},
    "symmetric": {"hint_mean": (0.5, 0.5, 0.5), "hint_std": (0.5, 0.5, 0.5)},
}


def convert_checkpoint(checkpoint, base, out, autoencoder=None, hint="imagenet", dtype=torch.float16):
    """Write a checkpoint of VLMDiff or DiAD as a folder that `guidance.load_guided` reads; the keys without a place.

    checkpoint: its file (.safetensors, or a pickle, of which only tensors are loaded). base: the pipeline it was built
    on (Stable Diffusion 1.5), as for `load_backbone`: gives the configurations, tokenizer and schedule, no weights.
    autoencoder: a file of the fine-tuned autoencoder alone, in place of the checkpoint's. hint: how the guide's
    images were scaled, "imagenet" in the authors' training or "symmetric". out: a new folder, safetensors in `dtype`.
    ModelError: an unreadable file, tensors that are missing, an `out` that is there.
    """
    if hint not in HINTS:
        raise ModelError(f"hint {hint!r} is unknown; use one of {list(HINTS)}")
    if Path(out).exists():
        raise ModelError(f"{out} is there already: choose another folder")
    from diffusers import StableDiffusionPipeline  # slow to import

    state, model = read_checkpoint(checkpoint), load_backbone(base, "cpu", torch.float32)
    guide = SemanticGuide.from_unet(model.unet, model.scale_factor.bit_length() - 1, **HINTS[hint])
    parts = {"unet": model.unet, "vae": model.vae, "text_encoder": model.text_encoder}
    unplaced = load_ldm(state, guide=guide, **parts)
    if autoencoder:
        alone = {f"{PARTS['vae'][0]}{key}": tensor for key, tensor in read_checkpoint(autoencoder).items()}
        unplaced += load_ldm(alone, vae=model.vae)
    pipeline = StableDiffusionPipeline(
        **{name: part.to(dtype) for name, part in parts.items()}, tokenizer=model.tokenizer, scheduler=model.scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(out)
    guide.to(dtype).save_pretrained(Path(out) / "guide")
    facts = {"mode": "only mid", "timesteps": len(model.alphas_cumprod), "schedule": "rebuilt",
             "converted_from": Path(checkpoint).name}  # fmt: skip
    (Path(out) / SETTINGS).write_text(json.dumps(facts, indent=1) + "\n")
    return unplaced


def read_checkpoint(path):
    """The tensors of a checkpoint file by name, "state_dict" unpacked. Code in a pickle is never run (weights_only).

    ModelError when the file is missing, or holds anything but tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"no checkpoint file at {path}")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise ModelError(f"{path} cannot be read as tensors alone, and no code in it is run: {reason}") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    state = {key: tensor for key, tensor in state.items() if isinstance(tensor, torch.Tensor)}
    if not state:
        raise ModelError(f"{path} holds no tensors by name")
    return state


def load_ldm(state, **models):
    """Fill models in place from a checkpoint's state dict (flat, or nested under "state_dict").

    models: any of unet (UNet2DConditionModel), guide (SemanticGuide), vae (AutoencoderKL) and text_encoder
    (CLIPTextModel), built with the checkpoint's configuration. Returns the keys of the checkpoint that found no place:
    unknown ones, and all of the parts not asked for; noise schedules are left aside. ModelError names the tensors
    that a model needs and the checkpoint lacks, or has in another shape; then no model is changed.
    """
    state = state.get("state_dict", state)
    names = {part: ldm_names(part, model) for part, model in models.items()}
    filled = {part: _collect(state, names[part], model) for part, model in models.items()}
    wrong = [names[part][name] for part, found in filled.items() for name in found if found[name] is None]
    if wrong:
        raise ModelError(
            f"{len(wrong)} tensors are missing in the checkpoint, or have another shape there: {', '.join(wrong[:4])}"
            f"{' ...' if len(wrong) > 4 else ''}. Build the models with the checkpoint's own configuration"
        )
    for part, model in models.items():
        model.load_state_dict(filled[part])
    placed = {key for part in names.values() for key in part.values()}
    return sorted(key for key in state if key not in placed and not NO_WEIGHTS.fullmatch(key))


def ldm_names(part, model):
    """{name of a tensor of the model: its name in a CompVis checkpoint}. part: "unet", "guide", "vae" or
    "text_encoder", the kind of the model. ModelError on any other."""
    if part not in PARTS:
        raise ModelError(f"{part!r} is no part of a checkpoint; use one of {list(PARTS)}")
    prefix, name_of = PARTS[part]
    return {name: prefix + name_of(name, model) for name in model.state_dict()}


def _collect(state, names, model):
    """{name: the checkpoint's tensor, None where it is missing or does not fit}."""
    return {name: _fitting(state.get(names[name]), tensor.shape) for name, tensor in model.state_dict().items()}


def _fitting(tensor, shape):
    if tensor is not None and tensor.shape == (*shape, 1, 1):  # attention written as 1x1 convolutions
        tensor = tensor[:, :, 0, 0]
    return tensor if tensor is not None and tensor.shape == shape else None


def _renamed(name, rules):
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _unet_name(name, model):
    config, step = model.config, model.config.layers_per_block + 1  # input and output blocks of a level
    if ".resnets." in name:  # an attention block has norms of the same names
        name = _renamed(name, RESNET)
    block = re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name)
    if not block:
        return _renamed(name, UNET)
    way, level, kind, k, rest = block[1], int(block[2]), block[3], int(block[4]), block[5]
    if kind == "downsamplers":
        return f"input_blocks.{(level + 1) * step}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"output_blocks.{(level + 1) * step - 1}.{1 + ('Attn' in config.up_block_types[level])}.{rest}"
    place = f"input_blocks.{1 + level * step + k}" if way == "down" else f"output_blocks.{level * step + k}"
    return f"{place}.{('resnets', 'attentions').index(kind)}.{rest}"


def _guide_name(name, guide):
    part, _, rest = name.partition(".")
    if part == "fusion":
        _, i, j, _ = rest.split(".")
        return f"down{int(i) + 1}{int(j) + 1}.0.weight"
    if part == "hint":  # every second module of the stack is an activation
        last = 2 * (len(guide.hint.blocks) + 1)
        rest = re.sub(r"^blocks\.(\d+)\.", lambda block: f"{2 * (int(block[1]) + 1)}.", rest)
        return "input_hint_block." + rest.replace("conv_in.", "0.").replace("conv_out.", f"{last}.")
    rest = re.sub(r"^controlnet_down_blocks\.(\d+)\.", r"zero_convs.\1.0.", rest)
    rest = re.sub(r"^controlnet_mid_block\.", "middle_block_out.0.", rest)
    return _unet_name(rest, guide.encoder)


def _vae_name(name, vae):
    last = len(vae.config.block_out_channels) - 1  # the decoder's levels are counted from the image
    name = re.sub(r"\.up_blocks\.(\d+)\.", lambda level: f".up_blocks.{last - int(level[1])}.", name)
    return _renamed(name, VAE)


def _text_name(name, _):
    return name.removeprefix("text_model.")  # transformers has it, or not, by version


PARTS = {
    "unet": ("model.diffusion_model.", _unet_name),
    "guide": ("control_model.", _guide_name),
    "vae": ("first_stage_model.", _vae_name),
    "text_encoder": ("cond_stage_model.transformer.text_model.", _text_name),
}
