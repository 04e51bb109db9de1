"""The semantic-guided (SG) network of DZAD: a copy of a U-Net's encoder that looks at the image itself.

DZAD (AAAI 2025), eq. 9 and Fig. 1, takes the network from DiAD (He et al., AAAI 2024), whose code VLMDiff shares; this
one computes what that code computes (`sgn.py`), for any U-Net of the Stable Diffusion kind. It is a ControlNet, given
the noisy latent plus the embedded image; its own part is the semantic feature fusion (SFF) of the deepest skips.

Of a U-Net with L levels of n layers, skip 0 leaves the first convolution, and each level adds its n layers and then its
downsampling: L·(n + 1) skips, n + 1 at every resolution (Stable Diffusion 1.5: twelve, 0 … 11).
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ControlNetModel, ModelMixin
from diffusers.configuration_utils import register_to_config
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from zsad_lib import store
from zsad_lib.diffusion.latent import EXTENSIONS, Backbone, extend_schedule, load_backbone
from zsad_lib.diffusion.loading import (
    Location,
    check_numbers,
    configuration,
    control_seed,
    fetch,
    fingerprint,
    locate,
    read_object,
    read_weights,
)
from zsad_lib.errors import ModelError
from zsad_lib.settings import check_value

# "all" adds every skip; "only mid", what the authors train and test with, the middle and the fused deepest skips, which
# the first decoder level reads: the other skips then act through the fusion alone
MODES = ("only mid", "all")
INITIALISATIONS = ("published", "trainable")
HINT_CHANNELS = (16, 32, 96, 256)  # of the image embedding, one more at each halving
TRAINED = ("up_blocks.", "conv_norm_out.", "conv_out.")  # of the U-Net: its decoder and its output
SETTINGS, DECODER = "guided.json", "decoder/diffusion_pytorch_model.safetensors"  # of a trained pair
NORM_EPS = 1e-5  # of the fusion's instance norm


class FeatureFusion(nn.Module):
    """SFF: the skips of the deepest resolution take in those of the resolution above (DiAD).

    For each deepest skip o_j: SiLU(o_j + Σ_i SiLU(IN(down_ij(o_i)))), the sum over all skips i of the next resolution,
    down_ij a 3x3 convolution of stride 2 without bias, IN an instance norm without parameters. Stable Diffusion 1.5:
    skips 6, 7, 8 into 9, 10, 11, as published.

    `initialisation` of down: "published" is zero; "trainable" is random and small, with standard deviation
    √(1e-5 / fan-in): around zero the instance norm amplifies by 1/√1e-5, so that a branch starts with a slope of one.
    Either way a fusion of zeros is zero.
    """

    def __init__(self, sources: list[int], targets: list[int], initialisation: str):  # channels of the two groups
        super().__init__()
        self.down = nn.ModuleList(
            nn.ModuleList(nn.Conv2d(i, j, 3, stride=2, padding=1, bias=False) for j in targets) for i in sources
        )
        for convolution in (convolution for row in self.down for convolution in row):
            if initialisation == "published":
                nn.init.zeros_(convolution.weight)
            else:
                nn.init.normal_(convolution.weight, std=(NORM_EPS / convolution.weight[0].numel()) ** 0.5)

    def forward(self, skips: list[Tensor]) -> list[Tensor]:
        """All skips, list of [B,C,h,w] -> the same list with the deepest ones fused."""
        first = len(skips) - len(self.down[0])
        sources, targets = skips[first - len(self.down) : first], skips[first:]
        if targets[0].shape[-2:].numel() == 1:
            raise ModelError("the deepest feature maps have one pixel, which no instance norm takes: larger images")
        fused = []
        for j, target in enumerate(targets):
            branches = (row[j](source) for row, source in zip(self.down, sources, strict=True))
            fused.append(F.silu(target + sum(F.silu(F.instance_norm(b, eps=NORM_EPS)) for b in branches)))
        return [*skips[:first], *fused]


class SemanticGuide(ModelMixin, ConfigMixin):
    """The SG network beside one U-Net: `from_unet` makes it, `save_pretrained` writes it.

    "published" never trains the fusion in "only mid" mode: it multiplies zeros with zeros, and both get exactly no
    gradient. "trainable" does, or "all" mode, where the shallow skips have a gradient of their own.
    """

    @register_to_config
    def __init__(
        self,
        encoder_config: dict,  # of a diffusers ControlNetModel
        initialisation: str = "trainable",  # of the fusion
        hint_mean: tuple = (0.5, 0.5, 0.5),  # scales images in [0,1] before they are embedded: to [-1,1], as for
        hint_std: tuple = (0.5, 0.5, 0.5),  # the autoencoder
        hint_pixels: int | None = None,  # images are averaged to so many a side: they show the product, not its damage
    ):
        super().__init__()
        if initialisation not in INITIALISATIONS:
            raise ModelError(f"initialisation {initialisation!r} is unknown; use one of {list(INITIALISATIONS)}")
        self.encoder = ControlNetModel.from_config(encoder_config)
        # apart from the encoder, so that one embedding serves every timestep
        self.hint, self.encoder.controlnet_cond_embedding = self.encoder.controlnet_cond_embedding, nn.Identity()
        self.fusion = FeatureFusion(*_fused_channels(self.encoder.config), initialisation)

    @classmethod
    def from_unet(
        cls, unet: Any, downsamplings: int = 3, initialisation: str = "trainable", **hint: Any
    ) -> "SemanticGuide":
        """A guide for a UNet2DConditionModel, its encoder a copy of the U-Net's, without influence until trained.

        downsamplings: halvings from image to latent, log2(backbone.scale_factor): 3 for Stable Diffusion. hint:
        hint_mean, hint_std and hint_pixels of the guide.
        """
        if not isinstance(unet.config.layers_per_block, int):
            raise ModelError(f"a U-Net with {unet.config.layers_per_block} layers has no guide: one number for all")
        channels = HINT_CHANNELS + HINT_CHANNELS[-1:] * max(0, downsamplings - 3)
        with torch.device("meta"):  # only its configuration is wanted
            encoder = ControlNetModel.from_unet(
                unet, conditioning_embedding_out_channels=channels[: downsamplings + 1], load_weights_from_unet=False
            ).config
        guide = cls({key: value for key, value in encoder.items() if key[0] != "_"}, initialisation, **hint)
        for part in ("conv_in", "time_embedding", "down_blocks", "mid_block"):
            getattr(guide.encoder, part).load_state_dict(getattr(unet, part).state_dict())
        return guide.to(unet.device)

    def embed(self, images: Tensor) -> Tensor:
        """Images float32 [B,3,H,W] in [0,1] -> their embedding [B,C,h,w] at latent resolution, for `forward`."""
        if self.config.hint_pixels:
            coarse = F.adaptive_avg_pool2d(images, self.config.hint_pixels)
            images = F.interpolate(coarse, images.shape[-2:], mode="bilinear", align_corners=False)
        mean, std = (images.new_tensor(v).view(1, 3, 1, 1) for v in (self.config.hint_mean, self.config.hint_std))
        return self.hint(((images - mean) / std).to(self.device, self.dtype))

    def forward(self, z: Tensor, timesteps: Tensor | int, text: Tensor, hint: Tensor) -> tuple[list[Tensor], Tensor]:
        """What to add to the U-Net: (list of skips, each [B,C,h,w], middle [B,C,h,w]).

        z [B,C,h,w], timesteps (int or [B]), text [B,L,D] as for the U-Net; hint: `embed` of the images.
        """
        if hint.shape[-2:] != z.shape[-2:]:
            expected, given = ("x".join(map(str, tensor.shape[-2:])) for tensor in (z, hint))
            halvings = len(self.hint.blocks) // 2
            raise ModelError(
                f"the latents are {expected}, the embedded images {given}, after {halvings} downsamplings: make the "
                "guide with downsamplings=log2(backbone.scale_factor), or give images of the latents' size"
            )
        skips, middle = self.encoder(z, timesteps, text, hint, return_dict=False)
        return self.fusion(list(skips)), middle


def _fused_channels(config: dict) -> tuple[list[int], list[int]]:
    """Channels of the skips that the fusion reads, and of those it changes: the last two resolutions."""
    widths, layers = config["block_out_channels"], config["layers_per_block"]
    if len(widths) < 2:
        raise ModelError("a U-Net with one level has no deeper skips to fuse into; two levels are the least")
    levels = [[before] + [width] * layers for before, width in zip((widths[0], *widths), widths, strict=False)]
    return levels[-2], levels[-1]


def _read_guide(where: Location, backbone: Backbone) -> SemanticGuide:
    """The guide of a folder, frozen on the backbone's device, once it is known to be of its U-Net's shape."""
    guide = read_weights(where, "guide", SemanticGuide, torch_dtype=backbone.dtype)
    for key in ("in_channels", "block_out_channels", "layers_per_block", "cross_attention_dim"):
        own, needed = (config[key] for config in (guide.encoder.config, backbone.unet.config))
        if json.dumps(own) != json.dumps(needed):  # a tuple is a list once it was saved
            raise ModelError(f"{where.name} guides a U-Net with {key} {own}; that of {backbone.name} has {needed}")
    return guide.to(backbone.device).eval().requires_grad_(False)


@dataclass
class GuidedModel:
    """A backbone with its guide, for any images."""

    backbone: Backbone
    guide: SemanticGuide
    mode: str = MODES[0]
    facts: dict = field(default_factory=dict)  # how they were trained

    @property
    def config(self) -> dict:
        """JSON-able: what changes a method's numbers."""
        own = {"guide": fingerprint(self.guide), "guide_configuration": configuration(self.guide), "mode": self.mode}
        return self.backbone.config | own

    def condition_on(self, images: Tensor) -> "GuidedBackbone":
        """The noise prediction for these images [B,3,H,W] in [0,1]."""
        return GuidedBackbone(self.backbone, self.guide, images, self.mode)


