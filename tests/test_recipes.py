"""Recipes write directories that the ordinary loaders read."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline
from helpers import save_image, write_tree
from tiny import tiny_backbone

from conftest import ROOT
from zsad_lib import manifest, store
from zsad_lib.anomaly.features import load_features
from zsad_lib.data.captions import load_captioner
from zsad_lib.data.datasets import load_dataset
from zsad_lib.diffusion.guidance import TRAINED, load_guided
from zsad_lib.diffusion.latent import load_backbone
from zsad_lib.errors import RunError, TrainingError, ZsadError
from zsad_lib.training import fit, guides, recipe
from zsad_lib.training.cards import write_card
from zsad_lite import synthad
from zsad_lite.training import captioner, features, pipeline, pools, recipes

TINY = {"per_category": 1, "steps": 2, "device": "cpu"}
FOUNDATION = f"{ROOT}/checkpoints/lite-foundation"


@pytest.fixture(scope="module")
def captions():
    return [synthad.draw(name, f"t/{k}").caption for name in synthad.CATEGORIES for k in range(4)]


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def trained_pipeline(tmp_path_factory):
    """A pipeline trained for two steps, in a folder of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("pipeline"))
        return recipes.train("lite-foundation", "small", categories=("gauge",), vae_steps=1, **TINY).resolve()


# --- pipelines


def test_mixed_prompts_hold_all_three_kinds():
    caption = "An image of a gauge, rim black"
    mixed = pipeline.mix_prompts([caption] * 200, torch.Generator().manual_seed(0))
    share = {text: mixed.count(text) / 200 for text in ("", "An image of a gauge", caption)}
    assert sum(share.values()) == pytest.approx(1)
    assert share[""] == pytest.approx(0.1, abs=0.06) and share["An image of a gauge"] == pytest.approx(0.4, abs=0.1)


def test_merges_are_learned_by_count_and_break_ties_the_same_way(captions):
    assert pipeline.learn_merges(["aab", "ab", "cd"]) == [("a", "b</w>"), ("a", "ab</w>"), ("c", "d</w>")]
    words = [word for caption in captions[::4] for word in caption.replace(",", "").split()]
    merges = pipeline.learn_merges(words)
    assert merges == pipeline.learn_merges(words[::-1])
    assert {"".join(pair) for pair in merges} >= {word + "</w>" for word in words if len(word) > 1}


def test_every_word_of_the_captions_is_one_token(captions, tmp_path):
    tokenizer = pipeline.build_tokenizer(captions, tmp_path / "tokenizer")
    for text in captions:
        tokens = tokenizer.tokenize(text)
        assert tokens == [w + "</w>" for w in text.lower().replace(",", " ,").split()]
        assert len(tokens) + 2 <= pipeline.MAX_TOKENS
    assert tokenizer("zebra").input_ids != tokenizer("quokka").input_ids  # unknown words still differ, by bytes


@pytest.mark.parametrize("levels", [0, 1, 2, 3])
def test_the_deepest_levels_attend(levels):
    config = pipeline.build_unet((16, 32, 32), levels).config
    attends = [kind.startswith("CrossAttn") for kind in config.down_block_types]
    assert attends == [False] * (3 - levels) + [True] * levels
    assert [kind.startswith("CrossAttn") for kind in config.up_block_types] == attends[::-1]


def test_the_foundation_recipe_writes_a_pipeline_that_loads(trained_pipeline):
    backbone = load_backbone(trained_pipeline, device="cpu")
    assert backbone.latent_shape == (pipeline.LATENT_CHANNELS, 16, 16) and backbone.image_size == 64
    image = torch.rand(1, 3, 64, 64)
    assert backbone.decode(backbone.encode(image)).shape == image.shape
    text = backbone.embed(["An image of a gauge"])
    assert torch.isfinite(backbone.predict_noise(torch.randn(1, *backbone.latent_shape), 500, text)).all()
    assert sum(f.stat().st_size for f in trained_pipeline.rglob("*.safetensors")) < 20e6


def test_a_model_card_says_what_was_trained_and_measured(trained_pipeline):
    card = (trained_pipeline / "README.md").read_text()
    facts = ("trained on the same images", "stage unet", "2 steps, seed 0", "license: apache-2.0", "Limits", "of gauge")
    assert [fact for fact in facts if fact not in card] == []
    log = json.loads((trained_pipeline / "training_log.json").read_text())
    assert log["unet"]["steps"] == 2 and len(log["vae"]["losses"]) == 1


