"""What is measured once and kept: files that are complete or absent, known by a fingerprint of what can change them."""

import csv
import hashlib
import io
import json
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, Any

import filelock
import numpy as np

from zsad_lib.errors import RunError

WRITING = ".writing-"  # prefix of a file that is not complete yet
DIGEST = "digest"  # name of the array that says under which key the others were measured
DAMAGED = (OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
LONGEST = 200  # bytes of a name; file systems take 255, and endings are added to it
FORMULA = tuple("=+-@\t\r")  # how a cell starts that a spreadsheet would run


def fingerprint(content: Any) -> str:
    """SHA-256 (hex) of JSON-able content; the order of keys does not count."""
    return digest(json.dumps(content, sort_keys=True).encode())


def digest(content: bytes) -> str:
    """SHA-256 (hex) of bytes."""
    return hashlib.sha256(content).hexdigest()


def file_hash(path: Path | str) -> str:
    """SHA-256 (hex) of a file's content, which is read again in a process only where the file's state has changed."""
    found = os.stat(path)
    return _hash(os.fspath(path), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@cache
def _hash(path, *state):
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_name(text: str) -> str:
    """The text with all that a file name should not hold replaced by "_"; a long one ends in a digest of the text."""
    name = re.sub(r"[^\w.+-]+", "_", text).encode()
    if len(name) > LONGEST:
        name = name[: LONGEST - 17] + f"-{fingerprint(text)[:16]}".encode()
    return name.decode(errors="ignore")


@contextmanager
def writing(path: Path | str) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it takes the name `path` once complete and on disk, or vanishes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{WRITING}{os.getpid()}-{path.name[-40:]}")  # no longer than the name may be
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def writing_folder(path: Path | str) -> Iterator[Path]:
    """An empty folder beside `path` to fill; once complete it takes the place of `path` by renames, or it vanishes.

    Killed between two renames, what was at `path` is whole under .old-NAME; the next call puts it back first.
    """
    path = Path(path).resolve()
    temporary, old = path.with_name(f"{WRITING}{path.name}"), path.with_name(f".old-{path.name}")

    def tidy():
        if old.exists() and not path.exists():
            os.replace(old, path)
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)

    with locked(path.with_name(f".{path.name}.lock"), str(path)):
        tidy()
        temporary.mkdir()
        try:
            yield temporary
            os.sync()  # on disk before the old one goes
            if path.exists():
                os.replace(path, old)
            os.replace(temporary, path)
        finally:
            tidy()


def write_bytes(path: Path | str, content: bytes) -> None:
    with writing(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path | str, content: Any) -> None:
    write_bytes(path, (json.dumps(content, indent=1) + "\n").encode())


def read_json(path: Path | str) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path} cannot be read as JSON ({error}): restore or delete it") from error


def csv_text(frame: Any, **options: Any) -> str:
    """`to_csv` of a pandas frame, its texts made harmless: an apostrophe before what a spreadsheet would run as a
    formula, and a backslash escape for what is not UTF-8."""
    ends = {"lineterminator": "\r\n"}  # with these, csv quotes a carriage return in a cell
    rows = csv.reader(io.StringIO(frame.to_csv(**options, **ends), newline=""))
    text = io.StringIO(newline="")
    csv.writer(text, **ends).writerows([_inert(cell) for cell in row] for row in rows)
    return text.getvalue().replace("\r\n", "\n").encode(errors="backslashreplace").decode()


def _inert(cell):
    try:
        float(cell)
    except ValueError:
        return "'" + cell if cell.startswith(FORMULA) else cell
    return cell


def write_arrays(path: Path | str, arrays: dict[str, Any]) -> None:
    """NumPy arrays, numbers or texts by name, as a compressed .npz."""
    with writing(path) as temporary:
        np.savez_compressed(temporary, **arrays)


def read_arrays(path: Path | str) -> dict[str, np.ndarray]:
    """What `write_arrays` wrote; RunError when it is damaged (the zip's checksums cover all of it)."""
    try:
        with np.load(path) as file:
            return {name: file[name] for name in file.files}
    except DAMAGED as error:
        raise RunError(f"{path} is damaged ({error}): delete it, and it is measured again") from error


