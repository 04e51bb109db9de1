import contextlib
import errno
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import forked, save_image, write_tree
from PIL import Image

from zsad_lib import store
from zsad_lib.data.datasets import load_dataset
from zsad_lib.data.images import load_masks
from zsad_lib.errors import RunError
from zsad_lib.evaluation import labels, metrics, runs, tables
from zsad_lib.evaluation.runs import load_results, run_folder, score
from zsad_lib.evaluation.tables import compare, evaluate_run
from zsad_lib.methods import Scores, make_method
from zsad_lib.notebook.plots import save_heatmaps

SIZE = 12
QUIET = {"progress": False}


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


@pytest.fixture
def log(tmp_path):
    return tmp_path / "log"


@pytest.fixture
def run(tree, tmp_path):
    """Score the tree by a method, with other options of `score` if any, into tmp_path/runs."""
    return lambda method, data=tree, out="runs", **options: score(data, method, tmp_path / out, **QUIET | options)


def same(one, two):
    pd.testing.assert_frame_equal(one.frame, two.frame, check_exact=True)
    return np.array_equal(one.maps, two.maps) and np.array_equal(one.masks, two.masks)


def test_results_hold_every_image_with_its_truth(tree, run):
    results = run(Fake(), batch_size=5)
    assert list(results.frame["id"]) == [sample.id for sample in tree.samples]
    assert list(results.frame["label"]) == [sample.label for sample in tree.samples]
    assert list(results.frame["category"].unique()) == ["box", "lid"]
    assert results.maps.dtype == np.float32 and results.maps.shape == (24, SIZE, SIZE)
    assert np.array_equal(results.masks, load_masks(tree.samples, SIZE).numpy())
    assert np.array_equal(results.frame["pred_score"], results.maps.max((1, 2)))
    assert np.array_equal(results.frame["work"], results.maps[:, 0, 0]) and "picture" not in results.frame
    csv = pd.read_csv(results.folder / "scores.csv")
    assert np.array_equal(csv["pred_score"].astype(np.float32), results.frame["pred_score"])


def test_run_json_says_what_was_run_and_not_where(run, tmp_path):
    results = run(Fake(depth=2))
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


def overwrite(path):
    """Another content of the same length, with the old time of change."""
    before = path.stat()
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def first_changed(data, **fields):
    return replace(data, samples=(replace(data[0], **fields), *data.samples[1:]))


