"""The command `zsad`: data, training, scoring, captions, evaluation, the report; each a thin layer over the library.

Every command imports what it needs when it runs, so `zsad --help` answers at once.
"""
# ruff: noqa: B006 (typer copies a default that is a list)

import json
import signal
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer import Argument, Option
from typer.core import TyperGroup

from zsad_lib.errors import ZsadError

EXIT_CODES = (
    "Exit codes: 0 done, 1 found bad (data check), 2 asked wrongly or could not be done, and a line says why; "
    "130 stopped by Ctrl-C, 143 by SIGTERM."
)


def say(*lines: str, err: bool = False) -> None:
    """Print lines; what a terminal would obey or cannot show (control and bidi characters, half characters) is "?"."""
    for line in lines:
        typer.echo("".join(c if c.isprintable() else "?" for c in line), err=err)


class Commands(TyperGroup):
    """The commands, with words where typer itself has none."""

    def invoke(self, ctx: typer.Context) -> Any:
        """Run a command; Ctrl-C ends in exit code 130."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            say("zsad: stopped", err=True)
            raise typer.Exit(130) from None
        except EOFError as error:
            raise ZsadError(f"a file ends too early ({error}): restore or delete it") from error


app = typer.Typer(
    cls=Commands,
    epilog=EXIT_CODES,
    help="Diffusion-based zero-shot anomaly detection: score a dataset, then print the table.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data = typer.Typer(help="Datasets: generate, list, check.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data, name="data")

# options that several commands have
Profile = Annotated[str, Option(help="Names and sizes: lite (offline, CPU) or paper (SD, GPU).")]
Device = Annotated[str, Option(help="auto, cpu or cuda.")]
Runs = Annotated[Path, Option(help="Folder of the run folders.")]
Root = Annotated[Path | None, Option(help="Its folder (default: data/NAME).")]
Categories = Annotated[list[str], Option(help="Only this one; repeatable.")]
Limit = Annotated[int | None, Option(min=1, help="At most so many of each category and defect.")]
Settings = Annotated[list[str], Option("--set", help="Option of the method or recipe, e.g. --set sigma=2; repeatable.")]
Bootstrap = Annotated[int, Option(min=0, help="Resamples behind an interval; 0 for none.")]
Seed = Annotated[int, Option(min=0, max=2**32 - 1, help="Of what is drawn at random.")]


def main() -> None:
    """Entry point of the console script: an error that a user can mend ends in one line and exit code 2."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        app()
    except (ZsadError, OSError, MemoryError, RuntimeError) as error:
        words = _words(error)
        if not words:
            raise
        say(f"zsad: {' '.join(words.split())}", err=True)
        sys.exit(2)


def _words(error: Exception) -> str:
    """What an error says to a user; nothing for what is a mistake of the program."""
    if isinstance(error, ZsadError):
        return str(error)
    if isinstance(error, (OSError, RecursionError)):
        return f"{type(error).__name__}: {error}"
    if isinstance(error, MemoryError) or "memory" in str(error):  # torch has an own kind for each device
        return f"out of memory: use a smaller --batch-size or smaller images ({error})"
    return ""


def _terminate(*_):
    """SIGTERM as an exception, so that what is under way is marked as interrupted."""
    sys.exit(143)


# --- data


@data.command("make")
def data_make(
    name: Annotated[str, Argument(help="synthad, the one dataset that is generated.")] = "synthad",
    out: Annotated[Path, Option(help="Where to.")] = Path("data/synthad"),
) -> None:
    """Generate the procedural dataset; what is there already is kept."""
    from zsad_lib.manifest import dataset_entry, named_function

    entry = dataset_entry(name)
    if "generator" not in entry:
        raise typer.BadParameter(f"{name} is not generated. {entry['fetch'].strip()}")
    named_function(entry, "generator")(out)
    say(f"synthad is in {out}")


