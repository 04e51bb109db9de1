"""The names of a CompVis (LDM) checkpoint, written from `openaimodel.py`, `sgn.py` and `autoencoder.py`."""

import re

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
