"""The data manifest: where every dataset and checkpoint comes from, under which licence, with which checksum.

`data_manifest.yaml` lies beside the `zsad_lib` folder; the environment variable ZSAD_MANIFEST names another.
"""

import hashlib
import os
import re
from pathlib import Path

import yaml

from zsad_lib.errors import DataError

SECTIONS = ("datasets", "checkpoints")


def manifest_path():
    """Path of the manifest in use: $ZSAD_MANIFEST, else `data_manifest.yaml` beside the package."""
    beside = Path(__file__).resolve().parent.parent / "data_manifest.yaml"
    return Path(os.environ.get("ZSAD_MANIFEST") or beside)


def load_manifest():
    """The manifest as a dict with the sections `datasets` and `checkpoints`, each a dict of entries by name.

    Raises DataError when the file is missing, is not YAML, or lacks a section.
    """
    path = manifest_path()
    try:
        manifest = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"no manifest at {path}: install from a checkout (pip install -e .), or set ZSAD_MANIFEST to the "
            f"checkout's data_manifest.yaml"
        ) from None
    except yaml.YAMLError as error:
        raise DataError(f"{path} is not valid YAML: {error}") from error
    for section in SECTIONS:
        if not isinstance(manifest, dict) or not isinstance(manifest.get(section), dict):
            raise DataError(f"{path} has no section `{section}:` with named entries")
    return manifest


def dataset_entry(name):
    """The manifest's entry (dict) of the dataset `name`; DataError lists the known names."""
    return _entry("datasets", name)


def checkpoint_entry(name):
    """The manifest's entry (dict) of the checkpoint `name`; DataError lists the known names."""
    return _entry("checkpoints", name)


def _entry(section, name):
    entries = load_manifest()[section]
    if name not in entries:
        known = ", ".join(sorted(entries))
        raise DataError(f"no {section[:-1]} `{name}` in {manifest_path()}; it has: {known}")
    return entries[name]


def local_path(entry):
    """Folder of a checkpoint shipped with the project (its `path`, relative to the manifest), else None."""
    return manifest_path().parent / entry["path"] if entry.get("path") else None


def _files(folder):
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"no folder at {folder}")
    named = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    visible = sorted(name for name in named if not any(part.startswith(".") for part in name.split("/")))
    if not visible:
        raise DataError(f"{folder} holds no files")
    return {name: named[name] for name in visible}


def folder_hash(path):
    """SHA-256 (hex) over a folder's files: relative names in sorted order, each with its content's SHA-256.

    Hidden files and folders (a leading dot) do not count: download tools leave such caches behind.
    Renaming, moving, adding, removing or changing a file changes the hash; times and permissions do not.
    """
    digest = hashlib.sha256()
    for name, file in _files(path).items():
        digest.update(name.encode() + b"\0")
        with open(file, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def folder_size(path):
    """Bytes of the files that `folder_hash` counts."""
    return sum(file.stat().st_size for file in _files(path).values())


def verify(entry, path):
    """Compare a checkpoint folder with its manifest entry's `sha256`.

    True when they agree, False when the manifest records no hash (then nothing was checked, and the caller
    says so). DataError when they disagree or the folder is missing or empty.
    """
    found = folder_hash(path)
    recorded = entry.get("sha256")
    if recorded is None:
        return False
    if found != recorded:
        raise DataError(
            f"{path} is not the checkpoint of the manifest: sha256 {found}, recorded {recorded}. Restore its "
            f"files (git checkout, or a new download); if you meant it: python -m zsad_lib.manifest NAME"
        )
    return True


def record(name):
    """Write size and hash of the shipped checkpoint `name` into the manifest; other lines stay as they are.

    Returns both as a dict. Raises DataError when the checkpoint has no `path` or its entry lacks a line.
    """
    folder = local_path(checkpoint_entry(name))
    if folder is None:
        raise DataError(f"checkpoint `{name}` has no `path`: only shipped folders are recorded")
    found = {"size_bytes": folder_size(folder), "sha256": folder_hash(folder)}
    path = manifest_path()
    # from this entry's line to the next line that is indented no deeper
    block = re.compile(rf"(?ms)^checkpoints:.*?^(?P<entry>  {re.escape(name)}:\n.*?)(?=^ {{0,2}}\S|\Z)")
    text = path.read_text(encoding="utf-8")
    start, end = block.search(text).span("entry")
    entry = text[start:end]
    for key, value in found.items():
        entry = re.sub(rf"(?m)^    {key}:.*$", f"    {key}: {value}", entry)
    path.write_text(text[:start] + entry + text[end:], encoding="utf-8")
    if any(checkpoint_entry(name).get(key) != value for key, value in found.items()):
        path.write_text(text, encoding="utf-8")
        raise DataError(f"checkpoint `{name}` in {path} needs a line `size_bytes:` and a line `sha256:`")
    return found


if __name__ == "__main__":
    import sys

    for checkpoint in sys.argv[1:]:
        print(checkpoint, record(checkpoint))
