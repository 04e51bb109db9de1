"""Captions: statements checked one by one, and the captioner that ships."""

import numpy as np
import pytest
import torch

from zsad_lib import synthad
from zsad_lib.backbones import BackboneError
from zsad_lib.captions import check, load_captioner


def test_check_asks_for_every_statement():
    truth = ["An image of a bottle, glass green, stripe red", "An image of a screw, metal brown"]
    said = ["An image of a bottle, glass green, stripe grey", "An image of a bottle, metal brown"]
    table = check(said, truth)
    assert table["image"].tolist() == [0, 0, 0, 1, 1]
    assert table["attribute"].tolist() == ["category", "glass", "stripe", "category", "metal"]
    assert table["right"].tolist() == [True, True, False, False, True]
    assert check(truth, truth)["right"].all()


def test_a_longer_value_is_not_taken_for_a_shorter_one():
    assert not check(["An image of a connector, wires red yellow blue"], ["An image of a connector, wires red"]).right[
        1
    ]


def test_check_wants_a_sentence_for_every_image():
    with pytest.raises(ValueError):
        check(["An image of a bottle"], [])


def test_the_captioner_that_ships_knows_its_categories():
    captioner, right = load_captioner("lite-captioner", "cpu"), []
    for category in synthad.CATEGORIES:
        drawings = [synthad.draw(category, f"heldout/test/{k}") for k in range(3)]
        images = torch.from_numpy(np.stack([d.image for d in drawings])).permute(0, 3, 1, 2) / 255
        said = captioner(images)
        assert said == [captioner(image[None])[0] for image in images], "each image alone says the same"
        right.append(check(said, [d.caption for d in drawings]))
    shares = [table.groupby(table["attribute"] == "category")["right"].mean() for table in right]
    assert np.mean([share[True] for share in shares]) > 0.95
    assert np.mean([share[False] for share in shares]) > 0.6


def test_the_captioner_resizes_what_it_is_shown():
    captioner = load_captioner("lite-captioner", "cpu")
    large = synthad.draw("gauge", "heldout/0", size=128).image
    assert captioner(torch.from_numpy(large).permute(2, 0, 1)[None] / 255)[0].startswith("An image of a gauge")


def test_what_is_no_captioner_is_refused(tmp_path):
    with pytest.raises(BackboneError, match="not a VisionEncoderDecoderModel folder: it lacks"):
        load_captioner(tmp_path)
    with pytest.raises(BackboneError, match="no folder, no hub id"):
        load_captioner("no-such-captioner")
