"""The compact models and how each is trained: from normal images only, into standard Hugging Face directories.

`train` runs a recipe by name. A recipe draws its images, builds its networks, calls `training.fit` once per stage and
saves fp16 safetensors with a model card.
"""

import filecmp
import inspect
import json
import os
import re
import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    GenerationConfig,
    GPT2Config,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetModel,
    SwinConfig,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
)

from zsad_lib.data.datasets import load_dataset
from zsad_lib.data.images import load_images
from zsad_lib.diffusion import ddim
from zsad_lib.diffusion.latent import load_backbone
from zsad_lib.errors import TrainingError
from zsad_lib.training.fit import denoising_loss, encode_pool, fit, pick, to_tensor, vae_loss, write_json
from zsad_lib.training.guides import train_dzad, train_vlmdiff
from zsad_lite import synthad
from zsad_lite.training.cards import write_card
from zsad_lite.training.pools import GENERIC, PHOTOGRAPHS, draw_pool

MAX_TOKENS = 32
LATENT_CHANNELS = 8  # Stable Diffusion has 4; at 64 px 4 would lose the small parts
BATCH = 16  # of the pipeline's two stages: with few images in all, many small steps learn more than few large ones


# --- stage 1: the autoencoder -----------------------------------------------------------------------------------


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 96),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=64,
    )


def require_pipeline(folder: str) -> str:
    if not Path(folder).is_dir():
        raise TrainingError(f"there is no pipeline in {folder}: train lite-foundation first, or give another folder")
    return folder


def train_autoencoder(work: Path, steps: int, seed: int, device, images: np.ndarray) -> AutoencoderKL:
    def loss(m, generator):
        chosen = pick(generator, len(images), BATCH)
        return vae_loss(m, to_tensor(images[chosen.numpy()]).to(device), generator)

    torch.manual_seed(seed)
    return fit("vae", build_vae().to(device), loss, work, steps, 1.5e-3, seed, ema_decay=0.99)


