"""DIVAD: the whole method against the official script (golden), start levels, cost, invariances."""

import json

import pytest
import torch
from helpers import arrays
from tiny import tiny_backbone

from conftest import shared_path
from zsad_lib.anomaly import maps
from zsad_lib.anomaly.features import load_features
from zsad_lib.diffusion import ddim
from zsad_lib.diffusion.latent import load_backbone
from zsad_lib.methods import divad
from zsad_lib.methods.divad import DIVAD, start_levels

CHEAP = {"inversion_steps": 20, "inference_steps": 20, "start_step": 10}
SETTINGS = {
    "official_default": {},
    "cheap_official_index": CHEAP,
    "cheap_matched": CHEAP | {"start": "matched"},
    "cheap_matched_cfg1": CHEAP | {"start": "matched", "guidance_scale": 1},
}
CASES = [(i, s) for i in range(4) for s in SETTINGS if (i, s) != (3, "official_default")]  # not in the files
CATEGORIES = ["hazelnut", "pcb1", "tile", ""]


@pytest.fixture(scope="module")
def golden():
    return load_backbone(shared_path("golden/tiny_sd"), device="cpu")


def tiny_divad(**options):
    """DIVAD on 32 px images: the pools must fit."""
    defaults = {"backbone": tiny_backbone(), "sigma": 1, "pool": 2}
    return DIVAD(features=load_features("pixels", "cpu"), **defaults | options)


def test_golden_settings_file():
    """The settings under test are those of the stored runs."""
    meta = json.loads(shared_path("golden/divad/meta.json").read_text())
    for i, category in enumerate(CATEGORIES):
        assert divad.PROMPT.format(category=category).strip() == meta["prompts"][i]
    for case, stored in meta["cases"].items():
        options = {k: v for k, v in SETTINGS[case.split("_", 1)[1]].items() if k != "guidance_scale"}
        assert start_levels(**options) == (stored["picked_t"], stored["sample_first_t"])


@pytest.mark.parametrize(("case", "setting"), CASES)
def test_golden_reconstruction(golden, monkeypatch, case, setting):
    """From the image file's pixels to the decoded image, with the posterior noise that the script drew."""
    stored, expected = arrays(f"divad/case{case}_input"), arrays(f"divad/case{case}_{setting}")
    drawn = []

    def stored_noise(ids, purpose, seed, shape):
        drawn.append((ids, tuple(shape)))
        return stored["posterior_noise"]

    monkeypatch.setattr(divad, "image_noise", stored_noise)
    method = tiny_divad(backbone=golden, posterior="sample", sigma=1.25, **SETTINGS[setting])
    images = stored["image"].permute(2, 0, 1)[None] / 255
    scores = method.score(images, ["an id"], [CATEGORIES[case]])
    assert drawn == [(["an id"], tuple(stored["posterior_noise"].shape[1:]))]
    reconstruction = scores.details["reconstruction"].permute(0, 2, 3, 1)
    assert (scores.details["latent"] - expected["picked_latent"]).abs().max() < 1e-4
    assert (reconstruction - expected["decoded_float"]).abs().max() < 1e-4
    assert ((255 * reconstruction[0]).round() - expected["decoded_uint8"].float()).abs().max() <= 1
    steps = {"official_default": 8 + 59, "cheap_official_index": 8 + 9}.get(setting, 9 + 9)
    assert scores.details["evaluations"].tolist() == [steps * (1 if setting.endswith("cfg1") else 2)]

    official = expected["decoded_float"].permute(0, 3, 1, 2)
    colours = [load_features("pixels", "cpu")(x) for x in (images, official)]
    raw = maps.anomaly_map(*colours, 64)
    assert (scores.map - maps.smooth(raw, 1.25)).abs().max() < 1e-4
    assert torch.allclose(scores.image, maps.image_score(scores.map, pool=2))


def test_start_levels():
    assert start_levels() == (161, 591)
    assert start_levels("matched") == (581, 591)  # 581 and 601 are equally near: the lower
    assert start_levels("matched", 100, 100) == (591, 591)
    assert start_levels(**CHEAP) == (401, 451)
    assert start_levels("matched", **CHEAP) == (451, 451)
    assert start_levels("official", 20, 20, 17) == (51, 101)
    assert start_levels("matched", 20, 20, 0) == (901, 951)  # the official inversion ends one level below
    assert start_levels(t_latent=161, t_denoise=161, inference_steps=50) == (161, 161)
    assert start_levels(t_latent=1) == (1, 591)
    assert start_levels("matched", t_denoise=301) == (301, 301)
    assert start_levels(T=100, offset=0, inversion_steps=10, inference_steps=10, start_step=5) == (30, 40)


