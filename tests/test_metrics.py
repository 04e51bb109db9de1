"""Metrics against the official numbers, scikit-learn, plain definitions and brute-force resampling."""

import json
import time
import warnings

import numpy as np
import pandas as pd
import pytest
from scipy import ndimage
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from conftest import shared_path
from zsad_lib.errors import UndefinedMetric
from zsad_lib.evaluation import metrics, official, tables
from zsad_lib.evaluation.metrics import aupro, auroc, average_precision, f1_max
from zsad_lib.evaluation.tables import evaluate, format_table

CASES = ("smooth", "weak", "perfect", "perfect_binary", "inverted", "quantised", "diagonal", "outlier")
LABELS = np.array([1] * 5 + [0] * 3)


def golden(case):
    values = json.loads(shared_path("golden/metrics/values.json").read_text())["cases"].get(case)
    if values is None:
        pytest.skip(f"the golden case {case} is in the shared folder alone")
    arrays = np.load(shared_path("golden/metrics/maps.npz"))
    keys = ("masks", "maps", "image_scores", "image_scores_auprsp")
    return values, *(arrays[f"{case}_{key}"] for key in keys)


def toy(seed=0, n=9, size=20, levels=None):
    """Images 0..n-4 hold one to a few defects, the last three none; `levels` quantises the maps."""
    rng = np.random.default_rng(seed)
    masks = ndimage.gaussian_filter(rng.normal(size=(n, size, size)), (0, 2, 2)) > 0.18
    masks[-3:] = False
    maps = rng.normal(size=masks.shape) + masks
    if levels:
        maps = np.round(maps * levels / 6)
    labels = np.array([1] * (n - 3) + [0] * 3)
    assert masks[:-3].any((1, 2)).all()
    return labels, maps.max((1, 2)), maps.astype(np.float32), masks


def cells(*data, **options):
    """The frame of `evaluate`, by category and metric."""
    return evaluate(*data, **options).set_index(["category", "metric"])


def regions(masks, maps):
    """The values of each region."""
    for mask, values in zip(masks, maps, strict=True):
        numbered, count = ndimage.label(mask, np.ones((3, 3)))
        yield from (values[numbered == k] for k in range(1, count + 1))


def sklearn_f1_max(labels, scores):
    precision, recall, _ = precision_recall_curve(labels, scores)
    return np.max(2 * precision * recall / np.maximum(precision + recall, 1e-300))


def plain_aupro(masks, maps, limit=0.3):
    """The definition, one threshold at a time."""
    rates, overlaps, found = [0.0], [0.0], list(regions(masks, maps))
    for threshold in np.unique(maps)[::-1]:
        rates.append(np.mean(maps[~masks] >= threshold))
        overlaps.append(np.mean([np.mean(region >= threshold) for region in found]))
    grid = np.unique(np.append([r for r in rates if r < limit], limit))
    area = 0.0
    for left, right in zip(grid[:-1], grid[1:], strict=True):
        # the curve can jump at a rate: start from the top of the jump
        start = max(o for r, o in zip(rates, overlaps, strict=True) if r == left)
        after = next(i for i, r in enumerate(rates) if r > left)
        end = start + (overlaps[after] - start) * (right - left) / (rates[after] - left)
        area += (start + end) / 2 * (right - left)
    return area / limit


def plain_official_aupro(masks, maps):
    low, high = maps.min(), maps.max()
    rates, overlaps = [], []
    for threshold in np.arange(low, high, (high - low) / 200):
        passed = maps > threshold
        rates.append(passed[~masks].mean())
        overlaps.append(np.mean([hit.mean() for hit in regions(masks, passed)]))
    rates, overlaps = np.array(rates), np.array(overlaps)
    rates, overlaps = rates[rates < 0.3][::-1], overlaps[rates < 0.3][::-1]
    return np.trapezoid(overlaps, rates / rates.max())


# --------------------------------------------------------------------------------------------- golden values


