"""zsad_lib.diffusion.loading"""

import hashlib
import json
import math
import re
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from zsad_lib import manifest
from zsad_lib.errors import DataError, ModelError

RANDOM_SEED = 0  # of the re-initialised control models


def fingerprint(*modules, values=64):
    """16 hex digits that tell two sets of weights apart.

    From the names, the shapes and `values` evenly spread numbers of each tensor. The same on every device; a
    change of dtype changes it.
    """
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            flat = tensor.detach().flatten()
            picked = flat[:: max(1, math.ceil(len(flat) / values))].cpu().double()
            digest.update(f"{name} {tuple(tensor.shape)}".encode() + picked.numpy().tobytes())
    return digest.hexdigest()[:16]


def pick_device(device="auto"):
    """A torch.device; "auto" is CUDA when there is one, else the CPU. ModelError: CUDA without a GPU."""
    cuda = torch.cuda.is_available()
    device = torch.device(("cuda" if cuda else "cpu") if device == "auto" else device)
    if device.type == "cuda" and not cuda:
        raise ModelError("device 'cuda' was asked for, but torch finds no CUDA GPU; use device='auto' or 'cpu'")
    return device


def pick_dtype(dtype, device):
    names = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if dtype == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    if dtype not in names and dtype not in names.values():
        raise ModelError(f"dtype {dtype!r} is unknown; use 'auto' or one of {list(names)}")
    return names.get(dtype, dtype)


@dataclass
class Location:
    """Where a model is read from: a local folder, or a hub id at a revision."""

    name: str
    source: str
    local: bool
    revision: str | None = None


def locate(name_or_path, needed, layout):
    """Where to read a model from; a folder is checked for the files that its layout needs."""
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


def fetch(where, part, loader, *args, **kwargs):
    """loader(source, ...) with its reports silenced and its failure turned into a ModelError."""
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
            f"{where.source} is neither a folder here nor complete in the local hub cache, and fetching "
            f"it failed: {reason} Fetch it once where there is a network (hf download {where.source}), or "
            "pass the path of a folder"
        ) from error


def read_weights(where, part, cls, heads=False, **kwargs):
    """A model whose weights are all read from its files: the libraries would fill gaps with random numbers.

    `heads`: the files may hold more than the model has (a classifier, a pooler).
    """
    model, info = fetch(where, part, cls.from_pretrained, output_loading_info=True, **kwargs)
    wrong = {
        "missing": set(info["missing_keys"]),
        "mismatched": {str(key) for key in info["mismatched_keys"]},
        "unexpected": set() if heads else set(info["unexpected_keys"]),
    }
    found = [f"{len(keys)} {kind} ({', '.join(sorted(keys)[:3])} ...)" for kind, keys in wrong.items() if keys]
    if found:
        raise ModelError(
            f"{where.source}{'/' + part if part else ''}: the weights do not fit config.json: "
            f"{'; '.join(found)}. Restore the folder or download it again"
        )
    return model


@contextmanager
def quiet(bars):
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


def reinitialised(model, build, **options):
    """A model of the same configuration with the library's random weights, the same every time."""
    with torch.random.fork_rng(devices=[]), quiet(bars=False):
        torch.default_generator.manual_seed(RANDOM_SEED)
        return build(model.config, **options).to(model.dtype)


def preprocessing(path):
    """(input size, mean, std) of a preprocessor_config.json."""
    values = json.loads(Path(path).read_text(encoding="utf-8"))
    size = values.get("size")
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge")
    if not (isinstance(size, int) and "image_mean" in values and "image_std" in values):
        raise ModelError(f"{path} must name size, image_mean and image_std")
    return size, tuple(values["image_mean"]), tuple(values["image_std"])