def save_guided(folder: str | Path, unet: Any, guide: SemanticGuide, facts: dict) -> None:
    """Write what `trainable_parameters` let train, and nothing else: folder/guide and folder/decoder.

    unet: None where only the guide was trained. facts: for folder/guided.json; "base" names the backbone whose frozen
    parts belong to it, "mode" how it was trained.
    """
    folder, facts = Path(folder), facts | {"decoder": unet is not None}
    guide.save_pretrained(folder / "guide")
    if unet is not None:
        (folder / "decoder").mkdir()
        decoder = {name: tensor.contiguous() for name, tensor in unet.state_dict().items() if name.startswith(TRAINED)}
        save_file(decoder, folder / DECODER)
    store.write_json(folder / SETTINGS, facts)


def load_guided(
    name_or_path: str | Path,  # a folder, a checkpoint of data_manifest.yaml or a hub id
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    base: str | Path | None = None,  # in place of the backbone that the settings name
    random_weights: str | None = None,  # as for `load_backbone`; the guide is then a new one, without influence
) -> GuidedModel:
    """Read a trained pair, frozen, with its schedule: of `save_guided`, or a guide in a StableDiffusionPipeline."""
    from transformers.utils import cached_file

    where = locate(name_or_path, (SETTINGS, "guide/config.json"), "semantic guidance")
    facts = _read_facts(fetch(where, None, cached_file, SETTINGS))
    base = base or facts.get("base")
    backbone = load_backbone(base or name_or_path, device, dtype, random_weights)
    backbone.scheduler = extend_schedule(backbone.scheduler, facts["timesteps"], facts["schedule"])
    if random_weights:
        with control_seed():  # or a control's record would never recur
            guide = SemanticGuide.from_unet(backbone.unet, backbone.scale_factor.bit_length() - 1)
        return GuidedModel(backbone, guide.requires_grad_(False).eval(), facts["mode"], facts)
    if base and facts.get("decoder") is not False:
        decoder = fetch(where, None, lambda *args, **kw: load_file(cached_file(*args, **kw)), DECODER)
        check_numbers(f"{where.source}/{DECODER}", decoder)
        expected = {key: t.shape for key, t in backbone.unet.state_dict().items() if key.startswith(TRAINED)}
        if expected != {key: t.shape for key, t in decoder.items()}:
            raise ModelError(
                f"the decoder of {where.name} does not fit the U-Net of {backbone.name}: give the base it is for"
            )
        backbone.unet.load_state_dict(decoder, strict=False)
    if base:
        backbone.name = where.name
    return GuidedModel(backbone, _read_guide(where, backbone), facts["mode"], facts)


