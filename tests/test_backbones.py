"""zsad_lib.diffusion.latent, anomaly.features: golden parity, guidance, loading that never guesses."""

import json
import shutil

import pytest
import torch
from helpers import arrays
from tiny import tiny_backbone, tiny_parts, tiny_scheduler

from conftest import shared_path
from zsad_lib.anomaly.features import load_features
from zsad_lib.diffusion.latent import Backbone, load_backbone
from zsad_lib.diffusion.loading import fingerprint
from zsad_lib.diffusion.pixel import load_pixel_model
from zsad_lib.errors import ModelError


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "tiny")


@pytest.fixture(scope="module")
def golden():
    return load_backbone(shared_path("golden/tiny_sd"), device="cpu")


@pytest.mark.parametrize("case", range(4))
def test_golden_text_and_posterior(golden, case):
    stored = arrays(f"divad/case{case}_input")
    prompt = json.loads(shared_path("golden/divad/meta.json").read_text())["prompts"][case]
    assert (golden.embed(["", prompt]) - stored["text_embeddings"]).abs().max() < 1e-6
    images = stored["image"].permute(2, 0, 1)[None] / 255
    mean, std = golden.posterior(images)
    assert (mean - stored["posterior_mean"]).abs().max() < 1e-5
    assert (std - stored["posterior_std"]).abs().max() < 1e-5
    start = golden.encode(images, stored["posterior_noise"])
    assert (start - stored["start_latents"]).abs().max() < 1e-5
    assert torch.equal(golden.encode(images), 0.18215 * mean)


def test_golden_folder_reads_completely(golden):
    """The text encoder's files carry the `text_model.` prefix; nothing of them may be lost on the way."""
    from safetensors.torch import load_file

    stored = load_file(shared_path("golden/tiny_sd/text_encoder/model.safetensors"))
    loaded = golden.text_encoder.state_dict()
    found = {name.removeprefix("text_model.") for name in loaded}
    assert {name.removeprefix("text_model.") for name in stored} == found
    for name, tensor in loaded.items():
        assert torch.equal(tensor, stored["text_model." + name.removeprefix("text_model.")]), name


def test_load_backbone(saved):
    backbone = load_backbone(saved, device="cpu")
    built = tiny_backbone()
    assert backbone.name == "tiny" and backbone.dtype == torch.float32 and backbone.device.type == "cpu"
    assert backbone.latent_shape == (4, 8, 8) and backbone.image_size == 32 and backbone.steps_offset == 1
    assert type(backbone.scheduler).__name__ == "DDIMScheduler"
    assert torch.allclose(backbone.alphas_cumprod, built.alphas_cumprod) and backbone.alphas_cumprod.dim() == 1
    assert backbone.config == built.config and json.loads(json.dumps(backbone.config)) == backbone.config
    assert not any(p.requires_grad for p in backbone.unet.parameters()) and not backbone.vae.training
    images = torch.rand(2, 3, 32, 48)
    latents = backbone.encode(images)
    assert latents.shape == (2, 4, 8, 12) and torch.equal(latents, built.encode(images))
    decoded = backbone.decode(50 * latents)
    assert decoded.shape == images.shape and 0 <= decoded.min() and decoded.max() <= 1
    assert torch.equal(backbone.embed(["a b"]), built.embed(["a b"]))
    with pytest.raises(ModelError, match="30x32 .* 4$"):
        backbone.encode(torch.rand(1, 3, 30, 32))


def test_guidance_and_evaluations():
    """uncond + s·(cond − uncond); 1 and a missing uncond run one half only; every sample is counted."""
    backbone = tiny_backbone()
    z = torch.randn(2, 4, 8, 8)
    cond, uncond = backbone.embed(["an image", "of b"]), backbone.embed(["", ""])

    def run(*args):
        before = backbone.evaluations
        return backbone.predict_noise(z, 401, *args), backbone.evaluations - before

    with_text, count = run(cond)
    assert count == 2
    without, _ = run(uncond)
    assert not torch.allclose(with_text, without, atol=1e-4)
    for scale in (0.0, 3.5):
        guided, count = run(cond, uncond, scale)
        assert count == 4
        assert torch.allclose(guided, without + scale * (with_text - without), atol=1e-5)
    for same, count in (run(cond, uncond, 1.0), run(cond, None, 3.5)):
        assert count == 2 and torch.equal(same, with_text)


