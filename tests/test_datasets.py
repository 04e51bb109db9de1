import json
import sys
import types
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import coco_ad_tree, save_image
from PIL import EpsImagePlugin, Image

from conftest import shared_path
from zsad_lib.data import images
from zsad_lib.data.datasets import load_dataset
from zsad_lib.data.images import load_images, load_masks, read_image, read_mask
from zsad_lib.errors import DataError
from zsad_lib.manifest import dataset_groups

GREY = np.array([[0, 64, 128], [192, 255, 32]], np.uint8)  # 2 rows, 3 columns
COLOUR = np.stack([GREY, GREY[::-1], 255 - GREY], axis=-1)
BITS16 = np.array([[0, 1, 256], [32768, 65534, 65535]], np.uint16)


def turned(degrees):
    """EXIF that asks to turn an image before it is shown."""
    exif = Image.Exif()
    exif[0x0112] = {0: 1, 180: 3, 270: 6, 90: 8}[degrees]
    return exif


def random_image(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


# --- read_image: every kind of file


def palette():
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "L").convert("P")
    image.putpalette([250, 10, 20, 0, 200, 0, 30, 40, 50] + [0] * 759)
    image.putdata([0, 1, 2])
    return image


def grey_with_alpha():
    return Image.merge("LA", [Image.new("L", (2, 1), 10), Image.fromarray(np.array([[0, 255]], np.uint8))])


