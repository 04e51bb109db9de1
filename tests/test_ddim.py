"""zsad_lib.diffusion.ddim: the official loops step by step (golden), the algebra, and inversion against denoising."""

import json

import pytest
import torch
from helpers import arrays
from tiny import tiny_scheduler

from conftest import shared_path
from zsad_lib.diffusion import ddim
from zsad_lib.diffusion.latent import load_backbone
from zsad_lib.errors import MethodError

SETTINGS = ("official_default", "cheap_official_index", "cheap_matched", "cheap_matched_cfg1")
CASES = [(i, s) for i in range(4) for s in SETTINGS if (i, s) != (3, "official_default")]  # not in the files
ALPHAS = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, dim=0)


def guided(backbone, meta, case, setting):
    """(the prediction of the official script's run, its options), which notes what it was asked in `asked`."""
    options, (cond, uncond) = meta["settings"][setting], backbone.embed([meta["prompts"][case], ""])
    asked = []

    def predict(z, t):
        asked.append((t, z))
        return backbone.predict_noise(z, t, cond[None], uncond[None], options["guidance"])

    return predict, options, asked


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(shared_path("golden/tiny_sd"), device="cpu")


@pytest.fixture(scope="module")
def meta():
    return json.loads(shared_path("golden/divad/meta.json").read_text())


@pytest.mark.parametrize(("case", "setting"), CASES)
def test_golden_loops(backbone, meta, case, setting):
    """Every latent, timestep and level of the official `invert` and `sample`, from the stored start."""
    golden = arrays(f"divad/case{case}_{setting}")
    start = arrays(f"divad/case{case}_input")["start_latents"]
    predict, options, asked = guided(backbone, meta, case, setting)
    path = ddim.invert(predict, start, backbone.alphas_cumprod, options["nis"])
    assert [t for t, _ in asked] == golden["inv_timesteps"].tolist() == [t for t, _ in path]
    assert (torch.cat([z for _, z in path]) - golden["inverted_latents"]).abs().max() < 1e-4
    assert ddim.inversion_steps(options["nis"]) == [tuple(p) for p in golden["inv_acp_index"].tolist()]

    picked = path[options["index"]][1]
    assert (picked - golden["picked_latent"]).abs().max() < 1e-4
    asked.clear()
    steps = options["inf_step"], options["ss"]
    final = ddim.denoise(predict, picked, backbone.alphas_cumprod, *steps, skip_identity=False)
    assert [t for t, _ in asked] == golden["smp_timesteps"].tolist()
    assert (torch.cat([z for _, z in asked]) - golden["smp_latents_in"]).abs().max() < 1e-4
    assert ddim.denoising_steps(*steps) == [tuple(p) for p in golden["smp_acp_index"].tolist()]
    assert (final - golden["final_latent"]).abs().max() < 1e-4

    decoded = backbone.decode(final).permute(0, 2, 3, 1)
    assert (decoded - golden["decoded_float"]).abs().max() < 1e-4
    levels = (255 * decoded[0]).round() - golden["decoded_uint8"].float()
    assert levels.abs().max() <= 1


@pytest.mark.parametrize("setting", SETTINGS[1:])
def test_golden_noise_predictions(backbone, meta, setting):
    """Both halves of the guided call, from the stored latents of the last denoising step, non-square."""
    golden = arrays(f"divad/case3_{setting}")
    cond, uncond = backbone.embed([meta["prompts"][3], ""])
    z, t = golden["smp_latents_in"][-1:], int(golden["smp_timesteps"][-1])
    for text, stored in ((uncond, golden["smp_eps"][-1, :1]), (cond, golden["smp_eps"][-1, 1:])):
        assert (backbone.predict_noise(z, t, text[None]) - stored).abs().max() < 1e-4


