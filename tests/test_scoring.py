import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import save_image, write_tree

from zsad_lib.data.datasets import load_dataset
from zsad_lib.data.images import load_masks
from zsad_lib.errors import RunError
from zsad_lib.evaluation import metrics, runs, tables
from zsad_lib.evaluation.runs import load_results, run_folder, score
from zsad_lib.evaluation.tables import compare, evaluate_run
from zsad_lib.methods import Scores, make_method

SIZE = 12


class Fake:
    """Red times green as the map, the same bits in any batch; notes its batches, and can get stuck in one."""

    name, size, control = "fake", SIZE, None

    def __init__(self, log=None, stuck_in=None, **config):
        self.log, self.stuck_in, self.config = log, stuck_in, {"seed": 3, **config}

    def score(self, images, ids, categories):
        if self.log:
            with open(self.log, "a") as file:
                file.write(json.dumps(ids) + "\n")
            if len(batches(self.log)) == self.stuck_in:
                time.sleep(600)
        maps = images[:, 0] * images[:, 1]
        return Scores(maps.amax((1, 2)), maps, {"work": maps[:, 0, 0], "picture": images})


def batches(log):
    return [json.loads(line) for line in Path(log).read_text().splitlines()]


@pytest.fixture
def tree(tmp_path):
    return load_dataset("mvtec_ad", write_tree(tmp_path / "tree"))


def same(one, two):
    pd.testing.assert_frame_equal(one.frame, two.frame, check_exact=True)
    return np.array_equal(one.maps, two.maps) and np.array_equal(one.masks, two.masks)


def test_results_hold_every_image_with_its_truth(tree, tmp_path):
    results = score(tree, Fake(), tmp_path / "runs", batch_size=5, progress=False)
    assert list(results.frame["id"]) == [sample.id for sample in tree.samples]
    assert list(results.frame["label"]) == [sample.label for sample in tree.samples]
    assert list(results.frame["category"].unique()) == ["box", "lid"]
    assert results.maps.dtype == np.float32 and results.maps.shape == (24, SIZE, SIZE)
    assert np.array_equal(results.masks, load_masks(tree.samples, SIZE).numpy())
    assert np.array_equal(results.frame["pred_score"], results.maps.max((1, 2)))
    assert np.array_equal(results.frame["work"], results.maps[:, 0, 0]) and "picture" not in results.frame
    csv = pd.read_csv(results.folder / "scores.csv")
    assert np.array_equal(csv["pred_score"].astype(np.float32), results.frame["pred_score"])


def test_run_json_says_what_was_run_and_not_where(tree, tmp_path):
    results = score(tree, Fake(depth=2), tmp_path / "runs", progress=False)
    text = (results.folder / "run.json").read_text()
    run = json.loads(text)
    assert (run["state"], run["method"], run["dataset"]) == ("finished", "fake", "mvtec_ad")
    assert run["config"] == {"seed": 3, "depth": 2} and run["seed"] == 3 and run["size"] == SIZE
    assert run["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert str(tmp_path) not in text
    assert results.run["seconds"] > 0


def test_a_moved_dataset_is_the_same_run_and_a_changed_one_is_not(tree, tmp_path):
    here = run_folder(tree, Fake(), tmp_path)
    moved = load_dataset("mvtec_ad", tree.root.rename(tmp_path / "moved"))
    assert run_folder(moved, Fake(), tmp_path) == here
    assert run_folder(moved, Fake(depth=1), tmp_path) != here
    assert run_folder(moved.select(limit=2), Fake(), tmp_path) != here
    save_image(moved[0].image_path, np.zeros((40, 40, 3), np.uint8))
    assert run_folder(moved, Fake(), tmp_path) != here


def test_a_finished_run_is_not_computed_again(tree, tmp_path):
    log = tmp_path / "log"
    one = score(tree, Fake(log), tmp_path / "runs", progress=False)
    calls = len(batches(log))
    assert same(one, score(tree, Fake(log), tmp_path / "runs", progress=False))
    assert len(batches(log)) == calls


WORKER = """
import sys
sys.path.insert(0, {tests!r})
from test_scoring import Fake, load_dataset, score
score(load_dataset("mvtec_ad", {root!r}), Fake({log!r}, {stuck_in}), {out!r}, batch_size=4, progress=False)
"""


def worker(tree, log, out, stuck_in):
    """A process that scores the tree and never comes out of that batch."""
    here = Path(__file__).parent
    code = WORKER.format(tests=str(here), root=str(tree.root), log=str(log), out=str(out), stuck_in=stuck_in)
    path = os.pathsep.join([str(here.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path})


def wait_for(condition, process):
    end = time.monotonic() + 60
    while not condition():
        assert process.poll() is None and time.monotonic() < end, "the worker did not get that far"
        time.sleep(0.005)


def test_killed_run_repeats_one_batch_at_most_and_ends_with_the_same_numbers(tree, tmp_path):
    log, out = tmp_path / "log", tmp_path / "runs"
    process = worker(tree, log, out, stuck_in=3)
    wait_for(lambda: log.exists() and len(batches(log)) == 3, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = batches(log)
    folder = run_folder(tree, Fake(), out)
    assert len(list(folder.glob("batch-*.npz"))) == 2
    with pytest.raises(RunError, match="not finished: 16 of 24"):
        load_results(folder)

    resumed = score(tree, Fake(log), out, batch_size=4, progress=False)
    again = batches(log)[len(before) :]
    assert [ids for ids in again if ids in before] == [before[-1]]
    assert len(again) == 4
    assert same(resumed, score(tree, Fake(), tmp_path / "other", batch_size=4, progress=False))


def test_second_process_is_told_who_is_at_work(tree, tmp_path):
    log, out = tmp_path / "log", tmp_path / "runs"
    process = worker(tree, log, out, stuck_in=1)
    try:
        wait_for(lambda: log.exists() and batches(log), process)
        with pytest.raises(RunError, match=f"process {process.pid}"):
            score(tree, Fake(), out, progress=False)
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "foreign", "gone"])
def test_damaged_batch_is_scored_again(tree, tmp_path, damage):
    log = tmp_path / "log"
    whole = score(tree, Fake(log), tmp_path / "runs", batch_size=6, progress=False)
    path = sorted(whole.folder.glob("batch-*.npz"))[1]
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "foreign":
        with np.load(path) as data:
            np.savez(path, **{**data, "ids": np.array(["other/test/good/000"] * 6)})
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]
        path.write_bytes({"truncated": content[:middle], "flipped": flipped, "empty": b""}[damage])
    with pytest.raises(RunError, match="not finished" if damage == "gone" else "damaged"):
        load_results(whole.folder)
    calls = batches(log)
    assert same(whole, score(tree, Fake(log), tmp_path / "runs", batch_size=6, progress=False))
    assert batches(log)[len(calls) :] == [calls[1]]


