"""What the compact checkpoints can do: the numbers of their model cards and of docs/lite_models.md, and the pictures.

`write_report` makes all of them; notebook 90 uses the pieces. Intervals are 95 % bootstrap intervals.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from matplotlib.figure import Figure

from zsad_lib import manifest
from zsad_lib.anomaly.features import load_features
from zsad_lib.data.captions import load_captioner
from zsad_lib.data.datasets import data_folder, load_dataset
from zsad_lib.data.images import load_images
from zsad_lib.diffusion import ddim
from zsad_lib.diffusion.guidance import load_guided
from zsad_lib.diffusion.latent import load_backbone
from zsad_lib.diffusion.pixel import load_pixel_model
from zsad_lib.errors import DataError
from zsad_lib.evaluation.runs import Results, score_all
from zsad_lib.evaluation.tables import compare
from zsad_lib.methods import CONTROLS
from zsad_lib.notebook import plots
from zsad_lib.profiles import load_profile, with_controls
from zsad_lib.training.cards import read_log
from zsad_lite import synthad
from zsad_lite.synthad.truth import check_captions
from zsad_lite.training.pools import photograph_crops

PIPELINES = {"lite-foundation": "AB", "lite-group-a": "A", "lite-group-b": "B"}  # and the groups each was trained on
GUIDED = ("lite-dzad-a", "lite-dzad-b", "lite-vlmdiff")
PIXEL_MODELS = ("lite-ddpm-synthad", "lite-ddpm-cifar10")
CAPTIONER = "lite-captioner"
UNSEEN = ("cell", "clock", "microaneurysms", "text")  # photographs of scikit-image that no training used
NEAR = {"t_latent": 1, "t_denoise": 41}  # what a group's model redraws is new to it: it starts from little noise
TESTS = {  # the groups that are tested, and DIVAD's options
    "foundation": ("AB", {"backbone": "lite-foundation", "features": "lite-features+pixels"}),
    "A to B": ("B", {"backbone": "lite-group-a", "features": "pixels", **NEAR}),
    "B to A": ("A", {"backbone": "lite-group-b", "features": "pixels", **NEAR}),
}
METRICS = ("image_auroc", "pixel_auroc", "aupro")
INTERVALS = "Cells: value [95 % bootstrap interval]. `zsad measure` repeats all of it."
PAGE = f"""# The compact checkpoints

What the lite profile runs on: small models in the directory layouts of their large relatives, trained from normal
images only. `zsad train NAME --overwrite` repeats a training, `notebooks/90_train_the_lite_models.ipynb` shows how it
is done, and each folder of `checkpoints/` has a model card.

