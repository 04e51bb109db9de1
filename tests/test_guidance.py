"""zsad_lib.diffusion.guidance: the authors' network at full width (golden, opt-in), its structure at small width."""

import json
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from compvis import (
    RAW,
    SHAPES,
    autoencoder_errors,
    fill,
    full_size,
    gaussian,
    network_errors,
    sampler_errors,
    sd_unet,
    sd_vae,
)
from helpers import arrays
from tiny import small, tiny_guided, tiny_scheduler

from conftest import shared_path
from zsad_lib.diffusion import ddim, guidance
from zsad_lib.diffusion.guidance import GuidedBackbone, GuidedModel, SemanticGuide, guided_unet
from zsad_lib.diffusion.latent import load_backbone
from zsad_lib.errors import ModelError
from zsad_lite.training.pipeline import LATENT_CHANNELS, build_scheduler, build_unet

GROUPS = {"sd": ((6, 7, 8), (9, 10, 11)), "compact": ((2, 3), (4, 5))}  # fused skips, and those fused into


def run(unet, guide, inputs, mode="only mid"):
    *latents, images = inputs
    return guided_unet(unet, guide, *latents, guide.embed(images), mode)


# --- structure


@pytest.mark.parametrize("kind", GROUPS)
@pytest.mark.parametrize("initialisation", guidance.INITIALISATIONS)
@torch.no_grad()
def test_new_guidance_leaves_the_unet_as_it_is(kind, initialisation):
    unet, guide, inputs = small(kind, filled=False, initialisation=initialisation)
    plain = unet(*inputs[:3]).sample
    for mode in guidance.MODES:
        assert (run(unet, guide, inputs, mode) - plain).abs().max() < 1e-6
    for name, tensor in unet.state_dict().items():
        if not name.startswith(guidance.TRAINED):
            assert torch.equal(tensor, guide.encoder.state_dict()[name]), f"{name} was not copied"


def reference_fusion(guide, before, target, sources):
    """One fused skip, with the instance norm written out."""
    total = before[target]
    first_source, first_target = sources[0], sources[-1] + 1
    for source in sources:
        weight = guide.fusion.down[source - first_source][target - first_target].weight
        branch = F.conv2d(before[source], weight, stride=2, padding=1)
        mean, variance = branch.mean((2, 3), keepdim=True), branch.var((2, 3), keepdim=True, correction=0)
        branch = (branch - mean) / (variance + 1e-5).sqrt()
        total = total + branch * torch.sigmoid(branch)
    return total * torch.sigmoid(total)


@pytest.mark.parametrize("kind", GROUPS)
@torch.no_grad()
def test_fusion_goes_from_the_last_but_one_resolution_into_the_last(kind):
    """Stable Diffusion: skips 6 … 8 into 9 … 11; of the compact models' six, 2 and 3 into 4 and 5."""
    _, guide, (z, t, text, images) = small(kind)
    hint = guide.embed(images)
    before, middle_before = guide.encoder(z, t, text, hint, return_dict=False)
    after, middle = guide(z, t, text, hint)
    sources, targets = GROUPS[kind]
    assert len(after) == len(before) == targets[-1] + 1 and torch.equal(middle, middle_before)
    sides = [skip.shape[-1] for skip in before]
    assert {sides[k] for k in sources} == {2 * sides[targets[0]]}
    assert sides.count(sides[-1]) == len(targets) and sides.count(sides[sources[0]]) == len(sources)
    assert all(torch.equal(after[k], before[k]) for k in range(targets[0]))
    for k in targets:
        assert torch.allclose(after[k], reference_fusion(guide, before, k, sources), atol=1e-5)
        assert not torch.allclose(after[k], before[k], atol=0.1)


