"""The methods by name. To add one: a callable in METHODS whose keyword parameters are its options.

A callable that has a parameter `backbone` or `features` gets the loaded model there: a `Backbone`, or what its
loader in LOADERS gives.
"""

import inspect

from zsad_lib.anomaly.features import load_features
from zsad_lib.diffusion.guidance import load_guided, load_guided_or_plain
from zsad_lib.diffusion.latent import load_backbone
from zsad_lib.diffusion.pixel import load_pixel_model
from zsad_lib.errors import MethodError
from zsad_lib.methods.base import Method, Scores
from zsad_lib.methods.baselines import local_contrast, median, patch_knn
from zsad_lib.methods.diffpath import DiffPath
from zsad_lib.methods.divad import DIVAD
from zsad_lib.methods.dzad import DZAD
from zsad_lib.methods.stein_ssim import SteinSSIM
from zsad_lib.methods.vlmdiff import VLMDiff

METHODS = {
    "divad": DIVAD,
    "dzad": DZAD,
    "local_contrast": local_contrast,
    "median": median,
    "patch_knn": patch_knn,
    "stein_ssim": SteinSSIM,
    "diffpath": DiffPath,
    "vlmdiff": VLMDiff,
}

PIXEL_METHODS = ("stein_ssim", "diffpath")  # their backbone is an unconditional model of pixels; scores, no maps
LOADERS = {name: load_pixel_model for name in PIXEL_METHODS}
LOADERS |= {"dzad": load_guided_or_plain, "vlmdiff": load_guided}
BASELINES = ("local_contrast", "median", "patch_knn")  # methods without any model
# what a control row re-initialises (`make_method`'s random_weights), by what its label gets
CONTROLS = {"": None, " (random U-Net)": "unet", " (random weights)": "all", " (untrained features)": "features"}

__all__ = ["BASELINES", "CONTROLS", "METHODS", "Method", "MethodError", "Scores", "make_method", "method_options"]


def method_options(name):
    """The options of a method with their default values, `backbone` and `features` left out (dict)."""
    return {key: p.default for key, p in _parameters(name).items() if key not in ("backbone", "features")}


def make_method(name, backbone=None, features=None, device="auto", random_weights=None, **options):
    """A method ready to score.

    name: one of METHODS; backbone, features: a loaded object, or what `load_backbone` (for PIXEL_METHODS
    `load_pixel_model`) and `load_features` take (a folder, a checkpoint of the manifest, a hub id), loaded to
    `device`; a method that needs none leaves them aside, so that one call serves all. random_weights is what a
    control row re-initialises: "unet" or "all" of the backbone, or "features". options: the method's own.
    MethodError lists the names and options there are; ModelError when loading fails.
    """
    accepted = _parameters(name)
    unknown = sorted(set(options) - set(accepted))
    if unknown:
        known = ", ".join(f"{key}={value!r}" for key, value in method_options(name).items())
        raise MethodError(f"method {name!r} has no option {', '.join(unknown)}; it has: {known}")
    part = "features" if random_weights == "features" else "backbone"
    if random_weights and (part not in accepted or not _is_name({"backbone": backbone, "features": features}[part])):
        needed = {"backbone": "a backbone", "features": "features"}[part]
        raise MethodError(f"random_weights needs a method with {needed}, given as a name or a folder")
    random = {part: random_weights}
    if "backbone" in accepted:
        _require(name, "backbone", backbone)
        if _is_name(backbone):
            load = LOADERS.get(name, load_backbone)
            backbone = load(backbone, device, random_weights=random.get("backbone"))
        options["backbone"] = backbone
    if "features" in accepted:
        _require(name, "features", features)
        if _is_name(features):
            features = load_features(features, device, random_weights=random.get("features") and "all")
        options["features"] = features
    return METHODS[name](**options)


def _parameters(name):
    if name not in METHODS:
        raise MethodError(f"no method {name!r}; there are: {', '.join(METHODS)}")
    return inspect.signature(METHODS[name]).parameters


def _is_name(model):
    return isinstance(model, str) or hasattr(model, "__fspath__")


def _require(name, what, value):
    if value is None:
        raise MethodError(f"method {name!r} needs {what}=<folder, checkpoint name, hub id or loaded object>")
