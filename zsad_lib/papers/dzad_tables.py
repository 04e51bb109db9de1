"""DZAD's tables and figures in the paper's own rows and columns, what is measured beside what is printed.

Source: Zhang, Gao, Li and Gao, "Diffusion-based Zero-shot Anomaly Detection" (AAAI 2025): Tables 1 to 4, Figures 3, 4.
The cross protocol: a model trained on normal images of an auxiliary set is tested on another set (`profiles.CROSS`).
Every image passes each model once, what was measured is kept in files, and every row is a `dzad.Reading` of it. The
printed figures lie in `zsad_lib/published/`.
"""

import hashlib
import json
import os
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pandas as pd

from zsad_lib.anomaly import weighting
from zsad_lib.anomaly.features import load_features
from zsad_lib.anomaly.noise_errors import NoiseErrors
from zsad_lib.data.datasets import AnomalyDataset
from zsad_lib.data.images import load_masks
from zsad_lib.diffusion.guidance import GuidedModel, load_guided
from zsad_lib.diffusion.latent import EXTENSIONS, extend_schedule, load_backbone
from zsad_lib.errors import DataError, MethodError
from zsad_lib.evaluation import metrics, runs, tables
from zsad_lib.methods import BASELINES, make_method
from zsad_lib.methods.dzad import DECISIONS, Measured, Reading, join, labelled_samples, reference_samples
from zsad_lib.profiles import CROSS, PROFILES, profile_options

PUBLISHED = Path(__file__).resolve().parent / "published"
COMPONENTS = ("SD", "SGSD", "M_t", "F_b", "w_t")
ABLATION = ((1, 0, 0, 0, 0), (1, 1, 0, 0, 0), (1, 1, 1, 0, 0), (1, 1, 0, 1, 0), (1, 1, 1, 0, 1), (1, 1, 1, 1, 1))
FULL = ABLATION[-1]
UNGUIDED = (1, 0, 1, 1, 1)  # not in the paper: everything but the guide
METRICS = {"image_auroc": "image AUROC", "pixel_auroc": "pixel AUROC"}
TITLES = {"mvtec_ad": "MVTec AD", "visa": "VisA", "btad": "BTAD"}  # as the paper writes them
TIMESTEPS = (400, 600, 800, 1000, 1200, 1400)  # of Fig. 4
COLUMNS = ["target", "row", *tables.COLUMNS]
# what of DZAD's configuration changes a measurement; the rest is read from it
SETTINGS = ("backbone", "features", "stages", "per_stage", "seeds", "steps", "t_start", "prompt", "map_size")
PART = 48  # images a file


@dataclass
class Direction:
    """One direction of the cross protocol: images of `target`, measured by models that learned from `auxiliary`.

    samples: I labelled Samples; masks: bool [I,H,H] at the maps' size; measured: {"SGSD", "SD": Measured} of them, by
    the guided model and by its base without the guide; reference: likewise, of labelled images of the auxiliary set;
    baselines: {name: runs.Results} on the same images.
    """

    target: str
    auxiliary: str
    samples: list
    masks: np.ndarray
    measured: dict[str, Measured]
    reference: dict[str, Measured]
    baselines: dict[str, runs.Results]


# --- one pass over the images, kept


def measure_kept(method, samples, runs, name, reconstruct=True, progress=None) -> Measured:
    """`DZAD.measure_samples`, kept in a folder below `runs`; what is there is read and what is missing is measured.

    name: of the samples, for the folder's name, which also holds the model and a digest of the settings, the schedule
    and the samples. progress: wraps the list of parts (tqdm). MethodError: a file there holds something else.
    """
    digest = _digest(method, samples, reconstruct)
    folder = Path(runs) / re.sub(r"[^\w.-]+", "-", f"{Path(method.backbone.name).name}-{name}-{digest[:10]}")
    folder.mkdir(parents=True, exist_ok=True)
    parts = range(0, len(samples), PART)
    return join(
        [
            _kept_part(method, samples[k : k + PART], folder / f"part-{k:06d}.npz", reconstruct, digest)
            for k in (progress(parts) if progress else parts)
        ]
    )