@pytest.mark.parametrize("guidance_scale", (3.5, 1))
def test_default_costs_67_calls_and_equals_the_whole_loop(guidance_scale):
    """2·(8 + 59) U-Net samples an image, half without guidance; the 108-call loop gives the same."""
    method = tiny_divad(guidance_scale=guidance_scale)
    backbone, images = method.backbone, torch.rand(2, 3, 32, 32)
    scores = method.score(images, ["a", "b"], ["nut", "tile"])
    halves = 2 if guidance_scale != 1 else 1
    assert scores.details["evaluations"].tolist() == [67 * halves] * 2

    before = backbone.evaluations
    predict, alphas = method.predictor(["nut", "tile"]), backbone.alphas_cumprod
    path = ddim.invert(predict, backbone.encode(images), alphas, 50)
    final = ddim.denoise(predict, path[-41][1], alphas, 100, 40, skip_identity=False)
    assert backbone.evaluations - before == 2 * 108 * halves
    assert (backbone.decode(final) - scores.details["reconstruction"]).abs().max() < 1e-5


def test_posterior_and_seed():
    """The mode draws nothing; samples differ by seed and are the same every time."""
    images = torch.rand(1, 3, 32, 32)

    def latent(**options):
        method = tiny_divad(**CHEAP, t_latent=1, t_denoise=1, **options)
        return method.score(images, ["a"], ["nut"]).details["latent"]

    assert torch.equal(latent(), latent(seed=5))
    assert torch.equal(latent(), tiny_backbone().encode(images))
    assert torch.equal(latent(posterior="sample"), latent(posterior="sample"))
    assert not torch.allclose(latent(posterior="sample"), latent(posterior="sample", seed=5), atol=1e-3)


def test_level_grid():
    """Explicit levels are what is run: t_latent inverted to, t_denoise denoised from; (1, 1) is the VAE."""
    steps = []
    options = CHEAP | {"callback": lambda stage, t, z: steps.append((stage, t)), "guidance_scale": 1}
    images = torch.rand(1, 3, 32, 32)
    tiny_divad(**options, t_latent=101, t_denoise=201).score(images, ["a"], ["nut"])
    inverted, denoised = [51, 101], [151, 101, 51, 1]
    assert steps == [("invert", t) for t in inverted] + [("denoise", t) for t in denoised]
    scores = tiny_divad(**options, t_latent=1, t_denoise=1).score(images, ["a"], ["nut"])
    backbone = tiny_backbone()
    assert scores.details["evaluations"].item() == 0
    assert torch.equal(scores.details["reconstruction"], backbone.decode(backbone.encode(images)))


def test_each_prompt_is_encoded_once(monkeypatch):
    method, encoded = tiny_divad(**CHEAP), []
    embed = method.backbone.embed
    monkeypatch.setattr(method.backbone, "embed", lambda prompts: encoded.extend(prompts) or embed(prompts))
    images = torch.rand(3, 3, 32, 32)
    for _ in range(2):
        method.score(images, ["a", "b", "c"], ["metal_nut", "tile", "metal_nut"])
    assert sorted(encoded) == ["", "An image of a metal nut", "An image of a tile"]


class _PerfectDenoiser:
    """A stand-in backbone that knows what normal images look like: grey. Its latents are the pixels."""

    def __init__(self):
        tiny = tiny_backbone()
        self.alphas_cumprod, self.steps_offset = tiny.alphas_cumprod, 1
        self.image_size, self.scale_factor, self.latent_shape = 32, 1, (3, 32, 32)
        self.config, self.evaluations = {"name": "grey"}, 0

    def encode(self, images, noise=None):
        return 2 * images - 1

    def decode(self, latents):
        return (latents / 2 + 0.5).clamp(0, 1)

    def embed(self, prompts):
        return torch.zeros(len(prompts), 1, 1)

    def predict_noise(self, z, t, cond, uncond=None, guidance_scale=1.0):
        alpha, spread = self.alphas_cumprod[t], 0.02
        return (1 - alpha).sqrt() * z / (alpha * spread**2 + 1 - alpha)


def test_a_defect_is_found_when_the_model_knows_normal_images():
    """The mismatched start pulls a coloured spot back to the grey the model knows; the map shows where."""
    images = 0.5 + 0.01 * torch.randn(2, 3, 32, 32)
    images[1, 0, 8:14, 20:26] += 0.3
    method = tiny_divad(backbone=_PerfectDenoiser(), guidance_scale=1)
    scores = method.score(images, ["good", "bad"], ["grey", "grey"])
    row, column = divmod(scores.map[1].argmax().item(), 32)
    assert scores.image[1] > 5 * scores.image[0]
    assert 8 <= row < 14 and 20 <= column < 26
