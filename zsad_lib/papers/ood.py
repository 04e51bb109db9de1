"""One base model against every other distribution: in-distribution set × other set × base, DiffPath beside it.

The question of the image-level papers (`methods.stein_ssim`, `methods.diffpath`): a model that was trained on neither
set, and is never retrained, tells images of one from images of the other. Each image passes the network once; the
features are kept, and every reading is computed from them.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from zsad_lib import store
from zsad_lib.anomaly.density import atypicality
from zsad_lib.data.image_sets import available, load_image_set
from zsad_lib.data.references import pixels_digest
from zsad_lib.diffusion.pixel import PixelModel, load_pixel_model
from zsad_lib.errors import DataError
from zsad_lib.evaluation.metrics import auroc
from zsad_lib.evaluation.tables import evaluate, format_cell
from zsad_lib.methods import diffpath, stein_ssim
from zsad_lib.methods.stein_ssim import Features, extract

BASES = ("lite-ddpm-synthad", "lite-ddpm-cifar10")
INS = ("synthad", "cifar10", "photographs")
OUTS = ("synthad", "cifar10", "photographs", "faces", "magnetic_tile", "digits", "constant", "noise")
CHOSEN_ON = ("synthad", "cifar10")  # the in-distribution sets that chose the default reading; the others did not
CONTROL = " (random U-Net)"
Sets = dict[str, Features]  # by the name of an image set
Readings = dict[str, Any]  # by label: stein_ssim.Reading or PathReading
COLUMNS = ["base", "in", "out", "reading", "evaluations", "value", "low", "high", "n_in", "n_out"]


# --- readings


@dataclass(frozen=True)
class PathReading:
    """DiffPath with the interface of `stein_ssim.Reading`, from the same features.

    With a weight it is "DiffPathV2-6D", as accounts of the full paper of Abdi et al. describe their method: the same
    statistics of the errors ε − ε_θ in place of the noise, each times 1 − SSIM (or, by other accounts, SSIM) of its
    place. They do not say which noise is drawn: here it is the errors' of "denoising", anew at each timestep.
    """

    variant: str = "6d"  # `diffpath.path_statistics`
    components: tuple[int, ...] = diffpath.COMPONENTS  # "6d" chooses from; these want 112 reference images or more
    weight: str = ""  # one of `stein_ssim.WEIGHTS`, or none

    def fit(self, reference: Features, seed: int = 0) -> Any:
        """The density of the reference's statistics, as the authors fit it."""
        return diffpath.fit(self._values(reference), self.variant, self.components, seed=seed)

    def scores(self, features: Features, density: Any) -> np.ndarray:
        """float64 [N], higher is more anomalous."""
        return atypicality(density, self._values(features))

    def _values(self, features):
        prefix = self.weight and f"{self.weight}_"
        powers = features[f"{prefix}noise_powers"], features[f"{prefix}change_powers"]
        return diffpath.path_statistics(*powers, self.variant).numpy()


def label(reading: Any) -> str:
    """A reading in words: "trajectory error / SSIM, score, kde"; "sum" or the density says how it decides."""
    if isinstance(reading, PathReading):
        small = "" if reading.variant == "1d" or max(reading.components) >= 50 else " (small mixtures)"
        version = {"": "", "dissimilarity": "V2 (1 − SSIM)", "similarity": "V2 (SSIM)"}[reading.weight]
        return f"DiffPath{version}-{reading.variant.upper()}{small}"
    what = {"product": " × (1 − SSIM)", "ratio": " / SSIM", "none": " alone", "joint": " and SSIM"}
    decision = "sum" if reading.decision == "sum" else reading.density
    return f"{reading.error}{what[reading.amplification]}, {reading.scale}, {decision}"


def distinct_readings(**fixed: Any) -> list[stein_ssim.Reading]:
    """`stein_ssim.readings`, less those that give the scores of another one."""
    moot = ("denoising", "typicality", "score")  # one factor a timestep, which standardising removes again
    return [r for r in stein_ssim.readings(**fixed) if (r.error, r.decision, r.scale) != moot]