RGBA = np.array([[[200, 100, 0, 0], [200, 100, 0, 255], [0, 0, 0, 51]]], np.uint8)  # 0.2 black over white is 0.8
PALETTE = np.array([[[250, 10, 20], [0, 200, 0], [30, 40, 50]]]) / 255
SECOND = np.array([[[False], [True], [False]]])
RED = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
KINDS = {  # file name, what is saved, options, the values of [H,W,3] or [H,W,1] from 0 to 1, tolerance
    "colour": ("a.png", COLOUR, {}, COLOUR / 255, 0),
    "grey": ("a.png", GREY, {}, GREY[..., None] / 255, 0),
    "one bit": ("a.png", np.array([[True, False]]), {}, [[[1.0], [0.0]]], 0),
    "16 bit png": ("a.png", BITS16, {}, BITS16[..., None] / 65535, 1e-7),
    "16 bit tif": ("a.tif", BITS16, {}, BITS16[..., None] / 65535, 1e-7),
    "16 bit pgm": ("a.pgm", BITS16, {}, BITS16[..., None] / 65535, 1e-7),
    "transparent": ("a.png", RGBA, {}, [[[1, 1, 1], [200 / 255, 100 / 255, 0], [0.8, 0.8, 0.8]]], 1.01 / 255),
    "grey with alpha": ("a.png", grey_with_alpha(), {}, [[[1.0], [10 / 255]]], 1e-6),
    "palette": ("a.png", palette(), {}, PALETTE, 1e-6),
    "transparent palette": ("a.png", palette(), {"transparency": 1}, np.where(SECOND, 1, PALETTE), 1e-6),
    "cmyk tif": ("a.tif", RED, {}, np.full((8, 8, 3), [1, 0, 0]), 0),
    "cmyk jpg": ("a.jpg", RED, {"quality": 100}, np.full((8, 8, 3), [1, 0, 0]), 4 / 255),
    **{
        f"turned by {degrees}": ("a.png", COLOUR, {"exif": turned(degrees)}, np.rot90(COLOUR, degrees // 90) / 255, 0)
        for degrees in (0, 90, 180, 270)
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_is_float_rgb_channels_first(tmp_path, kind):
    name, content, options, expected, tolerance = KINDS[kind]
    image = content if isinstance(content, Image.Image) else Image.fromarray(content)
    image.save(tmp_path / name, **options)
    found = read_image(tmp_path / name)
    expected = torch.from_numpy(np.array(expected, np.float32)).permute(2, 0, 1)
    assert found.dtype == torch.float32 and found.is_contiguous() and len(found) == 3
    torch.testing.assert_close(found, expected.expand_as(found), rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("pixels", "size", "expected", "tolerance"),
    [
        (np.full((4, 4), 30001, np.uint16), 2, 30001 / 65535, 1e-6),  # 16 bits keep their depth
        ((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8), 8, 0.5, 0.01),  # a board is antialiased
    ],
)
def test_resize_keeps_depth_and_is_antialiased(tmp_path, pixels, size, expected, tolerance):
    image = read_image(save_image(tmp_path / "a.png", pixels), size)
    torch.testing.assert_close(image, torch.full((3, size, size), expected), rtol=0, atol=tolerance)


@pytest.mark.parametrize("height,width", [(1, 1), (1, 7), (31, 33), (65, 64)])
def test_odd_sizes_resize_to_a_square(tmp_path, height, width):
    path = save_image(tmp_path / "a.png", random_image(height, width, 3))
    assert read_image(path).shape == (3, height, width)
    image = read_image(path, 32)
    assert image.shape == (3, 32, 32) and image.min() >= 0 and image.max() <= 1


def test_resize_keeps_place_and_channels(tmp_path):
    array = np.zeros((8, 16, 3), np.uint8)
    array[:4, 8:, 1] = 255  # top right, green
    image = read_image(save_image(tmp_path / "a.png", array), 4)
    assert image[1, 0, 3] == 1 and image[1, 3].max() == 0 and image[1, 0, 0] == 0
    assert image[0].max() == 0 and image[2].max() == 0


# --- read_image: files that cannot be read


@pytest.mark.parametrize("values", [np.array([[0, 70000]], np.int32), np.array([[0.5, 2.0]], np.float32)])
def test_values_of_unknown_range_are_refused(tmp_path, values):
    with pytest.raises(DataError, match=r"a\.tif"):
        read_image(save_image(tmp_path / "a.tif", values))


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "bmp"])
@pytest.mark.parametrize("part", [0, 0.1, 0.6])
def test_truncated_file_is_named(tmp_path, suffix, part):
    path = save_image(tmp_path / f"broken.{suffix}", random_image(64, 64, 3))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(DataError, match=rf"broken\.{suffix}"):
        read_image(path)


@pytest.mark.parametrize("name", ("corrupt.png", "text.png", "missing.png"))
def test_corrupt_text_and_missing_files_are_named(tmp_path, name):
    content = bytearray(save_image(tmp_path / "corrupt.png", random_image(64, 64)).read_bytes())
    content[60:300] = bytes(240)
    (tmp_path / "corrupt.png").write_bytes(content)
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(DataError, match=name):
        read_image(tmp_path / name)


@pytest.mark.parametrize("kind", ["EPS", "GIF"])
def test_other_formats_are_refused_whatever_their_name(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    Image.fromarray(COLOUR).save(tmp_path / "a.png", format=kind)
    with pytest.raises(DataError, match=r"a\.png"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("pil", [1, 4, 100])  # its own limit: an error above twice of it, a warning above it
def test_too_many_pixels_are_refused_before_they_are_read(tmp_path, monkeypatch, pil):
    path = save_image(tmp_path / "a.png", COLOUR)
    monkeypatch.setattr(images, "MAX_PIXELS", 5)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pil)
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("decoded"))
    with warnings.catch_warnings(), pytest.raises(DataError, match=r"a\.png .*\b5 pixels.*\b6 pixels"):
        warnings.simplefilter("error")
        read_image(path)


# --- read_mask


def test_mask_threshold_is_strict_and_stated(tmp_path):
    path = save_image(tmp_path / "m.png", np.array([[0, 5, 127, 128, 255]], np.uint8))
    assert read_mask(path).tolist() == [[False, False, False, True, True]]
    assert read_mask(path, threshold=0).tolist() == [[False, True, True, True, True]]
    assert read_mask(path).dtype == torch.bool


@pytest.mark.parametrize("values", [np.array([[False, True]]), np.array([[30000, 65535]], np.uint16)])
def test_one_bit_and_16_bit_masks(tmp_path, values):
    assert read_mask(save_image(tmp_path / "m.png", values)).tolist() == [[False, True]]


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_a_mask_of_0_and_1_is_marked_where_it_is_1(tmp_path, kind):
    assert read_mask(save_image(tmp_path / "m.png", np.array([[0, 1, 1]], kind))).tolist() == [[False, True, True]]
    assert not read_mask(save_image(tmp_path / "m.png", np.zeros((2, 2), kind))).any()
    assert not read_mask(save_image(tmp_path / "m.png", np.array([[0, 2, 127]], np.uint8))).any()


def test_mask_is_thresholded_before_a_nearest_resize(tmp_path):
    # 200 beside 0: any averaging before the threshold would lose or widen single pixels
    values = np.zeros((4, 4), np.uint8)
    values[1, 2] = 200
    mask = read_mask(save_image(tmp_path / "m.png", values), 8)
    assert mask.shape == (8, 8) and mask.dtype == torch.bool
    assert mask[2:4, 4:6].all() and mask.sum() == 4


# --- layouts


def mvtec_tree(root, categories=("bottle", "wood")):
    image, mask = np.full((8, 6, 3), 100, np.uint8), np.zeros((8, 6), np.uint8)
    mask[:4, :3] = 255
    for folder in (root / category for category in categories):
        for name in ("train/good/000", "train/good/001", "test/good/000", "test/good/001"):
            save_image(folder / f"{name}.png", image)
        for name in ("000", "001", "002"):
            save_image(folder / f"test/hole/{name}.png", image)
            save_image(folder / f"ground_truth/hole/{name}_mask.png", mask)
    return root


@pytest.fixture
def mvtec(tmp_path):
    return mvtec_tree(tmp_path / "mvtec_ad")


def assert_refused(name, root, message):
    with pytest.raises(DataError, match=message):
        load_dataset(name, root)


def test_mvtec_layout(mvtec):
    (mvtec / "bottle" / "test" / "good" / "._000.png").write_text("a file browser's leftover")
    (mvtec / "license.txt").write_text("text")
    data = load_dataset("mvtec_ad", mvtec)
    assert data.categories == ("bottle", "wood") and len(data) == 10 and {s.split for s in data} == {"test"}
    assert len({sample.id for sample in data}) == 10
    hole = data[2]
    assert (hole.id, hole.label, hole.defect, hole.category) == ("bottle/test/hole/000", 1, "hole", "bottle")
    assert hole.mask_path == mvtec / "bottle/ground_truth/hole/000_mask.png"
    assert data[0].label == 0 and data[0].defect == "good" and data[0].mask_path is None
    train = load_dataset("mvtec_ad", mvtec, split="train")
    assert len(train) == 4 and all(s.label == 0 and s.split == "train" for s in train)
    assert len(load_dataset("mvtec_ad", mvtec, split=None)) == 14


def test_select_and_limit(mvtec):
    data = load_dataset("mvtec_ad", mvtec, limit=1)
    assert [s.id for s in data] == [f"{c}/test/{defect}/000" for c in ("bottle", "wood") for defect in ("good", "hole")]
    wood = load_dataset("mvtec_ad", mvtec, categories="wood")
    assert wood.categories == ("wood",) and len(wood) == 5
    assert {s.id for s in wood.select(limit=1)} < {s.id for s in wood.select(limit=2)}
    assert [s.defect for s in wood.select(defects=["hole"])] == ["hole"] * 3
    assert wood.select().samples == wood.samples


@pytest.mark.parametrize(
    "choice, message",
    [
        ({"categories": ["wood", "cable"]}, "category 'cable'; it has: bottle, wood"),
        ({"defects": "dent"}, "defect 'dent'; it has: good, hole"),
        ({"split": "train"}, "split 'train'"),
        ({"limit": 0}, "limit=0"),
    ],
)
def test_select_names_what_exists(mvtec, choice, message):
    with pytest.raises(DataError, match=message):
        load_dataset("mvtec_ad", mvtec).select(**choice)


def test_images_and_masks_of_samples(mvtec):
    data = load_dataset("mvtec_ad", mvtec, categories="bottle")
    images, masks = load_images(data.samples, 4), load_masks(data.samples, 4)
    assert images.shape == (5, 3, 4, 4) and images.dtype == torch.float32
    torch.testing.assert_close(images, torch.full_like(images, 100 / 255))
    assert masks.shape == (5, 4, 4) and masks.dtype == torch.bool
    assert not masks[:2].any()
    assert masks[2, :2, :2].all() and masks[2].sum() == 4  # the upper left quarter of 8x6 is one of 4x4


def test_mask_of_another_frame_is_refused(mvtec):
    save_image(mvtec / "wood/ground_truth/hole/001_mask.png", np.zeros((6, 8), np.uint8))
    with pytest.raises(DataError, match=r"wood/ground_truth/hole/001_mask\.png is 8x6 .* 6x8"):
        load_masks(load_dataset("mvtec_ad", mvtec, categories="wood").samples, 4)


def test_exif_turned_image_agrees_with_its_mask(mvtec):
    lying = np.full((6, 8), 9, np.uint8)  # shown as 8 rows and 6 columns
    save_image(mvtec / "wood/test/hole/000.png", lying, exif=turned(270))
    assert load_masks(load_dataset("mvtec_ad", mvtec, categories="wood")[2:3], 4).sum() == 4


def test_mvtec_errors(tmp_path, mvtec):
    empty = mvtec / "empty" / "test" / "good"
    empty.mkdir(parents=True)
    assert_refused("mvtec_ad", tmp_path / "absent", "absent.*homepage")
    assert_refused("mvtec_ad", empty, "no category in .*good")
    assert_refused("mvtec_ad", mvtec / "bottle", f"pass its parent {mvtec}")
    assert_refused("mvtec_ad", mvtec, "category .*empty")


def test_an_image_without_mask_and_one_without_an_id_of_its_own_are_refused(mvtec):
    save_image(mvtec / "wood/test/good/000.jpg", COLOUR)
    assert_refused("mvtec_ad", mvtec, r"000\.jpg and .*000\.png .*wood/test/good/000")
    (mvtec / "wood/ground_truth/hole/002_mask.png").unlink()
    assert_refused("mvtec_ad", mvtec, r"wood/test/hole/002\.png has no mask at .*002_mask\.png")


def test_plain_folder_has_no_truth(tmp_path):
    root = tmp_path / "photos"
    save_image(root / "b.JPG", COLOUR)
    save_image(root / "inner" / "a.png", COLOUR)
    (root / "notes.txt").write_text("text")
    data = load_dataset("folder", root)
    assert [s.id for s in data] == ["photos/test/unknown/b", "photos/test/unknown/inner/a"]
    assert all((s.label, s.mask_path, s.category) == (-1, None, "photos") for s in data)
    with pytest.raises(DataError, match=r"b\.JPG"):
        load_masks(data.samples, 4)
    (tmp_path / "void").mkdir()
    assert_refused("folder", tmp_path / "void", "void")
    assert_refused("folder", None, "root=")


def test_a_folder_that_may_not_be_read_is_named(mvtec, monkeypatch):
    listed = Path.iterdir

    def iterdir(self):
        if self.name == "hole":
            raise PermissionError(13, "Permission denied", str(self))
        return listed(self)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert_refused("mvtec_ad", mvtec, r"Permission denied: .*bottle/test/hole")


@pytest.mark.parametrize("name, why", [("visa", "no reader"), ("mvtec", "no manifest"), ("synthad-C", "no manifest")])
def test_names_without_a_reader(tmp_path, name, why):
    assert_refused(name, tmp_path, f"`{name}` .*{why}.*; readable: synthad, mvtec_ad, .*folder, synthad-A, synth")


def test_default_root(mvtec, monkeypatch):
    monkeypatch.setenv("ZSAD_DATA", str(mvtec.parent))
    assert load_dataset("mvtec_ad").root == mvtec
    monkeypatch.delenv("ZSAD_DATA")
    monkeypatch.chdir(mvtec)
    assert_refused("mvtec_ad", None, "data/mvtec_ad")


def test_a_generator_writes_what_is_not_there_and_groups_are_parts_of_it(tmp_path, monkeypatch):
    groups, written = dataset_groups(), []

    def export(root):
        written.append(root)
        mvtec_tree(root, [category for _, categories in groups.values() for category in categories])

    monkeypatch.setitem(sys.modules, "zsad_lite.synthad", types.SimpleNamespace(export=export))
    monkeypatch.setenv("ZSAD_DATA", str(tmp_path))
    part, whole = load_dataset("synthad-A", limit=1), load_dataset("synthad", limit=1)
    assert written == [whole.root] == [tmp_path / "synthad"] and len(whole) == 24
    assert (part.name, part.root) == (whole.name, whole.root) == ("synthad", tmp_path / "synthad")
    assert part == whole.select(groups["synthad-A"][1]) and len(part.categories) == 6
    with pytest.raises(DataError, match="gauge"):
        load_dataset("synthad-A", categories="gauge")


# --- layouts with lists


def real_iad_tree(root, lists="realiad_jsons"):
    """Two categories, one of them with a view of a defective part that does not show the defect."""
    (root / lists).mkdir(parents=True)
    mask = np.zeros((4, 6), np.uint8)
    mask[:2, :3] = 255
    views = [("train", 1, 1, "OK"), ("train", 1, 2, "OK"), ("test", 2, 1, "OK")]
    views += [("test", 3, 1, "HS"), ("test", 3, 2, "OK")]
    for category in ("audiojack", "zipper"):
        entries = {"train": [], "test": []}
        for split, number, view, kind in views:
            folder = f"NG/HS/S{number:04}" if number == 3 else f"OK/S{number:04}"
            name = f"{folder}/{category}_{number:04}_{folder[:2]}_C{view}_20231021.jpg"
            marked = name.replace(".jpg", ".png") if kind != "OK" else None
            save_image(root / category / name, np.full((4, 6, 3), 100, np.uint8))
            if marked:
                save_image(root / category / marked, mask)
            entry = {"category": category, "anomaly_class": kind, "image_path": name, "mask_path": marked}
            entries[split].append(entry)
        meta = {"meta": {"normal_class": "OK", "prefix": f"{category}/"}}
        (root / lists / f"{category}.json").write_text(json.dumps(meta | entries))
    return root


@pytest.mark.parametrize("lists", ["realiad_jsons", "realiad_jsons/realiad_jsons"])
def test_real_iad_layout(tmp_path, lists):
    data = load_dataset("real_iad", real_iad_tree(tmp_path, lists))
    assert data.categories == ("audiojack", "zipper") and len(data) == 6
    assert [(s.id, s.label) for s in data if s.category == "zipper"] == [
        ("zipper/test/HS/zipper_0003_NG_C1_20231021", 1),
        ("zipper/test/good/zipper_0002_OK_C1_20231021", 0),
        ("zipper/test/good/zipper_0003_NG_C2_20231021", 0),
    ]
    assert data[0].mask_path == tmp_path / "audiojack/NG/HS/S0003/audiojack_0003_NG_C1_20231021.png"
    masks = load_masks(data.samples, 4)
    assert masks[0].any() and not masks[1:3].any()
    train = load_dataset("real_iad", tmp_path, categories="zipper", split="train")
    assert len(train) == 2 and all((s.label, s.mask_path, s.split) == (0, None, "train") for s in train)


def test_real_iad_errors(tmp_path):
    assert_refused("real_iad", tmp_path, "audiojack/OK")
    mask = real_iad_tree(tmp_path) / "zipper/NG/HS/S0003/zipper_0003_NG_C1_20231021.png"
    mask.unlink()
    assert_refused("real_iad", tmp_path, r"zipper_0003_NG_C1_20231021\.jpg has no mask at .*\.png")
    mask.with_suffix(".jpg").unlink()
    assert_refused("real_iad", tmp_path, r"zipper\.json lists .*zipper_0003_NG_C1_20231021\.jpg")
    (tmp_path / "zipper").rename(tmp_path / ".zipper")
    assert load_dataset("real_iad", tmp_path).categories == ("audiojack",), "a partial download"
    (tmp_path / "realiad_jsons" / "audiojack.json").unlink()
    assert_refused("real_iad", tmp_path, r"realiad_jsons/audiojack\.json")


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "must be JSON"),
        ("[]", 'lists under "train" and "test"'),
        ('{"train": []}', "'test'"),
        ('{"train": {"a": 1}, "test": []}', "not iterable"),
        ('{"train": [], "test": []}', "no image"),
        ('{"train": [], "test": [{"image_path": "a.jpg"}]}', "image_path or anomaly_class"),
        ('{"train": [], "test": [{"image_path": 7, "anomaly_class": "OK"}]}', "image_path"),
        ('{"train": [], "test": ["a.jpg"]}', "image_path"),
        ('{"train": [], "test": [{"image_path": "a.jpg", "anomaly_class": ["OK"]}]}', "anomaly_class"),
        ('{"train": [], "test": [{"image_path": "a.jpg", "anomaly_class": NaN}]}', "anomaly_class"),
        ('{"train": [], "test": [{"image_path": "a.jpg", "anomaly_class": "../OK"}]}', "anomaly_class"),
        ('{"train": [], "test": [{"image_path": "a.jpg", "anomaly_class": "OK", "mask_path": 7}]}', "mask_path"),
        ('{"train": [], "test": ' + "[" * 100_000, "must be JSON"),
    ],
)
def test_broken_lists_are_named(tmp_path, content, message):
    (real_iad_tree(tmp_path) / "realiad_jsons" / "zipper.json").write_text(content)
    assert_refused("real_iad", tmp_path, rf"zipper\.json .*{message}")


