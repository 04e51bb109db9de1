"""Training: resumed equals uninterrupted, recipes write directories the ordinary loaders read."""

import numpy as np
import pytest
import torch

from zsad_lib import synthad, training
from zsad_lib.backbones import load_backbone, load_features


def _fit(folder, steps=12, seed=0, stop_after=None, every=4):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    calls = []

    def loss(m, generator):
        calls.append(1)
        if stop_after and len(calls) > stop_after:
            raise KeyboardInterrupt
        x = torch.randn(8, 3, generator=generator)
        return (m(x) - x.sum(1, keepdim=True) + 0.1 * torch.randn(8, 1)).square().mean()

    folder.mkdir(exist_ok=True)
    return training.fit("line", model, loss, folder, steps, 1e-1, seed, 0.5, every), len(calls)


def test_a_run_stopped_and_resumed_ends_with_the_same_weights(tmp_path):
    whole, _ = _fit(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        _fit(tmp_path / "stopped", stop_after=9)
    resumed, calls = _fit(tmp_path / "stopped")
    assert calls == 12 - 8  # the last checkpoint was at step 8
    torch.testing.assert_close(resumed.weight, whole.weight, rtol=0, atol=0)


def test_training_lowers_the_loss_and_depends_on_the_seed(tmp_path):
    one, _ = _fit(tmp_path / "one", steps=60, every=60)
    two, _ = _fit(tmp_path / "two", steps=60, seed=1, every=60)
    assert (one.weight - 1).abs().max() < 0.2
    assert not torch.equal(one.weight, two.weight)


def test_a_work_folder_of_another_plan_is_refused(tmp_path):
    _fit(tmp_path, steps=4)
    with pytest.raises(training.TrainingError, match="4 steps with seed 0"):
        _fit(tmp_path, steps=5)


def test_unknown_recipe():
    with pytest.raises(training.TrainingError, match="lite-foundation"):
        training.train("stable-diffusion")


def test_mixed_prompts_hold_all_three_kinds():
    captions = ["An image of a gauge, rim black"] * 200
    mixed = training.mix_prompts(captions, torch.Generator().manual_seed(0))
    share = {text: mixed.count(text) / 200 for text in ("", "An image of a gauge", captions[0])}
    assert sum(share.values()) == pytest.approx(1)
    assert share[""] == pytest.approx(0.1, abs=0.06) and share["An image of a gauge"] == pytest.approx(0.4, abs=0.1)


def test_every_word_of_the_captions_is_one_token(tmp_path):
    captions = [synthad.draw(name, f"t/{k}").caption for name in synthad.CATEGORIES for k in range(4)]
    tokenizer = training.build_tokenizer(captions, tmp_path / "tokenizer")
    for text in captions:
        tokens = tokenizer.tokenize(text)
        assert tokens == [w + "</w>" for w in text.lower().replace(",", " ,").split()]
        assert len(tokens) + 2 <= training.MAX_TOKENS
    assert tokenizer("zebra").input_ids != tokenizer("quokka").input_ids  # unknown words still differ, by bytes


def test_training_images_are_none_of_the_benchmarks():
    drawn = {synthad.draw("gauge", f"train/0/{k}").image.tobytes() for k in range(8)}
    test = {
        synthad.draw("gauge", seed).image.tobytes()
        for _, defect, _, seed in synthad.benchmark("gauge")
        if defect == "good"
    }
    assert len(drawn) == 8 and not drawn & test


def test_photograph_crops_are_pictures_and_repeatable():
    crops, captions = training._photograph_crops("brick", 0, 3, 64)
    again, _ = training._photograph_crops("brick", 0, 3, 64)
    assert crops.shape == (3, 64, 64, 3) and crops.std() > 5
    np.testing.assert_array_equal(crops, again)
    assert captions == ["A photograph of brick"] * 3


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_foundation_recipe_writes_a_pipeline_that_loads(in_tmp):
    options = {"categories": ("gauge",), "per_category": 2, "vae_steps": 1}
    out = training.train("lite-foundation", "small", steps=2, device="cpu", **options)
    backbone = load_backbone(out, device="cpu")
    assert backbone.latent_shape == (training.LATENT_CHANNELS, 16, 16) and backbone.image_size == 64
    image = torch.rand(1, 3, 64, 64)
    assert backbone.decode(backbone.encode(image)).shape == image.shape
    text = backbone.embed(["An image of a gauge"])
    assert torch.isfinite(backbone.predict_noise(torch.randn(1, *backbone.latent_shape), 500, text)).all()
    assert sum(f.stat().st_size for f in out.rglob("*.safetensors")) < 20e6


def test_the_features_recipe_writes_a_resnet_that_loads(in_tmp):
    options = {"categories": ("gauge",), "per_category": 2}
    training.train("lite-foundation", "pipeline", steps=1, device="cpu", vae_steps=1, **options)
    out = training.train("lite-features", "small", steps=2, device="cpu", pipeline="pipeline", **options)
    features = load_features(out, device="cpu")
    maps = features(torch.rand(2, 3, 64, 64))
    assert len(maps) >= 2 and all(m.shape[0] == 2 and torch.isfinite(m).all() for m in maps)
    drawn, redrawn = (np.load(f"training/lite-features-seed0/{name}.npy") for name in ("pool", "redrawn"))
    assert redrawn.shape == drawn.shape and redrawn.dtype == np.uint8 and not np.array_equal(drawn, redrawn)


def test_the_features_recipe_needs_an_autoencoder(in_tmp):
    with pytest.raises(training.TrainingError, match="lite-foundation first"):
        training.train("lite-features", steps=1, per_category=1, pipeline="nowhere")


def test_place_loss_is_low_only_where_places_agree():
    features = torch.randn(2, 32, 32, 32)
    same = training.place_loss(features, features, torch.Generator().manual_seed(0))
    shuffled = training.place_loss(features, features.roll(3, dims=3), torch.Generator().manual_seed(0))
    assert same < 0.5 < 3 < shuffled


def test_degraded_copies_differ_but_show_the_same():
    x = training.to_tensor(np.stack([synthad.draw("gauge", "0").image]))
    one, two = (training.degrade(x, torch.Generator().manual_seed(k)) for k in (1, 2))
    assert one.shape == (1, 3, 128, 128) and not torch.equal(one, two)
    plain = torch.nn.functional.interpolate(x, 128, mode="bilinear")
    assert all((view - plain).abs().mean() < 0.25 for view in (one, two))


def test_a_model_card_says_what_was_trained_and_measured(in_tmp):
    options = {"categories": ("gauge",), "per_category": 2, "vae_steps": 1}
    card = (training.train("lite-foundation", "small", steps=1, device="cpu", **options) / "README.md").read_text()
    for fact in ("dB PSNR", "stage unet", "1 steps, seed 0", "license: apache-2.0", "Limits", "of gauge"):
        assert fact in card, fact