@pytest.mark.parametrize("setting", ("official_default", "cheap_matched"))
def test_golden_short_cuts(backbone, meta, setting):
    """Ending the inversion at the picked level and skipping the idle step changes nothing that matters."""
    golden, start = arrays(f"divad/case0_{setting}"), arrays("divad/case0_input")["start_latents"]
    (predict, options, _), before = guided(backbone, meta, 0, setting), backbone.evaluations
    stop = meta["cases"][f"case0_{setting}"]["picked_t"]
    path = ddim.invert(predict, start, backbone.alphas_cumprod, options["nis"], stop=stop)
    assert path[-1][0] == stop
    final = ddim.denoise(predict, path[-1][1], backbone.alphas_cumprod, options["inf_step"], options["ss"])
    assert (final - golden["final_latent"]).abs().max() < 1e-4
    calls = {"official_default": 8 + 59, "cheap_matched": 9 + 9}[setting]
    assert backbone.evaluations - before == 2 * calls


def test_golden_schedule(backbone):
    golden = arrays("divad/schedule")["alphas_cumprod"]
    assert backbone.alphas_cumprod.dtype == torch.float32
    assert (backbone.alphas_cumprod - golden).abs().max() < 1e-7


def test_step_algebra():
    """A step there and back with the same noise returns the latent; x0 and noise are each other's inverse."""
    z0, noise, eps = torch.randn(3, 2, 4, 5, 6, dtype=torch.float64)
    z = ddim.add_noise(z0, noise, 0.3)
    assert torch.allclose(ddim.predict_x0(z, noise, 0.3), z0, atol=1e-12)
    assert torch.allclose(ddim.ddim_step(ddim.ddim_step(z, eps, 0.3, 0.9), eps, 0.9, 0.3), z, atol=1e-12)
    assert torch.allclose(ddim.ddim_step(z, noise, 0.3, 0.8), ddim.add_noise(z0, noise, 0.8), atol=1e-12)
    assert torch.allclose(ddim.ddim_step(z, noise, torch.tensor(0.3), 1.0), z0, atol=1e-6)


def test_grids():
    assert ddim.ascending_grid(50)[:3] == [1, 21, 41] and ddim.ascending_grid(50)[-1] == 981
    assert ddim.ascending_grid(3, T=10, offset=0) == [0, 3, 6]
    assert ddim.inversion_steps(5) == [(1, 201), (201, 401), (401, 601)]
    assert ddim.denoising_steps(5, 2) == [(401, 201), (201, 1), (1, 1)]
    assert ddim.denoising_steps(5, 4) == [(1, 1)]


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: ddim.ascending_grid(0), "n_steps .* 1 to 1000"),
        (lambda: ddim.ascending_grid(1001), "n_steps .* 1 to 1000"),
        (lambda: ddim.ascending_grid(1000, offset=1), "timestep 1000"),
        (lambda: ddim.denoising_steps(10, 10), "start_step .* 0 to 9"),
        (lambda: ddim.invert(None, torch.zeros(1), ALPHAS, 10, stop=5), r"\[101, 201"),
    ],
)
def test_errors(call, named):
    with pytest.raises(MethodError, match=named):
        call()


def gaussian_predictor(alphas, mean=0.4, std=0.3):
    """The optimal noise prediction for data ~ N(mean, std²): smooth, so inversion must converge."""

    def predict(z, t):
        alpha = alphas[t]
        return (1 - alpha).sqrt() * (z - alpha.sqrt() * mean) / (alpha * std**2 + 1 - alpha)

    return predict


def round_trip_error(predict, z, alphas, n, t=601):
    up = ddim.invert(predict, z, alphas, n, stop=t)[-1][1]
    grid = ddim.ascending_grid(n)
    down = ddim.denoise(predict, up, alphas, n, start_step=n - 1 - grid.index(t))
    return ((down - z).square().mean() / z.square().mean()).sqrt().item()


def test_inversion_converges():
    """Up to t=601 and down again: the error is of first order in the step size, and it vanishes."""
    z = 0.4 + 0.3 * torch.randn(2, 4, 8, 8)
    errors = [round_trip_error(gaussian_predictor(ALPHAS), z, ALPHAS, n) for n in (10, 20, 50, 100, 250)]
    assert all(b < 0.6 * a for a, b in zip(errors, errors[1:], strict=False)), errors
    assert errors[-1] < 0.02 < errors[0], errors


