"""Training of semantic guidance: DZAD's on an auxiliary set, VLMDiff's on the set itself with captions as text.

The frozen part of the base model is never stored again (`guidance.save_guided`).
"""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from tqdm.auto import tqdm

from zsad_lib.data.captions import load_captioner, read_captions
from zsad_lib.data.datasets import load_dataset
from zsad_lib.data.images import load_images
from zsad_lib.diffusion.guidance import SETTINGS, SemanticGuide, guided_unet, save_guided, train_guided
from zsad_lib.diffusion.latent import extend_schedule, load_backbone
from zsad_lib.errors import TrainingError
from zsad_lib.training.fit import denoising_loss, encode_pool, fit, pick, to_tensor, vae_loss, write_json
from zsad_lite import synthad
from zsad_lite.training.cards import write_card
from zsad_lite.training.pools import GENERIC, draw_pool

SYNTHAD = {"synthad": tuple(synthad.CATEGORIES), **{f"synthad-{g}": tuple(c) for g, c in synthad.GROUPS.items()}}
BATCH = 16


class GuidedUNet(torch.nn.Module):
    """A U-Net and its guide as one network: of latents, timesteps, text and the images themselves."""

    def __init__(self, unet, guide, mode):
        super().__init__()
        self.unet, self.guide, self.mode = unet, guide, mode

    def forward(self, latents, timesteps, text, images):
        return guided_unet(self.unet, self.guide, latents, timesteps, text, self.guide.embed(images), self.mode)


def normal_images(train_on: str, work: Path, size: int, per_category: int, seed: int, root=None):
    """Normal images to train on: uint8 [N,size,size,3], a sentence of what they are, and their ids (of drawings: None).

    train_on: "synthad", "synthad-A" or "synthad-B" for new drawings, or a dataset's name for its training split, kept
    below `root`. TrainingError when that has no normal image.
    """
    if train_on is None:
        raise TrainingError(f"this recipe needs --train-on: {', '.join(SYNTHAD)}, or a dataset's name")
    if train_on in SYNTHAD:
        categories = SYNTHAD[train_on]
        images, _ = draw_pool(work, categories, per_category, seed, size=size)
        return images, f"{len(images)}: {per_category} drawings of each of {', '.join(categories)}", None
    samples = [s for s in load_dataset(train_on, root, split="train").samples if s.label == 0]
    if not samples:
        raise TrainingError(f"{train_on} has no normal image to train on")
    pixels = [(load_images([s], size) * 255).round().byte() for s in tqdm(samples, desc="reading", unit="img")]
    images = torch.cat(pixels).permute(0, 2, 3, 1).numpy()
    return images, f"{len(samples)} normal images of {train_on}", [sample.id for sample in samples]


def denoiser_loss(work, backbone, images, texts, alphas_cumprod):
    """The loss of `training.fit` (DZAD, eq. 8) for a network of (latents, timesteps, text, images in [0,1]).

    images: uint8 [N,S,S,3]; texts(chosen, generator) -> text embeddings [B,L,D] of the images `chosen` (indices [B]).
    TrainingError for a backbone that does not predict noise.
    """
    if backbone.prediction_type != "epsilon":
        raise TrainingError(f"{backbone.name} predicts {backbone.prediction_type}, and eq. 8 trains a predicted noise")
    device, scale = backbone.device, backbone.vae.config.scaling_factor
    mean, std = encode_pool(backbone.vae, images, work, device)
    alphas_cumprod = alphas_cumprod.to(device)

    def loss(model, generator):
        chosen = pick(generator, len(images), BATCH)
        noise = torch.randn(mean[chosen].shape, generator=generator)
        latents = (scale * (mean[chosen] + std[chosen] * noise)).to(device)
        pixels = ((to_tensor(images[chosen.numpy()]) + 1) / 2).to(device)
        words = texts(chosen, generator)
        return denoising_loss(lambda z, t: model(z, t, words, pixels), latents, alphas_cumprod, generator)

    return loss


def fit_guide(work, backbone, loss, steps, seed, learning_rate, mode, initialisation) -> GuidedUNet:
    """Train a new guide, and the decoder and output of the backbone's U-Net."""
    torch.manual_seed(seed)
    guide = SemanticGuide.from_unet(backbone.unet, backbone.scale_factor.bit_length() - 1, initialisation)
    train_guided(backbone.unet, guide)
    return fit("guide", GuidedUNet(backbone.unet, guide, mode), loss, work, steps, learning_rate, seed)


