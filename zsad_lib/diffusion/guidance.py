"""The semantic-guided (SG) network of DZAD: a copy of a U-Net's encoder that looks at the image itself.

DZAD (AAAI 2025), eq. 9 and Fig. 1, takes the network from DiAD (He et al., AAAI 2024), whose code VLMDiff shares; this
one computes what that code computes (`sgn.py`), for any U-Net of the Stable Diffusion kind. It is shaped as a
ControlNet: a copy of the U-Net's encoder and middle block with its own time embedding and attention, given the noisy
latent plus the embedded image, whose results pass zero-initialised 1x1 convolutions into the U-Net's skips and middle.
Its own part is the semantic feature fusion (SFF) of the deepest skips.

Of a U-Net with L levels of n layers, skip 0 leaves the first convolution, and each level adds its n layers and then its
downsampling: L·(n + 1) skips, n + 1 at every resolution (Stable Diffusion 1.5: twelve, 0 … 11).
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ControlNetModel, ModelMixin
from diffusers.configuration_utils import register_to_config
from safetensors.torch import load_file, save_file
from torch import nn

from zsad_lib.diffusion.latent import Backbone, extend_schedule, load_backbone
from zsad_lib.diffusion.loading import fetch, fingerprint, locate, read_weights
from zsad_lib.errors import ModelError

MODES = ("only mid", "all")
INITIALISATIONS = ("published", "trainable")
HINT_CHANNELS = (16, 32, 96, 256)  # of the image embedding, one more at each halving
TRAINED = ("up_blocks.", "conv_norm_out.", "conv_out.")  # of the U-Net: its decoder and its output
SETTINGS, DECODER = "guided.json", "decoder/diffusion_pytorch_model.safetensors"  # of a trained pair
NORM_EPS = 1e-5  # of the fusion's instance norm


class FeatureFusion(nn.Module):
    """SFF: the skips of the deepest resolution take in those of the resolution above (DiAD).

    For each deepest skip o_j: SiLU(o_j + Σ_i SiLU(IN(down_ij(o_i)))), the sum over all skips i of the next resolution,
    down_ij a 3x3 convolution of stride 2 without bias, IN an instance norm without parameters. `sources`, `targets`:
    the channels of the two groups. Stable Diffusion 1.5: skips 6, 7, 8 into 9, 10, 11, as published.

    `initialisation` of down: "published" is zero; "trainable" is random and small, with standard deviation
    √(1e-5 / fan-in): around zero the instance norm amplifies by 1/√1e-5, so that a branch starts with a slope of one.
    Either way a fusion of zeros is zero.
    """

    def __init__(self, sources, targets, initialisation):
        super().__init__()
        self.down = nn.ModuleList(
            nn.ModuleList(nn.Conv2d(i, j, 3, stride=2, padding=1, bias=False) for j in targets) for i in sources
        )
        for convolution in (convolution for row in self.down for convolution in row):
            if initialisation == "published":
                nn.init.zeros_(convolution.weight)
            else:
                nn.init.normal_(convolution.weight, std=(NORM_EPS / convolution.weight[0].numel()) ** 0.5)

    def forward(self, skips):
        """All skips, list of [B,C,h,w] -> the same list with the deepest ones fused."""
        first = len(skips) - len(self.down[0])
        sources, targets = skips[first - len(self.down) : first], skips[first:]
        if targets[0].shape[-2:].numel() == 1:
            raise ModelError("the deepest feature maps have one pixel, which no instance norm takes: larger images")
        return [*skips[:first], *(self._fuse(target, sources, j) for j, target in enumerate(targets))]

    def _fuse(self, target, sources, j):
        branches = (row[j](source) for row, source in zip(self.down, sources, strict=True))
        return F.silu(target + sum(F.silu(F.instance_norm(branch, eps=NORM_EPS)) for branch in branches))


class SemanticGuide(ModelMixin, ConfigMixin):
    """The SG network beside one U-Net. Make it with `from_unet`, keep it with `save_pretrained`, read it with
    `load_guide`.

    encoder_config: the configuration of a diffusers ControlNetModel. initialisation: "published" or "trainable", of the
    fusion (`FeatureFusion`). hint_mean, hint_std: how images in [0,1] are scaled before they are embedded; by default
    to [-1,1] as for the autoencoder. The embedding is a stack of 3x3 convolutions: 16, 16, 32↓, 32, 96↓, 96, 256↓ and
    a last one, zero-initialised, to the U-Net's own channels; with fewer downsamplings it stops earlier.

    "published" never trains the fusion in "only mid" mode: it multiplies zeros with zeros, and both get exactly no
    gradient. "trainable" does, or "all" mode, where the shallow skips have a gradient of their own.
    """

    @register_to_config
    def __init__(
        self,
        encoder_config: dict,
        initialisation: str = "trainable",
        hint_mean: tuple = (0.5, 0.5, 0.5),
        hint_std: tuple = (0.5, 0.5, 0.5),
    ):
        super().__init__()
        if initialisation not in INITIALISATIONS:
            raise ModelError(f"initialisation {initialisation!r} is unknown; use one of {list(INITIALISATIONS)}")
        self.encoder = ControlNetModel.from_config(encoder_config)
        # apart from the encoder, so that one embedding serves every timestep
        self.hint, self.encoder.controlnet_cond_embedding = self.encoder.controlnet_cond_embedding, nn.Identity()
        self.fusion = FeatureFusion(*_fused_channels(self.encoder.config), initialisation)

    @classmethod
    def from_unet(cls, unet, downsamplings=3, initialisation="trainable", **hint_scale):
        """A guide for a UNet2DConditionModel, its encoder a copy of the U-Net's, without influence until trained.

        downsamplings: halvings from image to latent: 3 for Stable Diffusion, log2(backbone.scale_factor) for any.
        hint_scale: hint_mean, hint_std. ModelError: a U-Net of one level, or of levels with unequal layers; an
        unknown initialisation.
        """
        if not isinstance(unet.config.layers_per_block, int):
            raise ModelError(f"a U-Net with {unet.config.layers_per_block} layers has no guide: one number for all")
        channels = HINT_CHANNELS + HINT_CHANNELS[-1:] * max(0, downsamplings - 3)
        with torch.device("meta"):  # only its configuration is wanted
            encoder = ControlNetModel.from_unet(
                unet, conditioning_embedding_out_channels=channels[: downsamplings + 1], load_weights_from_unet=False
            ).config
        guide = cls({key: value for key, value in encoder.items() if key[0] != "_"}, initialisation, **hint_scale)
        for part in ("conv_in", "time_embedding", "down_blocks", "mid_block"):
            getattr(guide.encoder, part).load_state_dict(getattr(unet, part).state_dict())
        return guide.to(unet.device)

    def embed(self, images):
        """Images float32 [B,3,H,W] in [0,1] -> their embedding [B,C,h,w] at latent resolution, for `forward`."""
        mean, std = (images.new_tensor(v).view(1, 3, 1, 1) for v in (self.config.hint_mean, self.config.hint_std))
        return self.hint(((images - mean) / std).to(self.device, self.dtype))

    def forward(self, z, timesteps, text, hint):
        """What to add to the U-Net: (list of skips, each [B,C,h,w], middle [B,C,h,w]).

        z [B,C,h,w], timesteps (int or [B]), text [B,L,D] as for the U-Net; hint: `embed` of the images.
        ModelError when the embedding does not have the size of the latents.
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


