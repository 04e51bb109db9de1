"""zsad_lib.anomaly.features"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from zsad_lib.diffusion.latent import load_backbone
from zsad_lib.diffusion.loading import (
    RANDOM_SEED,
    fetch,
    fingerprint,
    locate,
    pick_device,
    preprocessing,
    read_weights,
    reinitialised,
)
from zsad_lib.errors import ModelError

FEATURE_FILES = ("config.json", "preprocessor_config.json")


FEATURE_SIZES = {"dino_vits8": 256, "resnet50": 256}  # DIVAD's input, larger than the files' own 224


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
    `random_weights` "all" re-initialises the networks: a control. ModelError as for `load_backbone`.
    """
    if random_weights not in (None, "all"):
        raise ModelError(f"random_weights {random_weights!r} of features is unknown; use None or 'all'")
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
        raise ModelError(f"{where.name} is a {kind!r} model; features come from 'vit', 'dinov2' or 'resnet' models")
    if kind != "resnet" and layers is not None:
        raise ModelError(f"{where.name} is a {kind!r} model: its last layer is used, `layers` is for ResNets")
    options = {"add_pooling_layer": False} if kind == "vit" else {}  # DINO's files have no pooler
    model = read_weights(where, None, AutoModel, True, dtype=torch.float32, trust_remote_code=False, **options)
    if random_weights:
        model = reinitialised(model, type(model), **options)
    model = model.to(device).eval().requires_grad_(False)
    own_size, mean, std = preprocessing(fetch(where, None, cached_file, "preprocessor_config.json"))
    size = size or FEATURE_SIZES.get(where.name) or own_size
    if kind == "resnet":
        stages = len(model.config.depths)
        layers = tuple(layers or range(max(1, stages - 2), stages + 1))
        if not all(1 <= layer <= stages for layer in layers):
            raise ModelError(f"{where.name} has stages 1 to {stages}, not {list(layers)}")
        forward = _resnet_stages(model, layers)
    else:
        forward = _patch_tokens(model, kind)
        if size % model.config.patch_size:
            raise ModelError(f"{where.name}: input size {size} is no multiple of its patch {model.config.patch_size}")
    name = where.name + (" (random weights)" if random_weights else "")
    config = {"name": name, "size": size, "layers": layers and list(layers), "weights": fingerprint(model)}
    return FeatureExtractor(forward, name, size, mean, std, device, config)


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
