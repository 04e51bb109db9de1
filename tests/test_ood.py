"""zsad_lib.ood: the matrix holds the readings' own AUROCs, nothing is scored twice, the choice follows the numbers."""

from functools import partial

import numpy as np
import pandas as pd
import pytest
from helpers import save_image

from zsad_lib.data.image_sets import load_image_set
from zsad_lib.data.references import normal_images
from zsad_lib.diffusion.pixel import load_pixel_model
from zsad_lib.errors import DataError
from zsad_lib.evaluation import metrics
from zsad_lib.methods import diffpath, stein_ssim
from zsad_lib.methods.stein_ssim import Reading
from zsad_lib.papers import ood

KDE = Reading("trajectory", "joint", "typicality", "score", "kde")
SUM = Reading()
READINGS = {ood.label(r): r for r in (KDE, SUM, ood.PathReading("1d"))}
SMALL = {"ins": ("synthad-a", "digits"), "outs": ("synthad", "synthad-b", "digits", "noise"), "train": 12, "test": 6}


@pytest.fixture(scope="module")
def collected(saved_pixel, tmp_path_factory):
    model, runs = load_pixel_model(saved_pixel, "cpu"), tmp_path_factory.mktemp("runs")
    train = ood.collect(model, ["synthad-a", "digits"], "train", 12, runs)
    return train, ood.collect(model, ["synthad", "synthad-a", "synthad-b", "digits", "noise"], "test", 6, runs)


def test_features_of_changed_images_are_measured_anew(saved_pixel, tmp_path, monkeypatch):
    monkeypatch.setenv("ZSAD_DATA", str(tmp_path))
    found, model = [], load_pixel_model(saved_pixel, "cpu")
    for value in (0, 0, 200):
        for name in "abcd":
            save_image(tmp_path / "cifar10" / "test" / f"{name}.png", np.full((16, 16, 3), value, np.uint8))
        found.append(ood.collect(model, ["cifar10"], "test", 4, tmp_path / "runs")["cifar10"])
    assert np.array_equal(found[0]["noise_powers"], found[1]["noise_powers"])
    assert not np.allclose(found[0]["noise_powers"], found[2]["noise_powers"])


def test_values_are_the_readings_own(collected):
    """Written again: fit on the training split alone, AUROC of the test splits, the mean over the other sets."""
    train, test = collected
    frame = ood.evaluate_base(train, test, READINGS, SMALL["outs"], n_bootstrap=50)
    for title, reading in READINGS.items():
        density = None if reading is SUM else reading.fit(train["digits"])
        values = []
        for out in ("synthad", "synthad-b", "noise"):
            scores = [reading.scores(test[name], density) for name in ("digits", out)]
            values.append(metrics.auroc([0] * 6 + [1] * 6, np.concatenate(scores).astype(float)))
        rows = frame[(frame.reading == title) & (frame["in"] == "digits")].set_index("out")
        np.testing.assert_allclose(rows.value[["synthad", "synthad-b", "noise", "mean"]], [*values, np.mean(values)])
        assert (rows.low <= rows.value).all() and (rows.value <= rows.high).all() and (rows.evaluations == 10).all()
        assert rows.n_in.tolist() == [6] * 4 and rows.n_out["noise"] == 6
    assert (frame.low < frame.high).any(), "the intervals have no width"


def test_no_set_stands_against_itself_or_its_own_part(collected):
    frame = ood.evaluate_base(*collected, READINGS, SMALL["outs"], n_bootstrap=0)
    pairs = set(zip(frame["in"], frame.out, strict=True))
    assert {out for name, out in pairs if name == "synthad-a"} == {"synthad-b", "digits", "noise", "mean"}
    assert ("digits", "synthad") in pairs and ("digits", "digits") not in pairs


def test_chosen_timesteps_or_first_images_are_all_that_is_left(collected):
    features = collected[1]["noise"]
    part = ood.at_steps(features, [0, 4, 9])
    np.testing.assert_array_equal(part["denoising_ssim"], features["denoising_ssim"][:, [0, 4, 9]])
    np.testing.assert_array_equal(part["trajectory_score"], features["trajectory_score"][:, [0, 4]])
    assert part["noise_powers"].shape == (6, 3, 3) and part["ids"].tolist() == features["ids"].tolist()
    part = ood.first_images(features, 4)
    assert part.keys() == features.keys()
    for key in part:
        np.testing.assert_array_equal(part[key], features[key][:4])


def test_separation_counts_the_pairs_in_order():
    usual, other = np.array([0.0, 1, 2], np.float32), np.array([1.0, 5], np.float32)
    pairs = [(b > a) + (b == a) / 2 for a in usual for b in other]
    assert ood.separation(usual, other) == pytest.approx(np.mean(pairs))
    assert ood.separation(-usual, -other) == pytest.approx(1 - np.mean(pairs))


