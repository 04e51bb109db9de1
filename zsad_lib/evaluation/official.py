"""The metrics as the evaluation code of DIVAD, VLMDiff and DiAD computes them, for comparison with printed tables."""

from typing import Any

import numpy as np

from zsad_lib.errors import UndefinedMetric
from zsad_lib.evaluation.metrics import ONCE, Pool, auroc, mask_stack, pool_scores, region_shares, totals


def auroc_official(labels: Any, scores: Any) -> float:
    """AUROC as the official code reports it, in [0.5, 1]: 1 - AUROC, silently, when that is larger.

    Inputs and errors as `auroc`. Mirrors the image and pixel AUROC of DIVAD's `eval_helper.py`, which treats
    AP and F1-max as this module does.
    """
    value = auroc(labels, scores)
    return max(value, 1 - value)


def aupro_official(masks: Any, maps: Any, n_thresholds: int = 200) -> float:
    """AUPRO as the official code computes it, in [0, 1], biased and sensitive to outliers (use `aupro`).

    Equally spaced float32 thresholds from the smallest to the largest score; of the curve's points those with
    a false positive rate strictly below 0.3 are kept, and that rate is divided by the largest one kept.
    Mirrors `compute_pro` of DIVAD's `eval_helper.py`. Inputs as `aupro`; maps are taken as float32.
    Undefined also where that code fails: constant maps, fewer than two points kept, or all of them at rate 0.
    """
    masks, maps = mask_stack(masks, np.asarray(maps, dtype=np.float32))
    pool = pool_scores("pixel", masks, maps, 1, region_shares(masks))
    return float(_official_areas(pool, ONCE, n_thresholds)[0])


def official_values(
    metrics: list[str], pool: Pool, sweep: dict[str, np.ndarray], weights: np.ndarray
) -> dict[str, np.ndarray | str]:
    """The entries of `_measure` that differ from the exact ones."""
    values = {m: np.maximum(sweep["auroc"], 1 - sweep["auroc"]) for m in metrics if m.endswith("_auroc")}
    if "aupro" in metrics:
        try:
            values["aupro"] = _official_areas(pool, weights)
        except UndefinedMetric as reason:
            values["aupro"] = str(reason)
    return values


def _official_areas(pool, weights, n_thresholds=200):
    """`aupro_official` of every column of weights [n,R]: [R], NaN where undefined, raising for the first."""
    n_neg, _, n_regions = totals(pool, weights)
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
