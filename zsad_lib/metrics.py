"""Image and pixel metrics of anomaly detection: exact, with bootstrap intervals, undefined cases said aloud.

AUROC, average precision (AP), F1-max and AUPRO, as fractions in [0, 1]; higher scores mean more anomalous.
All of them are sums or maxima over the distinct scores of anomalous items, so those are sorted once and a
bootstrap resample is nothing but another column of image weights.

The variants of the DIVAD / VLMDiff / DiAD evaluation code, kept for comparison with printed tables, stand
together at the end of the module and carry "official" in their names.
"""

import hashlib
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import ndimage, sparse

IMAGE_METRICS = ("image_auroc", "image_ap", "image_f1max")
PIXEL_METRICS = ("pixel_auroc", "pixel_ap", "pixel_f1max", "aupro")
METRICS = IMAGE_METRICS + PIXEL_METRICS
COLUMNS = ("category", "metric", "value", "low", "high", "n_normal", "n_anomalous", "reason")
ONCE = np.ones((1, 1))  # the weights of a set that is one unit, drawn once
BLOCK = 2**17  # floats per work array: they stay in the cache, whatever the number of pixels and draws


class UndefinedMetric(ValueError):
    """The metric has no value for these inputs; the text says why (one class only, NaN scores, ...)."""


# ---------------------------------------------------------------------------------------- single values


def auroc(labels, scores) -> float:
    """Area under the ROC curve, in [0, 1]; equals scikit-learn's `roc_auc_score`, never flipped.

    labels: 0 (normal) / 1 (anomalous) or bool, any shape (image labels [B] or masks [B,H,W]);
    scores: the same shape, higher is more anomalous. Tied scores count one half.
    Raises UndefinedMetric with one class only or scores that are not finite, ValueError for bad inputs.
    """
    return _label_metric("auroc", labels, scores)


def auroc_by_category(categories, labels, scores):
    """{category: AUROC} for N names, labels and scores: [N] of images, or [N,H,W] masks and maps; the categories in the
    order they come. UndefinedMetric where one of them has a single class."""
    categories, labels, scores = np.asarray(categories), np.asarray(labels), np.asarray(scores)
    chosen = {name: categories == name for name in dict.fromkeys(categories.tolist())}
    return {name: auroc(labels[rows].ravel(), scores[rows].ravel()) for name, rows in chosen.items()}


def average_precision(labels, scores) -> float:
    """Average precision, in (0, 1]; equals scikit-learn's `average_precision_score` (a sum of steps over
    recall, no interpolation). Inputs and errors as `auroc`."""
    return _label_metric("ap", labels, scores)


def f1_max(labels, scores) -> float:
    """Largest F1 over all thresholds, in (0, 1]: the best point of scikit-learn's `precision_recall_curve`.

    The threshold is picked with the labels at hand, so this is an upper bound for any real threshold.
    Inputs and errors as `auroc`.
    """
    return _label_metric("f1max", labels, scores)


def aupro(masks, maps, limit=0.3) -> float:
    """Area under the per-region-overlap curve up to false positive rate `limit`, over `limit`, in [0, 1].

    masks: bool (or 0/1) [B,H,W]; maps: [B,H,W], higher is more anomalous; limit in (0, 1].
    One curve point per distinct score; the overlap is the mean, over all 8-connected regions of the set, of
    the part of the region above the threshold; the curve is linear between points, and so cut at `limit`.
    Source: Bergmann et al., IJCV 2021, section 4.3, with every threshold instead of a sample of them.
    Raises UndefinedMetric without an anomalous or a normal pixel or with maps that are not finite.
    """
    masks, maps = _mask_stack(masks, maps)
    if not 0 < limit <= 1:
        raise ValueError(f"limit is a false positive rate in (0, 1], got {limit}")
    return float(_sweep(_pool("pixel", masks, maps, 1, _region_shares(masks)), ONCE, limit)["aupro"][0])