@data.command("list")
def data_list() -> None:
    """The datasets of data_manifest.yaml: licence, layout, and how to get them."""
    from zsad_lib.manifest import load_manifest

    for name, entry in load_manifest()["datasets"].items():
        state = "" if entry.get("reader") else " (no reader yet)"
        say(f"{name}{state}: {entry['title']}", f"  licence: {entry['licence']}", f"  layout: {entry['layout']}")
        say(f"  to get it: {' '.join(entry['fetch'].split())}", "")


@data.command("check")
def data_check(
    name: Annotated[str, Argument(help="A dataset of `zsad data list`, or folder.")],
    root: Root = None,
) -> None:
    """Read every image and mask; name the bad ones and exit with code 1 when there are any."""
    from tqdm.auto import tqdm

    from zsad_lib.data.datasets import load_dataset
    from zsad_lib.data.images import load_masks, read_image
    from zsad_lib.errors import DataError

    dataset, bad = load_dataset(name, root, split=None), []
    for sample in tqdm(dataset.samples, unit="img"):
        try:
            read_image(sample.image_path)
            if sample.mask_path:
                load_masks([sample], 64)
        except DataError as error:
            bad.append(str(error))
    say(f"{name} in {dataset.root}: {len(dataset)} images of {len(dataset.categories)} categories")
    for line in bad:
        say(f"bad: {line}")
    say(f"{len(bad)} bad" if bad else "all readable")
    raise typer.Exit(1 if bad else 0)


# --- training and scoring


@app.command()
def train(
    name: Annotated[str, Argument(help="Which model.")],
    out: Annotated[Path | None, Option(help="Where the checkpoint goes.")] = None,
    steps: Annotated[int | None, Option(min=1, help="Training steps (default: the model's own).")] = None,
    data: Annotated[Path | None, Option(help="A folder of images, for a model that trains on one.")] = None,
    train_on: Annotated[
        str | None, Option(help="For dzad and vlmdiff: synthad, synthad-A, synthad-B, or a dataset's name.")
    ] = None,
    options: Settings = [],
    seed: Seed = 0,
    device: Device = "auto",
    resume: Annotated[bool, Option(help="Go on from the last saved state.")] = True,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace a checkpoint that ships, or another's.")] = False,
) -> None:
    """Train one of the compact models of the lite profile, or semantic guidance (dzad, vlmdiff) on any dataset."""
    from zsad_lib.manifest import load_manifest, named_function

    given = _given(out=out, steps=steps, data=data, train_on=train_on) | _parse_pairs(options)
    recipes = named_function(load_manifest(), "recipes")
    path = recipes(name, seed=seed, device=device, resume=resume, overwrite=overwrite, **given)
    say(f"{name} is in {path}")


@app.command()
def convert(
    checkpoint: Annotated[Path, Argument(help="A checkpoint file of VLMDiff, DiAD or DiffPath.")],
    out: Annotated[Path, Option(help="The new folder.")],
    preset: Annotated[str | None, Option(help="Of a model of improved-diffusion, such as diffpath-celeba32.")] = None,
    base: Annotated[str, Option(help="The pipeline it was built on.")] = "stable-diffusion-1.5",
    autoencoder: Annotated[Path | None, Option(help="A file of the fine-tuned autoencoder alone.")] = None,
    hint: Annotated[str, Option(help="How the guide's images were scaled: imagenet or symmetric.")] = "imagenet",
) -> None:
    """Bring the authors' checkpoint into the diffusers layout, safetensors; names what found no place."""
    from zsad_lib.diffusion.convert import convert_checkpoint
    from zsad_lib.diffusion.convert_pixel import convert_pixel_checkpoint

    if preset:
        convert_pixel_checkpoint(checkpoint, out, preset)
        say(f"{out}: every tensor placed")
        return
    unplaced = convert_checkpoint(checkpoint, base, out, autoencoder, hint)
    for key in unplaced:
        say(f"no place for {key}")
    say(f"{out}: every tensor placed" if not unplaced else f"{out}: {len(unplaced)} keys found no place")