def _read_facts(path):
    """The settings of a trained pair, those that are used of the right kind."""
    facts = read_object(path)
    known = {"timesteps": int, "schedule": Literal[EXTENSIONS], "mode": Literal[MODES], "base": str | None}
    known["decoder"] = bool | None  # without it there is one
    for key, kind in known.items():
        check_value(f"{path}: {key}", facts.get(key), kind, ModelError)
    return facts


def load_guided_or_plain(
    name_or_path: str | Path, device: str | torch.device = "auto", random_weights: str | None = None
) -> GuidedModel | Backbone:
    """`load_guided` of a folder that has a guide, `load_backbone` of any other model (a hub id among them)."""
    where = locate(name_or_path, (), "model")
    guided = where.local and os.path.isfile(Path(where.source) / SETTINGS)  # False where it may not be read
    return (load_guided if guided else load_backbone)(name_or_path, device, random_weights=random_weights)


def guided_unet(
    unet: Any,
    guide: SemanticGuide,
    z: Tensor,
    timesteps: Tensor | int,
    text: Tensor,
    hint: Tensor,
    mode: str = MODES[0],
) -> Tensor:
    """What the U-Net predicts, [B,C,h,w], with the guide's results added to its middle and skips (eq. 9).

    Tensors as for `SemanticGuide.forward`.
    """
    _check_mode(mode)
    skips, middle = guide(z.to(guide.dtype), timesteps, text.to(guide.dtype), hint)
    if mode == "only mid":
        deepest = len(skips) - len(guide.fusion.down[0])
        skips = [torch.zeros_like(skip) if k < deepest else skip for k, skip in enumerate(skips)]
    skips, middle = [skip.to(z.dtype) for skip in skips], middle.to(z.dtype)
    residuals = {"down_block_additional_residuals": skips, "mid_block_additional_residual": middle}
    return unet(z, timesteps, text, **residuals).sample


