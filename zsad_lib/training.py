"""Training of the compact checkpoints, from normal images only.

One loop (`fit`) serves every model: AdamW, cosine learning rate, an exponential moving average (EMA), atomic
checkpoints, and a random generator that depends on (seed, step) alone, so a resumed run repeats an uninterrupted
one. Recipes build their models, call `fit` once per stage and save standard Hugging Face directories in fp16.
"""

import json
import os
import platform
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from skimage import data as photographs
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.optim.swa_utils import AveragedModel
from tqdm.auto import tqdm
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    ResNetConfig,
    ResNetModel,
)

from zsad_lib import ddim, synthad
from zsad_lib.backbones import load_backbone

PHOTOGRAPHS = (
    "brick",
    "grass",
    "gravel",
    "astronaut",
    "camera",
    "chelsea",
    "coffee",
    "coins",
    "moon",
    "rocket",
    "page",
)
MAX_TOKENS = 32
LATENT_CHANNELS = 8  # Stable Diffusion has 4; at 64 px 4 would lose the small parts
BATCH = 16  # of the pipeline's two stages: with few images in all, many small steps learn more than few large ones


class TrainingError(ValueError):
    """A recipe that does not exist, or a work folder that belongs to another run."""


# --- data -------------------------------------------------------------------------------------------------------


def _draw_many(category: str, seed: int, count: int, size: int) -> tuple[np.ndarray, list[str]]:
    drawings = [synthad.draw(category, f"train/{seed}/{k}", size=size) for k in range(count)]
    return np.stack([d.image for d in drawings]), [d.caption for d in drawings]


def _photograph_crops(name: str, seed: int, count: int, size: int) -> tuple[np.ndarray, list[str]]:
    """Square crops of a photograph that scikit-image ships, between one third and the whole of its height."""
    picture = getattr(photographs, name)()
    picture = np.repeat(picture[:, :, None], 3, 2) if picture.ndim == 2 else picture[:, :, :3]
    pixels = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float()
    rng = np.random.default_rng([seed, len(name)])
    crops = []
    for _ in range(count):
        side = int(min(pixels.shape[2:]) * rng.uniform(0.33, 1.0))
        top, left = (int(rng.integers(0, extent - side + 1)) for extent in pixels.shape[2:])
        crop = pixels[:, :, top : top + side, left : left + side]
        crop = F.interpolate(crop, (size, size), mode="bilinear", antialias=True)
        crops.append(crop[0].round().clamp(0, 255).byte().permute(1, 2, 0).numpy())
    return np.stack(crops), [f"A photograph of {name}"] * count


def draw_pool(folder: Path, categories, per_category: int, seed: int, size: int = 64, photos: int = 0):
    """Normal images for training: uint8 [N, size, size, 3], captions [N], labels [N] (index of the category, or
    len(categories) + index of the photograph). Drawn once, kept in ``folder``."""
    target, meta = folder / "pool.npy", folder / "pool.json"
    if not meta.exists():
        folder.mkdir(parents=True, exist_ok=True)
        jobs = [(_draw_many, c, per_category) for c in categories]
        jobs += [(_photograph_crops, p, photos) for p in PHOTOGRAPHS] if photos else []
        with ProcessPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
            futures = [pool.submit(job, name, seed, count, size) for job, name, count in jobs]
            drawn = [f.result() for f in tqdm(futures, desc="drawing training images", unit="category")]
        np.save(target, np.concatenate([images for images, _ in drawn]))
        captions = [c for _, group in drawn for c in group]
        labels = [k for k, (images, _) in enumerate(drawn) for _ in range(len(images))]
        _write_json(meta, {"captions": captions, "labels": labels})
    stored = json.loads(meta.read_text())
    return np.load(target), stored["captions"], np.array(stored["labels"])


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1.0


# --- the loop ---------------------------------------------------------------------------------------------------


def _write_json(path: Path, value) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1))
    os.replace(temporary, path)