@pytest.mark.parametrize("key", ["image_path", "mask_path"])
@pytest.mark.parametrize(
    "text", ["{outside}/secret.png", "../../outside/secret.png", "linked.png", "linked/secret.png"]
)
def test_lists_do_not_lead_out_of_their_root(tmp_path, key, text):
    root, outside = real_iad_tree(tmp_path / "root"), tmp_path / "outside"
    save_image(outside / "secret.png", np.full((4, 6), 255, np.uint8))
    (root / "zipper" / "linked.png").symlink_to(outside / "secret.png")
    (root / "zipper" / "linked").symlink_to(outside)
    source = root / "realiad_jsons" / "zipper.json"
    content = json.loads(source.read_text())
    (entry,) = (entry for entry in content["test"] if entry["anomaly_class"] == "HS")
    entry[key] = text.format(outside=outside)
    source.write_text(json.dumps(content))
    assert_refused("real_iad", root, rf"zipper\.json lists .*\.png, which is not below {root}")


@pytest.mark.parametrize("change", [{"anomaly": "0"}, {"anomaly": None}, {"specie_name": "a/b"}])
def test_mistyped_entries_of_coco_ad_are_shown(tmp_path, change):
    meta = coco_ad_tree(tmp_path, splits=(2,)) / "meta_20_2.json"
    content = json.loads(meta.read_text())
    content["test"]["coco"][2] |= change
    meta.write_text(json.dumps(content))
    assert_refused("coco_ad", tmp_path, r"meta_20_2\.json .*" + next(iter(change)))


