"""The compact models and how each is trained: from normal images only, into standard Hugging Face directories."""

from pathlib import Path

from zsad_lib.training import recipe
from zsad_lite import synthad
from zsad_lite.training import guides
from zsad_lite.training.captioner import CaptionerRecipe
from zsad_lite.training.features import FeaturesRecipe
from zsad_lite.training.pipeline import PipelineRecipe
from zsad_lite.training.pixel import PixelRecipe

ALL = tuple(synthad.CATEGORIES)


def _group(letter: str) -> PipelineRecipe:
    """As in DZAD, whose base is Stable Diffusion: the autoencoder is shared, and half of the images are of no product,
    so that the network predicts noise on products it has never seen; of products it saw one group alone."""
    return PipelineRecipe(
        2800, synthad.GROUPS[letter], per_category=1600, pictures=12_000, widths=(64, 64, 80), attention_levels=3,
        learning_rate=8e-4, autoencoder="checkpoints/lite-foundation",
        tokenizer=f"checkpoints/lite-group-{letter.lower()}/tokenizer",
    )  # fmt: skip


RECIPES = {
    "lite-foundation": PipelineRecipe(
        4000, ALL, per_category=1200, vae_steps=3400, tokenizer="checkpoints/lite-foundation/tokenizer"
    ),
    "lite-group-a": _group("A"),
    "lite-group-b": _group("B"),
    "lite-features": FeaturesRecipe(1200, ALL, per_category=400, pipeline="checkpoints/lite-foundation"),
    "lite-ddpm-synthad": PixelRecipe(4000, ALL, per_category=1200),
    "lite-ddpm-cifar10": PixelRecipe(3000),
    "lite-captioner": CaptionerRecipe(1500, ALL, per_category=1200),
    **guides.RECIPES,
}


def train(name: str, out: str | Path | None = None, steps: int | None = None, **options) -> Path:
    """`recipe.train` of one of RECIPES; "dzad" and "vlmdiff" are those of SHIPPED where train_on is one of theirs."""
    name = guides.SHIPPED.get((name, options.get("train_on")), name)
    return recipe.train(RECIPES, name, out, steps, **options)
