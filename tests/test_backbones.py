"""zsad_lib.diffusion.latent, anomaly.features: golden parity, guidance, loading that never guesses."""

import json
import shutil
from itertools import combinations
from pathlib import Path

import pytest
import torch
from helpers import arrays
from tiny import tiny_backbone, tiny_parts, tiny_scheduler
from transformers import CLIPTokenizer

from conftest import shared_path
from zsad_lib.anomaly.features import load_features
from zsad_lib.diffusion.guidance import load_guided, load_guided_or_plain
from zsad_lib.diffusion.latent import Backbone, load_backbone
from zsad_lib.diffusion.loading import Location, fetch, fingerprint
from zsad_lib.diffusion.pixel import load_pixel_model
from zsad_lib.errors import ModelError

VOCABULARY = tiny_parts()[3].get_vocab()


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


def test_fingerprint_sees_every_byte():
    """Written to in place, of another type, in another shape: never what was remembered."""
    module = torch.nn.Linear(50, 50)
    seen = [fingerprint(module)]
    assert fingerprint(module) == seen[0]
    with torch.no_grad():
        module.weight[3, 7] += 1e-6
    seen.append(fingerprint(module))
    module.weight = torch.nn.Parameter(module.weight.view(25, 100))
    seen.append(fingerprint(module))
    seen += [fingerprint(module.half()), fingerprint(module.float())]  # the second one rounded
    assert len(set(seen)) == 5


def change(part, **values):
    """A change of a part's configuration."""

    def register(model):
        getattr(model, part).register_to_config(**values)

    return register


def tokenizer(model, **changes):
    """The model with a tokenizer of other settings."""
    rules = json.loads(model.tokenizer.backend_tokenizer.to_str())["model"]
    given = {"vocab": rules["vocab"], "merges": [], "pad_token": "!", "model_max_length": 24} | changes
    model.tokenizer = CLIPTokenizer(**given)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.unet.conv_out.bias.add_(1e-6),
        lambda model: model.vae.decoder.conv_out.bias.add_(1e-6),
        lambda model: model.text_encoder.get_input_embeddings().weight[5].add_(1e-6),
        change("vae", scaling_factor=0.91),
        change("unet", norm_eps=1e-4),
        lambda model: setattr(model.text_encoder.config, "hidden_act", "gelu"),
        change("scheduler", steps_offset=0),
        change("scheduler", prediction_type="v_prediction"),
        change("scheduler", beta_end=0.0120001),
        change("scheduler", trained_betas=[0.1, 0.2]),
        lambda model: tokenizer(model, model_max_length=23),
        lambda model: tokenizer(model, pad_token="<|endoftext|>"),
        lambda model: tokenizer(model, merges=[("a", "b</w>")], vocab=VOCABULARY | {"ab</w>": 26}),
        lambda model: tokenizer(model, vocab=VOCABULARY | {"a": 1, "b": 0}),
    ],
)
def test_the_record_sees_every_change(change):
    """Also such as change few numbers, or none of the weights."""
    model = Backbone(*tiny_parts(), tiny_scheduler(), name="x")
    before = model.config
    model.embed(["a"])
    tokenizer(model)
    assert model.config == before, "what was built again is the same, and a call leaves no trace"
    change(model)
    assert model.config != before and json.loads(json.dumps(model.config)) == model.config


FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
UNUSABLE = {
    "FlowMatchEulerDiscreteScheduler.* beta": ("scheduler/scheduler_config.json", lambda _: FLOW),
    "ConsistencyScheduler.* beta": (
        "scheduler/scheduler_config.json",
        lambda _: {"_class_name": "ConsistencyScheduler"},
    ),
    "num_train_timesteps 10000": ("scheduler/scheduler_config.json", lambda c: c | {"num_train_timesteps": 10**12}),
    "steps_offset '1'": ("scheduler/scheduler_config.json", lambda c: c | {"steps_offset": "1"}),
    "alphas_cumprod": ("scheduler/scheduler_config.json", lambda c: c | {"beta_end": float("nan")}),
    "scheduler cannot be read": ("scheduler/scheduler_config.json", lambda c: [c]),
    "scaling_factor of nan": ("vae/config.json", lambda c: c | {"scaling_factor": float("nan")}),
    "scaling_factor of '1'": ("vae/config.json", lambda c: c | {"scaling_factor": "1"}),
    "sample_size of None": ("unet/config.json", lambda c: c | {"sample_size": None}),
    "unet": ("unet/config.json", lambda c: c | {"block_out_channels": [0, 10**9]}),
    "text_encoder": ("text_encoder/config.json", lambda c: c | {"num_attention_heads": 0}),
    "tokenizer cannot be read": ("tokenizer/tokenizer.json", lambda c: [c]),
    "tokens, its encoder 77": (
        "tokenizer/tokenizer.json",
        lambda c: c | {"model": c["model"] | {"vocab": c["model"]["vocab"] | {f"{k}</w>": k for k in range(77, 90)}}},
    ),
}