def test_coco_ad_layout(tmp_path):
    data = load_dataset("coco_ad", coco_ad_tree(tmp_path))
    assert data.categories == ("coco_0", "coco_1") and len(data) == 6
    assert [(s.id, s.label) for s in data.select(categories="coco_1")] == [
        ("coco_1/test/anomalous/000000000285", 1),
        ("coco_1/test/good/000000000139", 0),
        ("coco_1/test/good/000000000632", 0),
    ]
    assert data[0].mask_path == tmp_path / "val2017_mask_ad_20_0/000000000139.png"
    assert data[0].image_path == data[4].image_path == tmp_path / "val2017/000000000139.jpg"
    assert load_masks(data.samples, 4).flatten(1).any(1).tolist() == [True, False, False] * 2
    train = load_dataset("coco_ad", tmp_path, categories="coco_1", split="train")
    assert [(s.id, s.label) for s in train] == [("coco_1/train/good/000000000009", 0)]


def test_coco_ad_errors(tmp_path):
    assert_refused("coco_ad", tmp_path, r"meta_20_0\.json to meta_20_3\.json in .*data list")
    meta = coco_ad_tree(tmp_path, splits=(2,)) / "meta_20_2.json"
    assert load_dataset("coco_ad", tmp_path).categories == ("coco_2",), "one split is enough"
    text = meta.read_text()
    (tmp_path / "val2017_mask_ad_20_2/000000000632.png").unlink()
    assert_refused("coco_ad", tmp_path, r"000000000632\.jpg has no mask at .*val2017_mask_ad_20_2")
    meta.write_text(text.replace("val2017_mask_ad_20_2/000000000632.png", ""))
    assert_refused("coco_ad", tmp_path, r"meta_20_2\.json lists .*000000000632\.jpg as defective without a mask")
    (tmp_path / "val2017" / "000000000285.jpg").unlink()
    assert_refused("coco_ad", tmp_path, r"000000000285\.jpg, which is not there")
    meta.write_text(text[:-5])
    assert_refused("coco_ad", tmp_path, r"meta_20_2\.json must be JSON")