CHANGES = {  # of the files, of the data set, of the method, of the library
    "image": lambda data, method, patch: overwrite(data[0].image_path),
    "mask": lambda data, method, patch: overwrite(data[-1].mask_path),
    "label": lambda data, method, patch: first_changed(data, label=1),
    "defect": lambda data, method, patch: first_changed(data, defect="dent"),
    "order": lambda data, method, patch: replace(data, samples=data.samples[::-1]),
    "option": lambda data, method, patch: patch.setattr(method, "config", {"seed": 4}),
    "size": lambda data, method, patch: patch.setattr(method, "size", SIZE + 1),
    "layout": lambda data, method, patch: patch.setattr(runs, "FORMAT", runs.FORMAT + 1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_input_is_in_the_fingerprint(tree, tmp_path, monkeypatch, change):
    method = Fake()
    before = run_folder(tree, method, tmp_path)
    changed = CHANGES[change](tree, method, monkeypatch) or tree
    assert run_folder(changed, method, tmp_path) != before


def test_a_finished_run_is_not_computed_again(run, log):
    one = run(Fake(log))
    calls = len(batches(log))
    assert same(one, run(Fake(log))) and len(batches(log)) == calls


def wait_for(process, log, count):
    """Until the process has begun so many batches."""
    end = time.monotonic() + 60
    while not log.exists() or len(batches(log)) < count:
        assert process.is_alive() and time.monotonic() < end, "the worker did not get that far"
        time.sleep(0.005)


@contextlib.contextmanager
def stuck_worker(tree, log, out, stuck_in):
    """A process that scores the tree and never comes out of that batch, which it has begun; killed at the end."""
    options = {"batch_size": 4, "progress": False}
    process = forked(score, tree, Fake(log, stuck_in), out, **options)
    try:
        wait_for(process, log, stuck_in)
        yield process
    finally:
        process.kill()
        process.join()


def test_killed_run_repeats_one_batch_at_most_and_ends_with_the_same_numbers(tree, run, log, tmp_path):
    with stuck_worker(tree, log, tmp_path / "runs", stuck_in=3):
        pass
    before, folder = batches(log), run_folder(tree, Fake(), tmp_path / "runs")
    assert len(list(folder.glob("batch-*.npz"))) == 2
    with pytest.raises(RunError, match="not finished: 16 of 24"):
        load_results(folder)

    resumed = run(Fake(log), batch_size=4)
    again = batches(log)[len(before) :]
    assert [ids for ids in again if ids in before] == [before[-1]]
    assert len(again) == 4
    assert same(resumed, run(Fake(), out="other", batch_size=4))


def test_a_full_disk_does_not_hide_what_went_wrong_first(tree, run, monkeypatch):
    def full(path, content):
        raise OSError(errno.ENOSPC, "no space left on device")

    class Fails(Fake):
        def score(self, images, ids, categories):
            monkeypatch.setattr(store, "write_json", full)
            raise RuntimeError("the first")

    with pytest.raises(RuntimeError, match="the first"):
        run(Fails())


class Stops(Fake):
    """Ends at its second batch, after `meanwhile`."""

    def __init__(self, log, meanwhile=lambda: None):
        super().__init__(log)
        self.meanwhile = meanwhile

    def score(self, images, ids, categories):
        if self.log.exists():
            self.meanwhile()
            raise KeyboardInterrupt
        return super().score(images, ids, categories)


def test_an_interrupted_run_starts_anew_and_says_so_when_an_image_has_changed(tree, run, log, capsys):
    with pytest.raises(KeyboardInterrupt):
        run(Stops(log), batch_size=4)
    old = run_folder(tree, Fake(), log.parent / "runs")
    brighter = np.asarray(Image.open(tree[0].image_path)) + 9
    save_image(tree[0].image_path, brighter)
    results = run(Fake(), batch_size=4)
    said = capsys.readouterr().err
    assert results.folder != old and f"{old} is not finished, but of other content" in said and said.count("\n") == 1
    assert same(results, run(Fake(), out="other", batch_size=4))
    run(Fake(depth=1), batch_size=4)
    assert f"{old} is not finished, but of other settings" in capsys.readouterr().err


def test_an_image_that_changes_while_it_is_scored_is_refused(tree, run, log):
    class Changes(Fake):
        def score(self, images, ids, categories):
            save_image(tree[5].image_path, np.zeros((16, 16, 3), np.uint8))
            return super().score(images, ids, categories)

    with pytest.raises(RunError, match="005.png or its mask changed"):
        run(Changes(), batch_size=6)
    assert not list(log.parent.rglob("batch-*")), "a batch of two contents was kept"


def test_a_batch_of_other_inputs_is_never_taken(tree, run, tmp_path, capsys):
    """Even one of the same images, put into the folder by hand."""
    old, new = run(Fake(), batch_size=6), run(Fake(depth=1), batch_size=6)
    path = sorted(new.folder.glob("batch-*"))[0]
    path.write_bytes((old.folder / path.name).read_bytes())
    with pytest.raises(RunError, match=path.name):
        load_results(new.folder)
    capsys.readouterr()
    assert same(run(Fake(depth=1), batch_size=6), new)
    assert str(path) in capsys.readouterr().err


def damaged_runs(content):
    """What may stand in a run.json in place of its content, by name."""
    whole = json.loads(content)
    wrong = {"samples": 3, "config": [], "dataset": None, "state": "done", "fingerprint": {}, "size": float("nan")}
    texts = {f"mistyped {key}": json.dumps(whole | {key: value}) for key, value in wrong.items()}
    texts |= {f"without {key}": json.dumps({k: v for k, v in whole.items() if k != key}) for key in runs.INPUTS}
    texts |= {"list": "[]", "null": "null", "number": "1e999", "empty": "", "{}": "{}", "torn": content[:99].decode()}
    nested = json.dumps(whole | {"config": "here"}).replace('"here"', "[" * 900 + "]" * 900)
    texts |= {"deep": "[" * 100000, "deep config": nested}
    return {name: text.encode() for name, text in texts.items()} | {"not UTF-8": b"\xff\xfe"}


def test_a_damaged_run_is_named_or_left_out(tree, run, tmp_path):
    good, bad = run(Fake()), run(Fake(depth=1))
    path = bad.folder / "run.json"
    for name, content in damaged_runs(path.read_bytes()).items():
        path.write_bytes(content)
        for read in (lambda: load_results(bad.folder), lambda: labels.find_runs("", folders=[bad.folder])):
            with pytest.raises(RunError, match="run.json") as error:
                read()
            assert "\n" not in str(error.value), name
        found, left_out = labels.find_runs(tmp_path / "runs")
        assert [results.folder for results in found] == [good.folder] and len(left_out) == 1, name
        assert str(path) in left_out[0]
    with pytest.raises(RunError, match="run.json"):
        run(Fake(depth=1))
    path.unlink()
    path.mkdir()
    with pytest.raises(RunError, match="run.json"):
        load_results(bad.folder)


def test_names_that_are_not_utf8_or_long_are_scored_and_drawn(tmp_path):
    for k, stem in enumerate((b"caf\xe9", b"x" * 251, b"=1+1", b"bell\x07\n")):
        source = save_image(tmp_path / "in" / "one.png", np.full((8, 8, 3), 50 * k, np.uint8))
        os.rename(source, os.fsencode(tmp_path / "in") + b"/" + stem + b".png")
    images = load_dataset("folder", tmp_path / "in")
    results = score(images, Fake(), tmp_path / "runs", **QUIET)
    assert list(load_results(results.folder).frame["id"]) == [sample.id for sample in images.samples]
    written = pd.read_csv(results.folder / "scores.csv")
    assert len(written) == 4 and written["id"].str.contains("caf\\udce9", regex=False).any()
    pictures = sorted(path.name for path in save_heatmaps(results, images.samples, tmp_path / "pictures").iterdir())
    assert [name[:5] for name in pictures] == ["0000_", "0001_", "0002_", "0003_"]
    assert all(name.isprintable() and len(name.encode()) < 250 for name in pictures)


def test_categories_that_are_not_utf8_are_measured(tmp_path):
    for name in (b"caf\xe9", b"lid"):
        write_tree(tmp_path / "in", 2, ("box",))
        os.rename(tmp_path / "in" / "box", os.fsencode(tmp_path / "in") + b"/" + name)
    results = score(load_dataset("mvtec_ad", tmp_path / "in"), Fake(), tmp_path / "runs", **QUIET)
    measured = evaluate_run(results, n_bootstrap=3)
    assert os.fsdecode(b"caf\xe9") in set(measured["category"])


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "foreign", "gone"])
def test_damaged_batch_is_scored_again(run, log, damage):
    whole = run(Fake(log), batch_size=6)
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
    assert same(whole, run(Fake(log), batch_size=6))
    assert batches(log)[len(calls) :] == [calls[1]]


