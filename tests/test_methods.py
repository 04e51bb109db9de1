"""The contract of every method: batches, records, bad values. What is a method's own has its own file."""

import inspect
import json
import re
from dataclasses import fields

import pytest
import torch
from tiny import tiny_backbone, tiny_guided, tiny_pixel_model

from zsad_lib import profiles
from zsad_lib.anomaly.features import load_features
from zsad_lib.data.image_sets import load_image_set
from zsad_lib.data.references import normal_images
from zsad_lib.diffusion.guidance import GuidedModel
from zsad_lib.errors import MethodError, ModelError
from zsad_lib.methods import BASELINES, LOADERS, METHODS, make_method, method_options

IDS, CATEGORIES = ["x/1", "x/2", "y/1"], ["nut", "tile", "nut"]
CAPTIONS = dict(zip(IDS, ["a red nut", "a tile", "a nut"], strict=True))
SMALL = {"sigma": 1, "pool": 2}  # the pools must fit into 32 px
# options for tiny networks, and for every option a value that must change the record
CASES = {
    "divad": (
        SMALL | {"inversion_steps": 20, "inference_steps": 20, "start_step": 10, "posterior": "sample"},
        {"start": "matched", "inversion_steps": 100, "inference_steps": 50, "start_step": 9, "guidance_scale": 2,
         "prompt": "a {category}", "posterior": "mode", "seed": 1, "map_size": 24, "sigma": 2, "pool": 3,
         "mode": "product", "t_latent": 51, "t_denoise": 51},
    ),
    "vlmdiff": (
        SMALL | {"captions": CAPTIONS | {"another": "a red nut"}},
        {"start": "matched", "steps": 5, "start_step": 1, "guidance_scale": 2, "captions": CAPTIONS,
         "guidance_mode": "all", "normalisation": "imagenet", "posterior": "mode", "seed": 1, "map_size": 24,
         "sigma": 2, "pool": 3, "mode": "product"},
    ),
    "dzad": (
        SMALL | {"stages": 5, "per_stage": 2, "steps": 5},
        {"stages": 4, "per_stage": 1, "seeds": 2, "steps": 4, "t_start": 300, "prompt": "a nut", "map_size": 24,
         "weighting": "exp-6", "multi_timestep": False, "decision": "map maximum", "map": "noise errors",
         "branch": "constant", "factor": 2, "sigma": 2, "pool": 1},
    ),
    "stein_ssim": (
        {},
        {"error": "trajectory", "amplification": "none", "scale": "noise", "density": "kde", "delta": 0.1, "steps": 5,
         "clip": False, "seed": 1, "decision": "typicality"},
    ),
    "diffpath": (
        {},
        {"variant": "6d", "steps": 5, "clip": False, "components": (1,), "bandwidth": 2, "seed": 1},
    ),
    **{
        name: ({}, {"size": 48, "sigma": 2, "pool": 3, "context": 4, "patch": 5, "stride": 3, "k": 2})
        for name in BASELINES
    },
}  # fmt: skip
UNRECORDED = {"callback", "batch_size"}  # change the speed, or nothing
TOLERANCE = {"map": 1e-4, "reconstruction": 1e-4, "matrix": 1e-4}


@pytest.fixture(scope="module")
def networks():
    backbone, guided = tiny_guided()
    pixel = tiny_pixel_model()
    return {"divad": tiny_backbone(), "vlmdiff": GuidedModel(backbone, guided.guide), "dzad": tiny_backbone(),
            "stein_ssim": pixel, "diffpath": pixel}  # fmt: skip


@pytest.fixture
def build(networks):
    def build(name, **options):
        return make_method(name, networks.get(name), load_features("pixels", "cpu"), **CASES[name][0] | options)

    return build


