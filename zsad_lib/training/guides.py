"""Training of semantic guidance on a data set: DZAD's on an auxiliary one, VLMDiff's on the set itself with captions.

The frozen part of the base model is never stored again (`guidance.save_guided`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from tqdm.auto import tqdm

from zsad_lib import store
from zsad_lib.data.captions import load_captioner, read_captions
from zsad_lib.data.datasets import load_dataset
from zsad_lib.diffusion.guidance import SETTINGS, SemanticGuide, guided_unet, save_guided, trainable_parameters
from zsad_lib.diffusion.latent import Backbone, extend_schedule, load_backbone, save_pipeline
from zsad_lib.errors import TrainingError
from zsad_lib.settings import NotNegative, Positive
from zsad_lib.training.cards import write_card
from zsad_lib.training.fit import Loss, begin, encode_pool, fit, fit_autoencoder, latent_loss, read_pixels, to_tensor
from zsad_lib.training.recipe import Count, Recipe

EMPTY = 0.2  # share of the training texts: test time needs the empty prompt, as text or to be guided away from
Texts = Callable[[torch.Tensor, torch.Generator], torch.Tensor]  # (chosen [B], generator) -> embeddings [B,L,D]


class TrainingImages(NamedTuple):
    pixels: np.ndarray  # uint8 [N,S,S,3]
    source: str  # what they are, for the model card
    ids: list[str] | None  # of a data set's images; drawings have none


class GuidedUNet(torch.nn.Module):
    """A U-Net and its guide as one network, of latents, timesteps, text and the images in [0,1]; or without a guide."""

    def __init__(self, unet, guide: SemanticGuide | None = None, mode: str = "only mid"):
        super().__init__()
        self.unet, self.guide, self.mode = unet, guide, mode

    def forward(
        self, latents: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor, images: torch.Tensor
    ) -> torch.Tensor:
        if self.guide is None:
            return self.unet(latents, timesteps, text).sample
        return guided_unet(self.unet, self.guide, latents, timesteps, text, self.guide.embed(images), self.mode)


@dataclass(frozen=True)
class GuideRecipe(Recipe):
    train_on: str | None = None  # a data set: the normal images of its training split
    root: str | Path | None = None  # its folder (default: data/NAME)
    base: str = "stable-diffusion-1.5"  # the pipeline it starts from
    learning_rate: NotNegative = 1e-5
    mode: Literal["only mid", "all"] = "only mid"  # which of the guide's results are added: see guidance.guided_unet
    initialisation: Literal["published", "trainable"] = "trainable"  # of the fusion: see guidance.FeatureFusion
    # a guide must not make its base forget, nor show it the damage: the papers train the decoder, and show it all
    decoder: bool = True  # of the U-Net, trained beside the guide
    hint_pixels: Positive | None = None  # of the image that the guide sees, a side: see guidance.SemanticGuide

    def check(self) -> None:
        if self.train_on is None:
            raise TrainingError("this recipe needs --train-on, a data set's name")

    def images(self, work: Path, size: int, seed: int) -> TrainingImages:
        """What it is trained on."""
        return dataset_images(self.train_on, size, self.root)


@dataclass(frozen=True)
class DZADRecipe(GuideRecipe):
    """DZAD's semantic guidance, from normal images of an auxiliary set, without prompts."""

    timesteps: Positive = 1000  # of the training schedule
    schedule: Literal["rebuilt", "continued"] = "rebuilt"  # how it is extended to them: see latent.extend_schedule

    def train(self, out: Path, work: Path, seed: int, device: torch.device) -> None:
        backbone = load_backbone(self.base, device, torch.float32)
        levels = extend_schedule(backbone.scheduler, self.timesteps, self.schedule).alphas_cumprod
        images = self.images(work, backbone.image_size, seed)
        begin(work, repr(self), images.pixels, backbone.config)
        text = backbone.embed([""])
        loss = denoiser_loss(work, backbone, images, lambda chosen, _: text.expand(len(chosen), -1, -1), levels)
        model = fit_guide(self, backbone, loss, work, seed)
        recorded = ("base", "train_on", "mode", "initialisation", "timesteps", "schedule")
        facts = {key: getattr(self, key) for key in recorded}
        save_guided(out, model.unet.half() if self.decoder else None, model.guide.half(), facts)
        write_card(
            out, work, "diffusers",
            f"DZAD's semantic guidance for {self.base}: the guide{' and the decoder' * self.decoder} of its U-Net, "
            "trained on normal images only, without prompts. The frozen parts are the base's and are not stored again.",
            f"Of products it has seen normal images of {self.train_on} alone; what it does with others is what the "
            "cross protocol measures.",
            {"training images": images.source, "mode": self.mode, "initialisation of the fusion": self.initialisation,
             "the guide sees": f"{self.hint_pixels or backbone.image_size} pixels a side",
             "training timesteps": f"{self.timesteps} ({self.schedule})"},
        )  # fmt: skip