def _label_metric(name, labels, scores):
    labels, scores = _binary(labels, "labels"), _floats(scores, "scores")
    if labels.shape != scores.shape:
        raise ValueError(f"labels {labels.shape} and scores {scores.shape} must have the same shape")
    return float(_sweep(_pool("item", labels, scores, 1), ONCE)[name][0])


# ----------------------------------------------------------------------------------------------- inputs


def _binary(values, name):
    values = np.asarray(values)
    if values.dtype != bool and not ((values == 0) | (values == 1)).all():
        wrong = values[(values != 0) & (values != 1)].flat[0]
        raise ValueError(
            f"{name} must be 0 (normal) or 1 (anomalous), found {wrong}: threshold masks first, "
            "and leave out images without a label"
        )
    return values.astype(bool)


def _floats(values, name):
    values = np.asarray(values)
    if values.dtype.kind not in "fiub":
        raise ValueError(f"{name} must be numbers, got dtype {values.dtype}")
    return values if values.dtype in (np.float32, np.float64) else values.astype(np.float64)


def _mask_stack(masks, maps):
    masks, maps = _binary(masks, "masks"), _floats(maps, "maps")
    if maps.ndim != 3 or masks.shape != maps.shape:
        raise ValueError(f"masks and maps must both be [B,H,W], got {masks.shape} and {maps.shape}")
    return masks, maps


def _require_defined(scores, positive, item):
    bad = scores.size - np.isfinite(scores).sum()
    if not scores.size:
        raise UndefinedMetric(f"no {item} at all")
    if bad:
        raise UndefinedMetric(f"{bad} of {scores.size} {item} scores are NaN or infinite")
    if not positive.any():
        raise UndefinedMetric(f"only one class: no anomalous {item} among {scores.size}")
    if positive.all():
        raise UndefinedMetric(f"only one class: no normal {item} among {scores.size}")


def _region_shares(masks):
    """[B,H,W] -> the same shape: 1 / area of the 8-connected region that a pixel belongs to, 0 outside."""
    shares = np.zeros(masks.shape)
    for mask, share in zip(masks, shares, strict=True):
        if mask.any():
            regions, _ = ndimage.label(mask, np.ones((3, 3)))
            share[mask] = 1 / np.bincount(regions.ravel())[regions[mask]]
    return shares


# ----------------------------------------------------------------------------- one sort, many resamples


class _Pool(NamedTuple):
    """Scores of n images (one score or many pixels each), sorted once."""

    negatives: list  # n arrays: the scores of an image's normal items, ascending
    positives: np.ndarray  # [P] scores of all anomalous items, descending
    owner: np.ndarray  # [P] the image of each
    share: np.ndarray  # [P] the part of its region that each is
    span: np.ndarray  # [n,2] smallest and largest score of an image


def _pool(item, positive, scores, n, shares=None):
    """Arrays of n images' items, of any shape -> _Pool. UndefinedMetric tells of `item`s in its text."""
    _require_defined(scores, positive, item)
    scores, positive = scores.reshape(n, -1), positive.reshape(n, -1)
    owner, values = np.nonzero(positive)[0], scores[positive]
    order = np.argsort(values)[::-1]
    share = np.zeros(len(order)) if shares is None else shares.reshape(n, -1)[positive][order]
    negatives = [np.sort(row[~mask]) for row, mask in zip(scores, positive, strict=True)]
    span = np.stack([scores.min(1), scores.max(1)], 1)
    return _Pool(negatives, values[order], owner[order], share, span)


def _totals(pool, weights):
    """Weighted numbers of normal items, anomalous items and regions: three arrays [R] for weights [n,R]."""
    sizes = np.array([len(negatives) for negatives in pool.negatives])
    counts = np.bincount(pool.owner, minlength=len(sizes))
    regions = np.bincount(pool.owner, pool.share, minlength=len(sizes)).round()
    return sizes @ weights, counts @ weights, regions @ weights