@pytest.mark.parametrize("name", METHODS)
def test_a_score_does_not_know_which_images_it_came_with(build, name):
    """Together, backwards, alone and on two threads: the same; ordinary tensors on the CPU, of the shapes promised."""
    method, threads = build(name), torch.get_num_threads()
    images = torch.rand(3, 3, method.size, method.size)
    whole = method.score(images, IDS, CATEGORIES)
    backwards = method.score(images.flip(0), IDS[::-1], CATEGORIES[::-1])
    outputs = {"image": whole.image, "map": whole.map, **whole.details}
    torch.set_num_threads(3 - min(threads, 2))
    threaded = method.score(images, IDS, CATEGORIES)
    torch.set_num_threads(threads)
    for i in range(3):
        alone = method.score(images[i : i + 1], IDS[i : i + 1], CATEGORIES[i : i + 1])
        for other, j in ((alone, 0), (backwards, 2 - i), (threaded, i)):
            for key, values in {"image": other.image, "map": other.map, **other.details}.items():
                if values is not None:
                    expected, tolerance = outputs[key][i], TOLERANCE.get(key, 1e-5)
                    torch.testing.assert_close(values[j], expected, rtol=1e-3, atol=tolerance, msg=f"{key} of {i}")
    assert whole.image.shape == (3,) and (whole.map is None or whole.map.shape[0] == 3)
    for tensor in outputs.values():
        if tensor is not None:
            assert tensor.dtype == torch.float32 and len(tensor) == 3
            tensor.add_(1)  # not possible on tensors made under inference_mode


@pytest.mark.parametrize("name", METHODS)
def test_the_record_holds_everything_that_changes_the_numbers(build, name):
    plain, changes = build(name), CASES[name][1]
    options = set(inspect.signature(METHODS[name]).parameters) - {"backbone", "features"}
    assert options - UNRECORDED <= set(changes) and options == set(method_options(name))
    assert plain.config["method"] == plain.name == name
    assert json.loads(json.dumps(plain.config)) == plain.config == build(name).config
    for option in options - UNRECORDED:
        assert build(name, **{option: changes[option]}).config != plain.config, option
    hints = {f.name: f.type for f in fields(METHODS[name])}
    for option in (o for o in options if getattr(hints[o], "__origin__", hints[o]) is float):
        assert build(name, **{option: 2}).config == build(name, **{option: 2.0}).config


@pytest.mark.parametrize("name", METHODS)
def test_batches_that_do_not_fit(build, name):
    method = build(name)
    images = torch.rand(2, 3, method.size, method.size)
    with pytest.raises(MethodError, match="2 images came with 1 ids"):
        method.score(images, ["a"], ["nut", "nut"])
    for part in (images[:, :2], images[0], images[:, :, :0]):
        with pytest.raises(MethodError, match=r"\[B,3,"):
            method.score(part, ["a"] * len(part), ["nut"] * len(part))
    with pytest.raises(MethodError, match=r"\[B,3,.*\[0, 3,"):
        method.score(images[:0], [], [])
    for wrong, named in (((255 * images).byte(), "uint8"), (images.numpy(), "float32"), ([], "list")):
        with pytest.raises(MethodError, match=f"tensor of floats.*{named}"):
            method.score(wrong, ["a", "b"], ["nut", "nut"])
    for value in (-0.01, 1.01, torch.nan, torch.inf):
        spoilt = images.clone()
        spoilt[1, 2, 0, 3] = value
        with pytest.raises(MethodError, match=r"image 'b' .*\[0,1\]"):
            method.score(spoilt, ["a", "b"], ["nut", "nut"])


