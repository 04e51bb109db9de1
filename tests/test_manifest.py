import os
import pkgutil
import re

import pytest

from conftest import ROOT
from zsad_lib import manifest
from zsad_lib.data.readers import READERS
from zsad_lib.errors import DataError
from zsad_lib.manifest import checkpoint_entry, dataset_entry, folder_hash, load_manifest
from zsad_lite import synthad

TEXTS = ["title", "sha256_note", "licence", "citation", "layout", "fetch"]
REQUIRED = {*TEXTS, "revision", "size_bytes", "sha256"}
DATASETS = ["synthad", "mvtec_ad", "visa", "btad", "mpdd", "real_iad", "coco_ad", "magnetic_tile", "cifar10"]
CHECKPOINTS = ["lite-foundation", "lite-features", "stable-diffusion-1.5", "stable-diffusion-2.1-base"]

SMALL = """\
# a comment that stays
datasets:
  tiles: {title: Tiles, licence: none, layout: flat, fetch: ask}
  net:
    {title: Net, licence: none, layout: flat, fetch: ask, sha256: null}
checkpoints:
  other:
    path: null
    size_bytes: null
    sha256: null
  net:
    path: weights/net
    size_bytes: null
    sha256: null  # not yet
  last:
    path: weights/net
    sha256: null
"""


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A small manifest beside a checkpoint folder of two files."""
    path = tmp_path / "manifest.yaml"
    path.write_text(SMALL)
    monkeypatch.setenv("ZSAD_MANIFEST", str(path))
    folder = tmp_path / "weights" / "net"
    (folder / "unet").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "unet" / "model.safetensors").write_bytes(bytes(10))
    return path


# --- the project's own


def test_every_named_dataset_and_checkpoint_is_described(monkeypatch):
    monkeypatch.delenv("ZSAD_MANIFEST", raising=False)
    assert manifest.manifest_path() == ROOT / "data_manifest.yaml"
    entries = load_manifest()
    assert set(DATASETS) <= set(entries["datasets"]) and set(CHECKPOINTS) <= set(entries["checkpoints"])
    for name, entry in [*entries["datasets"].items(), *entries["checkpoints"].items()]:
        assert not REQUIRED - set(entry) and all(entry[key] for key in TEXTS), name
        assert entry["sha256"] is None or re.fullmatch(r"[0-9a-f]{64}", entry["sha256"]), name


def test_readers_of_the_manifest_exist():
    readers = {name: entry["reader"] for name, entry in load_manifest()["datasets"].items()}
    assert {reader for reader in readers.values() if reader} <= set(READERS)
    assert readers["mpdd"] == readers["synthad"] == readers["mvtec_ad"] == "mvtec"


def test_what_the_manifest_says_about_synthad_is_so():
    entry = dataset_entry("synthad")
    assert pkgutil.resolve_name(entry["generator"]) is synthad.export
    assert pkgutil.resolve_name(entry["draw"]) is synthad.draw
    assert {group: tuple(categories) for group, categories in entry["groups"].items()} == synthad.GROUPS
    assert manifest.dataset_groups() == {f"synthad-{group}": ("synthad", synthad.GROUPS[group]) for group in "AB"}
    assert callable(pkgutil.resolve_name(load_manifest()["recipes"]))


def test_hub_checkpoints_are_pinned_or_say_so():
    for name, entry in load_manifest()["checkpoints"].items():
        if entry["hub_id"] is None:
            assert entry["path"], name
        else:
            pinned = re.fullmatch(r"[0-9a-f]{40}", entry["revision"])
            assert entry["revision_note"].lower().startswith("pinned" if pinned else "not pinned"), name


def test_shipped_checkpoints_are_those_of_the_manifest():
    shipped = {name: entry for name, entry in load_manifest()["checkpoints"].items() if entry["path"]}
    present = {name: e for name, e in shipped.items() if manifest.local_path(e).is_dir()}
    if not present:
        pytest.skip("no checkpoint folder in this checkout")
    for name, entry in present.items():
        found = folder_hash(manifest.local_path(entry))
        assert entry["sha256"] == found, f"not recorded: python -m zsad_lib.manifest {name}"
        assert entry["size_bytes"] == manifest.folder_size(manifest.local_path(entry)), name


# --- any


def test_unknown_names_list_the_known_ones(small):
    with pytest.raises(DataError, match="no dataset `tile` in .*; it has: net, tiles"):
        dataset_entry("tile")
    with pytest.raises(DataError, match="no checkpoint `nets` in .*; it has: last, net, other"):
        checkpoint_entry("nets")
    assert dataset_entry("tiles")["title"] == "Tiles"


MISTYPED = {  # the end of a manifest: what its message names
    "{datasets: {}, checkpoints: {net: weights}}": "`net`",
    "{datasets: {tiles: {title: a}}, checkpoints: {}}": "`tiles` .*licence, layout, fetch",
    "{datasets: {tiles: {title: [a], licence: b, layout: c, fetch: d}}, checkpoints: {}}": "`tiles` .*title",
    "{datasets: {}, checkpoints: {net: {path: 7}}}": "`net` .*path",
    "[" * 10_000: "not valid YAML",
    "#" * 1_000_001: "larger than 1000000 bytes",
}


@pytest.mark.parametrize("text", MISTYPED)
def test_mistyped_manifests_are_named(small, text):
    small.write_text(text)
    with pytest.raises(DataError, match=rf"manifest\.yaml.* {MISTYPED[text]}"):
        load_manifest()


@pytest.mark.parametrize("entry", [{}, {"draw": 7}, {"draw": "no.such:function"}, {"draw": "json:nothing"}])
def test_functions_that_are_not_there_are_named(small, entry):
    with pytest.raises(DataError, match=r"manifest\.yaml .*`draw`"):
        manifest.named_function(entry, "draw")


@pytest.mark.parametrize("text", [None, "a: [", "datasets: {}", "", b"\xff"])
def test_unreadable_manifests_are_named(tmp_path, monkeypatch, text):
    path = tmp_path / "m.yaml"
    monkeypatch.setenv("ZSAD_MANIFEST", str(path))
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=r"m\.yaml"):
        load_manifest()


def test_folder_hash_sees_names_and_contents_only(small):
    folder = small.parent / "weights" / "net"
    first = folder_hash(folder)
    assert re.fullmatch("[0-9a-f]{64}", first)
    (folder / ".cache").mkdir()
    (folder / ".cache" / "log").write_text("hidden")
    (folder / "config.json").touch()
    assert folder_hash(folder) == first
    (folder / "config.json").write_text("{ }")
    changed = folder_hash(folder)
    (folder / "config.json").rename(folder / "other.json")
    renamed = folder_hash(folder)
    (folder / "unet" / "model.safetensors").rename(folder / "model.safetensors")
    assert len({first, changed, renamed, folder_hash(folder)}) == 4


def test_folder_hash_does_not_confuse_a_name_with_content(tmp_path):
    for name, files in {"one": {"a": b"bc"}, "two": {"ab": b"c"}, "three": {"a": b"b", "b": b"c"}}.items():
        (tmp_path / name).mkdir()
        for file, content in files.items():
            (tmp_path / name / file).write_bytes(content)
    assert len({folder_hash(tmp_path / name) for name in ("one", "two", "three")}) == 3


def test_folders_without_files_have_no_hash(small):
    void = small.parent / "void"
    void.mkdir()
    for path in (void / "absent", void):
        with pytest.raises(DataError, match=str(path)):
            folder_hash(path)
    (void / os.fsdecode(b"\xff")).touch()
    assert len(folder_hash(void)) == 64


def test_record_writes_one_entry_and_keeps_the_rest(small):
    found = manifest.record("net")
    assert found == {"size_bytes": 12, "sha256": folder_hash(small.parent / "weights" / "net")}
    assert checkpoint_entry("net")["sha256"] == folder_hash(manifest.local_path(checkpoint_entry("net")))
    entries = load_manifest()
    assert entries["datasets"]["net"]["sha256"] is None and entries["checkpoints"]["other"]["sha256"] is None
    lines = zip(SMALL.splitlines(), small.read_text().splitlines(), strict=True)
    changed = [before for before, after in lines if before != after]
    assert [line.split(":")[0].strip() for line in changed] == ["size_bytes", "sha256"]
    before = small.read_text()
    for name, why in {"other": "`path`", "last": "`size_bytes:`"}.items():
        with pytest.raises(DataError, match=f"`{name}` .*{why}"):
            manifest.record(name)
    assert small.read_text() == before