def test_v_prediction():
    """A network output read as v = √ᾱ·ε − √(1 − ᾱ)·x0 must give the ε and x0 that produce the latent."""
    epsilon, velocity = tiny_backbone(), tiny_backbone("v_prediction")
    z, cond, uncond = torch.randn(2, 4, 8, 8), epsilon.embed(["a", "b"]), epsilon.embed(["", ""])
    alpha = velocity.alphas_cumprod[301]
    for scale in (1.0, 3.5):
        v = epsilon.predict_noise(z, 301, cond, uncond, scale)
        eps = velocity.predict_noise(z, 301, cond, uncond, scale)
        x0 = (z - (1 - alpha).sqrt() * eps) / alpha.sqrt()
        assert torch.allclose(alpha.sqrt() * eps - (1 - alpha).sqrt() * x0, v, atol=1e-5)
    assert velocity.config != epsilon.config


def test_prompts_too_long_are_announced():
    with pytest.warns(UserWarning, match="32 to 24 tokens: 'aaaa"):
        assert tiny_backbone().embed(["a" * 30]).shape == (1, 24, 16)


def test_half_precision_files_are_widened_on_the_cpu(copy):
    """Half-precision files run in float32; asking for float16 keeps the U-Net and the text encoder in it."""
    from diffusers import UNet2DConditionModel

    full = load_backbone(copy, device="cpu")
    unet = UNet2DConditionModel.from_pretrained(copy, subfolder="unet").half()
    unet.save_pretrained(copy / "unet")
    widened = load_backbone(copy, device="cpu")
    weight = widened.unet.conv_in.weight
    assert weight.dtype == torch.float32 and torch.equal(weight, full.unet.conv_in.weight.half().float())
    with pytest.raises(ModelError, match="'int8'"):
        load_backbone(copy, device="cpu", dtype="int8")
    half = load_backbone(copy, device="cpu", dtype="float16")
    assert half.unet.dtype == half.text_encoder.dtype == torch.float16 and half.vae.dtype == torch.float32
    eps = half.predict_noise(torch.randn(1, 4, 8, 8), 101, half.embed(["a"]))
    assert eps.dtype == torch.float32 and torch.isfinite(eps).all()


def test_random_weights(saved):
    """The controls: the named parts are new, the rest stays, twice the same, and label and config tell."""
    plain, unet, everything = models = [load_backbone(saved, "cpu", random_weights=r) for r in (None, "unet", "all")]
    assert [model.name for model in models] == ["tiny"] * 3 and unet.control == "unet"
    labels = ["tiny", "tiny (random U-Net)", "tiny (random weights)"]
    assert [model.label for model in models] == [model.config["name"] for model in models] == labels
    assert len({model.config["weights"] for model in models}) == 3
    assert fingerprint(unet.vae, unet.text_encoder) == fingerprint(plain.vae, plain.text_encoder)
    assert fingerprint(everything.unet) == fingerprint(unet.unet) != fingerprint(plain.unet)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert load_backbone(saved, "cpu", random_weights="all").config == everything.config
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ModelError, match="'some'"):
        load_backbone(saved, random_weights="some")


def test_fingerprint_sees_a_retrained_model():
    a, b = torch.nn.Linear(50, 50), torch.nn.Linear(50, 50)
    b.load_state_dict(a.state_dict())
    assert fingerprint(a) == fingerprint(b)
    b.load_state_dict({name: tensor + 1e-3 for name, tensor in a.state_dict().items()})
    assert fingerprint(a) != fingerprint(b) != fingerprint(b, a)


def test_wrong_folders(copy, tmp_path):
    with pytest.raises(ModelError, match="lacks model_index.json, vae/config.json, unet/config.json, text_enc"):
        load_backbone(tmp_path)
    shutil.rmtree(copy / "tokenizer")
    (copy / "vae" / "config.json").unlink()
    with pytest.raises(ModelError, match="lacks vae/config.json, tokenizer/tokenizer_config.json$"):
        load_backbone(copy)
    for name, named in ((tmp_path / "nowhere", "nowhere"), ("stable-diffusion-9", "stable-diffusion-1.5")):
        with pytest.raises(ModelError, match=named):
            load_backbone(name)


@pytest.mark.parametrize("part", ("vae", "unet", "text_encoder"))
@pytest.mark.parametrize("damage", ("missing", "unexpected", "mismatched", "cut", "gone"))
def test_weights_that_do_not_fit_are_refused(copy, part, damage):
    """Never a silent fallback to random numbers."""
    from safetensors.torch import load_file, save_file

    file = next((copy / part).glob("*.safetensors"))
    tensors = load_file(file)
    name = sorted(tensors)[0]
    if damage == "missing":
        del tensors[name]
    elif damage == "unexpected":
        tensors["extra.weight"] = torch.zeros(3)
    elif damage == "mismatched":
        tensors[name] = torch.zeros(3, 7)
    save_file(tensors, file, metadata={"format": "pt"})
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "gone":
        file.unlink()
    with pytest.raises(ModelError, match=part) as error:
        load_backbone(copy, device="cpu")
    assert damage not in ("missing", "unexpected") or damage in str(error.value)


