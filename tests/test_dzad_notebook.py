"""What notebook 04 is made of beside the method itself: gradients of a new guide, parts of a matrix."""

import numpy as np
import pytest
import torch
from tiny import made_up, small

from zsad_lib.anomaly import maps
from zsad_lib.diffusion import guidance
from zsad_lib.evaluation import metrics
from zsad_lib.methods.dzad import Reading


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
