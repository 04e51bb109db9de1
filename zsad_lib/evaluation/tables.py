"""Metrics of whole data sets with bootstrap intervals, of finished runs, and the tables made of them."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from zsad_lib.errors import RunError, UndefinedMetric
from zsad_lib.evaluation.metrics import (
    IMAGE_METRICS,
    METRICS,
    PIXEL_METRICS,
    binary,
    floats,
    mask_stack,
    pool_scores,
    region_shares,
    sweep,
)
from zsad_lib.evaluation.official import official_values
from zsad_lib.evaluation.runs import Results

COLUMNS = ("category", "metric", "value", "low", "high", "n_normal", "n_anomalous", "reason")


def evaluate(
    categories: Sequence[str],
    labels: Any,
    image_scores: Any,
    maps: np.ndarray | None = None,
    masks: np.ndarray | None = None,
    n_bootstrap: int = 200,
    seed: int = 0,
    variant: str = "exact",
    confidence: float = 0.95,
    defects: Sequence[str] | None = None,
    metrics: Sequence[str] = METRICS,
) -> pd.DataFrame:
    """The metrics of every category, and their mean, with bootstrap intervals.

    categories: n names; labels: [n] 0/1; image_scores: [n]; maps: [n,H,W] or None; masks: bool [n,H,W] or
    None; variant: "exact", or "official" (flipped AUROC, `aupro_official`, the rest unchanged).
    defects: n names, or None. When given, every defect type of a category is measured on its own, against
    all of the category's normal images, in rows named "category/defect". metrics: which of `METRICS`.

    Returns a long frame with columns category, metric, value, low, high (fractions in
    [0, 1]), n_normal, n_anomalous (images), reason; its `attrs` hold variant, n_bootstrap, seed, confidence.
    An undefined metric has value NaN and its reason in words. The rows of category "mean" average the
    categories where the metric is defined; their reason lists the ones left out.

    Intervals are percentiles of `n_bootstrap` draws of whole images, with replacement, among a category's
    normal and anomalous ones separately; the mean's come from averaging the categories' draws. A category's
    draws depend on the seed, its name and the set of its images: neither on their order nor on other
    categories. Draws that leave a metric undefined are dropped. n_bootstrap 0 gives NaN for low and high.
    """
    if variant not in ("exact", "official") or not 0 < confidence < 1:
        raise ValueError(
            f'variant must be "exact" or "official" and confidence in (0, 1), got {variant!r} and {confidence}'
        )
    categories, labels = np.asarray(categories, dtype=str), binary(labels, "labels")
    image_scores = floats(image_scores, "image_scores")
    _check_sizes(
        categories=categories, labels=labels, image_scores=image_scores, maps=maps, masks=masks, defects=defects
    )
    pixels = maps is not None and masks is not None
    if pixels:
        masks, maps = mask_stack(masks, maps if variant == "exact" else np.asarray(maps, dtype=np.float32))
        _check_order(categories, labels, masks)
    rows, kept = [], {metric: [] for metric in metrics}
    for category, group, images in _groups(categories, labels, defects):
        totals = maps[images].sum((1, 2)) if pixels else np.zeros(len(images))
        images = images[np.lexsort((totals, image_scores[images]))]  # draws must not depend on the order
        weights = _draws(labels[images], category, group, n_bootstrap, seed)
        results = _measure(IMAGE_METRICS, metrics, labels[images], image_scores[images], weights, variant)
        if pixels:
            results |= _measure(PIXEL_METRICS, metrics, masks[images], maps[images], weights, variant)
        for metric in metrics:
            result = results.get(metric, "no anomaly maps" if maps is None else "no masks")
            rows.append(_row(group, metric, result, labels[images], confidence))
            kept[metric].append((group, images, result))
    rows += [_mean_row(metric, kept[metric], labels, confidence) for metric in metrics]
    frame = pd.DataFrame(rows, columns=COLUMNS)
    frame.attrs = {"variant": variant, "n_bootstrap": n_bootstrap, "seed": seed, "confidence": confidence}
    return frame


def format_table(frame: pd.DataFrame, metrics: Iterable[str] | None = None) -> pd.DataFrame:
    """Frame of `evaluate` -> one row per category, one column per metric, cells like "87.2 [84.1, 90.0]".

    Values in percent; no bracket without an interval, "n/a" where undefined. metrics: names, in the order
    wanted (default: all in the frame).
    """
    present = list(dict.fromkeys(frame["metric"]))
    metrics = present if metrics is None else list(metrics)
    if not set(metrics) <= set(present):
        raise ValueError(f"no such metric: {sorted(set(metrics) - set(present))}; the frame has {present}")
    cells = frame.assign(cell=[format_cell(*row) for row in zip(frame.value, frame.low, frame.high, strict=True)])
    table = cells.pivot(index="category", columns="metric", values="cell")
    return table.loc[list(dict.fromkeys(frame["category"])), metrics]


def format_cell(value: float, low: float, high: float) -> str:
    """A fraction and its interval in percent, "87.2 [84.1, 90.0]"; no bracket where low is NaN, "n/a" without value."""
    if np.isnan(value):
        return "n/a"
    return f"{100 * value:.1f}" + ("" if np.isnan(low) else f" [{100 * low:.1f}, {100 * high:.1f}]")


def _check_sizes(**arrays):
    shapes = {name: np.shape(array) for name, array in arrays.items() if array is not None}
    if len({shape[:1] for shape in shapes.values()}) > 1 or len(shapes["labels"]) != 1:
        raise ValueError(f"every input needs one entry per image, got the shapes {shapes}")
    if shapes["labels"] == (0,) or shapes["image_scores"] != shapes["labels"]:
        raise ValueError(f"at least one image, with one score each, is needed; got the shapes {shapes}")


def _check_order(categories, labels, masks):
    wrong = np.flatnonzero(masks.any((1, 2)) & ~labels)
    if len(wrong):
        raise ValueError(
            f"image {wrong[0]} ({categories[wrong[0]]}) is labelled normal but its mask marks "
            f"anomalous pixels ({len(wrong)} such images): are both in the same order?"
        )


def _groups(categories, labels, defects):
    """Yields (category, row name, indices of its images)."""
    for category in np.unique(categories):
        own = categories == category
        if defects is None or not (own & labels).any():
            yield category, category, np.flatnonzero(own)
            continue
        kinds = np.asarray(defects, dtype=str)
        for kind in np.unique(kinds[own & labels]):
            yield category, f"{category}/{kind}", np.flatnonzero(own & (~labels | (kinds == kind)))


def _draws(labels, category, group, n_bootstrap, seed):
    """How often each image is drawn: [n, 1 + n_bootstrap], the first column being the set itself.

    The normal images' draws hang on the category alone, so that its defect types share them.
    """
    weights = np.ones((len(labels), 1 + n_bootstrap))
    for label, name in enumerate((category, group)):
        rows = np.flatnonzero(labels == label)
        rng = np.random.default_rng([seed, label, *hashlib.sha256(name.encode(errors="surrogatepass")).digest()])
        if len(rows):
            weights[rows, 1:] = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), n_bootstrap).T
    return weights


def _measure(kind, wanted, positive, scores, weights, variant):
    """{metric of that kind: its value in every draw [1 + n_bootstrap], or the reason why it has none}."""
    metrics, item = [metric for metric in kind if metric in wanted], kind[0].partition("_")[0]
    if not metrics:
        return {}
    shares = region_shares(positive) if "aupro" in metrics else None
    try:
        pool = pool_scores(item, positive, scores, len(positive), shares)
    except UndefinedMetric as reason:
        return dict.fromkeys(metrics, str(reason))
    found = sweep(pool, weights, wanted=[metric.rpartition("_")[2] for metric in metrics])
    values = {metric: found[metric.rpartition("_")[2]] for metric in metrics}
    return values if variant == "exact" else values | official_values(metrics, pool, found, weights)


def _row(group, metric, result, labels, confidence, reason=""):
    counts = (int((~labels).sum()), int(labels.sum()))
    if isinstance(result, str):
        return group, metric, np.nan, np.nan, np.nan, *counts, result
    draws = result[1:][np.isfinite(result[1:])]
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail]) if len(draws) else (np.nan, np.nan)
    return group, metric, float(result[0]), float(low), float(high), *counts, reason


def _mean_row(metric, results, labels, confidence):
    left_out = ", ".join(group for group, _, result in results if isinstance(result, str))
    defined = [(images, result) for _, images, result in results if not isinstance(result, str)]
    if not defined:
        return _row("mean", metric, f"undefined in every category: {left_out}", labels[:0], confidence)
    images, draws = zip(*defined, strict=True)
    counted = labels[np.unique(np.concatenate(images))]
    reason = left_out and f"left out: {left_out}"
    return _row("mean", metric, np.mean(draws, axis=0), counted, confidence, reason)


def evaluate_run(results: Results, per_defect: bool = False, **options) -> pd.DataFrame:
    """`evaluate` of a run: the long frame of every metric of every category, with intervals.

    per_defect: one group of rows for each defect type; options: n_bootstrap, seed, variant, confidence.
    Images of unknown truth are left out.
    """
    frame = results.frame
    known = (frame["label"] >= 0).to_numpy()
    if not known.any():
        raise RunError(
            f"nothing to measure in {results.folder}: the images of {results.run['dataset']} have no labels. "
            "Their scores are in its scores.csv"
        )
    rows = slice(None) if known.all() else known
    maps, masks = (None if stack is None else stack[rows] for stack in (results.maps, results.masks))
    defects = frame["defect"][known] if per_defect else None
    truth = frame["category"][known], frame["label"][known], frame["pred_score"][known]
    return evaluate(*truth, maps, masks, defects=defects, **options)


def evaluate_runs(results_by_label: dict[str, Results], **options) -> pd.DataFrame:
    """`evaluate_run` of several runs, below one another, with a first column "method" (the label)."""
    first, *others = results_by_label
    for label in others:
        if set(results_by_label[label].frame["id"]) != set(results_by_label[first].frame["id"]):
            raise RunError(f"{first!r} and {label!r} were scored on different images: compare them apart")
    frames = [evaluate_run(results, **options) for results in results_by_label.values()]
    return pd.concat(frames, keys=list(results_by_label), names=["method", None]).reset_index("method")


def tabulate(measured: pd.DataFrame, names: Sequence[str] = METRICS, per_category: bool = False) -> pd.DataFrame:
    """Frame of `evaluate_runs` -> a row per method, a column per metric, cells like "87.2 [84.1, 90.0]" (percent).

    The row is the mean over categories; with per_category there is one for each category and the mean. What
    is undefined reads "n/a", and a sentence in `attrs["notes"]` says why.
    """
    rows = measured if per_category else measured[measured["category"] == "mean"]
    tables = {label: format_table(part, names) for label, part in rows.groupby("method", sort=False)}
    table = pd.concat(tables, names=["method", "category"])
    unsaid = rows[rows["metric"].isin(names) & (rows["reason"] != "")]
    notes = unsaid.groupby(["method", "category", "reason"], sort=False)["metric"].agg(", ".join)
    table = table if per_category else table.droplevel("category")
    table.attrs = {
        "notes": [f"{label}, {category}: {which}: {reason}" for (label, category, reason), which in notes.items()]
    }
    return table


def markdown(table: pd.DataFrame, index: bool = True) -> str:
    """A table as Markdown; a "|" in a name does not end its cell."""

    def escaped(value):
        return value.replace("|", r"\|") if isinstance(value, str) else value

    return table.rename(index=escaped, columns=escaped).map(escaped).to_markdown(index=index)


def compare(
    results_by_label: dict[str, Results], names: Sequence[str] = METRICS, per_category: bool = False, **options
) -> pd.DataFrame:
    """One table of several runs over the same images, a method beside its controls: `evaluate_runs`, `tabulate`."""
    return tabulate(evaluate_runs(results_by_label, metrics=names, **options), names, per_category)
