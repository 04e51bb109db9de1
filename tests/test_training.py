"""Training: resumed equals uninterrupted, the images are normal and none of the benchmark's."""

import numpy as np
import pytest
import torch

from zsad_lib.errors import RunError, TrainingError
from zsad_lib.training import fit
from zsad_lite import synthad
from zsad_lite.synthad import pictures
from zsad_lite.training import pools


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
    return fit.fit("line", model, loss, folder, steps, 1e-1, seed, 0.5, every), len(calls)


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
    with pytest.raises(TrainingError, match="4 steps with seed 0"):
        _fit(tmp_path, steps=5)


def test_a_damaged_state_says_what_to_delete(tmp_path):
    _fit(tmp_path, steps=4)
    state = tmp_path / "line.pt"
    for content in (state.read_bytes()[:100], state.read_bytes()[:-100], b"", b"words"):
        state.write_bytes(content)
        with pytest.raises(TrainingError, match=r"line\.pt is damaged"):
            _fit(tmp_path, steps=4)


def test_states_of_other_inputs_are_not_gone_on_from(tmp_path, capsys):
    inputs = [np.arange(4), ["a caption"], {"weights": "x"}]
    fit.begin(tmp_path, *inputs)
    _fit(tmp_path, steps=4)
    fit.begin(tmp_path, *inputs)
    assert _fit(tmp_path, steps=4)[1] == 0 and not capsys.readouterr().out
    for k, other in enumerate((np.arange(1, 5), ["another"], {"weights": "y"})):
        fit.begin(tmp_path, *inputs[:k], other, *inputs[k + 1 :])
        assert f"{tmp_path} " in capsys.readouterr().out
        assert _fit(tmp_path, steps=4)[1] == 4


def test_training_images_are_none_of_the_benchmarks():
    drawn = {synthad.draw("gauge", f"train/0/{k}").image.tobytes() for k in range(8)}
    good = [seed for _, defect, _, seed in synthad.layout("gauge") if defect == "good"]
    test = {synthad.draw("gauge", seed).image.tobytes() for seed in good}
    assert len(drawn) == 8 and not drawn & test


def test_photograph_crops_are_pictures_and_repeatable():
    crops, captions = pools.photograph_crops("brick", 0, 3, 64)
    again, _ = pools.photograph_crops("brick", 0, 3, 64)
    assert crops.shape == (3, 64, 64, 3) and crops.std() > 5
    np.testing.assert_array_equal(crops, again)
    assert captions == ["A photograph of brick"] * 3


@pytest.mark.parametrize("parallel", [0, 10**6])  # drawn in other processes, or in this one
def test_a_pool_holds_drawings_photographs_pictures_and_surfaces(tmp_path, monkeypatch, parallel):
    monkeypatch.setattr(pools, "PARALLEL", parallel)
    options = {"per_category": 2, "seed": 3, "photos": 1, "pictures": 17, "surfaces": 8}
    images, captions = pools.draw_pool(tmp_path, ["gauge"], **options)
    photos = len(pools.PHOTOGRAPHS)
    assert len(images) == len(captions) == 2 + photos + 16 + 8
    assert captions[0].startswith("An image of a gauge, ") and captions[1 + photos].startswith("A photograph of ")
    assert captions[2 + photos :] == [""] * 24  # pictures of no product and surfaces have none
    assert len({image.tobytes() for image in images}) == len(images)
    np.testing.assert_array_equal(images[0], synthad.draw("gauge", "train/3/0").image)
    np.testing.assert_array_equal(images[-9], pictures.draw("train/3/7/1"))
    np.testing.assert_array_equal(images[-1], pictures.draw_surface("train/3/7/0", 64))
    monkeypatch.setattr(pools, "_draw", None)
    kept, _ = pools.draw_pool(tmp_path, ["gauge"], **options)
    np.testing.assert_array_equal(images, kept)
    with pytest.raises(RunError, match="pool.npz"):  # of other images
        pools.draw_pool(tmp_path, ["gauge"], **options | {"seed": 4})


def test_the_average_is_kept_at_chosen_steps(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    last = fit.fit("line", model, lambda m, g: m(torch.ones(1, 3)).square().mean(), tmp_path, 4, 0.1, keep=(2, 4))
    early, late = (torch.load(tmp_path / f"line-{step}.pt", weights_only=True) for step in (2, 4))
    assert torch.equal(late["weight"], last.weight) and not torch.equal(early["weight"], late["weight"])