def _sweep(pool, weights, limit=0.3):
    """All metrics of each column of weights [n,R] (how often an image is drawn): {name: [R]}, NaN: undefined.

    The curves change direction at the P distinct anomalous scores alone, so nothing is computed elsewhere.
    """
    n_neg, n_pos, n_regions = _totals(pool, weights)
    starts = np.flatnonzero(np.r_[True, pool.positives[1:] != pool.positives[:-1]])
    layout = (pool.owner, np.append(starts, len(pool.owner)))
    shape = (len(starts), len(pool.negatives))
    members = sparse.csr_array((np.ones(len(pool.owner)), *layout), shape)
    shares = sparse.csr_array((pool.share, *layout), shape)
    area, ap, f1, pro = np.zeros((4, weights.shape[1]))
    cut, above = limit * n_neg, np.zeros(weights.shape[1])
    rows = max(1, BLOCK // max(weights.shape))
    for first in range(0, len(starts), rows):
        before, through = _false_positives(pool, pool.positives[starts[first : first + rows]], weights)
        gain = members[first : first + rows] @ weights
        hits = np.cumsum(gain, axis=0)
        hits += above
        above = hits[-1]
        area += np.einsum("kr,kr->r", gain, n_neg - (before + through) / 2)
        found = hits + through
        ap += np.einsum("kr,kr->r", gain, hits / np.maximum(found, 1))
        f1 = np.maximum(f1, (2 * hits / np.maximum(found + n_pos, 1)).max(0))
        if pool.share.any():
            pro += np.einsum("kr,kr->r", shares[first : first + rows] @ weights, _reach(before, through, cut))
    with np.errstate(invalid="ignore", divide="ignore"):
        undefined = np.where((n_neg > 0) & (n_pos > 0), 0, np.nan)
        values = {
            "auroc": area / (n_neg * n_pos),
            "ap": ap / n_pos,
            "f1max": f1,
            "aupro": np.minimum(pro / (cut * n_regions), 1),
        }
        return {name: value + undefined for name, value in values.items()}


def _false_positives(pool, thresholds, weights):
    """Weighted normal items above, and at or above, each descending threshold [K]: two arrays [K,R]."""
    ascending = thresholds[::-1]
    counts = np.empty((2, len(pool.negatives), len(thresholds)))
    for i, negatives in enumerate(pool.negatives):
        counts[0, i] = len(negatives) - np.searchsorted(negatives, ascending, "right")
        counts[1, i] = len(negatives) - np.searchsorted(negatives, ascending, "left")
    before = counts[0, :, ::-1].T @ weights
    tied = (counts[0] != counts[1]).any()
    return before, counts[1, :, ::-1].T @ weights if tied else before


def _reach(before, through, cut):
    """Area left of `cut` under a curve that rises linearly from 0 to 1 between two false positive counts."""
    flat = np.maximum(cut - through, 0)
    if through is before:
        return flat
    ramp = np.minimum(cut, through) - np.minimum(cut, before)
    return flat + ramp**2 / np.maximum(2 * (through - before), 1)


# ---------------------------------------------------------------------------------------- whole data sets


def evaluate(
    categories,
    labels,
    image_scores,
    maps=None,
    masks=None,
    n_bootstrap=200,
    seed=0,
    variant="exact",
    confidence=0.95,
    defects=None,
) -> pd.DataFrame:
    """Every metric of every category, and their mean, with bootstrap intervals.

    categories: n names; labels: [n] 0/1; image_scores: [n]; maps: [n,H,W] or None; masks: bool [n,H,W] or
    None; variant: "exact", or "official" (flipped AUROC, `aupro_official`, the rest unchanged).
    defects: n names, or None. When given, every defect type of a category is measured on its own, against
    all of the category's normal images, in rows named "category/defect".

    Returns a long frame with columns category, metric (one of `METRICS`), value, low, high (fractions in
    [0, 1]), n_normal, n_anomalous (images), reason; its `attrs` hold variant, n_bootstrap, seed, confidence.
    An undefined metric has value NaN and its reason in words. The rows of category "mean" average the
    categories where the metric is defined; their reason lists the ones left out.

    Intervals are percentiles of `n_bootstrap` draws of whole images, with replacement, among a category's
    normal and anomalous ones separately; the mean's come from averaging the categories' draws. A category's
    draws depend on the seed, its name and the set of its images: neither on their order nor on other
    categories. Draws that leave a metric undefined are dropped. n_bootstrap 0 gives NaN for low and high.
    Raises ValueError for shapes that do not match, labels other than 0/1, or a normal image with a mask.
    """
    if variant not in ("exact", "official") or not 0 < confidence < 1:
        raise ValueError(
            f'variant must be "exact" or "official" and confidence in (0, 1), got {variant!r} and {confidence}'
        )
    categories, labels = np.asarray(categories, dtype=str), _binary(labels, "labels")
    image_scores = _floats(image_scores, "image_scores")
    _check_sizes(
        categories=categories, labels=labels, image_scores=image_scores, maps=maps, masks=masks, defects=defects
    )
    pixels = maps is not None and masks is not None
    if pixels:
        masks, maps = _mask_stack(masks, maps if variant == "exact" else np.asarray(maps, dtype=np.float32))
        _check_order(categories, labels, masks)
    rows, kept = [], {metric: [] for metric in METRICS}
    for category, group, images in _groups(categories, labels, defects):
        totals = maps[images].sum((1, 2)) if pixels else np.zeros(len(images))
        images = images[np.lexsort((totals, image_scores[images]))]  # draws must not depend on the order
        weights = _draws(labels[images], category, group, n_bootstrap, seed)
        results = _measure("image", labels[images], image_scores[images], weights, variant)
        if pixels:
            results |= _measure("pixel", masks[images], maps[images], weights, variant)
        for metric in METRICS:
            result = results.get(metric, "no anomaly maps" if maps is None else "no masks")
            rows.append(_row(group, metric, result, labels[images], confidence))
            kept[metric].append((group, images, result))
    rows += [_mean_row(metric, kept[metric], labels, confidence) for metric in METRICS]
    frame = pd.DataFrame(rows, columns=COLUMNS)
    frame.attrs = {"variant": variant, "n_bootstrap": n_bootstrap, "seed": seed, "confidence": confidence}
    return frame


def format_table(frame, metrics=None) -> pd.DataFrame:
    """Frame of `evaluate` -> one row per category, one column per metric, cells like "87.2 [84.1, 90.0]".

    Values in percent; no bracket without an interval, "n/a" where undefined. metrics: names, in the order
    wanted (default: all in the frame). Raises ValueError for a metric that the frame does not have.
    """
    present = list(dict.fromkeys(frame["metric"]))
    metrics = present if metrics is None else list(metrics)
    if not set(metrics) <= set(present):
        raise ValueError(f"no such metric: {sorted(set(metrics) - set(present))}; the frame has {present}")
    cells = frame.assign(cell=[format_cell(*row) for row in zip(frame.value, frame.low, frame.high, strict=True)])
    table = cells.pivot(index="category", columns="metric", values="cell")
    return table.loc[list(dict.fromkeys(frame["category"])), metrics]


def format_cell(value, low, high):
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
        rng = np.random.default_rng([seed, label, *hashlib.sha256(name.encode()).digest()])
        if len(rows):
            weights[rows, 1:] = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), n_bootstrap).T
    return weights


