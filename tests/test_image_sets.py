"""Image sets: fixed splits without overlap, prefixes that stay, errors that say what to do."""

import numpy as np
import pytest
import torch
from helpers import save_image
from sklearn.datasets import load_digits

from conftest import shared_path
from zsad_lib.anomaly.resize import resize
from zsad_lib.data import image_sets
from zsad_lib.data.image_sets import IMAGE_SETS, PATCH, UNROOTED, available, load_image_set
from zsad_lib.errors import DataError
from zsad_lite import synthad


def write(path, shape=(32, 32, 3), seed=0):
    save_image(path, np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Trees in the layouts of CIFAR-10 and of the magnetic tiles, under the default data folder."""
    for k in range(6):
        write(tmp_path / f"cifar10/train/cat/{k:04}.png", seed=k)
        write(tmp_path / f"cifar10/test/{'dog' if k % 2 else 'cat'}/{k:04}.png", seed=10 + k)
        write(tmp_path / f"magnetic_tile/MT_Free/Imgs/free_{k}.jpg", (70 + k, 90), seed=20 + k)
        write(tmp_path / f"magnetic_tile/MT_Break/Imgs/break_{k}.jpg", (70, 90), seed=30 + k)
        write(tmp_path / f"magnetic_tile/MT_Break/Imgs/break_{k}.png", (70, 90), seed=40 + k)
        write(tmp_path / f"folder/{k}.png", seed=50 + k)
    monkeypatch.setenv("ZSAD_DATA", str(tmp_path))
    return tmp_path


def load(name, split, folders, **options):
    return load_image_set(name, split, root=folders / name if name == "folder" else None, **options)


@pytest.mark.parametrize("name", IMAGE_SETS)
def test_every_set(name, folders):
    train, test = (load(name, split, folders, count=8) for split in ("train", "test"))
    for part in (train, test):
        assert part.images.dtype == torch.float32 and part.images.shape == (len(part), 3, 32, 32)
        assert 0 <= part.images.min() and part.images.max() <= 1 and part.images.std() > 0.01
        assert len(set(part.ids)) == len(part) >= 3 and part.ids[0].startswith(f"{name}/{part.split}/")
        assert len({image.numpy().tobytes() for image in part.images}) == len(part)
    seen = {image.numpy().tobytes() for image in train.images}
    assert not any(image.numpy().tobytes() in seen for image in test.images)
    again, first = (load(name, "test", folders, count=count) for count in (8, 2))
    assert torch.equal(again.images, test.images) and again.ids == test.ids
    assert torch.equal(first.images, test.images[:2]) and first.ids == test.ids[:2]
    assert load(name, "test", folders, count=2, size=16).images.shape == (2, 3, 16, 16)


def test_splits_share_nothing():
    """Of the sets of fixed pictures: all of both splits, no id twice, and together all there is."""
    for name, total in (("digits", 1797), ("faces", 100)):
        ids = [set(i.split("/")[2] for i in load_image_set(name, split, None).ids) for split in ("train", "test")]
        assert not ids[0] & ids[1] and len(ids[0] | ids[1]) == total
    corners = [[i.split("/")[2:] for i in load_image_set("photographs", s, None).ids] for s in ("train", "test")]
    for (name, corner), side in ((pair, side) for side, pairs in enumerate(corners) for pair in pairs):
        left, width = int(corner.split("-")[1]), {"astronaut": 512, "coffee": 600, "rocket": 640}.get(name)
        assert width is None or (left + PATCH <= width // 2 if side == 0 else left >= width // 2)
    assert {name for name, _ in corners[0]} == {name for name, _ in corners[1]} == set(image_sets.PHOTOGRAPHS)


def test_pictures_are_what_they_say():
    digits = load_image_set("digits", "train", 3)
    for image, name in zip(digits.images, digits.ids, strict=True):
        small, original = resize(image[None], 8)[0, 0], load_digits().images[int(name.split("/")[2])] / 16
        assert np.corrcoef(small.flatten(), original.flatten())[0, 1] > 0.9
    constant, noise = load_image_set("constant", "test", 50).images, load_image_set("noise", "test", 50).images
    assert constant.flatten(2).std(2).max() < 1e-6 and constant[:, :, 0, 0].std(0).min() > 0.2
    assert abs(noise.mean() - 0.5) < 0.01 and abs(noise.std() - 12**-0.5) < 0.01


def test_synthad_groups_are_new_normal_drawings():
    drawn = load_image_set("synthad-b", "train", 7)
    assert [i.split("/")[2] for i in drawn.ids] == [*synthad.GROUPS["B"], synthad.GROUPS["B"][0]]
    expected = synthad.draw(synthad.GROUPS["B"][1], "set/train/0", size=32).image
    assert torch.equal((drawn.images[1] * 255).round().byte().permute(1, 2, 0), torch.from_numpy(expected))
    assert [i.split("/")[2] for i in load_image_set("synthad", "test", 12).ids] == list(synthad.CATEGORIES)


def test_folders_keep_their_own_splits(folders, monkeypatch):
    train, test = (load_image_set("cifar10", split) for split in ("train", "test"))
    assert sorted(train.ids) == [f"cifar10/train/cat/{k:04}" for k in range(6)]
    assert len(test) == 6 and {i.split("/")[2] for i in test.ids} == {"cat", "dog"}
    halved = load_image_set("folder", "test", root=folders / "folder")
    assert sorted(halved.ids) == [f"folder/test/{k}" for k in (1, 3, 5)]
    named = load_image_set("folder", "train", root=str(folders / "cifar10"))
    assert torch.equal(named.images, train.images)
    tiles = load_image_set("magnetic_tile", "test", root=folders / "magnetic_tile")
    assert sorted(tiles.ids) == [f"magnetic_tile/test/free_{k}" for k in (1, 3, 5)], "flawless tiles alone"
    assert available() == [*UNROOTED, "cifar10", "magnetic_tile"]
    monkeypatch.setenv("ZSAD_DATA", str(folders / "nothing"))
    assert available() == list(UNROOTED)


def test_real_folders():
    tiles = load_image_set("magnetic_tile", "train", 4, root=shared_path("data/magnetic_tile"))
    cifar = load_image_set("cifar10", "test", 20, root=shared_path("data/cifar10"))
    assert len({i.split("/")[2] for i in cifar.ids}) > 3, "the classes are mixed"
    assert tiles.images.std(1).max() < 1e-6 < cifar.images.std(1).max(), "the tiles are grey"


@pytest.mark.parametrize(
    "words, options, message",
    [
        (["svhn"], {}, "'svhn'.*synthad, synthad-a, .*cifar10, magnetic_tile"),
        (["digits", "validation"], {}, "'validation'.*train, test"),
        (["digits"], {"count": 0}, "count .*None for all, not 0"),
        (["digits"], {"root": "here"}, "'digits' has no folder; root is for cifar10, magnetic_tile, folder"),
        (["folder"], {}, "root="),
        (["folder"], {"root": "single"}, "single .*'test'"),
        (["folder"], {"root": "nowhere"}, "no folder at nowhere"),
        (["magnetic_tile", "train"], {"root": "small"}, "a.jpg is smaller than 64 px"),
        (["magnetic_tile"], {}, "no folder at data/magnetic_tile .*Clone"),
        (["cifar10"], {}, "no folder at data/cifar10/test .*Download"),
    ],
)
def test_errors_say_what_to_do(tmp_path, monkeypatch, words, options, message):
    monkeypatch.delenv("ZSAD_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "single/a.png")
    write(tmp_path / "small/MT_Free/Imgs/a.jpg", (40, 90))
    with pytest.raises(DataError, match=message):
        load_image_set(*words, **options)
