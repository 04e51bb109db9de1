"""The methods by name. To add one: a dataclass after `base.Method`, whose fields are its options, in METHODS."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from zsad_lib.anomaly.features import load_features
from zsad_lib.diffusion.guidance import load_guided, load_guided_or_plain
from zsad_lib.diffusion.latent import load_backbone
from zsad_lib.diffusion.pixel import load_pixel_model
from zsad_lib.errors import MethodError
from zsad_lib.methods.base import Method, Scores
from zsad_lib.methods.baselines import LocalContrast, Median, PatchKNN
from zsad_lib.methods.diffpath import DiffPath
from zsad_lib.methods.divad import DIVAD
from zsad_lib.methods.dzad import DZAD
from zsad_lib.methods.stein_ssim import SteinSSIM
from zsad_lib.methods.vlmdiff import VLMDiff

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (DIVAD, DZAD, LocalContrast, Median, PatchKNN, SteinSSIM, DiffPath, VLMDiff)
}
LOADERS: dict[str, Callable] = {  # of the backbone
    "divad": load_backbone,
    "dzad": load_guided_or_plain,
    "vlmdiff": load_guided,
    "stein_ssim": load_pixel_model,
    "diffpath": load_pixel_model,
}
BASELINES = ("local_contrast", "median", "patch_knn")  # methods without any model
# what a control row re-initialises (`make_method`'s random_weights), by what its label gets
CONTROLS = {"": None, " (random U-Net)": "unet", " (random weights)": "all", " (untrained features)": "features"}

__all__ = ["BASELINES", "CONTROLS", "METHODS", "Method", "Scores", "make_method", "method_options"]


def method_options(name: str) -> dict[str, Any]:
    """The options of a method with their default values, its networks left out."""
    return {f.name: f.default for f in _settings(name).values() if f.name not in ("backbone", "features")}


def make_method(
    name: str,
    backbone: Any = None,
    features: Any = None,
    device: str = "auto",
    random_weights: str | None = None,
    **options: Any,
) -> Method:
    """A method of METHODS, ready to score (or to be fitted).

    backbone, features: a loaded object, or what LOADERS and `load_features` take (a folder, a checkpoint of the
    manifest, a hub id), loaded to `device`; a method that needs none leaves them aside, so that one call serves all.
    random_weights: what a control row re-initialises, a value of CONTROLS.
    """
    accepted, given = _settings(name), {"backbone": backbone, "features": features}
    unknown = sorted(set(options) - set(accepted))
    if unknown:
        known = ", ".join(f"{key}={value!r}" for key, value in method_options(name).items())
        raise MethodError(f"method {name!r} has no option {', '.join(unknown)}; it has: {known}")
    part = "features" if random_weights == "features" else "backbone"
    if random_weights and (part not in accepted or not _is_name(given[part])):
        raise MethodError(f"random_weights needs a method with {part}, given as a name or a folder")
    for key in (key for key in given if key in accepted):
        if given[key] is None:
            raise MethodError(f"method {name!r} needs {key}=<folder, checkpoint name, hub id or loaded object>")
        options[key] = given[key]
    if _is_name(options.get("backbone")):
        random = None if part == "features" else random_weights
        options["backbone"] = LOADERS[name](backbone, device, random_weights=random)
    if _is_name(options.get("features")):
        random = "all" if random_weights == "features" else None
        options["features"] = load_features(features, device, random_weights=random)
    return METHODS[name](**options)


def _settings(name):
    if name not in METHODS:
        raise MethodError(f"no method {name!r}; there are: {', '.join(METHODS)}")
    return {f.name: f for f in fields(METHODS[name]) if f.init}


def _is_name(model):
    return isinstance(model, str) or hasattr(model, "__fspath__")