def test_pictures_of_no_product_are_mixed_in_and_named_on_the_card(in_tmp):
    out = recipes.train("lite-group-a", pictures=16, autoencoder=FOUNDATION, **TINY | {"steps": 1})
    assert f"; 16 {pools.GENERIC}" in (out / "README.md").read_text()
    latents = torch.load(next(Path("training").glob("*/latents.pt")), weights_only=True)
    assert len(latents["mean"]) == 6 + len(pools.PHOTOGRAPHS) + 16


# --- features


def test_the_features_recipe_writes_a_resnet_that_loads(in_tmp, trained_pipeline):
    options = {"pipeline": str(trained_pipeline), "categories": ("gauge",), **TINY}
    maps = load_features(recipes.train("lite-features", "small", **options), device="cpu")(torch.rand(2, 3, 64, 64))
    assert len(maps) >= 2 and all(m.shape[0] == 2 and torch.isfinite(m).all() for m in maps)
    drawn, redrawn = (np.load(next(Path("training").glob(f"*/{name}.npz")))["images"] for name in ("pool", "redrawn"))
    assert redrawn.shape == drawn.shape and redrawn.dtype == np.uint8 and not np.array_equal(drawn, redrawn)


def test_place_loss_is_low_only_where_places_agree():
    maps = torch.randn(2, 32, 32, 32)
    same = features.place_loss(maps, maps, torch.Generator().manual_seed(0))
    shuffled = features.place_loss(maps, maps.roll(3, dims=3), torch.Generator().manual_seed(0))
    assert same < 0.5 < 3 < shuffled


def test_degraded_copies_differ_but_show_the_same():
    x = fit.to_tensor(np.stack([synthad.draw("gauge", "0").image]))
    one, two = (features.degrade(x, torch.Generator().manual_seed(k)) for k in (1, 2))
    assert one.shape == (1, 3, 128, 128) and not torch.equal(one, two)
    plain = torch.nn.functional.interpolate(x, 128, mode="bilinear")
    assert all((view - plain).abs().mean() < 0.25 for view in (one, two))


# --- pixel models and the captioner


def test_the_ddpm_recipe_writes_a_pipeline_that_draws(in_tmp):
    out = recipes.train("lite-ddpm-synthad", "small", categories=("gauge",), **TINY)
    drawn = DDPMPipeline.from_pretrained(out)
    drawn.set_progress_bar_config(disable=True)
    assert drawn(1, num_inference_steps=2, output_type="np").images.shape == (1, 32, 32, 3)


def test_the_ddpm_recipe_trains_on_a_folder(in_tmp):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    for k, picture in enumerate(pixels):
        save_image(in_tmp / "pictures" / "ship" / f"{k}.png", picture)
    np.testing.assert_array_equal(fit.read_pixels(load_dataset("folder", in_tmp / "pictures").samples, 32), pixels)
    out = recipes.train("lite-ddpm-cifar10", "small", steps=1, device="cpu", data=in_tmp / "pictures")
    assert "3: the images in a folder" in (out / "README.md").read_text()


def test_the_captioner_learns_what_it_is_shown(in_tmp, captions):
    """Two images, seen often: it says their captions back, word for word. Words keep their numbers."""
    shown = ("gauge", "screw")
    out = recipes.train("lite-captioner", "small", categories=shown, **TINY | {"steps": 20})
    drawings = [synthad.draw(name, "train/0/0") for name in shown]
    images = (fit.to_tensor(np.stack([d.image for d in drawings])) + 1) / 2
    assert load_captioner(out, "cpu")(images) == [d.caption for d in drawings]
    first, *others = [captioner.build_word_tokenizer(captions).get_vocab() for _ in range(4)]
    assert all(other == first for other in others)


# --- semantic guidance


