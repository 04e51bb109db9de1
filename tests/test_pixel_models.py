"""zsad_lib.diffusion.pixel: loading that never guesses; convert_pixel: networks against a second writing of them."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from tiny import tiny_pixel_model, tiny_unet

from conftest import shared_path
from zsad_lib.diffusion import convert_pixel, pixel
from zsad_lib.diffusion.convert_pixel import PRESETS, ImprovedDiffusion, improved_diffusion_schedule
from zsad_lib.diffusion.pixel import PixelModel, load_pixel_model
from zsad_lib.errors import ModelError


@pytest.fixture
def copy(saved_pixel, tmp_path):
    return shutil.copytree(saved_pixel, tmp_path / "tiny")


# --- folders


def test_load(saved_pixel):
    model, built = load_pixel_model(saved_pixel, device="cpu"), tiny_pixel_model()
    assert model.name == "tiny" and model.image_size == 16 and model.config == built.config
    assert json.loads(json.dumps(model.config)) == model.config
    assert not any(p.requires_grad for p in model.unet.parameters()) and not model.unet.training
    betas = np.linspace(1e-4, 0.02, 1000)
    assert model.alphas_cumprod.dtype == torch.float64
    np.testing.assert_allclose(1 - model.alphas_cumprod, 1 - np.cumprod(1 - betas), rtol=1e-5)


def test_predict_noise_counts_and_takes_a_timestep_for_each():
    model = PixelModel(tiny_unet(), DDPMScheduler(), "tiny")
    x = torch.randn(3, 3, 16, 16)
    together = model.predict_noise(x, torch.tensor([0, 500, 999]))
    assert model.evaluations == 3 and together.shape == x.shape
    for i, t in enumerate((0, 500, 999)):
        torch.testing.assert_close(model.predict_noise(x[i : i + 1], t), together[i : i + 1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.unet(x[i : i + 1], t).sample, together[i : i + 1], rtol=1e-4, atol=1e-5)
    assert model.evaluations == 6
    assert (model.predict_noise(x, 0) - model.predict_noise(x, 999)).abs().max() > 1e-3


def test_learned_variances_are_left_aside():
    x, wide = torch.randn(2, 3, 16, 16), tiny_unet(out_channels=6)
    model = PixelModel(wide, DDPMScheduler(variance_type="learned_range"), "wide")
    assert torch.equal(model.predict_noise(x, 100), wide(x, 100).sample[:, :3])


def test_v_prediction():
    """A network output read as v = √ᾱ·ε − √(1 − ᾱ)·x0 must give the ε and x0 that produce the pixels."""
    velocity = PixelModel(tiny_unet(), DDPMScheduler(prediction_type="v_prediction"), "v")
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([100, 700])
    v, eps = tiny_pixel_model().predict_noise(x, t), velocity.predict_noise(x, t)
    alpha = velocity.alphas_cumprod[t].float().view(2, 1, 1, 1)
    x0 = (x - (1 - alpha).sqrt() * eps) / alpha.sqrt()
    torch.testing.assert_close(alpha.sqrt() * eps - (1 - alpha).sqrt() * x0, v, rtol=1e-4, atol=1e-5)
    assert velocity.config != tiny_pixel_model().config


def test_images_and_pixels():
    model, images = tiny_pixel_model(), torch.rand(2, 3, 16, 16)
    pixels = model.to_pixels(images)
    assert torch.equal(pixels, 2 * images - 1) and torch.allclose(model.to_images(pixels), images)
    assert model.to_images(3 * torch.ones(1, 3, 16, 16)).max() == 1
    grey = model.to_pixels(images[:, :1])
    assert grey.shape == images.shape and torch.equal(grey[:, 2], pixels[:, 0])
    for wrong in (torch.rand(2, 3, 16, 32), torch.rand(2, 4, 16, 16), torch.rand(3, 16, 16)):
        with pytest.raises(ModelError, match=r"tiny.*16,16"):
            model.to_pixels(wrong)


def test_config_follows_schedule_and_weights():
    models = [tiny_pixel_model(), tiny_pixel_model(resnet_time_scale_shift="scale_shift")]
    schedules = {"beta_end": 0.03}, {"num_train_timesteps": 100}
    models += [PixelModel(tiny_unet(), DDPMScheduler(**changes), "tiny") for changes in schedules]
    assert len({json.dumps(model.config) for model in models}) == 4


def test_random_weights(saved_pixel):
    plain, control = (load_pixel_model(saved_pixel, "cpu", random_weights=r) for r in (None, "unet"))
    assert (control.name, control.control, plain.control) == ("tiny", "unet", None)
    assert control.label == control.config["name"] == "tiny (random U-Net)" and plain.label == "tiny"
    assert control.config["weights"] != plain.config["weights"]
    torch.manual_seed(99)
    state = torch.get_rng_state()
    again = load_pixel_model(saved_pixel, "cpu", random_weights="all")
    assert again.label == "tiny (random weights)" and again.config["weights"] == control.config["weights"]
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ModelError, match="'some'"):
        load_pixel_model(saved_pixel, random_weights="some")


def test_older_layout_of_the_hub(copy, tmp_path):
    """As google/ddpm-* lie: all files side by side, and the attention's layers by their former names."""
    from safetensors.torch import load_file, save_file

    flat = tmp_path / "flat"
    flat.mkdir()
    for file in (*(copy / "unet").iterdir(), *(copy / "scheduler").iterdir(), copy / "model_index.json"):
        shutil.copy(file, flat)
    former = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(flat / "diffusion_pytorch_model.safetensors")
    for new, old in former.items():
        state = {key.replace(f".{new}.", f".{old}."): value for key, value in state.items()}
    assert any(".proj_attn." in key for key in state)
    save_file(state, flat / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    assert load_pixel_model(flat, "cpu").config["weights"] == load_pixel_model(copy, "cpu").config["weights"]
    (flat / "scheduler_config.json").unlink()
    with pytest.raises(ModelError, match="flat .* lacks scheduler_config.json"):
        load_pixel_model(flat)


def test_hub_ids_are_tried_in_both_layouts(saved_pixel, monkeypatch):
    """A stand-in for the hub that holds only the files at the top."""
    asked = []

    def fetch(where, part, loader, *args, **kwargs):
        asked.append(part)
        if part:
            raise ModelError("no such subfolder")

    monkeypatch.setattr(pixel, "fetch", fetch)
    monkeypatch.setattr(pixel, "read_scheduler", lambda where, part, cls: asked.append(part) or cls())
    monkeypatch.setattr(pixel, "read_weights", lambda where, part, cls, **kwargs: asked.append(part) or tiny_unet())
    assert load_pixel_model("owner/ddpm", "cpu").name == "owner/ddpm"
    assert asked == ["unet", None, None]


def test_names_of_the_manifest(saved_pixel, tmp_path, monkeypatch):
    (tmp_path / "data_manifest.yaml").write_text("datasets: {}\ncheckpoints:\n  here: {path: tiny}\n")
    monkeypatch.setenv("ZSAD_MANIFEST", str(tmp_path / "data_manifest.yaml"))
    shutil.copytree(saved_pixel, tmp_path / "tiny")
    assert load_pixel_model("here", "cpu").config == tiny_pixel_model().config
    with pytest.raises(ModelError, match="there"):
        load_pixel_model("there")


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        ("model_index.json", "[]", "model_index.json holds no JSON object"),
        ("model_index.json", "{", "model_index.json"),
        ("model_index.json", '{"vqvae": ["diffusers", "VQModel"]}', "vqvae"),
        ("model_index.json", None, "model_index.json$"),
        ("unet/config.json", None, "unet/config.json$"),
        ("scheduler/scheduler_config.json", '{"_class_name": "ScoreSdeVeScheduler"}', "ScoreSdeVeScheduler"),
        ("scheduler/scheduler_config.json", "[1]", "scheduler cannot be read"),
        ("scheduler/scheduler_config.json", '{"beta_schedule": "linear", "num_train_timesteps": "9"}', "timesteps '9'"),
        (
            "scheduler/scheduler_config.json",
            '{"beta_schedule": "linear", "num_train_timesteps": 1e9}',
            "timesteps 1000",
        ),
        ("unet/diffusion_pytorch_model.safetensors", "conv_in.weight", "1 missing .conv_in.weight"),
    ],
)
def test_folders_that_cannot_be_read(copy, file, content, named):
    """A file with another content or without that tensor, or none."""
    from safetensors.torch import load_file, save_file

    if content is None:
        (copy / file).unlink()
    elif file.endswith("json"):
        (copy / file).write_text(content)
    else:
        state = load_file(copy / file)
        del state[content]
        save_file(state, copy / file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=named):
        load_pixel_model(copy, "cpu")


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.unet.conv_out.bias.add_(1e-6),
        lambda model: model.unet.register_to_config(norm_eps=1e-4),
        lambda model: model.scheduler.register_to_config(beta_end=0.02001),
        lambda model: model.scheduler.register_to_config(rescale_betas_zero_snr=True),
        lambda model: model.scheduler.register_to_config(prediction_type="v_prediction"),
    ],
)
def test_the_record_sees_every_change(change):
    model = PixelModel(tiny_unet(), DDPMScheduler(), "x")
    before = model.config
    change(model)
    assert model.config != before and json.loads(json.dumps(model.config)) == model.config


