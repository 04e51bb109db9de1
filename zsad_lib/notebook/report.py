"""The report: run the benchmark and every notebook, keep their figures and tables, and say where all came from."""

import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

import jinja2
import papermill
import torch
from nbconvert import HTMLExporter
from PIL import Image
from tqdm.auto import tqdm

from zsad_lib import manifest, store
from zsad_lib.data.datasets import load_dataset
from zsad_lib.errors import DataError, RunError
from zsad_lib.evaluation.runs import score_all
from zsad_lib.evaluation.tables import evaluate_runs, tabulate
from zsad_lib.notebook.plots import Gallery
from zsad_lib.profiles import CROSS, PROFILES, load_profile, with_controls

NOTEBOOKS = Path("notebooks")
DATASETS = ("synthad", "magnetic_tile")
BENCHMARK_CAPTION = (
    "{name}, {count} images: percent with 95 % bootstrap intervals, mean over categories. Rows below the first are "
    "controls: the same pipeline with an untrained U-Net, with no part of it trained, with untrained features, and "
    "three baselines without any model."
)
PACKAGES = ("torch", "diffusers", "transformers", "numpy", "scipy", "scikit-learn", "scikit-image", "zsad_lib")


def build(
    profile: str = "lite",
    out: str | Path = "artifacts",
    only: str | None = None,  # the number of one notebook ("02"); the benchmark is then left out
    runs: str | Path = "runs",  # where scores are kept: an interrupted report goes on where it stopped
    seed: int = 0,
) -> Path:
    """Regenerate every figure and table of a profile into `out`; returns its index.html."""
    load_profile(profile)
    out, durations, notes, clock = Path(out), {}, [], time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    paths = sorted(p for p in NOTEBOOKS.glob("[0-9][0-9]_*.ipynb") if only is None or p.name.startswith(only))
    if not paths:
        raise RunError(f"no notebook {only or ''} in {NOTEBOOKS.resolve()}; run this in the project's folder")
    if only is None:
        with _stage("benchmark", durations):
            benchmark(profile, out, Path(runs), notes, seed)
    run_notebooks(paths, out, profile, seed, durations)
    seconds = time.perf_counter() - clock
    index = write_index(profile, out, durations, notes, seed, seconds)
    print(f"[report] {seconds:.0f} s in all; open {index}", flush=True)
    return index


@contextmanager
def _stage(name: str, durations: dict[str, float]) -> Iterator[None]:
    clock = time.perf_counter()
    yield
    durations[name] = round(time.perf_counter() - clock, 1)
    print(f"[report] {name}: {durations[name]} s", flush=True)


def benchmark(profile: str, out: Path, runs: Path, notes: list[str], seed: int) -> None:
    """Score every method and control on every dataset at hand; one table a dataset."""
    gallery = Gallery("benchmark", out)
    for name in DATASETS:
        try:
            dataset = load_dataset(name)
        except DataError as error:
            notes.append(f"{name} is left out: {error}")
            continue
        methods = with_controls(profile, "divad", seed=seed)
        results = score_all(dataset, methods, runs, PROFILES[profile]["batch_size"])
        measured = evaluate_runs(results)
        own = tabulate(measured[measured["method"] == "divad"], per_category=True)
        gallery.table(name, tabulate(measured), BENCHMARK_CAPTION.format(name=name, count=len(dataset)))
        gallery.table(f"{name}_per_category", own, f"DIVAD on {name}, category by category.")


# --- notebooks


