"""zsad_lib.convert: every name of the authors' checkpoint has its place, and nothing is guessed."""

import gzip
import json
from copy import deepcopy

import pytest
import torch
from diffusers import AutoencoderKL
from test_backbones import tiny_parts
from test_guidance import fill, sd_unet, sd_vae, small
from transformers import CLIPTextConfig, CLIPTextModel

from conftest import shared_path
from zsad_lib import convert
from zsad_lib.backbones import BackboneError
from zsad_lib.guidance import SemanticGuide


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
    with pytest.raises(BackboneError, match="2 tensors are missing") as error:
        convert.load_ldm(state, **target)
    assert "control_model.down21.0.weight" in str(error.value) and "diffusion_model.out.2.bias" in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in target["vae"].state_dict().items())
    with pytest.raises(BackboneError, match="'clip' is no part"):
        convert.ldm_names("clip", target["vae"])
