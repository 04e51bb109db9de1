"""What `zsad train` does with a recipe: its options checked, a work folder to go on from, the finished checkpoint."""

import filecmp
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from zsad_lib.diffusion.loading import pick_device
from zsad_lib.errors import TrainingError
from zsad_lib.settings import check_settings

UNNAMED = ("root", "data", "train_on")  # options that are no part of a variant's name


@dataclass(frozen=True)
class Recipe:
    """One kind of model to train; the fields are its options."""

    steps: int

    def __post_init__(self) -> None:
        check_settings(self, TrainingError)

    def check(self) -> None:
        """Refuse options that cannot work, before anything is read or drawn."""

    def train(self, out: Path, work: Path, seed: int, device: torch.device) -> None:
        """Fill the folder `out`; keep in `work` what is measured once."""
        raise NotImplementedError


def train(
    recipes: Mapping[str, Recipe],
    name: str,
    out: str | Path | None = None,
    steps: int | None = None,
    seed: int = 0,
    device: str = "auto",
    resume: bool = True,
    **options,
) -> Path:
    """Train the checkpoint `name`, a key of `recipes`, and write it to `out` (default checkpoints/NAME); returns `out`.

    The work folder training/NAME-seedN holds the images, the losses and the last state; with `resume` a stopped run
    goes on from there.
    """
    if name not in recipes:
        raise TrainingError(f"unknown recipe {name!r}; there are: {', '.join(recipes)}")
    unknown = sorted(set(options) - set(vars(recipes[name])))
    if unknown:
        raise TrainingError(f"{name} has no option {', '.join(unknown)}; it has: {', '.join(vars(recipes[name]))}")
    recipe = replace(recipes[name], **options | ({"steps": steps} if steps else {}))
    recipe.check()
    device, label = pick_device(device), variant(name, recipes[name], options)
    out, work = Path(out or f"checkpoints/{label}"), Path("training") / f"{label}-seed{seed}"
    if not resume:
        shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    finished = work / "finished"
    shutil.rmtree(finished, ignore_errors=True)
    recipe.train(finished, work, seed, device)
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out, ignore_errors=True)
    shutil.move(finished, out)
    for source in (getattr(recipe, "autoencoder", None), getattr(recipe, "base", None)):
        if source:
            share_files(out, Path(source))
    return out


def variant(name: str, recipe: Recipe, options: dict) -> str:
    """The name of what a recipe makes: with --option=value for each that is not its own ("--timesteps=1400")."""
    changed = {key: value for key, value in sorted(options.items()) if value != getattr(recipe, key)}
    if "train_on" in changed:
        name = f"{name}-{changed['train_on']}"
    parts = (f"{key}={value}" for key, value in changed.items() if key not in UNNAMED)
    return name + "".join("--" + re.sub(r"[^\w.=-]+", "_", part) for part in parts)


def share_files(out: Path, source: Path) -> None:
    """Replace the weights in `out` equal to those of the model `source` beside it by links, as the hub's cache does."""
    for file in out.rglob("*.safetensors"):
        twin = source / file.relative_to(out)
        beside = source.resolve().parent == out.resolve().parent
        if beside and twin.is_file() and not twin.is_symlink() and filecmp.cmp(file, twin, shallow=False):
            file.unlink()
            file.symlink_to(os.path.relpath(twin.resolve(), file.resolve().parent))
