"""The compact latent diffusion pipelines: an autoencoder, then a text encoder and a U-Net together."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from zsad_lib.diffusion.latent import load_backbone
from zsad_lib.errors import TrainingError
from zsad_lib.settings import NotNegative, Positive
from zsad_lib.training.cards import write_card
from zsad_lib.training.fit import begin, encode_pool, fit, fit_autoencoder, latent_loss
from zsad_lib.training.guides import save_pipeline
from zsad_lib.training.recipe import Count, Recipe
from zsad_lite.training.pools import GENERIC, PHOTOGRAPHS, draw_pool

MAX_TOKENS = 32
LATENT_CHANNELS = 8  # Stable Diffusion has 4; at 64 px 4 would lose the small parts


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
    """A CLIP tokenizer (byte-level BPE with end-of-word marks) whose merges are learned from `captions`."""
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


def build_unet(widths: Sequence[int] = (96, 128, 128), attention_levels: int = 2) -> UNet2DConditionModel:
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

    def forward(self, latents: torch.Tensor, timesteps: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        words = self.text_encoder(token_ids).last_hidden_state
        return self.unet(latents, timesteps, words).sample


def mix_prompts(captions: list[str], generator: torch.Generator) -> list[str]:
    """Half full captions, four tenths their first clause ("An image of a bottle"), one tenth empty (for guidance)."""
    dice = torch.rand(len(captions), generator=generator).tolist()
    return ["" if r < 0.1 else c.split(",")[0] if r < 0.5 else c for c, r in zip(captions, dice, strict=True)]


def require_pipeline(folder: str) -> None:
    if not Path(folder).is_dir():
        raise TrainingError(f"there is no pipeline in {folder}: train lite-foundation first, or give another folder")


@dataclass(frozen=True)
class PipelineRecipe(Recipe):
    """A text-conditioned latent diffusion pipeline on normal drawings and on photographs."""

    categories: tuple[str, ...]
    per_category: Positive  # drawings of each
    vae_steps: Count = 0
    autoencoder: str | None = None  # a pipeline whose autoencoder is kept as it is; without it one is trained
    tokenizer: str | None = None  # kept where it exists, so that a rerun numbers the words as the shipped model does
    widths: tuple[Positive, ...] = (96, 128, 128)
    attention_levels: Count = 2
    pictures: Count = 0  # of no product, mixed in under the empty prompt
    surfaces: Count = 0  # bare ones, likewise
    learning_rate: NotNegative = 5e-4
    ema_decay: NotNegative = 0.995
    keep: tuple[Positive, ...] = ()  # steps after which the average is kept besides

    def check(self) -> None:
        if self.autoencoder:
            require_pipeline(self.autoencoder)
        elif not self.vae_steps:
            raise TrainingError("no autoencoder: --set vae_steps=NUMBER trains one, --set autoencoder=FOLDER keeps one")

    def train(self, out: Path, work: Path, seed: int, device: torch.device) -> None:
        photos = max(1, self.per_category // 8)
        images, captions = draw_pool(
            work, self.categories, self.per_category, seed, photos, pictures=self.pictures, surfaces=self.surfaces
        )
        if self.tokenizer and Path(self.tokenizer).is_dir():
            tokenizer = CLIPTokenizer.from_pretrained(self.tokenizer)
        else:
            tokenizer = build_tokenizer(captions, work / "tokenizer")
        kept = load_backbone(self.autoencoder, device) if self.autoencoder else None
        begin(work, repr(self), images, captions, tokenizer.get_vocab(), kept and kept.config)
        vae, pool = self._encoded(kept, images, work, seed, device)
        scheduler = build_scheduler()
        torch.manual_seed(seed)
        model = TextToNoise(build_text_encoder(tokenizer), build_unet(self.widths, self.attention_levels)).to(device)

        def predictor(m, chosen, generator):
            prompts = mix_prompts([captions[k] for k in chosen], generator)
            ids = tokenizer(prompts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
            ids = ids.input_ids.to(device)
            return lambda z, t: m(z, t, ids)

        loss = latent_loss(pool, vae.config.scaling_factor, scheduler.alphas_cumprod.to(device), predictor)
        model = fit(
            "unet", model, loss, work, self.steps, self.learning_rate, seed, self.ema_decay, keep=tuple(self.keep)
        )
        save_pipeline(out, vae, model.text_encoder, tokenizer, model.unet, scheduler)
        self._write_card(out, work, len(images))

    def _encoded(self, kept, images, work, seed, device):
        """The autoencoder, and the posteriors of the images."""
        if kept:
            return kept.vae, encode_pool(kept.vae, images, work)
        torch.manual_seed(seed)
        vae = fit_autoencoder(build_vae().to(device), images, work, self.vae_steps, seed, 1.5e-3)
        mean, std = encode_pool(vae, images, work)
        vae.register_to_config(scaling_factor=1.0 / (mean.std() ** 2 + std.square().mean()).sqrt().item())
        return vae, (mean, std)

    def _write_card(self, out, work, count):
        write_card(
            out, work, "diffusers",
            "A compact text-conditioned latent diffusion pipeline for 64 x 64 images, trained on normal images only.",
            f"It knows the drawn categories above, eleven photographs"
            f"{' and pictures of no product' * bool(self.pictures)}, nothing else; real products it has never seen are "
            "rebuilt blurred, whether damaged or not.",
            {"training images": f"{count}: {self.per_category} drawings of each of {', '.join(self.categories)}; crops "
                                f"of scikit-image's photographs ({', '.join(PHOTOGRAPHS)})"
                                + f"; {self.pictures} {GENERIC}" * bool(self.pictures)
                                + f"; {self.surfaces} bare surfaces" * bool(self.surfaces),
             "text": "the caption, its first clause, or nothing (50 / 40 / 10 percent)",
             "autoencoder": f"{Path(self.autoencoder).name}'s, unchanged: it saw that model's images"
                            if self.autoencoder else "trained on the same images"},
        )  # fmt: skip
