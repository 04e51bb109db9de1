"""The line model against automatic differentiation and against sampling."""

import math

import pytest
import torch

from zsad_lib.methods.diffpath import noise_path
from zsad_lib.toy import LineModel


@pytest.mark.parametrize("t", [0, 200, 999])
def test_density_integrates_to_one_and_the_score_is_its_slope(t):
    x = torch.linspace(-6, 6, 24001, dtype=torch.float64, requires_grad=True)
    log_density = LineModel().log_density(x, t)
    assert math.isclose(torch.trapezoid(log_density.exp(), x).item(), 1, rel_tol=1e-6)
    (slope,) = torch.autograd.grad(log_density.sum(), x)
    torch.testing.assert_close(LineModel().score(x, t), slope)


def test_predicted_noise_is_the_mean_of_the_noise_that_was_added():
    model, t, generator = LineModel(), 300, torch.Generator().manual_seed(0)
    alpha = model.alphas_cumprod[t]
    means = torch.tensor(model.means, dtype=torch.float64)[torch.randint(2, (10**6,), generator=generator)]
    data, noise = (torch.randn(10**6, generator=generator, dtype=torch.float64) for _ in range(2))
    x = alpha.sqrt() * (means + model.spread * data) + (1 - alpha).sqrt() * noise
    near = (x - 0.4).abs() < 0.02
    assert abs(noise[near].mean() - model.predict_noise(torch.tensor(0.4), t)) < 0.02


def test_paths_of_the_models_own_data_end_in_a_standard_normal():
    model, generator = LineModel(), torch.Generator().manual_seed(0)
    x = torch.tensor(model.means).repeat(500) + model.spread * torch.randn(1000, generator=generator)
    noise, _ = noise_path(model, x.view(-1, 1, 1, 1), 50, clip=False)
    assert noise.shape == (1000, 50, 1, 1, 1)
    assert abs(noise[:, -1].mean()) < 0.1 and abs(noise[:, -1].std() - 1) < 0.1