@pytest.mark.parametrize("case", CASES)
def test_exact_metrics_equal_the_golden_values(case):
    values, masks, maps, image_scores, image_scores_ap = golden(case)
    measured = {
        "true_image_auroc": auroc(LABELS, image_scores),
        "true_pixel_auroc": auroc(masks, maps),
        "apsp": average_precision(LABELS, image_scores_ap),
        "appx": average_precision(masks, maps),
        "f1sp": f1_max(LABELS, image_scores),
        "f1px": f1_max(masks, maps),
        "aupro03_exact": aupro(masks, maps),
    }
    assert measured == {name: pytest.approx(values[name], abs=1e-9) for name in measured}


@pytest.mark.parametrize("case", CASES)
def test_official_metrics_equal_the_golden_values(case):
    values, masks, maps, image_scores, _ = golden(case)
    assert official.auroc_official(LABELS, image_scores) == pytest.approx(values["max"], abs=1e-9)
    assert official.auroc_official(masks, maps) == pytest.approx(values["pixel"], abs=1e-9)
    if isinstance(values["pro"], str):
        with pytest.raises(UndefinedMetric, match="divisor, is 0"):
            official.aupro_official(masks, maps)
        return
    assert official.aupro_official(masks, maps) == pytest.approx(values["pro"], abs=1e-6)
    if values["official_pro_2000_thresholds"]:
        fine = official.aupro_official(masks, maps, n_thresholds=2000)
        assert fine == pytest.approx(values["official_pro_2000_thresholds"], abs=1e-6)


ALIKE = {"image_f1max": "f1sp", "pixel_ap": "appx", "pixel_f1max": "f1px"}
GOLDEN = {
    "exact": {"image_auroc": "true_image_auroc", "pixel_auroc": "true_pixel_auroc", "aupro": "aupro03_exact"},
    "official": {"image_auroc": "max", "pixel_auroc": "pixel", "aupro": "pro"},
}


@pytest.mark.parametrize("variant", GOLDEN)
def test_evaluate_equals_the_golden_values(variant):
    values, masks, maps, image_scores, _ = golden("inverted")
    measured = cells(["a"] * 8, LABELS, image_scores, maps, masks, n_bootstrap=0, variant=variant).value["a"]
    for metric, key in (GOLDEN[variant] | ALIKE).items():
        assert measured[metric] == pytest.approx(values[key], abs=1e-9), metric


# ------------------------------------------------------------------------------------- definitions and limits


@pytest.mark.parametrize("levels", [None, 2, 5, 40])
@pytest.mark.parametrize("seed", range(4))
def test_values_equal_scikit_learn(seed, levels):
    _, _, maps, masks = toy(seed, levels=levels)
    flat, scores = masks.ravel(), maps.ravel()
    assert auroc(masks, maps) == pytest.approx(roc_auc_score(flat, scores), abs=1e-12)
    assert average_precision(masks, maps) == pytest.approx(average_precision_score(flat, scores), abs=1e-12)
    assert f1_max(masks, maps) == pytest.approx(sklearn_f1_max(flat, scores), abs=1e-12)


@pytest.mark.parametrize("levels", [None, 2, 5, 40])
@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
def test_aupro_equals_its_definition(levels, limit):
    _, _, maps, masks = toy(5, levels=levels)
    assert aupro(masks, maps, limit) == pytest.approx(plain_aupro(masks, maps, limit), abs=1e-12)


def test_small_work_arrays_change_nothing(monkeypatch):
    labels, scores, maps, masks = toy(1, levels=9)
    whole = evaluate(["a"] * 9, labels, scores, maps, masks, n_bootstrap=20)
    monkeypatch.setattr(metrics, "BLOCK", 3 * 21)
    pieces = evaluate(["a"] * 9, labels, scores, maps, masks, n_bootstrap=20)
    pd.testing.assert_frame_equal(whole, pieces, rtol=1e-12)


def test_perfect_inverted_and_constant_maps():
    _, _, maps, masks = toy(2)
    perfect = masks + np.random.default_rng(0).random(masks.shape) / 2
    for metric in (auroc, average_precision, f1_max, aupro):
        assert metric(masks, perfect) == pytest.approx(1, abs=1e-12)
    assert aupro(masks, -perfect) == 0
    assert auroc(masks, -perfect) == 0
    constant = np.full(masks.shape, 0.1)
    assert auroc(masks, constant) == 0.5
    assert average_precision(masks, constant) == pytest.approx(masks.mean())
    assert aupro(masks, constant) == pytest.approx(0.15)