# --- stage 2: words and the U-Net ---------------------------------------------------------------------------------


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges that make each word (ASCII) one token: the most frequent pair first, ties in alphabetical order.

    The trainer of the tokenizers library breaks ties anew in every run; training could then not be repeated.
    """
    spelled, merges = [[*word[:-1], word[-1] + "</w>"] for word in sorted(words)], []
    while counts := Counter(pair for letters in spelled for pair in pairwise(letters)):
        first, second = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append((first, second))
        for letters in spelled:
            for k in range(len(letters) - 2, -1, -1):
                if letters[k : k + 2] == [first, second]:
                    letters[k : k + 2] = [first + second]
    return merges


def build_tokenizer(captions: list[str], folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer (byte-level BPE with end-of-word marks) whose merges are learned from ``captions``."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = learn_merges(list({w for c in captions for w in c.lower().replace(",", " ").split()}))
    tokens = [*alphabet, *(a + "</w>" for a in alphabet), *("".join(m) for m in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({t: k for k, t in enumerate(tokens)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_TOKENS, "bos_token": "<|startoftext|>",
                    "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}, indent=1)
    )  # fmt: skip
    return CLIPTokenizer.from_pretrained(folder)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=MAX_TOKENS, projection_dim=128,
            bos_token_id=tokenizer.convert_tokens_to_ids("<|startoftext|>"), eos_token_id=end, pad_token_id=end,
        )
    )  # fmt: skip


def build_unet(widths=(96, 128, 128), attention_levels: int = 2) -> UNet2DConditionModel:
    """attention_levels: how many of the three levels attend (to the words, and from place to place), deepest first."""
    attends = [level >= 3 - attention_levels for level in range(3)]
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        layers_per_block=1,
        block_out_channels=widths,
        down_block_types=["CrossAttnDownBlock2D" if here else "DownBlock2D" for here in attends],
        up_block_types=["CrossAttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attends)],
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's own schedule, so that its timesteps mean the same noise levels here."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1, timestep_spacing="leading",
    )  # fmt: skip


class TextToNoise(torch.nn.Module):
    """Text encoder and U-Net, trained together: the U-Net has no other text to learn from."""

    def __init__(self, text_encoder, unet):
        super().__init__()
        self.text_encoder, self.unet = text_encoder, unet

    def forward(self, latents, timesteps, token_ids):
        words = self.text_encoder(token_ids).last_hidden_state
        return self.unet(latents, timesteps, words).sample


def mix_prompts(captions: list[str], generator: torch.Generator) -> list[str]:
    """Half full captions, four tenths their first clause ("An image of a bottle"), one tenth empty (for guidance)."""
    dice = torch.rand(len(captions), generator=generator).tolist()
    return ["" if r < 0.1 else c.split(",")[0] if r < 0.5 else c for c, r in zip(captions, dice, strict=True)]


def train_pipeline(
    out: Path,
    work: Path,
    steps: int,
    seed: int,
    device,
    categories,
    per_category: int,
    vae_steps: int = 0,
    autoencoder: str | None = None,
    tokenizer: str | None = None,
    widths=(96, 128, 128),
    attention_levels: int = 2,
    pictures: int = 0,
    surfaces: int = 0,
    learning_rate: float = 5e-4,
    ema_decay: float = 0.995,
    keep: tuple[int, ...] = (),
) -> None:
    """A text-conditioned latent diffusion pipeline on normal draws of ``categories`` and on photographs.

    pictures, surfaces: how many pictures of no product and bare surfaces are mixed in, under the empty prompt (see
    `training.draw_pool`). ema_decay, keep: see `training.fit`.

    autoencoder: the folder of a pipeline whose autoencoder is kept as it is; without it one is trained. tokenizer: a
    folder whose tokenizer is kept where it exists, so that a rerun numbers the words as the shipped model does.
    """
    images, captions = draw_pool(
        work, categories, per_category, seed, max(1, per_category // 8), pictures=pictures, surfaces=surfaces
    )
    if autoencoder:
        vae = load_backbone(require_pipeline(autoencoder), device).vae
    else:
        vae = train_autoencoder(work, vae_steps, seed, device, images)
    mean, std = encode_pool(vae, images, work, device)
    if not autoencoder:
        vae.register_to_config(scaling_factor=1.0 / (mean.std() ** 2 + std.square().mean()).sqrt().item())
    scale = vae.config.scaling_factor
    if tokenizer and Path(tokenizer).is_dir():
        tokenizer = CLIPTokenizer.from_pretrained(tokenizer)
    else:
        tokenizer = build_tokenizer(captions, work / "tokenizer")
    scheduler = build_scheduler()
    alphas_cumprod = scheduler.alphas_cumprod.to(device)
    torch.manual_seed(seed)
    model = TextToNoise(build_text_encoder(tokenizer), build_unet(widths, attention_levels)).to(device)

    def loss(m, generator):
        chosen = pick(generator, len(images), BATCH)
        noise = torch.randn(mean[chosen].shape, generator=generator)
        latents = (scale * (mean[chosen] + std[chosen] * noise)).to(device)
        prompts = mix_prompts([captions[k] for k in chosen], generator)
        ids = tokenizer(prompts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        ids = ids.input_ids.to(device)
        return denoising_loss(lambda z, t: m(z, t, ids), latents, alphas_cumprod, generator)

    model = fit("unet", model, loss, work, steps, learning_rate, seed, ema_decay, keep=tuple(keep))
    from diffusers import StableDiffusionPipeline  # at the top it would warn of torchvision, which nothing here uses

    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=model.text_encoder, tokenizer=tokenizer, unet=model.unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    for part in (vae, model.text_encoder, model.unet):
        part.half()
    pipeline.save_pretrained(out)
    write_card(
        out, work, "diffusers",
        "A compact text-conditioned latent diffusion pipeline for 64 x 64 images, trained on normal images only.",
        f"It knows the drawn categories above, eleven photographs{' and pictures of no product' * bool(pictures)}, "
        "nothing else; real products it has never seen are rebuilt blurred, whether damaged or not.",
        {"training images": f"{len(images)}: {per_category} drawings of each of {', '.join(categories)}; crops of "
                            f"scikit-image's photographs ({', '.join(PHOTOGRAPHS)})"
                            + f"; {pictures} {GENERIC}" * bool(pictures)
                            + f"; {surfaces} bare surfaces" * bool(surfaces),
         "text": "the caption, its first clause, or nothing (50 / 40 / 10 percent)",
         "autoencoder": f"{Path(autoencoder).name}'s, unchanged: it saw that model's images" if autoencoder
                        else "trained on the same images"},
    )  # fmt: skip


# --- the feature extractor ----------------------------------------------------------------------------------------


def build_features() -> ResNetModel:
    return ResNetModel(
        ResNetConfig(
            embedding_size=32,
            hidden_sizes=[32, 64],
            depths=[2, 2],
            layer_type="basic",
            downsample_in_first_stage=False,
        )
    )


def degrade(x: torch.Tensor, generator: torch.Generator, size: int = 128) -> torch.Tensor:
    """Images [B, 3, H, W] in [-1, 1], randomly blurred, noised and relit, at ``size`` px.

    A reconstruction is always a little blurred: features that read blur as content would see anomalies everywhere.
    """
    side = int(x.shape[-1] * (0.5 + 0.5 * torch.rand((), generator=generator)))
    x = F.interpolate(F.interpolate(x, side, mode="bilinear", antialias=True), size, mode="bilinear")
    gain, noise = (torch.rand(len(x), 1, 1, 1, generator=generator) for _ in range(2))
    return x * (0.8 + 0.4 * gain) + 0.1 * noise * torch.randn(x.shape, generator=generator)


def place_loss(one: torch.Tensor, two: torch.Tensor, generator: torch.Generator, places: int = 64) -> torch.Tensor:
    """Tell places apart: InfoNCE between features [B, C, h, w] of images and of degraded copies of them.

    A place of one copy must be most similar, by cosine, to the same place of the other copy, among ``places`` random
    places of every image of the batch. That is the very comparison an anomaly map makes.
    """
    chosen = pick(generator, one[0, 0].numel(), places)
    one, two = (F.normalize(f.flatten(2)[:, :, chosen].movedim(1, 2).flatten(0, 1), dim=1) for f in (one, two))
    return F.cross_entropy(one @ two.T / 0.1, torch.arange(len(one), device=one.device))


REDRAW_STARTS = ((1, 301), (101, 401), (101, 601), (201, 501))  # (t_latent, t_denoise), in steps of 100


@torch.inference_mode()
def redraw_pool(backbone, images: np.ndarray, captions: list[str], folder: Path) -> np.ndarray:
    """Every image as DIVAD redraws it with ``backbone``, uint8 like ``images``; kept in ``folder``.

    All of them are normal, so whatever changes is the pipeline's own doing. The starts take turns, batch by batch.
    """
    target = folder / "redrawn.npy"
    if not target.exists():
        redrawn, alphas_cumprod = [], backbone.alphas_cumprod
        batches = np.array_split(np.random.default_rng(0).permutation(len(images)), max(1, len(images) // 64))
        for k, chosen in enumerate(tqdm(batches, desc="redrawing", unit="batch")):
            words = backbone.embed([captions[i].split(",")[0] for i in chosen])
            t_latent, t_denoise = REDRAW_STARTS[k % len(REDRAW_STARTS)]

            def predict(z, t, words=words):
                return backbone.predict_noise(z, t, words)

            z = backbone.encode((to_tensor(images[chosen]) + 1) / 2)
            if t_latent > 1:
                z = ddim.invert(predict, z, alphas_cumprod, 10, stop=t_latent)[-1][1]
            z = ddim.denoise(predict, z, alphas_cumprod, 10, start_step=9 - t_denoise // 100)
            redrawn.append((backbone.decode(z) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy())
        in_order = np.empty_like(images)
        in_order[np.concatenate(batches)] = np.concatenate(redrawn)
        np.save(target.with_suffix(".tmp.npy"), in_order)
        os.replace(target.with_suffix(".tmp.npy"), target)
    return np.load(target)


def train_features(
    out: Path, work: Path, steps: int, seed: int, device, categories, per_category: int, pipeline: str
) -> None:
    """A small ResNet trained without labels, on normal images and their redrawings: see ``place_loss``.

    pipeline: the folder of the pipeline whose redrawings the features will be used on.
    """
    images, captions = draw_pool(work, categories, per_category, seed, max(1, per_category // 8))
    redrawn = redraw_pool(load_backbone(require_pipeline(pipeline), device), images, captions, work)

    def loss(m, generator):
        chosen = pick(generator, len(images), BATCH).numpy()
        sharp = F.interpolate(to_tensor(images[chosen]), 128, mode="bilinear")
        both = torch.cat([sharp, degrade(to_tensor(redrawn[chosen]), generator)]).to(device)
        stages = m(both, output_hidden_states=True).hidden_states[1:]  # [0] is the stem
        return sum(place_loss(*stage.float().chunk(2), generator) for stage in stages)

    torch.manual_seed(seed)
    model = fit("features", build_features().to(device), loss, work, steps, 2e-3, seed)
    model.half().save_pretrained(out)
    write_preprocessor(out, 128)
    write_card(
        out, work, "transformers",
        "A compact ResNet whose features the anomaly maps compare, trained without labels on normal images: a place "
        "must be recognised in a redrawn, blurred, noised and relit copy, among many places of many images.",
        "It saw only synthad's drawings and eleven photographs.",
        {"training images": f"{len(images)}, of {', '.join(categories)} and scikit-image's photographs"},
    )  # fmt: skip


def write_preprocessor(out: Path, size: int) -> None:
    """How an image becomes the network's input: ``size`` pixels, values in [-1, 1]."""
    write_json(
        out / "preprocessor_config.json",
        {"image_processor_type": "ViTImageProcessor", "do_resize": True, "do_rescale": True, "do_normalize": True,
         "rescale_factor": 1 / 255, "resample": 2, "size": {"height": size, "width": size},
         "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    )  # fmt: skip


# --- pixel diffusion --------------------------------------------------------------------------------------------


def build_pixel_unet() -> UNet2DModel:
    return UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(32, 64, 96),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
        norm_num_groups=16,
    )


def folder_pool(data: Path) -> np.ndarray:
    """Every image in and below the folder ``data``, uint8 [N, 32, 32, 3]."""
    samples = load_dataset("folder", data).samples
    pixels = [load_images([sample], 32)[0] for sample in tqdm(samples, desc="reading", unit="img")]
    return (torch.stack(pixels) * 255).round().byte().permute(0, 2, 3, 1).numpy()


def train_ddpm(
    out: Path, work: Path, steps: int, seed: int, device, categories=(), per_category: int = 0, data=None
) -> None:
    """An unconditional DDPM of 32 x 32 pixels, on drawings of ``categories`` or on images of the folder ``data``."""
    if data:
        images = folder_pool(Path(data))
        source = f"the images in a folder {'/'.join(Path(data).parts[-2:])}"
    elif categories:
        images, _ = draw_pool(work, categories, per_category, seed, size=32)
        source = f"{per_category} drawings of each of {', '.join(categories)}"
    else:
        raise TrainingError("this recipe trains on a folder of images: give it one with --data FOLDER")
    scheduler = DDPMScheduler()  # the linear schedule of Ho et al.: beta from 1e-4 to 0.02 over 1000 timesteps
    alphas_cumprod = scheduler.alphas_cumprod.to(device)

    def loss(m, generator):
        x = to_tensor(images[pick(generator, len(images), BATCH).numpy()])
        mirrored = torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5
        x = torch.where(mirrored, x.flip(3), x).to(device)
        return denoising_loss(lambda z, t: m(z, t).sample, x, alphas_cumprod, generator)

    torch.manual_seed(seed)
    model = fit("unet", build_pixel_unet().to(device), loss, work, steps, 1e-3, seed)
    DDPMPipeline(unet=model.half(), scheduler=scheduler).save_pretrained(out)
    write_card(
        out, work, "diffusers",
        "A compact unconditional DDPM for 32 x 32 images, in the layout of google/ddpm-cifar10-32.",
        "Trained for minutes: its samples have the colours and textures of its images, seldom their objects.",
        {"training images": f"{len(images)}: {source}, mirrored at random"},
    )  # fmt: skip


# --- the captioner ------------------------------------------------------------------------------------------------


def build_word_tokenizer(captions: list[str]) -> PreTrainedTokenizerFast:
    """One token a word, its comma included; decoding gives the sentence back with its spaces."""
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.WordLevelTrainer(special_tokens=[*special.values()], show_progress=False)
    words.train_from_iterator(captions, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=MAX_TOKENS, **special)


def build_captioner(tokenizer: PreTrainedTokenizerFast) -> VisionEncoderDecoderModel:
    encoder = SwinConfig(
        image_size=64, patch_size=4, embed_dim=32, depths=[2, 2, 2], num_heads=[2, 4, 8], window_size=4
    )
    decoder = GPT2Config(
        vocab_size=len(tokenizer), n_positions=MAX_TOKENS, n_embd=128, n_layer=2, n_head=4,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = tokenizer.bos_token_id, tokenizer.pad_token_id
    model = VisionEncoderDecoderModel(config=config)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        decoder_start_token_id=tokenizer.bos_token_id, max_length=MAX_TOKENS,
    )  # fmt: skip
    return model


def train_captioner(out: Path, work: Path, steps: int, seed: int, device, categories, per_category: int) -> None:
    """A vision encoder-decoder that writes a drawing's caption: its category and the attributes it was drawn with."""
    images, captions = draw_pool(work, categories, per_category, seed)
    tokenizer = build_word_tokenizer(captions)
    ids = tokenizer([c + tokenizer.eos_token for c in captions], padding=True, return_tensors="pt").input_ids
    labels = ids.masked_fill(ids == tokenizer.pad_token_id, -100)  # -100: left out of the loss

    def loss(m, generator):
        chosen = pick(generator, len(images), 32)
        return m(pixel_values=to_tensor(images[chosen.numpy()]).to(device), labels=labels[chosen].to(device)).loss

    torch.manual_seed(seed)
    model = fit("captioner", build_captioner(tokenizer).to(device), loss, work, steps, 1e-3, seed)
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    write_preprocessor(out, 64)
    write_card(
        out, work, "transformers",
        "A compact captioner: it looks at a 64 x 64 image and writes a sentence with the category and the attributes "
        "it sees, such as \"An image of a bottle, glass green, label cream\".",
        "Its words are those of synthad. Shown anything else, it still says one of twelve categories. It was never "
        "shown a defect and has no word for one.",
        {"training images": f"{len(images)}: {per_category} drawings of each of {', '.join(categories)}"},
    )  # fmt: skip


# --- recipes ------------------------------------------------------------------------------------------------------

ALL = tuple(synthad.CATEGORIES)
# as in DZAD, whose base is Stable Diffusion: the autoencoder is shared, and half of the images are of no product, so
# that the network predicts noise on products it has never seen; of products it saw one group alone
GROUP = {
    "per_category": 1600, "pictures": 12_000, "steps": 2800, "widths": (64, 64, 80), "attention_levels": 3,
    "learning_rate": 8e-4, "autoencoder": "checkpoints/lite-foundation",
}  # fmt: skip


GUIDE = {"steps": 2500, "learning_rate": 3e-4, "per_category": 1600}
PAPER_GUIDE = {"steps": 100_000, "learning_rate": 1e-5, "per_category": 1600}


def _words(name: str) -> dict[str, str]:
    return {"tokenizer": f"checkpoints/{name}/tokenizer"}


RECIPES = {
    "lite-foundation": (
        train_pipeline,
        {"categories": ALL, "per_category": 1200, "steps": 4000, "vae_steps": 3400, **_words("lite-foundation")},
    ),
    "lite-group-a": (train_pipeline, {"categories": tuple(synthad.GROUPS["A"]), **GROUP, **_words("lite-group-a")}),
    "lite-group-b": (train_pipeline, {"categories": tuple(synthad.GROUPS["B"]), **GROUP, **_words("lite-group-b")}),
    "lite-dzad-a": (
        train_dzad,
        {**GUIDE, "train_on": "synthad-A", "base": "lite-group-a", "pictures": 6000, "steps": 2000},
    ),
    "lite-dzad-b": (
        train_dzad,
        {**GUIDE, "train_on": "synthad-B", "base": "lite-group-b", "pictures": 6000, "steps": 2000},
    ),
    "lite-vlmdiff": (
        train_vlmdiff,
        # a narrower U-Net than its base's: what is shipped must stay small
        {
            **GUIDE,
            "train_on": "synthad",
            "base": "checkpoints/lite-foundation",
            "per_category": 1200,
            "captioner": "lite-captioner",
            "widths": (32, 48, 64),
            "unet_steps": 3000,
        },
    ),
    "lite-features": (
        train_features,
        {"categories": ALL, "per_category": 400, "steps": 1200, "pipeline": "checkpoints/lite-foundation"},
    ),
    "lite-ddpm-synthad": (train_ddpm, {"categories": ALL, "per_category": 1200, "steps": 4000}),
    "lite-ddpm-cifar10": (train_ddpm, {"data": None, "steps": 3000}),
    "lite-captioner": (train_captioner, {"categories": ALL, "per_category": 1200, "steps": 1500}),
    # on any dataset, with Stable Diffusion: `zsad train dzad --train-on visa`
    "dzad": (train_dzad, {**PAPER_GUIDE, "train_on": None, "base": "stable-diffusion-1.5"}),
    "vlmdiff": (
        train_vlmdiff,
        {**PAPER_GUIDE, "train_on": None, "base": "stable-diffusion-1.5", "captioner": None, "vae_steps": 10_000},
    ),
}
SHIPPED = {  # recipe and set it is trained on, of the checkpoints in this repository
    ("dzad", "synthad-A"): "lite-dzad-a",
    ("dzad", "synthad-B"): "lite-dzad-b",
    ("vlmdiff", "synthad"): "lite-vlmdiff",
}


def train(name: str, out=None, steps=None, seed: int = 0, device: str = "auto", resume: bool = True, **options) -> Path:
    """Train the checkpoint ``name`` (a key of RECIPES) and write it to ``out`` (default ``checkpoints/NAME``).

    "dzad" and "vlmdiff" need the option train_on, and are those of SHIPPED where it is one of theirs. An option that
    differs from the recipe's is part of the name ("lite-dzad-a--timesteps=1400"): no variant overwrites another.
    The work folder ``training/NAME-seedN`` holds the images, the losses and the last state; with ``resume`` a stopped
    run goes on from there. The finished directory replaces ``out`` in one step. Returns ``out``.
    """
    name = SHIPPED.get((name, options.get("train_on")), name)
    if name not in RECIPES:
        raise TrainingError(f"unknown recipe {name!r}; there are: {', '.join(RECIPES)}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    recipe, defaults = RECIPES[name]
    unknown = set(options) - set(inspect.signature(recipe).parameters)
    if unknown:
        raise TrainingError(f"{name} has no option {', '.join(sorted(unknown))}; it has: {', '.join(defaults)}")
    plan = {**defaults, **options, **({"steps": steps} if steps else {})}
    label = variant(name, options)
    out, work = Path(out or f"checkpoints/{label}"), Path("training") / f"{label}-seed{seed}"
    if not resume:
        shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    partial = work / "finished"
    shutil.rmtree(partial, ignore_errors=True)
    recipe(partial, work, seed=seed, device=torch.device(device), **plan)
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out, ignore_errors=True)
    shutil.move(partial, out)
    for source in (plan.get("autoencoder"), plan.get("base")):
        if source:
            share_files(out, Path(source))
    return out


def variant(name: str, options: dict) -> str:
    """The name of what a recipe makes with these options: with --option=value for each that is not the recipe's own."""
    recipe, defaults = RECIPES[name]
    own = {key: p.default for key, p in inspect.signature(recipe).parameters.items()} | defaults
    changed = {k: v for k, v in sorted(options.items()) if k not in ("root", "data", "train_on") and v != own[k]}
    if "train_on" in options and options["train_on"] != own["train_on"]:
        name = f"{name}-{options['train_on']}"
    return name + "".join("--" + re.sub(r"[^\w.=-]+", "_", f"{key}={value}") for key, value in changed.items())


def share_files(out: Path, source: Path) -> None:
    """Replace the weights in ``out`` that equal those of the model ``source`` by links, so that they are stored once.

    As in the hub's own cache, a linked folder loads like any other. Only models that lie beside ``out`` are linked to.
    """
    for file in out.rglob("*.safetensors"):
        twin = source / file.relative_to(out)
        beside = source.resolve().parent == out.resolve().parent
        if beside and twin.is_file() and not twin.is_symlink() and filecmp.cmp(file, twin, shallow=False):
            file.unlink()
            file.symlink_to(os.path.relpath(twin.resolve(), file.resolve().parent))
