"""The two profiles: nothing but names, sizes and settings differs between them, the code path is one.

"lite" is offline and takes minutes on a CPU: the compact checkpoints of this project on 64 px images. "paper" is
the authors' setting: Stable Diffusion from the hub, DINO features, 256 px maps; it wants a GPU. The command line and
the notebooks resolve a profile's name here, into methods; the rooms below never see it.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from zsad_lib.anomaly.features import load_features
from zsad_lib.data.references import labelled_images, normal_images
from zsad_lib.diffusion.guidance import load_guided
from zsad_lib.diffusion.latent import load_backbone
from zsad_lib.errors import MethodError
from zsad_lib.methods import BASELINES, CONTROLS, Method, make_method, method_options
from zsad_lib.methods.dzad import DZAD
from zsad_lib.papers.dzad_cross import Cross
from zsad_lib.settings import Positive, check_value

PROFILES = {
    "lite": {
        "backbone": "lite-foundation",
        # small features see texture, pixels see colour and thin lines; a damaged place differs in all of them
        "features": "lite-features+pixels",
        "batch_size": 16,
        "divad": {
            # the authors' rule then gives a latent at t=51 and a start at t=281; (51, 251) did well on validation
            # drawings, which benchmarks/choose_divad_start.py measures
            "inversion_steps": 20,
            "inference_steps": 25,
            "start": "official",
            "start_step": 17,
            "guidance_scale": 1.0,
            "sigma": 1.5,
            "pool": 2,
            "mode": "product",
        },
        "dzad": {
            "backbone": "lite-dzad-a",
            "reference": "synthad-A",
            "limit": 1,
            "per_stage": 2,
            "t_start": 201,
            "sigma": 1.5,
            "pool": 2,
        },
        "vlmdiff": {
            "backbone": "lite-vlmdiff",
            # the paper starts from pure noise (official, start_step 0); so small a model then draws another image, and
            # on validation drawings t = 201 found more: 79 against 64 % pixel AUROC
            "start": "matched",
            "start_step": 7,
            "steps": 10,
            "guidance_scale": 9,
            "normalisation": "symmetric",
            "sigma": 1.5,
            "pool": 2,
            "mode": "product",
        },
        "stein_ssim": {"backbone": "lite-ddpm-synthad", "reference": "synthad"},
        "diffpath": {"backbone": "lite-ddpm-synthad"},
        "baseline": {"size": 64, "sigma": 1.5, "pool": 2},
    },
    "paper": {
        "backbone": "stable-diffusion-2.1-base",
        "features": "dino_vits8",
        "batch_size": 4,
        "divad": {
            "inversion_steps": 50,
            "inference_steps": 100,
            "start": "official",
            "start_step": 40,
            "guidance_scale": 3.5,
            "sigma": 5,
            "pool": 8,
            "mode": "sum",
        },
        "dzad": {
            "backbone": "checkpoints/dzad-visa",
            "features": "resnet50",
            "reference": "visa",
            "sigma": 4,
            "pool": 8,
        },
        "vlmdiff": {
            # the authors' checkpoint (samethi/VLMDiff on the hub), brought into this layout by `zsad convert`
            "backbone": "checkpoints/vlmdiff",
            "steps": 10,
            "guidance_scale": 9,
            "normalisation": "imagenet",
            "sigma": 5,
            "pool": 8,
            "mode": "sum",
        },
        "stein_ssim": {"backbone": "google/ddpm-celebahq-256"},
        "diffpath": {"backbone": "google/ddpm-celebahq-256"},
        "baseline": {"size": 256, "sigma": 5, "pool": 8},
    },
}

# DZAD's cross protocol: {profile: {set that is tested: (auxiliary set, model trained on its normal images)}}; the
# paper's models come from `zsad train dzad --train-on visa`, which wants a GPU
CROSS = {
    "lite": {
        "synthad-B": ("synthad-A", "lite-dzad-a"),
        "synthad-A": ("synthad-B", "lite-dzad-b"),
        "magnetic_tile": ("synthad-A", "lite-dzad-a"),
    },
    "paper": {
        "mvtec_ad": ("visa", "checkpoints/dzad-visa"),
        "visa": ("mvtec_ad", "checkpoints/dzad-mvtec_ad"),
        "btad": ("visa", "checkpoints/dzad-visa"),
    },
}


REFERENCES = {"dzad": ("reference", "limit"), "stein_ssim": ("reference", "count"), "diffpath": ("reference", "count")}


def load_profile(name: str) -> dict:
    """The settings of a profile by its name."""
    if name not in PROFILES:
        raise MethodError(f"unknown profile {name!r}; there are: {', '.join(PROFILES)}")
    return PROFILES[name]


def profile_options(profile: str, method: str) -> dict:
    """Keyword arguments of `make_method` for a method, by its name, in a profile."""
    settings = load_profile(profile)
    chosen = {"backbone": settings["backbone"], "features": settings["features"]} | _own(settings, method)
    return {key: value for key, value in chosen.items() if key not in REFERENCES.get(method, ())}


def make(profile: str, method: str, random_weights: str | None = None, device: str = "auto", **changed: Any) -> Method:
    """A method as a profile sets it, fitted on the profile's reference images: here names become objects.

    changed: options in place of the profile's; of those methods that are fitted also `reference` (a name; None: not
    fitted) and `limit` or `count`, how many of its images.
    """
    keys = REFERENCES.get(method, ())
    own = {key: value for key, value in (_own(load_profile(profile), method) | changed).items() if key in keys}
    for key, value in own.items():
        check_value(key, value, (str if key == "reference" else Positive) | None)
    given = {key: value for key, value in changed.items() if key not in keys}
    made = make_method(method, device=device, random_weights=random_weights, **profile_options(profile, method) | given)
    name = own.pop("reference", None)
    if name is None:
        made.unfitted = {key: own.get(key) for key in made.unfitted}  # as it was asked for stands in the record
        return made
    return made.fit(labelled_images(name, **own) if method == "dzad" else normal_images(name, **own))


def options_of(method: str) -> list[str]:
    """The names that `make` takes for a method."""
    return [*method_options(method), *REFERENCES.get(method, ())]


def _own(settings, method):
    return settings.get(method, settings["baseline"] if method in BASELINES else {})


def with_controls(
    profile: str, method: str = "", controls: dict[str, str | None] = CONTROLS, **changed: Any
) -> Iterator[tuple[str, Method]]:
    """(label, method), one after the other: the method, its controls (see CONTROLS), and the baselines without a model.

    What the diffusion model adds is the distance from the first row to the ones below it. changed: as for `make`;
    the baselines take what of it they know.
    """
    for suffix, random_weights in controls.items():
        yield method + suffix, make(profile, method, random_weights, **changed)
    for name in BASELINES:
        yield name, make(profile, name, **{k: v for k, v in changed.items() if k in options_of(name)})


def smoothing(profile: str) -> dict:
    """How a profile blurs and pools DZAD's maps: {sigma, pool}."""
    return {key: profile_options(profile, "dzad")[key] for key in ("sigma", "pool")}