BAD = {
    "divad": [
        ({"start": "unofficial"}, "'unofficial'"), ({"start_step": 18}, "18"),
        ({"inversion_steps": 0}, "inversion_steps 0"),
        ({"start_step": 20, "start": "matched"}, "start_step"), ({"t_latent": 160}, "t_latent=160"),
        ({"t_denoise": 592}, "t_denoise=592"), ({"posterior": "mean"}, "'mean'"),
        ({"prompt": "a {kind}"}, "{category}"), ({"prompt": "a {"}, "{category}"),
        ({"map_size": 16, "pool": 4}, "16 px"), ({"guidance_scale": "3"}, "'3'"),
    ],
    "vlmdiff": [
        ({"start": "unofficial"}, "'unofficial'"), ({"steps": 0}, "steps 0"), ({"steps": 1001}, "n_steps"),
        ({"steps": 1000}, "1000 steps with offset 1"), ({"start_step": 10}, "start_step"),
        ({"posterior": "mean"}, "'mean'"), ({"normalisation": "none"}, "'none'"), ({"guidance_mode": "mid"}, "'mid'"),
        ({"captions": "captions.jsonl"}, "captions.jsonl"), ({"captions": lambda images: [""]}, "captions"),
    ],
    "dzad": [
        ({"weighting": "late-4"}, "'late-4'.*late-3"), ({"decision": "vote"}, "'vote'"),
        ({"branch": "left"}, "'left'"), ({"factor": 0.5}, "factor"), ({"map": "heat"}, "'heat'"),
        ({"t_start": 0}, "t_start=0"),
        ({"stages": 100, "per_stage": 20}, "100 stages of 20"), ({"steps": 0}, "steps 0"), ({"seeds": 0}, "seeds"),
        ({"batch_size": 0}, "batch_size"), ({"multi_timestep": 1}, "multi_timestep"),
    ],
    "stein_ssim": [
        ({"error": "noise"}, "'noise'.*denoising"), ({"amplification": "sum"}, "'sum'"),
        ({"decision": "vote"}, "'vote'"), ({"scale": "log"}, "'log'"), ({"density": "normal"}, "'normal'"),
        ({"delta": 0}, "delta"),
        ({"amplification": "joint", "decision": "sum"}, "joint"), ({"steps": 600}, "600 steps"),
        ({"clip": "no"}, "clip"),
    ],
    "diffpath": [
        ({"variant": "7d"}, "'7d'.*1d"), ({"steps": 600}, "600 steps"), ({"components": ("a",)}, "components"),
    ],
    "local_contrast": [({"context": None}, "context")],
    "median": [({"pool": 12}, "64 px"), ({"size": 0}, "size")],
    "patch_knn": [
        ({"patch": 8}, "odd patch"), ({"size": 12}, "fewer than 5"), ({"size": 16, "patch": 33, "pool": 1}, "16x16 px"),
        ({"stride": 0}, "stride"),
    ],
}  # fmt: skip
EVERY = [({"sigma": -1}, "sigma"), ({"sigma": float("nan")}, "sigma"), ({"pool": 0}, "pool"), ({"mode": "max"}, "mode"),
         ({"map_size": 0}, "map_size"), ({"map_size": 24.5}, "map_size"), ({"seed": "one"}, "seed")]  # fmt: skip
# of every option that is a number, named at the start of the message
NO_NUMBERS = [{}, [], "1", True, float("nan"), float("inf"), -float("inf"), 10**400, -(10**400)]


@pytest.mark.parametrize("name", METHODS)
def test_values_that_cannot_work(build, name):
    known = method_options(name)
    every = [(options, word) for options, word in EVERY if set(options) <= set(known)]
    for options, word in BAD[name] + every:
        with pytest.raises(MethodError, match=word):
            build(name, **options)
    for option in (key for key, value in known.items() if type(value) in (int, float)):
        for value in NO_NUMBERS:
            with pytest.raises(MethodError, match=f"^{option} .*: use an? (int|float)"):
                build(name, **{option: value})
    with pytest.raises(MethodError, match=f"no option sigmma; it has: .*{next(iter(known))}="):
        build(name, sigmma=3)


@pytest.mark.parametrize("name", ("divad", "vlmdiff", "local_contrast"))
def test_methods_without_a_reference_take_none(build, name):
    with pytest.raises(MethodError, match=name):
        build(name).fit(normal_images(load_image_set("noise", "train", 5, size=16)))