@dataclass(frozen=True)
class VLMDiffRecipe(GuideRecipe):
    """VLMDiff: semantic guidance with captions as text, on normal images of all classes together."""

    captioner: str | None = None  # what describes the images, where there is no file of captions
    captions: str | None = None  # of `zsad caption DATASET --split train`, which can be interrupted
    vae_steps: Count = 0  # stage 1 of the paper: the autoencoder is fine-tuned on the images first
    widths: tuple[Positive, ...] | None = None  # a new U-Net of these takes the place of the base's
    unet_steps: Count = 0  # how long that is trained, with the base's text encoder

    def check(self) -> None:
        super().check()
        if not (self.captioner or self.captions):
            raise TrainingError("this recipe needs a captioner: --set captioner=NAME, or captions=FILE of zsad caption")
        if self.widths and not self.unet_steps:
            raise TrainingError("a U-Net of other widths starts untrained: --set unet_steps=NUMBER trains it first")

    def train(self, out: Path, work: Path, seed: int, device: torch.device) -> None:
        backbone = load_backbone(self.base, device, torch.float32)
        images = self.images(work, backbone.image_size, seed)
        if self.captions:
            captions = captions_of_file(self.captions, images.ids)
            begin(work, repr(self), images.pixels, backbone.config, captions)
        else:
            captioner = load_captioner(self.captioner, device)
            begin(work, repr(self), images.pixels, backbone.config, captioner.revision)
            captions = captions_of_model(captioner, images.pixels, work)
        if self.vae_steps:
            vae = fit_autoencoder(backbone.vae.requires_grad_(True), images.pixels, work, self.vae_steps, seed, 1e-4)
            backbone.vae.load_state_dict(vae.state_dict())  # the scaling factor stays
            backbone.vae.eval().requires_grad_(False)
        texts = embeddings_of(captions, backbone)
        loss = denoiser_loss(work, backbone, images, texts, backbone.alphas_cumprod)
        if self.widths:
            backbone.unet = train_unet(backbone.unet, self.widths, loss, work, self.unet_steps, seed)
        model = fit_guide(self, backbone, loss, work, seed)
        save_pipeline(out, backbone.vae, backbone.text_encoder, backbone.tokenizer, model.unet, backbone.scheduler)
        model.guide.half().save_pretrained(out / "guide")
        said_by = self.captions or self.captioner
        facts = {"train_on": self.train_on, "captioner": said_by, "mode": self.mode,
                 "initialisation": self.initialisation, "timesteps": len(backbone.alphas_cumprod),
                 "schedule": "rebuilt"}  # fmt: skip
        store.write_json(out / SETTINGS, facts)
        write_card(
            out, work, "diffusers",
            "VLMDiff's multi-class model: a latent diffusion pipeline with semantic guidance (the folder guide), "
            "trained on normal images of every class together, with a captioner's sentences as text.",
            f"Autoencoder{' (fine-tuned)' if self.vae_steps else ''} and text encoder are {Path(self.base).name}'s. It "
            f"knows the normal images of {self.train_on}; others come back as the nearest thing it knows.",
            {"training images": images.source, "captions": f"by {said_by}, left out for {EMPTY:.0%}",
             "mode": self.mode, "initialisation of the fusion": self.initialisation},
        )  # fmt: skip


RECIPES = {"dzad": DZADRecipe(100_000), "vlmdiff": VLMDiffRecipe(100_000, vae_steps=10_000)}


