"""zsad_lib.maps: parity with the official map and image score, and with scipy."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from conftest import shared_path
from zsad_lib.anomaly import maps


@pytest.mark.parametrize("name", ("dino_one_level", "three_levels"))
def test_golden_anomaly_map(name):
    with np.load(shared_path(f"golden/amap/{name}.npz")) as file:
        golden = dict(file)
    levels = sum(key.startswith("input_") for key in golden)
    x, y = ([torch.from_numpy(golden[f"{side}_{i}"]) for i in range(levels)] for side in ("input", "output"))
    for mode, key in (("sum", "a"), ("product", "mul")):
        raw = maps.anomaly_map(x, y, 256, mode)
        assert raw.shape == (1, 256, 256) and raw.dtype == torch.float32
        assert np.abs(raw[0].numpy() - golden[f"map_{key}"]).max() < 1e-6
        assert np.abs(maps.smooth(raw, 5)[0].numpy() - golden[f"smoothed_{key}"]).max() < 1e-6
    foreground = maps.anomaly_map(x, y, 256) * torch.from_numpy(golden["fg_mask"])
    assert np.abs(maps.smooth(foreground, 5)[0].numpy() - golden["smoothed_a_fg"]).max() < 1e-6


CASES = ("smooth", "weak", "perfect", "perfect_binary", "inverted", "quantised", "diagonal", "outlier")


@pytest.mark.parametrize("case", CASES)
def test_golden_image_scores(case):
    with np.load(shared_path("golden/metrics/maps.npz")) as file:
        values, expected = torch.from_numpy(file[f"{case}_maps"]), file[f"{case}_image_scores"]
    assert np.abs(maps.image_score(values).numpy() - expected).max() < 1e-6


@pytest.mark.parametrize(("shape", "sigma"), [((40, 56), 1.5), ((64, 64), 5), ((7, 9), 4), ((1, 5), 2.5)])
def test_smooth_is_scipy(shape, sigma):
    """Borders included, and maps narrower than the filter."""
    batch = torch.rand(3, *shape)
    expected = np.stack([gaussian_filter(m.double().numpy(), sigma) for m in batch])
    assert np.abs(maps.smooth(batch, sigma).numpy() - expected).max() < 1e-6


def test_smooth_edge_cases():
    batch = torch.rand(2, 8, 8)
    assert torch.equal(maps.smooth(batch, 0), batch)
    assert torch.allclose(maps.smooth(torch.full((1, 9, 9), 0.7), 3), torch.tensor(0.7))
    for side, pool in ((57, 8), (56, 7)):
        assert maps.image_score(torch.rand(1, side, 64), pool=pool).shape == (1,), "just enough room"


ONE = [torch.ones(1, 3, 4, 4)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: maps.smooth(torch.rand(2, 8, 8), -1), "sigma must be 0 or more"),
        (lambda: maps.image_score(torch.rand(1, 56, 64)), "56 px is too small .* pool of 1 to 7"),
        (lambda: maps.anomaly_map(ONE, ONE, 8, mode="max"), "mode 'max' is unknown"),
        (lambda: maps.anomaly_map([], [], 8), "same layers"),
        (lambda: maps.anomaly_map(ONE + ONE, ONE, 8), "same layers"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_image_score_by_hand():
    """Four pools of 3x3 in a row, written out."""
    values = torch.rand(2, 12, 15)
    expected = values.numpy()
    for _ in range(4):
        windows = np.lib.stride_tricks.sliding_window_view(expected, (3, 3), axis=(1, 2))
        expected = windows.mean(axis=(3, 4))
    assert np.allclose(maps.image_score(values, pool=3, repeats=4), expected.max(axis=(1, 2)), atol=1e-6)


def test_anomaly_map_meaning():
    """Equal features give 0 at any length, opposite ones 2, orthogonal ones 1; layers add or multiply."""
    f = torch.randn(2, 8, 4, 4)
    g = f.clone()
    g[:, :, 1, 2] *= -3
    assert maps.cosine_distance(f, 5 * f).abs().max() < 1e-6
    distance = maps.anomaly_map([f], [g], (4, 4))
    assert distance.shape == (2, 4, 4) and torch.allclose(distance[:, 1, 2], torch.tensor(2.0))
    assert distance.sum().item() == pytest.approx(4, abs=1e-4)
    half = torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 3)
    half[0][:, 0], half[1][:, 1] = 1, 1
    assert torch.allclose(maps.cosine_distance(*half), torch.ones(1, 3, 3))
    layers = [f, f[:, :, :2, :2]], [-f, -f[:, :, :2, :2]]
    assert torch.allclose(maps.anomaly_map(*layers, 8), torch.tensor(4.0), atol=1e-5)
    mixed = [f, half[0].expand(2, -1, -1, -1)], [-f, half[1].expand(2, -1, -1, -1)]
    assert torch.allclose(maps.anomaly_map(*mixed, 8, mode="product"), torch.tensor(2.0), atol=1e-5)
    assert maps.anomaly_map([f], [g], (6, 9)).shape == (2, 6, 9)
