import json
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

import zsad_lib
from conftest import shared_path
from zsad_lib.data.datasets import load_dataset
from zsad_lib.data.images import load_images, load_masks, read_image, read_mask
from zsad_lib.errors import DataError

GREY = np.array([[0, 64, 128], [192, 255, 32]], np.uint8)  # 2 rows, 3 columns
COLOUR = np.stack([GREY, GREY[::-1], 255 - GREY], axis=-1)


def save(path, array, mode=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def chw(array):
    return torch.from_numpy(np.asarray(array, np.float32).transpose(2, 0, 1) / 255)


# --- read_image: every kind of file


def test_colour_png_is_float_rgb_channels_first(tmp_path):
    image = read_image(save(tmp_path / "a.png", COLOUR))
    assert image.shape == (3, 2, 3) and image.dtype == torch.float32 and image.is_contiguous()
    torch.testing.assert_close(image, chw(COLOUR), rtol=0, atol=0)


def test_grey_is_repeated(tmp_path):
    image = read_image(save(tmp_path / "a.png", GREY))
    torch.testing.assert_close(image, chw(np.stack([GREY] * 3, -1)), rtol=0, atol=0)


def test_one_bit_image(tmp_path):
    image = read_image(save(tmp_path / "a.png", np.array([[True, False]])))
    assert image.tolist() == [[[1.0, 0.0]]] * 3


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bit_grey_is_divided_by_65535(tmp_path, suffix):
    values = np.array([[0, 1, 256], [32768, 65534, 65535]], np.uint16)
    image = read_image(save(tmp_path / f"a.{suffix}", values))
    expected = torch.from_numpy(values.astype(np.float32) / 65535)
    torch.testing.assert_close(image[1], expected, rtol=0, atol=1e-7)
    assert torch.equal(image[0], image[2])


def test_16_bit_grey_keeps_its_depth_when_resized(tmp_path):
    values = np.full((4, 4), 30001, np.uint16)
    image = read_image(save(tmp_path / "a.png", values), 2)
    torch.testing.assert_close(image, torch.full((3, 2, 2), 30001 / 65535), rtol=0, atol=1e-6)


def test_32_bit_values_are_refused(tmp_path):
    path = save(tmp_path / "a.tif", np.array([[0, 70000]], np.int32))
    with pytest.raises(DataError, match=r"a\.tif.*0\.\.65535"):
        read_image(path)


def test_float_image_is_refused(tmp_path):
    path = save(tmp_path / "a.tif", np.array([[0.5, 2.0]], np.float32))
    with pytest.raises(DataError, match=r"a\.tif.*floats"):
        read_image(path)


def test_rgba_is_laid_on_white(tmp_path):
    rgba = np.array([[[200, 100, 0, 0], [200, 100, 0, 255], [0, 0, 0, 51]]], np.uint8)
    image = read_image(save(tmp_path / "a.png", rgba))
    expected = [[255, 255, 255], [200, 100, 0], [204, 204, 204]]  # 0.2 black over white is 0.8
    torch.testing.assert_close(image, chw([expected]), rtol=0, atol=1.01 / 255)
    assert image[:, 0, 0].tolist() == [1, 1, 1]


def test_grey_with_alpha_is_laid_on_white(tmp_path):
    path = tmp_path / "a.png"
    alpha = Image.fromarray(np.array([[0, 255]], np.uint8))
    Image.merge("LA", [Image.new("L", (2, 1), 10), alpha]).save(path)
    image = read_image(path)
    torch.testing.assert_close(image[0], torch.tensor([[1.0, 10 / 255]]), rtol=0, atol=1e-6)


def palette_image():
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "L").convert("P")
    image.putpalette([250, 10, 20, 0, 200, 0, 30, 40, 50] + [0] * 759)
    return image


def test_palette_gives_its_colours_not_its_indices(tmp_path):
    image = palette_image()
    image.putdata([0, 1, 2])
    image.save(tmp_path / "a.png")
    torch.testing.assert_close(
        read_image(tmp_path / "a.png"), chw([[[250, 10, 20], [0, 200, 0], [30, 40, 50]]]), rtol=0, atol=0
    )