def _kept_part(method, samples, path, reconstruct, digest):
    if path.exists():
        return _load(path, digest, [sample.id for sample in samples])
    measured = method.measure_samples(samples, reconstruct)
    _save(path, measured, digest)
    return measured


def _digest(method, samples, reconstruct):
    settings = {key: method.config[key] for key in SETTINGS}
    files = [[sample.id, sample.label, sample.image_path.stat().st_size] for sample in samples]
    text = json.dumps([settings, files, reconstruct], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _save(path, measured, digest):
    arrays = {f"errors.{key}": value for key, value in vars(measured.errors).items() if value is not None}
    arrays |= {name: np.array(getattr(measured, name)) for name in ("layers", "labels", "size")}
    arrays["digest"] = np.array(digest)
    if measured.similarity is not None:
        arrays["similarity"] = measured.similarity
    temporary = path.with_name(f".writing-{os.getpid()}-{path.name}")  # another process may measure the same
    with open(temporary, "wb") as file:
        np.savez(file, **arrays)
    temporary.replace(path)


def _load(path, digest, ids):
    try:
        with np.load(path) as file:
            arrays = {key: file[key] for key in file.files}
        names = [field.name for field in fields(NoiseErrors) if f"errors.{field.name}" in arrays]
        errors = NoiseErrors(**{name: arrays[f"errors.{name}"] for name in names})
        own = str(arrays["digest"]) == digest and errors.ids.tolist() == ids
        numbers = int(arrays["layers"]), arrays["labels"], int(arrays["size"])
        measured = Measured(errors, arrays.get("similarity"), *numbers)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise MethodError(f"{path} is damaged ({error}): delete it, and it is measured again") from error
    if not own:
        raise MethodError(f"{path} holds other images or settings: delete it, and it is measured again")
    return measured


def load_methods(profile, target, device="auto", **options):
    """{"SGSD": DZAD with the guided model of CROSS, "SD": DZAD with its base alone}, which measure and do not decide.

    options: of DZAD, in place of the profile's. ModelError when a model is not at hand; MethodError when the guided
    model does not say what its base is.
    """
    model = CROSS[profile][target][1]
    given = {**profile_options(profile, "dzad"), "reference": None, **options}
    given["features"] = load_features(given["features"], device)
    guided = load_guided(model, device)
    if not guided.facts.get("base"):
        raise MethodError(f"{model} names no base model, so there is no SD alone: save it with guidance.save_guided")
    models = {"SGSD": guided, "SD": load_backbone(guided.facts["base"], device)}
    return {name: make_method("dzad", **{**given, "backbone": backbone}) for name, backbone in models.items()}


def measure_direction(
    profile, target, limit=None, every=1, reference_limit=1, runs="runs/dzad", device="auto", progress=None, **options
) -> Direction:
    """A Direction of a profile's cross protocol, from what is kept below `runs`, or measured now.

    limit, reference_limit: at most so many images of each category and defect, of the target and of the auxiliary set,
    the first in order; every: of the target's only each so-many-th, a sample of images whose order means something (the
    first magnetic tiles were all taken alike). options: of DZAD. DataError when images are missing.
    """
    auxiliary = CROSS[profile][target][0]
    samples, known = labelled_samples(target, limit)[::every], reference_samples(auxiliary, reference_limit)
    methods = load_methods(profile, target, device, **options)
    measured = {name: measure_kept(m, samples, runs, target, True, progress) for name, m in methods.items()}
    # only errors and labels of a reference are read
    reference = {name: measure_kept(m, known, runs, auxiliary, False, progress) for name, m in methods.items()}
    masks = load_masks(samples, methods["SD"].map_size).numpy()
    baselines = score_baselines(profile, target, samples, runs, progress is not None)
    return Direction(target, auxiliary, samples, masks, measured, reference, baselines)


def score_baselines(profile, target, samples, runs="runs/dzad", progress=False):
    """{name: runs.Results} of the baselines without a model on the samples."""
    dataset = AnomalyDataset(target, Path(), tuple(samples))
    methods = {name: make_method(name, **profile_options(profile, name)) for name in BASELINES}
    size = PROFILES[profile]["batch_size"]
    return {name: runs.score(dataset, method, runs, size, progress) for name, method in methods.items()}


def measure_directions(profile, targets=None, **options):
    """({target: Direction}, {target: why it is left out}) of the targets (None: all of CROSS) whose images are there.

    options: of `measure_direction`. MethodError for a target that is not in the profile's cross protocol.
    """
    found, left_out = {}, {}
    targets = list(CROSS[profile] if targets is None else targets)
    unknown = [target for target in targets if target not in CROSS[profile]]
    if unknown:
        raise MethodError(
            f"no target {', '.join(unknown)} in profile {profile}; there are: {', '.join(CROSS[profile])}"
        )
    for target in targets:
        try:
            found[target] = measure_direction(profile, target, **options)
        except DataError as error:
            left_out[target] = str(error)
    return found, left_out


# --- rows


def component_label(row):
    """A row of Table 3 in words: "SGSD + M_t + w_t"; SD stands in every row and is named where it is alone."""
    names = [name for name, there in zip(COMPONENTS, row, strict=True) if there]
    return " + ".join(names[1:] if row[1] else names)


def component_reading(row, decision=DECISIONS[0], **options):
    """(model, Reading) of a row of Table 3, five 0 or 1 in the order of COMPONENTS.

    Without M_t the one timestep in the middle decides; without F_b the map is that of the noise errors; without w_t
    all weights are 1. options: sigma, pool … of the Reading.
    """
    _, guided, many, branches, weighted = row
    name = weighting.DEFAULT if weighted else "one"
    chosen = "two-branch" if branches else "noise errors"
    return "SGSD" if guided else "SD", Reading(name, bool(many), decision, chosen, **options)


def reading_options(profile):
    """How a profile blurs and pools maps: {sigma, pool}."""
    return {key: profile_options(profile, "dzad")[key] for key in ("sigma", "pool")}


def ablation_rows(profile, decision=DECISIONS[0], extra=False):
    """{label: (model, Reading)} of Table 3, in its order; extra: also UNGUIDED, which the paper does not have."""
    rows = [*ABLATION, *([UNGUIDED] if extra else [])]
    return {component_label(row): component_reading(row, decision, **reading_options(profile)) for row in rows}


def weighting_rows(profile, decision=DECISIONS[0]):
    """{weighting: (model, Reading)} of Table 4, in its order, then the learned one: M_t and w_t on noise errors."""
    options = reading_options(profile)
    return {
        name: ("SGSD", Reading(name, decision=decision, map="noise errors", **options)) for name in weighting.FORMULAS
    }


def full_rows(profile, decision=DECISIONS[0]):
    """{"DZAD": (model, Reading)}: the complete method."""
    return {"DZAD": component_reading(FULL, decision, **reading_options(profile))}


# --- the numbers


def measure(directions, rows, n_bootstrap=200, seed=0):
    """AUROCs of every row and direction: a long frame with COLUMNS, fractions with 95 % bootstrap intervals.

    directions: {target: Direction}; rows: {label: (model, Reading)}. One line for each category, and "mean".
    """
    frames = []
    for target, direction in directions.items():
        for label, (model, reading) in rows.items():
            scores, maps = reading.read(direction.measured[model], direction.reference[model])
            frames.append(_aurocs(direction, scores, maps, n_bootstrap, seed).assign(target=target, row=label))
    return _joined(frames)


def measure_baselines(directions, n_bootstrap=200, seed=0):
    """The same frame, of the baselines; their names are the rows."""
    frames = []
    for target, direction in directions.items():
        for name, results in direction.baselines.items():
            frame = tables.evaluate_run(results, n_bootstrap=n_bootstrap, seed=seed)
            frames.append(frame.assign(target=target, row=name))
    return _joined(frames)


def judged_anomalous(directions, row):
    """Whom eq. 12 calls anomalous, by a row (model, Reading with class features): a frame with the rows of
    `directions` and the columns "normal images", "anomalous images", percent of these."""
    model, reading = row
    if reading.decision != "class features":
        raise MethodError(f"decision {reading.decision!r} orders images and judges none: use class features")
    shares = {}
    for target, direction in directions.items():
        judged = reading.read(direction.measured[model], direction.reference[model])[0] > 0
        labels = direction.measured[model].labels
        shares[target] = [100 * judged[labels == label].mean() for label in (0, 1)]
    return pd.DataFrame(shares, index=["normal images", "anomalous images"]).T.rename_axis("tested")


def error_levels(directions, model="SGSD"):
    """Mean noise error of normal and anomalous images, auxiliary and tested: a frame with the rows of `directions`."""
    rows = {}
    for target, one in directions.items():
        sides = {"auxiliary": one.reference[model], "tested": one.measured[model]}
        rows[target] = {
            f"{side}, {name}": measured.errors.matrix[measured.labels == label].mean()
            for side, measured in sides.items()
            for label, name in enumerate(("normal", "anomalous"))
        }
    return pd.DataFrame(rows).T.rename_axis("tested")


def _aurocs(direction, scores, maps, n_bootstrap, seed):
    categories, labels = zip(*((sample.category, sample.label) for sample in direction.samples), strict=True)
    return tables.evaluate(categories, labels, scores, maps, direction.masks, n_bootstrap, seed)


def _joined(frames):
    frame = pd.concat(frames, ignore_index=True)[COLUMNS]
    return frame[frame.metric.isin(METRICS)].reset_index(drop=True)


def by_timesteps(
    profile, target, timesteps=TIMESTEPS, schedules=EXTENSIONS, limit=1, runs="runs/dzad", device="auto", seed=0,
    n_bootstrap=200,
):  # fmt: skip
    """Fig. 4: AUROC against the number of timesteps T, a frame with columns T, schedule, metric, value, low, high.

    The network stays the one trained with its own T; only the schedule that images are noised with is another
    (`backbones.extend_schedule`). One timestep a stage, all weights as in the paper, decision "weighted sum" and the
    map of the noise errors, so that no auxiliary image is needed. limit: images of each category and defect.
    """
    method = load_methods(profile, target, device, per_stage=1)["SGSD"]
    samples = labelled_samples(target, limit)
    masks = load_masks(samples, method.map_size).numpy()
    reading = Reading(decision="weighted sum", map="noise errors", **reading_options(profile))
    direction, frames = Direction(target, "", samples, masks, {}, {}, {}), []
    for schedule in schedules:
        for T in timesteps:
            measured = measure_kept(at_timesteps(method, T, schedule), samples, runs, f"{target}-T{T}", False)
            scores, maps = reading.read(measured)
            frame = _aurocs(direction, scores, maps, n_bootstrap, seed)
            frames.append(frame[frame.category == "mean"].assign(T=T, schedule=schedule))
    frame = pd.concat(frames, ignore_index=True)
    return frame[frame.metric.isin(METRICS)][["T", "schedule", "metric", "value", "low", "high"]].reset_index(drop=True)


def at_timesteps(method, T, schedule="rebuilt"):
    """A DZAD whose model has T timesteps in place of its own number; see `backbones.extend_schedule`."""
    backbone = replace(method.backbone, scheduler=extend_schedule(method.backbone.scheduler, T, schedule))
    model = replace(method.model, backbone=backbone) if isinstance(method.model, GuidedModel) else backbone
    keep = ("stages", "per_stage", "seeds", "steps", "prompt", "map_size", "sigma", "pool")
    return make_method("dzad", model, method.features, **{key: method.config[key] for key in keep})


def stage_errors(direction, model="SGSD"):
    """Mean noise error of each stage, by category and truth: {category: {"normal", "anomalous": float32 [n,N]}}."""
    stages = direction.measured[model].errors.matrix.mean(2)
    categories = np.array([sample.category for sample in direction.samples])
    labels = direction.measured[model].labels
    return {
        category: {
            name: stages[(categories == category) & (labels == label)]
            for label, name in enumerate(("normal", "anomalous"))
        }
        for category in dict.fromkeys(categories.tolist())
    }


def timestep_curves(frame):
    """A `by_timesteps` frame for `plots.interval_curves`, percent: {metric: {schedule: (T, value, low, high)}}."""
    return {
        f"{title}, percent": {
            schedule: (part["T"].to_numpy(), *(100 * part[["value", "low", "high"]].to_numpy().T))
            for schedule, part in frame[frame.metric == metric].groupby("schedule", sort=False)
        }
        for metric, title in METRICS.items()
    }


# --- the tables


def printed(table):
    """The figures that the paper prints in its Table 1, 2, 3 or 4: fractions, as in `published/`."""
    return pd.read_csv(PUBLISHED / f"dzad_table{table}.csv")


def table1(frame, profile):
    """Image AUROC of each category, percent: rows "set: category", one column a measured row and a printed method."""
    rows = frame[frame.metric == "image_auroc"]
    keys = [f"{TITLES.get(t, t)}: {c}" for t, c in zip(rows.target, rows.category, strict=True)]
    known = printed(1)
    names = [f"MVTec AD: {category}" for category in known.category]
    return _beside(rows, keys, known.drop(columns="category").set_axis(names), profile).rename_axis("category")


def table2(frame, profile):
    """Image and pixel AUROC of each set, percent: rows "set: metric", columns as in `table1`."""
    rows = frame[frame.category == "mean"]
    keys = [f"{TITLES.get(t, t)}: {METRICS[m]}" for t, m in zip(rows.target, rows.metric, strict=True)]
    known = printed(2)
    names = [f"{dataset}: {METRICS[metric]}" for dataset, metric in zip(known.dataset, known.metric, strict=True)]
    return _beside(rows, keys, known.drop(columns=["dataset", "metric"]).set_axis(names), profile).rename_axis("set")


def table3(frame, profile):
    """The components: the paper's six rows, and further ones of the frame; a column for each component, then measured
    and printed AUROCs, percent."""
    table = _by_row(frame, profile)
    known = (100 * printed(3)[list(METRICS)]).set_axis([component_label(row) for row in ABLATION])
    ticks = {component_label(row): ["✓" if part else "" for part in row] for row in (*ABLATION, UNGUIDED)}
    for metric, title in METRICS.items():
        table[f"MVTec AD: {title} (printed)"] = _one_decimal(known[metric].reindex(table.index))
    marks = pd.DataFrame(ticks, index=list(COMPONENTS)).T.reindex(table.index)
    return pd.concat([marks, table], axis=1).rename_axis("components")


def table4(frame, profile):
    """The weighting functions: measured and printed AUROCs, percent, in the paper's order; the learned one is last."""
    table = _by_row(frame, profile)
    known = (100 * printed(4).drop(columns="weight_function")).set_axis(list(weighting.FORMULAS)[:-1])
    for column, title in (("mvtec", "MVTec AD"), ("visa", "VisA")):
        table[f"{title}: image AUROC (printed)"] = _one_decimal(known[f"{column}_image_auroc"].reindex(table.index))
    return table.set_axis([weighting.FORMULAS[name] for name in table.index]).rename_axis("w_t")


def decisions_table(frames, profile):
    """Table 3's image AUROCs by decision: {decision: frame of `measure`} -> rows the components, columns set and
    decision, percent."""
    parts = {}
    for decision, frame in frames.items():
        table = _by_row(frame[frame.metric == "image_auroc"], profile)
        names = [column.partition(": ")[0] for column in table]
        parts |= {f"{name}: {decision}": table[column] for name, column in zip(names, table, strict=True)}
    order = [f"{TITLES.get(t, t)}: {d}" for t in frame.target.unique() for d in frames]
    return pd.DataFrame(parts)[order].rename_axis("components")


def timesteps_table(frame):
    """A frame of `by_timesteps` as a table: rows T, columns metric and schedule, percent [interval]."""
    cells = frame.assign(cell=_cells(frame), column=frame.metric.map(METRICS) + ", " + frame.schedule)
    return cells.pivot(index="T", columns="column", values="cell")[list(dict.fromkeys(cells.column))].rename_axis(
        None, axis=1
    )


def _beside(rows, keys, known, profile):
    """Measured rows and columns, then those printed; what the one does not have is said."""
    measured = rows.assign(key=keys, cell=_cells(rows)).pivot(index="key", columns="row", values="cell")
    measured = measured.loc[list(dict.fromkeys(keys)), list(dict.fromkeys(rows.row))]
    measured.columns = [f"{name} (measured, {profile})" for name in measured]
    known = (100 * known).map("{:.1f}".format).add_suffix(" (printed)")
    order = [*measured.index, *(name for name in known.index if name not in measured.index)]
    measured, known = measured.reindex(order).fillna("not run"), known.reindex(order).fillna("not printed")
    return pd.concat([measured, known], axis=1)


def _by_row(frame, profile):
    """Means over the categories: rows as in the frame, columns "set: metric (measured, profile)"."""
    means = frame[frame.category == "mean"]
    names = [f"{TITLES.get(t, t)}: {METRICS[m]}" for t, m in zip(means.target, means.metric, strict=True)]
    means = means.assign(column=[f"{name} (measured, {profile})" for name in names], cell=_cells(means))
    table = means.pivot(index="row", columns="column", values="cell")
    return table.loc[list(dict.fromkeys(means.row)), list(dict.fromkeys(means.column))].rename_axis(None, axis=1)


def _cells(frame):
    return [tables.format_cell(*row) for row in zip(frame.value, frame.low, frame.high, strict=True)]


def _one_decimal(values):
    return values.map("{:.1f}".format).where(values.notna(), "not printed")


# --- pictures


def map_aurocs(maps, masks):
    """Pixel AUROC of each image alone, float64 [I], NaN where the mask is empty: maps float [I,H,W], masks bool."""
    return np.array([metrics.auroc(m, a) if m.any() else np.nan for a, m in zip(maps, masks, strict=True)])


def best_median_worst(values):
    """{"best", "median", "worst": index} of values [I], NaN left out; of two medians the lower."""
    order = np.argsort(values, kind="stable")[: np.isfinite(values).sum()]
    if not len(order):
        raise ValueError("no value to rank: no image has an anomalous pixel")
    return {"best": int(order[-1]), "median": int(order[(len(order) - 1) // 2]), "worst": int(order[0])}


def examples(direction, row):
    """Fig. 3's images of a Direction, chosen by the pixel AUROC that `row` (model, Reading) has in each anomalous
    image: {"best", "median", "worst": (index, AUROC)}."""
    model, reading = row
    values = map_aurocs(reading.read(direction.measured[model], direction.reference[model])[1], direction.masks)
    return {word: (index, float(values[index])) for word, index in best_median_worst(values).items()}


def example_maps(direction, rows, indices):
    """{label: maps [n,H,W], each from 0 on} of rows {label: (model, Reading)} and of patch_knn, for the pictures."""
    maps = {
        label: reading.read(direction.measured[model].take(indices), direction.reference[model])[1]
        for label, (model, reading) in rows.items()
    }
    maps["patch_knn"] = direction.baselines["patch_knn"].maps[indices]
    return {label: m - m.min((1, 2), keepdims=True) for label, m in maps.items()}


# --- all of it


def study(
    profile="lite",
    targets=None,
    n_bootstrap=200,
    seed=0,
    decision=DECISIONS[0],
    progress: Callable | None = None,
    **options,
):
    """({name: table}, the frame of all numbers, {target: why it is left out}): Tables 1 to 4 and the decisions.

    targets: of CROSS (None: all); options: of `measure_direction`. DataError when no target's images are there.
    """
    directions, left_out = measure_directions(profile, targets, progress=progress, **options)
    if not directions:
        raise DataError("no target at hand: " + "; ".join(left_out.values()))
    drawn = {"n_bootstrap": n_bootstrap, "seed": seed}
    full = measure(directions, full_rows(profile, decision), **drawn)
    full = pd.concat([full, measure_baselines(directions, **drawn)], ignore_index=True)
    parts = {d: measure(directions, ablation_rows(profile, d, extra=True), **drawn) for d in DECISIONS}
    weights = measure(directions, weighting_rows(profile, decision), **drawn)
    tables = {
        "table1": table1(full, profile),
        "table2": table2(full, profile),
        "table3": table3(parts[decision], profile),
        "table4": table4(weights, profile),
        "decisions": decisions_table(parts, profile),
    }
    named = {"method": full, **{f"table 3, {d}": frame for d, frame in parts.items()}, "table 4": weights}
    frames = [frame.assign(table=name) for name, frame in named.items()]
    return tables, pd.concat(frames, ignore_index=True), left_out
