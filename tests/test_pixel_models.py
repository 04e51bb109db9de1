"""zsad_lib.pixel_models: loading that never guesses, and improved-diffusion's networks against a second writing."""

import json
import math
import pickle
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import shared_path
from zsad_lib.diffusion import pixel
from zsad_lib.diffusion.pixel import (
    PixelModel,
    convert_improved_diffusion,
    improved_diffusion_schedule,
    load_pixel_model,
)
from zsad_lib.errors import ModelError


def tiny_unet(**changes):
    from diffusers import UNet2DModel

    options = {
        "sample_size": 16,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4,
        "attention_head_dim": 8,
    }
    torch.manual_seed(3)
    return UNet2DModel(**options | changes).eval().requires_grad_(False)


def tiny_schedule(**changes):
    from diffusers import DDPMScheduler

    return DDPMScheduler(**changes)


@cache
def tiny_pixel_model(**changes):
    return PixelModel(tiny_unet(**changes), tiny_schedule(), "tiny")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    from diffusers import DDPMPipeline

    folder = tmp_path_factory.mktemp("models") / "tiny"
    DDPMPipeline(tiny_unet(), tiny_schedule()).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "tiny")


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- folders


def test_load(saved):
    model, built = load_pixel_model(saved, device="cpu"), tiny_pixel_model()
    assert model.name == "tiny" and model.image_size == 16 and model.config == built.config
    assert json.loads(json.dumps(model.config)) == model.config
    assert not any(p.requires_grad for p in model.unet.parameters()) and not model.unet.training
    betas = np.linspace(1e-4, 0.02, 1000)
    assert model.alphas_cumprod.dtype == torch.float64
    np.testing.assert_allclose(1 - model.alphas_cumprod, 1 - np.cumprod(1 - betas), rtol=1e-5)


def test_predict_noise_counts_and_takes_a_timestep_for_each():
    model = PixelModel(tiny_unet(), tiny_schedule(), "tiny")
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
    model = PixelModel(wide, tiny_schedule(variance_type="learned_range"), "wide")
    assert torch.equal(model.predict_noise(x, 100), wide(x, 100).sample[:, :3])


def test_v_prediction():
    """A network output read as v = √ᾱ·ε − √(1 − ᾱ)·x0 must give the ε and x0 that produce the pixels."""
    velocity = PixelModel(tiny_unet(), tiny_schedule(prediction_type="v_prediction"), "v")
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
        with pytest.raises(ValueError, match=r"tiny takes images \[B,3,16,16\] or grey ones"):
            model.to_pixels(wrong)


def test_config_follows_schedule_and_weights():
    configs = [tiny_pixel_model().config, tiny_pixel_model(resnet_time_scale_shift="scale_shift").config]
    configs.append(PixelModel(tiny_unet(), tiny_schedule(beta_end=0.03), "tiny").config)
    configs.append(PixelModel(tiny_unet(), tiny_schedule(num_train_timesteps=100), "tiny").config)
    assert len({json.dumps(config) for config in configs}) == 4


def test_random_weights(saved):
    plain, control = (load_pixel_model(saved, "cpu", random_weights=r) for r in (None, "unet"))
    assert control.name == "tiny (random U-Net)" and control.config["weights"] != plain.config["weights"]
    torch.manual_seed(99)
    state = torch.get_rng_state()
    again = load_pixel_model(saved, "cpu", random_weights="all")
    assert again.name == "tiny (random weights)" and again.config["weights"] == control.config["weights"]
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ModelError, match="random_weights 'some' is unknown"):
        load_pixel_model(saved, random_weights="some")


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
    with pytest.raises(ModelError, match="flat is not a DDPMPipeline folder: it lacks scheduler_config.json"):
        load_pixel_model(flat)


def test_hub_ids_are_tried_in_both_layouts(saved, monkeypatch):
    """A stand-in for the hub that holds only the files at the top."""
    asked = []

    def fetch(where, part, loader, *args, **kwargs):
        asked.append(part)
        if part:
            raise ModelError("no such subfolder")
        return json.loads((saved / "scheduler/scheduler_config.json").read_text())

    monkeypatch.setattr(pixel, "fetch", fetch)
    monkeypatch.setattr(pixel, "read_weights", lambda where, part, cls, **kwargs: asked.append(part) or tiny_unet())
    assert load_pixel_model("owner/ddpm", "cpu").name == "owner/ddpm"
    assert asked == ["unet", None, None]


def test_hub_out_of_reach(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="neither a folder here nor complete in the local hub cache.*hf download"):
        load_pixel_model("nobody/no-such-model")


