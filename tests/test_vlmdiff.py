"""VLMDiff: the method's own sampling against the authors' (golden), its start levels, texts, scales and invariances."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from compvis import full_size, gaussian, sd_unet, sd_vae, slice_error
from helpers import arrays
from tiny import guided_model, tiny_backbone

from zsad_lib.anomaly import maps
from zsad_lib.anomaly.features import load_features
from zsad_lib.data.captions import Captioner
from zsad_lib.diffusion import ddim
from zsad_lib.diffusion.guidance import MODES, GuidedModel, SemanticGuide
from zsad_lib.diffusion.latent import Backbone
from zsad_lib.errors import MethodError
from zsad_lib.methods import divad, vlmdiff
from zsad_lib.methods.vlmdiff import VLMDiff, start_levels
from zsad_lite.training.pipeline import build_scheduler

IDS = ["x/1", "x/2", "y/1"]
CAPTIONS = dict(zip(IDS, ["a red nut", "a tile", "a nut"], strict=True))
IMAGENET = {"hint_mean": (0.485, 0.456, 0.406), "hint_std": (0.229, 0.224, 0.225)}


def tiny_model(**changes):
    return guided_model(**changes)[0]


def tiny_vlmdiff(model=None, **options):
    """VLMDiff on 32 px images: the pools must fit."""
    pools = {"sigma": 1, "pool": 2}
    return VLMDiff(backbone=model or tiny_model(), features=load_features("pixels", "cpu"), **pools | options)


def stored_noise(monkeypatch, **noises):
    """`image_noise` gives these instead, by their purposes; returns the list of what was asked for."""
    asked = []

    def give(ids, purpose, seed, shape):
        asked.append((purpose, tuple(shape)))
        return noises[purpose.removeprefix("vlmdiff-")]

    monkeypatch.setattr(vlmdiff, "image_noise", give)
    return asked


def reconstruct(images=None, ids=IDS, **options):
    images = torch.rand(3, 3, 32, 32) if images is None else images
    return tiny_vlmdiff(**options).reconstruct(images, ids)[0]


# --- against the authors' sampler


class ToyModel(GuidedModel):
    """The function of the golden files in the network's place; the hint is the stored one, whatever the images."""

    def condition_on(self, images):
        hint = gaussian("ddim/hint", (1, 3, 64, 64))

        def network(z, timesteps, text):
            t = timesteps.view(-1, 1, 1, 1).float()
            of_text, of_hint = text.mean((1, 2)).view(-1, 1, 1, 1), hint.mean()
            return 0.4 * (t / 300).cos() * z + 0.3 * z.tanh() + 0.2 * of_text + 0.1 * of_hint

        def predict_noise(z, t, cond, uncond=None, scale=1.0):
            return self.backbone.predict_noise(z, t, cond, uncond, scale, network)

        return SimpleNamespace(predict_noise=predict_noise)


def toy_texts(prompts):
    texts = {"text": gaussian("ddim/text", (1, 77, 768)) + 0.5, "": gaussian("ddim/uncond", (1, 77, 768)) - 0.25}
    return torch.cat([texts[prompt] for prompt in prompts])


def toy_errors(monkeypatch, case, **options):
    """Largest differences to the authors' sampler, of the noised latent and after the steps."""
    stored, path = arrays(f"vlmdiff/ddim_{case}"), []
    backbone = tiny_backbone()
    monkeypatch.setattr(backbone, "encode", lambda images, noise: stored["z"])
    monkeypatch.setattr(backbone, "embed", toy_texts)
    stored_noise(monkeypatch, posterior=None, start=stored["noise"])
    options |= {"captions": {"an id": "text"}, "callback": lambda *step: path.append(step)}
    method = tiny_vlmdiff(ToyModel(backbone, tiny_model().guide), **options)
    method.reconstruct(torch.rand(1, 3, 32, 32), ["an id"])
    steps = stored["t"].tolist()
    assert [(stage, t) for stage, t, _ in path] == [("noise", 999), *(("denoise", t) for t in [*steps[1:], 0])]
    assert len(stored["latents"]) == len(path)
    errors = [(z - latent[None]).abs().max().item() for (*_, z), latent in zip(path, stored["latents"], strict=True)]
    return errors[0], max(errors[1:])


@pytest.mark.parametrize(
    ("case", "options"),
    [("official", {}), ("no_guidance", {"guidance_scale": 1}), ("five", {"start_step": 5})],
)
def test_golden_sampler(monkeypatch, case, options):
    """Noised at 999, then ten steps (or the last five) of the method's own loop, latent by latent."""
    noised, latents = toy_errors(monkeypatch, case, **options)
    assert noised < 2e-6 and latents < 2e-4


