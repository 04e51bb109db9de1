"""zsad_lib.dzad_tables: the paper's rows and columns, its printed figures, the pass that is kept."""

from dataclasses import replace
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import write_tree
from PIL import Image
from tiny import SMALL, guided_model, made_up

from conftest import shared_path
from zsad_lib import profiles
from zsad_lib.anomaly import weighting
from zsad_lib.anomaly.features import load_features
from zsad_lib.data.datasets import load_dataset
from zsad_lib.diffusion import guidance
from zsad_lib.errors import DataError, MethodError, RunError
from zsad_lib.methods import make_method
from zsad_lib.methods.dzad import join
from zsad_lib.notebook import plots
from zsad_lib.papers import dzad_cross, dzad_tables
from zsad_lib.papers.dzad_cross import Direction, measure_kept, measure_samples
from zsad_lib.papers.dzad_tables import ABLATION, FULL, UNGUIDED, component_label, component_reading
from zsad_lib.profiles import CROSS, crosses, smoothing

PLAIN = {"sigma": 0, "pool": 1}  # maps of 8 pixels cannot be blurred and pooled as those of a profile
SHARED = {
    1: "dzad_table1_mvtec_image_auroc", 2: "dzad_table2_auroc", 3: "dzad_table3_architecture_ablation",
    4: "dzad_table4_weight_function_ablation",
}  # fmt: skip


def direction(target="synthad-B", auxiliary="synthad-A", shift=2.0):
    """Two categories of made-up measurements in which an anomalous image differs at one place and the last stage."""
    parts = [made_up(seed=seed, shift=shift) for seed in (1, 2)]
    measured = join(parts)
    samples = [
        SimpleNamespace(id=name, category=category, label=int(label))
        for category, part in zip(("gauge", "leather"), parts, strict=True)
        for name, label in zip(part.errors.ids, part.labels, strict=True)
    ]
    masks = np.zeros((12, 8, 8), bool)
    masks[measured.labels == 1, 2:4, 4:6] = True
    flat = np.zeros(12)
    frame = pd.DataFrame({"category": [s.category for s in samples], "label": measured.labels, "pred_score": flat})
    results = SimpleNamespace(frame=frame, maps=np.zeros((12, 8, 8), np.float32), masks=masks)
    both = {"SGSD": measured, "SD": measured}
    reference = dict.fromkeys(both, made_up(seed=9, shift=shift))
    return Direction(target, auxiliary, samples, masks, both, reference, {"patch_knn": results})


@pytest.fixture(scope="module")
def directions():
    return {name: direction(name, other) for name, (other, _) in list(CROSS["lite"].items())[:2]}


# --- what is printed


@pytest.mark.parametrize("table", SHARED)
def test_printed_figures_are_the_shared_ones(table):
    pd.testing.assert_frame_equal(
        dzad_tables.printed(table), pd.read_csv(shared_path(f"published/{SHARED[table]}.csv"))
    )


def test_printed_means_are_those_of_their_categories():
    """A figure that was typed wrongly would show in its column's mean."""
    known = dzad_tables.printed(1).set_index("category")
    assert len(known) == 16
    np.testing.assert_allclose(known.drop(index="mean").mean(), known.loc["mean"], atol=0.02)


def test_rows_of_table_3_are_the_printed_ones():
    printed = dzad_tables.printed(3)
    assert [tuple(row) for row in printed.iloc[:, :5].to_numpy()] == list(ABLATION)
    labels = ["SD", "SGSD", "SGSD + M_t", "SGSD + F_b", "SGSD + M_t + w_t", "SGSD + M_t + F_b + w_t"]
    assert [component_label(row) for row in ABLATION] == labels
    assert component_label(UNGUIDED) == "SD + M_t + F_b + w_t"


def test_rows_of_table_4_are_the_printed_ones():
    printed = dzad_tables.printed(4).weight_function
    ours = [formula.replace("·", "*").replace(" ", "") for formula in weighting.FORMULAS.values()]
    assert ours[:-1] == [name.replace(" ", "") for name in printed] and ours[-1].startswith("learned")


