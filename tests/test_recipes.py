"""Recipes write directories that the ordinary loaders read."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline
from PIL import Image
from test_backbones import tiny_backbone

from conftest import ROOT
from zsad_lib.anomaly.features import load_features
from zsad_lib.data.captions import load_captioner
from zsad_lib.diffusion.guidance import TRAINED, load_guided
from zsad_lib.diffusion.latent import load_backbone
from zsad_lib.errors import TrainingError
from zsad_lib.training import fit, guides
from zsad_lite import synthad
from zsad_lite.training import pools, recipes


def test_unknown_recipe():
    with pytest.raises(TrainingError, match="lite-foundation"):
        recipes.train("stable-diffusion")


def test_mixed_prompts_hold_all_three_kinds():
    captions = ["An image of a gauge, rim black"] * 200
    mixed = recipes.mix_prompts(captions, torch.Generator().manual_seed(0))
    share = {text: mixed.count(text) / 200 for text in ("", "An image of a gauge", captions[0])}
    assert sum(share.values()) == pytest.approx(1)
    assert share[""] == pytest.approx(0.1, abs=0.06) and share["An image of a gauge"] == pytest.approx(0.4, abs=0.1)


def test_merges_are_learned_by_count_and_break_ties_the_same_way():
    assert recipes.learn_merges(["aab", "ab", "cd"]) == [("a", "b</w>"), ("a", "ab</w>"), ("c", "d</w>")]
    words = [w for name in synthad.CATEGORIES for w in synthad.draw(name, "0").caption.replace(",", "").split()]
    merges = recipes.learn_merges(words)
    assert merges == recipes.learn_merges(words[::-1])
    assert {"".join(pair) for pair in merges} >= {word + "</w>" for word in words if len(word) > 1}


def test_word_numbers_of_the_captioner_do_not_change():
    captions = [synthad.draw(name, f"t/{k}").caption for name in synthad.CATEGORIES for k in range(4)]
    first, *others = [recipes.build_word_tokenizer(captions).get_vocab() for _ in range(4)]
    assert all(other == first for other in others)


def test_every_word_of_the_captions_is_one_token(tmp_path):
    captions = [synthad.draw(name, f"t/{k}").caption for name in synthad.CATEGORIES for k in range(4)]
    tokenizer = recipes.build_tokenizer(captions, tmp_path / "tokenizer")
    for text in captions:
        tokens = tokenizer.tokenize(text)
        assert tokens == [w + "</w>" for w in text.lower().replace(",", " ,").split()]
        assert len(tokens) + 2 <= recipes.MAX_TOKENS
    assert tokenizer("zebra").input_ids != tokenizer("quokka").input_ids  # unknown words still differ, by bytes


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_foundation_recipe_writes_a_pipeline_that_loads(in_tmp):
    options = {"categories": ("gauge",), "per_category": 2, "vae_steps": 1}
    out = recipes.train("lite-foundation", "small", steps=2, device="cpu", **options)
    backbone = load_backbone(out, device="cpu")
    assert backbone.latent_shape == (recipes.LATENT_CHANNELS, 16, 16) and backbone.image_size == 64
    image = torch.rand(1, 3, 64, 64)
    assert backbone.decode(backbone.encode(image)).shape == image.shape
    text = backbone.embed(["An image of a gauge"])
    assert torch.isfinite(backbone.predict_noise(torch.randn(1, *backbone.latent_shape), 500, text)).all()
    assert sum(f.stat().st_size for f in out.rglob("*.safetensors")) < 20e6


def test_the_features_recipe_writes_a_resnet_that_loads(in_tmp):
    options = {"categories": ("gauge",), "per_category": 2}
    recipes.train("lite-foundation", "pipeline", steps=1, device="cpu", vae_steps=1, **options)
    out = recipes.train("lite-features", "small", steps=2, device="cpu", pipeline="pipeline", **options)
    features = load_features(out, device="cpu")
    maps = features(torch.rand(2, 3, 64, 64))
    assert len(maps) >= 2 and all(m.shape[0] == 2 and torch.isfinite(m).all() for m in maps)
    work = next(Path("training").glob("lite-features*"))
    drawn, redrawn = (np.load(work / f"{name}.npy") for name in ("pool", "redrawn"))
    assert redrawn.shape == drawn.shape and redrawn.dtype == np.uint8 and not np.array_equal(drawn, redrawn)


def test_the_features_recipe_needs_an_autoencoder(in_tmp):
    with pytest.raises(TrainingError, match="lite-foundation first"):
        recipes.train("lite-features", steps=1, per_category=1, pipeline="nowhere")


def test_place_loss_is_low_only_where_places_agree():
    features = torch.randn(2, 32, 32, 32)
    same = recipes.place_loss(features, features, torch.Generator().manual_seed(0))
    shuffled = recipes.place_loss(features, features.roll(3, dims=3), torch.Generator().manual_seed(0))
    assert same < 0.5 < 3 < shuffled


def test_degraded_copies_differ_but_show_the_same():
    x = fit.to_tensor(np.stack([synthad.draw("gauge", "0").image]))
    one, two = (recipes.degrade(x, torch.Generator().manual_seed(k)) for k in (1, 2))
    assert one.shape == (1, 3, 128, 128) and not torch.equal(one, two)
    plain = torch.nn.functional.interpolate(x, 128, mode="bilinear")
    assert all((view - plain).abs().mean() < 0.25 for view in (one, two))


def test_a_model_card_says_what_was_trained_and_measured(in_tmp):
    options = {"categories": ("gauge",), "per_category": 2, "vae_steps": 1}
    card = (recipes.train("lite-foundation", "small", steps=1, device="cpu", **options) / "README.md").read_text()
    for fact in (
        "trained on the same images",
        "stage unet",
        "1 steps, seed 0",
        "license: apache-2.0",
        "Limits",
        "of gauge",
    ):
        assert fact in card, fact
    log = json.loads((in_tmp / "small" / "training_log.json").read_text())
    assert log["unet"]["steps"] == 1 and len(log["vae"]["losses"]) == 1


def test_the_ddpm_recipe_writes_a_pipeline_that_draws(in_tmp):
    out = recipes.train("lite-ddpm-synthad", "small", 2, device="cpu", categories=("gauge",), per_category=2)
    pipeline = DDPMPipeline.from_pretrained(out)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(1, num_inference_steps=2, output_type="np").images.shape == (1, 32, 32, 3)


def test_the_ddpm_recipe_trains_on_a_folder(in_tmp):
    with pytest.raises(TrainingError, match="--data FOLDER"):
        recipes.train("lite-ddpm-cifar10", device="cpu")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    (in_tmp / "pictures" / "ship").mkdir(parents=True)
    for k, picture in enumerate(pixels):
        Image.fromarray(picture).save(in_tmp / "pictures" / "ship" / f"{k}.png")
    np.testing.assert_array_equal(recipes.folder_pool(in_tmp / "pictures"), pixels)
    out = recipes.train("lite-ddpm-cifar10", "small", steps=1, device="cpu", data=in_tmp / "pictures")
    assert "3: the images in a folder" in (out / "README.md").read_text()


def test_the_captioner_learns_what_it_is_shown(in_tmp):
    """Few images, seen often: it says their captions back, word for word."""
    out = recipes.train(
        "lite-captioner", "small", steps=60, device="cpu", categories=("gauge", "screw"), per_category=2
    )
    drawings = [synthad.draw(name, f"train/0/{k}") for name in ("gauge", "screw") for k in range(2)]
    images = (fit.to_tensor(np.stack([d.image for d in drawings])) + 1) / 2
    assert load_captioner(out, "cpu")(images) == [d.caption for d in drawings]


def test_an_option_that_a_recipe_does_not_have_is_refused(in_tmp):
    with pytest.raises(TrainingError, match="lite-foundation has no option data"):
        recipes.train("lite-foundation", device="cpu", data="pictures")


def test_equal_weights_are_stored_once(in_tmp):
    for name, content in (("base", b"same"), ("new", b"same")):
        Path(name, "vae").mkdir(parents=True)
        Path(name, "vae", "weights.safetensors").write_bytes(content)
        Path(name, "unet.safetensors").write_bytes(name.encode())
    recipes.share_files(Path("new"), Path("base"))
    link = Path("new/vae/weights.safetensors")
    assert link.is_symlink() and link.read_bytes() == b"same" and not Path("new/unet.safetensors").is_symlink()
    Path("base").rename("moved")
    assert not link.exists()  # it was a link to the base, relative, and nothing else
    Path("moved").rename("base")
    recipes.share_files(Path("new"), Path("base"))  # a link stays a link
    assert link.is_symlink() and link.read_bytes() == b"same"


TINY = {"train_on": "synthad-A", "per_category": 1, "steps": 2, "device": "cpu"}


def test_dzad_recipe_writes_the_trained_parts_beside_their_base(in_tmp):
    """Frozen parts stay the base's, to the last bit; guide and decoder have moved; other options, another name."""
    out = recipes.train("dzad", timesteps=1200, pictures=8, **TINY)
    assert out == Path("checkpoints/lite-dzad-a--per_category=1--pictures=8--timesteps=1200")
    command = "zsad train lite-dzad-a --set per_category=1 --set pictures=8 --set timesteps=1200"
    assert command in (out / "README.md").read_text()
    model, base = load_guided(out, "cpu"), load_backbone("lite-group-a", "cpu")
    assert len(model.backbone.alphas_cumprod) == 1200 and model.facts["train_on"] == "synthad-A"
    before, after = base.unet.state_dict(), model.backbone.unet.state_dict()
    frozen = {key for key in before if not key.startswith(TRAINED)}
    assert frozen and all(torch.equal(before[key], after[key]) for key in frozen)
    assert any(not torch.equal(before[key], after[key]) for key in set(before) - frozen)
    assert any(p.abs().max() > 0 for p in model.guide.encoder.controlnet_mid_block.parameters())
    assert not list(out.rglob("*vae*"))