@pytest.mark.parametrize(
    ("unet", "schedule", "named"),
    [
        ({"in_channels": 1}, {}, "1 channels in"),
        ({"out_channels": 4}, {}, "4 out"),
        ({"num_class_embeds": 10}, {}, "class"),
        ({"sample_size": None}, {}, "sample_size of None"),
        ({}, {"prediction_type": "sample"}, "'sample'"),
    ],
)
def test_models_of_another_kind_are_refused(unet, schedule, named):
    with pytest.raises(ModelError, match=named):
        PixelModel(tiny_unet(**unet), DDPMScheduler(**schedule), "x")


# --- improved-diffusion


class Theirs:
    """improved-diffusion's U-Net as a function; it makes random weights, by their names, as it first meets them."""

    def __init__(self, mult=(1, 2, 2), layers=2, attention=(1, 2), heads=4, scale_shift=True, out=6):
        self.mult, self.layers, self.attention, self.heads = mult, layers, attention, heads
        self.scale_shift, self.out = scale_shift, out
        self.state, self.generator = {}, torch.Generator().manual_seed(5)

    def weight(self, name, *shape):
        if name not in self.state:
            spread = 0.5 if len(shape) == 1 else math.prod(shape[1:]) ** -0.5
            self.state[name] = spread * torch.randn(shape, generator=self.generator)
        return self.state[name]

    def pair(self, name, *shape):
        return self.weight(f"{name}.weight", *shape), self.weight(f"{name}.bias", shape[0])

    def conv(self, name, x, channels, size=3, stride=1):
        weight, bias = self.pair(name, channels, x.shape[1], size, size)
        return F.conv2d(x, weight, bias, stride=stride, padding=size // 2)

    def linear(self, name, x, channels):
        return F.linear(x, *self.pair(name, channels, x.shape[1]))

    def norm(self, name, x):
        return F.group_norm(x, 32, *self.pair(name, x.shape[1]))

    def resnet(self, name, x, emb, channels):
        h = self.conv(f"{name}.in_layers.2", F.silu(self.norm(f"{name}.in_layers.0", x)), channels)
        e = self.linear(f"{name}.emb_layers.1", F.silu(emb), channels * (2 if self.scale_shift else 1))[..., None, None]
        if self.scale_shift:
            h = self.norm(f"{name}.out_layers.0", h) * (1 + e[:, :channels]) + e[:, channels:]
        else:
            h = self.norm(f"{name}.out_layers.0", h + e)
        h = self.conv(f"{name}.out_layers.3", F.silu(h), channels)
        return h + (x if x.shape[1] == channels else self.conv(f"{name}.skip_connection", x, channels, size=1))

    def attend(self, name, x):
        b, c, height, width = x.shape
        weight, bias = self.pair(f"{name}.qkv", 3 * c, c, 1)
        qkv = F.conv1d(self.norm(f"{name}.norm", x.flatten(2)), weight, bias)
        q, k, v = qkv.reshape(b * self.heads, 3 * c // self.heads, -1).split(c // self.heads, dim=1)
        weights = torch.softmax(q.mT @ k / (c // self.heads) ** 0.5, dim=-1)
        h = (v @ weights.mT).reshape(b, c, -1)
        weight, bias = self.pair(f"{name}.proj_out", c, c, 1)
        return x + F.conv1d(h, weight, bias).view(b, c, height, width)

    def __call__(self, x, t, base=32):
        frequencies = torch.exp(-np.log(10000) * torch.arange(base // 2) / (base // 2))
        angles = t[:, None] * frequencies
        emb = self.linear("time_embed.0", torch.cat([angles.cos(), angles.sin()], 1), 4 * base)
        emb = self.linear("time_embed.2", F.silu(emb), 4 * base)
        h, n = self.conv("input_blocks.0.0", x, base), 1
        kept = [h]
        for level, factor in enumerate(self.mult):
            for _ in range(self.layers):
                h = self.resnet(f"input_blocks.{n}.0", h, emb, factor * base)
                h = self.attend(f"input_blocks.{n}.1", h) if level in self.attention else h
                kept, n = [*kept, h], n + 1
            if level < len(self.mult) - 1:
                h = self.conv(f"input_blocks.{n}.0.op", h, h.shape[1], stride=2)
                kept, n = [*kept, h], n + 1
        h = self.resnet("middle_block.0", h, emb, h.shape[1])
        h = self.resnet("middle_block.2", self.attend("middle_block.1", h), emb, h.shape[1])
        n = 0
        for level in reversed(range(len(self.mult))):
            for layer in range(self.layers + 1):
                h = self.resnet(f"output_blocks.{n}.0", torch.cat([h, kept.pop()], 1), emb, self.mult[level] * base)
                if level in self.attention:
                    h = self.attend(f"output_blocks.{n}.1", h)
                if level and layer == self.layers:
                    name = f"output_blocks.{n}.{2 if level in self.attention else 1}.conv"
                    h = self.conv(name, F.interpolate(h, scale_factor=2), h.shape[1])
                n += 1
        return self.conv("out.2", F.silu(self.norm("out.0", h)), self.out)


CASES = {
    "as DiffPath's CelebA": {},
    "attention at the widest level alone": {"mult": (1, 2), "layers": 1, "attention": (1,), "heads": 2},
    "no attention, no scale-shift, three channels": {
        "mult": (1, 2), "layers": 1, "attention": (), "heads": 4, "scale_shift": False, "out": 3,
    },
}  # fmt: skip


def theirs(case="as DiffPath's CelebA"):
    """(their network with its weights made, the settings that describe it)."""
    network = Theirs(**CASES[case])
    with torch.no_grad():
        network(torch.zeros(1, 3, 16, 16), torch.zeros(1))
    sizes = tuple(16 // 2**level for level in network.attention)
    options = {"learn_sigma": network.out == 6, "use_scale_shift_norm": network.scale_shift}
    return network, ImprovedDiffusion(16, network.mult, 32, network.layers, network.heads, sizes, **options)


def converted(state, settings):
    unet = convert_pixel.build_unet(settings)
    convert_pixel.fill_unet(unet, state, settings.num_heads)
    return unet.eval()


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_converted_network_computes_the_same(case):
    network, settings = theirs(case)
    x, t = torch.randn(3, 3, 16, 16), torch.tensor([0, 321, 999])
    expected = network(x, t)
    assert expected.std() > 0.1 and (network(x, t + 1) - expected).abs().max() > 1e-3
    torch.testing.assert_close(converted(network.state, settings)(x, t).sample, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_heads_matter_to_that_test():
    """The comparison would see q, k and v shuffled between heads."""
    network, settings = theirs()
    x, t = torch.randn(1, 3, 16, 16), torch.tensor([500])
    right, fewer = (converted(network.state, s)(x, t).sample for s in (settings, replace(settings, num_heads=2)))
    assert (right - fewer).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"label_emb.weight": torch.zeros(10, 128)}, "no place: label_emb.weight"),
        ({"input_blocks.9.0.in_layers.2.weight": torch.zeros(3)}, "no place: input_blocks.9.0.in_layers.2.weight"),
        ({"out.2.weight": torch.zeros(3, 32, 3, 3)}, "conv_out.weight"),
        ({"output_blocks.2.2.conv.bias": None}, "output_blocks.2.2.conv.bias"),
        ({"middle_block.1.qkv.bias": None}, "mid_block.attentions.0.to_q.bias, mid_block.attentions.0.to_k.bias"),
        ({"middle_block.1.qkv.bias": torch.zeros(7)}, "mid_block.attentions.0.to_q.bias"),
    ],
)
def test_tensors_that_do_not_fit_are_told(change, named):
    network, settings = theirs()
    state = {key: tensor for key, tensor in (network.state | change).items() if tensor is not None}
    with pytest.raises(ModelError, match=named):
        converted(state, settings)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"noise_schedule": "sigmoid"}, "'sigmoid'"),
        ({"diffusion_steps": 1500}, "1500"),
        ({"channel_mult": (1, 2, 3)}, r"\[64, 96\]"),  # heads of two widths
        ({"num_heads": 3}, "3 heads"),
        ({"num_res_blocks": 1}, "missing"),
    ],
)
def test_what_cannot_be_converted_says_so(change, named, tmp_path):
    network, settings = theirs()
    torch.save(network.state, tmp_path / "theirs.pt")
    with pytest.raises(ModelError, match=named):
        convert_pixel.convert_pixel_checkpoint(tmp_path / "theirs.pt", tmp_path / "new", replace(settings, **change))
    assert not (tmp_path / "new").exists()