def _fused_channels(config):
    """Channels of the skips that the fusion reads, and of those it changes: the last two resolutions."""
    widths, layers = config["block_out_channels"], config["layers_per_block"]
    if len(widths) < 2:
        raise ModelError("a U-Net with one level has no deeper skips to fuse into; two levels are the least")
    levels = [[before] + [width] * layers for before, width in zip((widths[0], *widths), widths, strict=False)]
    return levels[-2], levels[-1]


def load_guide(name_or_path, backbone):
    """Read a saved SemanticGuide for a backbone, frozen, to the backbone's device and dtype.

    `name_or_path`: a local folder, a checkpoint of data_manifest.yaml or a hub id. ModelError as for
    `load_backbone`, and when the guide was made for a U-Net of another shape.
    """
    where = locate(name_or_path, ("config.json",), "SemanticGuide")
    return _fitting(read_weights(where, None, SemanticGuide, torch_dtype=backbone.dtype), where, backbone)


def _fitting(guide, where, backbone):
    """The guide frozen on the backbone's device, once it is known to be of its U-Net's shape."""
    for key in ("in_channels", "block_out_channels", "layers_per_block", "cross_attention_dim"):
        own, needed = (config[key] for config in (guide.encoder.config, backbone.unet.config))
        if list(_flat(own)) != list(_flat(needed)):
            raise ModelError(f"{where.name} guides a U-Net with {key} {own}; that of {backbone.name} has {needed}")
    return guide.to(backbone.device).eval().requires_grad_(False)