def _save_state(path: Path, state: dict) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def fit(
    stage: str,
    model: torch.nn.Module,
    loss_of: Callable[[torch.nn.Module, torch.Generator], torch.Tensor],
    folder: Path,
    steps: int,
    learning_rate: float,
    seed: int = 0,
    ema_decay: float = 0.995,
    checkpoint_every: int = 250,
) -> torch.nn.Module:
    """Minimise ``loss_of(model, generator)`` and return the EMA of ``model``.

    The state is kept in ``folder/stage.pt`` and picked up again when it exists; ``folder/stage.json`` holds the
    loss of every step and the seconds spent. bfloat16 autocast on CUDA.
    """
    device = next(model.parameters()).device
    # a short memory at first, or the average of a short run would still hold its random start
    ema = AveragedModel(model, avg_fn=lambda old, new, n: new.lerp(old, min(ema_decay, (1 + int(n)) / (10 + int(n)))))
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=1e-2)
    warmup = min(100, steps // 10 + 1)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.02, 1.0, warmup),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - warmup), learning_rate * 0.02),
        ],
        [warmup],
    )
    state_file, start, losses, seconds = folder / f"{stage}.pt", 0, [], 0.0
    parts = {"model": model, "ema": ema, "optimizer": optimizer, "schedule": schedule}
    if state_file.exists():
        state = torch.load(state_file, map_location=device, weights_only=True)
        if state["plan"] != [steps, seed]:
            raise TrainingError(
                f"{state_file} belongs to a run of {state['plan'][0]} steps with seed {state['plan'][1]}; "
                f"this one has {steps} steps with seed {seed}. Delete the folder or choose another."
            )
        for key, part in parts.items():
            part.load_state_dict(state[key])
        start, losses, seconds = state["step"], state["losses"], state["seconds"]
    model.train()
    clock = time.perf_counter()
    with tqdm(total=steps, initial=start, desc=stage, unit="step") as bar:
        for step in range(start, steps):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
            torch.manual_seed(seed * 1_000_003 + step)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = loss_of(model, generator)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            ema.update_parameters(model)
            losses.append(round(loss.item(), 5))
            bar.update()
            bar.set_postfix(loss=f"{np.mean(losses[-50:]):.4f}")
            if (step + 1) % checkpoint_every == 0 or step + 1 == steps:
                spent = seconds + time.perf_counter() - clock
                state = {key: part.state_dict() for key, part in parts.items()}
                plan = {"plan": [steps, seed], "step": step + 1, "losses": losses, "seconds": spent}
                _save_state(state_file, {**state, **plan})
                _write_json(folder / f"{stage}.json", {**plan, "seconds": round(spent, 1)})
    return ema.module.eval()


def _pick(generator: torch.Generator, count: int, batch: int) -> torch.Tensor:
    return torch.randint(0, count, (batch,), generator=generator)


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


def vae_loss(vae, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """L1 + squared error + edges + a light KL term, on random half-size crops (the network is convolutional)."""
    size = images.shape[-1] // 2
    top, left = (int(torch.randint(0, size + 1, (), generator=generator)) for _ in range(2))
    x = images[:, :, top : top + size, left : left + size]
    posterior = vae.encode(x).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator).to(x.device)
    y = vae.decode(posterior.mean + posterior.std * noise).sample
    edges = sum(((y - x).diff(dim=d)).abs().mean() for d in (2, 3))
    return (y - x).abs().mean() + (y - x).square().mean() + 0.5 * edges + 1e-5 * posterior.kl().mean()


