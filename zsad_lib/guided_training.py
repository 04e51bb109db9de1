"""Training of semantic guidance: DZAD's on an auxiliary set, VLMDiff's on the set itself with captions as text.

The frozen part of the base model is never stored again (`guidance.save_guided`).
"""

from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from zsad_lib import synthad
from zsad_lib.backbones import extend_schedule, load_backbone
from zsad_lib.datasets import load_dataset, load_images
from zsad_lib.guidance import SemanticGuide, guided_unet, save_guided, train_guided
from zsad_lib.training import TrainingError, denoising_loss, draw_pool, encode_pool, fit, pick, to_tensor, write_card

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
    """Normal images to train on: uint8 [N,size,size,3] and a sentence of what they are.

    train_on: "synthad", "synthad-A" or "synthad-B" for new drawings, or a dataset's name for its training split, kept
    below `root`. TrainingError when that has no normal image.
    """
    if train_on in SYNTHAD:
        categories = SYNTHAD[train_on]
        images, _ = draw_pool(work, categories, per_category, seed, size=size)
        return images, f"{len(images)}: {per_category} drawings of each of {', '.join(categories)}"
    samples = [s for s in load_dataset(train_on, root, split="train").samples if s.label == 0]
    if not samples:
        raise TrainingError(f"{train_on} has no normal image to train on")
    pixels = [(load_images([s], size) * 255).round().byte() for s in tqdm(samples, desc="reading", unit="img")]
    return torch.cat(pixels).permute(0, 2, 3, 1).numpy(), f"{len(samples)} normal images of {train_on}"


def train_semantic_guide(
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
    root=None,
) -> None:
    """DZAD's semantic guidance beside the pipeline `base`, from normal images of an auxiliary set, without prompts.

    Trained (DZAD, eq. 8 and Fig. 1): the guide, and the U-Net's decoder and output. timesteps, schedule: the training
    timesteps (`backbones.extend_schedule`); mode, initialisation: see guidance.py.
    """
    backbone = load_backbone(base, device, torch.float32)
    images, source = normal_images(train_on, work, backbone.image_size, per_category, seed, root)
    mean, std = encode_pool(backbone.vae, images, work, device)
    scale, text = backbone.vae.config.scaling_factor, backbone.embed([""])
    alphas_cumprod = extend_schedule(backbone.scheduler, timesteps, schedule).alphas_cumprod.to(device)
    torch.manual_seed(seed)
    guide = SemanticGuide.from_unet(backbone.unet, int(np.log2(backbone.scale_factor)), initialisation)
    train_guided(backbone.unet, guide)

    def loss(m, generator):
        chosen = pick(generator, len(images), BATCH)
        noise = torch.randn(mean[chosen].shape, generator=generator)
        latents = (scale * (mean[chosen] + std[chosen] * noise)).to(device)
        pixels = ((to_tensor(images[chosen.numpy()]) + 1) / 2).to(device)
        words = text.expand(len(chosen), -1, -1)
        return denoising_loss(lambda z, t: m(z, t, words, pixels), latents, alphas_cumprod, generator)

    model = fit("guide", GuidedUNet(backbone.unet, guide, mode), loss, work, steps, learning_rate, seed)
    out.mkdir(parents=True)
    facts = {"base": Path(base).name, "train_on": train_on, "mode": mode, "initialisation": initialisation,
             "timesteps": timesteps, "schedule": schedule}  # fmt: skip
    save_guided(out, model.unet.half(), model.guide.half(), facts)
    write_card(
        out, work, "diffusers",
        f"DZAD's semantic guidance for {facts['base']}: the guide and the U-Net's trained decoder, from normal images "
        "only, without prompts. The frozen parts are the base's and are not stored again.",
        "It has seen one half of synthad's categories; on the other half it is what the cross protocol measures.",
        {"training images": source, "mode": mode, "initialisation of the fusion": initialisation,
         "training timesteps": f"{timesteps} ({schedule})"},
    )  # fmt: skip