@app.command()
def measure(
    docs: Annotated[Path, Option(help="Where the page and its pictures go.")] = Path("docs"),
    out: Runs = Path("runs"),
) -> None:
    """Measure the compact checkpoints: docs/lite_models.md and the numbers in their model cards."""
    from zsad_lite.training import report_card

    say(f"written: {report_card.write_report(docs, out)}, and the model cards")


@app.command()
def score(
    method: Annotated[str, Option(help="A method by name, or all.")] = "divad",
    dataset: Annotated[str, Option(help="A dataset of `zsad data list`, or folder.")] = "synthad",
    root: Root = None,
    profile: Profile = "lite",
    backbone: Annotated[str | None, Option(help="Folder, checkpoint name or hub id (default: the profile's).")] = None,
    features: Annotated[str | None, Option(help="Likewise, for the features of the map.")] = None,
    random_weights: Annotated[
        Literal["unet", "all", "features"] | None,
        Option(help="What the control re-initialises (default: unet); with --only, score just that."),
    ] = None,
    only: Annotated[bool, Option("--only", help="Just --method, no controls beside it.")] = False,
    options: Settings = [],
    captions: Annotated[Path | None, Option(help="File of `zsad caption`, for methods that read one: vlmdiff.")] = None,
    category: Categories = [],
    limit: Limit = None,
    batch_size: Annotated[int | None, Option(min=1, help="Default: the profile's.")] = None,
    out: Runs = Path("runs"),
    device: Device = "auto",
) -> None:
    """Score a dataset by a method, and by the controls that belong in the same table.

    Unless --only is given, a method with a model is scored again with random weights in its U-Net, and so are
    the baselines without any model: local_contrast, median, patch_knn. A dataset without labels gets no
    controls. A --set counts for every method that has the option, and so do --captions. An interrupted
    command, started again, goes on where it stopped; `zsad evaluate` prints the table.
    """
    from zsad_lib import profiles
    from zsad_lib.data.datasets import load_dataset
    from zsad_lib.evaluation import runs
    from zsad_lib.evaluation.labels import run_label

    settings = profiles.load_profile(profile)
    images = load_dataset(dataset, root, categories=category or None, limit=limit)
    labelled = any(sample.label >= 0 for sample in images.samples)
    plan = _plan(method, only or not labelled, random_weights)
    known = {name: profiles.options_of(name) for name, _ in plan}
    chosen = _parse_pairs(options, sorted({key for names in known.values() for key in names}))
    chosen |= _given(backbone=backbone, features=features, captions=captions and _read_captions(captions, known))

    def scorers():
        for name, random in plan:
            own = {key: value for key, value in chosen.items() if key in (*known[name], "backbone", "features")}
            yield f"{name}, {random}", profiles.make(profile, name, random, device, **own)

    for results in runs.score_all(images, scorers(), out, batch_size or settings["batch_size"]).values():
        seconds = results.run["seconds"] / len(images)
        say(f"{run_label(results.run)}: {len(images)} images, {seconds:.3g} s each, in {results.folder}")
    if labelled:
        say(f"the table: zsad evaluate --out {out} --dataset {dataset}")
    else:
        from zsad_lib.notebook.plots import save_heatmaps

        say(f"no labels here, so no table and no controls: the scores are in {results.folder}/scores.csv")
        if results.maps is not None:
            pictures = save_heatmaps(results, images.samples, results.folder / "heatmaps")
            say(f"pictures, most anomalous first: {pictures}")


def _plan(method: str, only: bool, random_weights: str | None) -> list[tuple[str, str | None]]:
    """(method, random weights) of each run to make: methods, their random-weights controls, the baselines."""
    from zsad_lib.methods import BASELINES, METHODS

    named = [name for name in METHODS if name not in BASELINES] if method == "all" else [method]
    if only or method in BASELINES:
        return [(name, random_weights) for name in named]
    plan = [(name, weights) for name in named for weights in (None, random_weights or "unet")]
    return plan + [(name, None) for name in BASELINES]


