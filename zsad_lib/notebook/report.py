"""The report: run the benchmark and every notebook, keep their figures and tables, and say where all came from."""

import csv
import importlib.metadata
import io
import json
import os
import platform
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

import jinja2
import nbformat
import papermill
import torch
from nbconvert import HTMLExporter
from PIL import Image
from tqdm.auto import tqdm

from zsad_lib import manifest
from zsad_lib.data.datasets import load_dataset
from zsad_lib.errors import DataError, RunError
from zsad_lib.evaluation.tables import evaluate_runs, tabulate
from zsad_lib.methods import BASELINES, CONTROLS, make_method, method_options
from zsad_lib.notebook.plots import Gallery
from zsad_lib.profiles import CROSS, PROFILES, profile_options

NOTEBOOKS = Path("notebooks")
DATASETS = ("synthad", "magnetic_tile")
# (method, what is re-initialised): what the diffusion model adds is the distance to the rows below the first
METHODS = [("divad", random) for random in CONTROLS.values()] + [(name, None) for name in BASELINES]
LABELS = {random: label for label, random in CONTROLS.items()}
BENCHMARK_CAPTION = (
    "{name}, {count} images: percent with 95 % bootstrap intervals, mean over categories. Rows below the first are "
    "controls: the same pipeline with an untrained U-Net, with no part of it trained, with untrained features, and "
    "three baselines without any model."
)
PACKAGES = ("torch", "diffusers", "transformers", "numpy", "scipy", "scikit-learn", "scikit-image", "zsad_lib")

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>zsad report, {{ profile }} profile</title>
<style>
 :root { color-scheme: light; --ink: #1b2430; --soft: #5a6573; --line: #dfe3e8; --link: #1a5fb4; }
 body { font: 16px/1.55 system-ui, sans-serif; max-width: 1200px; margin: 0 auto; padding: 2rem 1rem 4rem;
  color: var(--ink); background: #fff; overflow-wrap: anywhere; }
 h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .5rem; }
 h2 { font-size: 1.4rem; margin: 3.5rem 0 0; padding-top: 1.2rem; border-top: 2px solid var(--ink); }
 a { color: var(--link); } code { font-size: .9em; background: #f1f3f5; padding: .1em .3em; border-radius: 3px; }
 .facts, nav small, figcaption { color: var(--soft); } .facts, figcaption { max-width: 78ch; }
 nav ul { list-style: none; padding: 0; margin: 1.5rem 0; } nav li { padding: .3rem 0; }
 nav li > a { font-weight: 600; margin-right: .4em; }
 .missing { background: #fff6e5; border-left: 4px solid #c77700; padding: .6rem .9rem; margin: .6rem 0; }
 figure { margin: 2rem 0 2.8rem; } figure img { display: block; max-width: 100%; height: auto; }
 figcaption { font-size: .92rem; margin-top: .7rem; } figcaption span { white-space: nowrap; }
 .scroll { overflow-x: auto; background: linear-gradient(to left, #fff 50%, #fff0) right / 2rem 100% no-repeat local,
  linear-gradient(to left, #1b243033, #1b243000) right / .9rem 100% no-repeat; } /* a shadow while columns are hidden */
 table { border-collapse: collapse; font-size: .88rem; line-height: 1.4; }
 th, td { border-bottom: 1px solid var(--line); padding: .4em .75em; text-align: right; white-space: nowrap;
  vertical-align: baseline; font-variant-numeric: tabular-nums; }
 .words { text-align: left; } th { font-weight: 600; } thead tr:last-child th { border-bottom: 2px solid var(--ink); }
 th:first-child { text-align: left; position: sticky; left: 0; background: #fff; padding-left: 0; }
 tbody th { font-weight: 500; } tbody th div { white-space: normal; width: max-content; max-width: min(26em, 36vw); }
 tbody tr:hover > * { background: #f4f7fa; }
</style></head><body>
<h1>zsad report, {{ profile }} profile</h1>
<p class="facts">Finished {{ provenance.finished }} after {{ provenance.seconds }} s on {{ provenance.machine }}.<br>
Revision <code>{{ provenance.revision }}</code><br>
Where every number comes from: <a href="provenance.json">provenance.json</a></p>
<nav><ul>{% for s in sections %}<li><a href="#{{ s.name }}">{{ s.name.replace("_", " ")|capitalize }}</a>
<small>{{ s.exhibits|length }} exhibit{{ "" if s.exhibits|length == 1 else "s" }}, {{ s.seconds }} s{% if s.html %},
<a href="{{ s.html }}">the notebook</a>{% endif %}</small></li>{% endfor %}</ul></nav>
{% for note in notes %}<p class="missing">{{ note }}</p>{% endfor %}
{% for s in sections %}<h2 id="{{ s.name }}">{{ s.name.replace("_", " ")|capitalize }}</h2>
{% for e in s.exhibits %}<figure>
{% if e.kind == "figure" %}<a href="figures/{{ e.name }}.svg"><img src="figures/{{ e.name }}.png"
 width="{{ e.width }}" height="{{ e.height }}" alt="{{ e.caption }}"></a>
{% else %}<div class="scroll"><table>
<thead>{% for row in e.head %}<tr>{% for cell in row %}<th{% if e.words[loop.index0] %} class="words"{% endif %}>
{{- cell }}</th>{% endfor %}</tr>{% endfor %}</thead>
<tbody>{% for row in e.body %}<tr>{% for cell in row %}
{%- if loop.first %}<th scope="row"><div>{{ cell }}</div></th>
{%- else %}<td{% if e.words[loop.index0] %} class="words"{% endif %}>{{ cell }}</td>
{%- endif %}{% endfor %}</tr>{% endfor %}</tbody></table></div>
{% endif %}<figcaption>{{ e.caption }}
{% if e.kind == "figure" %}<span>(<a href="figures/{{ e.name }}.svg">SVG</a>)</span>
{% else %}<span>(<a href="tables/{{ e.name }}.csv">CSV</a>, <a href="tables/{{ e.name }}.md">Markdown</a>,
<a href="tables/{{ e.name }}.tex">LaTeX</a>)</span>{% endif %}</figcaption></figure>
{% endfor %}{% endfor %}
</body></html>
"""


@contextmanager
def _stage(name: str, durations: dict[str, float]):
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
        results = {}
        for method_name, random_weights in METHODS:
            options = profile_options(profile, method_name)
            if "seed" in method_options(method_name):
                options["seed"] = seed
            method = make_method(method_name, random_weights=random_weights, **options)
            label = method_name + LABELS[random_weights]
            results[label] = runs.score(dataset, method, runs, PROFILES[profile]["batch_size"])
        measured = evaluate_runs(results)
        own = tabulate(measured[measured["method"] == "divad"], per_category=True)
        gallery.table(name, tabulate(measured), BENCHMARK_CAPTION.format(name=name, count=len(dataset)))
        gallery.table(f"{name}_per_category", own, f"DIVAD on {name}, category by category.")


def run_notebook(path: Path, out: Path, profile: str, seed: int) -> Path:
    """Execute one notebook with papermill and write it as HTML too; returns the HTML file."""
    target = out / "notebooks" / path.name
    target.parent.mkdir(parents=True, exist_ok=True)
    parameters = {"profile": profile, "seed": seed, "out": str(out)}
    try:
        papermill.execute_notebook(path, target, parameters=parameters, progress_bar=False, cwd=".")
    except papermill.PapermillExecutionError as error:
        raise RunError(
            f"{path} failed in cell {error.exec_count}: {error.ename}: {error.evalue}; see {target}"
        ) from error
    html, _ = HTMLExporter().from_notebook_node(nbformat.read(target, as_version=4))
    page = target.with_suffix(".html")
    page.write_text(html)
    return page


@contextmanager
def _threads(count: int):
    """Kernels started within use ``count`` threads each, unless the caller has said otherwise."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = before or str(count)
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]


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


def _models(profile: str) -> list[str]:
    """The checkpoints of the manifest that a profile names."""
    settings = PROFILES[profile]
    named = [settings, *(part for part in settings.values() if isinstance(part, dict))]
    names = {part.get("backbone") for part in named} | {model for _, model in CROSS[profile].values()}
    names |= {name for part in named for name in part.get("features", "").split("+")}
    return sorted(names & set(manifest.load_manifest()["checkpoints"]))


def provenance(profile: str, seed: int, durations: dict[str, float], seconds: float) -> dict:
    """What it takes to rerun this: code revision, versions, hashes of checkpoints and data, machine, durations."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    checkpoints = {}
    for name in _models(profile):
        entry = manifest.checkpoint_entry(name)
        folder = manifest.local_path(entry)
        checkpoints[name] = manifest.folder_hash(folder) if folder else entry.get("revision")
    data = {}
    for name in DATASETS:
        try:
            data[name] = manifest.folder_hash(load_dataset(name).root)
        except DataError:
            data[name] = None
    return {
        "command": " ".join(["zsad", *sys.argv[1:]]),
        "profile": profile,
        "revision": git("rev-parse", "HEAD") or "not a git checkout",
        "uncommitted_changes": bool(git("status", "--porcelain")),
        "seed": seed,
        "checkpoints_sha256": checkpoints,
        "datasets_sha256": data,
        "python": platform.python_version(),
        "packages": {p: importlib.metadata.version(p) for p in PACKAGES},
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "finished": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "seconds": round(seconds, 1),
        "durations_s": durations,
    }


def _table(path: Path) -> dict:
    """The cells of a table of `Gallery` as text, for the page; ``words`` says which columns hold no numbers."""
    rows = list(csv.reader(io.StringIO(Path(f"{path}.csv").read_text())))
    rows = [[f"{float(c):.6g}" if re.fullmatch(r"-?\d+\.\d{7,}", c) else c for c in row] for row in rows]
    # the Markdown's header is one line and a rule, however many levels the columns have
    levels = max(1, len(rows) - (len(Path(f"{path}.md").read_text().splitlines()) - 2))
    head, body = rows[:levels], rows[levels:]
    words = [not any(re.match(r"[-+]?\d", row[c]) for row in body) for c in range(len(head[0]))]
    return {"head": head, "body": body, "words": words}


def _section(name: str, out: Path, seconds: float) -> dict:
    listing = out / "exhibits" / f"{name}.jsonl"
    exhibits = [json.loads(line) for line in listing.read_text().splitlines()] if listing.exists() else []
    for exhibit in exhibits:
        if exhibit["kind"] == "table":
            exhibit.update(_table(out / "tables" / exhibit["name"]))
        else:
            with Image.open(out / "figures" / f"{exhibit['name']}.png") as picture:  # 160 pixels an inch, shown as 100
                exhibit["width"], exhibit["height"] = (round(n / 1.6) for n in picture.size)
    page = Path("notebooks") / f"{name}.html"
    return {"name": name, "exhibits": exhibits, "seconds": seconds, "html": page if (out / page).exists() else None}


def write_index(
    profile: str, out: Path, durations: dict[str, float], notes: list[str], seed: int, seconds: float
) -> Path:
    """The page of a finished report. durations: of each part, in seconds; seconds: of all of it, by the clock."""
    facts = provenance(profile, seed, durations, seconds)
    (out / "provenance.json").write_text(json.dumps(facts, indent=2) + "\n")
    sections = [_section(name, out, durations[name]) for name in sorted(durations, key=lambda n: (n[0].isdigit(), n))]
    template = jinja2.Environment(autoescape=True).from_string(PAGE)
    page = template.render(profile=profile, provenance=facts, sections=sections, notes=notes)
    (out / "index.html").write_text(page)
    return out / "index.html"


def build(
    profile: str = "lite",
    out: str | Path = "artifacts",
    only: str | None = None,
    runs: str | Path = "runs",
    seed: int = 0,
) -> Path:
    """Regenerate every figure and table of a profile into ``out``; returns ``out/index.html``.

    only: the number of one notebook ("02"); the benchmark is then left out. Scores are kept in ``runs`` and used
    again, so an interrupted report goes on where it stopped.
    """
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