@pytest.mark.parametrize("kind", GROUPS)
@torch.no_grad()
def test_only_mid_uses_middle_and_fused_skips(kind):
    """The other skips act through the fusion alone, and those above its sources not at all; in "all" mode they do."""
    unet, guide, inputs = small(kind)
    sources, targets = GROUPS[kind]
    normal = {mode: run(unet, guide, inputs, mode) for mode in guidance.MODES}
    assert not torch.allclose(normal["only mid"], normal["all"], atol=1e-3)

    def influence(mode, *outputs, fusion=True):
        """The largest change of the prediction when these outputs' convolutions are shuffled, the fusion emptied."""
        other = deepcopy(guide)
        for output in outputs:
            convolution = output(other.encoder)
            convolution.weight.copy_(convolution.weight.roll(1, 0))
        for parameter in () if fusion else other.fusion.parameters():
            parameter.zero_()
        return (run(unet, other, inputs, mode) - normal[mode]).abs().max().item()

    def skip(k):
        return lambda encoder: encoder.controlnet_down_blocks[k]

    assert influence("only mid", lambda encoder: encoder.controlnet_mid_block) > 1e-4
    for k in range(targets[-1] + 1):
        assert influence("all", skip(k)) > 1e-4
        change = influence("only mid", skip(k))
        assert change > 1e-5 if k >= sources[0] else change == 0, k
    without = influence("only mid", fusion=False)
    assert without > 1e-3
    assert influence("only mid", *(skip(k) for k in range(targets[0])), fusion=False) == without


@torch.no_grad()
def test_the_prediction_follows_image_text_and_time():
    unet, guide, (z, t, text, images) = small()
    one = run(unet, guide, (z, t, text, images))
    assert torch.allclose(run(unet, guide, (z[1:], t[1:], text[1:], images[1:])), one[1:], atol=1e-5)
    for other in ((z, t, text, images.flip(0)), (z, t, text.flip(0), images), (z, t.flip(0), text, images)):
        assert (run(unet, guide, other) - one).abs().max() > 1e-3


@pytest.mark.parametrize("downsamplings", [0, 1, 2, 3, 4])
@torch.no_grad()
def test_the_hint_reaches_the_latents_resolution(downsamplings):
    guide = SemanticGuide.from_unet(build_unet((16, 32, 32)), downsamplings)
    assert guide.embed(torch.rand(1, 3, 64, 32)).shape == (1, 16, 64 >> downsamplings, 32 >> downsamplings)
    widths = [layer.out_channels for layer in guide.hint.children() if isinstance(layer, torch.nn.Conv2d)]
    stack = [convolution.out_channels for convolution in guide.hint.blocks]
    assert [widths[0], *stack] == [16, 16, 32, 32, 96, 96, 256, 256, 256][: 2 * downsamplings + 1]
    assert sum(convolution.stride == (2, 2) for convolution in guide.hint.blocks) == downsamplings


@torch.no_grad()
def test_images_are_scaled_as_the_guide_was_made_for():
    unet, guide, (*_, images) = small()
    imagenet = {"hint_mean": (0.485, 0.456, 0.406), "hint_std": (0.229, 0.224, 0.225)}
    other, raw = (SemanticGuide.from_unet(unet, 2, **scale) for scale in (imagenet, RAW))
    for twin in (other, raw):
        twin.load_state_dict(guide.state_dict())
    mean, std = (torch.tensor(values)[:, None, None] for values in imagenet.values())
    assert torch.allclose(guide.embed(images), raw.embed(2 * images - 1), atol=1e-6)
    assert torch.allclose(other.embed(images), raw.embed((images - mean) / std), atol=1e-5)


# --- training


def steps(unet, guide, inputs, mode, count=1):
    """A few AdamW steps on a random linear loss; the gradients of the first one, by name."""
    optimizer = torch.optim.AdamW(guidance.trainable_parameters(unet, guide), lr=1e-3)
    named = dict(torch.nn.ModuleDict({"guide": guide, "unet": unet}).named_parameters())
    first = None
    for _ in range(count):
        out = run(unet, guide, inputs, mode)
        optimizer.zero_grad()
        (out * gaussian("loss", out.shape)).sum().backward()
        first = first or {name: p.grad if p.grad is None else p.grad.abs().max().item() for name, p in named.items()}
        optimizer.step()
    return first


def of(gradients, prefix):
    found = {name: value for name, value in gradients.items() if name.startswith(prefix)}
    assert found, f"nothing is named {prefix}"
    return set(found.values())


