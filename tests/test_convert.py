"""zsad_lib.convert: every name of the authors' checkpoint has its place, and nothing is guessed."""

import gzip
import json
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from test_backbones import saved, tiny_parts  # noqa: F401 the fixture
from test_guidance import (
    autoencoder_errors,
    fill,
    gaussian,
    network_errors,
    sampler_errors,
    sd_unet,
    sd_vae,
    small,
)
from transformers import CLIPTextConfig, CLIPTextModel
from typer.testing import CliRunner

from conftest import shared_path
from zsad_lib.cli import app
from zsad_lib.diffusion import convert
from zsad_lib.diffusion.guidance import GuidedModel, SemanticGuide, load_guided
from zsad_lib.diffusion.latent import load_backbone
from zsad_lib.errors import ModelError


@pytest.fixture(scope="module")
def keys():
    with gzip.open(shared_path("golden/vlmdiff/keys.json.gz")) as file:
        return {key: tuple(shape) for key, (shape, _) in json.load(file).items()}


def sd_text_encoder():
    return CLIPTextModel(
        CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    )


def test_every_name_of_the_golden_checkpoint(keys):
    """All 1493 entries: each tensor of the four networks finds one of its shape, and only no-weights are left."""
    with torch.device("meta"):
        unet = sd_unet()
        models = {
            "unet": unet,
            "guide": SemanticGuide.from_unet(unet),
            "vae": sd_vae(),
            "text_encoder": sd_text_encoder(),
        }
    found = set()
    for part, model in models.items():
        names = convert.ldm_names(part, model)
        assert len(set(names.values())) == len(names)
        for name, tensor in model.state_dict().items():
            shape = keys[names[name]]
            assert shape in (tuple(tensor.shape), (*tensor.shape, 1, 1)), name
        found |= set(names.values())
    rest = set(keys) - found
    assert all(convert.NO_WEIGHTS.fullmatch(key) for key in rest) and len(rest) == 14
    assert not any(convert.NO_WEIGHTS.fullmatch(key) for key in found)


def small_models():
    """Narrow networks with attention in the autoencoder, as Stable Diffusion's has."""
    unet, guide, _ = small("sd", filled=False)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=2,
        norm_num_groups=4,
    )
    return {"unet": unet, "guide": guide, "vae": vae, "text_encoder": tiny_parts()[2]}


def checkpoint(models):
    """The models' weights as a CompVis checkpoint holds them."""
    state = {}
    for part, model in models.items():
        tensors = deepcopy(model.state_dict())
        for name, key in convert.ldm_names(part, model).items():
            convolution = ".attn_1." in key and tensors[name].dim() == 2
            state[key] = tensors[name][:, :, None, None] if convolution else tensors[name]
    return state


@pytest.mark.parametrize("nested", [False, True])
def test_weights_arrive_where_they_belong(nested):
    source = {part: fill(part, model) for part, model in small_models().items()}
    state = checkpoint(source)
    assert sum(tensor.dim() == 4 and ".attn_1." in key for key, tensor in state.items()) == 8
    extra = {
        "betas": torch.zeros(1000),
        "sqrt_recipm1_alphas_cumprod": torch.zeros(1000),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.zeros(1, 77),
        "pretrained_model.conv1.weight": torch.zeros(3),
        "model_ema.decay": torch.zeros(()),
    }
    target = small_models()
    unplaced = convert.load_ldm({"state_dict": state | extra} if nested else state | extra, **target)
    assert unplaced == ["model_ema.decay"]
    for part, model in target.items():
        expected = source[part].state_dict()
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, expected[name]), (part, name)


def test_parts_not_asked_for_are_reported():
    source = small_models()
    unplaced = convert.load_ldm(checkpoint(source), unet=small_models()["unet"])
    assert {key.split(".")[0] for key in unplaced} == {"control_model", "first_stage_model", "cond_stage_model"}


def test_nothing_is_filled_by_halves():
    source = {part: fill(part, model) for part, model in small_models().items()}
    state = checkpoint(source)
    del state["control_model.down21.0.weight"]
    state["model.diffusion_model.out.2.bias"] = torch.zeros(5)
    target = small_models()
    before = deepcopy(target["vae"].state_dict())
    with pytest.raises(ModelError, match="2 tensors are missing") as error:
        convert.load_ldm(state, **target)
    assert "control_model.down21.0.weight" in str(error.value) and "diffusion_model.out.2.bias" in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in target["vae"].state_dict().items())
    with pytest.raises(ModelError, match="'clip' is no part"):
        convert.ldm_names("clip", target["vae"])


def filled(key, shape):
    """What the golden files' rule puts under a name of the checkpoint; the text encoder and the tables stay empty."""
    if not key.startswith(("model.diffusion_model.", "control_model.", "first_stage_model.")):
        return torch.zeros(shape)
    if len(shape) >= 2:
        gain = 1.6 if ".input_hint_block." in key else 1
        return gaussian(key, shape, gain / np.sqrt(np.prod(shape[1:])))
    return 1 + gaussian(key, shape, 0.1) if key.endswith("weight") else gaussian(key, shape, 0.02)


