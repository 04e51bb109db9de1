"""The compact feature extractor, trained without labels: a place must be recognised in its redrawn, degraded copy."""

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import ResNetConfig, ResNetModel

from zsad_lib import store
from zsad_lib.diffusion import ddim
from zsad_lib.diffusion.latent import Backbone, load_backbone
from zsad_lib.settings import Positive
from zsad_lib.training.cards import write_card
from zsad_lib.training.fit import begin, fit, pick, to_tensor
from zsad_lib.training.recipe import Recipe
from zsad_lite.training.pipeline import require_pipeline
from zsad_lite.training.pools import draw_pool

REDRAW_STARTS = ((1, 301), (101, 401), (101, 601), (201, 501))  # (t_latent, t_denoise), in steps of 100


def build_features() -> ResNetModel:
    sizes = {"embedding_size": 32, "hidden_sizes": [32, 64], "depths": [2, 2]}
    return ResNetModel(ResNetConfig(**sizes, layer_type="basic", downsample_in_first_stage=False))


def degrade(x: torch.Tensor, generator: torch.Generator, size: int = 128) -> torch.Tensor:
    """Images [B, 3, H, W] in [-1, 1], randomly blurred, noised and relit, at `size` px.

    A reconstruction is always a little blurred: features that read blur as content would see anomalies everywhere.
    """
    side = int(x.shape[-1] * (0.5 + 0.5 * torch.rand((), generator=generator)))
    x = F.interpolate(F.interpolate(x, side, mode="bilinear", antialias=True), size, mode="bilinear")
    gain, noise = (torch.rand(len(x), 1, 1, 1, generator=generator) for _ in range(2))
    return x * (0.8 + 0.4 * gain) + 0.1 * noise * torch.randn(x.shape, generator=generator)


def place_loss(one: torch.Tensor, two: torch.Tensor, generator: torch.Generator, places: int = 64) -> torch.Tensor:
    """Tell places apart: InfoNCE between features [B, C, h, w] of images and of degraded copies of them.

    A place of one copy must be most similar, by cosine, to the same place of the other copy, among `places` random
    places of every image of the batch. That is the very comparison an anomaly map makes.
    """
    chosen = pick(generator, one[0, 0].numel(), places)
    one, two = (F.normalize(f.flatten(2)[:, :, chosen].movedim(1, 2).flatten(0, 1), dim=1) for f in (one, two))
    return F.cross_entropy(one @ two.T / 0.1, torch.arange(len(one), device=one.device))


@torch.inference_mode()
def redraw_pool(backbone: Backbone, images: np.ndarray, captions: list[str], folder: Path) -> np.ndarray:
    """Every image as DIVAD redraws it, uint8 like `images`, kept in `folder`; the starts take turns, batch by batch.

    All of them are normal, so whatever changes is the pipeline's own doing.
    """

    def redraw() -> dict[str, np.ndarray]:
        redrawn = np.empty_like(images)
        batches = np.array_split(np.random.default_rng(0).permutation(len(images)), max(1, len(images) // 64))
        for k, chosen in enumerate(tqdm(batches, desc="redrawing", unit="batch")):
            nouns = [captions[i].split(",")[0] for i in chosen]
            redrawn[chosen] = _redraw(backbone, images[chosen], nouns, *REDRAW_STARTS[k % len(REDRAW_STARTS)])
        return {"images": redrawn}

    key = store.fingerprint([backbone.config, hashlib.sha256(images).hexdigest(), captions])
    return store.kept(folder / "redrawn.npz", key, redraw)["images"]


def _redraw(backbone, images, prompts, t_latent, t_denoise):
    alphas_cumprod, predict = backbone.alphas_cumprod, partial(backbone.predict_noise, cond=backbone.embed(prompts))
    z = backbone.encode((to_tensor(images) + 1) / 2)
    if t_latent > 1:
        z = ddim.invert(predict, z, alphas_cumprod, 10, stop=t_latent)[-1][1]
    z = ddim.denoise(predict, z, alphas_cumprod, 10, start_step=9 - t_denoise // 100)
    return (backbone.decode(z) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


@dataclass(frozen=True)
class FeaturesRecipe(Recipe):
    """A small ResNet trained without labels, on normal images and their redrawings: see `place_loss`."""

    categories: tuple[str, ...]
    per_category: Positive  # drawings of each
    pipeline: str  # the folder of the pipeline whose redrawings the features will be used on

    def check(self) -> None:
        require_pipeline(self.pipeline)

    def train(self, out: Path, work: Path, seed: int, device: torch.device) -> None:
        images, captions = draw_pool(work, self.categories, self.per_category, seed, max(1, self.per_category // 8))
        redrawn = redraw_pool(load_backbone(self.pipeline, device), images, captions, work)
        begin(work, repr(self), images, redrawn)

        def loss(m, generator):
            chosen = pick(generator, len(images)).numpy()
            sharp = F.interpolate(to_tensor(images[chosen]), 128, mode="bilinear")
            both = torch.cat([sharp, degrade(to_tensor(redrawn[chosen]), generator)]).to(device)
            stages = m(both, output_hidden_states=True).hidden_states[1:]  # [0] is the stem
            return sum(place_loss(*stage.float().chunk(2), generator) for stage in stages)

        torch.manual_seed(seed)
        model = fit("features", build_features().to(device), loss, work, self.steps, 2e-3, seed)
        model.half().save_pretrained(out)
        write_preprocessor(out, 128)
        write_card(
            out, work, "transformers",
            "A compact ResNet whose features the anomaly maps compare, trained without labels on normal images: a "
            "place must be recognised in a redrawn, blurred, noised and relit copy, among many places of many images.",
            "It saw only synthad's drawings and eleven photographs.",
            {"training images": f"{len(images)}, of {', '.join(self.categories)} and scikit-image's photographs"},
        )  # fmt: skip


def write_preprocessor(out: Path, size: int) -> None:
    """How an image becomes the network's input: `size` pixels, values in [-1, 1]."""
    half = [0.5] * 3
    store.write_json(
        out / "preprocessor_config.json",
        {"image_processor_type": "ViTImageProcessor", "do_resize": True, "do_rescale": True, "do_normalize": True,
         "rescale_factor": 1 / 255, "resample": 2, "size": {"height": size, "width": size}, "image_mean": half,
         "image_std": half},
    )  # fmt: skip