@pytest.mark.parametrize("kind", GROUPS)
def test_what_trains(kind):
    """Guide, decoder and output; the U-Net's encoder, middle and time embedding stay as they are."""
    unet, guide, inputs = small(kind)
    before = deepcopy(unet.state_dict())
    gradients = steps(unet, guide, inputs, "only mid")
    changed = {name for name, tensor in unet.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if name.startswith(("up_blocks.", "conv_norm_out.", "conv_out."))}
    for part in ("unet.conv_in", "unet.time_embedding", "unet.down_blocks", "unet.mid_block"):
        assert of(gradients, part) == {None}
    unused = [f"guide.encoder.controlnet_down_blocks.{k}." for k in range(GROUPS[kind][0][0])]
    for name, value in gradients.items():
        if name.startswith(("guide.", "unet.up_blocks", "unet.conv_norm_out", "unet.conv_out")):
            assert (value is None) == name.startswith(tuple(unused)), name
            assert value is None or value > 0, name


@pytest.mark.parametrize("kind", GROUPS)
def test_the_published_fusion_never_trains_in_only_mid_mode(kind):
    """Zeros times zeros: no gradient to either factor, at the first step or at any later one."""
    unet, guide, inputs = small(kind, filled=False, initialisation="published")
    gradients = steps(unet, guide, inputs, "only mid", count=3)
    assert of(gradients, "guide.fusion.") == {0.0}
    for k in GROUPS[kind][0]:
        assert of(gradients, f"guide.encoder.controlnet_down_blocks.{k}.") == {0.0}
        assert not guide.encoder.controlnet_down_blocks[k].weight.any()
    assert not any(parameter.any() for parameter in guide.fusion.parameters())
    for k in GROUPS[kind][1]:
        assert min(of(gradients, f"guide.encoder.controlnet_down_blocks.{k}.")) > 0


@pytest.mark.parametrize("kind", GROUPS)
@pytest.mark.parametrize(("initialisation", "mode"), [("trainable", "only mid"), ("published", "all")])
def test_the_fusion_trains_otherwise(kind, initialisation, mode):
    unet, guide, inputs = small(kind, filled=False, initialisation=initialisation)
    start = deepcopy(guide.fusion.state_dict())
    gradients = steps(unet, guide, inputs, mode, count=3)
    for k in GROUPS[kind][0]:
        assert min(of(gradients, f"guide.encoder.controlnet_down_blocks.{k}.")) > 0
    for name, tensor in guide.fusion.state_dict().items():
        assert (tensor - start[name]).abs().max() > 5e-4, "AdamW moves what has a gradient by about its rate a step"


def test_the_trainable_start_is_gentle():
    """Around zero the instance norm amplifies by 316; the fused skips' first gradients are of the others' size."""
    unet, guide, inputs = small("sd", filled=False)
    gradients = steps(unet, guide, inputs, "only mid")
    fused, direct = (
        max(max(of(gradients, f"guide.encoder.controlnet_down_blocks.{k}.")) for k in group) for group in GROUPS["sd"]
    )
    assert 0.02 < fused / direct < 20


@torch.no_grad()
def test_a_coarse_hint_shows_the_product_and_not_its_damage(tmp_path):
    """Images that differ within a block of the hint alone are one to the guide; saved and read again, too."""
    fill("guide", SemanticGuide.from_unet(build_unet((16, 32, 32)), 2, hint_pixels=8)).save_pretrained(tmp_path)
    guide, images = SemanticGuide.from_pretrained(tmp_path), torch.rand(2, 3, 32, 32)
    mixed = images.unfold(2, 4, 4).unfold(3, 4, 4).flatten(4).flip(4).unflatten(4, (4, 4))
    mixed = mixed.transpose(3, 4).flatten(4, 5).flatten(2, 3)
    assert not torch.allclose(mixed, images, atol=0.1)
    torch.testing.assert_close(guide.embed(mixed), guide.embed(images))
    brighter = images.clone()
    brighter[:, :, :4, :4] = 1
    assert not torch.allclose(guide.embed(brighter), guide.embed(images), atol=1e-3)