@pytest.mark.full
def test_the_filled_checkpoint_converts_and_predicts_as_the_authors_networks(keys):
    """All 1493 tensors, full width: no key is left without a place, and the networks give the golden numbers."""
    state = {key: filled(key, shape) for key, shape in keys.items()}
    unet = sd_unet()
    models = {"unet": unet, "guide": SemanticGuide.from_unet(unet, hint_mean=(0, 0, 0), hint_std=(1, 1, 1))}
    models |= {"vae": sd_vae(), "text_encoder": sd_text_encoder()}
    assert convert.load_ldm(state, **models) == []
    del state
    with torch.no_grad():
        errors = network_errors(unet, models["guide"], "a")
        assert all(errors[f"eps {name}"] < 5e-5 for name in ("plain", "mid", "all")), errors
        assert max(errors.values()) < 3e-4, errors
        autoencoder = autoencoder_errors(models["vae"], "sq", (1, 3, 64, 64))
        assert max(autoencoder.values()) < 5e-5, autoencoder
        latents, pictures = sampler_errors(unet, models["guide"], models["vae"], "only mid")
    print("converted:", errors, autoencoder, {"latents": latents, "pictures": pictures})
    assert latents < 2e-3 and pictures < 1e-4


# --- whole files


@pytest.fixture(scope="module")
def authors(saved, tmp_path_factory):  # noqa: F811
    """(base folder, checkpoint file, backbone and guide that it holds): tiny networks with filled weights."""
    backbone = load_backbone(saved, "cpu")
    guide = SemanticGuide.from_unet(backbone.unet, backbone.scale_factor.bit_length() - 1, **convert.HINTS["imagenet"])
    models = {"unet": backbone.unet, "guide": guide, "vae": backbone.vae, "text_encoder": backbone.text_encoder}
    fill("unet", backbone.unet), fill("guide", guide), fill("vae", backbone.vae)
    path = tmp_path_factory.mktemp("authors") / "epoch=9.ckpt"
    torch.save({"state_dict": checkpoint(models) | {"betas": torch.zeros(9)}, "epoch": 9}, path)
    return saved, path, backbone, guide


def test_a_checkpoint_becomes_a_folder_that_predicts_the_same(authors, tmp_path):
    base, path, backbone, guide = authors
    unplaced = convert.convert_checkpoint(path, base, tmp_path / "new", dtype=torch.float32)
    assert unplaced == []
    assert not [file for file in (tmp_path / "new").rglob("*") if file.suffix in (".bin", ".ckpt", ".pt")]
    model = load_guided(tmp_path / "new", "cpu")
    size = backbone.image_size
    z, images = torch.randn(2, *backbone.latent_shape), torch.rand(2, 3, size, size)
    with torch.no_grad():
        ours, theirs = (
            m.seeing(images).predict_noise(z, 321, m.backbone.embed(["a bottle", ""]))
            for m in (model, GuidedModel(backbone, guide.eval()))
        )
        assert torch.equal(ours, theirs)
        assert torch.equal(model.backbone.encode(images), backbone.encode(images))
    with pytest.raises(ModelError, match="is there already"):
        convert.convert_checkpoint(path, base, tmp_path / "new")


def test_the_fine_tuned_autoencoder_takes_its_place(authors, tmp_path):
    base, path, backbone, _ = authors
    tuned = deepcopy(backbone.vae)
    with torch.no_grad():
        tuned.decoder.conv_out.bias.add_(1)
    prefix = convert.PARTS["vae"][0]
    alone = {key.removeprefix(prefix): t for key, t in checkpoint({"vae": tuned}).items()} | {
        "loss.logvar": torch.ones(1)
    }
    torch.save(alone, tmp_path / "vae.ckpt")
    unplaced = convert.convert_checkpoint(path, base, tmp_path / "new", tmp_path / "vae.ckpt", dtype=torch.float32)
    assert unplaced == ["first_stage_model.loss.logvar"]
    assert torch.equal(load_backbone(tmp_path / "new").vae.decoder.conv_out.bias, tuned.decoder.conv_out.bias)


class Malicious:
    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


def test_pickled_code_is_never_run(authors, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"a": torch.zeros(1)}, "callbacks": Malicious()}, "bad.ckpt")
    with pytest.raises(ModelError, match="no code in it is run"):
        convert.convert_checkpoint("bad.ckpt", authors[0], "new")
    assert not Path("ran").exists() and not Path("new").exists()
    Path("words.ckpt").write_text("not a checkpoint")
    for file, message in (("words.ckpt", "cannot be read"), ("none.ckpt", "no checkpoint file at")):
        with pytest.raises(ModelError, match=message):
            convert.read_checkpoint(file)
    torch.save({"state_dict": {}}, "empty.ckpt")
    with pytest.raises(ModelError, match="holds no tensors"):
        convert.read_checkpoint("empty.ckpt")


def test_convert_command(authors, tmp_path):
    base, path, *_ = authors
    run = CliRunner().invoke(app, ["convert", str(path), "--base", str(base), "--out", str(tmp_path / "new")])
    assert run.exit_code == 0 and "every tensor placed" in run.output
    assert load_guided(tmp_path / "new").guide.config.hint_std[0] == pytest.approx(0.229)