def test_transparent_palette_entry_is_white(tmp_path):
    image = palette_image()
    image.putdata([0, 1, 2])
    image.save(tmp_path / "a.png", transparency=1)
    torch.testing.assert_close(
        read_image(tmp_path / "a.png"), chw([[[250, 10, 20], [255, 255, 255], [30, 40, 50]]]), rtol=0, atol=0
    )


@pytest.mark.parametrize("suffix,tolerance", [("tif", 0), ("jpg", 4 / 255)])
def test_cmyk(tmp_path, suffix, tolerance):
    path = tmp_path / f"a.{suffix}"
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(path, **({"quality": 100} if suffix == "jpg" else {}))
    red = torch.tensor([1.0, 0.0, 0.0])[:, None, None].expand(3, 8, 8)
    torch.testing.assert_close(read_image(path), red, rtol=0, atol=tolerance)


@pytest.mark.parametrize("orientation,turn", [(1, 0), (3, 2), (6, -1), (8, 1)])
def test_exif_orientation_is_applied(tmp_path, orientation, turn):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "a.png", COLOUR, exif=exif)
    torch.testing.assert_close(read_image(path), chw(np.rot90(COLOUR, turn)), rtol=0, atol=0)


@pytest.mark.parametrize("height,width", [(1, 1), (1, 7), (31, 33), (65, 64)])
def test_odd_sizes_resize_to_a_square(tmp_path, height, width):
    array = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    path = save(tmp_path / "a.png", array)
    assert read_image(path).shape == (3, height, width)
    image = read_image(path, 32)
    assert image.shape == (3, 32, 32) and image.min() >= 0 and image.max() <= 1


def test_resize_is_antialiased(tmp_path):
    board = np.indices((64, 64)).sum(0) % 2 * 255
    image = read_image(save(tmp_path / "a.png", board.astype(np.uint8)), 8)
    torch.testing.assert_close(image, torch.full((3, 8, 8), 0.5), rtol=0, atol=0.01)


def test_resize_keeps_place_and_channels(tmp_path):
    array = np.zeros((8, 16, 3), np.uint8)
    array[:4, 8:, 1] = 255  # top right, green
    image = read_image(save(tmp_path / "a.png", array), 4)
    assert image[1, 0, 3] == 1 and image[1, 3].max() == 0 and image[1, 0, 0] == 0
    assert image[0].max() == 0 and image[2].max() == 0


# --- read_image: files that cannot be read


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "bmp"])
@pytest.mark.parametrize("part", [0, 0.1, 0.6])
def test_truncated_file_is_named(tmp_path, suffix, part):
    array = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = save(tmp_path / f"broken.{suffix}", array)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(DataError, match=rf"broken\.{suffix}.*restore"):
        read_image(path)


def test_corrupt_pixels_are_named(tmp_path):
    path = save(tmp_path / "broken.png", np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8))
    content = bytearray(path.read_bytes())
    content[60:300] = bytes(240)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"broken\.png"):
        read_image(path)


def test_text_file_and_missing_file_are_named(tmp_path):
    (tmp_path / "a.png").write_text("not an image")
    with pytest.raises(DataError, match=r"cannot read image .*a\.png"):
        read_image(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"no file at .*b\.png"):
        read_image(tmp_path / "b.png")


# --- read_mask


def test_mask_threshold_is_strict_and_stated(tmp_path):
    path = save(tmp_path / "m.png", np.array([[0, 5, 127, 128, 255]], np.uint8))
    assert read_mask(path).tolist() == [[False, False, False, True, True]]
    assert read_mask(path, threshold=0).tolist() == [[False, True, True, True, True]]
    assert read_mask(path).dtype == torch.bool


@pytest.mark.parametrize("kind", [np.bool_, np.uint16])
def test_one_bit_and_16_bit_masks(tmp_path, kind):
    values = np.array([[0, 1]]) if kind is np.bool_ else np.array([[30000, 65535]])
    assert read_mask(save(tmp_path / "m.png", values.astype(kind))).tolist() == [[False, True]]