# --- saving, loading


def saved_pair(folder, backbone):
    """What training leaves of a tiny pair, in a folder; the guide."""
    guide = fill("guide", SemanticGuide.from_unet(backbone.unet, 2, "published"))
    folder.mkdir()
    guidance.save_guided(folder, backbone.unet, guide, {"mode": "all", "timesteps": 1000, "schedule": "rebuilt"})
    return guide


@torch.no_grad()
def test_saved_and_loaded_again(saved, tmp_path):
    backbone = load_backbone(saved, "cpu")
    guide = saved_pair(tmp_path / "pair", backbone)
    model = guidance.load_guided(tmp_path / "pair", "cpu", base=saved)
    z, images = torch.randn(2, 4, 8, 8), torch.rand(2, 3, 32, 32)

    def predicted(model):
        return model.condition_on(images).predict_noise(z, 321, backbone.embed(["a", "b"]))

    expected = predicted(GuidedModel(backbone, guide, "all"))
    assert torch.equal(predicted(model), expected) and model.mode == "all" and model.backbone.name == "pair"
    assert model.guide.config.initialisation == "published" and not model.guide.training
    assert not any(parameter.requires_grad for parameter in model.guide.parameters())
    half = guidance.load_guided(tmp_path / "pair", "cpu", "bfloat16", base=saved)
    assert half.guide.embed(images).dtype == torch.bfloat16
    assert torch.allclose(predicted(half), expected, atol=0.2)


def test_loading_never_guesses(saved, tmp_path):
    from safetensors.torch import load_file, save_file

    backbone = load_backbone(saved, "cpu")
    saved_pair(tmp_path / "pair", backbone)
    SemanticGuide.from_unet(build_unet((16, 32, 32)), 2).save_pretrained(tmp_path / "pair/guide")
    with pytest.raises(ModelError, match="in_channels 8; .* 4$"):
        guidance.load_guided(tmp_path / "pair", "cpu", base=saved)
    saved_pair(tmp_path / "other", backbone)
    for file, name, named in (
        ("decoder/diffusion_pytorch_model.safetensors", "conv_out.bias", "decoder of other"),
        ("guide/diffusion_pytorch_model.safetensors", "fusion.down.0.0.weight", r"1 missing .fusion.down.0.0.weight"),
    ):
        weights = load_file(tmp_path / "other" / file)
        save_file({key: value for key, value in weights.items() if key != name}, tmp_path / "other" / file)
        with pytest.raises(ModelError, match=named):
            guidance.load_guided(tmp_path / "other", "cpu", base=saved)
        save_file(weights, tmp_path / "other" / file)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("[]", "guided.json holds no JSON object"),
        ("{", "guided.json"),
        ({"timesteps": None}, "guided.json: timesteps None: use an int"),
        ({"timesteps": "1000"}, "timesteps '1000'"),
        ({"timesteps": 10**12}, "not 1000000000000"),
        ({"schedule": []}, "schedule .*rebuilt"),
        ({"mode": "half"}, "mode 'half'"),
        ({"base": 7}, "base 7"),
    ],
)
def test_damaged_settings_are_named(saved, tmp_path, content, named):
    saved_pair(tmp_path / "pair", load_backbone(saved, "cpu"))
    file = tmp_path / "pair/guided.json"
    if isinstance(content, dict):
        content = json.dumps(json.loads(file.read_text()) | content)
    file.write_text(content)
    with pytest.raises(ModelError, match=named):
        guidance.load_guided(tmp_path / "pair", "cpu", base=None if "base" in named else saved)


@pytest.mark.parametrize("damage", [lambda weights: weights.int(), lambda weights: weights * torch.nan])
def test_a_decoder_of_finite_floats_alone_is_taken(saved, tmp_path, damage):
    from safetensors.torch import load_file, save_file

    saved_pair(tmp_path / "pair", load_backbone(saved, "cpu"))
    file = tmp_path / "pair/decoder/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file(weights | {"conv_out.bias": damage(weights["conv_out.bias"])}, file)
    with pytest.raises(ModelError, match="pair/decoder.* conv_out.bias"):
        guidance.load_guided(tmp_path / "pair", "cpu", base=saved)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot be read"):
        guidance.load_guided(tmp_path / "pair", "cpu", base=saved)


