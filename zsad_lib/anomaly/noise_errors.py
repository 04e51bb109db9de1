"""DZAD's multi-timestep matrix: how wrong the noise prediction for an image is, at every stage of the noise.

DZAD (AAAI 2025), Fig. 2 and the text around eq. 11: [1, T] is split into N stages, and at M timesteps of each the image
is noised and its noise predicted; F holds the N·M errors as a matrix, so that a stage can be weighted as such
(`weighting.py`). The prediction is the plain backbone's or the guided one's (`guidance.py`). Readings taken where the
text leaves it open: a stage is a stretch of neighbouring noise levels, one stride d runs through all of them, every
timestep draws its own noise, and ‖·‖² is the mean over channels and positions, not the sum.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from zsad_lib.diffusion import ddim
from zsad_lib.diffusion.noise import image_noise, to_host
from zsad_lib.errors import MethodError

PURPOSE = "dzad-noise"


@dataclass
class NoiseErrors:
    """The noise errors of I images at N stages of M timesteps, with K seeds in each cell; NumPy arrays."""

    ids: np.ndarray  # [I] strings
    timesteps: np.ndarray  # int [N,M]
    seeds: np.ndarray  # int [K]
    alphas_cumprod: np.ndarray  # float32 [T], the schedule
    errors: np.ndarray  # float32 [I,N,M,K]: mean squared error over channels and positions
    maps: np.ndarray | None = None  # float32 [I,N,M,h,w]: mean over channels and seeds at every latent position

    @property
    def matrix(self) -> np.ndarray:
        """F, float32 [I,N,M]: the errors' mean over the seeds."""
        return self.errors.mean(axis=3)


def join(parts: Sequence[NoiseErrors]) -> NoiseErrors:
    """One NoiseErrors for all images of `parts`, which were measured with the same timesteps, seeds and schedule."""
    first = parts[0]
    for name in ("timesteps", "seeds", "alphas_cumprod"):
        if not all(np.array_equal(getattr(part, name), getattr(first, name)) for part in parts):
            raise MethodError(f"noise errors with different {name} cannot be joined: measure them alike")
    ids = np.concatenate([part.ids for part in parts])
    if len(set(ids)) < len(ids):
        raise MethodError("noise errors that share images cannot be joined: leave one of the two out")
    errors = np.concatenate([part.errors for part in parts])
    maps = None if any(part.maps is None for part in parts) else np.concatenate([part.maps for part in parts])
    return NoiseErrors(ids, first.timesteps, first.seeds, first.alphas_cumprod, errors, maps)


def timestep_grid(T: int = 1000, stages: int = 10, per_stage: int = 10, first: int = 1) -> np.ndarray:
    """int64 [N,M]: timestep m of stage n is first + (n·M + m)·d with the stride d = T // (N·M)."""
    try:
        grid = ddim.ascending_grid(stages * per_stage, T, first)
    except ValueError as error:
        raise MethodError(f"{stages} stages of {per_stage} timesteps: {error}") from error
    return np.array(grid).reshape(stages, per_stage)


def evaluations(images: int, stages: int = 10, per_stage: int = 10, seeds: int = 1, guidance_scale: float = 1.0) -> int:
    """What `multi_timestep_errors` costs, in network evaluations: one an image, timestep and seed; with text guidance
    two."""
    return images * stages * per_stage * seeds * (1 if guidance_scale == 1 else 2)


@torch.inference_mode()
def multi_timestep_errors(
    predict: Callable,
    latents: torch.Tensor,
    ids: Sequence[str],
    alphas_cumprod: torch.Tensor,
    stages: int = 10,
    per_stage: int = 10,
    seeds: Sequence[int] = (0,),
    first: int = 1,
    batch_size: int = 16,
    keep_maps: bool = True,
    callback: Callable | None = None,
) -> NoiseErrors:
    """The noise errors of images given by their clean latents [I,C,h,w] and I ids.

    predict(z, t, rows) -> noise [n,C,h,w] for latents z [n,C,h,w] at timesteps t (int64 [n]), rows (int64 [n]) saying
    which image each belongs to; all on the device of `latents`. For images with text `cond` [I,L,D]:

        lambda z, t, rows: backbone.predict_noise(z, t, cond[rows])
        lambda z, t, rows: guided.predict_noise(z, t, cond[rows], rows=rows)   # a GuidedBackbone

    alphas_cumprod: [T]; stages, per_stage, first: `timestep_grid`; seeds: one noise each, drawn from the image's id,
    the timestep and the seed. All cells of all images run in batches of `batch_size`, which changes nothing but the
    speed; the maps take 4·I·N·M·K·h·w bytes until they are averaged, so measure a large set in parts and `join` them.
    callback(done, total), in cells. Costs `evaluations(...)`.
    """
    if len(ids) != len(latents) or not len(ids) or len(set(ids)) < len(ids):
        raise MethodError(f"{len(latents)} latents need as many ids, all different; got {len(ids)}")
    if not len(seeds) or batch_size < 1:
        raise MethodError(f"at least one seed and a batch_size of 1 or more are needed, not {seeds} and {batch_size}")
    latents = latents.float()
    alphas = torch.as_tensor(alphas_cumprod, dtype=torch.float32, device=latents.device)
    grid = timestep_grid(len(alphas), stages, per_stage, first)
    cells = [(row, t, seed) for row in range(len(ids)) for t in grid.ravel().tolist() for seed in seeds]
    maps = torch.empty(len(cells), *latents.shape[2:])
    for start in range(0, len(cells), batch_size):
        chunk = cells[start : start + batch_size]
        maps[start : start + len(chunk)] = _error_maps(predict, latents, ids, alphas, chunk)
        if callback:
            callback(start + len(chunk), len(cells))
    maps = maps.view(len(ids), stages, per_stage, len(seeds), *latents.shape[2:])
    return NoiseErrors(
        np.array(ids),
        grid,
        np.array(seeds),
        to_host(alphas).numpy(),
        maps.mean((-2, -1)).numpy(),
        maps.mean(3).numpy() if keep_maps else None,
    )


def _error_maps(predict, latents, ids, alphas, cells):
    """Squared noise errors, mean over channels, of (row, timestep, seed) cells: float32 [n,h,w] on the CPU."""
    rows, t, _ = (torch.tensor(column, device=latents.device) for column in zip(*cells, strict=True))
    noise = torch.cat([image_noise([ids[row]], f"{PURPOSE}|{t}", seed, latents.shape[1:]) for row, t, seed in cells])
    noise = noise.to(latents.device)
    z = ddim.add_noise(latents[rows], noise, alphas[t].view(-1, 1, 1, 1))
    return to_host((noise - predict(z, t, rows)).square().mean(1))
