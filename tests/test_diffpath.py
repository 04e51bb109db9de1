"""DiffPath: parity with the official loop and statistics (golden), densities, invariances."""

import json

import numpy as np
import pytest
import torch
from helpers import arrays
from sklearn.neighbors import KernelDensity
from tiny import tiny_pixel_model, tiny_unet

from conftest import shared_path
from zsad_lib.anomaly.density import atypicality, fit_kernel, fit_mixture
from zsad_lib.data.image_sets import ImageSet, load_image_set
from zsad_lib.data.references import normal_images
from zsad_lib.diffusion.convert_pixel import PRESETS, improved_diffusion_schedule
from zsad_lib.diffusion.pixel import PixelModel
from zsad_lib.errors import MethodError
from zsad_lib.methods.diffpath import DiffPath, ddim_timesteps, noise_path, path_powers, path_states, path_statistics

RUNS = {"celeba_config": 6, "no_clip": 3}  # channels that the model gives


def golden(name):
    return {key: tensor.numpy() for key, tensor in arrays(f"diffpath/{name}").items()}


class Linear(torch.nn.Module):
    """The model of the stored runs: 0.9·x + 0.3·t/1000, with zeros as its learned variances. It keeps what it got."""

    def __init__(self, channels):
        super().__init__()
        self.config, self.channels, self.told = tiny_unet(sample_size=8, out_channels=channels).config, channels, []

    def forward(self, x, t):
        self.told.append(t.tolist())
        out = 0.9 * x + 0.3 * t.view(-1, 1, 1, 1) / 1000
        more = torch.zeros(len(x), self.channels - 3, *x.shape[2:])
        return type("Output", (), {"sample": torch.cat([out, more], 1)})


def golden_model(channels):
    return PixelModel(Linear(channels), improved_diffusion_schedule(PRESETS["diffpath-celeba32"]), "linear")