# --- rows


@pytest.mark.parametrize("row", [*ABLATION, UNGUIDED])
def test_a_row_has_the_components_it_names(row):
    model, reading = component_reading(row, "weighted sum", sigma=2.0)
    _, guided, many, branches, weighted = row
    assert model == ("SGSD" if guided else "SD") and reading.multi_timestep == bool(many)
    assert reading.map == ("two-branch" if branches else "noise errors")
    assert reading.weighting == ("late-3" if weighted else "one")
    assert reading.decision == "weighted sum" and reading.sigma == 2.0


def test_rows_have_the_blur_of_their_profile():
    rows = dzad_tables.ablation_rows(smoothing("lite"), extra=True)
    assert len(rows) == 7 and {reading.sigma for _, reading in rows.values()} == {1.5}
    assert list(dzad_tables.weighting_rows(smoothing("paper"))) == list(weighting.FORMULAS)
    assert dzad_tables.full_rows(smoothing("lite"))["DZAD"] == rows[component_label(FULL)]


# --- numbers and tables


def test_perfect_separation_is_100_percent(directions):
    frame = dzad_tables.evaluate_rows(directions, dzad_tables.full_rows(PLAIN), n_bootstrap=20)
    assert set(frame.category) == {"gauge", "leather", "mean"} and list(frame.columns)[:3] == [
        "target",
        "row",
        "category",
    ]
    assert (frame[frame.metric == "image_auroc"].value == 1).all()
    assert (frame[frame.metric == "pixel_auroc"].value > 0.99).all()
    table = dzad_tables.table2(frame, "lite")
    assert table.loc["synthad-B: image AUROC", "DZAD (measured, lite)"] == "100.0 [100.0, 100.0]"


def test_rows_use_their_own_model_and_its_reference(directions):
    """Without the guide nothing separates here, so the rows without it are at chance."""
    one = directions["synthad-B"]
    errors = one.measured["SD"].errors
    same = replace(errors, errors=np.ones_like(errors.errors), maps=np.ones_like(errors.maps))
    blind = replace(one.measured["SD"], errors=same)
    mixed = replace(one, measured={"SGSD": one.measured["SGSD"], "SD": blind})
    rows = dzad_tables.ablation_rows(PLAIN, extra=True)
    frame = dzad_tables.evaluate_rows({"synthad-B": mixed}, rows, n_bootstrap=0)
    values = frame[(frame.category == "mean") & (frame.metric == "image_auroc")].set_index("row").value
    assert values["SD"] == values[component_label(UNGUIDED)] == 0.5
    assert values[component_label(FULL)] == values["SGSD + M_t"] == 1


def test_tables_have_the_papers_rows_and_both_kinds_of_columns(directions):
    full = dzad_tables.evaluate_rows(directions, dzad_tables.full_rows(PLAIN), n_bootstrap=5)
    full = pd.concat([full, dzad_tables.evaluate_baselines(directions, n_bootstrap=5)])
    one, two = dzad_tables.table1(full, "lite"), dzad_tables.table2(full, "lite")
    measured = ["DZAD (measured, lite)", "patch_knn (measured, lite)"]
    assert list(one) == measured + [f"{name} (printed)" for name in dzad_tables.printed(1).columns[1:]]
    assert list(two) == measured + [f"{name} (printed)" for name in dzad_tables.printed(2).columns[2:]]
    assert [row for row in one.index if row.startswith("MVTec")] == [
        f"MVTec AD: {name}" for name in dzad_tables.printed(1).category
    ]
    assert one.loc["MVTec AD: cable", "DZAD (printed)"] == "54.2"
    assert (one.loc["MVTec AD: cable", measured] == "not run").all()
    assert (one.loc["synthad-A: gauge"].drop(measured) == "not printed").all()
    assert one.loc["synthad-A: gauge", "patch_knn (measured, lite)"].startswith("50.0 [")
    assert two.loc["VisA: pixel AUROC", "SAM (printed)"] == "92.6" and len(two) == 4 + 6


