"""Image and pixel metrics of anomaly detection: exact, with bootstrap intervals, undefined cases said aloud.

AUROC, average precision (AP), F1-max and AUPRO, as fractions in [0, 1]; higher scores mean more anomalous.
All of them are sums or maxima over the distinct scores of anomalous items, so those are sorted once and a
bootstrap resample is nothing but another column of image weights (`tables.evaluate`).
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from scipy import ndimage, sparse

from zsad_lib.errors import UndefinedMetric

IMAGE_METRICS = ("image_auroc", "image_ap", "image_f1max")
PIXEL_METRICS = ("pixel_auroc", "pixel_ap", "pixel_f1max", "aupro")
METRICS = IMAGE_METRICS + PIXEL_METRICS
KINDS = ("auroc", "ap", "f1max", "aupro")
ONCE = np.ones((1, 1))  # the weights of a set that is one unit, drawn once
BLOCK = 2**17  # floats per work array: they stay in the cache, whatever the number of pixels and draws


# --- single values


def auroc(labels: Any, scores: Any) -> float:
    """Area under the ROC curve, in [0, 1]; equals scikit-learn's `roc_auc_score`, never flipped.

    labels: 0 (normal) / 1 (anomalous) or bool, any shape (image labels [B] or masks [B,H,W]);
    scores: the same shape, higher is more anomalous. Tied scores count one half.
    """
    return _label_metric("auroc", labels, scores)


def auroc_by_category(categories: Any, labels: Any, scores: Any) -> dict[str, float]:
    """{category: AUROC} for N names, labels and scores: [N] of images, or [N,H,W] masks and maps; the categories in the
    order they come."""
    categories, labels, scores = np.asarray(categories), np.asarray(labels), np.asarray(scores)
    chosen = {name: categories == name for name in dict.fromkeys(categories.tolist())}
    return {name: auroc(labels[rows].ravel(), scores[rows].ravel()) for name, rows in chosen.items()}


def average_precision(labels: Any, scores: Any) -> float:
    """Average precision, in (0, 1]; equals scikit-learn's `average_precision_score` (a sum of steps over
    recall, no interpolation). Inputs as `auroc`."""
    return _label_metric("ap", labels, scores)


def f1_max(labels: Any, scores: Any) -> float:
    """Largest F1 over all thresholds, in (0, 1]: the best point of scikit-learn's `precision_recall_curve`.

    The threshold is picked with the labels at hand, so this is an upper bound for any real threshold.
    Inputs as `auroc`.
    """
    return _label_metric("f1max", labels, scores)


def aupro(masks: Any, maps: Any, limit: float = 0.3) -> float:
    """Area under the per-region-overlap curve up to false positive rate `limit`, over `limit`, in [0, 1].

    masks: bool (or 0/1) [B,H,W]; maps: [B,H,W], higher is more anomalous; limit in (0, 1].
    One curve point per distinct score; the overlap is the mean, over all 8-connected regions of the set, of
    the part of the region above the threshold; the curve is linear between points, and so cut at `limit`.
    Source: Bergmann et al., IJCV 2021, section 4.3, with every threshold instead of a sample of them.
    """
    masks, maps = mask_stack(masks, maps)
    if not 0 < limit <= 1:
        raise ValueError(f"limit is a false positive rate in (0, 1], got {limit}")
    return float(sweep(pool_scores("pixel", masks, maps, 1, region_shares(masks)), ONCE, limit)["aupro"][0])


def _label_metric(name, labels, scores):
    labels, scores = binary(labels, "labels"), floats(scores, "scores")
    if labels.shape != scores.shape:
        raise ValueError(f"labels {labels.shape} and scores {scores.shape} must have the same shape")
    return float(sweep(pool_scores("item", labels, scores, 1), ONCE)[name][0])


# --- inputs


def binary(values: Any, name: str) -> np.ndarray:
    values = np.asarray(values)
    if values.dtype != bool and not ((values == 0) | (values == 1)).all():
        wrong = values[(values != 0) & (values != 1)].flat[0]
        raise ValueError(
            f"{name} must be 0 (normal) or 1 (anomalous), found {wrong}: threshold masks first, "
            "and leave out images without a label"
        )
    return values.astype(bool)


def floats(values: Any, name: str) -> np.ndarray:
    values = np.asarray(values)
    if values.dtype.kind not in "fiub":
        raise ValueError(f"{name} must be numbers, got dtype {values.dtype}")
    return values if values.dtype in (np.float32, np.float64) else values.astype(np.float64)


def mask_stack(masks: Any, maps: Any) -> tuple[np.ndarray, np.ndarray]:
    masks, maps = binary(masks, "masks"), floats(maps, "maps")
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


def region_shares(masks: np.ndarray) -> np.ndarray:
    """[B,H,W] -> the same shape: 1 / area of the 8-connected region that a pixel belongs to, 0 outside."""
    shares = np.zeros(masks.shape)
    for mask, share in zip(masks, shares, strict=True):
        if mask.any():
            regions, _ = ndimage.label(mask, np.ones((3, 3)))
            share[mask] = 1 / np.bincount(regions.ravel())[regions[mask]]
    return shares


# --- one sort, many resamples


class Pool(NamedTuple):
    """Scores of n images (one score or many pixels each), sorted once."""

    negatives: list  # n arrays: the scores of an image's normal items, ascending
    positives: np.ndarray  # [P] scores of all anomalous items, descending
    owner: np.ndarray  # [P] the image of each
    share: np.ndarray  # [P] the part of its region that each is
    span: np.ndarray  # [n,2] smallest and largest score of an image


def pool_scores(item: str, positive: np.ndarray, scores: np.ndarray, n: int, shares: np.ndarray | None = None) -> Pool:
    """Arrays of n images' items, of any shape -> Pool. UndefinedMetric tells of `item`s in its text."""
    _require_defined(scores, positive, item)
    scores, positive = scores.reshape(n, -1), positive.reshape(n, -1)
    owner, values = np.nonzero(positive)[0], scores[positive]
    order = np.argsort(values)[::-1]
    share = np.zeros(len(order)) if shares is None else shares.reshape(n, -1)[positive][order]
    negatives = [np.sort(row[~mask]) for row, mask in zip(scores, positive, strict=True)]
    span = np.stack([scores.min(1), scores.max(1)], 1)
    return Pool(negatives, values[order], owner[order], share, span)