def test_sets_are_scored_by_the_density_of_the_reference_alone(collected):
    train, test = collected
    some = {name: test[name] for name in ("noise", "digits")}
    for reading in READINGS.values():
        density = None if reading is SUM else reading.fit(train["digits"])
        scores = ood.score_sets(train["digits"], some, reading)
        assert list(scores) == ["noise", "digits"]
        for name in some:
            np.testing.assert_array_equal(scores[name], reading.scores(test[name], density))
    np.testing.assert_array_equal(ood.score_sets(None, some, SUM)["noise"], SUM.scores(test["noise"]))


def test_every_base_is_measured_with_its_own_features(collected):
    train, test = collected
    late = [{name: ood.first_images(f, 4) for name, f in side.items()} for side in collected]
    frame = ood.evaluate_bases({"a": train, "b": late[0]}, {"a": test, "b": late[1]}, READINGS, SMALL["outs"], 0)
    assert list(frame.columns) == ood.COLUMNS and list(frame.base.unique()) == ["a", "b"]
    for base, sides in (("a", collected), ("b", late)):
        alone = ood.evaluate_base(*sides, READINGS, SMALL["outs"], n_bootstrap=0)
        part = frame[frame.base == base].drop(columns="base").reset_index(drop=True)
        pd.testing.assert_frame_equal(part, alone)


def test_parts_of_the_timesteps_are_read_alone(collected):
    train, test = collected
    parts = {"early": [0, 1], "all": list(range(10))}
    table = ood.by_timesteps({"a": train}, {"a": test}, KDE, parts, SMALL["outs"])
    assert list(table.index) == ["a: synthad-a", "a: digits"] and list(table) == ["early", "all"]
    few = [{name: ood.at_steps(f, [0, 1]) for name, f in side.items()} for side in collected]
    for part, sides in (("early", few), ("all", collected)):
        frame = ood.evaluate_base(*sides, {"": KDE}, SMALL["outs"], n_bootstrap=0)
        np.testing.assert_allclose(table[part], 100 * frame[frame.out == "mean"].value)
    assert not np.allclose(table.early, table["all"])


def test_path_reading_is_diffpath(saved_pixel, collected):
    model, images = load_pixel_model(saved_pixel, "cpu"), load_image_set("noise", "test", 6, size=16)
    method = diffpath.DiffPath(backbone=model).fit(normal_images("digits", 12))
    reading, (train, test) = ood.PathReading("1d"), collected
    scores = reading.scores(test["noise"], reading.fit(train["digits"]))
    np.testing.assert_allclose(scores, method.score(images.images, images.ids, images.ids).image, rtol=1e-4)


def test_the_second_version_reads_the_weighted_errors(collected):
    train, test = (side["digits"] for side in collected)
    scores = {}
    for weight in ("", *stein_ssim.WEIGHTS):
        reading = ood.PathReading("6d", (1,), weight)
        scores[ood.label(reading)] = reading.scores(test, reading.fit(train))
    assert list(scores) == [f"DiffPath{v}-6D (small mixtures)" for v in ("", "V2 (1 − SSIM)", "V2 (SSIM)")]
    assert len({tuple(values) for values in scores.values()}) == 3
    other = train | {"dissimilarity_change_powers": 2 * train["dissimilarity_change_powers"]}
    reading = ood.PathReading("6d", (1,), "dissimilarity")
    assert not np.allclose(reading.scores(other, reading.fit(train)), reading.scores(train, reading.fit(train)))


def test_left_out_readings_give_the_scores_of_a_kept_one(collected):
    train, test = collected
    kept, labels = ood.distinct_readings(density="kde"), [ood.label(r) for r in ood.distinct_readings()]
    assert len(set(labels)) == len(labels)
    dropped = [r for r in stein_ssim.readings(density="kde") if r not in kept]
    assert len(dropped) == 4
    for reading in dropped:
        twin = next(r for r in kept if r == Reading(**{**reading.__dict__, "scale": "noise"}))
        one, other = (r.scores(test["noise"], r.fit(train["digits"])) for r in (reading, twin))
        np.testing.assert_allclose(one, other, rtol=1e-4)


def test_readings_go_by_their_label_and_mixtures_need_enough_reference_images():
    assert list(ood.labelled([SUM, KDE]).values()) == [SUM, KDE]
    every, some = ood.all_readings(20), ood.all_readings(20, density="kde")
    assert all(ood.label(reading) == title for title, reading in some.items())
    assert not [title for title in some if title.endswith("gmm")] and "DiffPath-1D" in some
    assert some.keys() < every.keys() > {"DiffPath-1D", "DiffPath-6D (small mixtures)"}
    sixes = {"DiffPath-6D", "DiffPathV2 (1 − SSIM)-6D", "DiffPathV2 (SSIM)-6D"}
    assert sixes <= ood.all_readings(112).keys() and not sixes & ood.all_readings(111).keys()


