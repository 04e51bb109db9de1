"""The no-model baselines, the noise of an image, and the registry of methods."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from zsad_lib.diffusion.noise import image_noise
from zsad_lib.methods import make_method
from zsad_lib.methods.baselines import contrast_map, median_map, patch_knn_map

BASELINES = ("local_contrast", "median", "patch_knn")


def striped_texture(size=64, period=8):
    """A periodic texture in two colours, [1,3,size,size]."""
    wave = (torch.arange(size) % period < period // 2).float()
    pattern = 0.3 + 0.4 * (wave[:, None] * wave[None])
    return torch.stack([pattern, 0.8 * pattern, 1 - pattern])[None]


@pytest.mark.parametrize("name", BASELINES)
def test_constant_image_is_normal(name):
    images = torch.tensor([0.2, 0.5, 0.9]).view(1, 3, 1, 1).expand(1, 3, 64, 64)
    scores = make_method(name).score(images, ["a"], ["x"])
    assert scores.map.abs().max() < 1e-5 and scores.image.abs().max() < 1e-5


@pytest.mark.parametrize(("top", "left"), [(28, 36), (0, 0), (57, 30)])
def test_patch_knn_finds_the_odd_patch(top, left):
    """A patch of a periodic texture turned by half a period: inside, in the corner, at the lower border."""
    images = striped_texture()
    odd = images.clone()
    odd[..., top : top + 7, left : left + 7] = images[..., top : top + 7, left : left + 7].flip(1).roll(3, -1)
    method = make_method("patch_knn")
    scores = method.score(torch.cat([images, odd]), ["a", "b"], ["x", "x"])
    row, column = divmod(scores.map[1].argmax().item(), 64)
    assert top - 2 <= row < top + 9 and left - 2 <= column < left + 9
    assert scores.image[1] > 3 * scores.image[0]


@pytest.mark.parametrize("name", ("local_contrast", "median"))
def test_a_bright_spot_is_found(name):
    images = torch.full((1, 3, 64, 64), 0.4)
    images[..., 40:44, 10:14] = 0.9
    scores = make_method(name).score(images, ["a"], ["x"])
    row, column = divmod(scores.map[0].argmax().item(), 64)
    assert 39 <= row < 45 and 9 <= column < 15


def test_patch_knn_by_hand():
    """Brute force with numpy on a small image: third nearest of the 3x3 patches that share no pixel."""
    image = torch.rand(1, 3, 9, 12)
    padded = np.pad(image[0].double().numpy(), ((0, 0), (1, 1), (1, 1)), mode="reflect")
    patches = {(y, x): padded[:, y : y + 3, x : x + 3] for y in range(9) for x in range(12)}
    expected = np.zeros((9, 12))
    for (y, x), patch in patches.items():
        others = [p for (v, u), p in patches.items() if abs(v - y) >= 3 or abs(u - x) >= 3]
        expected[y, x] = sorted(np.sqrt(((p - patch) ** 2).mean()) for p in others)[2]
    assert np.abs(patch_knn_map(image, patch=3, stride=1, k=3)[0].numpy() - expected).max() < 1e-6
    coarse = patch_knn_map(image, patch=3, stride=2, k=3)
    assert coarse.shape == (1, 9, 12) and torch.equal(coarse[..., -1], coarse[..., -2])


def test_patch_knn_in_parts():
    """More patches than are compared at a time: a point's distance is the same as in one go."""
    images = torch.rand(2, 3, 40, 40)
    whole = patch_knn_map(images, patch=5, stride=1, k=2)  # 1600 patches
    flipped = patch_knn_map(images.flip(0, 2, 3), patch=5, stride=1, k=2).flip(0, 1, 2)
    assert torch.allclose(whole, flipped, atol=1e-6)


def test_contrast_and_median_by_hand():
    images = torch.rand(2, 3, 20, 30)
    blurred = np.stack([[gaussian_filter(c.double().numpy(), 6) for c in image] for image in images])
    assert np.abs(contrast_map(images, 6).numpy() - np.abs(images.numpy() - blurred).mean(1)).max() < 1e-5
    odd = images[..., :29]
    flat = odd.flatten(2)[..., :-1]  # an odd number of pixels: the median is one of them
    odd = flat.reshape(2, 3, 1, -1)
    expected = np.abs(odd.numpy() - np.median(odd.numpy(), axis=(2, 3), keepdims=True)).mean(1)
    assert np.abs(median_map(odd).numpy() - expected).max() < 1e-6


@pytest.mark.parametrize("name", BASELINES)
def test_batches_sizes_and_repeats(name):
    """The same score alone and in a batch; images of another size are brought to the method's."""
    method, images = make_method(name), torch.rand(3, 3, 64, 64)
    whole = method.score(images, list("abc"), list("xyz"))
    again = method.score(images, list("def"), list("xxx"))
    assert torch.equal(whole.map, again.map) and whole.map.shape == (3, 64, 64) and whole.map.dtype == torch.float32
    for i in range(3):
        alone = method.score(images[i : i + 1], ["a"], ["x"])
        assert torch.allclose(alone.map[0], whole.map[i], atol=1e-5)
        assert abs(alone.image[0] - whole.image[i]) < 1e-5
    larger = method.score(torch.rand(1, 3, 100, 80), ["a"], ["x"])
    assert larger.map.shape == (1, 64, 64)
    larger.map.add_(1)


@pytest.mark.parametrize("name", BASELINES)
def test_repeating_textures_and_memory_layouts(name):
    """Exactly equal patches, alone or in a batch, and views of any strides: the same numbers.

    Random images do not show either fault: rounding grows where distances are near 0, and torch's median
    reads uninitialised memory along expanded dimensions.
    """
    method, random = make_method(name), torch.rand(1, 3, 64, 64)
    row, colour = torch.rand(1, 3, 1, 64), torch.rand(1, 3, 1, 1)
    images = torch.cat([striped_texture(), random, row.expand(-1, -1, 64, -1), colour.expand(-1, -1, 64, 64)])
    whole = method.score(images, list("abcd"), list("xxxx"))
    for i in range(4):
        alone = method.score(images[i : i + 1], ["a"], ["x"])
        assert (alone.map[0] - whole.map[i]).abs().max() < 1e-5
        assert abs(alone.image[0] - whole.image[i]) < 1e-5
    views = {
        "expanded colour": (colour.expand(1, 3, 64, 64), 3),
        "expanded row": (row.expand(1, 3, 64, 64), 2),
        "height, width, channels": (random.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), 1),
        "cut out": (torch.nn.functional.pad(random, [5] * 4)[..., 5:69, 5:69], 1),
    }
    for layout, (view, i) in views.items():
        assert not view.is_contiguous(), layout
        assert (method.score(view, ["a"], ["x"]).map[0] - whole.map[i]).abs().max() < 1e-5, layout


def test_image_noise():
    """Standard normal, of its id, purpose and seed alone: not of the batch, nor of the global generator."""
    noise = image_noise(["a", "b", "c"], "purpose", 0, (4, 32, 32))
    assert noise.shape == (3, 4, 32, 32) and noise.dtype == torch.float32
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    torch.manual_seed(123)
    assert torch.equal(image_noise(["c", "a"], "purpose", 0, (4, 32, 32)), noise[[2, 0]])
    for purpose, seed in (("other", 0), ("purpose", 1)):
        assert (image_noise(["a"], purpose, seed, (4, 32, 32))[0] - noise[0]).abs().max() > 1
    assert (noise[0] - noise[1]).abs().max() > 1