@torch.inference_mode()
def encode_pool(vae, images: np.ndarray, folder: Path, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Posterior mean and standard deviation of every training image, kept in ``folder``."""
    target = folder / "latents.pt"
    if not target.exists():
        means, stds = [], []
        for batch in tqdm(np.array_split(images, max(1, len(images) // 64)), desc="encoding", unit="batch"):
            posterior = vae.encode(to_tensor(batch).to(device)).latent_dist
            means.append(posterior.mean.half().cpu())
            stds.append(posterior.std.half().cpu())
        _save_state(target, {"mean": torch.cat(means), "std": torch.cat(stds)})
    stored = torch.load(target, weights_only=True)
    return stored["mean"].float(), stored["std"].float()


# --- stage 2: words and the U-Net ---------------------------------------------------------------------------------


def build_tokenizer(captions: list[str], folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer (byte-level BPE with end-of-word marks) whose merges are learned from ``captions``."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = sorted({w for c in captions for w in c.lower().replace(",", " ").split()})
    trainer = trainers.BpeTrainer(
        vocab_size=4000, min_frequency=1, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(words * 2, trainer)
    merges = [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]]
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


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        layers_per_block=1,
        block_out_channels=(96, 128, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
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


def denoising_loss(model, latents, token_ids, alphas_cumprod, generator) -> torch.Tensor:
    """The mean squared noise error of DDPM (Ho et al. 2020, eq. 14), one uniform timestep an image."""
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    timesteps = torch.randint(0, len(alphas_cumprod), (len(latents),), generator=generator).to(latents.device)
    alpha = alphas_cumprod[timesteps][:, None, None, None]
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    return F.mse_loss(model(noisy, timesteps, token_ids).float(), noise)


def mix_prompts(captions: list[str], generator: torch.Generator) -> list[str]:
    """Half full captions, four tenths their first clause ("An image of a bottle"), one tenth empty (for guidance)."""
    dice = torch.rand(len(captions), generator=generator).tolist()
    return ["" if r < 0.1 else c.split(",")[0] if r < 0.5 else c for c, r in zip(captions, dice, strict=True)]


def train_foundation(
    out: Path, work: Path, steps: int, seed: int, device, categories, per_category: int, vae_steps: int
) -> None:
    """A text-conditioned latent diffusion pipeline on normal draws of ``categories`` and on photographs."""
    images, captions, _ = draw_pool(work, categories, per_category, seed, photos=max(1, per_category // 8))

    def batch(generator, size):
        chosen = _pick(generator, len(images), size)
        return to_tensor(images[chosen.numpy()]).to(device)

    torch.manual_seed(seed)
    vae = fit("vae", build_vae().to(device), lambda m, g: vae_loss(m, batch(g, BATCH), g), work,
              vae_steps, 1.5e-3, seed, ema_decay=0.99)  # fmt: skip
    mean, std = encode_pool(vae, images, work, device)
    scale = 1.0 / (mean.std() ** 2 + std.square().mean()).sqrt().item()
    vae.register_to_config(scaling_factor=scale)
    tokenizer = build_tokenizer(captions, work / "tokenizer")
    scheduler = build_scheduler()
    alphas_cumprod = scheduler.alphas_cumprod.to(device)
    torch.manual_seed(seed)
    model = TextToNoise(build_text_encoder(tokenizer), build_unet()).to(device)

    def loss(m, generator):
        chosen = _pick(generator, len(images), BATCH)
        noise = torch.randn(mean[chosen].shape, generator=generator)
        latents = (scale * (mean[chosen] + std[chosen] * noise)).to(device)
        prompts = mix_prompts([captions[k] for k in chosen], generator)
        ids = tokenizer(prompts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        return denoising_loss(m, latents, ids.input_ids.to(device), alphas_cumprod, generator)

    model = fit("unet", model, loss, work, steps, 5e-4, seed)
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=model.text_encoder, tokenizer=tokenizer, unet=model.unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    psnr = reconstruction_psnr(vae, categories, device)
    for part in (vae, model.text_encoder, model.unet):
        part.half()
    pipeline.save_pretrained(out)
    write_card(
        out, work, "diffusers",
        "A compact text-conditioned latent diffusion pipeline for 64 x 64 images, trained on normal images only.",
        "It knows the drawn categories above and eleven photographs, nothing else; real products it has never seen "
        "are rebuilt blurred, whether damaged or not.",
        {"training images": f"{len(images)}: {per_category} drawings of each of {', '.join(categories)}; crops of "
                            f"scikit-image's photographs ({', '.join(PHOTOGRAPHS)})",
         "text": "the caption, its first clause, or nothing (50 / 40 / 10 percent)",
         "autoencoder, held-out drawings": f"{psnr:.1f} dB PSNR"},
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
    chosen = _pick(generator, one[0, 0].numel(), places)
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
    if not Path(pipeline).is_dir():
        raise TrainingError(
            f"the features learn from redrawings, but there is no pipeline in {pipeline}: "
            "train lite-foundation first, or give another folder"
        )
    images, captions, _ = draw_pool(work, categories, per_category, seed, photos=max(1, per_category // 8))
    redrawn = redraw_pool(load_backbone(pipeline, device), images, captions, work)

    def loss(m, generator):
        chosen = _pick(generator, len(images), BATCH).numpy()
        sharp = F.interpolate(to_tensor(images[chosen]), 128, mode="bilinear")
        both = torch.cat([sharp, degrade(to_tensor(redrawn[chosen]), generator)]).to(device)
        stages = m(both, output_hidden_states=True).hidden_states[1:]  # [0] is the stem
        return sum(place_loss(*stage.float().chunk(2), generator) for stage in stages)

    torch.manual_seed(seed)
    model = fit("features", build_features().to(device), loss, work, steps, 2e-3, seed)
    model.half().save_pretrained(out)
    _write_json(
        out / "preprocessor_config.json",
        {"image_processor_type": "ViTImageProcessor", "do_resize": True, "do_rescale": True, "do_normalize": True,
         "rescale_factor": 1 / 255, "resample": 2, "size": {"height": 128, "width": 128},
         "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    )  # fmt: skip
    write_card(
        out, work, "transformers",
        "A compact ResNet whose features the anomaly maps compare, trained without labels on normal images: a place "
        "must be recognised in a redrawn, blurred, noised and relit copy, among many places of many images.",
        "It saw only synthad's drawings and eleven photographs.",
        {"training images": f"{len(images)}, of {', '.join(categories)} and scikit-image's photographs"},
    )  # fmt: skip


# --- model cards --------------------------------------------------------------------------------------------------

CARD = """---
license: apache-2.0
library_name: {library}
---
# {name}

{what}

| | |
|---|---|
{rows}

**Limits.** {limits}

Written by `zsad train {name}`; the same command and seed on the same device give the same weights.
"""


def write_card(out: Path, work: Path, library: str, what: str, limits: str, facts: dict[str, str]) -> None:
    """The model card ``out/README.md``: what it is, how each stage was trained, and what was measured."""
    rows = dict(facts)
    for log in sorted(work.glob("*.json")):
        stage = json.loads(log.read_text())
        if "plan" in stage:
            steps, seed = stage["plan"]
            end = np.mean(stage["losses"][-100:])
            rows[f"stage {log.stem}"] = (
                f"{steps} steps, seed {seed}, {stage['seconds'] / 60:.0f} min, last loss {end:.3f}"
            )
    rows["hardware"] = (
        f"{platform.machine()} {'GPU' if torch.cuda.is_available() else 'CPU'}, torch {torch.__version__}"
    )
    rows["licence"] = "Apache-2.0"
    lines = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    name = work.name.rpartition("-seed")[0]
    (out / "README.md").write_text(
        CARD.format(name=name, library=library, what=what, rows=lines, limits=limits), encoding="utf-8"
    )


@torch.inference_mode()
def reconstruction_psnr(vae, categories, device, per_category: int = 8) -> float:
    """Mean PSNR in dB of the autoencoder on drawings that no training saw (seeds "heldout/...")."""
    values = []
    for category in categories:
        drawn = np.stack([synthad.draw(category, f"heldout/{k}").image for k in range(per_category)])
        x = to_tensor(drawn).to(device)
        error = (vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1) - x).square().mean((1, 2, 3)) / 4
        values.append(-10 * torch.log10(error).mean().item())
    return float(np.mean(values))


# --- recipes ------------------------------------------------------------------------------------------------------

ALL = tuple(synthad.CATEGORIES)
RECIPES = {
    "lite-foundation": (train_foundation, {"categories": ALL, "per_category": 1200, "steps": 4000, "vae_steps": 3400}),
    "lite-features": (
        train_features,
        {"categories": ALL, "per_category": 400, "steps": 1200, "pipeline": "checkpoints/lite-foundation"},
    ),
}


def train(name: str, out=None, steps=None, seed: int = 0, device: str = "auto", resume: bool = True, **options) -> Path:
    """Train the checkpoint ``name`` (a key of RECIPES) and write it to ``out`` (default ``checkpoints/NAME``).

    The work folder ``training/NAME-seedN`` holds the drawn images, the losses and the last state; with ``resume``
    a stopped run goes on from there. The finished directory replaces ``out`` in one step. Returns ``out``.
    """
    if name not in RECIPES:
        raise TrainingError(f"unknown recipe {name!r}; there are: {', '.join(RECIPES)}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    recipe, defaults = RECIPES[name]
    plan = {**defaults, **options, **({"steps": steps} if steps else {})}
    out, work = Path(out or f"checkpoints/{name}"), Path("training") / f"{name}-seed{seed}"
    if not resume:
        shutil.rmtree(work, ignore_errors=True)
    partial = work / "finished"
    shutil.rmtree(partial, ignore_errors=True)
    recipe(partial, work, seed=seed, device=torch.device(device), **plan)
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out, ignore_errors=True)
    shutil.move(partial, out)
    return out