def train_dzad(
    out: Path,
    work: Path,
    steps: int,
    seed: int,
    device,
    train_on: str,
    base: str,
    per_category: int,
    learning_rate: float,
    timesteps: int = 1000,
    schedule: str = "rebuilt",
    mode: str = "only mid",
    initialisation: str = "trainable",
    pictures: int = 0,
    root=None,
) -> None:
    """DZAD's semantic guidance beside the pipeline `base`, from normal images of an auxiliary set, without prompts.

    Trained: the guide, and the U-Net's decoder and output. timesteps, schedule: the training timesteps
    (`backbones.extend_schedule`); mode, initialisation: see guidance.py. pictures: how many pictures of no product are
    mixed in (`training.draw_pool`), so that a small decoder does not forget what it knew of them.
    """
    backbone = load_backbone(base, device, torch.float32)
    images, source, _ = normal_images(train_on, work, backbone.image_size, per_category, seed, root)
    if pictures:
        others, _ = draw_pool(work / "pictures", (), 0, seed, size=backbone.image_size, pictures=pictures)
        images, source = np.concatenate([images, others]), f"{source}; {len(others)} {GENERIC}"
    levels = extend_schedule(backbone.scheduler, timesteps, schedule).alphas_cumprod
    text = backbone.embed([""])
    loss = denoiser_loss(work, backbone, images, lambda chosen, _: text.expand(len(chosen), -1, -1), levels)
    model = fit_guide(work, backbone, loss, steps, seed, learning_rate, mode, initialisation)
    facts = {"base": base, "train_on": train_on, "mode": mode, "initialisation": initialisation,
             "timesteps": timesteps, "schedule": schedule}  # fmt: skip
    save_guided(out, model.unet.half(), model.guide.half(), facts)
    write_card(
        out, work, "diffusers",
        f"DZAD's semantic guidance for {facts['base']}: the guide and the U-Net's trained decoder, from normal images "
        "only, without prompts. The frozen parts are the base's and are not stored again.",
        f"Of products it has seen normal images of {train_on} alone; what it does with others is what the cross "
        "protocol measures.",
        {"training images": source, "mode": mode, "initialisation of the fusion": initialisation,
         "training timesteps": f"{timesteps} ({schedule})"},
    )  # fmt: skip


# --- VLMDiff ------------------------------------------------------------------------------------------------------

EMPTY = 0.2  # of the training texts: test time needs the empty prompt, as text or to be guided away from