def test_regions_touching_at_a_corner_are_one_and_count_alike_whatever_their_area():
    masks = np.zeros((2, 12, 12), bool)
    masks[0, 2, 2] = masks[0, 3, 3] = True  # one region of two pixels
    masks[1, 4:8, 4:8] = True  # one of sixteen
    found = np.zeros(masks.shape)
    found[0, 2, 2] = 1
    found[1, 4:8, 4:8] = 1
    step = 0.75  # half of one region and all of the other, at no false positive
    assert aupro(masks, found, limit=1e-6) == pytest.approx(step, abs=1e-5)
    assert aupro(masks, found) == pytest.approx(step + (1 - step) * 0.15)


def test_values_do_not_depend_on_the_order_of_images():
    labels, scores, maps, masks = toy(3)
    names = np.array(["b", "a", "b"] * 3)
    labels[2], masks[2] = 0, False
    order = np.random.default_rng(1).permutation(9)
    given = evaluate(names, labels, scores, maps, masks)
    mixed = evaluate(names[order], labels[order], scores[order], maps[order], masks[order])
    pd.testing.assert_frame_equal(given, mixed, rtol=1e-12)
    assert given.value.notna().all() and (given.low < given.high).any()


# --------------------------------------------------------------------------------- undefined and wrong inputs


@pytest.mark.parametrize("metric", [auroc, average_precision, f1_max, official.auroc_official])
@pytest.mark.parametrize(
    "labels, scores, reason",
    [
        ([0, 0, 0], [1, 2, 3], "no anomalous item among 3"),
        ([1, 1], [1, 2], "no normal item among 2"),
        ([0, 1, 1], [1, np.nan, np.inf], "2 of 3 item scores are NaN or infinite"),
        ([], [], "no item at all"),
    ],
)
def test_undefined_image_metrics_say_why(metric, labels, scores, reason):
    with pytest.raises(UndefinedMetric, match=reason):
        metric(labels, scores)


@pytest.mark.parametrize("metric", [aupro, official.aupro_official])
@pytest.mark.parametrize(
    ("mask", "broken", "reason"),
    [
        (np.zeros((4, 4), bool), 0, "no anomalous pixel"),
        (np.ones((4, 4), bool), 0, "no normal pixel"),
        (np.eye(4, dtype=bool), 1, "1 of 32 pixel scores"),
    ],
)
def test_undefined_region_metrics_say_why(metric, mask, broken, reason):
    maps = np.random.default_rng(0).random((2, 4, 4))
    maps.flat[:broken] = np.nan
    with pytest.raises(UndefinedMetric, match=reason):
        metric(np.stack([mask, mask]), maps)


def test_official_thresholds_are_float32_and_strict():
    _, _, maps, masks = toy(6)
    maps = np.clip(np.round(100 + 30 * maps), 0, 200)
    maps[-1, 0, :2] = 0, 200  # the 200 thresholds are 0, 1, ..., 199: every score ties with one
    wanted = plain_official_aupro(masks, maps)
    assert official.aupro_official(masks, maps) == pytest.approx(wanted, abs=1e-9)
    nudged = maps + 1e-9 * (maps * masks).astype(float)  # gone in float32; in float64 the ties would break
    assert official.aupro_official(masks, nudged) == pytest.approx(wanted, abs=1e-9)
    found = cells(["a"] * 9, masks.any((1, 2)), np.arange(9), nudged, masks, variant="official")
    assert found.value["a", "aupro"] == pytest.approx(wanted, abs=1e-9)