def test_golden_schedule():
    """The steps 901 … 1 and both ᾱ of each; the last step ends at ᾱ_0, not at 1."""
    stored, alphas = arrays("vlmdiff/schedule"), tiny_backbone().alphas_cumprod
    steps = ddim.denoising_steps(10, final=0)
    assert steps[0] == (901, 801) and steps[-1] == (1, 0)
    for key, levels in zip(("alphas", "alphas_prev"), zip(*steps, strict=True), strict=True):
        assert (alphas[list(levels)[::-1]] - stored[f"S10/{key}"]).abs().max() < 1e-6
    assert [t for t, _ in steps] == stored["S10/ddim_timesteps"].flip(0).tolist()


# --- the authors' network, at its width


@pytest.fixture(scope="module")
def full_model():
    """A GuidedModel at full width: 5.7 GB."""
    arrays("vlmdiff/e2e_all")
    unet = full_size(sd_unet, "unet")
    guide = full_size(lambda: SemanticGuide.from_unet(sd_unet(), 3, **IMAGENET), "guide")
    stub = torch.nn.Module()  # in the text encoder's place
    stub.config = SimpleNamespace(hidden_size=768)
    backbone = Backbone(full_size(sd_vae, "vae"), unet, stub, None, build_scheduler(), "filled")
    backbone.embed = lambda prompts: torch.cat([gaussian(f"context/{prompt}", (1, 77, 768)) for prompt in prompts])
    return GuidedModel(backbone, guide)


def full_errors(monkeypatch, model, mode):
    """{quantity: largest difference to the authors' test-time sampling}, from the pixels to the drawn image.

    Autoencoder and hint get what theirs got: the stored input, as the normalised form of an image.
    """
    name = mode.replace(" ", "_")
    stored, path, backbone = arrays(f"vlmdiff/e2e_{name}"), [], model.backbone
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in IMAGENET.values())
    images = gaussian("e2e/image", (1, 3, 128, 128), 0.5) * std + mean
    sampled = (stored["z"] / 0.18215 - stored["posterior_mean"]) / (stored["posterior_logvar"] / 2).exp()
    asked = stored_noise(monkeypatch, posterior=sampled, start=stored["noise"])
    options = {"captions": {"an id": "a photo of a bottle"}, "guidance_mode": mode, "normalisation": "imagenet"}
    options |= {"callback": lambda stage, t, z: path.append(z), "features": load_features("pixels", "cpu")}
    method = VLMDiff(backbone=model, **options)
    monkeypatch.setattr("zsad_lib.methods.base.check_batch", lambda *_: None)  # the stored input is beyond [0,1]
    scores = method.score(images, ["an id"], ["bottle"])
    assert asked == [("vlmdiff-posterior", (4, 16, 16)), ("vlmdiff-start", (4, 16, 16))]
    assert scores.details["evaluations"].tolist() == [20]
    with torch.no_grad():
        decoded = 2 * backbone.decode(path[-1], clamp=False) - 1
    expected = (decoded * std + mean).clamp(0, 1)
    pixels = [load_features("pixels", "cpu")(x) for x in (images, expected)]
    return {
        "x_T": (path[0] - stored["x_T"]).abs().max().item(),
        "latents": (torch.stack(path[1:]) - stored["latents"].unsqueeze(1)).abs().max().item(),
        "samples, pooled": (F.avg_pool2d(decoded, 8) - stored["samples_16"]).abs().max().item(),
        "samples": slice_error(stored, f"e2e/{name}/samples", decoded),
        "reconstruction": (scores.details["reconstruction"] - expected).abs().max().item(),
        "map": (scores.map - maps.smooth(maps.anomaly_map(*pixels, 256), 5)).abs().max().item(),
    }


@pytest.mark.full
@pytest.mark.parametrize("mode", MODES)
def test_golden_end_to_end(monkeypatch, full_model, mode):
    limits = {"x_T": 3e-5, "latents": 2e-3}
    for quantity, error in full_errors(monkeypatch, full_model, mode).items():
        assert error < limits.get(quantity, 1e-4), quantity


# --- levels


@pytest.mark.parametrize(
    ("words", "levels"),
    [
        ((), (999, 901)),
        (("matched",), (901, 901)),
        (("official", 10, 5), (999, 401)),
        (("matched", 10, 5), (401, 401)),
        (("official", 20), (999, 951)),
        (("official", 10, 0, 1400), (1399, 1261)),
        (("matched", 10, 0, 100, 0), (90, 90)),
    ],
)
def test_start_levels(words, levels):
    assert start_levels(*words) == levels