@pytest.mark.parametrize(
    ("parts", "scheduler", "named"),
    [
        ({"text_width": 32}, {}, "16 text channels.* 32"),
        ({"in_channels": 9}, {}, "9 channels in and 4 out"),
        ({}, {"prediction_type": "sample"}, "'sample'"),
    ],
)
def test_parts_that_do_not_belong_together(parts, scheduler, named):
    with pytest.raises(ModelError, match=named):
        Backbone(*tiny_parts(**parts), tiny_scheduler(**scheduler), name="x")


@pytest.mark.parametrize("load", [load_backbone, load_features, load_pixel_model])
def test_hub_out_of_reach(load, monkeypatch):
    """Offline and not cached: says what to do."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="hf download nobody/no-such-model"):
        load("nobody/no-such-model")


def test_manifest_names(saved, tmp_path, monkeypatch):
    """A checkpoint of the manifest is read from its folder; one without a folder goes to its hub id."""
    manifest = tmp_path / "data_manifest.yaml"
    manifest.write_text(
        "datasets: {}\ncheckpoints:\n  here: {path: tiny}\n"
        "  there: {path: null, hub_id: nobody/no-such-model, revision: abc}\n"
        "  lost: {path: nowhere, fetch: Ask us.}\n"
    )
    monkeypatch.setenv("ZSAD_MANIFEST", str(manifest))
    shutil.copytree(saved, tmp_path / "tiny")
    assert load_backbone("here", device="cpu").config == tiny_backbone().config
    with pytest.raises(ModelError, match="'lost' .*nowhere. Ask us."):
        load_backbone("lost")
    with pytest.raises(ModelError, match="hf download nobody/no-such-model"):
        load_backbone("there")


def test_cuda_without_a_gpu(saved, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match="'cuda'"):
        load_backbone(saved, device="cuda")


PIXELS = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.25, 0.5]}


@pytest.fixture(scope="module")
def extractors(tmp_path_factory):
    """As facebook/dino-vits8 is stored, without a pooler, and microsoft/resnet-50, with a classifier's head."""
    from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTModel

    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(2)
    vit = ViTModel(ViTConfig(**size, image_size=32, patch_size=8), add_pooling_layer=False)
    size = {"embedding_size": 4, "hidden_sizes": [4, 6, 8, 10], "depths": [1] * 4, "layer_type": "basic"}
    resnet = ResNetForImageClassification(ResNetConfig(**size, num_labels=3))
    root = tmp_path_factory.mktemp("models")
    for name, model, side in (("vit", vit, {"height": 32, "width": 32}), ("resnet", resnet, {"shortest_edge": 64})):
        model.save_pretrained(root / name)
        (root / name / "preprocessor_config.json").write_text(json.dumps({"size": side, **PIXELS}))
    return root


@pytest.fixture
def vit(extractors):
    return extractors / "vit"


@pytest.fixture
def resnet(extractors):
    return extractors / "resnet"


def normalised(images):
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in PIXELS.values())
    return (images - mean) / std


def test_vit_features(vit):
    """The last layer's patch tokens on their grid, CLS dropped, positions interpolated to another size."""
    from transformers import ViTModel

    model = ViTModel.from_pretrained(vit, add_pooling_layer=False).eval()
    images = torch.rand(2, 3, 32, 32)
    extract = load_features(vit, device="cpu")
    (features,) = extract(images)
    tokens = model(normalised(images)).last_hidden_state
    assert features.shape == (2, 16, 4, 4) and extract.size == 32 and extract.config["layers"] is None
    assert torch.allclose(features[:, :, 2, 1], tokens[:, 1 + 2 * 4 + 1], atol=1e-5)
    (larger,) = load_features(vit, device="cpu", size=64)(torch.rand(1, 3, 50, 70))
    assert larger.shape == (1, 16, 8, 8)
    with pytest.raises(ModelError, match="36 .* 8$"):
        load_features(vit, size=36)
    with pytest.raises(ModelError, match="`layers`"):
        load_features(vit, layers=(1,))