def run_notebooks(paths: list[Path], out: Path, profile: str, seed: int, durations: dict[str, float]) -> None:
    """Execute the notebooks, two at a time on a CPU: the small networks gain little from a second thread."""
    at_once = 1 if torch.cuda.is_available() else 2

    def run(path):
        with _stage(path.stem, durations):
            run_notebook(path, out, profile, seed)

    with _threads(max(1, (os.cpu_count() or 1) // at_once)), ThreadPoolExecutor(at_once) as pool:
        running = [pool.submit(run, path) for path in paths]
        try:
            for done in tqdm(as_completed(running), total=len(paths), desc="notebooks", unit="notebook"):
                done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def run_notebook(path: Path, out: Path, profile: str, seed: int) -> None:
    """Execute one notebook with papermill and write it as HTML too."""
    target = out / "notebooks" / path.name
    target.parent.mkdir(parents=True, exist_ok=True)
    parameters = {"profile": profile, "seed": seed, "out": str(out)}
    try:
        papermill.execute_notebook(path, target, parameters=parameters, progress_bar=False, cwd=".")
    except papermill.PapermillExecutionError as error:
        where = f"{path} failed in cell {error.exec_count}"
        raise RunError(f"{where}: {error.ename}: {error.evalue}; see {target}") from error
    target.with_suffix(".html").write_text(HTMLExporter().from_filename(str(target))[0], encoding="utf-8")


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Kernels started within use `count` threads each, unless the caller has said otherwise."""
    given = "OMP_NUM_THREADS" in os.environ
    os.environ.setdefault("OMP_NUM_THREADS", str(count))
    try:
        yield
    finally:
        if not given:
            del os.environ["OMP_NUM_THREADS"]


# --- the page, and where all came from


def write_index(
    profile: str,
    out: Path,
    durations: dict[str, float],  # of each part, in seconds
    notes: list[str],
    seed: int,
    seconds: float,  # of all of it, by the clock
) -> Path:
    """The page of a finished report, and provenance.json beside it."""
    facts = provenance(profile, seed, durations, seconds)
    store.write_json(out / "provenance.json", facts)
    sections = [_section(name, out, durations[name]) for name in sorted(durations, key=lambda n: (n[0].isdigit(), n))]
    templates = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True)
    page = templates.get_template("page.html.jinja")
    text = page.render(profile=profile, provenance=facts, sections=sections, notes=notes)
    (out / "index.html").write_text(text, encoding="utf-8", errors="replace")
    return out / "index.html"


def _section(name: str, out: Path, seconds: float) -> dict:
    listing, page = out / "exhibits" / f"{name}.jsonl", Path("notebooks") / f"{name}.html"
    exhibits = store.read_lines(listing) if listing.exists() else []
    for exhibit in exhibits:
        if exhibit["kind"] == "table":
            exhibit["html"] = (out / "tables" / f"{exhibit['name']}.html").read_text(encoding="utf-8")
        else:
            with Image.open(out / "figures" / f"{exhibit['name']}.png") as picture:  # 160 pixels an inch, shown as 100
                exhibit["width"], exhibit["height"] = (round(n / 1.6) for n in picture.size)
    return {"name": name, "exhibits": exhibits, "seconds": seconds, "html": page if (out / page).exists() else None}


def provenance(profile: str, seed: int, durations: dict[str, float], seconds: float) -> dict:
    """What it takes to rerun this: code revision, versions, hashes of checkpoints and data, machine, durations."""
    checkpoints, data = {}, {}
    for name in _models(profile):
        entry = manifest.checkpoint_entry(name)
        folder = manifest.local_path(entry)
        checkpoints[name] = manifest.folder_hash(folder) if folder else entry.get("revision")
    for name in DATASETS:
        try:
            data[name] = manifest.folder_hash(load_dataset(name).root)
        except DataError:
            data[name] = None
    return {
        "command": " ".join(["zsad", *sys.argv[1:]]),
        "profile": profile,
        "revision": _git("rev-parse", "HEAD") or "not a git checkout",
        "uncommitted_changes": bool(_git("status", "--porcelain")),
        "seed": seed,
        "checkpoints_sha256": checkpoints,
        "datasets_sha256": data,
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "finished": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "seconds": round(seconds, 1),
        "durations_s": durations,
    }


def _models(profile: str) -> list[str]:
    """The checkpoints of the manifest that a profile names."""
    settings = PROFILES[profile]
    named = [settings, *(part for part in settings.values() if isinstance(part, dict))]
    names = {part.get("backbone") for part in named} | {model for _, model in CROSS[profile].values()}
    names |= {name for part in named for name in part.get("features", "").split("+")}
    return sorted(names & set(manifest.load_manifest()["checkpoints"]))


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""