def test_another_batch_size_keeps_what_is_done(tree, tmp_path):
    log = tmp_path / "log"

    class Dies(Fake):
        def score(self, images, ids, categories):
            if Path(log).exists() and len(batches(log)) == 2:
                raise KeyboardInterrupt
            return super().score(images, ids, categories)

    with pytest.raises(KeyboardInterrupt):
        score(tree, Dies(log), tmp_path / "runs", batch_size=5, progress=False)
    folder = run_folder(tree, Fake(), tmp_path / "runs")
    assert json.loads((folder / "run.json").read_text())["state"] == "interrupted"
    resumed = score(tree, Fake(log), tmp_path / "runs", batch_size=7, progress=False)
    seen = [name for ids in batches(log) for name in ids]
    assert sorted(seen) == sorted(sample.id for sample in tree.samples), "an image was scored twice or never"
    assert same(resumed, score(tree, Fake(), tmp_path / "other", batch_size=24, progress=False))


def test_left_over_half_written_file_is_removed(tree, tmp_path):
    folder = run_folder(tree, Fake(), tmp_path)
    folder.mkdir()
    (folder / ".writing-batch-000000.npz").write_bytes(b"half")
    score(tree, Fake(), tmp_path, progress=False)
    assert not list(folder.glob(".writing-*"))


def test_folder_of_another_run_is_never_reused(tree, tmp_path):
    folder = score(tree, Fake(), tmp_path, progress=False).folder
    folder.rename(run_folder(tree, Fake(depth=1), tmp_path))
    with pytest.raises(RunError, match="another run"):
        score(tree, Fake(depth=1), tmp_path, progress=False)


class Broken(Fake):
    name = "broken"

    def __init__(self, change):
        super().__init__()
        self.change = change

    def score(self, images, ids, categories):
        scores = super().score(images, ids, categories)
        return Scores(*self.change(scores.image, scores.map))


def with_nan(image, maps):
    maps = maps.clone()
    maps[1, 0, 0] = float("nan")
    return image, maps


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda image, maps: (image[:-1], maps),
            r"pred_score of shape \[3\] for a batch of 4.*box/test/good/000",
        ),
        (lambda image, maps: (image[:, None], maps), r"pred_score of shape \[4, 1\]"),
        (lambda image, maps: (image, maps[:, None]), r"map of shape \[4, 1, 12, 12\]"),
        (lambda image, maps: (image, maps[:, :5]), r"map of shape \[4, 5, 12\]"),
        (with_nan, r"NaN or infinity in map for box/test/good/001$"),
        (lambda image, maps: (image / 0, maps), r"NaN or infinity in pred_score for box.* and 1 more|box"),
    ],
)
def test_broken_methods_are_named_with_their_images(tree, tmp_path, change, message):
    with pytest.raises(RunError, match=message) as error:
        score(tree, Broken(change), tmp_path, batch_size=4, progress=False)
    assert "broken" in str(error.value)
    assert not list(tmp_path.glob("*/batch-*")), "a bad batch was kept"