def test_dzad_recipe_writes_the_trained_parts_beside_their_base(in_tmp):
    """Frozen parts stay the base's, to the last bit; guide and decoder have moved; other options, another name."""
    out = recipes.train("dzad", train_on="synthad-A", timesteps=1200, pictures=8, **TINY)
    assert out == Path("checkpoints/lite-dzad-a--per_category=1--pictures=8--steps=2--timesteps=1200")
    card = (out / "README.md").read_text()
    assert "zsad train lite-dzad-a --set per_category=1 --set pictures=8 --steps=2 --set timesteps=1200" in card
    assert f"; 8 {pools.GENERIC}" in card
    model, base = load_guided(out, "cpu"), load_backbone("lite-group-a", "cpu")
    assert len(model.backbone.alphas_cumprod) == 1200 and model.facts["train_on"] == "synthad-A"
    before, after = base.unet.state_dict(), model.backbone.unet.state_dict()
    frozen = {key for key in before if not key.startswith(TRAINED)}
    assert frozen and all(torch.equal(before[key], after[key]) for key in frozen)
    assert any(not torch.equal(before[key], after[key]) for key in set(before) - frozen)
    assert any(p.abs().max() > 0 for p in model.guide.encoder.controlnet_mid_block.parameters())
    assert not list(out.rglob("*vae*"))


def test_a_guide_alone_leaves_its_base_as_it_is(in_tmp):
    out = recipes.train("dzad", "new", train_on="synthad-A", decoder=False, hint_pixels=8, **TINY)
    assert not (out / "decoder").exists() and "the guide of its U-Net" in (out / "README.md").read_text()
    model, base = load_guided(out, "cpu"), load_backbone("lite-group-a", "cpu").unet.state_dict()
    assert all(torch.equal(base[key], tensor) for key, tensor in model.backbone.unet.state_dict().items())
    assert model.backbone.name == "new" and model.guide.config.hint_pixels == 8
    assert any(p.abs().max() > 0 for p in model.guide.encoder.controlnet_mid_block.parameters())


def test_vlmdiff_recipe_writes_a_pipeline_with_its_guide(in_tmp):
    models = {"base": FOUNDATION, "captioner": f"{ROOT}/checkpoints/lite-captioner"}
    stages = {"unet_steps": 1, "vae_steps": 1, "widths": (16, 32, 32)}
    out = recipes.train("vlmdiff", "new", train_on="synthad", **models, **stages, **TINY)
    model = load_guided(out, "cpu")
    assert list(model.backbone.unet.config.block_out_channels) == [16, 32, 32]
    assert "fine-tuned" in (out / "README.md").read_text()
    said = json.loads(next(Path("training").glob("lite-vlmdiff*/captions.json")).read_text())
    assert len(said) == 12 and all(caption.startswith("An image of") for caption in said)
    with torch.no_grad():
        seen = model.condition_on(torch.rand(1, 3, 64, 64))
        eps = seen.predict_noise(torch.randn(1, *model.backbone.latent_shape), 5, model.backbone.embed([""]))
    assert eps.shape == (1, *model.backbone.latent_shape) and eps.isfinite().all()


def test_the_papers_recipes_train_on_the_normal_images_of_a_data_set(in_tmp):
    """Its training split, by the library alone; VLMDiff with the captions of a file."""
    write_tree(in_tmp / "set", per_class=1, categories=("lid",))
    for k in range(3):
        save_image(in_tmp / f"set/lid/train/good/{k}.png", np.full((64, 64, 3), 40 * k, np.uint8))
    said = [json.dumps({"id": f"lid/train/good/{k}", "caption": f"a lid {k}"}) for k in range(3)]
    Path("said.jsonl").write_text("\n".join(said) + "\n")
    options = {"train_on": "mvtec_ad", "root": "set", "base": "lite-foundation", "steps": 1, "device": "cpu"}
    for name, own in (("dzad", {}), ("vlmdiff", {"captions": "said.jsonl", "vae_steps": 0})):
        out = recipe.train(guides.RECIPES, name, **options, **own)
        assert "3 normal images of mvtec_ad" in (out / "README.md").read_text()
        assert load_guided(out, "cpu").facts["train_on"] == "mvtec_ad"


def test_texts_are_captions_or_empty():
    backbone = load_backbone("lite-foundation", "cpu")
    texts = guides.embeddings_of(["An image of a bottle", "An image of a screw"], backbone)
    chosen = torch.arange(400) % 2
    given = texts(chosen, torch.Generator().manual_seed(0))
    with torch.no_grad():
        known = backbone.embed(["", "An image of a bottle", "An image of a screw"])
    which = torch.stack([(given - text).abs().amax((1, 2)) < 1e-5 for text in known]).int().argmax(0)
    assert (which[which > 0] == chosen[which > 0] + 1).all()
    assert (which == 0).float().mean() == pytest.approx(guides.EMPTY, abs=0.07)


