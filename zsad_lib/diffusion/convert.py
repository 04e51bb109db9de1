"""From checkpoints with CompVis (LDM) key names, as the DiAD family releases them, to diffusers and transformers.

diffusers knows these names (`loaders.single_file_utils`), all but those of DiAD's feature fusion (`sgn.py`). It is
given names alone, so that what a model lacks and what is left over are both known.
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from diffusers.loaders.single_file_utils import (
    LDM_UNET_KEY,
    convert_controlnet_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from safetensors.torch import load_file
from torch import Tensor, nn

from zsad_lib import store
from zsad_lib.diffusion.guidance import SETTINGS, SemanticGuide
from zsad_lib.diffusion.latent import load_backbone, save_pipeline
from zsad_lib.errors import ModelError

# the noise schedule, a table that newer transformers rebuild, and the ResNet-50 that a validation leaves behind
NO_WEIGHTS = re.compile(
    r"betas|logvar|lvlb_weights|(sqrt_|log_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?|posterior_\w+"
    r"|cond_stage_model\..*\.position_ids|pretrained_model\..*"
)
PREFIXES = {
    "unet": LDM_UNET_KEY,
    "guide": "control_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.transformer.text_model.",
}
HINTS = {  # how the images are scaled that the guide was trained on
    "imagenet": {"hint_mean": (0.485, 0.456, 0.406), "hint_std": (0.229, 0.224, 0.225)},
    "symmetric": {"hint_mean": (0.5, 0.5, 0.5), "hint_std": (0.5, 0.5, 0.5)},
}


def convert_checkpoint(
    checkpoint: str | Path,
    base: str | Path,  # the pipeline it was built on: gives configurations, tokenizer and schedule, no weights
    out: str | Path,  # a new folder, complete or absent
    autoencoder: str | Path | None = None,  # a file of the fine-tuned autoencoder alone, in place of the checkpoint's
    hint: str = "imagenet",  # how the guide's images were scaled: "imagenet" in the authors' training, or "symmetric"
    dtype: torch.dtype = torch.float16,  # of the files written
) -> list[str]:
    """Write a checkpoint of VLMDiff or DiAD as a folder that `load_guided` reads; the keys that found no place."""
    if hint not in HINTS:
        raise ModelError(f"hint {hint!r} is unknown; use one of {list(HINTS)}")
    check_new(out)
    state, model = read_checkpoint(checkpoint), load_backbone(base, "cpu", torch.float32)
    guide = SemanticGuide.from_unet(model.unet, model.scale_factor.bit_length() - 1, **HINTS[hint])
    unplaced = load_ldm(state, guide=guide, unet=model.unet, vae=model.vae, text_encoder=model.text_encoder)
    if autoencoder:
        alone = {f"{PREFIXES['vae']}{key}": tensor for key, tensor in read_checkpoint(autoencoder).items()}
        unplaced += load_ldm(alone, vae=model.vae)
    parts = (model.vae, model.text_encoder, model.tokenizer, model.unet, model.scheduler)
    facts = {"mode": "only mid", "timesteps": len(model.alphas_cumprod), "schedule": "rebuilt",
             "converted_from": Path(checkpoint).name}  # fmt: skip
    with store.writing_folder(out) as new:
        save_pipeline(new, *parts, dtype)
        guide.to(dtype).save_pretrained(new / "guide")
        store.write_json(new / SETTINGS, facts)
    return unplaced


def check_new(out: str | Path) -> None:
    """Whether nothing is at `out` yet but an empty folder."""
    out = Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ModelError(f"{out} is there already: choose another folder")


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint file by name, "state_dict" unpacked. Code in a pickle is never run (weights_only)."""
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"no checkpoint file at {path}")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise ModelError(f"{path} cannot be read as tensors alone, and no code in it is run: {reason}") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    state = {key: tensor for key, tensor in state.items() if isinstance(tensor, Tensor)}
    if not state:
        raise ModelError(f"{path} holds no tensors by name")
    return state


