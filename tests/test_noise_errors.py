"""zsad_lib.noise_errors: the matrix cell by cell, its cost, independence of the batch, longer schedules."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import tiny_backbone, tiny_guided, tiny_scheduler

from zsad_lib.anomaly import noise_errors, weighting
from zsad_lib.anomaly.noise_errors import multi_timestep_errors
from zsad_lib.diffusion.latent import EXTENSIONS, extend_schedule
from zsad_lib.diffusion.noise import image_noise
from zsad_lib.errors import MethodError, ModelError

IDS = ["tile/a", "tile/b", "gauge/a"]
SMALL = {"stages": 5, "per_stage": 2, "seeds": (0, 7)}


def measure(backbone, predict, latents, ids=IDS, **options):
    return multi_timestep_errors(predict, latents, ids, backbone.alphas_cumprod, **SMALL | options)


def chosen(predict, latents, rows, ids=IDS):
    """The same for some of the images, in another order."""
    rows = torch.tensor(rows)
    return lambda z, t, k: predict(z, t, rows[k]), latents[rows], [ids[k] for k in rows]


def guided_case():
    """(backbone, predict, latents) with guidance, of tiny networks."""
    backbone, guided = tiny_guided(3)
    with torch.no_grad():
        latents, cond = backbone.encode(guided.images), backbone.embed([""] * 3)
    return backbone, lambda z, t, rows: guided.predict_noise(z, t, cond[rows], rows=rows), latents


def plain_case(guidance_scale=1.0):
    _, _, latents = guided_case()
    backbone = tiny_backbone()
    with torch.no_grad():
        cond, uncond = backbone.embed(["a", "b", "c"]), backbone.embed([""] * 3)
    predict = lambda z, t, rows: backbone.predict_noise(z, t, cond[rows], uncond[rows], guidance_scale)  # noqa: E731
    return backbone, predict, latents


CASES = {"plain": plain_case, "guided": guided_case}


@pytest.mark.parametrize("case", CASES)
def test_every_cell(case):
    """F and maps from one network call a cell, written out: noise, prediction, square, mean."""
    backbone, predict, latents = CASES[case]()
    found = measure(backbone, predict, latents)
    assert found.timesteps.tolist() == [[1, 101], [201, 301], [401, 501], [601, 701], [801, 901]]
    assert found.errors.shape == (3, 5, 2, 2) and found.maps.shape == (3, 5, 2, 8, 8)
    for row, image in enumerate(IDS):
        for n, m in np.ndindex(5, 2):
            t = int(found.timesteps[n, m])
            alpha, squares = backbone.alphas_cumprod[t], []
            for seed in (0, 7):
                noise = image_noise([image], f"dzad-noise|{t}", seed, (4, 8, 8))
                z = alpha.sqrt() * latents[row] + (1 - alpha).sqrt() * noise
                with torch.no_grad():
                    eps = predict(z, t, torch.tensor([row]))
                squares.append((noise - eps).square().mean(1)[0].numpy())
            assert np.allclose(found.maps[row, n, m], np.mean(squares, axis=0), atol=1e-5)
            assert np.allclose(found.errors[row, n, m], np.mean(squares, axis=(1, 2)), atol=1e-5)
    assert np.allclose(found.matrix, found.maps.mean((3, 4)), atol=1e-6)
    scores = weighting.apply(found.matrix, weighting.weights("one", found.timesteps, found.alphas_cumprod))
    assert np.allclose(scores, found.errors.mean((1, 2, 3)), rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_batches_change_nothing(case):
    """Any batch size, images alone or among others, in any order: the same numbers to 1e-5."""
    backbone, *inputs = CASES[case]()
    whole = measure(backbone, *inputs, batch_size=1000)
    others = [(measure(backbone, *inputs, batch_size=size), [0, 1, 2]) for size in (1, 7, 20)]
    for other, order in [*others, (measure(backbone, *chosen(*inputs, [2, 0])), [2, 0])]:
        assert np.abs(other.errors - whole.errors[order]).max() < 1e-5
        assert np.abs(other.maps - whole.maps[order]).max() < 1e-5


@pytest.mark.parametrize(("case", "scale"), [(plain_case, 1), (guided_case, 1), (plain_case, 3.5)])
def test_the_cost_is_what_is_stated(case, scale):
    """Twice with text guidance."""
    backbone, predict, latents = case() if scale == 1 else case(scale)
    before, seen = backbone.evaluations, []
    measure(backbone, predict, latents, batch_size=16, callback=lambda *n: seen.append(n))
    stated = noise_errors.evaluations(3, 5, 2, 2, guidance_scale=scale)
    assert backbone.evaluations - before == stated == (60 if scale == 1 else 120)
    assert seen == [(16, 60), (32, 60), (48, 60), (60, 60)]


def test_noise_is_drawn_anew_for_image_timestep_and_seed():
    """With a prediction of zero the errors are the noise's own squares: they all differ, and average to one."""
    zero = (tiny_scheduler(), lambda z, t, rows: torch.zeros_like(z), torch.zeros(3, 4, 8, 8))
    found = measure(*zero)
    assert len(np.unique(found.errors)) == found.errors.size
    assert found.errors.mean() == pytest.approx(1, abs=0.02)
    more = measure(*zero, seeds=(7, 0, 1))
    assert np.array_equal(more.errors[..., 1::-1], found.errors)