{INTERVALS}
"""
MARK = "<!-- measured by `zsad measure` -->"


def mean_interval(values: Sequence[float], resamples: int = 1000) -> str:
    """The mean with its 95 % bootstrap interval, as a cell: "28.2 [27.9, 28.5]"."""
    values = np.asarray(values, dtype=float)
    draws = values[np.random.default_rng(0).integers(0, len(values), (resamples, len(values)))].mean(1)
    low, high = np.quantile(draws, (0.025, 0.975))
    return f"{values.mean():.1f} [{low:.1f}, {high:.1f}]"


def held_out_drawings(category: str, count: int, size: int = 64) -> tuple[torch.Tensor, list[str]]:
    """Normal drawings that no training and no benchmark holds: images [count,3,size,size] in [0,1] and captions."""
    drawings = [synthad.draw(category, f"heldout/{k}", size=size) for k in range(count)]
    return _images([d.image for d in drawings]), [d.caption for d in drawings]


def strange_photographs(name: str, count: int) -> torch.Tensor:
    """Crops [count,3,64,64] in [0,1] of one of UNSEEN."""
    return _images(photograph_crops(name, 0, count, 64)[0])


def _images(pixels: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255


def trained_on(name: str) -> list[str]:
    """The categories of a pipeline of PIPELINES."""
    return [c for group in PIPELINES[name] for c in synthad.GROUPS[group]]


def _folder(name: str) -> Path:
    return manifest.local_path(manifest.checkpoint_entry(name))


# --- what each model can do ---------------------------------------------------------------------------------------


@torch.inference_mode()
def autoencoder_table(per_category: int = 16) -> pd.DataFrame:
    """PSNR in dB of the autoencoder that all pipelines share: new drawings of each category, and new kinds of image."""
    backbone = load_backbone("lite-foundation")

    def psnr(x):
        return -10 * torch.log10((backbone.decode(backbone.encode(x)).cpu() - x).square().mean((1, 2, 3)))

    drawn = {category: psnr(held_out_drawings(category, per_category)[0]) for category in synthad.CATEGORIES}
    strange = {f"photograph of {name}": psnr(strange_photographs(name, per_category)) for name in UNSEEN}
    rows = {"all categories": torch.cat([*drawn.values()]), **drawn, **strange}
    cells = {name: mean_interval(values) for name, values in rows.items()}
    return pd.DataFrame({"PSNR in dB": cells}).rename_axis("images")


def captioner_table(per_category: int = 16) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(table, statements) of the captioner on held-out drawings: percent right by category; `check_captions`."""
    captioner, parts = load_captioner(CAPTIONER), []
    for category in synthad.CATEGORIES:
        images, truth = held_out_drawings(category, per_category)
        parts.append(check_captions(captioner(images), truth).assign(category=category))
    statements = pd.concat(parts, ignore_index=True)

    def cells(part):
        named = part["attribute"] == "category"
        per_image = part[~named].groupby(["category", "image"])["right"].mean()
        return {"category": mean_interval(100 * part[named]["right"]), "attributes": mean_interval(100 * per_image)}

    table = {category: cells(part) for category, part in statements.groupby("category", sort=False)}
    return pd.DataFrame({**table, "all": cells(statements)}).T.rename_axis("percent right"), statements


@torch.inference_mode()
def draw_samples(
    name: str,
    categories: Sequence[str] | None = None,  # default: those it was trained on
    count: int = 3,  # of each
    steps: int = 25,
    guidance_scale: float = 2.5,
    seed: int = 0,
) -> torch.Tensor:
    """Images [N,3,64,64] in [0,1] that a pipeline draws when asked for categories."""
    backbone = load_backbone(name)
    nouns = [synthad.CATEGORIES[c].noun for c in categories or trained_on(name) for _ in range(count)]
    cond = backbone.embed([f"An image of a {noun}" for noun in nouns])
    uncond = backbone.embed([""]).expand_as(cond)
    noise = torch.randn(len(nouns), *backbone.latent_shape, generator=torch.Generator().manual_seed(seed))
    predict = partial(backbone.predict_noise, cond=cond, uncond=uncond, guidance_scale=guidance_scale)
    return backbone.decode(ddim.denoise(predict, noise.to(backbone.device), backbone.alphas_cumprod, steps)).cpu()


def samples_table(names: Sequence[str] = tuple(PIPELINES), count: int = 12) -> pd.DataFrame:
    """How often the captioner names the category that a pipeline was asked to draw, in percent."""
    captioner, rows = load_captioner(CAPTIONER), {}
    for name in names:
        asked = [f"An image of a {synthad.CATEGORIES[c].noun}" for c in trained_on(name) for _ in range(count)]
        said = captioner(draw_samples(name, count=count))
        right = [100 * (sentence.split(", ")[0] == noun) for sentence, noun in zip(said, asked, strict=True)]
        rows[name] = {"samples": len(asked), "category recognised": mean_interval(right)}
    return pd.DataFrame(rows).T


def megabytes(folder: str | Path) -> float:
    """What a checkpoint adds to the repository; weights that are links count where they are."""
    return round(sum(file.lstat().st_size for file in Path(folder).rglob("*") if file.is_file()) / 1e6, 1)


def loading_table() -> pd.DataFrame:
    """Megabytes on disk and seconds to load, of every checkpoint; a guide of DZAD is loaded with its base."""
    loaders = dict.fromkeys(PIPELINES, load_backbone) | {"lite-features": load_features}
    loaders |= dict.fromkeys(PIXEL_MODELS, load_pixel_model) | {CAPTIONER: load_captioner}
    rows = {}
    for name, load in (loaders | dict.fromkeys(GUIDED, load_guided)).items():
        folder = _folder(name)
        load(folder)  # the first one also pays for imports
        start = time.perf_counter()
        load(folder)
        seconds = time.perf_counter() - start
        rows[name] = {"MB": megabytes(folder), "seconds to load": round(seconds, 2)}
    return pd.DataFrame(rows).T