def test_captions_of_a_file_are_put_to_their_images(tmp_path):
    path = tmp_path / "said.jsonl"
    path.write_text("".join(json.dumps({"id": k, "caption": f"a {k}"}) + "\n" for k in "abc"))
    assert guides.captions_of_file(path, ["c", "a"]) == ["a c", "a a"]
    with pytest.raises(TrainingError, match="1 of 2 images: d"):
        guides.captions_of_file(path, ["a", "d"])


def test_a_base_that_predicts_no_noise_is_refused():
    with pytest.raises(TrainingError, match="v_prediction"):
        guides.denoiser_loss(Path("."), tiny_backbone("v_prediction"), None, None, torch.ones(9))


# --- what all recipes share


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("stable-diffusion", {}, "lite-foundation"),
        ("lite-foundation", {"data": "pictures"}, "no option data"),
        ("lite-foundation", {"per_category": "many"}, "per_category 'many'"),
        ("lite-group-a", {"autoencoder": "nowhere"}, "nowhere"),
        ("lite-features", {"pipeline": "nowhere"}, "nowhere"),
        ("lite-ddpm-cifar10", {}, "--data FOLDER"),
        ("dzad", {}, "--train-on: synthad"),
        ("dzad", {"train_on": "synthad-A", "mode": "half"}, "mode 'half'"),
        ("lite-dzad-a", {"initialisation": "zero"}, "initialisation 'zero'"),
        ("lite-dzad-a", {"schedule": "longer"}, "schedule 'longer'"),
        ("lite-dzad-a", {"timesteps": 1}, "2 timesteps"),
        ("vlmdiff", {"train_on": "synthad-A"}, "captioner=NAME"),
        ("lite-vlmdiff", {"captions": "said.jsonl"}, "drawings"),
        ("lite-vlmdiff", {"unet_steps": 0}, "unet_steps"),
        ("lite-foundation", {"vae_steps": 0}, "vae_steps"),
        ("lite-foundation", {"steps": 0}, "steps 0"),
        ("lite-foundation", {"steps": 2.5}, "steps 2.5"),
        ("lite-foundation", {"seed": -1}, "seed .*-1"),
        ("lite-foundation", {"per_category": 0}, "per_category 0"),
        ("lite-foundation", {"learning_rate": -1.0}, "learning_rate -1.0"),
        ("lite-foundation", {"learning_rate": float("nan")}, "learning_rate nan"),
        ("lite-foundation", {"widths": (0, 1, 2)}, "widths"),
        ("lite-foundation", {"keep": (0,)}, "keep"),
        ("lite-dzad-a", {"pictures": -8}, "pictures -8"),
    ],
)
def test_options_that_cannot_work_are_refused_before_anything_is_drawn(in_tmp, name, options, message):
    with pytest.raises(ZsadError, match=message):
        recipes.train(name, device="cpu", **options)
    assert not list(Path(".").rglob("*.npz"))


@dataclass(frozen=True)
class Toy(recipe.Recipe):
    """It writes its own number of steps, as a checkpoint."""

    data: str | None = None

    def train(self, out, work, seed, device):
        (out / "weights").write_text(str(self.steps))
        write_card(out, work, "toys", "A toy.", "It is one.", {})


def toy(**options):
    return recipe.train({"toy": Toy(3)}, "toy", device="cpu", **options)


def content(folder):
    return {file: file.read_bytes() for file in Path(folder).rglob("*") if file.is_file()}


def test_every_option_is_part_of_a_variants_name(in_tmp):
    assert [toy().name, toy(steps=3, seed=0).name] == ["toy", "toy"]
    assert toy(steps=2, seed=1).name == "toy--seed=1--steps=2"
    others = [toy(data=name).name for name in ("a/b", "a_b", "b", "x" * 300, "x" * 301)]
    assert len(set(others)) == 5 and all(name.startswith("toy--data=") and len(name) < 120 for name in others)


@pytest.mark.parametrize("place", ["folder", "folder with a card", "file"])
def test_what_is_no_checkpoint_is_never_replaced(in_tmp, place):
    mine = Path("mine" if place == "file" else "mine/README.md")
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("# toy\n" if place == "folder with a card" else "my notes")
    before = mine.read_bytes()
    for overwrite in (False, True):
        with pytest.raises(TrainingError, match="mine is there"):
            toy(out="mine", overwrite=overwrite)
    assert mine.read_bytes() == before