def test_inverted_latent_has_the_levels_distribution():
    """The probability flow carries N(mean, std²) at level 1 to N(√ᾱ·mean, ᾱ·std² + 1 − ᾱ) at level t."""
    predict, z = gaussian_predictor(ALPHAS), 0.4 + 0.3 * torch.randn(1, 4, 32, 32)
    for t, latent in ddim.invert(predict, z, ALPHAS, 250)[::50]:
        alpha = ALPHAS[t]
        std = (alpha * 0.3**2 + 1 - alpha).sqrt()
        standardised = (latent - alpha.sqrt() * 0.4) / std
        assert torch.allclose(standardised, (z - 0.4) / 0.3, atol=0.08), t


def test_golden_model_round_trip(backbone):
    """With a network instead of a formula, more steps bring the latent back more closely too."""
    z = arrays("divad/case0_input")["start_latents"]
    cond = backbone.embed(["An image of a hazelnut"])
    predict = lambda z, t: backbone.predict_noise(z, t, cond)  # noqa: E731
    errors = [round_trip_error(predict, z, backbone.alphas_cumprod, n) for n in (5, 20, 100)]
    assert errors[2] < 0.5 * errors[1] < 0.5 * errors[0] and errors[2] < 0.1, errors


def test_denoise_is_diffusers_ddim():
    """An independent implementation: DDIMScheduler with "leading" spacing and the same offset."""
    scheduler, reached = tiny_scheduler(), []
    scheduler.set_timesteps(20)
    predict = gaussian_predictor(scheduler.alphas_cumprod)
    z = torch.randn(2, 4, 8, 8)
    ddim.denoise(predict, z, scheduler.alphas_cumprod, 20, 5, callback=lambda t, z: reached.append((t, z)))
    timesteps = scheduler.timesteps[5:].tolist()
    assert [t for t, _ in reached] == timesteps[1:]
    for t, (_, latent) in zip(timesteps, reached, strict=False):
        z = scheduler.step(predict(z, t), t, z).prev_sample
        assert torch.allclose(latent, z, atol=1e-5)


def test_callback_and_stop():
    calls, seen = [], []

    def predict(z, t):
        calls.append(t)
        return 0.1 * z

    path = ddim.invert(predict, torch.ones(1, 1, 2, 2), ALPHAS, 10, stop=301, callback=lambda t, z: seen.append((t, z)))
    assert calls == [101, 201, 301] == [t for t, _ in seen] == [t for t, _ in path]
    assert all(a is b for (_, a), (_, b) in zip(seen, path, strict=True))
    whole = ddim.invert(predict, torch.ones(1, 1, 2, 2), ALPHAS, 10)
    assert torch.equal(whole[2][1], path[-1][1]) and len(whole) == 8


def test_golden_loops_replayed():
    """The official loops with their own noise predictions in the network's place: needs no weights."""
    golden, settings = arrays("divad/case0_cheap_official_index"), {"n_steps": 20, "offset": 1}
    alphas = arrays("divad/schedule")["alphas_cumprod"]

    def replay(stored):
        left = iter(stored[:, :1] + 3.5 * (stored[:, 1:] - stored[:, :1]))
        return lambda z, t: next(left)

    start = arrays("divad/case0_input")["start_latents"]
    path = ddim.invert(replay(golden["inv_eps"]), start, alphas, **settings)
    assert [t for t, _ in path] == golden["inv_timesteps"].tolist()
    assert (torch.cat([z for _, z in path]) - golden["inverted_latents"]).abs().max() < 1e-4
    options = {"start_step": 10, "skip_identity": False}
    final = ddim.denoise(replay(golden["smp_eps"]), golden["picked_latent"], alphas, **settings, **options)
    assert (final - golden["final_latent"]).abs().max() < 1e-4