def caption_pool(captioner: str, images: np.ndarray, work: Path, device) -> list[str]:
    """What a captioner says of every training image, kept in ``work``."""
    target = work / "captions.json"
    if not target.exists():
        speak = load_captioner(captioner, device)
        batches = np.array_split(images, max(1, len(images) // 64))
        said = [speak((to_tensor(batch) + 1) / 2) for batch in tqdm(batches, desc="captioning", unit="batch")]
        write_json(target, [caption for batch in said for caption in batch])
    return json.loads(target.read_text())


def told(path: str, ids: list[str] | None) -> list[str]:
    """The captions of the images `ids` in a file of `zsad caption`. TrainingError names those that have none."""
    if ids is None:
        raise TrainingError("new drawings have no caption file: leave captions out, the captioner describes them")
    said = read_captions(path)
    missing = [name for name in ids if name not in said]
    if missing:
        raise TrainingError(f"{path} has no caption for {len(missing)} of {len(ids)} images: {', '.join(missing[:5])}")
    return [said[name] for name in ids]


def train_vlmdiff(
    out: Path,
    work: Path,
    steps: int,
    seed: int,
    device,
    train_on: str,
    base: str,
    captioner: str | None,
    per_category: int,
    learning_rate: float,
    captions: str | None = None,
    widths=None,
    unet_steps: int = 0,
    vae_steps: int = 0,
    mode: str = "only mid",
    initialisation: str = "trainable",
    root=None,
) -> None:
    """VLMDiff: semantic guidance with captions as text, on normal images of all classes together.

    base: the pipeline it starts from. vae_steps: its autoencoder is fine-tuned on the images first (the paper's stage
    1). widths, unet_steps: another U-Net of these widths takes the place of the base's, trained on the same images and
    captions with the base's frozen text encoder. captions: a file of `zsad caption DATASET --split train`, which can be
    interrupted; without it the captioner describes the images here.
    """
    if not (captioner or captions):
        raise TrainingError("this recipe needs a captioner: --set captioner=NAME, or captions=FILE of zsad caption")
    backbone = load_backbone(base, device, torch.float32)
    images, source, ids = normal_images(train_on, work, backbone.image_size, per_category, seed, root)
    said = told(captions, ids) if captions else caption_pool(captioner, images, work, device)
    if vae_steps:
        tune_autoencoder(backbone.vae, images, work, vae_steps, seed)
    loss = denoiser_loss(work, backbone, images, embed_texts(backbone, said), backbone.alphas_cumprod)
    if widths:
        backbone.unet = train_unet(backbone.unet, widths, loss, work, unet_steps, seed)
    model = fit_guide(work, backbone, loss, steps, seed, learning_rate, mode, initialisation)
    parts = {"vae": backbone.vae, "text_encoder": backbone.text_encoder, "unet": model.unet}
    from diffusers import StableDiffusionPipeline  # see recipes.py

    pipeline = StableDiffusionPipeline(
        **{name: part.half() for name, part in parts.items()}, tokenizer=backbone.tokenizer,
        scheduler=backbone.scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(out)
    model.guide.half().save_pretrained(out / "guide")
    facts = {"train_on": train_on, "captioner": captions or captioner, "mode": mode, "initialisation": initialisation,
             "timesteps": len(backbone.alphas_cumprod), "schedule": "rebuilt"}  # fmt: skip
    write_json(out / SETTINGS, facts)
    write_card(
        out, work, "diffusers",
        "VLMDiff's multi-class model: a latent diffusion pipeline with semantic guidance (the folder guide), trained "
        "on normal images of every class together, with a captioner's sentences as text.",
        f"Autoencoder{' (fine-tuned)' if vae_steps else ''} and text encoder are {Path(base).name}'s. It knows the "
        f"normal images of {train_on}; others come back as the nearest thing it knows.",
        {"training images": source, "captions": f"by {facts['captioner']}, left out for {EMPTY:.0%}", "mode": mode,
         "initialisation of the fusion": initialisation},
    )  # fmt: skip


def embed_texts(backbone, captions):
    """texts(chosen, generator) of `denoiser_loss` for one caption an image; a share EMPTY of them is left out."""
    known = {caption: row for row, caption in enumerate(dict.fromkeys(["", *captions]))}
    with torch.no_grad():
        embedded = torch.cat([backbone.embed([caption]) for caption in tqdm(known, desc="embedding", unit="caption")])
    rows = torch.tensor([known[caption] for caption in captions])

    def texts(chosen, generator):
        empty = torch.rand(len(chosen), generator=generator) < EMPTY
        return embedded[torch.where(empty, 0, rows[chosen])]

    return texts


def tune_autoencoder(vae, images, work, steps, seed):
    """Stage 1: fine-tune the autoencoder in place; its scaling factor stays."""
    vae.requires_grad_(True)

    def loss(model, generator):
        chosen = pick(generator, len(images), BATCH)
        return vae_loss(model, to_tensor(images[chosen.numpy()]).to(vae.device), generator)

    tuned = fit("vae", vae, loss, work, steps, 1e-4, seed, ema_decay=0.99)
    vae.load_state_dict(tuned.state_dict())
    vae.eval().requires_grad_(False)


class PlainUNet(torch.nn.Module):
    """A U-Net with the arguments of a GuidedUNet; it does not look at the images."""

    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, latents, timesteps, text, images):
        return self.unet(latents, timesteps, text).sample


def train_unet(like, widths, loss, work, steps, seed, learning_rate=8e-4) -> UNet2DConditionModel:
    """A new U-Net of these widths, in all else configured as `like`, trained without a guide; frozen."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel.from_config(like.config, block_out_channels=widths).to(like.device)
    trained = fit("unet", PlainUNet(unet), loss, work, steps, learning_rate, seed)
    return trained.unet.requires_grad_(False)