@pytest.mark.parametrize(("start", "level"), [("official", 999), ("matched", 901)])
def test_start_is_the_level_of_the_noise_alone(monkeypatch, start, level):
    """Both run the same steps; the latent they begin with has the noise of 999 or of 901."""
    noise, path = torch.randn(1, 4, 8, 8), []
    stored_noise(monkeypatch, start=noise)
    options = {"callback": lambda stage, t, z: path.append((stage, t)), "posterior": "mode"}
    images, model = torch.rand(1, 3, 32, 32), tiny_model()
    latent = tiny_vlmdiff(model, start=start, **options).score(images, ["a"], [""]).details["latent"]
    alpha = model.backbone.alphas_cumprod[level]
    expected = alpha.sqrt() * model.backbone.encode(images) + (1 - alpha).sqrt() * noise
    assert (latent - expected).abs().max() < 1e-5
    assert path == [("noise", level), *(("denoise", t) for t in [*range(801, 0, -100), 0])]


@pytest.mark.parametrize(("start", "image", "noise"), [("official", 0.577, 0.069), ("matched", 0.9996, 0.029)])
def test_what_a_perfect_prediction_gives_back(monkeypatch, start, image, noise):
    """The golden files' numbers: with the true noise predicted, a mismatched start loses 42 % of the latent."""
    parts, alphas = torch.eye(2), tiny_backbone().alphas_cumprod  # a latent as (how much of z, how much of the noise)
    t_latent, _ = start_levels(start)
    z = ddim.add_noise(parts[0], parts[1], alphas[t_latent])
    found = ddim.denoise(lambda z, t: parts[1], z, alphas, 10, final=0)
    assert found[0].item() == pytest.approx(image, abs=1e-3)
    assert found[1].item() == pytest.approx(noise, abs=1e-3)


# --- text and guidance


@pytest.mark.parametrize(
    ("options", "evaluations"),
    [
        ({"captions": CAPTIONS}, 20),
        ({"captions": CAPTIONS, "guidance_scale": 1}, 10),
        ({"captions": CAPTIONS, "steps": 4, "guidance_scale": 2}, 8),
        ({"captions": CAPTIONS, "start_step": 7}, 6),
        ({}, 10),
    ],
)
def test_cost(options, evaluations):
    """Two samples a step with guidance; one at guidance 1 and without captions, where both halves would be equal."""
    scores = tiny_vlmdiff(**options).score(torch.rand(3, 3, 32, 32), IDS, [""] * 3)
    assert scores.details["evaluations"].tolist() == [evaluations] * 3


def test_without_captions_guidance_has_no_effect():
    """Both halves computed, as the authors do: the same picture for twice the cost."""
    images = torch.rand(3, 3, 32, 32)
    plain = reconstruct(images)
    assert (reconstruct(images, captions=dict.fromkeys(IDS, "")) - plain).abs().max() < 1e-4
    assert torch.equal(reconstruct(images, guidance_scale=1), plain)


def test_captions_are_the_conditional_text(monkeypatch):
    """A caption by id is embedded beside the one empty text, and changes the picture; a captioner says the same."""
    images, model, encoded = torch.rand(3, 3, 32, 32), tiny_model(), []
    plain = reconstruct(images, model=model)
    embed = model.backbone.embed
    monkeypatch.setattr(model.backbone, "embed", lambda prompts: encoded.append(prompts) or embed(prompts))
    told = reconstruct(images, model=model, captions=CAPTIONS)
    assert encoded == [[""], list(CAPTIONS.values())]
    assert min((told - plain).abs().amax((1, 2, 3))) > 1e-3
    seen = []

    def captioner(given):
        seen.append(given)
        return list(CAPTIONS.values())

    captioner.name = "tiny-captioner"
    assert torch.equal(reconstruct(images, model=model, captions=captioner), told)
    assert torch.equal(seen[0], images) and len(seen) == 1
    assert tiny_vlmdiff(model, captions=captioner).config["captions"] == {"captioner": "tiny-captioner"}
    read = [
        Captioner(None, None, "a", size, (0.5,) * 3, (0.5,) * 3, revision)
        for size, revision in ((8, "x"), (8, "y"), (9, "x"))
    ]
    records = [tiny_vlmdiff(model, captions=one).config["captions"]["captioner"] for one in read]
    assert [record["revision"] for record in records] == ["x", "y", "x"] and records[0] != records[2]


def test_captions_that_are_missing():
    class Short:
        name = "short"
        __call__ = lambda self, images: ["one"]  # noqa: E731

    for captions, why in (
        ({"x/2": "a tile", "y/1": None}, "no caption for 2 of 3 images: x/1, y/1$"),
        (Short(), "gave 1 captions for 3 images"),
    ):
        with pytest.raises(MethodError, match=why):
            reconstruct(captions=captions)


def test_guidance_mode_is_the_models_unless_given():
    images, modes = torch.rand(3, 3, 32, 32), {mode: tiny_model(mode=mode) for mode in MODES}
    found = {mode: reconstruct(images, model=model) for mode, model in modes.items()}
    assert (found["all"] - found["only mid"]).abs().max() > 1e-3
    assert torch.equal(reconstruct(images, model=modes["all"], guidance_mode="only mid"), found["only mid"])
    assert modes["all"].mode == "all", "the model given is left as it is"
    assert tiny_vlmdiff(modes["all"]).config["backbone"]["mode"] == "all"