def score_test(
    test: str,
    dataset: str = "synthad",  # the groups of the test; or another one, whole
    root: str | Path | None = None,
    controls: dict[str, str | None] = CONTROLS,
    features: str | None = None,  # in place of the test's own
    runs: str | Path = "runs",
    progress: bool = True,
) -> dict[str, Results]:
    """{label: Results} of DIVAD with the models of TESTS[test], its controls and the baselines, in run folders."""
    groups, options = TESTS[test]
    options = options | {"features": features or options["features"]}
    categories = [c for group in groups for c in synthad.GROUPS[group]] if dataset == "synthad" else None
    images = load_dataset(dataset, root, categories=categories)
    if options["features"] == "pixels":  # nothing in them to leave untrained
        controls = {suffix: random for suffix, random in controls.items() if random != "features"}
    methods = with_controls("lite", "divad", controls, **options)
    return score_all(images, methods, runs, load_profile("lite")["batch_size"], progress)


@torch.inference_mode()
def noise_error_table(
    images: torch.Tensor,  # [B,3,32,32] in [0,1]
    timesteps: Sequence[int] = (50, 200, 500),
    names: Sequence[str] = PIXEL_MODELS,
) -> pd.DataFrame:
    """How well each pixel model predicts the noise in images: mean squared error times 1000.

    The same noise for every model; 1000 is what predicting no noise at all would give.
    """
    rows = {}
    for name in names:
        model = load_pixel_model(name, "cpu")
        clean, levels = model.to_pixels(images), model.alphas_cumprod.tolist()
        rows[name] = _noise_errors(model.predict_noise, clean, levels, timesteps)
    return pd.DataFrame(rows).T.rename_axis("noise error")


def _noise_errors(predict, clean, alphas_cumprod, timesteps):
    noise, row = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)), {}
    for t in timesteps:
        error = predict(ddim.add_noise(clean, noise, alphas_cumprod[t]), t) - noise
        row[f"t = {t}"] = mean_interval(1000 * error.square().mean((1, 2, 3)))
    return row


@torch.inference_mode()
def guidance_table(
    names: Sequence[str] = GUIDED, per_category: int = 8, timesteps: Sequence[int] = (101, 501, 901)
) -> pd.DataFrame:
    """What the guides learned: noise errors times 1000 on held-out drawings of either group, at each timestep.

    The same noise for every row. Of DZAD's models with the base they started from, of VLMDiff's with the captions.
    """
    rows = {}
    for name, (group, categories) in product(names, synthad.GROUPS.items()):
        drawn = [held_out_drawings(category, per_category) for category in categories]
        images, said = torch.cat([x for x, _ in drawn]), [caption for _, words in drawn for caption in words]
        model, silent = load_guided(name, "cpu"), [""] * len(images)
        backbone, guided, base = model.backbone, model.condition_on(images), model.facts.get("base")
        plain, latents = "its base, without a guide" if base else "without the guide", backbone.encode(images)
        kinds = {plain: (load_backbone(base or name, "cpu"), silent), "with the guide": (guided, silent)}
        if "captioner" in model.facts:
            kinds["with the guide and the caption"] = guided, said
        for how, (network, words) in kinds.items():
            predict = partial(network.predict_noise, cond=backbone.embed(words))
            row = _noise_errors(predict, latents, backbone.alphas_cumprod, timesteps)
            rows[f"{name}, group {group}: {how}"] = row
    return pd.DataFrame(rows).T.rename_axis("noise error")


# --- pictures -------------------------------------------------------------------------------------------------------


def samples_figure(name: str, count: int = 3) -> Figure:
    """What a pipeline draws when asked for each of its categories."""
    drawn = draw_samples(name, count=count).unflatten(0, (-1, count))
    titles = [synthad.CATEGORIES[c].noun for c in trained_on(name)]
    return plots.picture_grid([list(drawn[:, k]) for k in range(count)], titles, size=1.1)


