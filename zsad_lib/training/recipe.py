"""What `zsad train` does with a recipe: its options checked, a work folder to go on from, the finished checkpoint."""

import filecmp
import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch

from zsad_lib import manifest, store
from zsad_lib.diffusion.loading import pick_device
from zsad_lib.errors import TrainingError
from zsad_lib.settings import AtLeast, Positive, check_settings
from zsad_lib.training.cards import read_name

Count = Annotated[int, AtLeast(0)]
LONGEST = 100  # characters of a variant's name, which becomes a folder's


@dataclass(frozen=True)
class Recipe(ABC):
    """One kind of model to train; the fields are its options."""

    steps: Positive

    def __post_init__(self) -> None:
        check_settings(self, TrainingError)

    def check(self) -> None:  # noqa: B027 (most have nothing to refuse)
        """Refuse options that cannot work, before anything is read or drawn."""

    @abstractmethod
    def train(self, out: Path, work: Path, seed: int, device: torch.device) -> None:
        """Fill the empty folder `out`; keep in `work` what is measured once."""


def train(
    recipes: Mapping[str, Recipe],
    name: str,
    out: str | Path | None = None,
    steps: int | None = None,
    seed: int = 0,
    device: str = "auto",
    resume: bool = True,
    overwrite: bool = False,
    **options,
) -> Path:
    """Train the checkpoint `name`, a key of `recipes`, into the folder `out` (default checkpoints/VARIANT), returned.

    The work folder training/VARIANT holds the images, the losses and the last state; with `resume` a stopped run goes
    on from there. What is at `out` stays until the new one is complete; a checkpoint that ships with the project, or
    of another variant, is replaced only with `overwrite`, and anything else never.
    """
    if name not in recipes:
        raise TrainingError(f"unknown recipe {name!r}; there are: {', '.join(recipes)}")
    unknown = sorted(set(options) - set(vars(recipes[name])))
    if unknown:
        raise TrainingError(f"{name} has no option {', '.join(unknown)}; it has: {', '.join(vars(recipes[name]))}")
    if not 0 <= seed < 2**32:
        raise TrainingError(f"seed must be from 0 to {2**32 - 1}, not {seed}")
    recipe = replace(recipes[name], **options | ({} if steps is None else {"steps": steps}))
    recipe.check()
    device, label = pick_device(device), variant(name, recipes[name], recipe, seed)
    out, work = Path(out or f"checkpoints/{label}"), Path("training") / label
    check_replaceable(out, label, overwrite)
    with store.locked(work.with_name(f".{label}.lock"), str(work)), store.writing_folder(out) as new:
        if not resume:
            shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True, exist_ok=True)
        recipe.train(new, work, seed, device)
        for source in (getattr(recipe, "autoencoder", None), getattr(recipe, "base", None)):
            if source and Path(source).resolve() != out.resolve():
                share_files(new, Path(source))
        check_replaceable(out, label, overwrite)  # again: a training takes its time
    return out


def variant(name: str, recipe: Recipe, changed: Recipe, seed: int = 0) -> str:
    """The name of what a recipe makes: with --option=value for each that is not its own ("--timesteps=1400")."""
    values = vars(changed) | {"seed": seed}
    options = {key: value for key, value in sorted(values.items()) if value != (vars(recipe) | {"seed": 0})[key]}
    if "train_on" in options:
        name = f"{name}-{_safe(options.pop('train_on'))}"
    name += "".join(f"--{key}={_safe(value)}" for key, value in options.items())
    return name if len(name) <= LONGEST else f"{name[:LONGEST]}-{store.digest(name.encode())[:8]}"


def _safe(value: Any) -> str:
    """A value as a part of a file's name; two that differ stay different."""
    text = str(value)
    safe = re.sub(r"[^\w.+-]+", "_", text, flags=re.ASCII)
    return text if safe == text else f"{safe[-30:]}-{store.digest(text.encode())[:8]}"


def check_replaceable(out: Path, label: str, overwrite: bool = False) -> None:
    """TrainingError where `out` is there and not to be replaced by the variant `label`: see `train`."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    found = read_name(out)
    if found is None:
        raise TrainingError(f"{out} is there and no checkpoint of zsad train: choose another folder with --out")
    shipped = [manifest.local_path(entry) for entry in manifest.load_manifest()["checkpoints"].values()]
    ships = out.resolve() in [path.resolve() for path in shipped if path]
    if not overwrite and (ships or found != label):
        what = "ships with the project" if ships else f"is the checkpoint {found}, not {label}"
        raise TrainingError(f"{out} {what}: choose another folder with --out, or replace it with --overwrite")


def share_files(out: Path, source: Path) -> None:
    """Replace the weights in `out` equal to those of the model `source` beside it by links, as the hub's cache does."""
    for file in out.rglob("*.safetensors"):
        twin = source / file.relative_to(out)
        beside = source.resolve().parent == out.resolve().parent
        if beside and twin.is_file() and not twin.is_symlink() and filecmp.cmp(file, twin, shallow=False):
            file.unlink()
            file.symlink_to(os.path.relpath(twin.resolve(), file.resolve().parent))