def _read_captions(path: Path, planned: Iterable[str]) -> dict[str, str]:
    """{image id: caption} of a caption file, once some method of the plan reads captions."""
    from zsad_lib.data.captions import read_captions
    from zsad_lib.methods import METHODS, method_options

    readers = [name for name in METHODS if "captions" in method_options(name)]
    if not set(readers) & set(planned):
        raise typer.BadParameter(f"--captions: {next(iter(planned))} reads none; these do: {', '.join(readers)}")
    return read_captions(path)


def _given(**options: Any) -> dict[str, Any]:
    """The options that the command line has a value for; the library has the defaults of the others."""
    return {key: value for key, value in options.items() if value not in (None, [], "")}


def _parse_pairs(pairs: list[str], known: list[str] | None = None) -> dict:
    """["start=matched", "sigma=2"] -> {"start": "matched", "sigma": 2}: values are JSON, else text."""
    chosen = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals or (known and key not in known):
            names = f" with a name of {', '.join(known)}" if known else ""
            raise typer.BadParameter(f"--set {pair}: expected NAME=VALUE{names}")
        try:
            chosen[key] = json.loads(value, parse_constant=partial(_refuse, pair))
        except ValueError:
            chosen[key] = value
    return chosen


def _refuse(pair: str, constant: str) -> None:
    """NaN and Infinity are no JSON, though Python reads them."""
    raise typer.BadParameter(f"--set {pair}: {constant} is no number to count with")


@app.command()
def caption(
    dataset: Annotated[str, Argument(help="A dataset of `zsad data list`, or folder.")],
    root: Root = None,
    model: Annotated[str, Option(help="Folder, checkpoint name, or hub id of a captioner.")] = "lite-captioner",
    revision: Annotated[str | None, Option(help="Branch, tag or commit of a hub model.")] = None,
    prompt_type: Annotated[
        Literal["objects", "scenes", "inspector"],
        Option(help="What to ask: the main object, the whole scene, or an inspector's question."),
    ] = "objects",
    prompt: Annotated[str | None, Option(help="Ask this instead.")] = None,
    split: Annotated[Literal["test", "train", "both"], Option(help="Which images.")] = "test",
    category: Categories = [],
    limit: Limit = None,
    batch_size: Annotated[int, Option(min=1, help="Images at a time.")] = 8,
    out: Annotated[
        Path | None, Option(help="The file (default: runs/captions/DATASET-MODEL-PROMPTTYPE.jsonl).")
    ] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Start the file anew.")] = False,
    device: Device = "auto",
) -> None:
    """Describe the images of a dataset in words: a JSON Lines file with id, caption, model, revision and prompt.

    An interrupted command, started again, goes on where it stopped; other selections of a dataset add to its file.
    lite-captioner knows the drawings of synthad and takes no prompt.
    """
    from zsad_lib.data import captions
    from zsad_lib.data.datasets import load_dataset
    from zsad_lib.errors import ModelError

    images = load_dataset(dataset, root, category or None, None if split == "both" else split, limit)
    captioner = captions.load_captioner(model, device, revision)
    if prompt is not None and not captioner.prompted:
        raise ModelError(f"{captioner.name} takes no prompt: leave --prompt out, or choose another --model")
    path = out or captions.caption_path(dataset, captioner.name, prompt_type if prompt is None else "custom")
    text = captions.PROMPTS[prompt_type] if prompt is None else prompt
    said = captions.caption_dataset(images, captioner, path, text, batch_size, overwrite=overwrite)
    empty = sum(not words for words in said.values())
    note = f", {empty} of them empty" if empty else ""
    say(f"{dataset} by {captioner.name} ({captioner.revision}): {len(said)} captions{note}, in {path}")