@dataclass
class GuidedModel:
    """A backbone with its guide, for any images. facts: how they were trained (dict); mode: one of MODES."""

    backbone: Backbone
    guide: SemanticGuide
    mode: str = "only mid"
    facts: dict = field(default_factory=dict)

    @property
    def config(self):
        """JSON-able: what changes a method's numbers."""
        return self.backbone.config | {"guide": fingerprint(self.guide), "mode": self.mode}

    def seeing(self, images):
        """The noise prediction for these images [B,3,H,W] in [0,1], a `GuidedBackbone`."""
        return GuidedBackbone(self.backbone, self.guide, images, self.mode)


def save_guided(folder, unet, guide, facts):
    """Write what `train_guided` let train, and nothing else: folder/guide (a SemanticGuide) and folder/decoder.

    facts: JSON-able; "base" names the backbone whose frozen parts belong to it, "mode" how it was trained; kept in
    folder/guided.json. In the dtype of the models.
    """
    folder = Path(folder)
    guide.save_pretrained(folder / "guide")
    (folder / "decoder").mkdir()
    decoder = {name: tensor.contiguous() for name, tensor in unet.state_dict().items() if name.startswith(TRAINED)}
    save_file(decoder, folder / DECODER)
    (folder / SETTINGS).write_text(json.dumps(facts, indent=1) + "\n")


def load_guided(name_or_path, device="auto", dtype="auto", base=None, random_weights=None):
    """Read a trained pair as a GuidedModel, frozen.

    `name_or_path`: a folder (or a checkpoint of data_manifest.yaml, a hub id) with guided.json and guide/, and either
    decoder/ (`save_guided`: the backbone is `base`, or the one its settings name, with the trained decoder in place) or
    a whole StableDiffusionPipeline. The schedule is the one that was trained with. `random_weights`: as for
    `load_backbone`; the guide is then a new one, without influence. ModelError as there, and when the parts do not
    fit.
    """
    from transformers.utils import cached_file

    where = locate(name_or_path, (SETTINGS, "guide/config.json"), "semantic guidance")
    facts = json.loads(Path(fetch(where, None, cached_file, SETTINGS)).read_text(encoding="utf-8"))
    base = base or facts.get("base")
    backbone = load_backbone(base or name_or_path, device, dtype, random_weights)
    backbone.scheduler = extend_schedule(backbone.scheduler, facts["timesteps"], facts["schedule"])
    if random_weights:
        guide = SemanticGuide.from_unet(backbone.unet, backbone.scale_factor.bit_length() - 1).requires_grad_(False)
        return GuidedModel(backbone, guide.eval(), facts["mode"], facts)
    if base:
        _put_decoder(backbone, load_file(fetch(where, None, cached_file, DECODER)), where.name)
    guide = read_weights(where, "guide", SemanticGuide, torch_dtype=backbone.dtype)
    return GuidedModel(backbone, _fitting(guide, where, backbone), facts["mode"], facts)


def _put_decoder(backbone, decoder, name):
    expected = {key: t.shape for key, t in backbone.unet.state_dict().items() if key.startswith(TRAINED)}
    if expected != {key: t.shape for key, t in decoder.items()}:
        raise ModelError(f"the decoder of {name} does not fit the U-Net of {backbone.name}: give the base it is for")
    backbone.unet.load_state_dict(decoder, strict=False)
    backbone.name = name