def test_another_batch_size_keeps_what_is_done(tree, run, log, tmp_path):

    class Dies(Fake):
        def score(self, images, ids, categories):
            if Path(log).exists() and len(batches(log)) == 2:
                raise KeyboardInterrupt
            return super().score(images, ids, categories)

    with pytest.raises(KeyboardInterrupt):
        run(Dies(log), batch_size=5)
    folder = run_folder(tree, Fake(), tmp_path / "runs")
    assert json.loads((folder / "run.json").read_text())["state"] == "interrupted"
    resumed = run(Fake(log), batch_size=7)
    seen = [name for ids in batches(log) for name in ids]
    assert sorted(seen) == sorted(sample.id for sample in tree.samples), "an image was scored twice or never"
    assert same(resumed, run(Fake(), out="other", batch_size=24))


def test_left_over_files_are_removed_and_folders_of_another_run_never_reused(tree, run, tmp_path):
    folder = run_folder(tree, Fake(), tmp_path / "runs")
    folder.mkdir(parents=True)
    (folder / ".writing-batch-000000.npz").write_bytes(b"half")
    assert run(Fake()).folder == folder and not list(folder.glob(".writing-*"))
    folder.rename(run_folder(tree, Fake(depth=1), tmp_path / "runs"))
    with pytest.raises(RunError, match="another run"):
        run(Fake(depth=1))


NAN = torch.zeros(4, SIZE, SIZE)
NAN[1, 0, 0] = torch.nan


class Broken(Fake):
    name = "broken"

    def __init__(self, change):
        super().__init__()
        self.change = change

    def score(self, images, ids, categories):
        scores = super().score(images, ids, categories)
        return Scores(*self.change(scores.image, scores.map))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda image, maps: (image[:-1], maps), r"pred_score of shape \[3\] .*box/test/good/000"),
        (lambda image, maps: (image[:, None], maps), r"pred_score of shape \[4, 1\]"),
        (lambda image, maps: (image, maps[:, None]), r"map of shape \[4, 1, 12, 12\]"),
        (lambda image, maps: (image, maps[:, :5]), r"map of shape \[4, 5, 12\]"),
        (lambda image, maps: (image, maps + NAN), r"NaN or infinity in map for box/test/good/001$"),
        (lambda image, maps: (image / 0, maps), r"NaN or infinity in pred_score for box.* and 1 more|box"),
    ],
)
def test_broken_methods_are_named_with_their_images(run, tmp_path, change, message):
    with pytest.raises(RunError, match=message) as error:
        run(Broken(change), batch_size=4)
    assert "broken" in str(error.value)
    assert not list(tmp_path.rglob("batch-*")), "a bad batch was kept"