def cross_models(profile: str, target: str, device: str = "auto", **changed: Any) -> dict[str, DZAD]:
    """{"SGSD": DZAD with the guided model of CROSS, "SD": DZAD with its base alone}, not fitted: they measure."""
    given = profile_options(profile, "dzad") | changed
    given["features"] = load_features(given["features"], device)
    name = _cross(profile, [target])[target][1]
    guided = load_guided(name, device)
    if not guided.facts.get("base"):
        raise MethodError(f"{name} names no base, so there is no SD alone")
    models = {"SGSD": guided, "SD": load_backbone(guided.facts["base"], device)}
    return {name: make_method("dzad", **given | {"backbone": model}) for name, model in models.items()}


def crosses(profile: str, targets: Iterable[str] | None = None, device: str = "auto", **changed: Any) -> list[Cross]:
    """The directions of a profile's cross protocol, or those of them asked for; changed: options of DZAD."""
    batch_size, chosen = load_profile(profile)["batch_size"], _cross(profile, targets)
    return [
        Cross(
            target,
            auxiliary,
            partial(cross_models, profile, target, device, **changed),
            partial(with_controls, profile, controls={}),
            batch_size,
        )
        for target, (auxiliary, _) in chosen.items()
    ]


def _cross(profile, targets=None):
    """The directions of CROSS for the targets, or for all."""
    load_profile(profile)
    known = CROSS[profile]
    unknown = [target for target in targets or () if target not in known]
    if unknown:
        raise MethodError(f"no target {', '.join(unknown)} in profile {profile}; there are: {', '.join(known)}")
    return {target: known[target] for target in (known if targets is None else targets)}
