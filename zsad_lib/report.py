"""The report: run the benchmark and every notebook, keep their figures and tables, and say where all came from."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import jinja2
import nbformat
import papermill
from nbconvert import HTMLExporter
from tqdm.auto import tqdm

from zsad_lib import manifest, scoring
from zsad_lib.datasets import DatasetError, load_dataset
from zsad_lib.methods import make_method
from zsad_lib.plots import Gallery
from zsad_lib.profiles import PROFILES, profile_options

NOTEBOOKS = Path("notebooks")
DATASETS = ("synthad", "magnetic_tile")
METHODS = (  # (method, random weights): what the diffusion model adds is the distance to the rows below it
    ("divad", None), ("divad", "unet"), ("divad", "all"),
    ("local_contrast", None), ("median", None), ("patch_knn", None),
)  # fmt: skip
CONTROL = {None: "", "unet": " (random U-Net)", "all": " (random weights)"}
BENCHMARK_CAPTION = (
    "{name}, {count} images: percent with 95 % bootstrap intervals, mean over categories. Rows below the first are "
    "controls: the same pipeline with an untrained U-Net, with nothing trained at all, and three baselines without "
    "any model."
)
PACKAGES = ("torch", "diffusers", "transformers", "numpy", "scipy", "scikit-learn", "scikit-image", "zsad_lib")

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>zsad report, {{ profile }} profile</title>
<style>
 body { font: 16px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2em auto; padding: 0 1em; color: #222; }
 figure { margin: 2em 0; } figure > img { max-width: 100%; height: auto; }
 figcaption { color: #555; font-size: .92em; margin-top: .4em; }
 .scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .85em; }
 th, td { border-bottom: 1px solid #ddd; padding: .3em .7em; text-align: right; white-space: nowrap; }
 th:first-child, td:first-child { text-align: left; } nav li { margin: .2em 0; } .missing { color: #a40; }
 code { background: #f4f4f4; padding: .1em .3em; }
</style></head><body>
<h1>zsad report, {{ profile }} profile</h1>
<p>Revision <code>{{ provenance.revision }}</code>, {{ provenance.finished }}, {{ provenance.seconds }} s on
{{ provenance.machine }}. Where every number comes from: <a href="provenance.json">provenance.json</a>.</p>
<nav><ul>{% for s in sections %}<li><a href="#{{ s.name }}">{{ s.name }}</a>: {{ s.exhibits|length }} exhibits,
{{ s.seconds }} s{% if s.html %} (<a href="{{ s.html }}">the notebook</a>){% endif %}</li>{% endfor %}</ul></nav>
{% for note in notes %}<p class="missing">{{ note }}</p>{% endfor %}
{% for s in sections %}<h2 id="{{ s.name }}">{{ s.name }}</h2>
{% for e in s.exhibits %}<figure>
{% if e.kind == "figure" %}<img src="figures/{{ e.name }}.png" alt="{{ e.caption }}">
{% else %}<div class="scroll">{{ e.html }}</div>{% endif %}
<figcaption>{{ e.caption }}
{% if e.kind == "figure" %}(<a href="figures/{{ e.name }}.svg">SVG</a>)
{% else %}(<a href="tables/{{ e.name }}.csv">CSV</a>, <a href="tables/{{ e.name }}.md">Markdown</a>,
<a href="tables/{{ e.name }}.tex">LaTeX</a>){% endif %}</figcaption></figure>
{% endfor %}{% endfor %}
</body></html>
"""


class ReportError(RuntimeError):
    """A notebook failed or does not exist; the message says which and where to look."""


@contextmanager
def _stage(name: str, durations: dict[str, float]):
    clock = time.perf_counter()
    yield
    durations[name] = round(time.perf_counter() - clock, 1)
    print(f"[report] {name}: {durations[name]} s", flush=True)


def benchmark(profile: str, out: Path, runs: Path, notes: list[str], device: str = "auto") -> None:
    """Score every method and control on every dataset at hand; one table a dataset."""
    gallery = Gallery("benchmark", out)
    for name in DATASETS:
        try:
            dataset = load_dataset(name)
        except DatasetError as error:
            notes.append(f"{name} is left out: {error}")
            continue
        results = {}
        for method_name, random_weights in METHODS:
            options = profile_options(profile, method_name)
            method = make_method(method_name, device=device, random_weights=random_weights, **options)
            label = method_name + CONTROL[random_weights]
            results[label] = scoring.score(dataset, method, runs, PROFILES[profile]["batch_size"])
        measured = scoring.measure(results)
        own = scoring.tabulate(measured[measured["method"] == "divad"], per_category=True)
        gallery.table(name, scoring.tabulate(measured), BENCHMARK_CAPTION.format(name=name, count=len(dataset)))
        gallery.table(f"{name}_per_category", own, f"DIVAD on {name}, category by category.")