def test_pictures_of_no_product_are_mixed_in_and_named_on_the_card(in_tmp):
    here = ROOT
    tiny = {"per_category": 1, "steps": 1, "device": "cpu", "pictures": 16}
    for name, count, options in (
        ("lite-group-a", 6 + 11 + 16, {"autoencoder": f"{here}/checkpoints/lite-foundation"}),
        ("lite-dzad-a", 6 + 16, {}),
    ):
        out = recipes.train(name, "out", **tiny, **options)
        assert f"; 16 {pools.GENERIC}" in (out / "README.md").read_text()
        latents = torch.load(next(Path("training").glob(f"{name}*/latents.pt")), weights_only=True)
        assert len(latents["mean"]) == count


@pytest.mark.parametrize("levels", [0, 1, 2, 3])
def test_the_deepest_levels_attend(levels):
    config = recipes.build_unet((16, 32, 32), levels).config
    attends = [kind.startswith("CrossAttn") for kind in config.down_block_types]
    assert attends == [False] * (3 - levels) + [True] * levels
    assert [kind.startswith("CrossAttn") for kind in config.up_block_types] == attends[::-1]


def test_vlmdiff_recipe_writes_a_pipeline_with_its_guide(in_tmp):
    here = ROOT
    models = {"base": f"{here}/checkpoints/lite-foundation", "captioner": f"{here}/checkpoints/lite-captioner"}
    options = {**TINY, **models, "train_on": "synthad", "unet_steps": 1, "vae_steps": 1, "widths": (16, 32, 32)}
    out = recipes.train("vlmdiff", "new", **options)
    model = load_guided(out, "cpu")
    assert list(model.backbone.unet.config.block_out_channels) == [16, 32, 32]
    assert "fine-tuned" in (out / "README.md").read_text()
    said = json.loads(next(Path("training").glob("lite-vlmdiff*/captions.json")).read_text())
    assert len(said) == 12 and all(caption.startswith("An image of") for caption in said)
    with torch.no_grad():
        seen = model.seeing(torch.rand(1, 3, 64, 64))
        eps = seen.predict_noise(torch.randn(1, *model.backbone.latent_shape), 5, model.backbone.embed([""]))
    assert eps.shape == (1, *model.backbone.latent_shape) and eps.isfinite().all()