def test_a_set_that_the_paper_prints_shares_its_row(directions):
    frame = dzad_tables.evaluate_rows({"visa": directions["synthad-B"]}, dzad_tables.full_rows(PLAIN), n_bootstrap=0)
    table = dzad_tables.table2(frame, "paper")
    assert table.loc["VisA: image AUROC"].tolist()[0] == "100.0"
    assert table.loc["VisA: image AUROC", "DZAD (printed)"] == "90.2" and len(table) == 6


def test_table_3_and_4_and_the_decisions(directions):
    frames = {
        d: dzad_tables.evaluate_rows(directions, dzad_tables.ablation_rows(PLAIN, d, extra=True), n_bootstrap=0)
        for d in dzad_tables.DECISIONS
    }
    three = dzad_tables.table3(frames["class features"], "lite")
    assert list(three.index) == [component_label(row) for row in (*ABLATION, UNGUIDED)]
    assert list(three)[:5] == list(dzad_tables.COMPONENTS) and three.loc["SD"].tolist()[:5] == ["✓", "", "", "", ""]
    assert three["MVTec AD: image AUROC (printed)"].tolist() == [
        *(f"{100 * v:.1f}" for v in dzad_tables.printed(3).image_auroc), "not printed"
    ]  # fmt: skip
    assert three.loc[component_label(FULL), "synthad-A: image AUROC (measured, lite)"] == "100.0"
    four = dzad_tables.table4(dzad_tables.evaluate_rows(directions, dzad_tables.weighting_rows(PLAIN), 0), "lite")
    assert list(four.index) == list(weighting.FORMULAS.values())
    assert four["VisA: image AUROC (printed)"].tolist()[-2:] == ["90.2", "not printed"]
    decisions = dzad_tables.decisions_table(frames, "lite")
    assert list(decisions)[:3] == [f"synthad-B: {d}" for d in dzad_tables.DECISIONS] and decisions.shape == (7, 6)


def crossing(name, other="synthad-A"):
    return dzad_cross.Cross(name, other, dict, list)


def test_a_missing_set_is_left_out_and_said(monkeypatch, directions):
    def measure_direction(cross, **_):
        if cross.target == "magnetic_tile":
            raise DataError("no folder at data/magnetic_tile")
        return directions[cross.target]

    monkeypatch.setattr(dzad_cross, "measure_direction", measure_direction)
    found, left_out = dzad_cross.measure_directions(crosses("lite"))
    assert list(found) == ["synthad-B", "synthad-A"] and set(left_out) == {"magnetic_tile"}
    with pytest.raises(DataError, match="no target at hand: no folder at"):
        dzad_tables.study([crossing("magnetic_tile")], PLAIN, "lite")
    with pytest.raises(MethodError, match="mvtec_ad in profile lite; there are: synthad-B, "):
        crosses("lite", ["mvtec_ad"])


def test_study_has_every_table(monkeypatch, directions):
    monkeypatch.setattr(dzad_cross, "measure_direction", lambda cross, **_: directions[cross.target])
    tables, frame, left_out = dzad_tables.study(map(crossing, directions), PLAIN, "lite", n_bootstrap=0)
    assert list(tables) == ["table1", "table2", "table3", "table4", "decisions"] and left_out == {}
    assert set(frame.table) == {"method", "table 4", *(f"table 3, {d}" for d in dzad_tables.DECISIONS)}


# --- the pass, kept


@pytest.fixture
def images(tmp_path):
    write_tree(tmp_path / "tree", per_class=4)
    return list(load_dataset("mvtec_ad", tmp_path / "tree").samples)


def small_method(**options):
    return make_method("dzad", guided_model()[0], load_features("pixels"), **{**SMALL, "map_size": 32, **options})


