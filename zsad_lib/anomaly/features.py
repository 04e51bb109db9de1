"""What images are compared by: layers of a pretrained vision network, of a diffusion U-Net, or bare colours."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from zsad_lib.anomaly.resize import resize
from zsad_lib.diffusion import ddim
from zsad_lib.diffusion.latent import Backbone, load_backbone
from zsad_lib.diffusion.loading import (
    CONTROL_NAMES,
    RANDOM_SEED,
    Location,
    check_control,
    configuration,
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
KINDS = ("vit", "dinov2", "resnet")


@dataclass
class FeatureExtractor:
    """Callable: images float32 RGB [B,3,H,W] in [0,1] -> list of features [B,C,h,w], one entry a layer.

    It resizes the whole image, never cropping (bilinear, antialiased), and normalises it.
    """

    forward: Callable[[Tensor], list[Tensor]]
    name: str
    size: int | None  # the input in pixels; None: the images as they are
    mean: tuple = (0.0, 0.0, 0.0)
    std: tuple = (1.0, 1.0, 1.0)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    config: dict = field(default_factory=dict)  # JSON-able: what changes the features
    control: str | None = None  # what is random: "all", or of a pipeline its "unet"

    def __call__(self, images: Tensor) -> list[Tensor]:
        images = images.to(self.device, torch.float32)
        images = images if self.size is None else resize(images, self.size)
        mean, std = (images.new_tensor(values).view(1, 3, 1, 1) for values in (self.mean, self.std))
        return self.forward((images - mean) / std)


def load_features(
    name_or_path: str | Path,
    device: str | torch.device = "auto",
    size: int | None = None,  # the input in pixels; None: 256 for the two short names, else as the files say
    layers: Sequence[int] | None = None,  # of a ResNet: its stages, 1 to 4; None: the last three
    random_weights: str | None = None,  # "all": freshly initialised networks, always alike: a control
) -> FeatureExtractor:
    """Read a vision model of transformers (ViT, DINOv2 or ResNet), or make features without one.

    name_or_path: a folder, a checkpoint of data_manifest.yaml, a hub id; "pixels", the bare colours; "unet:MODEL", the
    decoder of that pipeline's U-Net; or several joined by "+". A ViT gives its last layer's patch tokens as a grid.
    """
    check_control(random_weights, (None, "all"))
    device, name = pick_device(device), str(name_or_path)
    if "+" in name:
        return _joined([load_features(part, device, size, layers, random_weights) for part in name.split("+")], device)
    if name == "pixels":
        return FeatureExtractor(_pixels, name, size, device=device, config={"name": name, "size": size})
    if name.startswith("unet:"):
        model = load_backbone(name.removeprefix("unet:"), device, random_weights=random_weights and "unet")
        return _unet_features(model, size or model.image_size)
    where = locate(name, FEATURE_FILES, "transformers vision model")
    return _network_features(where, device, size, layers, random_weights)


def _pixels(images: Tensor) -> list[Tensor]:
    """R, G, B and a constant 1: the cosine of bare colours would not see brightness."""
    return [torch.cat([images, torch.ones_like(images[:, :1])], dim=1)]


def _joined(parts: list[FeatureExtractor], device: torch.device) -> FeatureExtractor:
    configs = [part.config for part in parts]
    return FeatureExtractor(
        lambda images: [layer for part in parts for layer in part(images)],
        "+".join(part.name for part in parts),
        None,
        device=device,
        config={"name": "+".join(config["name"] for config in configs), "parts": configs},
        control=next((part.control for part in parts if part.control), None),
    )


def _unet_features(backbone: Backbone, size: int, t: int = 101) -> FeatureExtractor:
    """The outputs of all but the last block of the U-Net's decoder, for images noised to t, without text.

    The noise is the same for all (DIFT averages several: Tang et al., "Emergent Correspondence from Image Diffusion",
    2023).
    """
    noise = torch.randn(backbone.latent_shape, generator=torch.Generator().manual_seed(RANDOM_SEED))

    def forward(images: Tensor) -> list[Tensor]:
        z = backbone.encode(images)
        z = ddim.add_noise(z, noise.to(z), backbone.alphas_cumprod[t])
        layers, blocks = [], backbone.unet.up_blocks[:-1]
        hooks = [block.register_forward_hook(lambda _, __, out: layers.append(out.float())) for block in blocks]
        try:
            backbone.predict_noise(z, t, backbone.embed([""]).expand(len(z), -1, -1))
        finally:
            for hook in hooks:
                hook.remove()
        return layers

    weights = fingerprint(backbone.vae, backbone.unet)
    config = {"name": f"unet:{backbone.label}", "size": size, "weights": weights, "backbone": backbone.config}
    name, control = f"unet:{backbone.name}", backbone.control
    return FeatureExtractor(forward, name, size, device=backbone.device, config=config, control=control)


def _network_features(
    where: Location, device: torch.device, size: int | None, layers: Sequence[int] | None, random_weights: str | None
) -> FeatureExtractor:
    from transformers.utils import cached_file

    model, kind = _read_network(where, random_weights)
    model = model.to(device).eval().requires_grad_(False)
    own_size, mean, std = preprocessing(fetch(where, None, cached_file, "preprocessor_config.json"))
    size = size or FEATURE_SIZES.get(where.name) or own_size
    if kind == "resnet":
        stages = len(model.config.depths)
        layers = list(layers or range(max(1, stages - 2), stages + 1))
        if not all(1 <= layer <= stages for layer in layers):
            raise ModelError(f"{where.name} has stages 1 to {stages}, not {layers}")

        def forward(images: Tensor) -> list[Tensor]:
            states = model(images, output_hidden_states=True).hidden_states  # [0] is the stem
            return [states[layer] for layer in layers]

    else:
        if layers is not None:
            raise ModelError(f"{where.name} is a {kind!r} model: its last layer is used, `layers` is for ResNets")
        if size % model.config.patch_size:
            raise ModelError(f"{where.name}: input size {size} is no multiple of its patch {model.config.patch_size}")
        options = {"interpolate_pos_encoding": True} if kind == "vit" else {}  # DINOv2 always interpolates

        def forward(images: Tensor) -> list[Tensor]:
            grid = [side // model.config.patch_size for side in images.shape[-2:]]
            tokens = model(images, **options).last_hidden_state[:, 1:]  # without CLS
            return [tokens.transpose(1, 2).unflatten(2, grid)]

    name = where.name + CONTROL_NAMES[random_weights]
    config = {"name": name, "size": size, "layers": layers, "weights": fingerprint(model)}
    config |= {"configuration": configuration(model), "mean": list(mean), "std": list(std)}
    return FeatureExtractor(forward, where.name, size, mean, std, device, config, random_weights)


def _read_network(where: Location, random_weights: str | None) -> tuple[nn.Module, str]:
    from transformers import AutoConfig, AutoModel

    kind = fetch(where, None, AutoConfig.from_pretrained, trust_remote_code=False).model_type
    if kind not in KINDS:
        raise ModelError(f"{where.name} is a {kind!r} model; features come from those of {', '.join(KINDS)}")
    options = {"add_pooling_layer": False} if kind == "vit" else {}  # DINO's files have no pooler
    model = read_weights(where, None, AutoModel, True, dtype=torch.float32, trust_remote_code=False, **options)
    return (reinitialised(model, type(model), **options) if random_weights else model), kind