# --- tables and report


def _markdown(table: Any) -> str:
    from zsad_lib.evaluation.tables import markdown

    return markdown(table.reset_index(), index=False)


def _write(folder: Path, numbers: Any, tables: dict[str, Any]) -> None:
    """The numbers as aurocs.csv, each table as a Markdown file."""
    from zsad_lib import store

    folder.mkdir(parents=True, exist_ok=True)
    text = store.csv_text(numbers, index=False)
    (folder / "aurocs.csv").write_text(text, encoding="utf-8", errors="replace")
    for name, table in tables.items():
        (folder / f"{name}.md").write_text(_markdown(table) + "\n", encoding="utf-8", errors="replace")


@app.command()
def evaluate(
    runs: Annotated[list[Path], Argument(help="Run folders (default: the finished ones in --out).")] = [],
    out: Runs = Path("runs"),
    dataset: Annotated[str | None, Option(help="Only runs on this dataset.")] = None,
    per_category: Annotated[bool, Option("--per-category", help="A row for each category.")] = False,
    per_defect: Annotated[bool, Option("--per-defect", help="A row for each defect type.")] = False,
    variant: Annotated[
        Literal["exact", "official"], Option(help="exact, or the metrics of the DIVAD/VLMDiff code: official.")
    ] = "exact",
    bootstrap: Bootstrap = 200,
    format: Annotated[
        Literal["table", "csv", "markdown", "latex"], Option(help="csv: the bare numbers; others: the table.")
    ] = "table",
) -> None:
    """Print one table: methods as rows; image and pixel AUROC, AP, F1-max and AUPRO, in percent, with 95 %
    bootstrap intervals, as columns. Runs over the same images of a dataset stand together."""
    import pandas as pd

    from zsad_lib import store
    from zsad_lib.evaluation.labels import find_runs, grouped
    from zsad_lib.evaluation.tables import evaluate_runs, tabulate

    loaded, left_out = find_runs(out, dataset, runs)
    for reason in left_out:
        say(f"left out, {reason}", err=True)
    numbers, tables, notes = {}, {}, []
    for title, group in grouped(loaded).items():
        numbers[title] = evaluate_runs(group, per_defect=per_defect, variant=variant, n_bootstrap=bootstrap)
        tables[title] = tabulate(numbers[title], per_category=per_category or per_defect)
        notes += tables[title].attrs["notes"]
    if format == "csv":
        numbers = pd.concat(numbers, names=["dataset", None]).reset_index("dataset")
        say(*store.csv_text(numbers, index=False).splitlines())
        return
    table = pd.concat(tables, names=["dataset"])
    notes.append(f"percent [95 % bootstrap interval], {variant} metrics; the mean over categories")
    texts = {
        "latex": lambda: table.to_latex(escape=True),
        "markdown": lambda: _markdown(table),
        "table": table.to_string,
    }
    say(*texts[format]().split("\n"))
    for note in notes:
        say(note, err=format != "table")


