"""Reading networks from Hugging Face layouts, never by guessing: folders, names of data_manifest.yaml and hub ids.

What the libraries would only warn about (weights that are missing, left over or of another shape) is refused here.
"""

import hashlib
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zsad_lib import manifest
from zsad_lib.errors import DataError, ModelError

RANDOM_SEED = 0  # of the re-initialised control models
CONTROL_NAMES = {None: "", "unet": " (random U-Net)", "all": " (random weights)"}  # what of a model is random
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def fingerprint(*modules: nn.Module, values: int = 64) -> str:
    """16 hex digits of weights, alike on every device: of names, shapes and `values` spread numbers of each tensor."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            flat = tensor.detach().flatten()
            picked = flat[:: max(1, math.ceil(len(flat) / values))].cpu().double()
            digest.update(f"{name} {tuple(tensor.shape)}".encode() + picked.numpy().tobytes())
    return digest.hexdigest()[:16]


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """A torch.device; "auto" is CUDA when there is one, else the CPU."""
    cuda = torch.cuda.is_available()
    device = torch.device(("cuda" if cuda else "cpu") if device == "auto" else device)
    if device.type == "cuda" and not cuda:
        raise ModelError("device 'cuda' was asked for, but torch finds no CUDA GPU; use device='auto' or 'cpu'")
    return device


def pick_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """A torch.dtype; "auto" is float16 on CUDA, else float32."""
    if dtype == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    if dtype not in DTYPES and dtype not in DTYPES.values():
        raise ModelError(f"dtype {dtype!r} is unknown; use 'auto' or one of {list(DTYPES)}")
    return DTYPES.get(dtype, dtype)


# --- files


@dataclass
class Location:
    """Where a model is read from: a local folder, or a hub id at a revision."""

    name: str
    source: str
    local: bool
    revision: str | None = None


def locate(name_or_path: str | Path, needed: Sequence[str], layout: str) -> Location:
    """Where to read a model from: a folder that has the files `needed`, a checkpoint of the manifest, or a hub id."""
    name = str(name_or_path)
    path = Path(name_or_path)
    if not path.is_dir():  # a name then
        if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
            return Location(name, name, local=False)
        if path.name != name:
            raise ModelError(f"no folder at {path}; give a folder, a checkpoint of data_manifest.yaml or a hub id")
        try:
            entry = manifest.checkpoint_entry(name)
        except DataError as error:
            raise ModelError(f"{name!r} is no folder, no hub id (owner/name), and: {error}") from error
        path = manifest.local_path(entry)
        if path is None:
            return Location(name, entry["hub_id"], local=False, revision=entry["revision"])
        if not path.is_dir():
            raise ModelError(f"checkpoint {name!r} is not at {path}. {entry.get('fetch', '')}".strip())
    missing = [part for part in needed if not (path / part).is_file()]
    if missing:
        raise ModelError(f"{path} is not a {layout} folder: it lacks {', '.join(missing)}")
    return Location(path.resolve().name, str(path), local=True)


def fetch(where: Location, part: str | None, loader: Callable, *args, **kwargs) -> Any:
    """loader(source, ...) for a part (subfolder) of a model, with the libraries' reports silenced."""
    if part:
        kwargs["subfolder"] = part
    if where.revision:
        kwargs["revision"] = where.revision
    try:
        with quiet(bars=where.local):
            return loader(where.source, *args, **kwargs)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        if where.local:
            what = f"{where.source}/{part}" if part else where.source
            raise ModelError(f"{what} cannot be read: {reason}. Restore the folder or download it again") from error
        raise ModelError(
            f"{where.source} is neither a folder here nor complete in the local hub cache, and fetching it failed: "
            f"{reason} Fetch it once where there is a network (hf download {where.source}), or give a folder's path"
        ) from error


def read_weights(where: Location, part: str | None, cls: Any, heads: bool = False, **kwargs) -> nn.Module:
    """A model whose weights are all read from its files; with `heads` they may hold more (a classifier, a pooler)."""
    model, info = fetch(where, part, cls.from_pretrained, output_loading_info=True, **kwargs)
    wrong = {
        "missing": set(info["missing_keys"]),
        "mismatched": {str(key) for key in info["mismatched_keys"]},
        "unexpected": set() if heads else set(info["unexpected_keys"]),
    }
    found = [f"{len(keys)} {kind} ({', '.join(sorted(keys)[:3])} ...)" for kind, keys in wrong.items() if keys]
    if found:
        raise ModelError(
            f"{where.source}{'/' + part if part else ''}: the weights do not fit config.json: {'; '.join(found)}. "
            "Restore the folder or download it again"
        )
    return model


@contextmanager
def quiet(bars: bool) -> Iterator[None]:
    """The libraries' warnings (and progress `bars`) off: what they report is checked here and raised."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    levels = [library.get_verbosity() for library in libraries]
    shown = [library for library in libraries if bars and library.is_progress_bar_enabled()]
    for library in libraries:
        library.set_verbosity_error()
    for library in shown:
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # an argument that diffusers still passes to the hub's client
            warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")
            yield
    finally:
        for library, level in zip(libraries, levels, strict=True):
            library.set_verbosity(level)
        for library in shown:
            library.enable_progress_bar()


def preprocessing(path: str | Path) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
    """(input size, mean, std) of a preprocessor_config.json."""
    values = json.loads(Path(path).read_text(encoding="utf-8"))
    size = values.get("size")
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge")
    if not (isinstance(size, int) and "image_mean" in values and "image_std" in values):
        raise ModelError(f"{path} must name size, image_mean and image_std")
    return size, tuple(values["image_mean"]), tuple(values["image_std"])


# --- controls


def check_control(random_weights: str | None, known: Sequence[str | None] = tuple(CONTROL_NAMES)) -> None:
    """Whether a loader knows what is to be random."""
    if random_weights not in known:
        raise ModelError(f"random_weights {random_weights!r} is unknown; use one of {list(known)}")


@contextmanager
def control_seed() -> Iterator[None]:
    """What torch draws inside is the same every time, and leaves no trace outside."""
    with torch.random.fork_rng(devices=[]), quiet(bars=False):
        torch.default_generator.manual_seed(RANDOM_SEED)
        yield


def reinitialised(model: nn.Module, build: Callable, **options) -> nn.Module:
    """A model of the same configuration with the library's random weights, the same every time."""
    with control_seed():
        return build(model.config, **options).to(model.dtype)