def test_nothing_to_score_and_bad_batch_size(tree, tmp_path):
    with pytest.raises(RunError, match="no image"):
        score(runs.AnomalyDataset("none", tmp_path, ()), Fake(), tmp_path)
    with pytest.raises(RunError, match="batch_size"):
        score(tree, Fake(), tmp_path, batch_size=0)
    with pytest.raises(RunError, match="not a run folder"):
        load_results(tmp_path)


def test_a_method_without_maps_has_image_metrics_only(tree, tmp_path):
    results = score(tree, Broken(lambda image, maps: (image, None)), tmp_path, progress=False)
    assert results.maps is None and results.masks is None
    frame = evaluate_run(results, n_bootstrap=0).set_index(["category", "metric"])
    assert frame.loc[("mean", "image_auroc"), "value"] == 1
    assert frame.loc[("mean", "pixel_auroc"), "reason"] != ""


def test_evaluate_equals_metrics_on_the_arrays(tree, tmp_path):
    results = score(tree, Fake(), tmp_path, progress=False)
    frame = evaluate_run(results, n_bootstrap=20, seed=1)
    labels = [sample.label for sample in tree.samples]
    masks = load_masks(tree.samples, SIZE).numpy()
    categories = [sample.category for sample in tree.samples]
    scores = results.frame["pred_score"].to_numpy()
    expected = tables.evaluate(categories, labels, scores, results.maps, masks, n_bootstrap=20, seed=1)
    pd.testing.assert_frame_equal(frame, expected)
    kinds = evaluate_run(results, per_defect=True, n_bootstrap=0)["category"].unique()
    assert list(kinds) == ["box/spot", "lid/spot", "mean"]


def test_images_without_labels_get_scores_but_no_metrics(tree, tmp_path):
    plain = load_dataset("folder", tree.root / "box" / "test")
    results = score(plain, Fake(), tmp_path, progress=False)
    assert len(pd.read_csv(results.folder / "scores.csv")) == 12
    assert results.maps is not None and results.masks is None
    with pytest.raises(RunError, match="no labels"):
        evaluate_run(results)


def test_compare_puts_methods_side_by_side(tree, tmp_path):
    class Blind(Fake):
        name = "blind"

        def score(self, images, ids, categories):
            return Scores(torch.zeros(len(ids)), torch.zeros(len(ids), SIZE, SIZE))

    runs = {"fake": score(tree, Fake(), tmp_path, progress=False)}
    runs["blind"] = score(tree, Blind(), tmp_path, progress=False)
    table = compare(runs, n_bootstrap=30)
    assert list(table.index) == ["fake", "blind"] and list(table.columns) == list(metrics.METRICS)
    assert table.loc["fake", "image_auroc"] == "100.0 [100.0, 100.0]"
    assert table.loc["blind", "image_auroc"] == "50.0 [50.0, 50.0]"
    assert table.attrs["notes"] == []
    wide = compare(runs, ["image_ap", "aupro"], per_category=True, n_bootstrap=0)
    assert list(wide.columns) == ["image_ap", "aupro"]
    assert list(wide.loc["blind"].index) == ["box", "lid", "mean"]


def test_compare_explains_what_is_undefined_and_refuses_different_images(tree, tmp_path):
    runs = {"maps": score(tree, Fake(), tmp_path, progress=False)}
    runs["none"] = score(tree, Broken(lambda image, maps: (image, None)), tmp_path, progress=False)
    table = compare(runs, n_bootstrap=0)
    assert table.loc["none", "aupro"] == "n/a" and table.loc["maps", "aupro"] != "n/a"
    assert len(table.attrs["notes"]) == 1 and "none" in table.attrs["notes"][0]
    runs["part"] = score(tree.select(limit=2), Fake(), tmp_path, progress=False)
    with pytest.raises(RunError, match="different images"):
        compare(runs, n_bootstrap=0)


def test_numbers_of_real_methods_do_not_depend_on_the_batch(tree, tmp_path):
    for name in ("local_contrast", "median", "patch_knn"):
        method = make_method(name, size=16)
        one = score(tree, method, tmp_path / "one", batch_size=1, progress=False)
        many = score(tree, method, tmp_path / "many", batch_size=24, progress=False)
        np.testing.assert_allclose(one.maps, many.maps, rtol=1e-5, atol=1e-6)
        assert evaluate_run(one, n_bootstrap=0).query("metric == 'image_auroc'")["value"].notna().all()
