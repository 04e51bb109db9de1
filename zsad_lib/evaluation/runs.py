"""Dataset x method -> results on disk, in batches that survive an interruption at any moment.

A run lives in one folder, named after the dataset, the method and a fingerprint of everything that changes the numbers
(method configuration, input size, sample ids, labels, content of images and masks)::

    runs/synthad-divad-1f0c2a9b77/
        run.json           what was run, on what, with which versions; state: running, interrupted, finished
        batch-000000.npz   one batch, named by the position in the dataset of its first image
        scores.csv         one line an image, written at the end

A batch file is complete or absent and names the fingerprint, so what is missing when the same run is started again is
exactly what is scored. Ground truth travels with the scores (masks at the map's size, as bits): to evaluate a run takes
neither the dataset nor the method.
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from zsad_lib import store
from zsad_lib.data.datasets import AnomalyDataset
from zsad_lib.data.images import load_images, load_masks
from zsad_lib.data.readers import Sample
from zsad_lib.errors import RunError
from zsad_lib.methods.base import Method

FORMAT = 2  # layout of a run folder; part of the fingerprint
INPUTS = {  # what of run.json the fingerprint covers, in words
    "format": "layout",
    "dataset": "data set",
    "method": "method",
    "size": "input size",
    "config": "settings or weights",
    "samples": "images or labels",
    "contents": "content of images or masks",
}
COLUMN = "column-"  # prefix of the arrays of a batch file that become columns of the frame
PACKAGES = ("zsad_lib", "torch", "diffusers", "transformers", "numpy")


@dataclass
class Results:
    """One finished run: N images in dataset order."""

    # columns id, category, label (0 normal, 1 anomalous, -1 unknown), defect, pred_score (float32), and the method's
    # own numbers of an image, such as "evaluations"
    frame: pd.DataFrame
    maps: np.ndarray | None  # float32 [N,H,H]
    masks: np.ndarray | None  # bool [N,H,H]; None without maps or without truth
    run: dict  # what run.json holds, and "seconds" spent in scoring, loading included
    folder: Path


def score(
    dataset: AnomalyDataset, method: Method, out: Path | str, batch_size: int = 16, progress: bool = True
) -> Results:
    """Score the images of `dataset` into a run folder under `out`; a finished run is returned as it is.

    Images are batched by their position in the dataset, and those with a stored score are left out: a run that was
    killed and started again repeats at most one batch and ends with the same numbers, and another `batch_size` keeps
    what is done (it can move a network's last digits). Damaged batch files are dropped and scored again.
    """
    if not len(dataset):
        raise RunError(f"dataset {dataset.name} has no image to score: loosen the selection")
    if type(batch_size) is not int or batch_size < 1:
        raise RunError(f"batch_size must be a whole number, 1 or more, not {batch_size!r}")
    header = _header(dataset, method)
    folder = _folder(header, out)
    before = read_run(folder, header)
    if not before:
        _say_unfinished(folder, header)
    if before.get("state") == "finished":
        try:
            return load_results(folder)
        except RunError:
            pass  # a batch file was lost or damaged since: score it again
    with store.locked(folder / "lock", str(folder)):
        _fill(folder, header, dataset, method, batch_size, progress)
    return load_results(folder)


def score_all(
    dataset: AnomalyDataset,
    methods: Iterable[tuple[str, Method]],
    out: Path | str,
    batch_size: int = 16,
    progress: bool = True,
) -> dict[str, Results]:
    """{label: Results} of methods by their labels, which may be made one after the other: `profiles.with_controls`."""
    return {label: score(dataset, method, out, batch_size, progress) for label, method in methods}


def run_folder(dataset: AnomalyDataset, method: Method, out: Path | str) -> Path:
    """Where `score` keeps its results: out/{dataset}-{method}-{first ten digits of the fingerprint}."""
    return _folder(_header(dataset, method), out)


def _folder(header, out) -> Path:
    name = store.file_name(f"{header['dataset']}-{header['method']}")
    return Path(out) / f"{name}-{header['fingerprint'][:10]}"


def _say_unfinished(folder, header) -> None:
    """Name the unfinished runs of the same method and data set, and why none of them is gone on with."""
    for other in sorted(folder.parent.glob(f"{folder.name.rpartition('-')[0]}-*")):
        with contextlib.suppress(RunError):
            run = read_run(other)
            alike = all(run.get(key) == header[key] for key in ("dataset", "method", "control"))
            if alike and run["state"] != "finished":
                changed = next(words for key, words in INPUTS.items() if run[key] != header[key])
                _say(f"{folder} starts anew: {other} is not finished, but of other {changed}")


def _say(line: str) -> None:
    tqdm.write(line, file=sys.stderr)


def _fill(folder, header, dataset, method, batch_size, progress) -> None:
    """Score what the folder lacks. The caller holds the folder's lock."""
    for leftover in folder.glob(f"{store.WRITING}*"):
        leftover.unlink()
    before = read_run(folder).get("versions", header["versions"])
    if before != header["versions"]:  # batches of two installations in one run: keep both on record
        header = header | {"versions": before, "finished_with": header["versions"]}
    try:
        store.write_json(folder / "run.json", header | {"state": "running"})
        done = _done(folder, {sample.id for sample in dataset.samples}, header["fingerprint"])
        counts = {"total": len(dataset), "initial": len(done), "unit": "img"}
        with tqdm(desc=folder.name, disable=not progress, **counts) as bar:
            for first in range(0, len(dataset), batch_size):
                chunk = range(first, min(first + batch_size, len(dataset)))
                todo = [i for i in chunk if dataset[i].id not in done]
                if todo:
                    arrays = _score_batch(method, [dataset[i] for i in todo])
                    _check_unchanged([dataset[i] for i in todo], [header["contents"][i] for i in todo])
                    arrays[store.DIGEST] = np.array(header["fingerprint"])
                    store.write_arrays(folder / f"batch-{todo[0]:06d}.npz", arrays)
                    bar.update(len(todo))
        store.write_bytes(folder / "scores.csv", store.csv_text(load_results(folder).frame, index=False).encode())
        store.write_json(folder / "run.json", header | {"state": "finished"})
    except BaseException:
        with contextlib.suppress(OSError):  # a full disk: what went wrong first is what counts
            store.write_json(folder / "run.json", header | {"state": "interrupted"})
        raise


def _check_unchanged(samples, contents) -> None:
    """Refuse a batch whose files are no longer those of the run's fingerprint."""
    for sample, content in zip(samples, contents, strict=True):
        if _content(sample) != content:
            raise RunError(f"{sample.image_path} or its mask changed meanwhile: start again, and the run starts anew")


def _score_batch(method: Method, samples: Sequence[Sample]) -> dict[str, np.ndarray]:
    """The arrays of a batch file: ids and columns [B], seconds, map [B,H,H], mask as bits [B,bytes]."""
    start = time.perf_counter()
    ids = [sample.id for sample in samples]
    scores = method.score(load_images(samples, method.size), ids, [sample.category for sample in samples])
    columns = {name: values for name, values in scores.details.items() if values.ndim == 1}
    columns["pred_score"] = scores.image
    arrays = {COLUMN + name: _checked(method, ids, name, values, 1) for name, values in columns.items()}
    arrays["ids"] = np.array(ids)
    if scores.map is not None:
        arrays["map"] = _checked(method, ids, "map", scores.map, 3)
        if all(sample.label >= 0 for sample in samples):
            masks = load_masks(samples, arrays["map"].shape[1]).numpy()
            arrays["mask"] = np.packbits(masks.reshape(len(ids), -1), axis=1)
    return arrays | {"seconds": np.array(time.perf_counter() - start)}


def _checked(method, ids, what, values, dims) -> np.ndarray:
    """`values` as a float32 array, once it is known to be [B] (dims 1) or [B,H,H] (dims 3) and finite."""
    array = values.detach().cpu().numpy()
    if array.ndim != dims or len(array) != len(ids) or (dims == 3 and array.shape[1] != array.shape[2]):
        raise RunError(
            f"method {method.name} gave {what} of shape {list(array.shape)} for a batch of {len(ids)}, "
            f"expected {'[B]' if dims == 1 else '[B,H,H]'}; images: {_listed(ids)}"
        )
    finite = np.isfinite(array.reshape(len(ids), -1)).all(axis=1)
    if not finite.all():
        bad = [name for name, good in zip(ids, finite, strict=True) if not good]
        raise RunError(f"method {method.name} gave NaN or infinity in {what} for {_listed(bad)}")
    return array.astype(np.float32)


def _listed(ids: Sequence[str], most: int = 5) -> str:
    return ", ".join(ids[:most]) + (f" and {len(ids) - most} more" if len(ids) > most else "")


# --- the run folder


def load_results(folder: Path | str) -> Results:
    """Read a finished run folder."""
    folder = Path(folder)
    run = read_run(folder)
    if not run:
        raise RunError(f"{folder} is not a run folder (no run.json): `zsad score` makes them")
    frame = pd.DataFrame(run["samples"], columns=["id", "category", "label", "defect"])
    position = {name: i for i, name in enumerate(frame["id"])}
    stacks, seconds = {COLUMN + "pred_score": np.full(len(frame), np.nan, np.float32)}, 0.0
    for path in sorted(folder.glob("batch-*.npz")):
        arrays = _read_batch(path, position, run["fingerprint"])
        if arrays is None:
            raise RunError(f"{path} is damaged: run the same `zsad score` again to redo that batch")
        seconds += float(arrays.pop("seconds"))
        rows = [position[name] for name in arrays.pop("ids")]
        for key, values in arrays.items():
            if key not in stacks:
                empty = 0 if key == "mask" else np.nan
                stacks[key] = np.full((len(frame), *values.shape[1:]), empty, values.dtype)
            if stacks[key].shape[1:] != values.shape[1:]:
                raise RunError(f"{path} differs from the others in the shape of {key}: delete {folder}")
            stacks[key][rows] = values
    missing = int(np.isnan(stacks[COLUMN + "pred_score"]).sum())
    if missing:
        raise RunError(
            f"{folder} is not finished: {missing} of {len(frame)} images have no score. "
            "Run the same `zsad score` again to finish it"
        )
    maps, masks = stacks.pop("map", None), stacks.pop("mask", None)
    if masks is not None:
        side = maps.shape[1]
        masks = np.unpackbits(masks, axis=1, count=side * side).reshape(maps.shape).astype(bool)
    frame = frame.assign(**{key.removeprefix(COLUMN): values for key, values in stacks.items()})
    return Results(frame, maps, masks, run | {"seconds": seconds}, folder)


def _done(folder: Path, ids: set[str], fingerprint: str) -> set[str]:
    """Ids with a stored score; batch files that are damaged or of another run are removed on the way."""
    done = set()
    for path in sorted(folder.glob("batch-*.npz")):
        arrays = _read_batch(path, ids, fingerprint)
        if arrays is None:
            _say(f"{path} is damaged or of other inputs: its images are scored again")
            path.unlink()
        else:
            done.update(arrays["ids"].tolist())
    return done


def _read_batch(path: Path, ids, fingerprint: str) -> dict[str, np.ndarray] | None:
    """The arrays of a batch file, or None when it is damaged or of another run."""
    try:
        arrays = store.read_arrays(path)
    except RunError:
        return None
    if str(arrays.pop(store.DIGEST, None)) != fingerprint:
        return None
    lengths = {values.shape[:1] for key, values in arrays.items() if key != "seconds"}
    whole = {"ids", "seconds", COLUMN + "pred_score"} <= set(arrays) and len(lengths) == 1
    return arrays if whole and all(name in ids for name in arrays["ids"]) else None


def _header(dataset: AnomalyDataset, method: Method) -> dict:
    """The part of run.json that says what is run; "fingerprint" covers all that changes the numbers."""
    identity = {"format": FORMAT, "dataset": dataset.name, "method": method.name, "size": method.size}
    identity["config"] = method.config
    identity["samples"] = [[s.id, s.category, s.label, s.defect] for s in dataset.samples]
    identity["contents"] = [_content(sample) for sample in dataset.samples]
    identity = json.loads(json.dumps(identity))  # as it is read again
    return identity | {
        "control": method.control,
        "seed": identity["config"].get("seed"),
        "fingerprint": store.fingerprint(identity),
        "versions": _versions(),
    }


def _content(sample: Sample) -> str:
    """Sixteen digits for the content of an image and its mask."""
    return store.fingerprint([path and store.file_hash(path) for path in (sample.image_path, sample.mask_path)])[:16]


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # a checkout that is on the path without being installed
    return found


def read_run(folder: Path, header: dict | None = None) -> dict:
    """run.json as a dict, or {} when there is none; with `header` it must be of the same run."""
    path = Path(folder) / "run.json"
    if not os.path.lexists(path):
        return {}
    run = store.read_json(path)
    if not _is_whole(run):
        raise RunError(f"{path} is damaged or of another version: delete {folder}, and score again")
    if header and run["fingerprint"] != header["fingerprint"]:
        raise RunError(f"{folder} holds another run, by its run.json: delete it or choose another --out")
    return run


def _is_whole(run: Any) -> bool:
    """Whether the content of a run.json is what was written, by its own fingerprint."""
    if not isinstance(run, dict) or run.get("state") not in ("running", "interrupted", "finished"):
        return False
    return run.get("fingerprint") == store.fingerprint({key: run.get(key) for key in INPUTS})