def test_the_record_holds_how_the_guide_scales_its_images():
    backbone, guided = tiny_guided()
    other = SemanticGuide.from_unet(backbone.unet, 2, hint_mean=(0.4, 0.5, 0.5))
    other.load_state_dict(guided.guide.state_dict())
    one, two = (GuidedModel(backbone, guide).config for guide in (guided.guide, other))
    assert one["guide"] == two["guide"] and one != two


SHALLOW = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda u, g, z, x, rest: run(u, g, (z, *rest, x[:, :, :32])), "16x16, .* 8x16, after 2"),
        (lambda u, g, z, x, rest: run(u, g, (z, *rest, x), "mid"), "'mid'"),
        (lambda u, g, z, x, rest: run(u, g, (z[..., :4, :4], *rest, x[..., :16, :16])), "one pixel"),
        (lambda u, *_: SemanticGuide.from_unet(u, 2, "zero"), "'zero'"),
        (lambda *_: SemanticGuide.from_unet(sd_unet((32,), **SHALLOW)), "two levels"),
        (
            lambda *_: SemanticGuide.from_unet(SimpleNamespace(config=SimpleNamespace(layers_per_block=(1, 2)))),
            "one number",
        ),
    ],
)
def test_errors(call, named):
    unet, guide, (z, t, text, images) = small(filled=False)
    with pytest.raises(ModelError, match=named):
        call(unet, guide, z, images, (t, text))


# --- as a backbone


@pytest.mark.parametrize("mode", guidance.MODES)
@torch.no_grad()
def test_guided_backbone_predicts_as_the_networks_do(mode):
    """Both halves of classifier-free guidance see the same images; every sample counts once."""
    backbone, guided = tiny_guided(mode=mode)
    z, t = torch.randn(2, 4, 8, 8), torch.tensor([401, 7])
    cond, uncond = backbone.embed(["an image", "of b"]), backbone.embed(["", ""])

    def direct(text):
        return guided_unet(backbone.unet, guided.guide, z, t, text, guided.guide.embed(guided.images), mode)

    before = backbone.evaluations
    assert torch.allclose(guided.predict_noise(z, t, cond), direct(cond), atol=1e-6)
    assert backbone.evaluations - before == 2
    expected = direct(uncond) + 3.5 * (direct(cond) - direct(uncond))
    assert torch.allclose(guided.predict_noise(z, t, cond, uncond, 3.5), expected, atol=1e-4)
    assert backbone.evaluations - before == 6
    assert not torch.allclose(direct(cond), backbone.predict_noise(z, t, cond), atol=1e-2)


@torch.no_grad()
def test_rows_say_which_image_a_latent_belongs_to():
    backbone, guided = tiny_guided(count=3)
    rows, z, t = torch.tensor([2, 0, 2, 1]), torch.randn(4, 4, 8, 8), torch.tensor([1, 300, 600, 900])
    cond = backbone.embed(["a", "b", "c"])
    many = guided.predict_noise(z, t, cond[rows], rows=rows)
    for k, row in enumerate(rows.tolist()):
        alone = GuidedBackbone(backbone, guided.guide, guided.images[row : row + 1])
        one = alone.predict_noise(z[k : k + 1], int(t[k]), cond[row : row + 1])
        assert torch.allclose(one, many[k : k + 1], atol=1e-5)
    with pytest.raises(ModelError, match="4 latents .* 3 images"):
        guided.predict_noise(z, 300, cond[rows])
    with pytest.raises(ModelError, match="'half'"):
        GuidedBackbone(backbone, guided.guide, guided.images, "half")