# --- the magnetic tiles


def test_magnetic_tile_layout(tmp_path):
    mask = np.zeros_like(GREY)
    save_image(tmp_path / "MT_Free/Imgs/a.jpg", GREY)
    save_image(tmp_path / "MT_Free/Imgs/a.png", mask)
    save_image(tmp_path / "MT_Fray/Imgs/b.jpg", GREY)
    assert_refused("magnetic_tile", tmp_path, r"b\.jpg has no mask")
    save_image(tmp_path / "MT_Fray/Imgs/b.png", mask)
    data = load_dataset("magnetic_tile", tmp_path)
    assert [(s.id, s.label) for s in data] == [("magnetic_tile/test/Fray/b", 1), ("magnetic_tile/test/good/a", 0)]
    assert load_masks(data.samples, 4).sum() == 0  # an empty mask does not change the label
    (tmp_path / "MT_Break").mkdir()
    assert_refused("magnetic_tile", tmp_path, "MT_Break")
    assert_refused("magnetic_tile", tmp_path / "MT_Fray", "MT_Free")


def test_real_magnetic_tiles():
    data = load_dataset("magnetic_tile", shared_path("data/magnetic_tile"))
    assert Counter(s.defect for s in data) == {"good": 320, "Blowhole": 70, "Break": 50, "Uneven": 60}
    assert all((s.label == 0) == (s.defect == "good") and s.category == "magnetic_tile" for s in data)
    assert len({s.id for s in data}) == 500
    defective = [sample for sample in data if sample.label == 1]
    halves = [read_mask(s.mask_path).sum().item() for s in defective]
    anything = [read_mask(s.mask_path, threshold=0).sum().item() for s in defective]
    empty = [s.id for s, area in zip(defective, halves, strict=True) if not area]
    assert len(empty) == 3 and all("/Uneven/" in name for name in empty)
    # not binary: counting every non-zero pixel would grow the true area
    assert all(a >= h for a, h in zip(anything, halves, strict=True)) and sum(anything) > 1.01 * sum(halves)
    for sample in defective[::20]:
        assert read_mask(sample.mask_path).shape == read_image(sample.image_path).shape[1:]
    assert len({read_image(sample.image_path).shape for sample in data[:40]}) > 5  # every size
    images = load_images(data[:8], 64)
    assert images.shape == (8, 3, 64, 64) and torch.equal(images[:, 0], images[:, 2])  # grey