def test_mask_is_thresholded_before_a_nearest_resize(tmp_path):
    # 200 beside 0: any averaging before the threshold would lose or widen single pixels
    values = np.zeros((4, 4), np.uint8)
    values[1, 2] = 200
    mask = read_mask(save(tmp_path / "m.png", values), 8)
    assert mask.shape == (8, 8) and mask.dtype == torch.bool
    assert mask[2:4, 4:6].all() and mask.sum() == 4


# --- layouts


def mvtec_tree(root, sizes=(8, 6)):
    image = np.full((*sizes, 3), 100, np.uint8)
    mask = np.zeros(sizes, np.uint8)
    mask[:4, :3] = 255
    for category in ("bottle", "wood"):
        for name in ("000", "001"):
            save(root / category / "train" / "good" / f"{name}.png", image)
            save(root / category / "test" / "good" / f"{name}.png", image)
        for name in ("000", "001", "002"):
            save(root / category / "test" / "hole" / f"{name}.png", image)
            save(root / category / "ground_truth" / "hole" / f"{name}_mask.png", mask)
    return root


def test_mvtec_layout(tmp_path):
    (mvtec_tree(tmp_path) / "bottle" / "test" / "good" / "._000.png").write_text("a file browser's leftover")
    (tmp_path / "license.txt").write_text("text")
    data = load_dataset("mvtec_ad", tmp_path)
    assert data.categories == ("bottle", "wood") and len(data) == 10 and {s.split for s in data} == {"test"}
    assert len({sample.id for sample in data}) == 10
    hole = data[2]
    assert (hole.id, hole.label, hole.defect, hole.category) == ("bottle/test/hole/000", 1, "hole", "bottle")
    assert hole.mask_path == tmp_path / "bottle/ground_truth/hole/000_mask.png"
    assert data[0].label == 0 and data[0].defect == "good" and data[0].mask_path is None
    train = load_dataset("mvtec_ad", tmp_path, split="train")
    assert len(train) == 4 and all(s.label == 0 and s.split == "train" for s in train)
    assert len(load_dataset("mvtec_ad", tmp_path, split=None)) == 14


def test_select_and_limit(tmp_path):
    data = load_dataset("mvtec_ad", mvtec_tree(tmp_path), limit=1)
    assert [s.id for s in data] == [
        "bottle/test/good/000",
        "bottle/test/hole/000",
        "wood/test/good/000",
        "wood/test/hole/000",
    ]
    full = load_dataset("mvtec_ad", tmp_path, categories="wood")
    assert full.categories == ("wood",) and len(full) == 5
    assert {s.id for s in full.select(limit=1)} < {s.id for s in full.select(limit=2)}
    assert [s.defect for s in full.select(defects=["hole"])] == ["hole"] * 3
    assert full.select().samples == full.samples


def test_select_names_what_exists(tmp_path):
    data = load_dataset("mvtec_ad", mvtec_tree(tmp_path))
    with pytest.raises(DataError, match=r"no category 'cable'; it has: bottle, wood"):
        data.select(categories=["wood", "cable"])
    with pytest.raises(DataError, match=r"no defect 'dent'; it has: good, hole"):
        data.select(defects="dent")
    with pytest.raises(DataError, match=r"no split 'train'"):
        data.select(split="train")
    with pytest.raises(DataError, match=r"limit=0"):
        data.select(limit=0)


def test_images_and_masks_of_samples(tmp_path):
    data = load_dataset("mvtec_ad", mvtec_tree(tmp_path), categories="bottle")
    images, masks = load_images(data.samples, 4), load_masks(data.samples, 4)
    assert images.shape == (5, 3, 4, 4) and images.dtype == torch.float32
    torch.testing.assert_close(images, torch.full_like(images, 100 / 255))
    assert masks.shape == (5, 4, 4) and masks.dtype == torch.bool
    assert not masks[:2].any()
    assert masks[2, :2, :2].all() and masks[2].sum() == 4  # the upper left quarter of 8x6 is one of 4x4


def test_mask_of_another_frame_is_refused(tmp_path):
    mvtec_tree(tmp_path)
    save(tmp_path / "wood/ground_truth/hole/001_mask.png", np.zeros((6, 8), np.uint8))
    data = load_dataset("mvtec_ad", tmp_path, categories="wood")
    with pytest.raises(DataError, match=r"wood/ground_truth/hole/001_mask\.png is 8x6 .* 6x8"):
        load_masks(data.samples, 4)