def test_resnet_features(resnet):
    from transformers import ResNetModel

    images = torch.rand(2, 3, 64, 64)
    extract = load_features(resnet, device="cpu")
    features = extract(images)
    assert [f.shape[1:] for f in features] == [(6, 8, 8), (8, 4, 4), (10, 2, 2)]
    states = ResNetModel.from_pretrained(resnet).eval()(normalised(images), output_hidden_states=True).hidden_states
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(features, states[2:], strict=True))
    (first,) = load_features(resnet, device="cpu", layers=[1])(images)
    assert torch.allclose(first, states[1], atol=1e-5)
    with pytest.raises(ModelError, match="1 to 4"):
        load_features(resnet, layers=[0, 5])


def test_features_config_and_controls(resnet):
    plain, again = load_features(resnet, device="cpu"), load_features(resnet, device="cpu")
    other = load_features(resnet, device="cpu", random_weights="all")
    assert plain.config == again.config and json.loads(json.dumps(plain.config)) == plain.config
    assert (plain.name, plain.control, other.name, other.control) == ("resnet", None, "resnet", "all")
    assert other.config["weights"] != plain.config["weights"] and other.config["name"] == "resnet (random weights)"
    assert other.config == load_features(resnet, device="cpu", random_weights="all").config
    assert load_features(resnet, device="cpu", size=96).config != plain.config
    with pytest.raises(ModelError, match="'unet'"):
        load_features(resnet, random_weights="unet")


def test_features_that_cannot_be_read(vit, copy, tmp_path):
    from safetensors.torch import load_file, save_file

    with pytest.raises(ModelError, match="lacks config.json, preprocessor_config.json"):
        load_features(copy)
    (copy / "text_encoder/preprocessor_config.json").write_text(json.dumps({"size": 32, **PIXELS}))
    with pytest.raises(ModelError, match="'clip_text_model'"):
        load_features(copy / "text_encoder")
    damaged = shutil.copytree(vit, tmp_path / "damaged")
    tensors = load_file(damaged / "model.safetensors")
    del tensors[sorted(tensors)[-1]]
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="1 missing"):
        load_features(damaged)
    (damaged / "preprocessor_config.json").write_text('{"size": 32}')
    shutil.copy(vit / "model.safetensors", damaged)
    with pytest.raises(ModelError, match="image_mean and image_std"):
        load_features(damaged)


def test_pixel_features():
    """Raw colours that the cosine can compare: equal images at 0, also black ones; brightness counts."""
    from zsad_lib.anomaly.maps import anomaly_map

    extract = load_features("pixels", device="cpu")
    black, grey = torch.zeros(1, 3, 16, 16), torch.full((1, 3, 16, 16), 0.5)
    assert torch.equal(extract(grey)[0][:, :3], grey)
    assert anomaly_map(extract(black), extract(black), 16).abs().max() < 1e-6
    assert anomaly_map(extract(black), extract(grey), 16).min() > 0.1
    assert load_features("pixels", device="cpu", size=8)(grey)[0].shape == (1, 4, 8, 8)


def test_joined_features_give_the_layers_of_all_parts(resnet):
    images = torch.rand(2, 3, 64, 64)
    both = load_features(f"{resnet}+pixels", device="cpu")
    parts = [load_features(resnet, device="cpu"), load_features("pixels", device="cpu")]
    layers = [layer for part in parts for layer in part(images)]
    assert len(both(images)) == len(layers)
    assert all(torch.equal(one, two) for one, two in zip(both(images), layers, strict=True))
    assert both.config["parts"] == [part.config for part in parts] and both.control is None
    control = load_features(f"{resnet}+pixels", device="cpu", random_weights="all")
    assert control.name == both.name == "resnet+pixels" and control.control == "all"
    assert control.config["name"] == "resnet (random weights)+pixels"
    assert not torch.equal(control(images)[0], layers[0]) and torch.equal(control(images)[-1], layers[-1])
    with pytest.raises(ModelError, match="nowhere"):
        load_features("pixels+nowhere")


def test_unet_features(saved):
    """What the decoder of a pipeline's U-Net computes: repeatable, of each image alone, different when untrained."""
    extract = load_features(f"unet:{saved}", device="cpu")
    images = torch.rand(3, 3, extract.size, extract.size)
    layers = extract(images)
    sides = [layer.shape[-1] for layer in layers]
    assert sides == sorted(sides) and all(layer.shape[0] == 3 and torch.isfinite(layer).all() for layer in layers)
    for layer, alone in zip(layers, extract(images[1:2]), strict=True):
        torch.testing.assert_close(layer[1:2], alone, rtol=1e-4, atol=1e-5)
    other = load_features(f"unet:{saved}", device="cpu", random_weights="all")
    assert other.name == extract.name == "unet:tiny" and other.config["name"] == "unet:tiny (random U-Net)"
    assert other.config["weights"] != extract.config["weights"] and not torch.allclose(other(images)[0], layers[0])
