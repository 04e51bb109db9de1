"""Ratios measured side by side in one run; seconds are this machine's and mean little elsewhere.

python benchmarks/speed.py

- DIVAD's official loop against this project's, which stops inverting at the latent it needs and leaves out the last,
  idle denoising step: 108 against 67 network calls for the authors' setting, same reconstruction.
- A batch of sixteen against sixteen batches of one.
- The official AUPRO (200 thresholds) against the exact one.
- DZAD's matrix: one network call a cell, as the formula reads, against cells of all images and timesteps together.
- DZAD's matrix with semantic guidance against the plain U-Net: what the guide costs, each image embedded once.
"""

import time

import numpy as np
import torch

from zsad_lib.diffusion import ddim
from zsad_lib.evaluation import metrics, official
from zsad_lib.methods import make_method
from zsad_lib.profiles import profile_options
from zsad_lite import synthad


def seconds(function, repeats=3):
    """The fastest of a few runs, and what the last one returned."""
    times = []
    for _ in range(repeats):
        clock = time.perf_counter()
        value = function()
        times.append(time.perf_counter() - clock)
    return min(times), value


def whole_official_loop(method, images, categories):
    """Everything the authors' script runs: all inversion steps, and denoising down to the idle last step."""
    predict, alphas = method.predictor(categories), method.alphas_cumprod
    path = ddim.invert(predict, method.backbone.encode(images), alphas, method.inversion_steps)
    start = method.start_step
    clean = ddim.denoise(predict, path[-(start + 1)][1], alphas, method.inference_steps, start, skip_identity=False)
    return method.backbone.decode(clean)


def report(name, slow, fast, note=""):
    print(f"{name:42s} {slow:8.2f} s {fast:8.2f} s   ratio {slow / fast:5.2f}  {note}")


@torch.inference_mode()
def main():
    options = profile_options("lite", "divad")
    authors = {"inversion_steps": 50, "inference_steps": 100, "start_step": 40, "guidance_scale": 3.5}
    method = make_method("divad", **{**options, **authors})
    drawn = [synthad.draw("gauge", f"speed/{k}") for k in range(16)]
    images = torch.stack([torch.from_numpy(d.image) for d in drawn]).permute(0, 3, 1, 2).float() / 255
    ids, categories = [str(k) for k in range(16)], ["gauge"] * 16
    slow, theirs = seconds(lambda: whole_official_loop(method, images[:4], categories[:4]), 1)
    fast, ours = seconds(lambda: method.reconstruct(images[:4], ids[:4], categories[:4])[0], 1)
    report("official loop / only what is needed", slow, fast, f"largest difference {(theirs - ours).abs().max():.1e}")

    lite = make_method("divad", **{**options, "backbone": method.backbone, "features": method.features})
    slow, _ = seconds(lambda: [lite.score(images[k : k + 1], ids[k : k + 1], ["gauge"]) for k in range(16)], 1)
    fast, _ = seconds(lambda: lite.score(images, ids, categories), 1)
    report("sixteen batches of one / one batch", slow, fast)

    guided = make_method("dzad", **profile_options("lite", "dzad"))
    plain = make_method("dzad", guided.latent_model, guided.features, per_stage=2)
    guided.measure(images[:1], ids[:1], reconstruct=False)  # the first call also pays for memory
    together, errors = seconds(lambda: guided.measure(images, ids, reconstruct=False).errors.errors, 1)
    guided.batch_size = 1
    apart, one_by_one = seconds(lambda: guided.measure(images, ids, reconstruct=False).errors.errors, 1)
    note = f"largest difference {abs(errors - one_by_one).max():.1e}"
    report("matrix cell by cell / in batches of 64", apart, together, note)
    alone, _ = seconds(lambda: plain.measure(images, ids, reconstruct=False), 1)
    report("matrix with the guide / without", together, alone)

    masks = np.stack([synthad.draw("gauge", f"speed/{k}", "missing", 128).mask for k in range(32)])
    masks = masks.repeat(2, axis=1).repeat(2, axis=2)
    maps = np.random.default_rng(0).random(masks.shape) + 0.5 * masks
    slow, theirs = seconds(lambda: official.aupro_official(masks, maps))
    fast, exact = seconds(lambda: metrics.aupro(masks, maps))
    report("official AUPRO, 200 thresholds / exact", slow, fast, f"{theirs:.4f} against {exact:.4f}")


if __name__ == "__main__":
    main()