def load_guided_or_plain(name_or_path, device="auto", dtype="auto", random_weights=None):
    """`load_guided` of a folder that has a guide, `load_backbone` of any other model (a hub id among them)."""
    where = locate(name_or_path, (), "model")
    guided = where.local and (Path(where.source) / SETTINGS).is_file()
    return (load_guided if guided else load_backbone)(name_or_path, device, dtype, random_weights=random_weights)


def _flat(value):
    return value if isinstance(value, (list, tuple)) else (value,)


def guided_unet(unet, guide, z, timesteps, text, hint, mode="only mid"):
    """What the U-Net predicts, [B,C,h,w], with the guide's results added to its middle and skips (eq. 9).

    Arguments as for `SemanticGuide.forward`. mode: "all" adds every skip; "only mid", what the authors train and test
    with, adds the middle and the fused deepest skips, which the first decoder level reads: the other skips then act
    through the fusion alone. ModelError: an unknown mode.
    """
    check_mode(mode)
    skips, middle = guide(z.to(guide.dtype), timesteps, text.to(guide.dtype), hint)
    if mode == "only mid":
        deepest = len(skips) - len(guide.fusion.down[0])
        skips = [torch.zeros_like(skip) if k < deepest else skip for k, skip in enumerate(skips)]
    return unet(
        z,
        timesteps,
        text,
        down_block_additional_residuals=[skip.to(z.dtype) for skip in skips],
        mid_block_additional_residual=middle.to(z.dtype),
    ).sample


def check_mode(mode):
    """ModelError unless `mode` is one of MODES."""
    if mode not in MODES:
        raise ModelError(f"guidance mode {mode!r} is unknown; use one of {list(MODES)}")


def train_guided(unet, guide):
    """Let train what DZAD trains: the guide, and of the U-Net its decoder and output (TRAINED); freeze the rest.

    Returns the parameters to optimise. Encoder, middle and time embedding of the U-Net get no gradient.
    """
    guide.requires_grad_(True)
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(name.startswith(TRAINED))
    return [parameter for model in (guide, unet) for parameter in model.parameters() if parameter.requires_grad]


def gradient_norms(unet, guide, z, timesteps, text, images, noise, mode="only mid", steps=2, lr=1e-3):
    """How large the gradients of the guide's parts are in the first training steps (eq. 8): a list of {part: norm}.

    z [B,C,h,w]: latents noised to `timesteps` with `noise`; text [B,L,D]; images [B,3,H,W] in [0,1]. Parts: "fusion",
    the convolutions of the fusion; "feeding" and "deepest", the zero convolutions of the skips that it reads and of
    those that it changes; "middle". Both models are trained by it: give copies.
    """
    optimizer = torch.optim.AdamW(train_guided(unet, guide), lr=lr)
    outputs, deepest = guide.encoder.controlnet_down_blocks, len(guide.fusion.down[0])
    first = len(outputs) - deepest
    parts = {
        "fusion": guide.fusion,
        "feeding": outputs[first - len(guide.fusion.down) : first],
        "deepest": outputs[first:],
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
    """A backbone's noise prediction for known images: `Backbone.predict_noise` with what the guide sees in them.

    images: float32 RGB [B,3,H,W] in [0,1], embedded once. backbone.evaluations counts as without the guide; each
    evaluation now runs the guide's encoder too.
    """

    backbone: Backbone
    guide: SemanticGuide
    images: torch.Tensor
    mode: str = "only mid"

    def __post_init__(self):
        check_mode(self.mode)
        self.hint = self.guide.embed(self.images)

    def predict_noise(self, z, t, cond, uncond=None, guidance_scale=1.0, rows=None):
        """As `Backbone.predict_noise`. rows (indices [n]): which image each of the n latents belongs to; by default
        there is one latent for each image, in order."""
        hint = self.hint if rows is None else self.hint[rows]
        if len(hint) != len(z):
            raise ModelError(f"{len(z)} latents for {len(hint)} images: say with `rows` which image each belongs to")

        def network(inputs, timesteps, text):
            repeated = hint.repeat(len(inputs) // len(hint), 1, 1, 1)  # both halves of classifier-free guidance
            return guided_unet(self.backbone.unet, self.guide, inputs, timesteps, text, repeated, self.mode)

        return self.backbone.predict_noise(z, t, cond, uncond, guidance_scale, network)
