"""zsad_lib.diffusion.convert: every name of the authors' checkpoint has its place, and nothing is guessed."""

import gzip
import json
import re
from copy import deepcopy

import pytest
import torch
from compvis import autoencoder_errors, fill, filled, ldm_names, network_errors, sampler_errors, sd_unet, sd_vae
from tiny import small, tiny_parts
from transformers import CLIPTextConfig, CLIPTextModel
from typer.testing import CliRunner

from conftest import shared_path
from zsad_lib.cli import app
from zsad_lib.diffusion import convert
from zsad_lib.diffusion.guidance import GuidedModel, SemanticGuide, load_guided
from zsad_lib.diffusion.latent import load_backbone
from zsad_lib.errors import ModelError

NETWORKS = ("model.diffusion_model.", "control_model.", "first_stage_model.")


@pytest.fixture(scope="module")
def keys():
    with gzip.open(shared_path("golden/vlmdiff/keys.json.gz")) as file:
        return {key: tuple(shape) for key, (shape, _) in json.load(file).items()}


def sd_models(**hint):
    """The four networks at Stable Diffusion 1.5's size."""
    unet = sd_unet()
    text = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    guide = SemanticGuide.from_unet(unet, **hint)
    return {"unet": unet, "guide": guide, "vae": sd_vae(), "text_encoder": CLIPTextModel(text)}


def test_every_name_of_the_golden_checkpoint(keys):
    """All 1493 entries: each tensor of the four networks finds one of its shape, and only no-weights are left."""
    with torch.device("meta"):
        models = sd_models()
    found = set()
    for part, model in models.items():
        names = convert.ldm_names(part, model, keys)
        assert names == ldm_names(part, model) and len(set(names.values())) == len(names)
        for name, tensor in model.state_dict().items():
            assert keys[names[name]] in (tuple(tensor.shape), (*tensor.shape, 1, 1)), name
        found |= set(names.values())
    rest = set(keys) - found
    assert all(convert.NO_WEIGHTS.fullmatch(key) for key in rest) and len(rest) == 14
    assert not any(convert.NO_WEIGHTS.fullmatch(key) for key in found)


def small_models(kind="sd"):
    """Narrow networks of Stable Diffusion's or the compact models' structure, with attention in the autoencoder."""
    unet, guide, _ = small(kind, filled=False)
    vae = sd_vae((8, 8, 16), norm_num_groups=4)
    return {"unet": unet, "guide": guide, "vae": vae, "text_encoder": tiny_parts()[2]}


def checkpoint(models):
    """The models' weights as a CompVis checkpoint holds them: attention in the autoencoder as 1x1 convolutions."""
    state = {}
    for part, model in models.items():
        tensors = deepcopy(model.state_dict())
        for name, key in ldm_names(part, model).items():
            convolution = ".attn_1." in key and tensors[name].dim() == 2
            state[key] = tensors[name][:, :, None, None] if convolution else tensors[name]
    return state


@pytest.fixture(scope="module")
def state():
    return checkpoint({part: fill(part, model) for part, model in small_models().items()})


@pytest.mark.parametrize("kind", ["sd", "compact"])
def test_weights_arrive_where_they_belong(kind):
    source = {part: fill(part, model) for part, model in small_models(kind).items()}
    state = checkpoint(source)
    assert sum(tensor.dim() == 4 and ".attn_1." in key for key, tensor in state.items()) == 8
    extra = ["betas", "sqrt_recipm1_alphas_cumprod", "pretrained_model.conv1.weight", "model_ema.decay"]
    extra.append("cond_stage_model.transformer.text_model.embeddings.position_ids")
    target = small_models(kind)
    assert convert.load_ldm(state | dict.fromkeys(extra, torch.zeros(9)), **target) == ["model_ema.decay"]
    for part, model in target.items():
        expected = source[part].state_dict()
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, expected[name]), (part, name)


def test_parts_not_asked_for_are_reported(state):
    unplaced = convert.load_ldm(state, unet=small_models()["unet"])
    assert {key.split(".")[0] for key in unplaced} == {"control_model", "first_stage_model", "cond_stage_model"}
    with pytest.raises(ModelError, match="'clip'"):
        convert.ldm_names("clip", None, [])


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("control_model.down21.0.weight", "fusion.down.1.0.weight"),
        ("model.diffusion_model.out.2.bias", "conv_out.bias"),
        ("model.diffusion_model.output_blocks.2.1.conv.bias", "output_blocks.2.1.conv.bias"),
        ("first_stage_model.decoder.up.1.upsample.conv.bias", "decoder.up.1.upsample.conv.bias"),
        ("cond_stage_model.transformer.text_model.final_layer_norm.bias", "final_layer_norm.bias"),
    ],
)
def test_nothing_is_filled_by_halves(key, named, state):
    """A tensor that is missing, or of another shape."""
    rest = {name: value for name, value in state.items() if name != key}
    assert len(rest) == len(state) - 1
    state = rest | ({key: torch.zeros(5)} if ".out.2." in key else {})
    target = small_models()
    before = deepcopy({part: model.state_dict() for part, model in target.items()})
    with pytest.raises(ModelError, match=re.escape(named)):
        convert.load_ldm(state, **target)
    for part, model in target.items():
        assert all(torch.equal(tensor, before[part][name]) for name, tensor in model.state_dict().items())