def test_names_of_the_manifest(saved, tmp_path, monkeypatch):
    (tmp_path / "data_manifest.yaml").write_text("datasets: {}\ncheckpoints:\n  here: {path: tiny}\n")
    monkeypatch.setenv("ZSAD_MANIFEST", str(tmp_path / "data_manifest.yaml"))
    shutil.copytree(saved, tmp_path / "tiny")
    assert load_pixel_model("here", "cpu").config == tiny_pixel_model().config
    with pytest.raises(ModelError, match="no checkpoint `there`.*it has: here"):
        load_pixel_model("there")


def test_folders_that_cannot_be_read(copy):
    edit_json(copy / "model_index.json", vqvae=["diffusers", "VQModel"])
    with pytest.raises(ModelError, match="has the parts vqvae besides unet and scheduler"):
        load_pixel_model(copy)
    (copy / "unet/config.json").unlink()
    with pytest.raises(ModelError, match="is not a DDPMPipeline folder: it lacks unet/config.json$"):
        load_pixel_model(copy)
    (copy / "model_index.json").unlink()
    with pytest.raises(ModelError, match="is not a DDPMPipeline folder: it lacks model_index.json"):
        load_pixel_model(copy)


def test_weights_that_do_not_fit_are_refused(copy):
    from safetensors.torch import load_file, save_file

    file = copy / "unet/diffusion_pytorch_model.safetensors"
    state = load_file(file)
    del state["conv_in.weight"]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="do not fit config.json: 1 missing"):
        load_pixel_model(copy, "cpu")


def test_models_of_another_kind_are_refused(copy):
    with pytest.raises(ModelError, match="1 channels in and 3 out"):
        PixelModel(tiny_unet(in_channels=1), tiny_schedule(), "x")
    with pytest.raises(ModelError, match="3 channels in and 4 out"):
        PixelModel(tiny_unet(out_channels=4), tiny_schedule(), "x")
    with pytest.raises(ModelError, match="conditional on a class"):
        PixelModel(tiny_unet(num_class_embeds=10), tiny_schedule(), "x")
    with pytest.raises(ModelError, match="prediction type 'sample' is not supported"):
        PixelModel(tiny_unet(), tiny_schedule(prediction_type="sample"), "x")
    (copy / "scheduler/scheduler_config.json").write_text('{"_class_name": "ScoreSdeVeScheduler", "sigma_max": 1348}')
    with pytest.raises(ModelError, match="has a ScoreSdeVeScheduler, which has no beta schedule"):
        load_pixel_model(copy)


# --- improved-diffusion