def kept(path: Path | str, key: str, measure: Callable[[], dict[str, Any]]) -> dict[str, np.ndarray]:
    """The arrays of the file `path`, measured and written first where it is not there.

    key: `fingerprint` of all that can change them; RunError when the file was written under another one.
    """
    if not Path(path).is_file():
        write_arrays(path, {**measure(), DIGEST: key})
    arrays = read_arrays(path)
    if str(arrays.pop(DIGEST, None)) != key:
        raise RunError(f"{path} holds other images or settings: delete it, and it is measured again")
    return arrays


def kept_items(
    folder: Path | str,
    keys: list[str],  # one an item, of all that can change its arrays
    measure: Callable[[list[int]], dict[str, np.ndarray]],  # of the items of these numbers, one row each
    part: int = 48,  # items a file
    shared: tuple[str, ...] = (),  # names of arrays that are the same for all items, without rows
    progress: Callable | None = None,  # wraps the list of parts that are measured (tqdm)
) -> dict[str, np.ndarray]:
    """The arrays of items, in order, from the files of `folder`; what they lack is measured and written first."""
    found: dict[str, tuple[dict, int]] = {}

    def add(arrays):
        for row, key in enumerate(arrays["keys"].tolist()):
            found.setdefault(key, (arrays, row))

    for path in sorted(Path(folder).glob("*.npz")):
        arrays = read_arrays(path)
        lengths = {values.shape[:1] for name, values in arrays.items() if name not in shared}
        if len(lengths) != 1 or "keys" not in arrays:
            raise RunError(f"{path} holds no measurements of items: delete it")
        add(arrays)
    missing = [k for k, key in enumerate(keys) if key not in found]
    parts = [missing[k : k + part] for k in range(0, len(missing), part)]
    for chosen in progress(parts) if progress and parts else parts:
        own = np.array([keys[k] for k in chosen])
        arrays = {**measure(chosen), "keys": own}
        write_arrays(Path(folder) / f"{fingerprint(own.tolist())[:16]}.npz", arrays)
        add(arrays)
    rows = [found[key] for key in keys]
    names = [name for name in rows[0][0] if name != "keys"]
    return {
        name: rows[0][0][name] if name in shared else np.stack([arrays[name][row] for arrays, row in rows])
        for name in names
    }


@contextmanager
def locked(path: Path | str, what: str) -> Iterator[None]:
    """Hold the lock file `path`; RunError, naming `what` it guards, when another process holds it, and which."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    holder = Path(f"{path}.pid")
    lock = filelock.FileLock(path, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        process = f"process {holder.read_text()}" if holder.is_file() else "just started"
        raise RunError(f"another process is writing {what} ({process}): wait, or choose another --out") from None
    try:
        write_bytes(holder, str(os.getpid()).encode())
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


# --- JSON Lines, one record a line, each on disk before the next


def append_line(file: IO[bytes], record: dict) -> None:
    """Write a record at the end of a file opened in binary mode, and to disk."""
    file.write(json.dumps(record).encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())


def mend_lines(path: Path) -> None:
    """End the last line of a file, or drop it where it was torn by a process killed while writing it."""
    content = path.read_bytes()
    last = content.rpartition(b"\n")[2]
    if not last:
        return
    with open(path, "r+b") as file:
        if _record(last) is None:
            file.truncate(len(content) - len(last))
        else:
            file.seek(0, os.SEEK_END)
            file.write(b"\n")
        os.fsync(file.fileno())


def read_lines(path: Path | str) -> list[dict]:
    """The records of a file, in order. RunError names a line that is none, the torn last one included."""
    lines = Path(path).read_bytes().split(b"\n")
    records = [_record(line) for line in (lines if lines[-1] else lines[:-1])]
    if None in records:
        raise RunError(f"line {records.index(None) + 1} of {path} is torn or no record: start the file anew")
    return records


def _record(line: bytes) -> dict | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
