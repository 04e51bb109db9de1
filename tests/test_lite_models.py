"""The measurements behind the model cards: held-out images, intervals, and pages that can be written again."""

import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from zsad_lib import manifest
from zsad_lib.data.datasets import load_dataset
from zsad_lib.data.images import load_masks
from zsad_lib.evaluation import runs
from zsad_lib.training.cards import read_log
from zsad_lite import synthad
from zsad_lite.training import report_card


def test_interval_holds_the_mean_and_narrows_with_more_values():
    values = np.random.default_rng(0).normal(28, 2, 400)

    def parts(cell):
        return [float(number) for number in re.findall(r"[\d.]+", cell)]

    mean, low, high = parts(report_card.mean_interval(values))
    assert mean == pytest.approx(values.mean(), abs=0.05) and low < mean < high
    _, few_low, few_high = parts(report_card.mean_interval(values[:20]))
    assert few_high - few_low > 2 * (high - low)
    assert report_card.mean_interval([5.0] * 9) == "5.0 [5.0, 5.0]"


def test_held_out_drawings_are_in_no_training_and_no_benchmark():
    images, captions = report_card.held_out_drawings("gauge", 4)
    seeds = [seed for _, defect, _, seed in synthad.layout("gauge") if defect == "good"]
    seeds += [f"train/0/{k}" for k in range(4)]
    others = {synthad.draw("gauge", seed).image.tobytes() for seed in seeds}
    own = [(255 * image).round().byte().permute(1, 2, 0).numpy().tobytes() for image in images]
    assert images.shape == (4, 3, 64, 64) and len(captions) == 4 and not others & set(own)


def test_a_group_is_tested_on_what_it_was_not_trained_on():
    for test in ("A to B", "B to A"):
        groups, options = report_card.TESTS[test]
        backbone = options["backbone"]
        assert not set(groups) & set(report_card.PIPELINES[backbone])
        card = (manifest.local_path(manifest.checkpoint_entry(backbone)) / "README.md").read_text()
        trained = re.search(r"training images \| (.*?) \|", card)[1]
        assert all(name in trained for name in report_card.trained_on(backbone))
        assert not any(name in trained for name in synthad.GROUPS[groups])


def test_defects_of_surface_and_structure_are_measured_apart(tmp_path):
    """A map that finds surface defects alone: 100 there, chance on structure."""
    dataset = load_dataset("synthad", categories=["gauge"])
    kinds = {s.id: s.defect for s in dataset.samples}
    masks = {s.id: load_masks([s], 64)[0].float() for s in dataset.samples}

    def oracle(images, ids, categories):
        found = [masks[name] * (kinds[name] in synthad.SURFACE) for name in ids]
        return SimpleNamespace(image=torch.zeros(len(ids)), map=torch.stack(found), details={})

    method = SimpleNamespace(name="oracle", size=64, control=None, config={}, score=oracle)
    table = report_card.defect_kinds_table({"oracle": runs.score(dataset, method, tmp_path, progress=False)})
    surface, structure = table.loc["oracle"]
    assert surface.startswith("100.0 [100.0") and structure.startswith("50.0 [50.0")


def test_pages_can_be_written_again(tmp_path, monkeypatch):
    card = tmp_path / "net" / "README.md"
    card.parent.mkdir()
    card.write_text("# net\n\nWhat it is.\n")
    monkeypatch.setattr(manifest, "checkpoint_entry", lambda name: name)
    monkeypatch.setattr(manifest, "local_path", lambda name: tmp_path / name)
    for value in ("1.0 [0.9, 1.1]", "2.0 [1.9, 2.1]"):
        frame = pd.DataFrame({"AUROC": {"divad": value}})
        tables = [("DIVAD", "On all of it.", frame, ("net",)), ("Other", "Not of the net.", frame, ())]
        report_card.write_pages(tmp_path, tables, ["samples"])
    text, page = card.read_text(), (tmp_path / "lite_models.md").read_text()
    assert text.startswith("# net\n\nWhat it is.") and text.count(report_card.MARK) == 1
    assert "2.0 [1.9, 2.1]" in text and "1.0 [" not in text and "Other" not in text
    assert "### Other" in page and "![samples](samples.png)" in page and "`zsad measure`" in page


def test_every_checkpoint_that_ships_has_a_card_with_measurements_and_its_training():
    names = [*report_card.PIPELINES, *report_card.GUIDED, "lite-features", *report_card.PIXEL_MODELS]
    names.append(report_card.CAPTIONER)
    shipped = {name for name, entry in manifest.load_manifest()["checkpoints"].items() if entry["path"]}
    assert set(names) == shipped
    for name in names:
        folder = manifest.local_path(manifest.checkpoint_entry(name))
        card = (folder / "README.md").read_text()
        for fact in ("license: apache-2.0", "training images", "hardware", "**Limits.**", report_card.MARK, "seed 0"):
            assert fact in card, (name, fact)
        assert re.search(r"\d+\.\d \[\d+\.\d, \d+\.\d\]", card.split(report_card.MARK)[1]), f"{name}: no interval"
        for stage in read_log(folder).values():
            assert stage["seconds"] > 0 and stage["losses"][-1] < stage["losses"][0]


def test_a_pipeline_draws_what_it_is_asked_for():
    """By the word of the captioner, on few samples: most of them are of the category asked for."""
    table = report_card.samples_table(["lite-foundation"], count=1)
    assert float(table.loc["lite-foundation", "category recognised"].split()[0]) > 60


def test_noise_errors_are_lower_on_familiar_images():
    drawn = torch.cat([report_card.held_out_drawings(category, 1, size=32)[0] for category in synthad.CATEGORIES])
    noise = torch.rand(len(drawn), 3, 32, 32, generator=torch.Generator().manual_seed(0))
    own, strange = (report_card.noise_error_table(x, (200,), ["lite-ddpm-synthad"]) for x in (drawn, noise))
    assert float(own.iloc[0, 0].split()[0]) < 0.5 * float(strange.iloc[0, 0].split()[0])


def test_a_guide_predicts_the_noise_better_where_it_was_trained():
    table = report_card.guidance_table(["lite-dzad-a"], per_category=2, timesteps=(501,))["t = 501"]
    errors = {row: float(cell.split()[0]) for row, cell in table.items()}
    assert len(errors) == 4
    own = "lite-dzad-a, group A: "
    assert errors[own + "with the guide"] < 0.9 * errors[own + "its base, without a guide"]
    assert errors[own + "with the guide"] < errors["lite-dzad-a, group B: with the guide"]