def test_exif_turned_image_agrees_with_its_mask(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    mvtec_tree(tmp_path)
    lying = np.full((6, 8), 9, np.uint8)  # shown as 8 rows and 6 columns
    save(tmp_path / "wood/test/hole/000.png", lying, exif=exif)
    data = load_dataset("mvtec_ad", tmp_path, categories="wood")
    assert load_masks(data[2:3], 4).sum() == 4


def test_mvtec_errors(tmp_path):
    with pytest.raises(DataError, match=r"no folder at .*absent.*homepage"):
        load_dataset("mvtec_ad", tmp_path / "absent")
    with pytest.raises(DataError, match="no category in"):
        load_dataset("mvtec_ad", tmp_path)
    mvtec_tree(tmp_path)
    with pytest.raises(DataError, match=f"it is one category, pass its parent {tmp_path}"):
        load_dataset("mvtec_ad", tmp_path / "bottle")
    (tmp_path / "empty" / "test" / "good").mkdir(parents=True)
    with pytest.raises(DataError, match="category .*empty has no image"):
        load_dataset("mvtec_ad", tmp_path)
    (tmp_path / "empty" / "test" / "good").rmdir()
    (tmp_path / "empty" / "test").rmdir()
    (tmp_path / "wood/ground_truth/hole/002_mask.png").unlink()
    with pytest.raises(DataError, match=r"wood/test/hole/002\.png has no mask at .*002_mask\.png"):
        load_dataset("mvtec_ad", tmp_path)


def test_two_files_with_one_id_are_refused(tmp_path):
    save(mvtec_tree(tmp_path) / "wood/test/good/000.jpg", COLOUR)
    with pytest.raises(DataError, match=r"000\.jpg and .*000\.png would share the id wood/test/good/000"):
        load_dataset("mvtec_ad", tmp_path)


def test_plain_folder_has_no_truth(tmp_path):
    root = tmp_path / "photos"
    save(root / "b.JPG", COLOUR)
    save(root / "inner" / "a.png", COLOUR)
    (root / "notes.txt").write_text("text")
    data = load_dataset("folder", root)
    assert [s.id for s in data] == ["photos/test/unknown/b", "photos/test/unknown/inner/a"]
    assert all((s.label, s.mask_path, s.category) == (-1, None, "photos") for s in data)
    with pytest.raises(DataError, match=r"no mask is known for .*b\.JPG"):
        load_masks(data.samples, 4)
    (tmp_path / "void").mkdir()
    with pytest.raises(DataError, match="no image in .*void"):
        load_dataset("folder", tmp_path / "void")
    with pytest.raises(DataError, match="Pass root="):
        load_dataset("folder")


def test_names_without_a_reader(tmp_path):
    with pytest.raises(DataError, match="`visa` has no reader yet; readable: synthad, mvtec_ad, .*folder"):
        load_dataset("visa", tmp_path)
    with pytest.raises(DataError, match="`mvtec` is in no manifest; readable: .*mvtec_ad"):
        load_dataset("mvtec", tmp_path)


def test_default_root(tmp_path, monkeypatch):
    monkeypatch.setenv("ZSAD_DATA", str(tmp_path))
    mvtec_tree(tmp_path / "mvtec_ad")
    assert load_dataset("mvtec_ad").root == tmp_path / "mvtec_ad"
    monkeypatch.delenv("ZSAD_DATA")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no folder at data/mvtec_ad"):
        load_dataset("mvtec_ad")


def test_synthad_is_exported_once(tmp_path, monkeypatch):
    exported = []

    def export(root):
        exported.append(root)
        mvtec_tree(root)
        (root / "attributes.jsonl").write_text("{}\n")

    fake = types.SimpleNamespace(export=export)
    monkeypatch.setitem(sys.modules, "zsad_lib.synthad", fake)
    monkeypatch.setattr(zsad_lib, "synthad", fake, raising=False)
    monkeypatch.setenv("ZSAD_DATA", str(tmp_path))
    first, second = load_dataset("synthad"), load_dataset("synthad")
    assert exported == [tmp_path / "synthad"]
    assert first == second and len(first) == 10


# --- layouts with lists


def real_iad_tree(root, lists="realiad_jsons"):
    """Two categories, one of them with a view of a defective part that does not show the defect."""
    (root / lists).mkdir(parents=True)
    mask = np.zeros((4, 6), np.uint8)
    mask[:2, :3] = 255
    for category in ("audiojack", "zipper"):
        entries = {"train": [], "test": []}
        for split, number, view, kind in [
            ("train", 1, 1, "OK"),
            ("train", 1, 2, "OK"),
            ("test", 2, 1, "OK"),
            ("test", 3, 1, "HS"),
            ("test", 3, 2, "OK"),
        ]:
            folder = f"NG/HS/S{number:04}" if number == 3 else f"OK/S{number:04}"
            name = f"{folder}/{category}_{number:04}_{folder[:2]}_C{view}_20231021.jpg"
            marked = name.replace(".jpg", ".png") if kind != "OK" else None
            save(root / category / name, np.full((4, 6, 3), 100, np.uint8))
            if marked:
                save(root / category / marked, mask)
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


def test_real_iad_without_a_category_or_a_list(tmp_path):
    with pytest.raises(DataError, match="no category in .*audiojack/OK"):
        load_dataset("real_iad", tmp_path)
    real_iad_tree(tmp_path)
    (tmp_path / "audiojack").rename(tmp_path / ".audiojack")
    assert load_dataset("real_iad", tmp_path).categories == ("zipper",), "a partial download"
    (tmp_path / "realiad_jsons" / "zipper.json").unlink()
    with pytest.raises(DataError, match=r"no list at .*realiad_jsons/zipper\.json"):
        load_dataset("real_iad", tmp_path)


def test_real_iad_files_that_are_not_there(tmp_path):
    real_iad_tree(tmp_path)
    mask = tmp_path / "zipper/NG/HS/S0003/zipper_0003_NG_C1_20231021.png"
    mask.unlink()
    with pytest.raises(DataError, match=r"zipper_0003_NG_C1_20231021\.jpg has no mask at .*\.png"):
        load_dataset("real_iad", tmp_path)
    mask.with_suffix(".jpg").unlink()
    with pytest.raises(DataError, match=r"zipper\.json lists .*zipper_0003_NG_C1_20231021\.jpg, which is not there"):
        load_dataset("real_iad", tmp_path)


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "is not JSON"),
        ("[]", 'must hold lists under "train" and "test"'),
        ('{"train": []}', "must hold lists"),
        ('{"train": {"a": 1}, "test": []}', "must hold lists"),
        ('{"train": [], "test": []}', "lists no image"),
        ('{"train": [], "test": [{"image_path": "a.jpg"}]}', "an entry without image_path or anomaly_class"),
        ('{"train": [], "test": [{"image_path": 7, "anomaly_class": "OK"}]}', "an entry without image_path"),
        ('{"train": [], "test": ["a.jpg"]}', "an entry without image_path"),
    ],
)
def test_broken_lists_are_named(tmp_path, content, message):
    (real_iad_tree(tmp_path) / "realiad_jsons" / "zipper.json").write_text(content)
    with pytest.raises(DataError, match=r"zipper\.json .*" + message):
        load_dataset("real_iad", tmp_path)