def test_a_checkpoint_gives_way_to_its_own_recipe_alone(in_tmp):
    Path("out").mkdir()  # an empty one is as good as none
    toy(out="out")
    for file in Path("out").glob("weights"):
        file.write_text("old")
    toy(out="out")
    assert Path("out/weights").read_text() == "3"
    before = content("out")
    with pytest.raises(TrainingError, match="out is the checkpoint toy, not toy--steps=2"):
        toy(out="out", steps=2)
    assert content("out") == before
    toy(out="out", steps=2, overwrite=True)
    assert Path("out/weights").read_text() == "2"


def test_a_checkpoint_that_ships_is_replaced_only_when_asked(in_tmp, monkeypatch):
    monkeypatch.setattr(manifest, "load_manifest", lambda: {"checkpoints": {"toy": {"path": "checkpoints/toy"}}})
    monkeypatch.setattr(manifest, "manifest_path", lambda: in_tmp / "manifest.yaml")
    before = content(toy())
    with pytest.raises(TrainingError, match="checkpoints/toy ships"):
        toy()
    assert content("checkpoints/toy") == before and toy(overwrite=True) == Path("checkpoints/toy")


def test_a_failure_at_any_moment_leaves_the_old_checkpoint(in_tmp, monkeypatch):
    before, replace = content(toy()), os.replace
    for names in (["toy"], [".writing-toy"]):

        def failing(source, target, names=names):
            if Path(source).name in names:
                names.clear()  # once: the old one can be put back
                raise OSError(28, "No space left on device")
            replace(source, target)

        monkeypatch.setattr(os, "replace", failing)
        with pytest.raises(OSError):
            toy()
        assert content("checkpoints/toy") == before and not names
    monkeypatch.setattr(Toy, "train", lambda self, out, work, seed, device: (out / "half").write_text("") / 0)
    with pytest.raises(ZeroDivisionError):
        toy()
    assert content("checkpoints/toy") == before
    assert {path.name for path in Path("checkpoints").iterdir()} <= {"toy", ".toy.lock"}


def test_a_kill_between_the_renames_is_mended(in_tmp):
    before = content(toy())
    Path("checkpoints/toy").rename("checkpoints/.old-toy")
    with pytest.raises(KeyboardInterrupt), store.writing_folder("checkpoints/toy"):
        raise KeyboardInterrupt
    assert content("checkpoints/toy") == before and not Path("checkpoints/.old-toy").exists()


def test_two_processes_never_train_in_one_folder(in_tmp):
    with store.locked("training/.toy.lock", "it"), pytest.raises(RunError, match="training/toy"):
        toy()
    with store.locked("checkpoints/.toy.lock", "it"), pytest.raises(RunError, match="checkpoints/toy"):
        toy()


def test_other_images_in_a_folder_give_other_weights(in_tmp):
    """The states of the first training are not gone on from."""

    def trained(data):
        out = recipes.train("lite-ddpm-cifar10", "small", steps=1, device="cpu", data=data, overwrite=True)
        return next(out.rglob("*.safetensors")).read_bytes()

    for name, grey in (("data", 0), ("other", 255)):
        save_image(in_tmp / name / "ship" / "0.png", np.full((32, 32, 3), grey, np.uint8))
    dark, light = trained("data"), trained("other")
    shutil.rmtree("data")
    Path("other").rename("data")
    assert trained("data") == light != dark
    (aside,) = Path("training").glob("lite-ddpm-cifar10--data=data*/before-*")
    assert (aside / "unet.pt").exists(), "hours of another training were deleted"


def test_equal_weights_are_stored_once(in_tmp):
    for name in ("base", "new"):
        Path(name, "vae").mkdir(parents=True)
        Path(name, "vae", "weights.safetensors").write_bytes(b"same")
        Path(name, "unet.safetensors").write_bytes(name.encode())
    link = Path("new/vae/weights.safetensors")
    for _ in range(2):  # a link stays a link
        recipe.share_files(Path("new"), Path("base"))
        assert link.is_symlink() and link.read_bytes() == b"same" and not Path("new/unet.safetensors").is_symlink()
    shutil.rmtree("base")
    assert not link.exists()  # it was a link to the base and nothing else