@pytest.mark.parametrize("named", UNUSABLE)
def test_files_that_would_be_read_as_something_else(copy, named):
    file, change = UNUSABLE[named]
    content = change(json.loads((copy / file).read_text()))
    (copy / file).write_text(json.dumps(content))
    with pytest.raises(ModelError, match=named):
        load_backbone(copy, "cpu")


def test_a_tokenizer_without_words_is_refused(copy):
    """The library would make one of the special tokens alone, or one without merges."""
    rules = json.loads((copy / "tokenizer/tokenizer.json").read_text())["model"]
    (copy / "tokenizer/tokenizer.json").unlink()
    for name, content in (("README.md", ""), ("vocab.json", json.dumps(rules["vocab"]))):
        (copy / "tokenizer" / name).write_text(content)
        with pytest.raises(ModelError, match="tokenizer.json, and vocab.json with merges.txt"):
            load_backbone(copy, "cpu")
    (copy / "tokenizer/merges.txt").write_text("#version: 0.2\n")
    assert torch.equal(load_backbone(copy, "cpu").embed(["a b"]), tiny_backbone().embed(["a b"]))


@pytest.mark.parametrize("part", ("vae", "unet", "text_encoder"))
def test_weights_are_finite_floats(copy, part):
    from safetensors.torch import load_file, save_file

    file = next((copy / part).glob("*.safetensors"))
    tensors = load_file(file)
    name = sorted(tensors)[-1]
    for values in (tensors[name].int(), tensors[name] > 0, tensors[name] * torch.nan, tensors[name] + torch.inf):
        save_file(tensors | {name: values}, file, metadata={"format": "pt"})
        with pytest.raises(ModelError, match=f"{part}: the weights .*{name.split('.')[-2]}.* floats"):
            load_backbone(copy, "cpu")


@pytest.mark.parametrize("device", ("cuda:9", "gpu", "tpu", "meta", "", 5.5))
def test_devices_that_are_not_there(saved, device):
    with pytest.raises(ModelError, match=f"device '{device}'.* 'cpu'"):
        load_backbone(saved, device)


@pytest.mark.parametrize("load", [load_backbone, load_features, load_pixel_model, load_guided, load_guided_or_plain])
def test_paths_that_are_no_folders(load, copy, monkeypatch):
    """A file, a name too long for the file system, a folder that may not be entered."""
    with pytest.raises(ModelError, match="model_index.json is a file"):
        load(copy / "model_index.json")
    with pytest.raises(ModelError, match="too long"):
        load("x" * 5000)

    def refused(*args, **options):
        raise PermissionError(13, "Permission denied", str(copy))

    monkeypatch.setattr(Path, "is_file", refused)
    with pytest.raises(ModelError, match="tiny cannot be read.*Permission denied"):
        load(copy)


@pytest.mark.parametrize(
    "error", [MemoryError(), RecursionError("too deep"), OSError(5, "bad\x1b[31m disk"), KeyError(1)]
)
def test_whatever_a_library_raises_is_one_printable_line(error):
    def loader(source):
        raise error

    with pytest.raises(ModelError, match="here cannot be read: ") as caught:
        fetch(Location("x", "here", local=True), None, loader)
    assert str(caught.value).isprintable() and ": . " not in str(caught.value)


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


@pytest.mark.parametrize(
    "changes",
    [
        [], {"size": "32"}, {"size": 0}, {"size": True}, {"size": {"width": 32}}, {"image_mean": [0.5, 0.5]},
        {"image_mean": "0.5"}, {"image_mean": [0.5, None, 0.5]}, {"image_std": [0.5, 0.5, 0]},
        {"image_std": [0.5, 0.5, float("nan")]}, {"image_std": {"r": 1}},
    ],
)  # fmt: skip
def test_damaged_preprocessing_is_named(vit, tmp_path, changes):
    folder = shutil.copytree(vit, tmp_path / "damaged")
    content = {"size": 32, **PIXELS, **changes} if changes else changes
    (folder / "preprocessor_config.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match="preprocessor_config.json"):
        load_features(folder, "cpu")


def test_the_record_holds_how_features_scale_their_images(vit, saved, tmp_path):
    seen = [load_features(vit, "cpu").config]
    folder = shutil.copytree(vit, tmp_path / "vit")
    for changes in ({"image_mean": [0.5, 0.4, 0.31]}, {"image_std": [0.2, 0.25, 0.51]}, {"size": 40}):
        (folder / "preprocessor_config.json").write_text(json.dumps({"size": 32, **PIXELS, **changes}))
        seen.append(load_features(folder, "cpu").config)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-3}))
    seen.append(load_features(folder, "cpu").config)
    assert all(one != other for one, other in combinations(seen, 2))
    assert load_features(f"unet:{saved}", "cpu").config["backbone"] == load_backbone(saved, "cpu").config


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