def coco_ad_tree(root, splits=(0, 1)):
    """Two training and three validation images; split i takes validation image i for anomalous."""
    for folder, names in (("train2017", (9, 30)), ("val2017", (139, 285, 632))):
        for name in names:
            save(root / folder / f"{name:012}.jpg", np.full((4, 6, 3), 100, np.uint8))
    for i in splits:

        def entry(folder, name, anomaly, i=i):
            mask = f"val2017_mask_ad_20_{i}/{name:012}.png" if anomaly else ""
            if mask:
                save(root / mask, np.full((4, 6, 3), 255, np.uint8))
            path = f"{folder}/{name:012}.jpg"
            return {"img_path": path, "mask_path": mask, "cls_name": "coco", "specie_name": "", "anomaly": anomaly}

        train = [entry("train2017", 9 if i else 30, 0)]
        test = [entry("val2017", name, int(i == k)) for k, name in enumerate((139, 285, 632))]
        meta = {"train": {"coco": train}, "test": {"coco": test}}
        (root / f"meta_20_{i}.json").write_text(json.dumps(meta))
    return root


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
    with pytest.raises(DataError, match=r"no meta_20_0\.json to meta_20_3\.json in .*data list"):
        load_dataset("coco_ad", tmp_path)
    coco_ad_tree(tmp_path, splits=(2,))
    assert load_dataset("coco_ad", tmp_path).categories == ("coco_2",), "one split is enough"
    meta = tmp_path / "meta_20_2.json"
    text = meta.read_text()
    (tmp_path / "val2017_mask_ad_20_2/000000000632.png").unlink()
    with pytest.raises(DataError, match=r"000000000632\.jpg has no mask at .*val2017_mask_ad_20_2"):
        load_dataset("coco_ad", tmp_path)
    meta.write_text(text.replace("val2017_mask_ad_20_2/000000000632.png", ""))
    with pytest.raises(DataError, match=r"meta_20_2\.json lists .*000000000632\.jpg as defective without a mask"):
        load_dataset("coco_ad", tmp_path)
    (tmp_path / "val2017" / "000000000285.jpg").unlink()
    with pytest.raises(DataError, match=r"000000000285\.jpg, which is not there"):
        load_dataset("coco_ad", tmp_path)
    meta.write_text(text[:-5])
    with pytest.raises(DataError, match=r"meta_20_2\.json is not JSON"):
        load_dataset("coco_ad", tmp_path)


