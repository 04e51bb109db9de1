"""Which start does DIVAD's lite profile use? Measured on validation drawings, never on the benchmark's images.

    python benchmarks/choose_divad_start.py [BACKBONE] [FEATURES]

For every pair (level of the latent, level denoising starts at) and guidance scale: mean over categories of image
AUROC, pixel AUROC and AUPRO in percent, and the network evaluations an image costs.
"""

import sys
from itertools import product

import pandas as pd
import torch
from tqdm.auto import tqdm

from zsad_lib.anomaly import maps
from zsad_lib.anomaly.features import load_features
from zsad_lib.diffusion.latent import load_backbone
from zsad_lib.evaluation.tables import evaluate
from zsad_lib.methods import make_method
from zsad_lib.profiles import PROFILES, profile_options
from zsad_lite import synthad

LATENT, DENOISE, GUIDANCE = (1, 51, 101, 201), (101, 201, 251, 301, 401, 601), (1.0, 2.0)
KINDS = ("good", "good", "good", *synthad.DEFECTS)


def main(backbone=PROFILES["lite"]["backbone"], features=PROFILES["lite"]["features"]):
    options = {**profile_options("lite", "divad"), "inversion_steps": 20, "inference_steps": 20}
    models = {"backbone": load_backbone(backbone), "features": load_features(features)}
    drawn = [(c, k, synthad.draw(c, f"val/{k}", kind)) for c in synthad.CATEGORIES for k, kind in enumerate(KINDS)]
    images = torch.stack([torch.from_numpy(d.image) for _, _, d in drawn]).permute(0, 3, 1, 2).float() / 255
    masks = torch.stack([torch.from_numpy(d.mask) for _, _, d in drawn]).numpy()
    categories = [c for c, _, _ in drawn]
    ids = [f"{c}/{k}" for c, k, _ in drawn]
    labels = masks.any((1, 2)).astype(int)
    with torch.inference_mode():
        theirs = models["features"](images)
    rows = []
    starts = [s for s in product(LATENT, DENOISE, GUIDANCE) if s[0] <= s[1] and (s[2] == 1 or s[0] == 51)]
    for t_latent, t_denoise, guidance_scale in tqdm(starts):
        start = {"t_latent": t_latent, "t_denoise": t_denoise, "guidance_scale": guidance_scale}
        method = make_method("divad", **{**options, **models, **start})
        before = models["backbone"].evaluations
        with torch.inference_mode():
            redrawn, _ = method.reconstruct(images, ids, categories)
            settings = (options[name] for name in ("sigma", "pool", "mode"))
            found, scores = maps.compare(theirs, models["features"](redrawn), 64, *settings)
        table = evaluate(categories, labels, scores.numpy(), found.numpy(), masks, n_bootstrap=0)
        mean = table[table.category == "mean"].set_index("metric").value * 100
        cost = (models["backbone"].evaluations - before) / len(images)
        values = mean[["image_auroc", "pixel_auroc", "aupro"]].round(1)
        rows.append([t_latent, t_denoise, guidance_scale, *values, cost])
        print(rows[-1], flush=True)
    columns = ["t_latent", "t_denoise", "guidance", "image AUROC", "pixel AUROC", "AUPRO", "evaluations"]
    print(pd.DataFrame(rows, columns=columns).sort_values("AUPRO", ascending=False).to_string(index=False))


if __name__ == "__main__":
    main(*sys.argv[1:])
