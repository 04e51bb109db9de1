"""The data manifest: where every dataset and checkpoint comes from, under which licence, with which checksum.

`data_manifest.yaml` lies beside the `zsad_lib` folder; the environment variable ZSAD_MANIFEST names another.
"""

import hashlib
import os
import pkgutil
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from zsad_lib.errors import DataError
from zsad_lib.store import write_bytes

SECTIONS = {"datasets": ("title", "licence", "layout", "fetch"), "checkpoints": ()}  # and the texts of their entries
KINDS = {"reader": str | None, "groups": dict, "path": str | None, "hub_id": str | None, "revision": str | None}
MAX_BYTES = 1_000_000


def manifest_path() -> Path:
    """$ZSAD_MANIFEST, else `data_manifest.yaml` beside the package."""
    return Path(os.environ.get("ZSAD_MANIFEST") or Path(__file__).resolve().parents[1] / "data_manifest.yaml")


def load_manifest() -> dict[str, Any]:
    """The manifest: among others its SECTIONS, each a dict of entries by name."""
    path = manifest_path()
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"{path} is larger than {MAX_BYTES} bytes: it is no manifest")
        manifest = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        how = "install from a checkout (pip install -e .), or set ZSAD_MANIFEST to the checkout's data_manifest.yaml"
        raise DataError(f"no manifest at {path}: {how}") from None
    except (yaml.YAMLError, OSError, UnicodeError, RecursionError) as error:
        raise DataError(f"{path} is not valid YAML: {error}") from error
    for section, texts in SECTIONS.items():
        if not isinstance(manifest, dict) or not isinstance(manifest.get(section), dict):
            raise DataError(f"{path} has no section `{section}:` with named entries")
        for name, entry in manifest[section].items():
            _check_entry(f"{path}: {section[:-1]} `{name}`", entry, texts)
    return manifest


def _check_entry(where, entry, texts):
    if not isinstance(entry, dict):
        raise DataError(f"{where} must be a list of `key: value`")
    wrong = [key for key in texts if not isinstance(entry.get(key), str)]
    wrong += [key for key, kind in KINDS.items() if key in entry and not isinstance(entry[key], kind)]
    if wrong:
        raise DataError(f"{where} lacks, or has something else under: {', '.join(wrong)}")


def named_function(entry: dict[str, Any], key: str) -> Callable:
    """The function that an entry, or the manifest, names under `key` as module:function."""
    try:
        return pkgutil.resolve_name(entry[key])
    except (KeyError, TypeError, ValueError, ImportError, AttributeError) as error:
        raise DataError(f"{manifest_path()} names no function under `{key}` ({error!r}): restore it") from error


def dataset_entry(name: str) -> dict[str, Any]:
    """What the manifest says about a dataset."""
    return _entry("datasets", name)


def checkpoint_entry(name: str) -> dict[str, Any]:
    """What the manifest says about a checkpoint."""
    return _entry("checkpoints", name)


def _entry(section, name):
    entries = load_manifest()[section]
    if name not in entries:
        raise DataError(f"no {section[:-1]} `{name}` in {manifest_path()}; it has: {', '.join(sorted(entries))}")
    return entries[name]


def dataset_groups() -> dict[str, tuple[str, tuple[str, ...]]]:
    """{name of a group: (its dataset, its categories)}, such as "synthad-A"."""
    return {
        f"{name}-{group}": (name, tuple(categories))
        for name, entry in load_manifest()["datasets"].items()
        for group, categories in entry.get("groups", {}).items()
    }


def local_path(entry: dict[str, Any]) -> Path | None:
    """Folder of a checkpoint that ships with the project (its `path` is relative to the manifest)."""
    return manifest_path().parent / entry["path"] if entry.get("path") else None


def folder_hash(path: Path | str) -> str:
    """SHA-256 (hex) over a folder's files: relative names in sorted order, each with its content's SHA-256."""
    digest = hashlib.sha256()
    for name, file in _files(path).items():
        digest.update(os.fsencode(name) + b"\0")
        with open(file, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def folder_size(path: Path | str) -> int:
    """Bytes of the files that `folder_hash` counts."""
    return sum(file.stat().st_size for file in _files(path).values())


def _files(path):
    """{relative name: file}, sorted; without hidden ones, which download tools leave behind."""
    folder = Path(path)
    if not folder.is_dir():
        raise DataError(f"no folder at {folder}")
    named = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
    visible = {name: named[name] for name in sorted(named) if not re.search(r"(^|/)\.", name)}
    if not visible:
        raise DataError(f"{folder} holds no files")
    return visible


def record(name: str) -> dict[str, Any]:
    """Write size and hash of a shipped checkpoint into the manifest, whose other lines stay, and return both."""
    entry, path = checkpoint_entry(name), manifest_path()
    folder = local_path(entry)
    if folder is None:
        raise DataError(f"checkpoint `{name}` has no `path`: only shipped folders are recorded")
    found = {"size_bytes": folder_size(folder), "sha256": folder_hash(folder)}
    if not found.keys() <= entry.keys():
        raise DataError(f"checkpoint `{name}` in {path} needs a line `size_bytes:` and a line `sha256:`")
    # from this entry's line to the next line that is indented no deeper
    block = re.compile(rf"(?ms)^checkpoints:.*?^(?P<entry>  {re.escape(name)}:\n.*?)(?=^ {{0,2}}\S|\Z)")
    text = path.read_text(encoding="utf-8")
    start, end = block.search(text).span("entry")
    lines = text[start:end]
    for key, value in found.items():
        lines = re.sub(rf"(?m)^    {key}:.*$", f"    {key}: {value}", lines)
    write_bytes(path, (text[:start] + lines + text[end:]).encode())
    return found


if __name__ == "__main__":
    for checkpoint in sys.argv[1:]:
        print(checkpoint, record(checkpoint))