def _measure(item, positive, scores, weights, variant):
    """{metric of that item: its value in every draw [1 + n_bootstrap], or the reason why it has none}."""
    metrics = IMAGE_METRICS if item == "image" else PIXEL_METRICS
    shares = None if item == "image" else _region_shares(positive)
    try:
        pool = _pool(item, positive, scores, len(positive), shares)
    except UndefinedMetric as reason:
        return dict.fromkeys(metrics, str(reason))
    sweep = _sweep(pool, weights)
    values = {metric: sweep[metric.split("_")[-1]] for metric in metrics}
    return values if variant == "exact" else values | _official_values(metrics, pool, sweep, weights)


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


# --------------------------------------------------- official variants (DIVAD, VLMDiff, DiAD evaluation code)


def auroc_official(labels, scores) -> float:
    """AUROC as the official code reports it, in [0.5, 1]: 1 - AUROC, silently, when that is larger.

    Inputs and errors as `auroc`. Mirrors the image and pixel AUROC of DIVAD's `eval_helper.py`, which treats
    AP and F1-max as this module does.
    """
    value = auroc(labels, scores)
    return max(value, 1 - value)


def aupro_official(masks, maps, n_thresholds=200) -> float:
    """AUPRO as the official code computes it, in [0, 1], biased and sensitive to outliers (use `aupro`).

    Equally spaced float32 thresholds from the smallest to the largest score; of the curve's points those with
    a false positive rate strictly below 0.3 are kept, and that rate is divided by the largest one kept.
    Mirrors `compute_pro` of DIVAD's `eval_helper.py`. Inputs as `aupro`; maps are taken as float32.
    Raises UndefinedMetric where that code fails: constant maps, fewer than two points kept, or all of them
    at rate 0; and as `aupro` does.
    """
    masks, maps = _mask_stack(masks, np.asarray(maps, dtype=np.float32))
    pool = _pool("pixel", masks, maps, 1, _region_shares(masks))
    return float(_official_areas(pool, ONCE, n_thresholds)[0])