def run_notebook(path: Path, out: Path, profile: str) -> Path:
    """Execute one notebook with papermill and write it as HTML too; returns the HTML file."""
    target = out / "notebooks" / path.name
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        papermill.execute_notebook(
            path, target, parameters={"profile": profile, "out": str(out)}, progress_bar=False, cwd="."
        )
    except papermill.PapermillExecutionError as error:
        raise ReportError(
            f"{path} failed in cell {error.exec_count}: {error.ename}: {error.evalue}; see {target}"
        ) from error
    html, _ = HTMLExporter().from_notebook_node(nbformat.read(target, as_version=4))
    page = target.with_suffix(".html")
    page.write_text(html)
    return page


def provenance(profile: str, durations: dict[str, float]) -> dict:
    """What it takes to rerun this: code revision, versions, hashes of checkpoints and data, machine, durations."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    checkpoints = {}
    for role in ("backbone", "features"):
        entry = manifest.checkpoint_entry(PROFILES[profile][role])
        folder = manifest.local_path(entry)
        checkpoints[PROFILES[profile][role]] = manifest.folder_hash(folder) if folder else entry.get("revision")
    data = {}
    for name in DATASETS:
        try:
            data[name] = manifest.folder_hash(load_dataset(name).root)
        except DatasetError:
            data[name] = None
    return {
        "command": " ".join(["zsad", *sys.argv[1:]]),
        "profile": profile,
        "revision": git("rev-parse", "HEAD") or "not a git checkout",
        "uncommitted_changes": bool(git("status", "--porcelain")),
        "seed": 0,
        "checkpoints_sha256": checkpoints,
        "datasets_sha256": data,
        "python": platform.python_version(),
        "packages": {p: importlib.metadata.version(p) for p in PACKAGES},
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "finished": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "seconds": round(sum(durations.values()), 1),
        "durations_s": durations,
    }


def _section(name: str, out: Path, seconds: float) -> dict:
    import pandas as pd

    listing = out / "exhibits" / f"{name}.jsonl"
    exhibits = [json.loads(line) for line in listing.read_text().splitlines()] if listing.exists() else []
    for exhibit in exhibits:
        if exhibit["kind"] == "table":
            frame = pd.read_csv(out / "tables" / f"{exhibit['name']}.csv", index_col=0)
            exhibit["html"] = frame.to_html(border=0, na_rep="")
    page = Path("notebooks") / f"{name}.html"
    return {"name": name, "exhibits": exhibits, "seconds": seconds, "html": page if (out / page).exists() else None}


def write_index(profile: str, out: Path, durations: dict[str, float], notes: list[str]) -> Path:
    facts = provenance(profile, durations)
    (out / "provenance.json").write_text(json.dumps(facts, indent=2) + "\n")
    sections = [_section(name, out, seconds) for name, seconds in durations.items()]
    template = jinja2.Environment(autoescape=True).from_string(PAGE)
    for section in sections:
        for exhibit in section["exhibits"]:
            if "html" in exhibit:
                exhibit["html"] = jinja2.filters.Markup(exhibit["html"])
    page = template.render(profile=profile, provenance=facts, sections=sections, notes=notes)
    (out / "index.html").write_text(page)
    return out / "index.html"


def build(profile: str = "lite", out: str | Path = "artifacts", only: str | None = None, runs="runs") -> Path:
    """Regenerate every figure and table of a profile into ``out``; returns ``out/index.html``.

    only: the number of one notebook ("02"); the benchmark is then left out. Scores are kept in ``runs`` and used
    again, so an interrupted report goes on where it stopped.
    """
    out, durations, notes = Path(out), {}, []
    out.mkdir(parents=True, exist_ok=True)
    paths = sorted(p for p in NOTEBOOKS.glob("[0-9][0-9]_*.ipynb") if only is None or p.name.startswith(only))
    if not paths:
        raise ReportError(f"no notebook {only or ''} in {NOTEBOOKS.resolve()}; run this in the project's folder")
    if only is None:
        with _stage("benchmark", durations):
            benchmark(profile, out, Path(runs), notes)
    for path in tqdm(paths, desc="notebooks", unit="notebook"):
        with _stage(path.stem, durations):
            run_notebook(path, out, profile)
    index = write_index(profile, out, durations, notes)
    print(f"[report] {sum(durations.values()):.0f} s in all; open {index}", flush=True)
    return index