@pytest.mark.full
def test_the_filled_checkpoint_converts_and_predicts_as_the_authors_networks(keys):
    """All 1493 tensors, full width: no key is left without a place, and the networks give the golden numbers."""
    state = {  # the text encoder and the tables stay empty
        key: filled(key, shape) if key.startswith(NETWORKS) else torch.zeros(shape) for key, shape in keys.items()
    }
    models = sd_models(hint_mean=(0, 0, 0), hint_std=(1, 1, 1))
    assert convert.load_ldm(state, **models) == []
    del state
    with torch.no_grad():
        errors = network_errors(models["unet"], models["guide"], "a")
        assert all(errors[f"eps {name}"] < 5e-5 for name in ("plain", "mid", "all")), errors
        assert max(errors.values()) < 3e-4, errors
        autoencoder = autoencoder_errors(models["vae"], "sq", (1, 3, 64, 64))
        assert max(autoencoder.values()) < 5e-5, autoencoder
        latents, pictures = sampler_errors(models["unet"], models["guide"], models["vae"], "only mid")
    print("converted:", errors, autoencoder, {"latents": latents, "pictures": pictures})
    assert latents < 2e-3 and pictures < 1e-4


# --- whole files


@pytest.fixture(scope="module")
def authors(saved, tmp_path_factory):
    """(base folder, checkpoint file, backbone and guide that it holds): tiny networks with filled weights."""
    backbone = load_backbone(saved, "cpu")
    guide = SemanticGuide.from_unet(backbone.unet, backbone.scale_factor.bit_length() - 1, **convert.HINTS["imagenet"])
    models = {"unet": backbone.unet, "guide": guide, "vae": backbone.vae}
    models = {part: fill(part, model) for part, model in models.items()} | {"text_encoder": backbone.text_encoder}
    path = tmp_path_factory.mktemp("authors") / "epoch=9.ckpt"
    torch.save({"state_dict": checkpoint(models) | {"betas": torch.zeros(9)}, "epoch": 9}, path)
    return saved, path, backbone, guide


def test_a_checkpoint_becomes_a_folder_that_predicts_the_same(authors, tmp_path):
    base, path, backbone, guide = authors
    assert convert.convert_checkpoint(path, base, tmp_path / "new", dtype=torch.float32) == []
    assert not [file for file in (tmp_path / "new").rglob("*") if file.suffix in (".bin", ".ckpt", ".pt")]
    model = load_guided(tmp_path / "new", "cpu")
    z, images = torch.randn(2, *backbone.latent_shape), torch.rand(2, 3, backbone.image_size, backbone.image_size)
    with torch.no_grad():
        ours, theirs = (
            m.condition_on(images).predict_noise(z, 321, m.backbone.embed(["a bottle", ""]))
            for m in (model, GuidedModel(backbone, guide.eval()))
        )
        assert torch.equal(ours, theirs)
        assert torch.equal(model.backbone.encode(images), backbone.encode(images))
    with pytest.raises(ModelError, match="new is there already"):
        convert.convert_checkpoint(path, base, tmp_path / "new")


def test_a_folder_is_complete_or_absent(authors, tmp_path, monkeypatch):
    base, path, *_ = authors
    for place in ("mine", "mine/notes"):
        (tmp_path / "mine").mkdir(exist_ok=True)
        (tmp_path / "mine" / "notes").write_text("mine")
        with pytest.raises(ModelError, match=f"{place} is there already"):
            convert.convert_checkpoint(path, base, tmp_path / place)
    assert (tmp_path / "mine" / "notes").read_text() == "mine"

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert.store, "write_json", full)  # the last of what is written
    (tmp_path / "new").mkdir()  # an empty one is as good as none
    with pytest.raises(OSError):
        convert.convert_checkpoint(path, base, tmp_path / "new")
    assert not list((tmp_path / "new").iterdir()) and not list(tmp_path.glob(".writing*"))


def test_the_fine_tuned_autoencoder_takes_its_place(authors, tmp_path):
    base, path, backbone, _ = authors
    tuned = deepcopy(backbone.vae)
    with torch.no_grad():
        tuned.decoder.conv_out.bias.add_(1)
    alone = {key.removeprefix("first_stage_model."): tensor for key, tensor in checkpoint({"vae": tuned}).items()}
    torch.save(alone | {"loss.logvar": torch.ones(1)}, tmp_path / "vae.ckpt")
    unplaced = convert.convert_checkpoint(path, base, tmp_path / "new", tmp_path / "vae.ckpt", dtype=torch.float32)
    assert unplaced == ["first_stage_model.loss.logvar"]
    assert torch.equal(load_backbone(tmp_path / "new").vae.decoder.conv_out.bias, tuned.decoder.conv_out.bias)


@pytest.mark.parametrize("content", [None, "words", {"state_dict": {}}, [torch.zeros(1)]])
def test_files_that_hold_no_tensors_by_name(content, tmp_path):
    path = tmp_path / "bad.ckpt"
    if isinstance(content, str):
        path.write_text(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ModelError, match=r"bad\.ckpt"):
        convert.read_checkpoint(path)


def test_convert_command(authors, tmp_path):
    base, path, *_ = authors
    run = CliRunner().invoke(app, ["convert", str(path), "--base", str(base), "--out", str(tmp_path / "new")])
    assert run.exit_code == 0 and "every tensor placed" in run.output
    assert load_guided(tmp_path / "new").guide.config.hint_std[0] == pytest.approx(0.229)