def labelled(readings: Iterable) -> Readings:
    """{label: reading}, in the order given."""
    return {label(reading): reading for reading in readings}


def all_readings(reference_images: int, **fixed: Any) -> Readings:
    """{label: reading}: the distinct readings, DiffPath-1D, and DiffPath-6D and its second version with small mixtures,
    and with the authors' where so many images suffice."""
    paths, sizes = [PathReading("1d")], [stein_ssim.COMPONENTS]
    if reference_images - -(-reference_images // 10) >= max(diffpath.COMPONENTS):
        sizes.append(diffpath.COMPONENTS)
    paths += [PathReading("6d", size, weight) for size in sizes for weight in ("", *stein_ssim.WEIGHTS)]
    return labelled([*distinct_readings(**fixed), *paths])


# --- features


def collect(
    model: PixelModel,
    sets: Iterable[str],
    split: str,
    count: int,
    folder: Path | str,
    steps: int = 10,
    seed: int = 0,
    progress: bool = False,
) -> Sets:
    """{name: features of `stein_ssim.extract`} of at most `count` images of each set, kept in files below `folder`."""
    settings = {"model": model.config, "steps": steps, "seed": seed}
    named, features = f"{Path(model.label).name} {store.fingerprint([model.config, steps, seed])[:8]}", {}
    for name in sets:
        images = load_image_set(name, split, count, model.image_size)
        key = store.fingerprint([settings, images.ids, pixels_digest(images)])
        path = Path(folder) / re.sub(r"[^\w.-]+", "-", named) / f"{name}-{split}-{count}-{key[:8]}.npz"
        measure = partial(extract, model, images.images, images.ids, steps, seed, progress=progress)
        features[name] = store.kept(path, key, measure)
    return features


def at_steps(features: Features, chosen: Iterable[int]) -> Features:
    """The features at the chosen timesteps alone (their numbers, from 0), for an ablation; ids and settings stay.

    A trajectory has one change less than timesteps: change k leads from timestep k to k + 1.
    """
    per_step = {key: values for key, values in features.items() if values.ndim > 1}
    return features | {key: v[:, [k for k in chosen if k < v.shape[1]]] for key, v in per_step.items()}


def first_images(features: Features, count: int) -> Features:
    """The features of the first `count` images alone, for an ablation; the settings stay."""
    return {key: values[:count] if values.ndim else values for key, values in features.items()}


# --- the numbers


def score_sets(reference: Features | None, sets: Sets, reading: Any, seed: int = 0) -> dict[str, np.ndarray]:
    """{name: scores [N], higher is more anomalous} of sets {name: features}.

    reference: the features that a density is fitted on, and nothing else; a reading whose decision is "sum" takes none.
    """
    density = None if getattr(reading, "decision", None) == "sum" else reading.fit(reference, seed)
    return {name: reading.scores(features, density) for name, features in sets.items()}


def separation(usual: np.ndarray, other: np.ndarray) -> float:
    """AUROC, a fraction, of telling the scores `other` [M] from the scores `usual` [N]; below 0.5, `other` is lower."""
    scores = np.concatenate([usual, other]).astype(np.float64)
    return auroc([0] * len(usual) + [1] * len(other), scores)


def evaluate_base(
    train: Sets, test: Sets, readings: Readings, outs: Iterable[str] = OUTS, n_bootstrap: int = 200, seed: int = 0
) -> pd.DataFrame:
    """AUROCs of one base model, and 95 % bootstrap intervals over the images.

    train, test: {set: features}, of `collect`; every set in train is in-distribution in its turn, and its density is
    fitted there alone; it is never set against itself or a part of itself. Columns in, out ("mean": over the other
    sets), reading, evaluations (network calls an image), value, low, high (fractions), n_in, n_out.
    """
    frames, drawn = [], {"n_bootstrap": n_bootstrap, "seed": seed, "metrics": ["image_auroc"]}
    for name, reference in train.items():
        sets = [name, *(out for out in outs if out in test and not _overlap(name, out))]
        for title, reading in readings.items():
            scores = score_sets(reference, {one: test[one] for one in sets}, reading, seed)
            origin = np.repeat(sets, [len(scores[one]) for one in sets])
            values = np.concatenate([scores[one] for one in sets]).astype(np.float64)
            frame = evaluate([name] * len(origin), (origin != name).astype(int), values, defects=origin, **drawn)
            cost = reference["noise_powers"].shape[1]
            frames.append(frame.assign(**{"in": name, "reading": title, "evaluations": cost}))
    frame = pd.concat(frames, ignore_index=True).assign(out=lambda rows: rows.category.str.rpartition("/")[2])
    return frame.rename(columns={"n_normal": "n_in", "n_anomalous": "n_out"})[COLUMNS[1:]]


def evaluate_bases(
    train: dict[str, Sets],
    test: dict[str, Sets],
    readings: Readings,
    outs: Iterable[str] = OUTS,
    n_bootstrap: int = 200,
    seed: int = 0,
) -> pd.DataFrame:
    """`evaluate_base` for each base model, one frame with a further column base."""
    options = {"outs": outs, "n_bootstrap": n_bootstrap, "seed": seed}
    frames = [evaluate_base(sets, test[base], readings, **options).assign(base=base) for base, sets in train.items()]
    return pd.concat(frames, ignore_index=True)[COLUMNS]


def by_timesteps(
    train: dict[str, Sets],
    test: dict[str, Sets],
    reading: Any,
    parts: dict[str, list[int]],
    outs: Iterable[str] = OUTS,
    seed: int = 0,
) -> pd.DataFrame:
    """One reading from parts of the timesteps alone: percent, the mean AUROC over the other sets.

    train, test: as for `evaluate_bases`; parts: {name: numbers of the timesteps, from 0, as for `at_steps`}. Rows
    "base: in", a column for each part.
    """
    columns = {}
    for part, steps in parts.items():
        few = [
            {base: {name: at_steps(features, steps) for name, features in sets.items()} for base, sets in side.items()}
            for side in (train, test)
        ]
        frame = evaluate_bases(*few, {"": reading}, outs, n_bootstrap=0, seed=seed)
        means = frame[frame.out == "mean"]
        columns[part] = (100 * means.value).set_axis(means.base + ": " + means["in"])
    return pd.DataFrame(columns)


def _overlap(one, other):
    """Whether one set is the other or a part of it: "synthad-a" is one of "synthad"."""
    return one == other or one.startswith(f"{other}-") or other.startswith(f"{one}-")


def study(
    bases: Iterable[str] = BASES,
    ins: Iterable[str] = INS,
    outs: Iterable[str] = OUTS,
    train: int = 200,
    test: int = 96,
    folder: Path | str = "runs/ood",
    readings: Readings | None = None,
    control: bool = True,
    steps: int = 10,
    seed: int = 0,
    n_bootstrap: int = 200,
    device: str = "auto",
    progress: bool = False,
) -> pd.DataFrame:
    """`evaluate_base` for every base model (a name or a folder), with a further column base.

    ins, outs: names of image sets; those whose folder is not at hand are left out and named in attrs["left_out"].
    train, test: images of a set that densities are fitted on, and that are scored. readings: None for `all_readings`.
    control: also the first base with random weights.
    """
    wanted, here = list(dict.fromkeys([*ins, *outs])), available()
    known, others, tested = ([name for name in names if name in here] for names in (ins, outs, wanted))
    if not known or not any(not _overlap(name, other) for name in known for other in others):
        raise DataError(f"no pair of different sets at hand among in: {', '.join(ins)}; out: {', '.join(outs)}")
    readings, frames = readings or all_readings(train), []
    kept = {"folder": folder, "steps": steps, "seed": seed, "progress": progress}
    for base, random in [(base, None) for base in bases] + [(base, "unet") for base in bases[:1] if control]:
        model = load_pixel_model(base, device, random_weights=random)
        fitted = collect(model, known, "train", train, **kept)
        scored = collect(model, tested, "test", test, **kept)
        frames.append(evaluate_base(fitted, scored, readings, others, n_bootstrap, seed).assign(base=model.label))
    frame = pd.concat(frames, ignore_index=True)[COLUMNS]
    frame.attrs = {"left_out": [name for name in wanted if name not in here]}
    return frame


# --- the tables


def matrix(frame: pd.DataFrame, reading: str, cells: bool = True) -> pd.DataFrame:
    """In × out × base of one reading of a frame of `study`: rows (base, in), columns the other sets and "mean".

    cells: texts like "97.4 [94.9, 99.3]"; False: the bare percentages.
    """
    part = frame[frame.reading == reading]
    if part.empty:
        raise ValueError(f"no reading {reading!r}; there are: {'; '.join(dict.fromkeys(frame.reading))}")
    order = [*OUTS, *(out for out in part.out.unique() if out not in (*OUTS, "mean")), "mean"]
    return _spread(part, ["base", "in"], part.out, cells)[[out for out in order if out in set(part.out)]]


def compare(frame: pd.DataFrame) -> pd.DataFrame:
    """Readings as rows, best first; columns: the mean over the other sets of each base and in-distribution set.

    Besides "chosen on", what `ranking` sorts by, and "evaluations", the network calls an image.
    """
    means, rank = frame[frame.out == "mean"], ranking(frame)
    table = _spread(means, "reading", means.base + ": " + means["in"], cells=True).reindex(rank.index)
    table.insert(0, "chosen on", rank.map("{:.1f}".format))
    table.insert(1, "evaluations", means.groupby("reading").evaluations.first())
    return table


def overview(frame: pd.DataFrame, trained: Iterable[str]) -> pd.DataFrame:
    """Mean AUROC over the other sets, whole percent: readings as rows, best first; columns "base: in" and "trained".

    trained: the bases whose columns "trained" averages, and by which the rows are sorted.
    """
    means = frame[frame.out == "mean"]
    table = _spread(means, "reading", means.base + ": " + means["in"]).round(0).astype(int)
    averaged = [column for column in table if column.rpartition(": ")[0] in trained]
    table["trained"] = table[averaged].mean(axis=1).round(0).astype(int)
    return table.sort_values("trained", ascending=False, kind="stable")


def by_set(frame: pd.DataFrame) -> pd.DataFrame:
    """AUROC in whole percent: readings as rows and columns "base: out", both in the frame's order, without the mean."""
    if frame["in"].nunique() != 1:
        raise ValueError(f"one in-distribution set, please, not {', '.join(frame['in'].unique()) or 'none'}")
    others = frame[frame.out != "mean"]
    return _spread(others, "reading", others.base + ": " + others.out).round(0).astype(int)


def ranking(frame: pd.DataFrame) -> pd.Series:
    """Percent by reading, best first: the mean over the trained bases and CHOSEN_ON, or all sets without these."""
    means = frame[(frame.out == "mean") & ~frame.base.str.endswith(CONTROL)]
    chosen = means[means["in"].isin(CHOSEN_ON)]
    means = means if chosen.empty else chosen
    return (100 * means.groupby("reading").value.mean()).sort_values(ascending=False, kind="stable")


def best_allowed(frame: pd.DataFrame) -> str:
    """The label of the best reading that the paper's abstract allows: neither DiffPath nor "and SSIM", our addition."""
    allowed = [title for title in ranking(frame).index if not title.startswith("DiffPath") and " and SSIM" not in title]
    if not allowed:
        raise ValueError("no reading of the paper's is in this frame")
    return allowed[0]


def _spread(frame, index, columns, cells=False):
    """A row for each value of `index`, a column for each of `columns`, in the frame's order; percent, or as texts."""
    values = 100 * frame.value
    if cells:
        values = [format_cell(*row) for row in zip(frame.value, frame.low, frame.high, strict=True)]
    return frame.assign(cell=values).set_index(index).set_index(columns, append=True).cell.unstack(sort=False)