def test_what_is_kept_is_read_again_image_by_image(images, tmp_path, monkeypatch):
    """Any selection in any order takes what is there; errors alone serve a pass with a reconstruction, too."""
    monkeypatch.setattr(dzad_cross, "PART", 5)
    method, runs = small_method(), tmp_path / "runs"

    def cost(samples, reconstruct):
        before = method.latent_model.evaluations
        return measure_kept(method, samples, runs, reconstruct), method.latent_model.evaluations - before

    errors, spent = cost(images[3:9], reconstruct=False)
    assert spent == 6 * 10 and errors.similarity is None and errors.layers == 0
    first, spent = cost(images, reconstruct=True)
    assert spent == 10 * 10 + 16 * 4, "the errors of the other ten, and all reconstructions"
    whole = measure_samples(method, images)
    np.testing.assert_allclose(first.errors.errors, whole.errors.errors, rtol=1e-4)
    np.testing.assert_allclose(first.similarity, whole.similarity, atol=1e-4)
    again, spent = cost(images[::-1], reconstruct=True)
    assert spent == 0 and again.layers == 1 and again.labels.tolist() == [sample.label for sample in images[::-1]]
    np.testing.assert_array_equal(again.errors.maps, first.errors.maps[::-1])
    np.testing.assert_array_equal(again.similarity, first.similarity[::-1])
    assert again.errors.timesteps.shape == (5, 2) and again.errors.ids.tolist() == [s.id for s in images[::-1]]
    sorted(runs.glob("errors-*/*.npz"))[0].unlink()
    assert 0 < cost(images, reconstruct=True)[1] <= 5 * 10, "only the part that was missing"
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(images[0].image_path)
    assert cost(images[:1], reconstruct=False)[1] == 10, "another picture under the same name"


def test_readings_share_what_is_kept_and_schedules_do_not(images, tmp_path):
    runs, method = tmp_path / "runs", small_method()
    for variant in (method, small_method(weighting="one", sigma=2.0, t_start=300)):
        measure_kept(variant, images[:2], runs, False)
    assert len(list(runs.rglob("*.npz"))) == 1
    longer = dzad_cross.at_timesteps(method, 1400, "continued")
    assert len(longer.latent_model.alphas_cumprod) == 1400 and len(method.latent_model.alphas_cumprod) == 1000
    assert longer.backbone.guide is method.backbone.guide and longer.size == method.size
    measure_kept(longer, images[:2], runs, False)
    assert len(list(runs.rglob("*.npz"))) == 2
    for path in runs.rglob("*.npz"):
        path.write_bytes(b"PK")
    with pytest.raises(RunError, match="damaged"):
        measure_kept(method, images[:2], runs, False)


def test_more_timesteps_make_more_noise(images, tmp_path, monkeypatch):
    monkeypatch.setattr(dzad_cross, "labelled_samples", lambda name, limit: images)
    options = {"folder": tmp_path / "runs", "n_bootstrap": 5}
    frame = dzad_cross.by_timesteps("tree", small_method(), {"sigma": 0, "pool": 2}, (500, 1000), **options)
    assert frame.groupby("T").size().tolist() == [4, 4] and frame.value.between(0, 1).all()
    table = dzad_tables.timesteps_table(frame)
    assert list(table.index) == [500, 1000]
    assert set(table) == {f"{m}, {s}" for m in dzad_cross.METRICS.values() for s in ("rebuilt", "continued")}
    curves = dzad_tables.timestep_curves(frame)
    assert curves["image AUROC, percent"]["rebuilt"][0].tolist() == [500, 1000]
    assert curves["image AUROC, percent"]["rebuilt"][1][0] == 100 * frame.value[0]
    figure = plots.interval_curves(curves, "T")
    assert [axis.get_title() for axis in figure.axes] == ["image AUROC, percent", "pixel AUROC, percent"]
    plt.close(figure)
    np.testing.assert_allclose(*frame[frame["T"] == 1000].value.to_numpy().reshape(2, 2), atol=1e-6)


