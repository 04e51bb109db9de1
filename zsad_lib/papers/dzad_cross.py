"""DZAD's cross protocol: a model trained on normal images of an auxiliary set is tested on another set.

Every image passes each model once and what was measured is kept in files; every row of the paper's tables is a
`dzad.Reading` of it (`dzad_tables`).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from zsad_lib import store
from zsad_lib.anomaly import noise_errors
from zsad_lib.anomaly.noise_errors import NoiseErrors
from zsad_lib.data.datasets import AnomalyDataset
from zsad_lib.data.images import load_images, load_masks
from zsad_lib.data.readers import Sample
from zsad_lib.data.references import labelled_samples, reference_samples
from zsad_lib.diffusion.guidance import GuidedModel
from zsad_lib.diffusion.latent import EXTENSIONS, extend_schedule
from zsad_lib.errors import DataError
from zsad_lib.evaluation import metrics, runs
from zsad_lib.evaluation.tables import evaluate
from zsad_lib.methods.base import Method
from zsad_lib.methods.dzad import Measured, Measuring, Reading

METRICS = {"image_auroc": "image AUROC", "pixel_auroc": "pixel AUROC"}  # what the paper reports
TIMESTEPS = (400, 600, 800, 1000, 1200, 1400)  # of Fig. 4
PART = 48  # images a file
SETTINGS = {  # what of a method's record changes what it measures; the rest is read from it
    "errors": ("backbone", "stages", "per_stage", "seeds", "prompt"),
    "similarity": ("backbone", "features", "steps", "t_start", "prompt", "map_size"),
}


@dataclass
class Cross:
    """One direction of the protocol before anything is measured; its models are loaded once its images are there."""

    target: str  # the set that is tested
    auxiliary: str  # the set whose normal images trained the guide, and whose labelled ones give class features
    models: Callable[[], dict[str, Measuring]]  # -> "SGSD", the guided model, and "SD", its base without the guide
    baselines: Callable[[], Iterable[tuple[str, Method]]]  # -> (name, method)
    batch_size: int = 16  # of the baselines


@dataclass
class Direction:
    """One direction measured: I images of `target`."""

    target: str
    auxiliary: str
    samples: list[Sample]  # I, labelled
    masks: np.ndarray  # bool [I,H,H] at the maps' size
    measured: dict[str, Measured]  # "SGSD" and "SD", of the samples
    reference: dict[str, Measured]  # likewise, of labelled images of the auxiliary set
    baselines: dict[str, runs.Results]  # on the same images


def measure_kept(
    model: Measuring,
    samples: list[Sample],
    folder: Path | str,
    reconstruct: bool = True,
    progress: Callable | None = None,
) -> Measured:
    """`Measuring.measure` of samples, image by image kept below `folder`; progress: wraps the parts to do (tqdm)."""
    keys = [store.fingerprint([sample.id, store.file_hash(sample.image_path)]) for sample in samples]

    def errors(chosen):
        return vars(noise_errors.join([model.errors(*part) for part in _batches(model, samples, chosen)]))

    def similarity(chosen):
        parts = [model.similarity(*part) for part in _batches(model, samples, chosen)]
        return {"similarity": np.concatenate([values for values, _ in parts]), "layers": np.array(parts[0][1])}

    alike = ("timesteps", "seeds", "alphas_cumprod")
    found = NoiseErrors(**store.kept_items(_place(folder, model, "errors"), keys, errors, PART, alike, progress))
    drawn, layers = None, 0
    if reconstruct:
        place = _place(folder, model, "similarity")
        drawn, layers = store.kept_items(place, keys, similarity, PART, ("layers",), progress).values()
    return Measured(found, drawn, int(layers), np.array([sample.label for sample in samples]), model.map_size)


def _place(folder, model, kind):
    """Where what a model measures of one kind is kept: named after the model and the settings that change it."""
    settings = {key: model.config[key] for key in SETTINGS[kind]}
    return Path(folder) / f"{kind}-{Path(model.latent_model.name).name}-{store.fingerprint(settings)[:10]}"


def _batches(model, samples, chosen, count=16):
    for k in range(0, len(chosen), count):
        part = [samples[row] for row in chosen[k : k + count]]
        yield load_images(part, model.size), [sample.id for sample in part]


def measure_samples(model: Measuring, samples: list[Sample], reconstruct: bool = True, batch: int = 16) -> Measured:
    """The same without keeping anything."""
    parts = (samples[k : k + batch] for k in range(0, len(samples), batch))
    return model.measure_batches(
        ((load_images(part, model.size), [s.id for s in part], [s.label for s in part]) for part in parts), reconstruct
    )


def measure_direction(
    cross: Cross,
    limit: int | None = None,
    every: int = 1,
    reference_limit: int | None = 1,
    folder: Path | str = "runs/dzad",
    progress: Callable | None = None,
) -> Direction:
    """A Direction, from what is kept below `folder`, or measured now.

    limit, reference_limit: at most so many images of each category and defect, of the target and of the auxiliary set,
    the first in order; every: of the target's only each so-many-th, a sample of images whose order means something (the
    first magnetic tiles were all taken alike).
    """
    samples, known = labelled_samples(cross.target, limit)[::every], reference_samples(cross.auxiliary, reference_limit)
    models = cross.models()
    measured = {name: measure_kept(m, samples, folder, True, progress) for name, m in models.items()}
    # only errors and labels of a reference are read
    reference = {name: measure_kept(m, known, folder, False, progress) for name, m in models.items()}
    masks = load_masks(samples, models["SD"].map_size).numpy()
    dataset = AnomalyDataset(cross.target, Path(), tuple(samples))
    baselines = runs.score_all(dataset, cross.baselines(), folder, cross.batch_size, progress is not None)
    return Direction(cross.target, cross.auxiliary, samples, masks, measured, reference, baselines)


def measure_directions(crosses: Iterable[Cross], **options) -> tuple[dict[str, Direction], dict[str, str]]:
    """({target: Direction}, {target: why it is left out}), by whether its images are there."""
    found, left_out = {}, {}
    for cross in crosses:
        try:
            found[cross.target] = measure_direction(cross, **options)
        except DataError as error:
            left_out[cross.target] = str(error)
    return found, left_out


# --- Fig. 4


def by_timesteps(
    target: str,
    model: Measuring,
    smoothing: dict,
    timesteps: Iterable[int] = TIMESTEPS,
    schedules: Iterable[str] = EXTENSIONS,
    limit: int | None = 1,
    folder: Path | str = "runs/dzad",
    seed: int = 0,
    n_bootstrap: int = 200,
) -> pd.DataFrame:
    """Fig. 4: AUROC against the number of timesteps T, a frame with columns T, schedule, metric, value, low, high.

    The network stays the one trained with its own T; only the schedule that images are noised with is another
    (`latent.extend_schedule`). One timestep a stage, weights as in the paper, decision "weighted sum" and the map of
    the noise errors, so that no auxiliary image is needed. limit: images of each category and defect.
    """
    samples = labelled_samples(target, limit)
    masks = load_masks(samples, model.map_size).numpy()
    reading = Reading(decision="weighted sum", map="noise errors", **smoothing)
    direction, frames = Direction(target, "", samples, masks, {}, {}, {}), []
    for schedule in schedules:
        for T in timesteps:
            scores, maps = reading.read(measure_kept(at_timesteps(model, T, schedule), samples, folder, False))
            frame = aurocs(direction, scores, maps, n_bootstrap, seed)
            frames.append(frame[frame.category == "mean"].assign(T=T, schedule=schedule))
    frame = pd.concat(frames, ignore_index=True)
    return frame[["T", "schedule", "metric", "value", "low", "high"]]


def at_timesteps(model: Measuring, T: int, schedule: str = "rebuilt") -> Measuring:
    """The same with one timestep a stage and T timesteps in place of the model's own number."""
    latent = replace(model.latent_model, scheduler=extend_schedule(model.latent_model.scheduler, T, schedule))
    guided = isinstance(model.backbone, GuidedModel)
    return replace(model, backbone=replace(model.backbone, backbone=latent) if guided else latent, t_start=None)


def aurocs(direction: Direction, scores: np.ndarray, maps: np.ndarray, n_bootstrap: int, seed: int) -> pd.DataFrame:
    """`tables.evaluate` of scores [I] and maps [I,H,H] of a Direction's images."""
    categories, labels = zip(*((sample.category, sample.label) for sample in direction.samples), strict=True)
    return evaluate(categories, labels, scores, maps, direction.masks, n_bootstrap, seed, metrics=list(METRICS))


def map_aurocs(maps: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Pixel AUROC of each image alone, float64 [I], NaN where the mask is empty: maps float [I,H,W], masks bool."""
    return np.array([metrics.auroc(m, a) if m.any() else np.nan for a, m in zip(maps, masks, strict=True)])
