"""What the compact checkpoints can do: the numbers of their model cards and of docs/lite_models.md, and the pictures.

`measure` makes all of them; notebook 90 uses the pieces. Intervals are 95 % bootstrap intervals.
"""

import json
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from diffusers import DDIMPipeline, DDPMPipeline

from zsad_lib import captions, ddim, manifest, plots, scoring, synthad
from zsad_lib.backbones import load_backbone, load_features
from zsad_lib.datasets import DatasetError, data_folder, load_dataset, load_images
from zsad_lib.methods import make_method
from zsad_lib.profiles import PROFILES, profile_options

PIPELINES = {"lite-foundation": "AB", "lite-group-a": "A", "lite-group-b": "B"}  # and the groups each was trained on
PIXEL_MODELS = ("lite-ddpm-synthad", "lite-ddpm-cifar10")
CAPTIONER = "lite-captioner"
NEAR = {"t_latent": 1, "t_denoise": 81}  # what a group's model redraws is new to it: it starts from little noise
# pipeline, features trained on the same groups, the groups it is tested on, DIVAD's options
TESTS = {
    "foundation": ("lite-foundation", "lite-features", "AB", {}),
    "A to B": ("lite-group-a", "lite-features-a", "B", NEAR),
    "B to A": ("lite-group-b", "lite-features-b", "A", NEAR),
}
CONTROLS = {"": None, " (random U-Net)": "unet", " (random weights)": "all", " (untrained features)": "features"}
BASELINES = ("local_contrast", "median", "patch_knn")
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


@torch.inference_mode()
def autoencoder_table(names=PIPELINES, per_category: int = 16) -> pd.DataFrame:
    """PSNR in dB of each pipeline's autoencoder on held-out drawings: of the categories it was trained on, and not."""
    rows = {}
    for name in names:
        backbone, values = load_backbone(name), {"seen categories": [], "unseen categories": []}
        for group, categories in synthad.GROUPS.items():
            for category in categories:
                x, _ = held_out(category, per_category)
                error = (backbone.decode(backbone.encode(x)).cpu() - x).square().mean((1, 2, 3))
                values["seen categories" if group in PIPELINES[name] else "unseen categories"] += (
                    -10 * torch.log10(error)
                ).tolist()
        rows[name] = {key: interval(v) if v else "none" for key, v in values.items()}
    return pd.DataFrame(rows).T.rename_axis("PSNR in dB")