@pytest.mark.parametrize("run", RUNS)
def test_golden_path(run):
    expected, x0 = golden(f"reverse_{run}"), torch.from_numpy(golden("x0")["x0"])
    model = golden_model(RUNS[run])
    noise, estimates = noise_path(model, x0, steps=10, clip=run == "celeba_config")
    assert model.unet.told == expected["model_timesteps"].tolist() and model.evaluations == 10 * len(x0)
    errors = np.abs(noise.numpy() - expected["eps_float64"]).max((0, 2, 3, 4))
    assert errors[0] < 1e-4 and errors[1:].max() < 1e-5
    assert np.abs(noise.numpy() - expected["eps"]).max() < 1e-4
    alpha = expected["alphas_cumprod"][1:].reshape(-1, 1, 1, 1)
    followed = np.sqrt(alpha) * estimates[:, :-1].numpy() + np.sqrt(1 - alpha) * noise[:, :-1].numpy()
    assert np.abs(followed - expected["xt"][:, :-1]).max() < 1e-4
    np.testing.assert_allclose(path_statistics(*path_powers(noise)), expected["six_float64"], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("file", ["statistics", "reverse_celeba_config", "reverse_no_clip"])
def test_golden_statistics(file):
    expected = golden(file)
    powers = path_powers(torch.from_numpy(expected["eps"]))
    assert powers[0].shape == (4, 10, 3) and powers[1].shape == (4, 9, 3)
    np.testing.assert_allclose(path_statistics(*powers), expected["six"], rtol=1e-5, atol=1e-3)
    if file == "statistics":
        np.testing.assert_allclose(path_statistics(*powers), expected["six_float64"], rtol=1e-9)
    np.testing.assert_allclose(path_statistics(*powers, "1d")[:, 0], expected["deps_dt_sq_sqrt"], rtol=1e-6)


def test_timesteps():
    meta = json.loads(shared_path("golden/diffpath/meta.json").read_text())
    assert ddim_timesteps(10, 4000) == meta["runs"]["celeba_config"]["timestep_map"]
    assert ddim_timesteps(10, 1000) == meta["runs"]["no_clip"]["model_timesteps"]
    assert ddim_timesteps(30, 1000) == list(range(0, 1000, 34))  # the smallest stride that gives 30
    assert ddim_timesteps(1000, 1000) == list(range(1000))


def test_a_clipped_path_is_consistent():
    """Noise and estimate of every step make up the same latent, whether the estimate was held or not."""
    model, pixels = golden_model(3), 4 * torch.randn(2, 3, 8, 8)
    noise, estimates = noise_path(model, pixels, clip=True)
    assert estimates.abs().max() == 1 and (estimates.abs() < 1).any()
    alpha = model.alphas_cumprod[ddim_timesteps(10, 1000)].tolist()
    x = pixels
    for k in range(10):
        torch.testing.assert_close(alpha[k] ** 0.5 * estimates[:, k] + (1 - alpha[k]) ** 0.5 * noise[:, k], x)
        if k < 9:
            x = alpha[k + 1] ** 0.5 * estimates[:, k] + (1 - alpha[k + 1]) ** 0.5 * noise[:, k]


def test_states_are_what_the_model_was_asked_about():
    model, pixels = golden_model(3), torch.randn(2, 3, 8, 8)
    noise, estimates = noise_path(model, pixels, clip=False)
    states = path_states(model, noise, estimates)
    assert states.shape == (2, 10, 3, 8, 8)
    torch.testing.assert_close(states[:, 0], pixels, rtol=1e-4, atol=1e-4)
    for k, t in enumerate(ddim_timesteps(10, 1000)):
        torch.testing.assert_close(model.predict_noise(states[:, k], t), noise[:, k], rtol=1e-4, atol=1e-4)


# --- the method


def images(count=6):
    return torch.rand(count, 3, 16, 16)


def names(count=6):
    return [f"image {k}" for k in range(count)]


def test_1d_without_a_reference_is_the_statistic():
    method, x = DiffPath(backbone=tiny_pixel_model()), images()
    scores = method.score(x, names(), names())
    noise, _ = noise_path(tiny_pixel_model(), 2 * x - 1)
    rate = 10 * noise.diff(dim=1)
    torch.testing.assert_close(scores.image, rate.square().sum((1, 2, 3, 4)).sqrt(), rtol=1e-4, atol=1e-4)
    assert scores.map is None and scores.image.dtype == torch.float32
    assert scores.details["evaluations"].tolist() == [10] * 6 and method.size == 16


def test_1d_with_a_reference_is_the_authors_kernel_density():
    normal = ImageSet("mine", "train", images(8), tuple(names(8)))
    method, x = DiffPath(backbone=tiny_pixel_model()).fit(normal_images(normal)), images()
    kernel = KernelDensity(kernel="gaussian", bandwidth=5).fit(method.statistics(normal.images))
    expected = -kernel.score_samples(method.statistics(x))
    np.testing.assert_allclose(method.score(x, names(), names()).image, expected, rtol=1e-4)


def test_6d_finds_what_is_unlike_its_reference():
    normal = load_image_set("synthad", "train", 40, size=16)
    method = DiffPath(backbone=tiny_pixel_model(), variant="6d", components=(1, 2)).fit(normal_images(normal))
    usual = load_image_set("synthad", "test", 12, size=16).images
    odd = (torch.rand(12, 3, 16, 16) > 0.5).float()
    scores = method.score(torch.cat([usual, odd]), names(24), names(24)).image
    assert scores[12:].min() > scores[:12].max()
    named = DiffPath(backbone=tiny_pixel_model(), variant="6d", components=[1, 2]).fit(normal_images("synthad", 40))
    torch.testing.assert_close(named.score(usual, names(12), names(12)).image, scores[:12], rtol=1e-3, atol=1e-3)
    config = method.config
    del config["reference"]["pixels"]
    assert named.config == config
    with pytest.raises(MethodError, match="'6d' needs a reference"):
        DiffPath(backbone=tiny_pixel_model(), variant="6d").score(usual, names(12), names(12))


@pytest.mark.parametrize("variant", ("1d", "6d"))
def test_constant_and_grey_images_give_finite_scores(variant):
    normal = load_image_set("synthad", "train", 24, size=16)
    method = DiffPath(backbone=tiny_pixel_model(), variant=variant, components=(1,)).fit(normal_images(normal))
    for x in (torch.zeros(1, 3, 16, 16), torch.ones(1, 3, 16, 16), torch.rand(1, 1, 16, 16)):
        assert torch.isfinite(method.score(x, names(1), names(1)).image).all()


# --- densities


def test_mixture_is_chosen_by_held_out_likelihood():
    """Two clouds far apart, on very different scales: at least two components, and a gap between them is untypical."""
    rng = np.random.default_rng(0)
    clouds = np.concatenate([rng.normal(0, 1, (60, 2)), rng.normal(20, 1, (60, 2))])[rng.permutation(120)]
    density = fit_mixture(clouds * [1, 1e4], (1, 2), folds=5)
    assert density.named_steps["gaussianmixture"].n_components == 2
    far, near = atypicality(density, np.array([[10, 10e4], [20, 20e4]]))
    assert far > near + 10
    again = fit_mixture(clouds * [1, 1e4], (1, 2), folds=5)
    np.testing.assert_array_equal(atypicality(density, clouds), atypicality(again, clouds))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fit_mixture(np.eye(111, 6), (50, 100)), "111 reference .* 100 components and 10 folds"),
        (lambda: fit_mixture(np.zeros((3, 2)), (1,), folds=5), "3 reference images are too few"),
        (lambda: fit_kernel(np.array([[0.0], [np.nan], [1.0]])), "1 of 3 images .* number 1"),
        (lambda: ddim_timesteps(600, 1000), "600 steps through 1000 timesteps; 500 would work"),
        (lambda: ddim_timesteps(1, 1000), "2 to 1000 .*not 1"),
        (lambda: ddim_timesteps(1001, 1000), "2 to 1000 .*not 1001"),
    ],
)
def test_errors(call, message):
    with pytest.raises(MethodError, match=message):
        call()
