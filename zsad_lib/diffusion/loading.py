"""Reading networks from Hugging Face layouts, never by guessing: folders, names of data_manifest.yaml and hub ids.

What the libraries would only warn about (weights that are missing, left over or of another shape) is refused here.
"""

import hashlib
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors import safe_open
from torch import Tensor, nn

from zsad_lib import manifest, store
from zsad_lib.errors import DataError, ModelError, RunError

RANDOM_SEED = 0  # of the re-initialised control models
CONTROL_NAMES = {None: "", "unet": " (random U-Net)", "all": " (random weights)"}  # what of a model is random
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# of a config.json, without effect on numbers
ORIGIN = ("transformers_version", "architectures", "dtype", "torch_dtype")
MAX_TIMESTEPS = 100_000  # of a schedule: more is a mistyped number that would fill the memory

_digests: WeakKeyDictionary[nn.Module, tuple] = WeakKeyDictionary()  # of weights, while they stay as they are


def fingerprint(*modules: nn.Module) -> str:
    """16 hex digits of all weights, alike on every device: of the name, dtype, shape and bytes of each tensor."""
    digest = hashlib.sha256()
    for module in modules:
        digest.update(_weights_digest(module))
    return digest.hexdigest()[:16]


def _weights_digest(module):
    """SHA-256 of a module's tensors, computed again once one of them was replaced or written to."""
    tensors = dict(sorted(module.state_dict().items()))
    state = [(name, t.data_ptr(), t._version, t.dtype, t.shape, t.stride()) for name, t in tensors.items()]
    if module not in _digests or _digests[module][0] != state:
        digest = hashlib.sha256()
        for name, tensor in tensors.items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
        _digests[module] = state, tensors, digest.digest()  # the tensors, so that none takes the address of another
    return _digests[module][2]


def configuration(*networks: Any) -> str:
    """16 hex digits of networks' config.json: of what their weights do not show, such as a scaling factor."""
    configs = (getattr(network.config, "to_diff_dict", lambda c=network.config: c)() for network in networks)
    told = [{key: value for key, value in c.items() if key[0] != "_" and key not in ORIGIN} for c in configs]
    return store.fingerprint(told)[:16]


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """A torch.device that works; "auto" is CUDA when there is one, else the CPU."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
        if found.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("torch finds no CUDA GPU")
        torch.zeros(1, device=found).item()
    except Exception as error:  # torch's are of many kinds
        raise ModelError(f"device {str(device)!r} cannot be used: {_reason(error)}. Use 'auto' or 'cpu'") from error
    return found


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
    try:
        return _locate(str(name_or_path), Path(name_or_path), needed, layout)
    except OSError as error:  # a folder that may not be read, a name that is too long
        raise ModelError(f"{_printable(name_or_path)} cannot be read: {_reason(error)}") from error


def _locate(name, path, needed, layout):
    if path.is_file():
        raise ModelError(f"{path} is a file; give the folder of a model")
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
    except ModelError:
        raise
    except Exception as error:
        reason = _reason(error)
        if where.local:
            what = f"{where.source}/{part}" if part else where.source
            raise ModelError(f"{what} cannot be read: {reason}. Restore the folder or download it again") from error
        raise ModelError(
            f"{where.source} is neither a folder here nor complete in the local hub cache, and fetching it failed: "
            f"{reason} Fetch it once where there is a network (hf download {where.source}), or give a folder's path"
        ) from error


def _reason(error: Exception) -> str:
    """The first line of an error, or its kind where it says nothing."""
    return _printable((str(error).strip() or type(error).__name__).split("\n")[0])


def _printable(text: Any) -> str:
    return "".join(c if c.isprintable() else " " for c in str(text))


def read_object(path: Path | str) -> dict:
    """The object of a model's JSON file."""
    try:
        values = store.read_json(path)
    except (RunError, RecursionError) as error:
        raise ModelError(_reason(error)) from error
    if not isinstance(values, dict):
        raise ModelError(f"{path} holds no JSON object: restore the folder or download it again")
    return values


def read_scheduler(where: Location, part: str | None, cls: Any) -> Any:
    """A scheduler of the class, on the β of the one that the files name."""

    def load(source: str, **options: Any) -> Any:
        config = cls.load_config(source, **options)
        kind, T, offset = (config.get(key) for key in ("_class_name", "num_train_timesteps", "steps_offset"))
        if not (config.get("beta_schedule") or config.get("trained_betas")):
            raise ModelError(f"{where.name} has a {kind}, which has no beta schedule; use a DDPM or DDIM")
        if not (type(T) is int and 1 < T <= MAX_TIMESTEPS and type(offset or 0) is int and 0 <= (offset or 0) < T):
            raise ModelError(f"{where.name} has a {kind} with num_train_timesteps {T!r} and steps_offset {offset!r}")
        scheduler = cls.from_config(config)
        if not ((scheduler.alphas_cumprod >= 0) & (scheduler.alphas_cumprod <= 1)).all():
            raise ModelError(f"{where.name} has a {kind} whose alphas_cumprod are not all in [0,1]")
        return scheduler

    return fetch(where, part, load)


def read_weights(where: Location, part: str | None, cls: Any, heads: bool = False, **kwargs) -> nn.Module:
    """A model whose weights are all read from its files; with `heads` they may hold more (a classifier, a pooler)."""
    from transformers.utils import cached_file

    model, info = fetch(where, part, cls.from_pretrained, output_loading_info=True, **kwargs)
    wrong = {
        "missing": set(info["missing_keys"]),
        "mismatched": {str(key) for key in info["mismatched_keys"]},
        "unexpected": set() if heads else set(info["unexpected_keys"]),
    }
    found = [f"{len(keys)} {kind} ({', '.join(sorted(keys)[:3])} ...)" for kind, keys in wrong.items() if keys]
    what = f"{where.source}{'/' + part if part else ''}"
    if found:
        raise ModelError(
            f"{what}: the weights do not fit config.json: {'; '.join(found)}. Restore the folder or download it again"
        )
    floats = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    check_numbers(what, floats)
    _check_stored(what, Path(fetch(where, part, cached_file, "config.json")).parent, tuple(floats))
    return model


def _check_stored(what, folder, floats):
    """Refuse whole numbers in a model's files where it has `floats` (names): the libraries would convert them."""
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in (name for name in tensors.keys() if name.endswith(floats)):  # it may have a prefix
                kind = tensors.get_slice(name).get_dtype()
                if not kind.startswith(("F", "BF")):
                    raise ModelError(f"{what}: the weights {name} are stored as {kind}, not as floats: use other files")


def check_numbers(what: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse weights that are whole numbers, NaN or infinite."""
    for name, tensor in tensors.items():
        if not (tensor.is_floating_point() and tensor.isfinite().all()):
            raise ModelError(
                f"{what}: the weights {name} are no finite floats. Restore the folder or download it again"
            )


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
    values = read_object(path)
    size, mean, std = (values.get(key) for key in ("size", "image_mean", "image_std"))
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge")
    if not (type(size) is int and size > 0 and _three(mean) and _three(std) and min(std) > 0):
        raise ModelError(f"{path} must name size (pixels), image_mean and image_std (three numbers each, std above 0)")
    return size, tuple(mean), tuple(std)


def _three(values):
    numbers = [v for v in values if type(v) in (int, float) and abs(v) < math.inf] if isinstance(values, list) else []
    return len(numbers) == 3 == len(values)


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
