"""What is kept is complete or absent, known by its key, and held by one process at a time."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from zsad_lib import store
from zsad_lib.errors import RunError

ARRAYS = {"scores": np.arange(3.0), "ids": np.array(["a", "b", "c"])}


def test_arrays_survive_the_disk(tmp_path):
    store.write_arrays(tmp_path / "deeper/a.npz", ARRAYS | {"size": 7})
    found = store.read_arrays(tmp_path / "deeper/a.npz")
    assert found.keys() == {"scores", "ids", "size"} and int(found["size"]) == 7
    assert all(np.array_equal(found[key], value) and found[key].dtype == value.dtype for key, value in ARRAYS.items())


@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_an_interrupted_write_leaves_what_was_there(tmp_path, monkeypatch, fault, moment):
    path = tmp_path / "a.json"
    store.write_json(path, {"whole": True})
    monkeypatch.setattr(os, moment, lambda *_: (_ for _ in ()).throw(fault))
    with pytest.raises(fault):
        store.write_json(path, {"whole": False})
    assert store.read_json(path) == {"whole": True} and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_kept_measures_once_and_knows_its_key(tmp_path):
    path, asked = tmp_path / "a.npz", []

    def measure():
        asked.append(1)
        return ARRAYS

    for _ in range(2):
        found = store.kept(path, "key", measure)
        assert found.keys() == ARRAYS.keys() and np.array_equal(found["scores"], ARRAYS["scores"])
    assert len(asked) == 1
    with pytest.raises(RunError, match="a.npz holds other"):
        store.kept(path, "another key", measure)
    np.savez(path, **ARRAYS)
    with pytest.raises(RunError, match="a.npz holds other"):
        store.kept(path, "key", measure)


def test_items_are_measured_once_each_whatever_the_selection(tmp_path):
    asked = []

    def measure(chosen, keys):
        asked.append([keys[k] for k in chosen])
        return {"twice": np.array([2 * int(keys[k]) for k in chosen]), "grid": np.arange(2)}

    def kept(*numbers):
        keys = [str(number) for number in numbers]
        return store.kept_items(tmp_path, keys, lambda chosen: measure(chosen, keys), part=2, shared=("grid",))

    assert kept(1, 2, 3)["twice"].tolist() == [2, 4, 6] and asked == [["1", "2"], ["3"]]
    found = kept(4, 3, 1)
    assert found["twice"].tolist() == [8, 6, 2] and found["grid"].tolist() == [0, 1] and asked[2:] == [["4"]]
    assert kept(1, 1)["twice"].tolist() == [2, 2] and len(asked) == 3
    sorted(tmp_path.glob("*.npz"))[0].write_bytes(b"PK")
    with pytest.raises(RunError, match="damaged"):
        kept(1)


@pytest.mark.parametrize("content", [b"", b"PK not a zip", b"\x00" * 100, b"\xff", b"[" * 100000])
def test_damaged_files_are_named(tmp_path, content):
    for name, read in (("bad.npz", store.read_arrays), ("bad.json", store.read_json)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(RunError, match=name):
            read(tmp_path / name)
    store.write_arrays(tmp_path / "cut.npz", {"a": np.arange(1000)})
    whole = (tmp_path / "cut.npz").read_bytes()
    for damaged in (whole[:-20], whole[: len(whole) // 2], whole[:200] + bytes([whole[200] ^ 255]) + whole[201:]):
        (tmp_path / "cut.npz").write_bytes(damaged)
        with pytest.raises(RunError, match="cut.npz"):
            store.read_arrays(tmp_path / "cut.npz")


def test_a_fingerprint_is_of_the_content_and_not_of_its_order():
    one = store.fingerprint({"a": 1, "b": [1.0, None]})
    assert one == store.fingerprint({"b": [1.0, None], "a": 1}) != store.fingerprint({"a": 1, "b": [1.5, None]})
    assert len(one) == 64 and store.digest(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert store.file_name("a b/c: (random U-Net)") == "a_b_c_random_U-Net_"


def test_a_file_is_known_by_its_content(tmp_path):
    path, times = tmp_path / "a", (1_000_000_000, 1_000_000_000)
    found = []
    for content in (b"one", b"two", b"one"):
        path.write_bytes(content)
        os.utime(path, times)
        found.append(store.file_hash(path))
    assert found[0] == found[2] == store.digest(b"one") and found[1] == store.digest(b"two")


def test_a_file_that_has_not_changed_is_read_once(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"one")
    first, before = store.file_hash(path), store._hash.cache_info().hits
    assert store.file_hash(str(path)) == first and store._hash.cache_info().hits == before + 1


def test_long_names_are_short_and_stay_apart():
    names = {store.file_name(text) for text in ("é" * 300, "é" * 301, "x" * 300, "\udcff" + "x" * 300)}
    assert len(names) == 4 and all(len(name.encode()) <= store.LONGEST for name in names)
    assert store.file_name("a\udcff\x1b[31m\n/b") == "a_31m_b"


def test_a_file_may_have_the_longest_name(tmp_path):
    path = tmp_path / ("x" * 250 + ".json")
    store.write_json(path, [1])
    assert store.read_json(path) == [1]


def test_cells_of_a_table_are_no_formulas():
    texts = ["=1+1", "+x", "-x", "@x", "\tx", "\rx", "plain", "caf\udce9", 'a"b', ""]
    frame = pd.DataFrame({"=name": texts, "number": np.linspace(-1, 1, 10, dtype=np.float32)}, index=texts)
    found = pd.read_csv(io.StringIO(store.csv_text(frame)), index_col=0, keep_default_na=False)
    escaped = ["'" + text for text in texts[:6]] + ["plain", "caf\\udce9", 'a"b', ""]
    assert found["'=name"].tolist() == escaped == found.index.tolist()
    assert np.array_equal(found["number"].astype(np.float32), frame["number"])
    plain = frame[["number"]].reset_index(drop=True)
    assert store.csv_text(plain, index=False) == plain.to_csv(index=False)


def test_a_damaged_file_of_arrays_is_named_whatever_byte_it_is(tmp_path):
    path = tmp_path / "a.npz"
    store.write_arrays(path, {"a": np.arange(3)})
    whole = path.read_bytes()
    for k in range(len(whole)):
        path.write_bytes(whole[:k] + bytes([whole[k] ^ 255]) + whole[k + 1 :])
        try:
            assert store.read_arrays(path)["a"].tolist() == [0, 1, 2]  # bytes that mean nothing, such as a date
        except RunError as error:
            assert "a.npz" in str(error)


def test_arrays_of_no_items_are_named(tmp_path):
    for arrays in ({"a": np.arange(2)}, {"a": np.arange(2), "keys": np.array(["one"])}):
        store.write_arrays(tmp_path / "a.npz", arrays)
        with pytest.raises(RunError, match="a.npz"):
            store.kept_items(tmp_path, ["one"], lambda chosen: {"a": np.arange(1)})


def test_a_lock_holds_other_processes_off_and_ends_with_its_process(tmp_path):
    code = f"from zsad_lib import store\nwith store.locked({str(tmp_path / 'lock')!r}, 'it'): print('held'); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(RunError, match=rf"another process is writing the run \(process {other.pid}\)"),
            store.locked(tmp_path / "lock", "the run"),
        ):
            pass
        other.kill()
    with store.locked(tmp_path / "lock", "the run"):
        pass


def test_lines_are_mended_and_read(tmp_path):
    path = tmp_path / "lines.jsonl"
    with open(path, "ab") as file:
        for k in range(3):
            store.append_line(file, {"id": k})
    whole = path.read_bytes()
    for torn, left in ((whole + b'{"id": 3', 3), (whole[:-1], 3), (whole, 3), (b'{"i', 0)):
        path.write_bytes(torn)
        if torn not in (whole, whole[:-1]):
            with pytest.raises(RunError, match="lines.jsonl"):
                store.read_lines(path)
        store.mend_lines(path)
        assert [record["id"] for record in store.read_lines(path)] == list(range(left))
    path.write_bytes(whole + json.dumps([1]).encode() + b"\n")
    with pytest.raises(RunError, match="line 4 of .*lines.jsonl"):
        store.read_lines(path)