def test_every_image_is_its_own_hint():
    """The same latent and noise with another image as the hint gives another picture."""
    images, model = torch.rand(1, 3, 32, 32), tiny_model()
    seeing = model.condition_on
    swapped = tiny_vlmdiff(model)
    swapped.backbone.condition_on = lambda images: seeing(1 - images)
    assert (swapped.reconstruct(images, ["a"])[0] - reconstruct(images, ["a"])).abs().max() > 1e-3


# --- scales


def network_inputs(monkeypatch, vae, images, **options):
    """What the autoencoder encodes, and what it decodes to, in its own units; the reconstruction."""
    seen, (encode, decode) = {}, (vae.encode, vae.decode)
    monkeypatch.setattr(vae, "encode", lambda x: seen.update(encoded=x) or encode(x))

    def amplified(latents):
        out = SimpleNamespace(sample=4 * decode(latents).sample)  # beyond every range
        seen["decoded"] = out.sample
        return out

    monkeypatch.setattr(vae, "decode", amplified)
    drawn = reconstruct(images, **options)
    monkeypatch.undo()
    return seen["encoded"], seen["decoded"], drawn


@pytest.mark.parametrize("normalisation", vlmdiff.NORMALISATIONS)
def test_normalisation_reaches_the_autoencoder_and_back(monkeypatch, normalisation):
    images, model = torch.rand(3, 3, 32, 32), tiny_model()
    mean, std = IMAGENET.values() if normalisation == "imagenet" else ((0.5,) * 3, (0.5,) * 3)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std))
    options = {"model": model, "normalisation": normalisation}
    encoded, decoded, drawn = network_inputs(monkeypatch, model.backbone.vae, images, **options)
    assert (encoded - (images - mean) / std).abs().max() < 1e-6
    assert decoded.abs().max() > 1.1
    assert (drawn - (decoded * std + mean).clamp(0, 1)).abs().max() < 1e-6


def test_imagenet_colours_survive_the_round_trip():
    """Black and white lie outside the autoencoder's [-1,1] there; nothing is clipped on the way back."""
    images = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    for normalisation in vlmdiff.NORMALISATIONS:
        inputs = vlmdiff.normalise(images, normalisation)
        assert torch.allclose(vlmdiff.denormalise(inputs, normalisation), images, atol=1e-6)
    assert inputs.min() < -0.5 and inputs.max() > 1.5


def test_the_hint_keeps_the_guides_own_scale(monkeypatch):
    model, seen = tiny_model(), []
    embed = model.guide.embed
    monkeypatch.setattr(model.guide, "embed", lambda images: seen.append(images) or embed(images))
    images = torch.rand(3, 3, 32, 32)
    for normalisation in vlmdiff.NORMALISATIONS:
        reconstruct(images, model=model, normalisation=normalisation)
    assert all(torch.equal(given, images) for given in seen) and len(seen) == 2


# --- as a method


def test_posterior_and_seed(monkeypatch):
    """The posterior's sample and the start have noises of their own; the mode draws the second only."""
    images, model, asked = torch.rand(1, 3, 32, 32), tiny_model(), []
    draw = divad.image_noise
    monkeypatch.setattr(vlmdiff, "image_noise", lambda ids, what, *rest: asked.append(what) or draw(ids, what, *rest))

    def latent(**options):
        return tiny_vlmdiff(model, **options).reconstruct(images, ["a"])[1]

    sampled = latent()
    assert asked == ["vlmdiff-posterior", "vlmdiff-start"]
    mode = latent(posterior="mode")
    assert asked[2:] == ["vlmdiff-start"]
    assert torch.equal(latent(), sampled)
    assert (mode - sampled).abs().max() > 1e-3 and (latent(seed=1) - sampled).abs().max() > 0.1


def test_map_and_score_are_divads():
    images = torch.rand(2, 3, 32, 32)
    scores = tiny_vlmdiff(map_size=40, mode="product", sigma=1.5).score(images, ["a", "b"], ["", ""])
    feats = [load_features("pixels", "cpu")(x) for x in (images, scores.details["reconstruction"])]
    assert torch.allclose(scores.map, maps.smooth(maps.anomaly_map(*feats, 40, "product"), 1.5), atol=1e-6)
    assert torch.allclose(scores.image, maps.image_score(scores.map, 2))
    for tensor in (scores.image, scores.map, *scores.details.values()):
        tensor.add_(1)  # not possible on tensors made under inference_mode
    with pytest.raises(ValueError, match="2 images came with 1 ids"):
        tiny_vlmdiff().score(images, ["a"], ["", ""])
