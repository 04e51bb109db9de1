"""DDIM with eta = 0: the deterministic moves between noise levels that DIVAD is made of.

A noise level is an index t into `alphas_cumprod` (the cumulative product of the schedule, written ᾱ_t in the
papers); a latent at level t is √ᾱ_t·z0 + √(1 − ᾱ_t)·noise. Source of the step: Song et al., "Denoising
Diffusion Implicit Models", eq. 12 with σ = 0. Source of the loops: DIVAD, arXiv 2601.08022, and its
`ddim_inversion.py`.
"""

from itertools import pairwise


def add_noise(z0, noise, alpha):
    """The latent at the level whose alphas_cumprod is `alpha`: √α·z0 + √(1 − α)·noise. Any shape."""
    return alpha**0.5 * z0 + (1 - alpha) ** 0.5 * noise


def predict_x0(z, eps, alpha):
    """The clean latent that `z` at level `alpha` > 0 implies when its noise is `eps`; undoes `add_noise`."""
    return (z - (1 - alpha) ** 0.5 * eps) / alpha**0.5


def ddim_step(z, eps, alpha_from, alpha_to):
    """Move latent `z` [B,C,h,w] from level `alpha_from` to `alpha_to`, up or down, along the noise `eps`.

    Deterministic (eta = 0): with the same `eps`, stepping back returns `z`. alpha_from must be above 0.
    """
    return add_noise(predict_x0(z, eps, alpha_from), eps, alpha_to)


def ascending_grid(n_steps, T=1000, offset=1):
    """The `n_steps` timesteps offset + k·(T // n_steps), k = 0 … n_steps − 1, of T training timesteps
    ("leading").

    `offset` is the scheduler's `steps_offset` (1 for Stable Diffusion). ValueError when they do not fit into
    0 … T − 1.
    """
    if not 1 <= n_steps <= T:
        raise ValueError(f"n_steps must be 1 to {T} (the training timesteps), not {n_steps}")
    grid = [offset + k * (T // n_steps) for k in range(n_steps)]
    if grid[-1] >= T:
        raise ValueError(
            f"{n_steps} steps with offset {offset} reach timestep {grid[-1]}, past {T - 1}: use fewer steps"
        )
    return grid


def inversion_steps(n_steps, T=1000, offset=1):
    """The (from, to) levels of an inversion: n_steps − 2 of them, for the official loop leaves the top level
    out.

    The clean latent is taken to sit at the grid's first level (1 for Stable Diffusion), not at 0.
    """
    return list(pairwise(ascending_grid(n_steps, T, offset)[:-1]))


def denoising_steps(n_steps, start_step=0, T=1000, offset=1, final=None):
    """The (from, to) levels of a denoising run that leaves out the first `start_step` of its n_steps.

    It ends at level `final`, 0 for VLMDiff. By default at the grid's first level: DIVAD's official loop goes from
    there to itself in its last step, an identity.
    """
    if not 0 <= start_step < n_steps:
        raise ValueError(f"start_step must be 0 to {n_steps - 1} for {n_steps} denoising steps, not {start_step}")
    levels = ascending_grid(n_steps, T, offset)[: n_steps - start_step][::-1]
    return list(pairwise([*levels, levels[-1] if final is None else final]))


def invert(predict, z0, alphas_cumprod, n_steps, stop=None, offset=1, callback=None):
    """DDIM inversion (DIVAD's `invert`): carry a clean latent up the noise levels.

    predict(z, t) -> noise prediction, given the latent of the lower level and the *target* timestep t, as the
    official loop does; z0 [B,C,h,w]; alphas_cumprod [T]; `stop`: the timestep to end at (default: all of
    them). Returns a list of (timestep, latent [B,C,h,w]), one per network call. callback(t, latent) after
    each step. ValueError when `stop` is no level of this inversion.
    """
    steps = inversion_steps(n_steps, len(alphas_cumprod), offset)
    levels = [t for _, t in steps]
    if stop is not None and stop not in levels:
        raise ValueError(f"stop={stop} is no level of a {n_steps}-step inversion; its levels are {levels}")
    z, path = z0, []
    for t_from, t in steps:
        z = ddim_step(z, predict(z, t), alphas_cumprod[t_from], alphas_cumprod[t])
        path.append((t, z))
        if callback:
            callback(t, z)
        if t == stop:
            break
    return path


def denoise(predict, z, alphas_cumprod, n_steps, start_step=0, offset=1, callback=None, skip_identity=True, final=None):
    """DDIM denoising (DIVAD's `sample`): bring latent `z` [B,C,h,w] down to the lowest level of the grid, or to the
    level `final`.

    Leaves out the first `start_step` of `n_steps` steps: `z` is *treated* as being at the timestep of the
    first step run, whatever its level is. predict(z, t) -> noise prediction at the level left.
    `skip_identity` drops the official loop's last step, which costs a network call and changes nothing.
    callback(t, latent) after each step, with the level reached. Returns the latent [B,C,h,w], which is at that
    level (without `final` 1 for Stable Diffusion), not at z0.
    """
    for t, t_to in denoising_steps(n_steps, start_step, len(alphas_cumprod), offset, final):
        if t == t_to and skip_identity:
            break
        z = ddim_step(z, predict(z, t), alphas_cumprod[t], alphas_cumprod[t_to])
        if callback:
            callback(t_to, z)
    return z