@app.command()
def ood(
    base: Annotated[list[str], Option(help="Base model: a folder, checkpoint name or hub id; repeatable.")] = [],
    known: Annotated[
        list[str], Option("--in", help="Usual set; repeatable (default: synthad, cifar10, photographs).")
    ] = [],
    others: Annotated[list[str], Option("--out-set", help="Set to tell from it; repeatable (default: eight).")] = [],
    reading: Annotated[str | None, Option(help="The matrix's (default: the best that the abstract allows).")] = None,
    train: Annotated[int, Option(min=1, help="Images of a set that densities are fitted on.")] = 200,
    test: Annotated[int, Option(min=1, help="Images of a set that are scored.")] = 96,
    control: Annotated[bool, Option(help="Also the first base with random weights.")] = True,
    bootstrap: Bootstrap = 200,
    seed: Seed = 0,
    out: Annotated[Path, Option(help="Where features are kept and the tables go.")] = Path("runs/ood"),
    device: Device = "auto",
) -> None:
    """In-distribution set × other set × base model: AUROCs of whole images, and every reading beside DiffPath.

    Features of each image are computed once and kept in --out; a later call goes on from there. Sets whose folder is
    not at hand are left out. As it stands it takes 10 minutes of one CPU core. The tables are also written to --out,
    as aurocs.csv, matrix.md and readings.md.
    """
    from zsad_lib.papers import ood

    if reading and reading not in ood.all_readings(train):
        raise typer.BadParameter(f"no reading {reading!r}; there are: {'; '.join(ood.all_readings(train))}")
    counts = {"train": train, "test": test, "control": control, "n_bootstrap": bootstrap, "seed": seed}
    named, progress = _given(bases=base, ins=known, outs=others), sys.stderr.isatty()
    frame = ood.study(**named, **counts, folder=out, device=device, progress=progress)
    reading = reading or ood.best_allowed(frame)
    matrix, readings = ood.matrix(frame, reading).fillna(""), ood.compare(frame)
    _write(out, frame, {"matrix": matrix, "readings": readings})
    say(f"{reading}: AUROC of whole images, percent [95 % bootstrap interval]", "", *matrix.to_string().split("\n"))
    say("", "every reading, mean over the other sets, best first", "", *readings.to_string().split("\n"))
    if frame.attrs["left_out"]:
        say(f"left out, no such folder at hand: {', '.join(frame.attrs['left_out'])}")


@app.command()
def dzad(
    profile: Profile = "lite",
    target: Annotated[
        list[str], Option(help="Set to test on; repeatable (default: all of the cross protocol at hand).")
    ] = [],
    limit: Limit = None,
    every: Annotated[int, Option(min=1, help="Of a target's images only each so-many-th.")] = 1,
    reference_limit: Annotated[int, Option(min=1, help="At most so many of each defect of the auxiliary set.")] = 1,
    bootstrap: Bootstrap = 200,
    seed: Seed = 0,
    out: Annotated[Path, Option(help="Where what is measured is kept and the tables go.")] = Path("runs/dzad"),
    device: Device = "auto",
) -> None:
    """DZAD's Tables 1 to 4 across auxiliary sets and targets, what the paper prints beside what is measured.

    Every image is measured once and kept in --out; a later call goes on from there. Targets whose folder is not at hand
    are left out. In the lite profile it takes five minutes of one CPU core for the two halves of synthad. The tables
    are also written to --out, as aurocs.csv and a Markdown file each.
    """
    from tqdm.auto import tqdm

    from zsad_lib import profiles
    from zsad_lib.papers import dzad_tables

    profiles.load_profile(profile)
    directions = profiles.crosses(profile, target or None, device)
    chosen = {"limit": limit, "every": every, "reference_limit": reference_limit, "n_bootstrap": bootstrap}
    progress = tqdm if sys.stderr.isatty() else None
    tables, frame, left_out = dzad_tables.study(
        directions, profiles.smoothing(profile), profile, **chosen, seed=seed, folder=out, progress=progress
    )
    _write(out, frame, tables)
    say("AUROC in percent [95 % bootstrap interval], means over categories but in table 1")
    for name, table in tables.items():
        say("", name, "", *table.to_string().split("\n"))
    for name, reason in left_out.items():
        say(f"left out: {name}: {reason}")


@app.command()
def report(
    profile: Profile = "lite",
    out: Annotated[Path, Option(help="Where the figures and tables go.")] = Path("artifacts"),
    only: Annotated[str | None, Option(help="Only the notebook with this number, such as 02.")] = None,
    seed: Seed = 0,
) -> None:
    """Regenerate every figure and table, with its provenance."""
    from zsad_lib.notebook import report

    report.build(profile=profile, out=out, only=only, seed=seed)