# --- the real magnetic tiles


def test_magnetic_tile_layout(tmp_path):
    mask = np.zeros_like(GREY)
    save(tmp_path / "MT_Free/Imgs/a.jpg", GREY)
    save(tmp_path / "MT_Free/Imgs/a.png", mask)
    save(tmp_path / "MT_Fray/Imgs/b.jpg", GREY)
    with pytest.raises(DataError, match=r"b\.jpg has no mask"):
        load_dataset("magnetic_tile", tmp_path)
    save(tmp_path / "MT_Fray/Imgs/b.png", mask)
    data = load_dataset("magnetic_tile", tmp_path)
    assert [(s.id, s.label) for s in data] == [
        ("magnetic_tile/test/Fray/b", 1),
        ("magnetic_tile/test/good/a", 0),
    ]
    assert load_masks(data.samples, 4).sum() == 0  # an empty mask does not change the label
    (tmp_path / "MT_Break").mkdir()
    with pytest.raises(DataError, match="MT_Break"):
        load_dataset("magnetic_tile", tmp_path)
    with pytest.raises(DataError, match="no folder MT_Free"):
        load_dataset("magnetic_tile", tmp_path / "MT_Fray")


def test_real_magnetic_tiles():
    data = load_dataset("magnetic_tile", shared_path("data/magnetic_tile"))
    counts = {}
    for sample in data:
        counts[sample.defect] = counts.get(sample.defect, 0) + 1
    assert counts == {"good": 320, "Blowhole": 70, "Break": 50, "Uneven": 60}
    assert all((s.label == 0) == (s.defect == "good") and s.category == "magnetic_tile" for s in data)
    assert len({s.id for s in data}) == 500


def test_real_magnetic_masks():
    data = load_dataset("magnetic_tile", shared_path("data/magnetic_tile"))
    defective = [sample for sample in data if sample.label == 1]
    empty = [s.id for s in defective if not read_mask(s.mask_path).any()]
    assert len(empty) == 3 and all("/Uneven/" in name for name in empty)
    halves = [read_mask(s.mask_path).sum().item() for s in defective]
    anything = [read_mask(s.mask_path, threshold=0).sum().item() for s in defective]
    # not binary: counting every non-zero pixel would grow the true area
    assert all(a >= h for a, h in zip(anything, halves, strict=True)) and sum(anything) > 1.01 * sum(halves)
    for sample in defective[::20]:
        assert read_mask(sample.mask_path).shape == read_image(sample.image_path).shape[1:]
    assert len({read_image(sample.image_path).shape for sample in data[:40]}) > 5  # every size
    images = load_images(data[:8], 64)
    assert images.shape == (8, 3, 64, 64) and torch.equal(images[:, 0], images[:, 2])  # grey