def test_both_models_come_from_the_cross_protocol(monkeypatch):
    model, _ = guided_model()
    monkeypatch.setattr(profiles, "load_guided", lambda name, device: replace(model, facts={"base": name}))
    monkeypatch.setattr(profiles, "load_backbone", lambda name, device: replace(model.backbone, name=f"base {name}"))
    monkeypatch.setattr(profiles, "load_features", lambda name, device: load_features("pixels"))
    one, *_ = crosses("lite", ["synthad-B"], per_stage=1, map_size=32)
    models = one.models()
    assert isinstance(models["SGSD"].backbone, guidance.GuidedModel) and one.auxiliary == "synthad-A"
    assert models["SD"].backbone.name == "base lite-dzad-a" and models["SD"].per_stage == 1
    assert [name for name, _ in one.baselines()] == ["local_contrast", "median", "patch_knn"]
    monkeypatch.setattr(profiles, "load_guided", lambda name, device: replace(model, facts={}))
    with pytest.raises(MethodError, match="lite-dzad-b names no base"):
        crosses("lite", ["synthad-A"])[0].models()


def test_judged_are_the_images_nearer_to_the_anomalous(directions):
    shares = dzad_tables.judged_anomalous(directions, component_reading(FULL))
    assert shares.loc["synthad-B"].tolist() == [0, 100] and list(shares.index) == ["synthad-B", "synthad-A"]
    one = directions["synthad-B"]
    errors = one.measured["SGSD"].errors
    damaged = replace(errors, errors=errors.errors[[3, 4, 5] * 4], maps=errors.maps[[3, 4, 5] * 4])
    worse = replace(one, measured={"SGSD": replace(one.measured["SGSD"], errors=damaged)})
    assert dzad_tables.judged_anomalous({"x": worse}, component_reading(FULL)).loc["x"].tolist() == [100, 100]
    with pytest.raises(MethodError, match="'weighted sum' orders images and judges none"):
        dzad_tables.judged_anomalous(directions, component_reading(FULL, "weighted sum"))


def test_error_levels_tell_the_sides_apart(directions):
    levels = dzad_tables.error_levels(directions).loc["synthad-B"]
    one = directions["synthad-B"]
    assert list(levels.index) == ["auxiliary, normal", "auxiliary, anomalous", "tested, normal", "tested, anomalous"]
    assert levels["tested, normal"] == pytest.approx(one.measured["SGSD"].errors.matrix[[0, 1, 2, 6, 7, 8]].mean())
    assert levels["auxiliary, anomalous"] == pytest.approx(one.reference["SGSD"].errors.matrix[3:].mean())


def test_errors_are_sorted_by_category_and_truth(directions):
    one = directions["synthad-B"]
    errors = dzad_tables.stage_errors(one)
    assert list(errors) == ["gauge", "leather"] and errors["gauge"]["normal"].shape == (3, 5)
    whole = one.measured["SGSD"].errors.matrix.mean(2)
    np.testing.assert_array_equal(errors["leather"]["anomalous"], whole[9:])


# --- pictures


def test_examples_are_the_best_the_median_and_the_worst():
    values = np.array([0.9, np.nan, 0.1, 0.5, 0.7])
    assert dzad_tables.best_median_worst(values) == {"best": 0, "median": 3, "worst": 2}
    with pytest.raises(ValueError, match="no value to rank"):
        dzad_tables.best_median_worst(np.array([np.nan]))
    masks = np.zeros((2, 2, 2), bool)
    masks[0, 0, 0] = True
    aurocs = dzad_cross.map_aurocs(np.array([[[3.0, 0], [0, 0]], [[1.0, 0], [0, 0]]]), masks)
    assert aurocs[0] == 1 and np.isnan(aurocs[1])


def test_pictures_of_examples_start_at_zero(directions):
    one = directions["synthad-B"]
    rows = {"full": component_reading(FULL, sigma=0)}
    chosen = dzad_tables.examples(one, rows["full"])
    assert list(chosen) == ["best", "median", "worst"]
    assert all(one.samples[index].label == 1 for index, _ in chosen.values())
    indices = [index for index, _ in chosen.values()]
    maps = dzad_tables.example_maps(one, rows, indices)
    assert list(maps) == ["full", "patch_knn"] and maps["full"].shape == (3, 8, 8)
    assert torch.from_numpy(maps["full"]).amin((1, 2)).tolist() == [0, 0, 0]