def totals(pool: Pool, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weighted numbers of normal items, anomalous items and regions: three arrays [R] for weights [n,R]."""
    sizes = np.array([len(negatives) for negatives in pool.negatives])
    counts = np.bincount(pool.owner, minlength=len(sizes))
    regions = np.bincount(pool.owner, pool.share, minlength=len(sizes)).round()
    return sizes @ weights, counts @ weights, regions @ weights


def sweep(pool: Pool, weights: np.ndarray, limit: float = 0.3, wanted: Iterable[str] = KINDS) -> dict[str, np.ndarray]:
    """The metrics `wanted` of each column of weights [n,R] (how often an image is drawn): {name: [R]}, NaN: undefined.

    The curves change direction at the P distinct anomalous scores alone, so nothing is computed elsewhere.
    """
    n_neg, n_pos, n_regions = totals(pool, weights)
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
        if "auroc" in wanted:
            area += np.einsum("kr,kr->r", gain, n_neg - (before + through) / 2)
        if "ap" in wanted or "f1max" in wanted:
            hits = np.cumsum(gain, axis=0)
            hits += above
            above = hits[-1]
            found = hits + through
            ap += np.einsum("kr,kr->r", gain, hits / np.maximum(found, 1))
            f1 = np.maximum(f1, (2 * hits / np.maximum(found + n_pos, 1)).max(0))
        if "aupro" in wanted and pool.share.any():
            pro += np.einsum("kr,kr->r", shares[first : first + rows] @ weights, _reach(before, through, cut))
    with np.errstate(invalid="ignore", divide="ignore"):
        undefined = np.where((n_neg > 0) & (n_pos > 0), 0, np.nan)
        values = {
            "auroc": area / (n_neg * n_pos),
            "ap": ap / n_pos,
            "f1max": f1,
            "aupro": np.minimum(pro / (cut * n_regions), 1),
        }
        return {name: values[name] + undefined for name in wanted}


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