def _official_values(metrics, pool, sweep, weights):
    """The entries of `_measure` that differ from the exact ones."""
    values = {metrics[0]: np.maximum(sweep["auroc"], 1 - sweep["auroc"])}
    if "aupro" in metrics:
        try:
            values["aupro"] = _official_areas(pool, weights)
        except UndefinedMetric as reason:
            values["aupro"] = str(reason)
    return values


def _official_areas(pool, weights, n_thresholds=200):
    """`aupro_official` of every column of weights [n,R]: [R], NaN where undefined, raising for the first."""
    n_neg, _, n_regions = _totals(pool, weights)
    areas, tables = np.full(weights.shape[1], np.nan), {}
    for column, drawn in enumerate(weights.T):
        if not (n_neg[column] and n_regions[column]):
            continue
        span = pool.span[drawn > 0, 0].min(), pool.span[drawn > 0, 1].max()
        try:
            if span not in tables:
                tables[span] = _official_counts(pool, *span, n_thresholds)
            false, overlap = tables[span]
            areas[column] = _official_area(false @ drawn / n_neg[column], overlap @ drawn / n_regions[column])
        except UndefinedMetric:
            if column == 0:
                raise
    return areas


def _official_counts(pool, low, high, n_thresholds):
    """Normal items, and summed region shares, above each threshold, per image: two arrays [thresholds, n]."""
    if low == high:
        raise UndefinedMetric(f"all maps are constant ({low}): the official code has no threshold to try")
    thresholds = np.arange(low, high, (high - low) / n_thresholds)
    false = [len(negatives) - np.searchsorted(negatives, thresholds, "right") for negatives in pool.negatives]
    passed = np.searchsorted(thresholds, pool.positives, "left")  # thresholds strictly below a score
    shape = (len(false), len(thresholds) + 1)
    shares = np.bincount(pool.owner * shape[1] + passed, pool.share, shape[0] * shape[1]).reshape(shape)
    return np.array(false).T, np.cumsum(shares[:, :0:-1], axis=1)[:, ::-1].T


def _official_area(rates, overlaps):
    kept = rates < 0.3
    if kept.sum() < 2:
        raise UndefinedMetric(
            f"{kept.sum()} of the official code's thresholds keep the false positive rate below 0.3, two are needed"
        )
    if not rates[kept].any():
        raise UndefinedMetric("the largest false positive rate below 0.3, the official code's divisor, is 0")
    return np.trapezoid(overlaps[kept][::-1], rates[kept][::-1]) / rates[kept].max()