def test_nothing_to_score_and_bad_batch_size(tree, tmp_path):
    with pytest.raises(RunError, match="no image"):
        score(runs.AnomalyDataset("none", tmp_path, ()), Fake(), tmp_path)
    for size in (0, -1, 1.5, True, float("nan"), "4", None):
        with pytest.raises(RunError, match="batch_size"):
            score(tree, Fake(), tmp_path, batch_size=size)
    with pytest.raises(RunError, match="not a run folder"):
        load_results(tmp_path)


def test_a_method_without_maps_has_image_metrics_only(run):
    results = run(Broken(lambda image, maps: (image, None)))
    assert results.maps is None and results.masks is None
    frame = evaluate_run(results, n_bootstrap=0).set_index(["category", "metric"])
    assert frame.loc[("mean", "image_auroc"), "value"] == 1
    assert frame.loc[("mean", "pixel_auroc"), "reason"] != ""


def test_evaluate_equals_metrics_on_the_arrays(tree, run):
    results = run(Fake())
    frame = evaluate_run(results, n_bootstrap=20, seed=1)
    labels = [sample.label for sample in tree.samples]
    masks = load_masks(tree.samples, SIZE).numpy()
    categories = [sample.category for sample in tree.samples]
    scores = results.frame["pred_score"].to_numpy()
    expected = tables.evaluate(categories, labels, scores, results.maps, masks, n_bootstrap=20, seed=1)
    pd.testing.assert_frame_equal(frame, expected)
    kinds = evaluate_run(results, per_defect=True, n_bootstrap=0)["category"].unique()
    assert list(kinds) == ["box/spot", "lid/spot", "mean"]


def test_images_without_labels_get_scores_but_no_metrics(tree, run):
    results = run(Fake(), load_dataset("folder", tree.root / "box" / "test"))
    assert len(pd.read_csv(results.folder / "scores.csv")) == 12
    assert results.maps is not None and results.masks is None
    with pytest.raises(RunError, match="no labels"):
        evaluate_run(results)


def test_compare_puts_methods_side_by_side(run):
    blind = Broken(lambda image, maps: (torch.zeros_like(image), torch.zeros_like(maps)))
    runs = {"fake": run(Fake()), "blind": run(blind)}
    table = compare(runs, n_bootstrap=30)
    assert list(table.index) == ["fake", "blind"] and list(table.columns) == list(metrics.METRICS)
    assert table.loc["fake", "image_auroc"] == "100.0 [100.0, 100.0]"
    assert table.loc["blind", "image_auroc"] == "50.0 [50.0, 50.0]"
    assert table.attrs["notes"] == []
    wide = compare(runs, ["image_ap", "aupro"], per_category=True, n_bootstrap=0)
    assert list(wide.columns) == ["image_ap", "aupro"]
    assert list(wide.loc["blind"].index) == ["box", "lid", "mean"]


def test_compare_explains_what_is_undefined_and_refuses_different_images(tree, run):
    runs = {"maps": run(Fake()), "none": run(Broken(lambda image, maps: (image, None)))}
    table = compare(runs, n_bootstrap=0)
    assert table.loc["none", "aupro"] == "n/a" and table.loc["maps", "aupro"] != "n/a"
    assert len(table.attrs["notes"]) == 1 and "none" in table.attrs["notes"][0]
    runs["part"] = run(Fake(), tree.select(limit=2))
    with pytest.raises(RunError, match="different images"):
        compare(runs, n_bootstrap=0)


@pytest.mark.parametrize("name", ("local_contrast", "median", "patch_knn"))
def test_numbers_of_real_methods_do_not_depend_on_the_batch(run, name):
    method = make_method(name, size=16)
    one, many = run(method, out="one", batch_size=1), run(method, out="many", batch_size=24)
    np.testing.assert_allclose(one.maps, many.maps, rtol=1e-5, atol=1e-6)
    assert evaluate_run(one, n_bootstrap=0).query("metric == 'image_auroc'")["value"].notna().all()
