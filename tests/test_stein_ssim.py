"""Stein-score errors with SSIM: parity of SSIM, one pass for every reading, noise of an image's own, invariances."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from helpers import save_image
from skimage.metrics import structural_similarity
from tiny import tiny_pixel_model, tiny_unet

from zsad_lib.anomaly.ssim import ssim, ssim_map
from zsad_lib.data.datasets import load_dataset
from zsad_lib.data.image_sets import load_image_set
from zsad_lib.data.references import normal_images
from zsad_lib.diffusion.noise import image_noise
from zsad_lib.diffusion.pixel import PixelModel
from zsad_lib.errors import DataError, MethodError
from zsad_lib.evaluation.runs import score
from zsad_lib.methods import diffpath, stein_ssim
from zsad_lib.methods.stein_ssim import Reading, SteinSSIM, extract, readings


def images(count=5):
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def names(count=5):
    return [f"image {k}" for k in range(count)]


def tiny_method(**options):
    return SteinSSIM(backbone=tiny_pixel_model(), **options)


@pytest.fixture(scope="module")
def features():
    return extract(tiny_pixel_model(), images(), names())


# --- SSIM


def scikit(x, y, data_range):
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    pairs = zip(x.double().numpy(), y.double().numpy(), strict=True)
    return np.array([structural_similarity(a, b, channel_axis=0, data_range=data_range, **options) for a, b in pairs])


@pytest.mark.parametrize(("shape", "data_range"), [((3, 3, 32, 32), 1), ((2, 1, 11, 20), 1), ((2, 3, 40, 17), 255)])
def test_ssim_is_scikit_images(shape, data_range):
    x = data_range * torch.rand(shape)
    pairs = {
        "unrelated": torch.rand(shape) * data_range,
        "near": (x + 0.05 * data_range * torch.randn(shape)).clamp(0, data_range),
        "opposite": data_range - x,
        "flat": torch.full(shape, 0.7 * data_range),
    }
    for name, y in pairs.items():
        assert np.abs(ssim(x, y, data_range).numpy() - scikit(x, y, data_range)).max() < 1e-9, name
    flat, other = torch.ones(shape) * 0.2, torch.ones(shape) * 0.9
    np.testing.assert_allclose(ssim(flat, other), scikit(flat, other, 1), atol=1e-9)


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (1, 1, 7, 20)])
def test_the_map_of_ssim_is_scikit_images_at_every_place(shape):
    x = torch.rand(shape)
    y = (x + 0.2 * torch.randn(shape)).clamp(0, 1)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1, "full": True}
    options |= {"win_size": 2 * min(5, (min(shape[2:]) - 1) // 2) + 1}  # asked to fit, then left aside
    for image, other, found in zip(x.double().numpy(), y.double().numpy(), ssim_map(x, y).numpy(), strict=True):
        expected = structural_similarity(image, other, channel_axis=0, **options)[1]
        np.testing.assert_allclose(found, expected, atol=1e-9)


def test_ssim_of_equals_is_one_and_symmetric():
    for x in (torch.rand(2, 3, 16, 16), torch.zeros(2, 3, 16, 16), torch.ones(2, 3, 16, 16)):
        assert ssim(x, x.clone()).tolist() == [1, 1]
    x, y = torch.rand(2, 2, 3, 16, 16)
    torch.testing.assert_close(ssim(x, y), ssim(y, x))
    assert ssim(x, 1 - x).max() < 0


# --- the pass


def test_denoising_features_are_what_they_say(features):
    """Written again from the definition, at one timestep, in float64."""
    model, x, k = tiny_pixel_model(), images(), 4
    alpha = model.alphas_cumprod[100 * k]
    noise = image_noise(names(), f"stein_ssim-{100 * k}", 0, (3, 16, 16)).double()
    noisy = alpha.sqrt() * (2 * x - 1) + (1 - alpha).sqrt() * noise
    eps = model.predict_noise(noisy.float(), 100 * k).double()
    error = (noise - eps).square().mean((1, 2, 3))
    estimate = ((noisy - (1 - alpha).sqrt() * eps) / alpha.sqrt() / 2 + 0.5).clamp(0, 1)
    np.testing.assert_allclose(features["denoising_noise"][:, k], error, rtol=1e-4)
    score = (-noise / (1 - alpha).sqrt() + eps / (1 - alpha).sqrt()).square().mean((1, 2, 3))
    np.testing.assert_allclose(features["denoising_score"][:, k], score, rtol=1e-4)
    np.testing.assert_allclose(features["denoising_ssim"][:, k], scikit(x, estimate, 1), atol=1e-4)


def test_weighted_errors_are_summed_as_a_path():
    """Written again: errors of every timestep times 1 − SSIM or SSIM of the place, and their change."""
    model, x = tiny_pixel_model(), images()
    errors, similarity = [], []
    for t in range(0, 1000, 100):
        noise = image_noise(names(), f"stein_ssim-{t}", 0, (3, 16, 16))
        _, predicted, estimate = stein_ssim.one_step(model, 2 * x - 1, noise, t)
        errors.append((noise - predicted).double().numpy())
        similarity.append(ssim_map(x, (estimate / 2 + 0.5).clamp(0, 1)).numpy())
    errors, similarity = np.stack(errors, 1), np.stack(similarity, 1)
    found, change = extract(model, x, names(), errors=("denoising",)), 10 * np.diff(errors, axis=1)
    for name, weight in zip(stein_ssim.WEIGHTS, (1 - similarity, similarity), strict=True):
        for part, values in (("noise", errors * weight), ("change", change * weight[:, 1:])):
            expected = np.stack([(values**p).sum((2, 3, 4)) for p in (1, 2, 3)], -1)
            np.testing.assert_allclose(found[f"{name}_{part}_powers"], expected, rtol=1e-3, atol=1e-2)


def test_one_step_takes_the_predicted_noise_off_again():
    model, x, noise = tiny_pixel_model(), 2 * images() - 1, torch.randn(5, 3, 16, 16)
    noisy, predicted, estimate = stein_ssim.one_step(model, x, noise, 300)
    alpha = model.alphas_cumprod[300].item()
    torch.testing.assert_close(noisy, alpha**0.5 * x + (1 - alpha) ** 0.5 * noise)
    torch.testing.assert_close(predicted, model.predict_noise(noisy, 300))
    torch.testing.assert_close(alpha**0.5 * estimate + (1 - alpha) ** 0.5 * predicted, noisy)


def test_trajectory_features_are_what_they_say(features):
    model, x = tiny_pixel_model(), images()
    noise, estimates = diffpath.noise_path(model, 2 * x - 1)
    change = 10 * noise.double().diff(dim=1)
    np.testing.assert_allclose(features["trajectory_noise"], change.square().mean((2, 3, 4)), rtol=1e-3)
    score = -noise.double() / (1 - model.alphas_cumprod[::100]).sqrt().view(-1, 1, 1, 1)
    expected = (10 * score.diff(dim=1)).square().mean((2, 3, 4))
    np.testing.assert_allclose(features["trajectory_score"], expected, rtol=1e-3)
    later = (estimates[:, 3] / 2 + 0.5).clamp(0, 1)
    np.testing.assert_allclose(features["trajectory_ssim"][:, 2], scikit(x, later, 1), atol=1e-4)
    statistics = diffpath.path_statistics(features["noise_powers"], features["change_powers"])
    np.testing.assert_allclose(statistics, diffpath.path_statistics(*diffpath.path_powers(noise)), rtol=1e-3, atol=1e-2)
    np.testing.assert_allclose(features["change_powers"][..., 1] / (3 * 16 * 16), features["trajectory_noise"])


def test_one_pass_serves_every_reading():
    model = PixelModel(tiny_unet(), tiny_pixel_model().scheduler, "counted")
    found = extract(model, images(), names())
    assert model.evaluations == 5 * 20
    assert found["denoising_noise"].shape == (5, 10) and found["trajectory_ssim"].shape == (5, 9)
    for reading in readings(decision="sum"):
        assert reading.scores(found).shape == (5,)
    assert model.evaluations == 5 * 20
    half = extract(model, images(), names(), errors=("denoising",))
    assert model.evaluations == 5 * 30 and "trajectory_ssim" not in half


def test_an_image_has_its_own_noise():
    """The features of an image depend on its id and the seed: not on its batch, its place, or other steps."""
    x, model = images(), tiny_pixel_model()
    whole = extract(model, x, names())
    turned = extract(model, x.flip(0), names()[::-1], batch_size=2)
    for key in whole.keys() - {"ids"}:
        np.testing.assert_allclose(turned[key][::-1], whole[key], rtol=1e-3, atol=1e-3, err_msg=key)
    fewer = extract(model, x, names(), steps=5, errors=("denoising",))
    np.testing.assert_allclose(fewer["denoising_noise"], whole["denoising_noise"][:, ::2], rtol=1e-4)
    for other in (extract(model, x, names(), seed=1), extract(model, x, [f"other {k}" for k in range(5)])):
        assert np.abs(other["denoising_noise"] - whole["denoising_noise"]).max() > 1e-3
        np.testing.assert_array_equal(other["trajectory_noise"], whole["trajectory_noise"])


def test_constant_and_grey_images_give_finite_scores():
    normal = load_image_set("synthad", "train", 24, size=16)
    reference = extract(tiny_pixel_model(), normal.images, normal.ids)
    odd = [torch.zeros(1, 3, 16, 16), torch.ones(1, 3, 16, 16), torch.full((1, 1, 16, 16), 0.5), images(1)[:, :1]]
    found = [extract(tiny_pixel_model(), x, names(1)) for x in odd]
    for reading in (*readings(density="kde"), Reading(decision="typicality")):
        density = reading.fit(reference) if reading.decision == "typicality" else None
        assert all(np.isfinite(reading.scores(features, density)).all() for features in found), reading


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: ssim(*torch.rand(2, 2, 3, 10, 16)), ValueError, r"11 px or more, not \[10, 16\]"),
        (lambda: extract(tiny_pixel_model(), images(), names(4)), ValueError, "5 images came with 4 ids"),
        (lambda: extract(tiny_pixel_model(), torch.rand(1, 3, 32, 32), names(1)), ValueError, r"\[B,3,16,16\]"),
        (lambda: extract(tiny_pixel_model(), images(), names(), errors=("noise",)), MethodError, "'noise'.*denoising"),
        (lambda: Reading("trajectory").scores(made_up([], [])), MethodError, "'trajectory'.*errors="),
        (lambda: tiny_method(decision="typicality").score(images(), names(), names()), MethodError, "typicality.* fit"),
        (lambda: tiny_method(decision="sum").fit(normal_images("noise", 5)), MethodError, "'sum' takes no reference"),
        (lambda: normal_images("nothing"), DataError, "nothing"),
        (lambda: SteinSSIM(backbone=PixelModel(tiny_unet(sample_size=8), DDPMScheduler(), "x")), MethodError, "10 px"),
    ],
)
def test_inputs_that_do_not_fit(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


# --- readings


def made_up(error, similarity):
    return {"denoising_noise": np.array(error), "denoising_ssim": np.array(similarity)}


def test_amplifications():
    found = made_up([[2.0, 3.0], [2.0, 3.0]], [[1.0, 1.0], [0.5, -0.2]])
    assert Reading(amplification="product").scores(found).tolist() == [0, pytest.approx(1 + 3.6)]
    assert Reading(amplification="none").scores(found).tolist() == [5, 5]
    assert Reading(amplification="ratio", delta=0.1).scores(found).tolist() == [5, pytest.approx(4 + 30)]
    joint = Reading(amplification="joint", decision="typicality").values(found)
    assert joint.tolist() == [[2, 3, 1, 1], [2, 3, 0.5, -0.2]]


def test_scale(features):
    noise, score = (Reading(amplification="none", scale=scale).values(features) for scale in stein_ssim.SCALES)
    np.testing.assert_allclose(score * (1 - tiny_pixel_model().alphas_cumprod[::100]).numpy(), noise)


def test_readings_are_all_the_combinations():
    every = readings()
    sums, others = 2 * 2 * 3, 2 * 2 * 4 * 2  # sums without joint, two densities of each other
    assert len({str(r) for r in every}) == len(every) == sums + others
    assert len(readings(error="denoising", scale="noise", density="kde")) == 3 + 4
    assert readings(decision="sum", error="trajectory", scale="noise", amplification="none") == [
        Reading("trajectory", "none", "sum", "noise")
    ]


@pytest.mark.parametrize("density", stein_ssim.DENSITIES)
@pytest.mark.parametrize("amplification", stein_ssim.AMPLIFICATIONS)
def test_typicality_finds_both_sides(density, amplification):
    """Errors below the usual are as untypical as errors above, which no sum can see."""
    rng = np.random.default_rng(0)
    usual = made_up(rng.normal(5, 0.1, (80, 3)), rng.normal(0.5, 0.01, (80, 3)))
    odd = made_up([[5.0] * 3, [3.0] * 3, [7.0] * 3], [[0.5] * 3] * 3)
    reading = Reading(amplification=amplification, decision="typicality", density=density)
    fine, low, high = reading.scores(odd, reading.fit(usual))
    assert min(low, high) > fine + 10
    if amplification != "joint":
        low, fine, high = np.sort(Reading(amplification=amplification).scores(odd))
        assert low < fine < high


# --- the method


@pytest.mark.parametrize("reading", readings(scale="noise", density="kde"), ids=str)
def test_method_gives_the_readings_scores(reading):
    x, model = images(), tiny_pixel_model()
    normal = load_image_set("synthad", "train", 12, size=16)
    density = reading.fit(extract(model, normal.images, normal.ids)) if reading.decision == "typicality" else None
    method = SteinSSIM(backbone=model, **reading.__dict__)
    if density:
        method.fit(normal_images(normal))
    scores = method.score(x, names(), names())
    np.testing.assert_allclose(scores.image, reading.scores(extract(model, x, names()), density), rtol=1e-4)
    assert scores.map is None and scores.image.dtype == torch.float32
    assert scores.details["evaluations"].tolist() == [10] * 5


def test_what_is_not_given_follows_from_the_reference():
    normal = normal_images(load_image_set("noise", "train", 5, size=16))
    assert tiny_method().reading == stein_ssim.DEFAULTS["sum"]
    assert tiny_method().fit(normal).reading == stein_ssim.DEFAULTS["typicality"]
    changed = tiny_method(error="denoising", density="gmm").fit(normal).reading
    assert changed == replace(stein_ssim.DEFAULTS["typicality"], error="denoising", density="gmm")


def test_scoring_a_dataset(tmp_path):
    """The scoring engine takes the method as it takes DIVAD: no maps, the seed and the model in the header."""
    for k in range(3):
        save_image(tmp_path / f"{k}.png", np.random.default_rng(k).integers(0, 256, (20, 20, 3), np.uint8))
    dataset, method = load_dataset("folder", tmp_path), tiny_method(seed=4)
    results = score(dataset, method, tmp_path / "runs", progress=False)
    assert results.maps is None and results.run["seed"] == 4 and results.frame["evaluations"].tolist() == [10] * 3
    alone = score(dataset, method, tmp_path / "one", batch_size=1, progress=False)
    np.testing.assert_allclose(alone.frame["pred_score"], results.frame["pred_score"], rtol=1e-4)


def test_a_reference_is_named():
    """The record says which normal images there are, and their pixels where given."""
    normal = load_image_set("noise", "train", 5, size=16)
    given = tiny_method().fit(normal_images(normal)).config["reference"]
    assert given.items() >= {"name": "noise", "split": "train", "images": 5}.items() and "pixels" in given
    darker = normal_images(replace(normal, images=normal.images / 2))
    assert tiny_method().fit(darker).config["reference"] != given
    named = tiny_method().fit(normal_images("noise", 5)).config["reference"]
    assert named == {key: value for key, value in given.items() if key != "pixels"}
