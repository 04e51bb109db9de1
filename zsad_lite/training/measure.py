"""What the compact checkpoints can do: the numbers of their model cards and of docs/lite_models.md, and the pictures.

`measure` makes all of them; notebook 90 uses the pieces. Intervals are 95 % bootstrap intervals.
"""

import time
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from diffusers import DDIMPipeline, DDIMScheduler

from zsad_lib import manifest
from zsad_lib.anomaly.features import load_features
from zsad_lib.data import captions
from zsad_lib.data.datasets import data_folder, load_dataset
from zsad_lib.data.images import load_images
from zsad_lib.diffusion import ddim
from zsad_lib.diffusion.guidance import load_guided
from zsad_lib.diffusion.latent import load_backbone
from zsad_lib.diffusion.pixel import load_pixel_model
from zsad_lib.errors import DataError
from zsad_lib.evaluation.tables import compare
from zsad_lib.methods import BASELINES, CONTROLS, make_method
from zsad_lib.notebook import plots
from zsad_lib.profiles import PROFILES, profile_options
from zsad_lite import synthad
from zsad_lite.synthad.truth import check_captions
from zsad_lite.training.cards import read_log
from zsad_lite.training.pools import photograph_crops

PIPELINES = {"lite-foundation": "AB", "lite-group-a": "A", "lite-group-b": "B"}  # and the groups each was trained on
GUIDED = ("lite-dzad-a", "lite-dzad-b", "lite-vlmdiff")
PIXEL_MODELS = ("lite-ddpm-synthad", "lite-ddpm-cifar10")
CAPTIONER = "lite-captioner"
NEAR = {"t_latent": 1, "t_denoise": 41}  # what a group's model redraws is new to it: it starts from little noise
# pipeline, features, the groups it is tested on, DIVAD's options
TESTS = {
    "foundation": ("lite-foundation", "lite-features+pixels", "AB", {}),
    "A to B": ("lite-group-a", "pixels", "B", NEAR),
    "B to A": ("lite-group-b", "pixels", "A", NEAR),
}
METRICS = ("image_auroc", "pixel_auroc", "aupro")
INTERVALS = "Cells: value [95 % bootstrap interval]. `zsad measure` repeats all of it."
PAGE = f"""# The compact checkpoints

What the lite profile runs on: small models in the directory layouts of their large relatives, trained from normal
images only. `zsad train NAME` repeats a training, `notebooks/90_train_the_lite_models.ipynb` shows how it is done, and
each folder of `checkpoints/` has a model card.

{INTERVALS}
"""
MARK = "<!-- measured by `zsad measure` -->"


def interval(values, resamples: int = 1000) -> str:
    """Mean of ``values`` with its 95 % bootstrap interval, as a cell: "28.2 [27.9, 28.5]"."""
    values = np.asarray(values, dtype=float)
    draws = values[np.random.default_rng(0).integers(0, len(values), (resamples, len(values)))].mean(1)
    low, high = np.quantile(draws, (0.025, 0.975))
    return f"{values.mean():.1f} [{low:.1f}, {high:.1f}]"


def held_out(category: str, count: int, size: int = 64) -> tuple[torch.Tensor, list[str]]:
    """Normal drawings that no training and no benchmark holds: images [count,3,size,size] in [0,1] and captions."""
    drawings = [synthad.draw(category, f"heldout/{k}", size=size) for k in range(count)]
    images = torch.from_numpy(np.stack([d.image for d in drawings])).permute(0, 3, 1, 2) / 255
    return images, [d.caption for d in drawings]


# --- what each model can do ---------------------------------------------------------------------------------------


UNSEEN = ("cell", "clock", "microaneurysms", "text")  # photographs of scikit-image that no training used


