"""The images that methods are fitted on."""

import numpy as np
import pytest
from helpers import save_image
from PIL import Image

from zsad_lib.data import references
from zsad_lib.data.image_sets import load_image_set


@pytest.fixture(autouse=True, scope="module")
def synthad(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZSAD_DATA", str(tmp_path_factory.mktemp("data")))
        yield


def test_the_auxiliary_set_is_balanced_in_every_category():
    for limit in (1, None):
        samples = references.reference_samples("synthad-A", limit)
        assert len({s.category for s in samples}) == 6
        for category in {s.category for s in samples}:
            labels = [s.label for s in samples if s.category == category]
            assert labels.count(0) == labels.count(1) > 0
    defects = [s.defect for s in references.reference_samples("synthad-A", 1) if s.category == "wood" and s.label]
    assert len(set(defects)) == len(defects) == 7
    assert len(references.labelled_samples("synthad-A", 1)) == 6 * 8


def test_labelled_images_come_in_batches_with_their_labels():
    known = references.labelled_images("synthad-B", 1)
    batches = list(known.batches(16, count=50))
    assert known.record.items() >= {"reference": "synthad-B", "limit": 1}.items()
    first = known.samples[0].image_path
    save_image(first, 255 - np.asarray(Image.open(first)))
    changed = references.labelled_images("synthad-B", 1)
    assert changed.samples == known.samples and changed.record != known.record
    assert [len(ids) for _, ids, _ in batches] == [50, 34] and batches[0][0].shape == (50, 3, 16, 16)
    assert [i for _, ids, _ in batches for i in ids] == [s.id for s in known.samples]
    assert sum(sum(labels) for *_, labels in batches) == 42


def test_normal_images_by_name_are_those_of_the_set():
    by_name, given = references.normal_images("digits", 7), load_image_set("digits", "train", 7, 16)
    (images, ids, labels), *more = by_name.batches(16)
    assert not more and images.equal(given.images) and tuple(ids) == given.ids and labels == [0] * 7
    assert [len(ids) for _, ids, _ in references.normal_images(given).batches(16, count=4)] == [4, 3]


def test_a_named_reference_is_known_by_its_pixels_where_these_lie_in_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ZSAD_DATA", str(tmp_path))
    records = []
    for value in (100, 101):
        for k in range(3):
            save_image(tmp_path / "cifar10" / "train" / "cat" / f"{k}.png", np.full((8, 8, 3), value, np.uint8))
        records.append(references.normal_images("cifar10", 3).record["reference"])
    assert records[0] != records[1] and records[0]["name"] == records[1]["name"] == "cifar10"
    assert references.normal_images("digits", 3).record == {
        "reference": {"name": "digits", "split": "train", "images": 3}
    }