def test_official_aupro_is_undefined_where_the_official_code_fails():
    masks, one_low = np.zeros((1, 10, 10), bool), np.ones((1, 10, 10))
    masks[0, :3, :3], one_low[0, -1, -1] = True, 0
    for maps, why in ((np.ones(masks.shape), "all maps are constant"), (one_low, "two are needed")):
        with pytest.raises(UndefinedMetric, match=why):
            official.aupro_official(masks, maps)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: auroc([0, 1], [1, 2, 3]), r"\(2,\) and scores \(3,\)"),
        (lambda: auroc([0, 255], [1, 2]), "found 255: threshold masks first"),
        (lambda: auroc([0, -1], [1, 2]), "images without a label"),
        (lambda: auroc([0, 1], ["a", "b"]), "scores must be numbers"),
        (lambda: aupro(np.zeros((4, 4)), np.zeros((4, 4))), r"must both be \[B,H,W\]"),
        (lambda: aupro(np.zeros((1, 4, 4)), np.zeros((1, 4, 5))), r"must both be \[B,H,W\]"),
        (lambda: aupro(np.eye(4)[None], np.zeros((1, 4, 4)), limit=30), "false positive rate"),
        (lambda: evaluate(["a"], [0, 1], [1, 2]), "one entry per image"),
        (lambda: evaluate(["a"] * 2, [0, 1], [[1], [2]]), "one score each"),
        (lambda: evaluate([], [], []), "at least one image"),
        (lambda: evaluate(["a"] * 2, [0, 1], [1, 2], variant="fast"), "got 'fast'"),
        (lambda: evaluate(["a"] * 2, [0, 1], [1, 2], np.ones((2, 4, 4)), np.ones((2, 4, 4))), "image 0 .a. is"),
        (lambda: format_table(evaluate(["a"] * 2, [0, 1], [1, 2]), ["f1"]), "no such metric"),
    ],
)
def test_wrong_inputs_are_named(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert not isinstance(caught.value, UndefinedMetric)


# ------------------------------------------------------------------------------------------------ bootstrap


@pytest.mark.parametrize("levels", [None, 6])
def test_draws_equal_brute_force_resampling(levels):
    labels, scores, maps, masks = toy(4, size=14, levels=levels)
    maps[3] += 8  # draws without this image span other thresholds in the official variant
    rng = np.random.default_rng(0)
    weights = rng.multinomial(9, [1 / 9] * 9, size=6).T.astype(float)
    weights[:, 0] = 1
    weights[-1], weights[0] = 1, 2  # both classes in every draw
    every, pixels = metrics.METRICS, metrics.PIXEL_METRICS
    exact = tables._measure(metrics.IMAGE_METRICS, every, labels == 1, scores, weights, "exact")
    exact |= tables._measure(pixels, every, masks, maps, weights, "exact")
    official = tables._measure(pixels, every, masks, maps, weights, "official")
    assert set(exact) == set(metrics.METRICS)
    for draw, counts in enumerate(weights.T.astype(int)):
        picked = np.repeat(np.arange(9), counts)
        image, pixel = (labels[picked], scores[picked]), (masks[picked].ravel(), maps[picked].ravel())
        wanted = {
            f"{item}_{name}": function(*pair)
            for item, pair in (("image", image), ("pixel", pixel))
            for name, function in (("auroc", roc_auc_score), ("ap", average_precision_score), ("f1max", sklearn_f1_max))
        }
        wanted["aupro"] = plain_aupro(masks[picked], maps[picked])
        for metric, value in wanted.items():
            assert exact[metric][draw] == pytest.approx(value, abs=1e-12), metric
        value = plain_official_aupro(masks[picked], maps[picked])
        assert official["aupro"][draw] == pytest.approx(value, abs=1e-9)


def test_draws_are_stratified_whole_sets():
    labels = np.array([0] * 30 + [1] * 10, bool)
    weights = tables._draws(labels, "a", "a", 400, seed=0)
    assert (weights[:, 0] == 1).all()
    assert (weights[:30].sum(0) == 30).all() and (weights[30:].sum(0) == 10).all()
    assert np.abs(weights[:, 1:].mean(1) - 1).max() < 0.25  # every image is as likely as any other
    assert weights[:, 1:].var() == pytest.approx(1, abs=0.1)  # with replacement: nearly Poisson counts
    assert (tables._draws(labels, "a", "a", 400, seed=1) != weights).any()
    other = tables._draws(labels, "a", "a/dent", 400, seed=0)
    assert (other[:30] == weights[:30]).all() and (other[30:] != weights[30:]).any()


def test_intervals_are_percentiles_of_the_draws_and_ignore_other_categories():
    labels, scores, maps, masks = toy(6, n=12)
    order = np.lexsort((maps.sum((1, 2)), scores))
    counts = tables._draws(labels[order] == 1, "a", "a", 50, seed=3)[:, 1:].T.astype(int)
    draws = [auroc(np.repeat(labels[order], column), np.repeat(scores[order], column)) for column in counts]
    options = {"n_bootstrap": 50, "seed": 3, "confidence": 0.8}
    alone = evaluate(["a"] * 12, labels, scores, maps, masks, **options)
    low, high = np.quantile(draws, [0.1, 0.9])
    assert (alone.low[0], alone.high[0]) == pytest.approx((low, high))
    assert alone.metric[0] == "image_auroc" and low < alone.value[0] < high
    twice = [np.concatenate([values, values]) for values in (labels, scores, maps, masks)]
    both = evaluate(["a"] * 12 + ["b"] * 12, *twice, **options)
    pd.testing.assert_frame_equal(both[both.category == "a"], alone[alone.category == "a"])
    width = both.assign(width=both.high - both.low).pivot(index="category", columns="metric", values="width")
    assert (width.loc["a"] != width.loc["b"]).any()  # categories draw independently,
    assert width.loc["mean"].sum() < 0.9 * width.loc[["a", "b"]].mean().sum()  # so their mean varies less


def test_bootstrap_is_fast():
    labels, scores, maps, masks = toy(7, n=30, size=64)
    start = time.perf_counter()
    evaluate(["a"] * 30, labels, scores, maps, masks, n_bootstrap=200)
    assert time.perf_counter() - start < 3


@pytest.mark.parametrize("variant", ["exact", "official"])
def test_draws_without_a_defect_or_a_normal_pixel_are_left_out(variant):
    labels, scores, maps, masks = toy(8, n=6)
    masks[1:] = False  # of three anomalous images, one has a mask
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frame = evaluate(["a"] * 6, labels, scores, maps, masks, variant=variant)
    assert frame[["value", "low", "high"]].notna().all(axis=None) and (frame.low > 0).all()
    masks[:2] = [[[True]], [[False]]]
    weights = np.array([[1.0, 6], *[[1, 0]] * 5])
    measured = tables._measure(metrics.PIXEL_METRICS, metrics.METRICS, masks, maps, weights, variant)
    for metric, values in measured.items():
        assert np.isfinite(values[0]) and np.isnan(values[1]), metric


# ------------------------------------------------------------------------------------------------ the frame


def test_frame_gives_reasons_and_averages_what_is_defined():
    labels, scores, maps, masks = toy(0, n=12)
    names = np.array(["screw"] * 4 + ["cable"] * 3 + ["nut"] * 5)
    labels[[0, 4, 9]] = 0, 0, 1  # cable and screw get a normal image
    masks[[0, 4]] = False
    labels[7:], masks[7:] = 0, False  # nut has no anomalous image
    frame = evaluate(names, labels, scores, maps, masks, n_bootstrap=10)
    assert tuple(frame.columns) == tables.COLUMNS and len(frame) == 4 * 7
    assert list(frame.category.unique()) == ["cable", "nut", "screw", "mean"]
    found, counts = frame.set_index(["category", "metric"]), ["n_normal", "n_anomalous"]
    assert np.isnan(found.value["nut", "image_ap"])
    assert "no anomalous image among 5" in found.reason["nut", "image_ap"]
    assert "no anomalous pixel" in found.reason["nut", "aupro"]
    assert tuple(found.loc[("nut", "aupro"), counts]) == (5, 0)
    for metric in metrics.METRICS:
        parts = found.value["cable", metric], found.value["screw", metric]
        assert found.value["mean", metric] == pytest.approx(np.mean(parts), abs=1e-12)
        assert found.reason["mean", metric] == "left out: nut" and found.reason["screw", metric] == ""
        assert tuple(found.loc[("mean", metric), counts]) == (2, 5)
    assert frame.attrs == {"variant": "exact", "n_bootstrap": 10, "seed": 0, "confidence": 0.95}


def test_frame_without_maps_or_masks_or_with_broken_scores():
    labels, scores, maps, masks = toy(1)
    bare = cells(["a"] * 9, labels, scores, n_bootstrap=0)
    assert bare.reason["a", "aupro"] == "no anomaly maps" and np.isnan(bare.value["mean", "aupro"])
    assert bare.reason["mean", "aupro"] == "undefined in every category: a"
    assert bare.value["a", "image_auroc"] == auroc(labels, scores) and np.isnan(bare.low["a", "image_auroc"])
    assert cells(["a"] * 9, labels, scores, maps, n_bootstrap=0).reason["a", "pixel_ap"] == "no masks"
    scores[2] = np.nan
    broken = cells(["a"] * 9, labels, scores, maps, masks, n_bootstrap=5)
    assert "1 of 9 image scores are NaN" in broken.reason["a", "image_f1max"]
    assert broken.value["a", "pixel_auroc"] == pytest.approx(auroc(masks, maps))


def test_official_variant_changes_only_auroc_and_aupro():
    labels, scores, maps, masks = toy(2)
    scores += 2 * labels
    data = ["a"] * 9, labels, -scores, -maps, masks
    exact, official = (cells(*data, n_bootstrap=30, variant=v).loc["a"] for v in ("exact", "official"))
    for metric in ("image_auroc", "pixel_auroc"):
        assert exact.value[metric] < 0.5 and official.value[metric] == pytest.approx(1 - exact.value[metric])
        assert official.low[metric] >= 0.5
    assert official.value["aupro"] == pytest.approx(plain_official_aupro(masks, -maps), abs=1e-9)
    same = ["image_ap", "image_f1max", "pixel_ap", "pixel_f1max"]
    pd.testing.assert_frame_equal(exact.loc[same], official.loc[same])
    binary = cells(["a"] * 9, labels, scores, 1.0 * masks, masks, n_bootstrap=5, variant="official")
    assert "divisor, is 0" in binary.reason["a", "aupro"] and binary.value["a", "pixel_auroc"] == 1


def test_defect_types_are_measured_against_all_normal_images_of_their_category():
    labels, scores, maps, masks = toy(3)
    defects = np.array(["dent", "hole", "dent", "hole", "hole", "dent", "good", "good", "good"])
    found = cells(["a"] * 9, labels, scores, maps, masks, n_bootstrap=20, defects=defects)
    assert list(found.index.unique(0)) == ["a/dent", "a/hole", "mean"]
    for kind in ("dent", "hole"):
        rows = (defects == kind) | (defects == "good")
        assert found.value[f"a/{kind}", "image_auroc"] == auroc(labels[rows], scores[rows])
        assert found.value[f"a/{kind}", "aupro"] == pytest.approx(aupro(masks[rows], maps[rows]))
    counts = found.xs("aupro", level=1)[["n_normal", "n_anomalous"]]
    assert counts.to_numpy().tolist() == [[3, 3], [3, 3], [3, 6]]


def test_format_table():
    rows = [("b", "aupro", 0.8721, 0.8409, 0.9), ("b", "image_ap", 1.0, np.nan, np.nan)]
    rows += [("a", "aupro", np.nan, np.nan, np.nan), ("a", "image_ap", 0.5, 0.25, 0.75)]
    rows += [("mean", "aupro", 0.8721, 0.8409, 0.9), ("mean", "image_ap", 0.75, 0.7, 0.8)]
    frame = pd.DataFrame(rows, columns=["category", "metric", "value", "low", "high"])
    table = format_table(frame)
    assert list(table.index) == ["b", "a", "mean"] and list(table.columns) == ["aupro", "image_ap"]
    assert list(table.aupro) == ["87.2 [84.1, 90.0]", "n/a", "87.2 [84.1, 90.0]"]
    assert table.image_ap["b"] == "100.0"
    assert list(format_table(frame, ["image_ap"]).columns) == ["image_ap"]


@pytest.mark.parametrize("variant", ["exact", "official"])
def test_metrics_asked_for_alone_are_the_same(variant):
    labels, scores, maps, masks = toy()
    order = [0, 1, 6, 7, 2, 3, 4, 8, 5]
    data = ["a"] * 5 + ["b"] * 4, labels[order], scores, maps, masks[order]
    whole = evaluate(*data, n_bootstrap=20, variant=variant)
    for chosen in (["pixel_auroc"], ["aupro", "image_ap"], ["pixel_f1max"], list(metrics.METRICS)):
        part = evaluate(*data, n_bootstrap=20, variant=variant, metrics=chosen)
        assert len(part) == 3 * len(chosen)
        merged = part.merge(whole, on=["category", "metric"], suffixes=("", "_whole"))
        for column in ("value", "low"):
            pd.testing.assert_series_equal(merged[column], merged[f"{column}_whole"], check_names=False)
