"""DDIM with eta = 0: the deterministic moves between noise levels that DIVAD is made of.

A noise level is an index t into `alphas_cumprod`, written ᾱ_t in the papers. Source of the step: Song et al.,
"Denoising Diffusion Implicit Models", eq. 12 with σ = 0; of the loops: DIVAD, arXiv 2601.08022, `ddim_inversion.py`.
"""

from collections.abc import Callable
from itertools import pairwise

from torch import Tensor

from zsad_lib.errors import MethodError

Predict = Callable[[Tensor, int], Tensor]  # (latent [B,C,h,w], timestep) -> noise [B,C,h,w]


def add_noise(z0: Tensor, noise: Tensor, alpha: Tensor | float) -> Tensor:
    """The latent at the level whose alphas_cumprod is `alpha`. Any shape."""
    return alpha**0.5 * z0 + (1 - alpha) ** 0.5 * noise


def predict_x0(z: Tensor, eps: Tensor, alpha: Tensor | float) -> Tensor:
    """The clean latent that `z` at level `alpha` > 0 implies when its noise is `eps`; undoes `add_noise`."""
    return (z - (1 - alpha) ** 0.5 * eps) / alpha**0.5


def ddim_step(z: Tensor, eps: Tensor, alpha_from: Tensor | float, alpha_to: Tensor | float) -> Tensor:
    """Move latent `z` from level `alpha_from` > 0 to `alpha_to`, up or down, along the noise `eps`."""
    return add_noise(predict_x0(z, eps, alpha_from), eps, alpha_to)


def ascending_grid(n_steps: int, T: int = 1000, offset: int = 1) -> list[int]:
    """The timesteps offset + k·(T // n_steps), k = 0 … n_steps − 1, of T training timesteps ("leading").

    offset: the scheduler's `steps_offset`, 1 for Stable Diffusion.
    """
    if not 1 <= n_steps <= T:
        raise MethodError(f"n_steps must be 1 to {T} (the training timesteps), not {n_steps}")
    grid = [offset + k * (T // n_steps) for k in range(n_steps)]
    if grid[-1] >= T:
        raise MethodError(f"{n_steps} steps with offset {offset} reach timestep {grid[-1]}, past {T - 1}: take fewer")
    return grid


def inversion_steps(n_steps: int, T: int = 1000, offset: int = 1) -> list[tuple[int, int]]:
    """The (from, to) levels of an inversion: n_steps − 2 of them, for the official loop leaves the top level out.

    The clean latent is taken to sit at the grid's first level (1 for Stable Diffusion), not at 0.
    """
    return list(pairwise(ascending_grid(n_steps, T, offset)[:-1]))


def denoising_steps(
    n_steps: int, start_step: int = 0, T: int = 1000, offset: int = 1, final: int | None = None
) -> list[tuple[int, int]]:
    """The (from, to) levels of a denoising run that leaves out the first `start_step` of its n_steps.

    It ends at level `final`, 0 for VLMDiff. By default at the grid's first level: DIVAD's official loop goes from
    there to itself in its last step, an identity.
    """
    if not 0 <= start_step < n_steps:
        raise MethodError(f"start_step must be 0 to {n_steps - 1} for {n_steps} denoising steps, not {start_step}")
    levels = ascending_grid(n_steps, T, offset)[: n_steps - start_step][::-1]
    return list(pairwise([*levels, levels[-1] if final is None else final]))


def invert(
    predict: Predict,
    z0: Tensor,
    alphas_cumprod: Tensor,  # [T]
    n_steps: int,
    stop: int | None = None,  # the timestep to end at; None: after all steps
    offset: int = 1,
    callback: Callable[[int, Tensor], None] | None = None,  # (t, latent) after each step
) -> list[tuple[int, Tensor]]:
    """DDIM inversion (DIVAD's `invert`): carry a clean latent up the noise levels; (timestep, latent) of each step.

    `predict` is given the latent of the lower level and the *target* timestep, as in the official loop.
    """
    steps = inversion_steps(n_steps, len(alphas_cumprod), offset)
    levels = [t for _, t in steps]
    if stop is not None and stop not in levels:
        raise MethodError(f"stop={stop} is no level of a {n_steps}-step inversion; its levels are {levels}")
    z, path = z0, []
    for t_from, t in steps:
        z = ddim_step(z, predict(z, t), alphas_cumprod[t_from], alphas_cumprod[t])
        path.append((t, z))
        if callback:
            callback(t, z)
        if t == stop:
            break
    return path


def denoise(
    predict: Predict,
    z: Tensor,
    alphas_cumprod: Tensor,  # [T]
    n_steps: int,
    start_step: int = 0,  # of n_steps, how many are left out at the top
    offset: int = 1,
    callback: Callable[[int, Tensor], None] | None = None,  # (level reached, latent) after each step
    skip_identity: bool = True,  # leave out the official loop's last step: a network call that changes nothing
    final: int | None = None,  # the level to end at; None: the grid's first, 1 for Stable Diffusion
) -> Tensor:
    """DDIM denoising (DIVAD's `sample`): bring a latent down to the lowest level of the grid, or to `final`.

    `z` is *treated* as being at the timestep of the first step run, whatever its level is.
    """
    for t, t_to in denoising_steps(n_steps, start_step, len(alphas_cumprod), offset, final):
        if t == t_to and skip_identity:
            break
        z = ddim_step(z, predict(z, t), alphas_cumprod[t], alphas_cumprod[t_to])
        if callback:
            callback(t_to, z)
    return z