def captioner_table(per_category: int = 16) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(table, statements): the captioner on held-out drawings, percent of right statements by category, with
    intervals over images; and every statement with whether it was made (`captions.check` and a column category)."""
    captioner, parts = captions.load_captioner(CAPTIONER), []
    for category in synthad.CATEGORIES:
        images, truth = held_out(category, per_category)
        parts.append(captions.check(captioner(images), truth).assign(category=category))
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


def loading_table() -> pd.DataFrame:
    """Megabytes on disk and seconds to load, of every checkpoint, once the libraries are imported."""
    loaders = {name: load_backbone for name in PIPELINES} | {name: load_features for _, name, _ in TESTS.values()}
    loaders |= {name: DDPMPipeline.from_pretrained for name in PIXEL_MODELS} | {CAPTIONER: captions.load_captioner}
    rows = {}
    for name, load in loaders.items():
        folder = manifest.local_path(manifest.checkpoint_entry(name))
        load(folder)  # the first one also pays for imports
        start = time.perf_counter()
        load(folder)
        seconds = time.perf_counter() - start
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        rows[name] = {"MB": round(size / 1e6, 1), "seconds to load": round(seconds, 2)}
    return pd.DataFrame(rows).T


def detection(test: str, dataset: str = "synthad", root=None, controls=CONTROLS, features=None, runs="runs") -> dict:
    """{label: Results} of DIVAD with the models of TESTS[test], its controls and the baselines, in run folders.

    dataset: "synthad" (the groups of the test), or another one, whole. features: in place of the test's own.
    """
    backbone, own, groups, start = TESTS[test]
    categories = [c for group in groups for c in synthad.GROUPS[group]] if dataset == "synthad" else None
    images, results = load_dataset(dataset, root, categories=categories), {}
    plan = [("divad", suffix, random) for suffix, random in controls.items()]
    for name, suffix, random in plan + [(name, "", None) for name in BASELINES]:
        models = {"backbone": backbone, "features": features or f"{own}+pixels"} | (start if name == "divad" else {})
        method = make_method(name, random_weights=random, **profile_options("lite", name) | models)
        results[name + suffix] = scoring.score(images, method, runs, PROFILES["lite"]["batch_size"])
    return results


@torch.inference_mode()
def noise_errors(images: torch.Tensor, timesteps=(50, 200, 500), names=PIXEL_MODELS) -> pd.DataFrame:
    """How well each pixel model predicts the noise in images [B,3,32,32] in [0,1]: mean squared error times 1000.

    The same noise for every model; 1000 is what predicting no noise at all would give.
    """
    noise, rows = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)), {}
    for name in names:
        pipeline = DDPMPipeline.from_pretrained(manifest.local_path(manifest.checkpoint_entry(name)))
        rows[name] = {}
        for t in timesteps:
            noisy = ddim.add_noise(2 * images - 1, noise, pipeline.scheduler.alphas_cumprod[t])
            error = (pipeline.unet(noisy, t).sample - noise).square().mean((1, 2, 3))
            rows[name][f"t = {t}"] = interval(1000 * error)
    return pd.DataFrame(rows).T.rename_axis("noise error")


# --- pictures -------------------------------------------------------------------------------------------------------


def samples_figure(name: str, count: int = 3):
    """What a pipeline draws when asked for each of its categories."""
    drawn = samples(name, count=count).unflatten(0, (-1, count))
    titles = [synthad.CATEGORIES[c].noun for c in trained_on(name)]
    return plots.picture_grid([list(drawn[:, k]) for k in range(count)], titles, size=1.1)


@torch.inference_mode()
def reconstruction_figure(name: str):
    """A held-out drawing of each category above what the autoencoder of a pipeline makes of it."""
    x = torch.cat([held_out(category, 1)[0] for category in synthad.CATEGORIES])
    backbone = load_backbone(name)
    nouns = [scene.noun for scene in synthad.CATEGORIES.values()]
    return plots.picture_grid([list(x), list(backbone.decode(backbone.encode(x)).cpu())], nouns, size=1.1)


def pixel_samples_figure(name: str, count: int = 12, steps: int = 50, seed: int = 0):
    """What an unconditional pixel model draws, by DDIM."""
    pipeline = DDIMPipeline.from_pretrained(manifest.local_path(manifest.checkpoint_entry(name)))
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    drawn = pipeline(count, generator, num_inference_steps=steps, output_type="np").images
    return plots.picture_grid([list(torch.from_numpy(drawn).permute(0, 3, 1, 2))], size=1.1)


def loss_figure(names):
    """The training loss of every stage of the named checkpoints, from their ``training_log.json``."""
    logs = {}
    for name in names:
        folder = manifest.local_path(manifest.checkpoint_entry(name))
        for stage, log in json.loads((folder / "training_log.json").read_text()).items():
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
    docs, tables = Path(docs), []  # (title, words, frame, the models it is about)

    def table(title, words, frame, models):
        print(f"[measure] {title}", flush=True)
        tables.append((title, words, frame, models))

    held = "on drawings that no training and no benchmark holds"
    table("Size and loading", "Once the libraries are imported, on one machine.", loading_table(), ())
    table("Autoencoders", f"PSNR in dB {held}.", autoencoder_table(), tuple(PIPELINES))
    words = "Percent of samples (25 DDIM steps, guidance 2.5) in which the captioner names the category asked for."
    table("Samples", words, samples_table(), tuple(PIPELINES))
    said, _ = captioner_table()
    table("Captions", f"Percent of right statements {held}.", said, (CAPTIONER,))
    for title, images in pixel_images().items():
        words = "Mean squared error of the predicted noise, times 1000; 1000 is predicting nothing."
        table(f"Noise prediction, {title}", words, noise_errors(images), PIXEL_MODELS)
    for test, (backbone, features, groups, _) in TESTS.items():
        words = (
            f"`{backbone}` with `{features}` on synthad's {'groups A and B' if groups == 'AB' else 'group ' + groups}."
        )
        table(f"DIVAD, {test}", words, scoring.compare(detection(test, runs=runs), METRICS), (backbone, features))
    kinds = {phi: phi for phi in ("lite-features+pixels", "lite-features", "pixels", "unet:lite-foundation")}
    results = {phi: detection("foundation", controls={"": None}, features=phi, runs=runs)["divad"] for phi in kinds}
    results["lite-features, untrained"] = detection(
        "foundation", controls={"": "features"}, features="lite-features", runs=runs)["divad"]  # fmt: skip
    words = "What the map compares (Φ), the same redrawn images; all layers multiplied."
    table("Features", words, scoring.compare(results, METRICS), ("lite-foundation", "lite-features"))
    try:
        for test, (backbone, features, *_) in TESTS.items():
            frame = scoring.compare(detection(test, "magnetic_tile", runs=runs), METRICS)
            table(f"DIVAD on the magnetic tiles, {backbone}", "Real photographs.", frame, (backbone, features))
    except DatasetError as error:
        print(f"[measure] the magnetic tiles are left out: {error}")
    pictures = {f"samples_{name}": samples_figure(name) for name in PIPELINES}
    pictures |= {f"reconstructions_{name}": reconstruction_figure(name) for name in PIPELINES}
    pictures |= {f"samples_{name}": pixel_samples_figure(name) for name in PIXEL_MODELS}
    for name, figure in pictures.items():
        figure.savefig(docs / f"{name}.png", dpi=100, bbox_inches="tight")
        plt.close(figure)
    write_pages(docs, tables, pictures)
    return docs / "lite_models.md"


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