@torch.inference_mode()
def autoencoder_table(per_category: int = 16) -> pd.DataFrame:
    """PSNR in dB of the autoencoder that all pipelines share: new drawings of each category, and new kinds of image."""
    backbone, rows = load_backbone("lite-foundation"), {}

    def psnr(x):
        return (-10 * torch.log10((backbone.decode(backbone.encode(x)).cpu() - x).square().mean((1, 2, 3)))).tolist()

    for category in synthad.CATEGORIES:
        rows[category] = psnr(held_out(category, per_category)[0])
    rows = {"all categories": sum(rows.values(), []), **rows}
    for name in UNSEEN:
        crops = photograph_crops(name, 0, per_category, 64)[0]
        rows[f"photograph of {name}"] = psnr(torch.from_numpy(crops).permute(0, 3, 1, 2) / 255)
    return pd.DataFrame({"PSNR in dB": {name: interval(values) for name, values in rows.items()}}).rename_axis("images")


def captioner_table(per_category: int = 16) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(table, statements): the captioner on held-out drawings, percent of right statements by category, with
    intervals over images; and every statement with whether it was made (`check_captions` and a column category)."""
    captioner, parts = captions.load_captioner(CAPTIONER), []
    for category in synthad.CATEGORIES:
        images, truth = held_out(category, per_category)
        parts.append(check_captions(captioner(images), truth).assign(category=category))
    statements = pd.concat(parts, ignore_index=True)

    def cells(part):
        named = part["attribute"] == "category"
        per_image = part[~named].groupby(["category", "image"])["right"].mean()
        return {"category": interval(100 * part[named]["right"]), "attributes": interval(100 * per_image)}

    table = {category: cells(part) for category, part in statements.groupby("category", sort=False)}
    return pd.DataFrame({**table, "all": cells(statements)}).T.rename_axis("percent right"), statements


@torch.inference_mode()
def samples(name: str, categories=None, count: int = 3, steps: int = 25, guidance_scale: float = 2.5, seed: int = 0):
    """Images [N,3,64,64] in [0,1] that a pipeline draws when asked ``count`` times for each category."""
    backbone = load_backbone(name)
    nouns = [synthad.CATEGORIES[c].noun for c in categories or trained_on(name) for _ in range(count)]
    cond = backbone.embed([f"An image of a {noun}" for noun in nouns])
    uncond = backbone.embed([""]).expand_as(cond)
    noise = torch.randn(len(nouns), *backbone.latent_shape, generator=torch.Generator().manual_seed(seed))

    def predict(z, t):
        return backbone.predict_noise(z, t, cond, uncond, guidance_scale)

    return backbone.decode(ddim.denoise(predict, noise.to(backbone.device), backbone.alphas_cumprod, steps)).cpu()


def trained_on(name: str) -> list[str]:
    """The categories of a pipeline of PIPELINES."""
    return [c for group in PIPELINES[name] for c in synthad.GROUPS[group]]


def samples_table(names=PIPELINES, count: int = 12) -> pd.DataFrame:
    """How often the captioner names the category that a pipeline was asked to draw, in percent."""
    captioner, rows = captions.load_captioner(CAPTIONER), {}
    for name in names:
        asked = [f"An image of a {synthad.CATEGORIES[c].noun}" for c in trained_on(name) for _ in range(count)]
        said = captioner(samples(name, count=count))
        right = [100 * (sentence.split(", ")[0] == noun) for sentence, noun in zip(said, asked, strict=True)]
        rows[name] = {"samples": len(asked), "category recognised": interval(right)}
    return pd.DataFrame(rows).T


def megabytes(folder) -> float:
    """What a checkpoint adds to the repository; weights that are links count where they are."""
    return round(sum(file.lstat().st_size for file in Path(folder).rglob("*") if file.is_file()) / 1e6, 1)


def loading_table() -> pd.DataFrame:
    """Megabytes on disk and seconds to load, of every checkpoint, once the libraries are imported.

    A guide of DZAD is loaded with the base that it belongs to; weights that are links count where they are.
    """
    loaders = {name: load_backbone for name in PIPELINES} | {"lite-features": load_features}
    loaders |= {name: load_pixel_model for name in PIXEL_MODELS} | {CAPTIONER: captions.load_captioner}
    loaders |= {name: load_guided for name in GUIDED}
    rows = {}
    for name, load in loaders.items():
        folder = manifest.local_path(manifest.checkpoint_entry(name))
        load(folder)  # the first one also pays for imports
        start = time.perf_counter()
        load(folder)
        seconds = time.perf_counter() - start
        rows[name] = {"MB": megabytes(folder), "seconds to load": round(seconds, 2)}
    return pd.DataFrame(rows).T


def detection(
    test: str, dataset: str = "synthad", root=None, controls=CONTROLS, features=None, runs="runs", progress=True
) -> dict:
    """{label: Results} of DIVAD with the models of TESTS[test], its controls and the baselines, in run folders.

    dataset: "synthad" (the groups of the test), or another one, whole. features: in place of the test's own.
    """
    backbone, phi, groups, start = TESTS[test]
    features = features or phi
    categories = [c for group in groups for c in synthad.GROUPS[group]] if dataset == "synthad" else None
    images, results = load_dataset(dataset, root, categories=categories), {}
    if features == "pixels":  # nothing in them to leave untrained
        controls = {suffix: random for suffix, random in controls.items() if random != "features"}
    plan = [("divad", suffix, random) for suffix, random in controls.items()]
    for name, suffix, random in plan + [(name, "", None) for name in BASELINES]:
        models = {"backbone": backbone, "features": features} | (start if name == "divad" else {})
        method = make_method(name, random_weights=random, **profile_options("lite", name) | models)
        results[name + suffix] = runs.score(images, method, runs, PROFILES["lite"]["batch_size"], progress)
    return results


@torch.inference_mode()
def noise_errors(images: torch.Tensor, timesteps=(50, 200, 500), names=PIXEL_MODELS) -> pd.DataFrame:
    """How well each pixel model predicts the noise in images [B,3,32,32] in [0,1]: mean squared error times 1000.

    The same noise for every model; 1000 is what predicting no noise at all would give.
    """
    noise, rows = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)), {}
    for name in names:
        model, rows[name] = load_pixel_model(name, "cpu"), {}
        for t in timesteps:
            noisy = ddim.add_noise(model.to_pixels(images), noise, model.alphas_cumprod[t].item())
            error = (model.predict_noise(noisy, t) - noise).square().mean((1, 2, 3))
            rows[name][f"t = {t}"] = interval(1000 * error)
    return pd.DataFrame(rows).T.rename_axis("noise error")


@torch.inference_mode()
def guidance_table(names=GUIDED, per_category: int = 8, timesteps=(101, 501, 901)) -> pd.DataFrame:
    """What the guides learned: noise errors times 1000 on held-out drawings of either group, at each timestep.

    The same noise for every row. Of DZAD's models with the base they started from, of VLMDiff's with the captions.
    """
    rows = {}
    for name in names:
        for group, categories in synthad.GROUPS.items():
            drawn = [held_out(category, per_category) for category in categories]
            images, said = torch.cat([x for x, _ in drawn]), [caption for _, words in drawn for caption in words]
            for how, (backbone, predict) in _predictions(name, images, said).items():
                rows[f"{name}, group {group}: {how}"] = _latent_errors(backbone, predict, images, timesteps)
    return pd.DataFrame(rows).T.rename_axis("noise error")


def _predictions(name, images, said):
    """{how: (backbone, its noise prediction (z, t) for these images)}."""
    model, empty = load_guided(name, "cpu"), [""] * len(images)
    seeing, plain = model.condition_on(images), load_backbone(model.facts.get("base", name), "cpu")
    kinds = {"its base, without a guide" if "base" in model.facts else "without the guide": (plain, empty)}
    kinds["with the guide"] = (seeing, empty)
    if "captioner" in model.facts:
        kinds["with the guide and the caption"] = (seeing, said)
    return {how: (model.backbone, _predictor(*kind, model.backbone)) for how, kind in kinds.items()}


def _predictor(network, words, backbone):
    text = backbone.embed(words)
    return lambda z, t: network.predict_noise(z, t, text)


def _latent_errors(backbone, predict, images, timesteps):
    z, row = backbone.encode(images), {}
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    for t in timesteps:
        noisy = ddim.add_noise(z, noise, backbone.alphas_cumprod[t])
        row[f"t = {t}"] = interval(1000 * (predict(noisy, t) - noise).square().mean((1, 2, 3)))
    return row


# --- pictures -------------------------------------------------------------------------------------------------------


def samples_figure(name: str, count: int = 3):
    """What a pipeline draws when asked for each of its categories."""
    drawn = samples(name, count=count).unflatten(0, (-1, count))
    titles = [synthad.CATEGORIES[c].noun for c in trained_on(name)]
    return plots.picture_grid([list(drawn[:, k]) for k in range(count)], titles, size=1.1)


@torch.inference_mode()
def reconstruction_figure():
    """A held-out drawing of each category and photographs never seen, above what the autoencoder makes of them."""
    crops = np.concatenate([photograph_crops(name, 0, 1, 64)[0] for name in UNSEEN])
    x = torch.cat([held_out(category, 1)[0] for category in synthad.CATEGORIES])
    x = torch.cat([x, torch.from_numpy(crops).permute(0, 3, 1, 2) / 255])
    backbone = load_backbone("lite-foundation")
    titles = [scene.noun for scene in synthad.CATEGORIES.values()] + list(UNSEEN)
    return plots.picture_grid([list(x), list(backbone.decode(backbone.encode(x)).cpu())], titles, size=0.9)


def pixel_samples_figure(name: str, count: int = 12, steps: int = 50, seed: int = 0):
    """What an unconditional pixel model draws, by DDIM with clipped estimates."""
    model = load_pixel_model(name, "cpu")
    pipeline = DDIMPipeline(model.unet, DDIMScheduler.from_config(model.scheduler.config))
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    drawn = pipeline(count, generator, num_inference_steps=steps, output_type="np").images
    return plots.picture_grid([list(torch.from_numpy(drawn).permute(0, 3, 1, 2))], size=1.1)


def loss_figure(names):
    """The training loss of every stage of the named checkpoints, from their ``training_log.json``."""
    logs = {}
    for name in names:
        folder = manifest.local_path(manifest.checkpoint_entry(name))
        for stage, log in read_log(folder).items():
            logs[f"{name}: {stage}"] = log
    columns = 3
    figure, axes = plt.subplots(-(-len(logs) // columns), columns, figsize=(10, 2.1 * -(-len(logs) // columns)))
    for axis, (title, log) in zip(axes.flat, logs.items(), strict=False):
        sns.lineplot(x=np.linspace(0, log["steps"], len(log["losses"])), y=log["losses"], ax=axis)
        axis.set(title=f"{title}, {log['seconds'] / 60:.0f} min", yscale="log")
    for axis in axes.flat[len(logs) :]:
        axis.set_axis_off()
    figure.tight_layout()
    return figure


# --- all of it, written down ----------------------------------------------------------------------------------------


def measure(docs: str | Path = "docs", runs: str | Path = "runs") -> Path:
    """Measure every compact checkpoint; write docs/lite_models.md with its pictures, and each model card's numbers.

    Takes about a quarter of an hour on two cores, most of it for scoring (kept in ``runs``, so that it can be
    interrupted). Returns the page.
    """
    docs, tables = Path(docs), []
    for title, words, frame, models in _tables(runs):
        print(f"[measure] {title}\n{frame.to_string()}", flush=True)
        tables.append((title, words, frame, models))
    pictures = {f"samples_{name}": samples_figure(name) for name in PIPELINES}
    pictures["reconstructions"] = reconstruction_figure()
    pictures |= {f"samples_{name}": pixel_samples_figure(name) for name in PIXEL_MODELS}
    for name, figure in pictures.items():
        figure.savefig(docs / f"{name}.png", dpi=80, bbox_inches="tight")
        plt.close(figure)
    write_pages(docs, tables, pictures)
    return docs / "lite_models.md"


def _tables(runs):
    """Yields (title, words, frame, names of the checkpoints it is about)."""
    held = "on drawings that no training and no benchmark holds"
    yield "Size and loading", "Once the libraries are imported, on one machine.", loading_table(), ()
    words = f"One autoencoder serves all pipelines. PSNR {held}, and on photographs unlike any it saw."
    yield "Autoencoder", words, autoencoder_table(), tuple(PIPELINES)
    words = "Percent of samples (25 DDIM steps, guidance 2.5) in which the captioner names the category asked for."
    yield "Samples", words, samples_table(), tuple(PIPELINES)
    yield "Captions", f"Percent of right statements {held}.", captioner_table()[0], (CAPTIONER,)
    for title, images in pixel_images().items():
        words = "Mean squared error of the predicted noise, times 1000; 1000 is predicting nothing."
        yield f"Noise prediction, {title}", words, noise_errors(images), PIXEL_MODELS
    words = (
        "Squared error of the predicted noise in latents, times 1000; 1000 is predicting nothing. A guide shows the "
    )
    words += "U-Net the clean image; DZAD's have seen the normal images of one group, VLMDiff's those of both."
    yield "Semantic guidance", words, guidance_table(), GUIDED
    for test, (backbone, features, groups, start) in TESTS.items():
        where = "all of synthad" if groups == "AB" else f"synthad's group {groups}, which it never saw"
        begin = f", from t = {start['t_latent']} told {start['t_denoise']}" if start else ""
        results, models = detection(test, runs=runs), (backbone, *checkpoints(features))
        words = f"`{backbone}` on {where}; compared are {features}{begin}."
        yield f"DIVAD, {test}", words, compare(results, METRICS), models
        yield f"DIVAD, {test}, by kind of defect", "Pixel AUROC.", kinds_table(results), models
    results = {}
    for phi in ("lite-features+pixels", "lite-features", "pixels", "unet:lite-foundation"):
        results[phi] = detection("foundation", controls={"": None}, features=phi, runs=runs)["divad"]
    untrained = detection("foundation", controls={"": "features"}, features="lite-features", runs=runs)["divad"]
    results["lite-features, untrained"] = untrained
    words = "What the map compares; the redrawn images are the same, and all layers are multiplied."
    yield "Features", words, compare(results, METRICS), ("lite-foundation", "lite-features")
    try:
        for test, (backbone, features, *_) in TESTS.items():
            results = detection(test, "magnetic_tile", runs=runs)
            words = f"Real photographs, {len(results['divad'].frame)} images."
            models = (backbone, *checkpoints(features))
            yield f"DIVAD on the magnetic tiles, {backbone}", words, compare(results, METRICS), models
    except DataError as error:
        print(f"[measure] the magnetic tiles are left out: {error}")


def checkpoints(features: str) -> list[str]:
    """The names of checkpoints in a name that `load_features` takes: "lite-features+pixels" -> ["lite-features"]."""
    return [name for name in features.split("+") if name != "pixels"]


def kinds_table(results: dict) -> pd.DataFrame:
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
    """Held-out images [B,3,32,32] for `noise_errors`: synthad's, and CIFAR-10's test images where they are at hand."""
    drawn = torch.cat([held_out(category, count, size=32)[0] for category in synthad.CATEGORIES])
    found = {"held-out drawings": drawn}
    folder = data_folder() / "cifar10" / "test"
    if folder.is_dir():
        found["CIFAR-10 test images"] = load_images(load_dataset("folder", folder).samples[::6], 32)
    return found


def write_pages(docs: Path, tables, pictures) -> None:
    """docs/lite_models.md from all tables and pictures; under MARK in each model card, the tables about it."""

    def text(title, words, frame):
        return f"### {title}\n\n{words}\n\n{frame.to_markdown()}\n"

    body = [PAGE, *(text(*parts) for *parts, _ in tables), "## Pictures\n"]
    body += [f"**{name.replace('_', ' ')}**\n\n![{name}]({name}.png)\n" for name in pictures]
    (docs / "lite_models.md").write_text("\n".join(body), encoding="utf-8")
    for name in {name for *_, models in tables for name in models}:
        card = manifest.local_path(manifest.checkpoint_entry(name)) / "README.md"
        own = [text(title, words, frame) for title, words, frame, models in tables if name in models]
        kept = card.read_text(encoding="utf-8").split(MARK)[0].rstrip()
        card.write_text(f"{kept}\n\n{MARK}\n## Measured\n\n{INTERVALS}\n\n" + "\n".join(own), encoding="utf-8")
