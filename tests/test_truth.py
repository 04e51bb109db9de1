"""What synthad's drawings show, in words, and statements checked one by one."""

import json

import pytest
from helpers import write_tree

from zsad_lib.data.datasets import load_dataset
from zsad_lib.errors import DataError
from zsad_lite import synthad
from zsad_lite.synthad.truth import check_captions, true_captions


def test_every_statement_is_asked_for():
    truth = ["An image of a bottle, glass green, stripe red", "An image of a screw, metal brown"]
    said = ["An image of a bottle, glass green, stripe grey", "An image of a bottle, metal brown"]
    table = check_captions(said, truth)
    assert table["image"].tolist() == [0, 0, 0, 1, 1]
    assert table["attribute"].tolist() == ["category", "glass", "stripe", "category", "metal"]
    assert table["right"].tolist() == [True, True, False, False, True]
    assert check_captions(truth, truth)["right"].all()
    said, truth = ["An image of a connector, wires red yellow blue"], ["An image of a connector, wires red"]
    assert check_captions(said, truth)["right"].tolist() == [True, False], "a longer value is not the shorter one"
    with pytest.raises(ValueError):
        check_captions(["An image of a bottle"], [])


def test_true_captions_are_what_the_drawings_were_made_from(tmp_path):
    images = load_dataset("synthad-A", synthad.export(tmp_path / "synthad", 32))
    truth = true_captions(images.select(limit=1, categories="screw"))
    assert list(truth) == [s.id for s in images.select(limit=1, categories="screw").samples]
    assert truth["screw/test/crack/000"] == synthad.draw("screw", "test/test/crack/0", "crack", 32).caption
    assert set(truth) < set(true_captions(images))


def test_true_captions_need_synthads_list(tmp_path):
    images = load_dataset("mvtec_ad", write_tree(tmp_path / "tree", per_class=2))
    with pytest.raises(DataError, match="mvtec_ad"):
        true_captions(images)
    known = [{"file": f"{sample.id}.png", "caption": "A box."} for sample in images[1:]]
    (images.root / "attributes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in known))
    with pytest.raises(DataError, match=f"{images[0].id}.png and 0 other images"):
        true_captions(images)