def test_wrong_references_are_refused_before_anything_is_loaded():
    for given, named in (
        ({"count": 0}, "count 0"), ({"count": -3}, "count -3"), ({"count": "9"}, "count '9'"),
        ({"reference": 7}, "reference 7"), ({"reference": ["synthad"]}, "reference"),
    ):  # fmt: skip
        with pytest.raises(MethodError, match=f"^{named}"):
            profiles.make("lite", "diffpath", backbone="nowhere/at/all", **given)
    with pytest.raises(MethodError, match="limit 0"):
        profiles.make("lite", "dzad", backbone="nowhere/at/all", limit=0)
    for call in (profiles.crosses, profiles.smoothing, lambda name: profiles.cross_models(name, "visa")):
        with pytest.raises(MethodError, match="'huge'; there are: lite"):
            call("huge")
    with pytest.raises(MethodError, match="no target nothing in profile lite"):
        profiles.cross_models("lite", "nothing")


# --- made by name


def test_registry(networks):
    assert {"divad", *BASELINES} <= set(METHODS) and set(LOADERS) | set(BASELINES) == set(METHODS)
    assert method_options("divad")["start_step"] == 40 and "backbone" not in method_options("divad")
    features = {"features": "pixels"}
    for name, given, words in (
        ("dived", {}, "no method 'dived'; there are: divad, dzad, .*local_contrast, median"),
        ("divad", features, "'divad' needs backbone="),
        ("divad", {"backbone": networks["divad"]}, "'divad' needs features="),
        ("divad", {"backbone": "a", "features": len, "random_weights": "features"}, "with features"),
        ("median", {"random_weights": "all"}, "with backbone"),
        ("divad", {"backbone": networks["divad"], **features, "random_weights": "unet"}, "given as a name"),
        ("vlmdiff", {"backbone": networks["divad"], **features}, "semantic guidance .* not a Backbone"),
    ):
        with pytest.raises(MethodError, match=words):
            make_method(name, **given)
    assert make_method("median", backbone="any", features="any").name == "median"


def test_a_name_is_loaded_and_an_object_taken_as_it_is(build, networks, monkeypatch):
    for name, backbone in networks.items():
        asked = []
        monkeypatch.setitem(LOADERS, name, lambda *args, b=backbone, **kw: asked.append((args, kw)) or b)  # noqa: B023
        method = make_method(name, "net", "pixels", "cpu", random_weights="unet", **CASES[name][0])
        assert asked == [(("net", "cpu"), {"random_weights": "unet"})] and method.config == build(name).config


def test_controls_are_a_field(networks, tmp_path):
    """A folder and a loaded object give the same method; a control says what it has re-initialised."""
    from diffusers import StableDiffusionPipeline

    tiny = networks["divad"]
    StableDiffusionPipeline(
        tiny.vae, tiny.text_encoder, tiny.tokenizer, tiny.unet, tiny.scheduler, None, None,
        requires_safety_checker=False,
    ).save_pretrained(tmp_path / "tiny")  # fmt: skip
    found = {
        control: make_method("divad", tmp_path / "tiny", "pixels", "cpu", random_weights=control, **CASES["divad"][0])
        for control in (None, "unet", "all")
    }
    assert found[None].config == make_method("divad", tiny, "pixels", "cpu", **CASES["divad"][0]).config
    assert {method.control for method in found.values()} == {None, "unet", "all"}
    assert found["unet"].config["backbone"]["name"] == "tiny (random U-Net)" and found["unet"].backbone.name == "tiny"
    assert make_method("median").control == "baseline"
    with pytest.raises(ModelError, match="nowhere"):
        make_method("divad", "nowhere/at/all", "pixels", "cpu")


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_is_explained_beside_its_field(name):
    """A comment on the line of the field, or one above it or above the fields just before it."""
    for cls in METHODS[name].__mro__:
        explained = False
        for line in inspect.getsource(cls).splitlines() if cls.__module__.startswith("zsad_lib") else ():
            field, comment = re.match(r"    (\w+): (?!ClassVar)", line), "#" in line
            if field and field[1] not in ("backbone", "features"):
                assert explained or comment, f"{cls.__name__}.{field[1]}"
            explained = comment and not line.strip().startswith("def") or (explained and bool(field))