@torch.no_grad()
def test_a_tensor_of_timesteps_is_a_timestep_each():
    """Plain, with classifier-free guidance, and for v-prediction, which needs each latent's own level."""
    z, t = torch.randn(3, 4, 8, 8), torch.tensor([1, 500, 999])
    for kind in ("epsilon", "v_prediction"):
        backbone = tiny_backbone(kind)
        cond, uncond = backbone.embed(["a", "b", "c"]), backbone.embed([""] * 3)
        for options in ((cond,), (cond, uncond, 3.5)):
            together = backbone.predict_noise(z, t, *options)
            for k in range(3):
                alone = [o[k : k + 1] if torch.is_tensor(o) else o for o in options]
                one = backbone.predict_noise(z[k : k + 1], int(t[k]), *alone)
                assert torch.allclose(one, together[k : k + 1], atol=1e-5)
            assert not torch.allclose(together, backbone.predict_noise(z, 500, *options), atol=1e-3)


def test_join():
    backbone, *inputs = plain_case()
    whole = measure(backbone, *inputs)

    def part(rows, **options):
        return measure(backbone, *chosen(*inputs, rows), **options)

    joined = noise_errors.join([part([0]), part([1, 2])])
    assert joined.ids.tolist() == IDS
    assert np.allclose(joined.errors, whole.errors, atol=1e-5) and np.allclose(joined.maps, whole.maps, atol=1e-5)
    assert noise_errors.join([part([0]), part([1], keep_maps=False)]).maps is None
    for other, why in ((part([1], first=2), "different timesteps"), (part([0, 1]), "share images")):
        with pytest.raises(MethodError, match=why):
            noise_errors.join([part([0]), other])


# --- timesteps and schedules


def test_timestep_grid():
    assert noise_errors.timestep_grid().ravel().tolist() == list(range(1, 1000, 10))
    grid = noise_errors.timestep_grid(1400, stages=4, per_stage=3, first=5)
    assert grid.tolist() == [[5 + 116 * (3 * n + m) for m in range(3)] for n in range(4)]


def test_more_timesteps_rebuilt():
    """The formula in T steps: Stable Diffusion's β, by numpy; the ends stay, the levels between move."""
    scheduler = tiny_scheduler()
    assert torch.equal(extend_schedule(scheduler, 1000).alphas_cumprod, scheduler.alphas_cumprod)
    for T in (1400, 500):
        longer = extend_schedule(scheduler, T)
        expected = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, T) ** 2)
        assert np.allclose(longer.alphas_cumprod.numpy(), expected, rtol=1e-4)
        assert longer.config.steps_offset == 1 and longer.config.prediction_type == "epsilon"
    assert scheduler.config.num_train_timesteps == 1000


def test_more_timesteps_continued():
    """The first thousand levels stay; after them √β goes on in a straight line. Fewer: the beginning."""
    scheduler = tiny_scheduler()
    longer = extend_schedule(scheduler, 1400, "continued")
    assert torch.allclose(longer.alphas_cumprod[:1000], scheduler.alphas_cumprod, rtol=1e-5)
    assert longer.betas.sqrt().diff().sub(longer.betas.sqrt().diff()[0]).abs().max() < 1e-5
    assert len(longer.alphas_cumprod) == 1400 and longer.alphas_cumprod[-1] < 0.1 * scheduler.alphas_cumprod[-1]
    shorter = extend_schedule(scheduler, 300, "continued")
    assert torch.allclose(shorter.alphas_cumprod, scheduler.alphas_cumprod[:300], rtol=1e-5)


@pytest.mark.parametrize("reading", EXTENSIONS)
def test_measuring_with_more_timesteps(reading):
    """T = 1400 as DZAD prints: the backbone, v-prediction included, takes it from its scheduler."""
    original, (*_, latents) = tiny_backbone("v_prediction"), plain_case()
    backbone = replace(original, scheduler=extend_schedule(original.scheduler, 1400, reading))
    with torch.no_grad():
        cond = backbone.embed(["", "", ""])
    found = measure(backbone, lambda z, t, rows: backbone.predict_noise(z, t, cond[rows]), latents)
    assert found.timesteps.max() == 1261 and len(found.alphas_cumprod) == 1400
    assert np.isfinite(found.errors).all()
    t = 1261
    noise = image_noise(IDS[:1], f"dzad-noise|{t}", 0, (4, 8, 8))
    alpha = backbone.alphas_cumprod[t]
    z = alpha.sqrt() * latents[:1] + (1 - alpha).sqrt() * noise
    with torch.no_grad():
        eps = alpha.sqrt() * backbone.unet(z, t, cond[:1]).sample + (1 - alpha).sqrt() * z
    assert found.errors[0, 4, 1, 0] == pytest.approx((eps - noise).square().mean().item(), abs=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: noise_errors.timestep_grid(10, 4, 3), "4 stages of 3 timesteps: n_steps must be 1 to 10"),
        (lambda: extend_schedule(tiny_scheduler(), 1400, "padded"), "'padded' is unknown; .*'continued'"),
        (lambda: extend_schedule(tiny_scheduler(), 1), "at least 2 timesteps, not 1"),
        (lambda: extend_schedule(tiny_scheduler(trained_betas=[0.1] * 5), 9), "only 'continued'"),
        (lambda: multi_timestep_errors(None, torch.zeros(2, 4, 8, 8), ["a"], [0.5] * 9), "2 latents need as many ids"),
        (lambda: multi_timestep_errors(None, torch.zeros(2, 4, 8, 8), ["a", "a"], [0.5] * 9), "all different"),
        (lambda: multi_timestep_errors(None, torch.zeros(1, 4, 8, 8), ["a"], [0.5] * 9, seeds=()), "at least one seed"),
    ],
)
def test_errors(call, message):
    with pytest.raises((MethodError, ModelError), match=message):
        call()