def test_presets_ask_for_the_networks_they_name():
    """Three resnets a level, four levels, attention at 16 and 8 px; the ImageNet base has heads of two widths."""
    with torch.device("meta"):
        unet = convert_pixel.build_unet(PRESETS["diffpath-celeba32"])
    attentive = [hasattr(block, "attentions") for block in unet.down_blocks]
    assert attentive == [False, True, True, False] and unet.mid_block.attentions[0].heads == 4
    assert [len(block.resnets) for block in unet.down_blocks] == [3, 3, 3, 3] and unet.config.out_channels == 6
    with pytest.raises(ModelError, match=r"\[384, 512\]"):
        convert_pixel.build_unet(PRESETS["imagenet64"])
    with pytest.raises(ModelError, match="'celeba'.*diffpath-celeba32"):
        convert_pixel.convert_pixel_checkpoint("theirs.pt", "new", "celeba")


def test_golden_schedule():
    """4000 cosine steps, every fourth kept: the levels and the timesteps that the official model is given."""
    golden = np.load(shared_path("golden/diffpath/reverse_celeba_config.npz"))
    settings = PRESETS["diffpath-celeba32"]

    def alphas(**changes):
        return PixelModel(tiny_unet(), improved_diffusion_schedule(replace(settings, **changes)), "x").alphas_cumprod

    told = golden["model_timesteps"][:, 0].astype(int)
    assert len(alphas()) == 1000 and told.tolist() == list(range(0, 1000, 100))
    np.testing.assert_allclose(1 - alphas()[told], 1 - golden["alphas_cumprod"], rtol=1e-6)
    whole = alphas(rescale_timesteps=False)[golden["timestep_map"]]
    np.testing.assert_allclose(whole, golden["alphas_cumprod"], rtol=1e-6)
    linear = alphas(noise_schedule="linear", diffusion_steps=1000)
    np.testing.assert_allclose(linear, tiny_pixel_model().alphas_cumprod, rtol=1e-5)


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_a_checkpoint_file_becomes_a_folder(ending, tmp_path):
    from safetensors.torch import save_file

    network, settings = theirs()
    settings = replace(settings, diffusion_steps=4000, noise_schedule="cosine")
    path = tmp_path / f"theirs.{ending}"
    (torch.save if ending == "pt" else save_file)(network.state, path)
    convert_pixel.convert_pixel_checkpoint(path, tmp_path / "new", settings)
    model = load_pixel_model(tmp_path / "new", "cpu")
    assert model.name == "new" and model.image_size == 16 and len(model.alphas_cumprod) == 1000
    assert not any(module.training for module in model.unet.modules())
    x = torch.randn(1, 3, 16, 16)
    expected = network(x, torch.tensor([300]))[:, :3]
    torch.testing.assert_close(model.predict_noise(x, 300), expected, rtol=1e-4, atol=1e-4)
    built = PixelModel(tiny_unet(), improved_diffusion_schedule(settings), "x")
    assert torch.equal(model.alphas_cumprod, built.alphas_cumprod)
    with pytest.raises(ModelError, match="new is there already"):
        convert_pixel.convert_pixel_checkpoint(path, tmp_path / "new", settings)
