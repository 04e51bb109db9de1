"""What notebook 04 is made of beside the method itself: gradients of a new guide, parts of a matrix, its pictures."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from test_dzad import guided_model, made_up
from test_guidance import small

from zsad_lib.anomaly import maps
from zsad_lib.diffusion import guidance
from zsad_lib.evaluation import metrics
from zsad_lib.methods.dzad import Reading
from zsad_lib.notebook import plots


@pytest.mark.parametrize(
    ("initialisation", "mode", "silent"),
    [
        ("published", "only mid", [{"fusion", "feeding"}, {"fusion", "feeding"}]),
        ("trainable", "only mid", [{"fusion"}, set()]),
        ("published", "all", [{"fusion"}, set()]),
    ],
)
def test_what_of_a_new_guide_has_a_gradient(initialisation, mode, silent):
    """The fusion reads zeros at first, so that it waits one step; as published in "only mid" mode it waits for ever."""
    unet, guide, (z, t, text, images) = small(filled=False, initialisation=initialisation)
    norms = guidance.gradient_norms(unet, guide, z, t, text, images, torch.randn_like(z), mode)
    assert [{part for part, norm in step.items() if norm == 0} for step in norms] == silent


def test_first_stages_are_those_with_the_least_noise():
    measured = made_up()
    part = measured.first_stages(2)
    assert part.errors.timesteps.max() < measured.errors.timesteps[2:].min()
    assert part.errors.matrix.shape == (6, 2, 2) and part.errors.maps.shape[1] == 2
    assert (part.errors.matrix == measured.errors.matrix[:, :2]).all()
    scores, anomaly = Reading(map="features").read(part, made_up(seed=2).first_stages(2))
    assert scores.shape == (6,) and anomaly.shape == (6, 8, 8)


def test_given_weights_take_the_place_of_the_named_ones():
    measured, reference = made_up(seed=1), made_up(seed=2)
    snr = Reading("snr")
    given = Reading("one").read(measured, reference, snr.weights(measured))
    assert all((a == b).all() for a, b in zip(given, snr.read(measured, reference), strict=True))
    one_cell = np.zeros((5, 2))
    one_cell[3, 1] = 10
    scores, _ = Reading(decision="weighted sum", map="noise errors").read(measured, weights=one_cell)
    assert scores == pytest.approx(measured.errors.matrix[:, 3, 1])


def test_auroc_by_category_is_that_of_each_alone():
    names, labels = ["b", "b", "a", "a", "a"], [0, 1, 0, 1, 1]
    scores = np.array([0.1, 0.9, 0.5, 0.2, 0.7])
    assert metrics.auroc_by_category(names, labels, scores) == {"b": 1.0, "a": 0.5}
    masks = np.array(labels)[:, None, None] * np.array([[1, 0]])
    found = metrics.auroc_by_category(names, masks, scores[:, None, None] * np.ones((5, 1, 2)))
    assert list(found) == ["b", "a"] and found["b"] == pytest.approx(5 / 6)


def test_texture_is_zero_without_edges_and_grows_with_contrast():
    ramp = torch.linspace(0, 1, 5).view(1, 1, 1, 5).expand(1, 3, 5, 5)
    assert maps.texture(torch.ones(2, 3, 5, 5)).tolist() == [0, 0]
    assert maps.texture(ramp).item() == pytest.approx(0.25**2)
    assert maps.texture(ramp.mT) == maps.texture(ramp) == 4 * maps.texture(ramp / 2)


# --- pictures


def test_the_network_is_drawn_with_the_models_own_numbers():
    model, _ = guided_model()
    figure = plots.guided_network(model)
    shown = " ".join(text.get_text() for text in figure.axes[0].texts)
    for width in model.backbone.unet.config.block_out_channels:
        assert f"encoder\n{width}" in shown and f"decoder\n{width}" in shown
    assert f"[3,{model.backbone.image_size},{model.backbone.image_size}]" in shown
    plt.close(figure)


def test_matrices_share_their_scale():
    figure = plots.matrices({"a": np.ones((4, 2)), "b": np.full((4, 2), 3.0)})
    assert {axis.collections[0].get_clim() for axis in figure.axes} == {(0, 3)}
    assert [axis.get_title() for axis in figure.axes] == ["a", "b"]
    plt.close(figure)


def test_lines_bars_and_points_show_what_they_are_given():
    figure = plots.curves([1, 2, 3], {"one": [1, 1, 1], "two": [1, 2, 4]}, "x", "y", log=True)
    assert [line.get_ydata().tolist() for line in figure.axes[0].lines] == [[1, 1, 1], [1, 2, 4]]
    plt.close(figure)
    figure = plots.bars(pd.DataFrame({"u": [10, 20], "v": [30, 40]}, index=["a", "b"]), "percent", chance=50)
    assert sorted(bar.get_height() for bar in figure.axes[0].patches) == [10, 20, 30, 40]
    plt.close(figure)
    x, hollow = np.array([1.0, 2.0, 3.0]), np.array([True, False, False])
    figure = plots.scatter({"a": (x, x**2, hollow)}, ("full", "hollow"), ("x", "y"))
    full, empty, *_ = figure.axes[0].collections
    assert full.get_offsets().tolist() == [[2, 4], [3, 9]] and empty.get_offsets().tolist() == [[1, 1]]
    plt.close(figure)


def test_a_perfect_score_reaches_the_corner_of_its_curve():
    figure = plots.roc_and_pictures([0, 0, 1], [0.1, 0.2, 0.9], "AUROC 100", [torch.rand(3, 8, 8)], ["image"])
    curve, picture = figure.axes
    assert [0, 1] in curve.lines[0].get_xydata().tolist() and picture.get_title() == "image"
    plt.close(figure)
    assert not plt.get_fignums()
