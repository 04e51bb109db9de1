"""synthad: the same bytes everywhere, exact masks, enough variety, and hard enough for what has no model."""

import ast
import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zsad_lib.data.datasets import load_dataset
from zsad_lib.data.images import read_mask
from zsad_lib.errors import DataError
from zsad_lib.evaluation import metrics, runs, tables
from zsad_lib.methods import make_method
from zsad_lite import synthad
from zsad_lite.synthad import benchmark, canvas

# sha256 of every image and mask of the benchmark, in order: the same on every machine
BENCHMARK_SHA256 = "fdea071127c864d8479386176a781ad13c9467dca54cd589e8c6e0ec468df4c7"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return synthad.export(tmp_path_factory.mktemp("data") / "synthad")


def test_the_whole_benchmark_has_the_recorded_bytes(exported):
    digest = hashlib.sha256()
    for category in synthad.CATEGORIES:
        for split, defect, index, _ in synthad.layout(category):
            digest.update(np.asarray(Image.open(exported / category / split / defect / f"{index:03d}.png")).tobytes())
            if defect != "good":
                mask = exported / category / "ground_truth" / defect / f"{index:03d}_mask.png"
                digest.update(np.asarray(Image.open(mask)).tobytes())
    assert digest.hexdigest() == BENCHMARK_SHA256


def test_the_drawing_code_uses_only_operations_that_ieee_754_fixes():
    banned = {"sin", "cos", "tan", "exp", "log", "power", "hypot", "arctan2", "sum", "mean", "dot", "matmul", "normal",
              "standard_normal", "einsum", "std", "tanh"}  # fmt: skip
    for module in ("canvas", "scene", "textures", "objects", "defects", "benchmark"):
        tree = ast.parse((Path(synthad.__file__).parent / f"{module}.py").read_text())
        used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not used & banned, module
        assert not any(isinstance(node, ast.Pow | ast.MatMult) for node in ast.walk(tree)), module


def test_wave_is_close_to_a_sine_and_rotation_keeps_lengths():
    turns = np.linspace(-2, 2, 1001)
    assert np.abs(canvas.wave(turns) - np.sin(2 * np.pi * turns)).max() < 1.2e-3
    u, v = canvas.rotate(0.3, 0.4, 0.123)
    assert math.isclose(u * u + v * v, 0.25, rel_tol=1e-12)
    assert math.isclose(math.atan2(v, u) - math.atan2(0.4, 0.3), -2 * math.pi * 0.123, abs_tol=2e-3)


def test_two_groups_of_six_with_textures_and_objects():
    assert [len(group) for group in synthad.GROUPS.values()] == [6, 6]
    assert not set(synthad.GROUPS["A"]) & set(synthad.GROUPS["B"])
    for group in synthad.GROUPS.values():
        assert {synthad.CATEGORIES[name].kind for name in group} == {"texture", "object"}
    assert len(synthad.DEFECTS) == 7


@pytest.mark.parametrize("category", synthad.CATEGORIES)
def test_the_mask_is_exactly_where_the_defect_changed_the_picture(category):
    good = synthad.draw(category, "mask")
    assert not good.mask.any()
    for defect in synthad.DEFECTS:
        bad = synthad.draw(category, "mask", defect)
        change = np.abs(bad.image.astype(int) - good.image.astype(int)).max(axis=2)
        assert change[~bad.mask].max() <= 255 * synthad.MASK_THRESHOLD * 1.4 + 1, defect
        assert (change[bad.mask] > 3).mean() > 0.7, defect
        assert 10 <= bad.mask.sum() <= 0.2 * bad.mask.size, defect


@pytest.mark.parametrize("category", synthad.CATEGORIES)
def test_images_vary_and_words_are_true_to_them(category):
    drawings = [synthad.draw(category, f"vary/{k}") for k in range(12)]
    assert len({d.caption for d in drawings}) > 6
    assert len({d.image.tobytes() for d in drawings}) == 12
    for d in drawings:
        assert d.caption.startswith(f"An image of a {category.replace('_', ' ')}")
        assert all(word in d.caption for word in d.words.values())


def test_sizes_share_one_scene():
    small, large = synthad.draw("gauge", "size", "missing", 32), synthad.draw("gauge", "size", "missing", 128)
    assert small.image.shape == (32, 32, 3) and large.mask.shape == (128, 128)
    assert small.words == large.words
    assert synthad.draw("gauge", "size", "missing", 32).image.tobytes() == small.image.tobytes()


def test_export_is_mvtec_layout_with_captions_and_survives_being_called_twice(exported):
    dataset = load_dataset("synthad", exported)
    assert len(dataset) == 12 * (10 + 7 * 3)
    for sample in dataset.select(limit=1).samples:
        if sample.label:
            assert read_mask(sample.mask_path).any()
    lines = [json.loads(line) for line in (exported / "attributes.jsonl").read_text().splitlines()]
    assert len(lines) == 12 * (8 + 10 + 21)
    assert all((exported / line["file"]).exists() and line["caption"] for line in lines)
    before = (exported / "attributes.jsonl").stat().st_mtime_ns
    assert synthad.export(exported) == exported
    assert (exported / "attributes.jsonl").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda folder: synthad.draw("teapot", "0"), "teapot"),
        (lambda folder: synthad.draw("gauge", "0", "bent"), "bent"),
        (synthad.export, "photos"),  # a folder of something else
    ],
)
def test_what_is_refused(tmp_path, call, named):
    (tmp_path / "photos").mkdir()
    with pytest.raises(DataError, match=named):
        call(tmp_path / "photos")
    (tmp_path / "photos").rmdir()
    (tmp_path / "photos").write_text("mine")  # or a file
    with pytest.raises(DataError, match=named):
        call(tmp_path / "photos")
    assert (tmp_path / "photos").read_text() == "mine"


def test_an_interrupted_export_leaves_no_benchmark(tmp_path, monkeypatch):
    real, calls = synthad.draw, []

    def failing(*args):
        calls.append(args)
        if len(calls) > 5:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(benchmark, "draw", failing)
    with pytest.raises(KeyboardInterrupt):
        synthad.export(tmp_path / "synthad")
    assert [path.name for path in tmp_path.iterdir()] in ([], [".synthad.lock"])


@pytest.mark.parametrize("name", ["local_contrast", "median", "patch_knn"])
def test_no_model_baselines_stay_below_080_mean_pixel_auroc(exported, tmp_path, name):
    dataset = load_dataset("synthad", exported)
    results = runs.score(dataset, make_method(name), tmp_path, 32, progress=False)
    table = tables.evaluate_run(results, n_bootstrap=0)
    mean = table[(table.category == "mean") & (table.metric == "pixel_auroc")].value.item()
    assert 0.5 < mean < 0.80
    assert metrics.auroc(results.masks, results.maps) < 0.80