@torch.inference_mode()
def reconstruction_figure() -> Figure:
    """A held-out drawing of each category and photographs never seen, above what the autoencoder makes of them."""
    drawn = [held_out_drawings(category, 1)[0] for category in synthad.CATEGORIES]
    x = torch.cat([*drawn, *(strange_photographs(name, 1) for name in UNSEEN)])
    backbone = load_backbone("lite-foundation")
    titles = [scene.noun for scene in synthad.CATEGORIES.values()] + list(UNSEEN)
    return plots.picture_grid([list(x), list(backbone.decode(backbone.encode(x)).cpu())], titles, size=0.9)


def pixel_samples_figure(name: str, count: int = 12, steps: int = 50, seed: int = 0) -> Figure:
    """What an unconditional pixel model draws, by DDIM with clipped estimates."""
    model = load_pixel_model(name, "cpu")
    pipeline = DDIMPipeline(model.unet, DDIMScheduler.from_config(model.scheduler.config))
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    drawn = pipeline(count, generator, num_inference_steps=steps, output_type="np").images
    return plots.picture_grid([list(torch.from_numpy(drawn).permute(0, 3, 1, 2))], size=1.1)


def loss_figure(names: Sequence[str]) -> Figure:
    """The training loss of every stage of checkpoints."""
    logs = {f"{name}: {stage}": log for name in names for stage, log in read_log(_folder(name)).items()}
    rows = -(-len(logs) // 3)
    figure, axes = plt.subplots(rows, 3, figsize=(10, 2.1 * rows))
    for axis, (title, log) in zip(axes.flat, logs.items(), strict=False):
        sns.lineplot(x=np.linspace(0, log["steps"], len(log["losses"])), y=log["losses"], ax=axis)
        axis.set(title=f"{title}, {log['seconds'] / 60:.0f} min", yscale="log")
    for axis in axes.flat[len(logs) :]:
        axis.set_axis_off()
    figure.tight_layout()
    return figure


# --- all of it, written down ----------------------------------------------------------------------------------------


def write_report(docs: str | Path = "docs", runs: str | Path = "runs") -> Path:
    """Measure every compact checkpoint (a quarter of an hour): the page docs/lite_models.md and the cards' numbers."""
    docs, tables = Path(docs), []
    for table in _tables(runs):
        print(f"[measure] {table[0]}\n{table[2].to_string()}", flush=True)
        tables.append(table)
    pictures = {f"samples_{name}": samples_figure(name) for name in PIPELINES}
    pictures["reconstructions"] = reconstruction_figure()
    pictures |= {f"samples_{name}": pixel_samples_figure(name) for name in PIXEL_MODELS}
    for name, figure in pictures.items():
        figure.savefig(docs / f"{name}.png", dpi=80, bbox_inches="tight")
        plt.close(figure)
    write_pages(docs, tables, list(pictures))
    return docs / "lite_models.md"


Table = tuple[str, str, pd.DataFrame, Sequence[str]]  # title, words, frame, the checkpoints it is about


def _tables(runs: str | Path) -> Iterator[Table]:
    held = "on drawings that no training and no benchmark holds"
    yield "Size and loading", "Once the libraries are imported, on one machine.", loading_table(), ()
    words = f"One autoencoder serves all pipelines. PSNR {held}, and on photographs unlike any it saw."
    yield "Autoencoder", words, autoencoder_table(), tuple(PIPELINES)
    words = "Percent of samples (25 DDIM steps, guidance 2.5) in which the captioner names the category asked for."
    yield "Samples", words, samples_table(), tuple(PIPELINES)
    yield "Captions", f"Percent of right statements {held}.", captioner_table()[0], (CAPTIONER,)
    for title, images in pixel_images().items():
        words = "Mean squared error of the predicted noise, times 1000; 1000 is predicting nothing."
        yield f"Noise prediction, {title}", words, noise_error_table(images), PIXEL_MODELS
    words = (
        "Squared error of the predicted noise in latents, times 1000; 1000 is predicting nothing. A guide shows the "
        "U-Net the clean image; DZAD's have seen the normal images of one group, VLMDiff's those of both."
    )
    yield "Semantic guidance", words, guidance_table(), GUIDED
    yield from _detection_tables(runs)
    yield from _magnetic_tile_tables(runs)


def _detection_tables(runs: str | Path) -> Iterator[Table]:
    for test, (groups, options) in TESTS.items():
        where = "all of synthad" if groups == "AB" else f"synthad's group {groups}, which it never saw"
        begin = f", from t = {NEAR['t_latent']} told {NEAR['t_denoise']}" if "t_latent" in options else ""
        words = f"`{options['backbone']}` on {where}; compared are {options['features']}{begin}."
        results, models = score_test(test, runs=runs), _checkpoints(options)
        yield f"DIVAD, {test}", words, compare(results, METRICS), models
        yield f"DIVAD, {test}, by kind of defect", "Pixel AUROC.", defect_kinds_table(results), models
    kinds = ("lite-features+pixels", "lite-features", "pixels", "unet:lite-foundation")
    alone = partial(score_test, "foundation", runs=runs)
    results = {features: alone(controls={"": None}, features=features)["divad"] for features in kinds}
    results["lite-features, untrained"] = alone(controls={"": "features"}, features="lite-features")["divad"]
    words = "What the map compares; the redrawn images are the same, and all layers are multiplied."
    yield "Features", words, compare(results, METRICS), ("lite-foundation", "lite-features")


def _magnetic_tile_tables(runs: str | Path) -> Iterator[Table]:
    for test, (_, options) in TESTS.items():
        try:
            results = score_test(test, "magnetic_tile", runs=runs)
        except DataError as error:
            print(f"[measure] the magnetic tiles are left out: {error}")
            return
        words = f"Real photographs, {len(results['divad'].frame)} images."
        title = f"DIVAD on the magnetic tiles, {options['backbone']}"
        yield title, words, compare(results, METRICS), _checkpoints(options)


def _checkpoints(options: dict[str, str]) -> list[str]:
    return [options["backbone"], *(name for name in options["features"].split("+") if name != "pixels")]


def defect_kinds_table(results: dict[str, Results]) -> pd.DataFrame:
    """Pixel AUROC of runs on synthad, for defects of the surface and of the structure (locally normal) apart."""
    columns = {}
    for kind, defects in (("surface", tuple(synthad.SURFACE)), ("structure", synthad.STRUCTURE)):
        parts = {}
        for label, run in results.items():
            keep = run.frame["defect"].isin(["good", *defects]).to_numpy()
            frame = run.frame[keep].reset_index(drop=True)
            parts[label] = replace(run, frame=frame, maps=run.maps[keep], masks=run.masks[keep])
        columns[f"{kind} ({', '.join(defects)})"] = compare(parts, ["pixel_auroc"])["pixel_auroc"]
    return pd.DataFrame(columns)


def pixel_images(count: int = 8) -> dict[str, torch.Tensor]:
    """Held-out images [B,3,32,32] by name: synthad's, and CIFAR-10's test images where they are at hand."""
    drawn = torch.cat([held_out_drawings(category, count, size=32)[0] for category in synthad.CATEGORIES])
    found = {"held-out drawings": drawn}
    folder = data_folder() / "cifar10" / "test"
    if folder.is_dir():
        found["CIFAR-10 test images"] = load_images(load_dataset("folder", folder).samples[::6], 32)
    return found


def write_pages(docs: Path, tables: Sequence[Table], pictures: Sequence[str]) -> None:
    """docs/lite_models.md from all tables and pictures; under MARK in each model card, the tables about it."""

    def text(title, words, frame):
        return f"### {title}\n\n{words}\n\n{frame.to_markdown()}\n"

    body = [PAGE, *(text(*parts) for *parts, _ in tables), "## Pictures\n"]
    body += [f"**{name.replace('_', ' ')}**\n\n![{name}]({name}.png)\n" for name in pictures]
    (docs / "lite_models.md").write_text("\n".join(body), encoding="utf-8")
    for name in {name for *_, models in tables for name in models}:
        card = _folder(name) / "README.md"
        own = [text(title, words, frame) for title, words, frame, models in tables if name in models]
        kept = card.read_text(encoding="utf-8").split(MARK)[0].rstrip()
        card.write_text(f"{kept}\n\n{MARK}\n## Measured\n\n{INTERVALS}\n\n" + "\n".join(own), encoding="utf-8")