def test_study_has_the_control_and_goes_on_from_kept_features(saved_pixel, tmp_path, monkeypatch):
    study = partial(ood.study, readings=READINGS, n_bootstrap=0, folder=tmp_path, device="cpu")
    options = {"bases": [str(saved_pixel)], **SMALL}
    monkeypatch.setenv("ZSAD_DATA", str(tmp_path / "nothing"))
    first = study(**options | {"outs": (*SMALL["outs"], "magnetic_tile")})
    assert list(first.base.unique()) == ["tiny", "tiny" + ood.CONTROL] and first.attrs["left_out"] == ["magnetic_tile"]
    by_base = ood.matrix(first, ood.label(KDE), cells=False)["mean"].unstack("in")
    assert not np.allclose(*by_base.to_numpy()), "the control has the weights of the model"
    monkeypatch.setattr(stein_ssim, "extract", lambda *_, **__: pytest.fail("scored again"))
    pd.testing.assert_frame_equal(study(**options), first)
    with pytest.raises(DataError, match="no pair of different sets"):
        study(**options | {"ins": ["digits"], "outs": ["digits", "cifar10"]})


def made_up(values):
    """A frame of `study` with the mean of each (base, in, reading) given in percent."""
    rows = [
        (base, name, out, reading, 10, value / 100, value / 100 - 0.01, 1, 5, 5)
        for (base, name, reading), value in values.items()
        for out in ("digits", "mean")
    ]
    return pd.DataFrame(rows, columns=ood.COLUMNS)


def test_choice_counts_trained_bases_and_the_choosing_sets_alike():
    frame = made_up(
        {
            ("a", "synthad", "good"): 90, ("b", "synthad", "good"): 70, ("a", "photographs", "good"): 10,
            ("a", "synthad", "fair"): 79, ("b", "synthad", "fair"): 79, ("a", "photographs", "fair"): 99,
            ("a", "synthad", "DiffPath-6D"): 99, ("b", "synthad", "DiffPath-6D"): 99,
            ("a", "synthad", "x and SSIM"): 95, ("b", "synthad", "x and SSIM"): 95,
            ("a" + ood.CONTROL, "synthad", "good"): 0, ("a" + ood.CONTROL, "synthad", "fair"): 99,
        }
    )  # fmt: skip
    assert ood.ranking(frame).round(6).to_dict() == {"DiffPath-6D": 99, "x and SSIM": 95, "good": 80, "fair": 79}
    assert ood.best_allowed(frame) == "good"
    table = ood.compare(frame)
    assert list(table.index) == ["DiffPath-6D", "x and SSIM", "good", "fair"]
    assert table.loc["good", "b: synthad"] == "70.0 [69.0, 100.0]" and table.loc["good", "chosen on"] == "80.0"
    assert ood.matrix(frame, "good").loc[("a", "photographs"), "digits"] == "10.0 [9.0, 100.0]"
    with pytest.raises(ValueError, match="no reading 'bad'; there are: good; fair"):
        ood.matrix(frame, "bad")


def test_overview_is_sorted_by_the_trained_bases():
    frame = made_up(
        {
            ("a", "synthad", "low"): 61.4, ("a", "synthad", "high"): 81.4,
            ("b", "synthad", "low"): 72.6, ("b", "synthad", "high"): 70.6,
            ("random", "synthad", "low"): 99, ("random", "synthad", "high"): 10,
        }
    )  # fmt: skip
    table = ood.overview(frame, ["a", "b"])
    assert list(table) == ["a: synthad", "b: synthad", "random: synthad", "trained"]
    assert table.loc["high"].tolist() == [81, 71, 10, 76] and table.loc["low"].tolist() == [61, 73, 99, 67]
    assert list(table.index) == ["high", "low"] and list(ood.overview(frame, ["random"]).index) == ["low", "high"]


def test_by_set_leaves_the_mean_out_and_keeps_the_order():
    frame = made_up(
        {("b", "synthad", "z"): 61.4, ("b", "synthad", "y"): 50, ("a", "synthad", "z"): 7, ("a", "synthad", "y"): 8}
    )
    table = ood.by_set(frame)
    assert list(table) == ["b: digits", "a: digits"] and list(table.index) == ["z", "y"]
    assert table.to_numpy().tolist() == [[61, 7], [50, 8]]
    with pytest.raises(ValueError, match="one in-distribution set, please, not synthad, cifar10"):
        ood.by_set(made_up({("a", "synthad", "z"): 1, ("a", "cifar10", "z"): 2}))