def dataset_images(name: str, size: int, root: str | Path | None = None) -> TrainingImages:
    """The normal images of a data set's training split, `size` pixels wide."""
    samples = [sample for sample in load_dataset(name, root, split="train").samples if sample.label == 0]
    if not samples:
        raise TrainingError(f"{name} has no normal image to train on")
    source = f"{len(samples)} normal images of {name}"
    return TrainingImages(read_pixels(samples, size), source, [sample.id for sample in samples])


def denoiser_loss(
    work: Path, backbone: Backbone, images: TrainingImages, texts: Texts, alphas_cumprod: torch.Tensor
) -> Loss:
    """The loss of `fit` (DZAD, eq. 8) for a GuidedUNet."""
    if backbone.prediction_type != "epsilon":
        raise TrainingError(f"{backbone.name} predicts {backbone.prediction_type}, and eq. 8 trains a predicted noise")

    def predictor(model, chosen, generator):
        pixels = ((to_tensor(images.pixels[chosen.numpy()]) + 1) / 2).to(backbone.device)
        text = texts(chosen, generator)
        return lambda z, t: model(z, t, text, pixels)

    pool = encode_pool(backbone.vae, images.pixels, work)
    return latent_loss(pool, backbone.vae.config.scaling_factor, alphas_cumprod.to(backbone.device), predictor)


def fit_guide(recipe: GuideRecipe, backbone: Backbone, loss: Loss, work: Path, seed: int) -> GuidedUNet:
    """Train a new guide, and with it the decoder and output of the backbone's U-Net where the recipe says so."""
    torch.manual_seed(seed)
    halvings, hint = backbone.scale_factor.bit_length() - 1, {"hint_pixels": recipe.hint_pixels}
    guide = SemanticGuide.from_unet(backbone.unet, halvings, recipe.initialisation, **hint)
    trainable_parameters(backbone.unet, guide, recipe.decoder)
    model = GuidedUNet(backbone.unet, guide, recipe.mode)
    return fit("guide", model, loss, work, recipe.steps, recipe.learning_rate, seed)


# --- of VLMDiff alone -----------------------------------------------------------------------------------------------


def captions_of_model(describe: Callable, images: np.ndarray, work: Path) -> list[str]:
    """What a captioner says of every image, uint8 [N,H,W,3]; kept in `work`."""
    kept = work / "captions.json"
    if not kept.exists():
        batches = np.array_split(images, max(1, len(images) // 64))
        said = [describe((to_tensor(batch) + 1) / 2) for batch in tqdm(batches, desc="captioning", unit="batch")]
        store.write_json(kept, [caption for batch in said for caption in batch])
    return store.read_json(kept)


def captions_of_file(path: str | Path, ids: list[str]) -> list[str]:
    """The captions of the images `ids` in a file of `zsad caption`."""
    said = read_captions(path)
    missing = [name for name in ids if name not in said]
    if missing:
        raise TrainingError(f"{path} has no caption for {len(missing)} of {len(ids)} images: {', '.join(missing[:5])}")
    return [said[name] for name in ids]


def embeddings_of(captions: list[str], backbone: Backbone) -> Texts:
    """The texts of `denoiser_loss` for one caption an image; a share EMPTY of them is left out."""
    known = {caption: row for row, caption in enumerate(dict.fromkeys(["", *captions]))}
    with torch.no_grad():
        embedded = torch.cat([backbone.embed([caption]) for caption in tqdm(known, desc="embedding", unit="caption")])
    rows = torch.tensor([known[caption] for caption in captions])

    def texts(chosen, generator):
        empty = torch.rand(len(chosen), generator=generator) < EMPTY
        return embedded[torch.where(empty, 0, rows[chosen])]

    return texts


def train_unet(
    like: UNet2DConditionModel, widths: tuple[int, ...], loss: Loss, work: Path, steps: int, seed: int
) -> UNet2DConditionModel:
    """A new U-Net of these widths, in all else configured as `like`, trained without a guide; frozen."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel.from_config(like.config, block_out_channels=widths).to(like.device)
    return fit("unet", GuidedUNet(unet), loss, work, steps, 8e-4, seed).unet.requires_grad_(False)