def test_texts_are_captions_or_empty(in_tmp):
    backbone = load_backbone("lite-foundation", "cpu")
    texts = guides.embed_texts(backbone, ["An image of a bottle", "An image of a screw"])
    chosen = torch.arange(400) % 2
    given = texts(chosen, torch.Generator().manual_seed(0))
    with torch.no_grad():
        known = backbone.embed(["", "An image of a bottle", "An image of a screw"])
    which = torch.stack([(given - text).abs().amax((1, 2)) < 1e-5 for text in known]).int().argmax(0)
    assert (which[which > 0] == chosen[which > 0] + 1).all()
    assert (which == 0).float().mean() == pytest.approx(guides.EMPTY, abs=0.07)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dzad", {}, "needs --train-on: synthad"),
        ("vlmdiff", {"train_on": "synthad-A"}, "needs a captioner: --set captioner=NAME"),
        ("lite-dzad-a", {"pictures": 0, "mode": "half"}, "mode 'half' is unknown"),
        ("lite-dzad-a", {"pictures": 0, "initialisation": "zero"}, "initialisation 'zero' is unknown"),
        ("lite-dzad-a", {"pictures": 0, "schedule": "longer"}, "schedule reading 'longer' is unknown"),
    ],
)
def test_guidance_options_that_cannot_work(in_tmp, name, options, message):
    options = {"per_category": 1, "steps": 1, "device": "cpu", "base": "lite-group-a", **options}
    with pytest.raises(ValueError, match=message):
        recipes.train(name, **options)


def test_captions_of_a_file_are_put_to_their_images(in_tmp):
    Path("said.jsonl").write_text("".join(json.dumps({"id": k, "caption": f"a {k}"}) + "\n" for k in "abc"))
    assert guides.told("said.jsonl", ["c", "a"]) == ["a c", "a a"]
    with pytest.raises(TrainingError, match="no caption for 1 of 2 images: d"):
        guides.told("said.jsonl", ["a", "d"])
    with pytest.raises(TrainingError, match="drawings have no caption file"):
        guides.told("said.jsonl", None)


def test_a_base_that_predicts_no_noise_is_refused(in_tmp):
    with pytest.raises(TrainingError, match="predicts v_prediction"):
        guides.denoiser_loss(Path("."), tiny_backbone("v_prediction"), None, None, torch.ones(9))