@torch.no_grad()
def test_guided_v_prediction():
    """The guided output v is turned into ε as the plain one is, with each latent's own timestep."""
    _, epsilon = tiny_guided()
    backbone, velocity = tiny_guided(prediction_type="v_prediction")
    z, t, cond = torch.randn(2, 4, 8, 8), torch.tensor([700, 20]), backbone.embed(["a", "b"])
    alpha = backbone.alphas_cumprod[t].view(-1, 1, 1, 1)
    v = epsilon.predict_noise(z, t, cond)
    assert torch.allclose(velocity.predict_noise(z, t, cond), alpha.sqrt() * v + (1 - alpha).sqrt() * z, atol=1e-5)


@torch.no_grad()
def test_ddim_runs_with_guidance():
    """Inversion and denoising take the guided prediction as they take the plain one, and come out elsewhere."""
    backbone, guided = tiny_guided()
    z, cond = backbone.encode(guided.images), backbone.embed(["", ""])

    def round_trip(model):
        up = ddim.invert(lambda z, t: model.predict_noise(z, t, cond), z, backbone.alphas_cumprod, 10, stop=301)[-1][1]
        return ddim.denoise(lambda z, t: model.predict_noise(z, t, cond), up, backbone.alphas_cumprod, 10, start_step=6)

    before = backbone.evaluations
    with_guidance = round_trip(guided)
    assert backbone.evaluations - before == 2 * (3 + 3)
    assert with_guidance.shape == z.shape and torch.isfinite(with_guidance).all()
    assert (with_guidance - round_trip(backbone)).abs().max() > 1e-3


# --- the authors' network, at its width


@pytest.fixture(scope="module")
def full():
    """(unet, guide) at full width: 5.3 GB."""
    shared_path("golden/vlmdiff/network_a.npz")
    unet = full_size(sd_unet, "unet")
    return unet, full_size(lambda: SemanticGuide.from_unet(sd_unet(), 3, **RAW), "guide")


@pytest.fixture(scope="module")
def full_vae():
    shared_path("golden/vlmdiff/vae.npz")
    return full_size(sd_vae, "vae")


@pytest.mark.full
@pytest.mark.parametrize("case", SHAPES)
@torch.no_grad()
def test_golden_network(full, case):
    """Thirteen controls, before and after the fusion, and the noise predicted without and with them, in both modes."""
    limits = {"eps plain": 5e-5, "eps mid": 5e-5, "eps all": 5e-5, "controls 9-11": 3e-4, "controls 9-12, whole": 3e-4}
    for quantity, error in network_errors(*full, case).items():
        assert error < limits.get(quantity, 2e-4), quantity


@pytest.mark.full
@pytest.mark.parametrize("mode", guidance.MODES)
@torch.no_grad()
def test_golden_sampling(full, full_vae, mode):
    latents, pictures = sampler_errors(*full, full_vae, mode)
    assert latents < 2e-3 and pictures < 1e-4


@pytest.mark.full
@pytest.mark.parametrize(("case", "shape"), [("sq", (1, 3, 64, 64)), ("wide", (1, 3, 64, 96))])
@torch.no_grad()
def test_golden_autoencoder(full_vae, case, shape):
    """The names of `convert` put each tensor where the authors' autoencoder has it."""
    for quantity, error in autoencoder_errors(full_vae, case, shape).items():
        assert error < (5e-5 if quantity == "decode_mean" else 3e-5), quantity


def test_the_compact_unet_is_the_one_the_recipes_train():
    """The full profile is not the only one: a guide beside the compact U-Net at its own width, 64 px to 16x16."""
    unet = build_unet()
    guide = SemanticGuide.from_unet(unet, 2)
    assert len(guide.encoder.controlnet_down_blocks) == 6 and len(guide.fusion.down) == 2
    hint = guide.embed(torch.rand(1, 3, 64, 64))
    z = torch.randn(1, LATENT_CHANNELS, 16, 16)
    assert guided_unet(unet, guide, z, 500, torch.randn(1, 32, 128), hint).shape == z.shape


def test_schedulers_agree():
    """The tests' tiny scheduler, the recipes' and the golden files' are one schedule."""
    stored = arrays("vlmdiff/schedule")["alphas_cumprod"]
    for scheduler in (tiny_scheduler(), build_scheduler()):
        assert (scheduler.alphas_cumprod - stored).abs().max() < 1e-6