def load_ldm(state: dict[str, Tensor], **models: nn.Module) -> list[str]:
    """Fill all models from a checkpoint's tensors, or none; the keys that found no place, noise schedules aside.

    models: any of unet (UNet2DConditionModel), guide (SemanticGuide), vae (AutoencoderKL) and text_encoder
    (CLIPTextModel), built with the checkpoint's configuration.
    """
    names = {part: ldm_names(part, model, state) for part, model in models.items()}
    tensors = {part: {name: state[key] for name, key in found.items()} for part, found in names.items()}
    filled = {part: fitting(model, tensors[part]) for part, model in models.items()}
    for part, model in models.items():
        model.load_state_dict(filled[part])
    placed = {key for found in names.values() for key in found.values()}
    return sorted(key for key in state if key not in placed and not NO_WEIGHTS.fullmatch(key))


def fitting(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by their names in the model, all of them, in its shapes: attention may be 1x1 convolutions."""
    own = model.state_dict()
    wrong = [name for name in own if name not in tensors or tensors[name].squeeze().shape != own[name].squeeze().shape]
    if wrong:
        raise ModelError(
            f"{len(wrong)} tensors of the {type(model).__name__} are missing in the checkpoint, or have another shape "
            f"there: {', '.join(wrong[:4])}{' ...' if len(wrong) > 4 else ''}. Build it as the checkpoint's was built"
        )
    return {name: tensors[name].reshape(tensor.shape) for name, tensor in own.items()}


# --- names


class Key(str):
    """A tensor's name in the checkpoint, handed to diffusers in the tensor's place, whose shape it asks for."""

    shape = ()


def ldm_names(part: str, model: nn.Module, keys: Iterable[str]) -> dict[str, str]:
    """{name of a tensor of the model: its key}, of those among the keys of a CompVis checkpoint."""
    if part not in PREFIXES:
        raise ModelError(f"{part!r} is no part of a checkpoint; use one of {list(PREFIXES)}")
    prefix = PREFIXES[part]
    keys = {key.removeprefix(prefix): Key(key) for key in keys if key.startswith(prefix)}
    names = NAMES[part](keys, model)
    return {name: str(names[name]) for name in model.state_dict() if names.get(name)}


def unet_names(keys: dict[str, Key], unet: nn.Module) -> dict[str, Key]:
    """The keys of a U-Net as OpenAI and CompVis name them, by their names in a diffusers model."""
    prefixed = {LDM_UNET_KEY + key: value for key, value in keys.items()}
    return _renamed(convert_ldm_unet_checkpoint, prefixed, {"layers_per_block": unet.config.layers_per_block})


def _guide_names(keys: dict[str, Key], guide: SemanticGuide) -> dict[str, Key]:
    """A ControlNet's names, its embedding of images ending at 14 as with three downsamplings, and the fusion's."""
    last = f"input_hint_block.{2 * (len(guide.hint.blocks) + 1)}."
    control = {key.replace(last, "input_hint_block.14."): value for key, value in keys.items()}
    names = _renamed(convert_controlnet_checkpoint, control, guide.encoder.config)
    names = {f"encoder.{name}".replace("encoder.controlnet_cond_embedding", "hint"): names[name] for name in names}
    for key in keys:
        if skips := re.fullmatch(r"down(\d)(\d)\.0\.weight", key):
            names[f"fusion.down.{int(skips[1]) - 1}.{int(skips[2]) - 1}.weight"] = keys[key]
    return names


def _renamed(convert: Callable, keys: dict[str, Key], config: dict) -> dict[str, Key]:
    try:
        return convert(keys, config)
    except KeyError as error:  # it takes an upsampler's bias to be there
        raise ModelError(f"the checkpoint lacks {error.args[0]}") from error


NAMES = {
    "unet": unet_names,
    "guide": _guide_names,
    "vae": lambda keys, vae: _renamed(convert_ldm_vae_checkpoint, keys, vae.config),
    # with and without the prefix: it is there or not by transformers' version
    "text_encoder": lambda keys, _: keys | {f"text_model.{key}": value for key, value in keys.items()},
}