def _check_mode(mode: str) -> None:
    if mode not in MODES:
        raise ModelError(f"guidance mode {mode!r} is unknown; use one of {list(MODES)}")


def trainable_parameters(unet: Any, guide: SemanticGuide, decoder: bool = True) -> list[nn.Parameter]:
    """What DZAD trains: the guide, and of the U-Net its decoder and output (TRAINED). The rest is frozen by this.

    decoder: False freezes that, too, and the U-Net forgets nothing.
    """
    guide.requires_grad_(True)
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(decoder and name.startswith(TRAINED))
    return [parameter for model in (guide, unet) for parameter in model.parameters() if parameter.requires_grad]


def gradient_norms(
    unet: Any,
    guide: SemanticGuide,
    z: Tensor,
    timesteps: Tensor,
    text: Tensor,
    images: Tensor,
    noise: Tensor,
    mode: str = MODES[0],
    steps: int = 2,
    lr: float = 1e-3,
) -> list[dict[str, float]]:
    """How large the gradients of the guide's parts are in the first training steps (eq. 8): a list of {part: norm}.

    z [B,C,h,w]: latents noised to `timesteps` with `noise`; text [B,L,D]; images [B,3,H,W] in [0,1]. Both models are
    trained by it: give copies.
    """
    optimizer = torch.optim.AdamW(trainable_parameters(unet, guide), lr=lr)
    outputs = guide.encoder.controlnet_down_blocks
    first = len(outputs) - len(guide.fusion.down[0])
    parts = {
        "fusion": guide.fusion,
        "feeding": outputs[first - len(guide.fusion.down) : first],  # zero convolutions of the skips that it reads
        "deepest": outputs[first:],  # and of those that it changes
        "middle": guide.encoder.controlnet_mid_block,
    }
    norms = []
    for _ in range(steps):
        optimizer.zero_grad()
        out = guided_unet(unet, guide, z, timesteps, text, guide.embed(images), mode)
        (out - noise).square().mean().backward()
        squares = {name: [(p.grad**2).sum().item() for p in part.parameters()] for name, part in parts.items()}
        norms.append({name: sum(values) ** 0.5 for name, values in squares.items()})
        optimizer.step()
    return norms


@dataclass
class GuidedBackbone:
    """A backbone's noise prediction for known images: `Backbone.predict_noise` with what the guide sees in them."""

    backbone: Backbone
    guide: SemanticGuide
    images: Tensor  # float32 RGB [B,3,H,W] in [0,1], embedded once
    mode: str = MODES[0]

    def __post_init__(self) -> None:
        _check_mode(self.mode)
        self.hint = self.guide.embed(self.images)

    def predict_noise(
        self,
        z: Tensor,
        t: int | Tensor,
        cond: Tensor,
        uncond: Tensor | None = None,
        guidance_scale: float = 1.0,
        rows: Tensor | None = None,  # [n]: the image of each of the n latents; None: one latent an image, in order
    ) -> Tensor:
        """As `Backbone.predict_noise`."""
        hint = self.hint if rows is None else self.hint[rows]
        if len(hint) != len(z):
            raise ModelError(f"{len(z)} latents for {len(hint)} images: say with `rows` which image each belongs to")

        def network(inputs, timesteps, text):
            repeated = hint.repeat(len(inputs) // len(hint), 1, 1, 1)  # both halves of classifier-free guidance
            return guided_unet(self.backbone.unet, self.guide, inputs, timesteps, text, repeated, self.mode)

        return self.backbone.predict_noise(z, t, cond, uncond, guidance_scale, network)
