"""A diffusion model on a line whose score is known exactly: to see what a score and a path to noise are."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LineModel:
    """The perfect noise predictor for data from a mixture of equally frequent Gaussians on a line.

    means: where they are; spread: the standard deviation of each. The noise schedule is DDPM's linear one (Ho et al.,
    2020): T = 1000 timesteps, β from 1e-4 to 0.02. It takes the place of a `PixelModel` in `diffpath.noise_path`: a
    point is an "image" [B,1,1,1].
    """

    means: tuple[float, ...] = (-0.6, 0.5)
    spread: float = 0.12

    @property
    def alphas_cumprod(self):
        """ᾱ_t, float64 [1000]."""
        return (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)

    def log_density(self, x, t):
        """log p_t(x), as x [...]: of the data after t steps of noising, each Gaussian N(√ᾱ·mean, ᾱ·spread² + 1 − ᾱ)."""
        distance, variance = self._parts(x, t)
        logs = -(distance**2) / (2 * variance) - 0.5 * (2 * torch.pi * variance).log()
        return logs.logsumexp(-1) - torch.tensor(float(len(self.means))).log()

    def score(self, x, t):
        """∇ₓ log p_t(x), as x [...]: the direction to denser places, and how steep the way is."""
        distance, variance = self._parts(x, t)
        near = (-(distance**2) / (2 * variance)).softmax(-1)
        return -(near * distance).sum(-1) / variance

    def predict_noise(self, x, t):
        """E[ε | x at timestep t] = −√(1 − ᾱ_t)·score, as x [...]."""
        return -((1 - self.alphas_cumprod[t]).sqrt()).to(x) * self.score(x, t)

    def _parts(self, x, t):
        """Distances of x to the noised means, [..., means], and the variance around them."""
        alpha = self.alphas_cumprod[t].to(x)
        return x[..., None] - alpha.sqrt() * torch.tensor(self.means).to(x), alpha * self.spread**2 + 1 - alpha