class Theirs:
    """improved-diffusion's U-Net as a function; it makes random weights, by their names, as it first meets them."""

    def __init__(self, mult, layers, attention, heads, heads_up=None, scale_shift=True, new_order=False, out=6):
        self.mult, self.layers, self.attention, self.heads = mult, layers, attention, heads
        self.heads_up, self.scale_shift, self.new_order, self.out = heads_up or heads, scale_shift, new_order, out
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

    def attend(self, name, x, heads):
        b, c, height, width = x.shape
        weight, bias = self.pair(f"{name}.qkv", 3 * c, c, 1)
        qkv = F.conv1d(self.norm(f"{name}.norm", x.flatten(2)), weight, bias)
        if self.new_order:  # guided-diffusion: q of all heads, then k, then v
            q, k, v = (part.reshape(b * heads, c // heads, -1) for part in qkv.chunk(3, dim=1))
        else:  # head by head
            q, k, v = qkv.reshape(b * heads, 3 * c // heads, -1).split(c // heads, dim=1)
        weights = torch.softmax(q.mT @ k / (c // heads) ** 0.5, dim=-1)
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
                h = self.attend(f"input_blocks.{n}.1", h, self.heads) if level in self.attention else h
                kept, n = [*kept, h], n + 1
            if level < len(self.mult) - 1:
                h = self.conv(f"input_blocks.{n}.0.op", h, h.shape[1], stride=2)
                kept, n = [*kept, h], n + 1
        h = self.resnet("middle_block.0", h, emb, h.shape[1])
        h = self.resnet("middle_block.2", self.attend("middle_block.1", h, self.heads), emb, h.shape[1])
        n = 0
        for level in reversed(range(len(self.mult))):
            for layer in range(self.layers + 1):
                h = self.resnet(f"output_blocks.{n}.0", torch.cat([h, kept.pop()], 1), emb, self.mult[level] * base)
                if level in self.attention:
                    h = self.attend(f"output_blocks.{n}.1", h, self.heads_up)
                if level and layer == self.layers:
                    name = f"output_blocks.{n}.{2 if level in self.attention else 1}.conv"
                    h = self.conv(name, F.interpolate(h, scale_factor=2), h.shape[1])
                n += 1
        return self.conv("out.2", F.silu(self.norm("out.0", h)), self.out)


CASES = {
    "as DiffPath's CelebA": ({"mult": (1, 2, 2), "layers": 2, "attention": {1, 2}, "heads": 4}, {}),
    "heads of several widths": ({"mult": (1, 2, 3), "layers": 1, "attention": {1, 2}, "heads": 2}, {}),
    "other heads upwards": (
        {"mult": (1, 2), "layers": 1, "attention": {0}, "heads": 1, "heads_up": 8},
        {"num_heads": 1, "num_heads_upsample": 8},
    ),
    "no scale-shift, three channels": (
        {"mult": (1, 2), "layers": 1, "attention": set(), "heads": 4, "scale_shift": False, "out": 3},
        {"use_scale_shift_norm": False, "learn_sigma": False},
    ),
    "guided-diffusion's order": (
        {"mult": (1, 2), "layers": 1, "attention": {1}, "heads": 4, "new_order": True},
        {"use_new_attention_order": True},
    ),
}


def theirs(case):
    """(their network with its weights made, the hyperparameters that describe it)."""
    structure, changes = CASES[case]
    network = Theirs(**structure)
    with torch.no_grad():
        network(torch.zeros(1, 3, 16, 16), torch.zeros(1))
    hyperparameters = {
        "image_size": 16,
        "num_channels": 32,
        "num_res_blocks": structure["layers"],
        "channel_mult": structure["mult"],
        "num_heads": structure["heads"],
        "attention_resolutions": ",".join(str(16 // 2**level) for level in structure["attention"]) or "1",
        "learn_sigma": True,
    }
    return network, hyperparameters | changes


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_converted_network_computes_the_same(case):
    network, hyperparameters = theirs(case)
    unet, _ = convert_improved_diffusion(network.state, **hyperparameters)
    x, t = torch.randn(3, 3, 16, 16), torch.tensor([0, 321, 999])
    expected = network(x, t)
    assert expected.std() > 0.1 and (network(x, t + 1) - expected).abs().max() > 1e-3
    torch.testing.assert_close(unet.eval()(x, t).sample, expected, rtol=1e-4, atol=1e-4)


def test_heads_and_order_matter_to_that_test():
    """The comparison would see q, k and v shuffled between heads."""
    network, hyperparameters = theirs("as DiffPath's CelebA")
    x, t = torch.randn(1, 3, 16, 16), torch.tensor([500])
    right, wrong, fewer = (
        convert_improved_diffusion(network.state, **hyperparameters | change)[0].eval()(x, t).sample
        for change in ({}, {"use_new_attention_order": True}, {"num_heads": 2})
    )
    assert min((right - wrong).abs().max(), (right - fewer).abs().max()) > 1e-2


def test_every_key_without_a_place_is_told():
    network, hyperparameters = theirs("as DiffPath's CelebA")
    state = dict(network.state)
    state["label_emb.weight"] = torch.zeros(10, 128)
    state["out.2.weight"] = torch.zeros(3, 32, 3, 3)
    state["input_blocks.9.0.in_layers.2.weight"] = torch.zeros(3)
    del state["middle_block.1.qkv.bias"]
    with pytest.raises(ModelError) as error:
        convert_improved_diffusion(state, **hyperparameters)
    text = str(error.value)
    assert "2 have no place: input_blocks.9.0.in_layers.2.weight, label_emb.weight;" in text
    assert "3 are missing (by their new names): mid_block.attentions.0.to_k.bias, " in text
    assert "1 have another shape: out.2.weight [3, 32, 3, 3]" in text
    fewer = hyperparameters | {"num_res_blocks": 1}
    with pytest.raises(ModelError, match="have no place: input_blocks.2.0.emb.*output_blocks.8.0.in_layers.0.bias"):
        convert_improved_diffusion(network.state, **fewer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_cond": True}, "class_cond and predict_xstart cannot be converted"),
        ({"predict_xstart": True}, "class_cond and predict_xstart cannot be converted"),
        ({"num_chanels": 32}, "no hyperparameter num_chanels; there are: image_size, num_channels"),
        ({"channel_mult": None}, r"image_size 16 needs channel_mult; known are those of \[32, 64, 256\]"),
        ({"num_channels": 48}, "num_channels=48 must be a multiple of 32"),
        ({"noise_schedule": "sigmoid"}, "noise_schedule 'sigmoid' is unknown; use 'linear' or 'cosine'"),
        ({"diffusion_steps": 1500}, r"the network is told t·1000/1500, which is no integer"),
    ],
)
def test_what_cannot_be_converted_says_so(change, message):
    network, hyperparameters = theirs("as DiffPath's CelebA")
    with pytest.raises(ModelError, match=message):
        convert_improved_diffusion(network.state, **hyperparameters | change)


@pytest.mark.parametrize(("preset", "attentive"), [("diffpath-celeba32", (1, 2)), ("imagenet64", (2, 3))])
def test_presets_ask_for_the_networks_they_name(preset, attentive):
    """Three resnets a level, four levels, attention at 16 and 8 px: told by the keys that an empty file lacks."""
    with torch.device("meta"), pytest.raises(ModelError) as error:
        convert_improved_diffusion({}, **pixel.PRESETS[preset])
    missing = str(error.value)
    assert "have no place" not in missing and "up_blocks.3.resnets.3.conv2.weight" in missing
    found = {level for level in range(4) if f"down_blocks.{level}.attentions.2.to_q.weight" in missing}
    assert found == set(attentive)
    assert "down_blocks.0.resnets.3" not in missing and "down_blocks.4" not in missing


def test_golden_schedule():
    """4000 cosine steps, every fourth kept: the levels and the timesteps that the official model is given."""
    golden = np.load(shared_path("golden/diffpath/reverse_celeba_config.npz"))
    model = PixelModel(tiny_unet(), improved_diffusion_schedule("cosine", 4000, learn_sigma=True), "x")
    told = golden["model_timesteps"][:, 0].astype(int)
    assert len(model.alphas_cumprod) == 1000 and told.tolist() == list(range(0, 1000, 100))
    np.testing.assert_allclose(1 - model.alphas_cumprod[told], 1 - golden["alphas_cumprod"], rtol=1e-6)
    whole = PixelModel(tiny_unet(), improved_diffusion_schedule("cosine", 4000, rescale_timesteps=False), "x")
    np.testing.assert_allclose(whole.alphas_cumprod[golden["timestep_map"]], golden["alphas_cumprod"], rtol=1e-6)
    linear = PixelModel(tiny_unet(), improved_diffusion_schedule("linear", 1000), "x")
    np.testing.assert_allclose(linear.alphas_cumprod, tiny_pixel_model().alphas_cumprod, rtol=1e-5)


def test_checkpoint_files(tmp_path):
    """A .pt and a .safetensors file give one model; saved as a pipeline, it is read as any other."""
    from diffusers import DDPMPipeline
    from safetensors.torch import save_file

    network, hyperparameters = theirs("as DiffPath's CelebA")
    hyperparameters |= {"diffusion_steps": 4000, "noise_schedule": "cosine"}
    torch.save(network.state, tmp_path / "theirs.pt")
    save_file(network.state, tmp_path / "theirs.safetensors")
    models = [load_pixel_model(tmp_path / f"theirs.{e}", "cpu", None, hyperparameters) for e in ("pt", "safetensors")]
    assert models[0].config == models[1].config and models[0].name == "theirs" and models[0].image_size == 16
    x = torch.randn(1, 3, 16, 16)
    eps = models[0].predict_noise(x, 300)
    torch.testing.assert_close(eps, network(x, torch.tensor([300]))[:, :3], rtol=1e-4, atol=1e-4)
    DDPMPipeline(models[0].unet, models[0].scheduler).save_pretrained(tmp_path / "theirs")
    again = load_pixel_model(tmp_path / "theirs", "cpu")
    assert again.config == models[0].config and torch.equal(again.predict_noise(x, 300), eps)
    control = load_pixel_model(tmp_path / "theirs.pt", "cpu", "unet", hyperparameters)
    assert control.config["weights"] != models[0].config["weights"] and "random U-Net" in control.name


def test_checkpoint_files_need_hyperparameters(saved, tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "theirs.pt")
    with pytest.raises(ModelError, match="needs hyperparameters, not None: one of diffpath-celeba32, imagenet64"):
        load_pixel_model(tmp_path / "theirs.pt")
    with pytest.raises(ModelError, match="needs hyperparameters, not 'celeba'"):
        load_pixel_model(tmp_path / "theirs.pt", hyperparameters="celeba")
    with pytest.raises(ModelError, match="hyperparameters are for a checkpoint file"):
        load_pixel_model(saved, hyperparameters="imagenet64")


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_is_never_executed(tmp_path):
    mark = tmp_path / "executed"
    torch.save({"weights": torch.zeros(1), "more": Harmful(mark)}, tmp_path / "bad.pt")
    (tmp_path / "worse.pt").write_bytes(pickle.dumps(Harmful(mark), protocol=2))
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    for name, message in (("bad", "cannot be read"), ("worse", "cannot be read"), ("list", "is no state dict")):
        with pytest.raises(ModelError, match=message):
            load_pixel_model(tmp_path / f"{name}.pt", hyperparameters="imagenet64")
    assert not mark.exists()
