"""zsad_lib.weighting: Table 4's formulas, SNR' as a derivative, learned weights against the plain mean."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from zsad_lib.anomaly import weighting
from zsad_lib.errors import MethodError
from zsad_lite.training.pipeline import build_scheduler

ALPHAS = build_scheduler().alphas_cumprod
GRID = (1 + 10 * np.arange(100)).reshape(10, 10)


def test_table_4_by_name():
    """Every printed function against its formula, written out here for one timestep or stage at a time."""
    alphas = ALPHAS.double().numpy()
    for n, row in enumerate(GRID, start=1):
        for m, t in enumerate(row):
            snr = alphas[t] / (1 - alphas[t])
            expected = {
                "one": 1.0,
                "snr": snr,
                "exp-6": np.exp(-6 * t / 1000),
                "exp-7": np.exp(-7 * t / 1000),
                "late-1": 1 + np.exp(n - 10),
                "late-3": 1 + np.exp(-3 * (10 - n)),
                "late-5": 1 + np.exp(-5 * (10 - n)),
            }
            for name, value in expected.items():
                assert weighting.weights(name, GRID, ALPHAS)[n - 1, m] == pytest.approx(value, rel=1e-9), name
            assert weighting.weights("snr-derivative", GRID, ALPHAS)[n - 1, m] > 0
    assert set(weighting.FORMULAS) == {*weighting.WEIGHTINGS, "learned"} and weighting.DEFAULT == "late-3"
    assert weighting.late((10, 2), 3)[-1].tolist() == [2, 2]
    assert weighting.weights("exp-7", np.array([[700]]), np.linspace(1, 0, 1402)[1:-1])[0, 0] == np.exp(-3.5)


def test_snr_derivative_by_finite_differences():
    """Between, at and around timesteps, over seven orders of magnitude of SNR."""
    t = np.concatenate([np.linspace(0.5, 998.5, 4000), np.arange(1.0, 999)])
    h = 1e-3
    central = (weighting.snr(t + h, ALPHAS) - weighting.snr(t - h, ALPHAS)) / (2 * h)
    derivative = weighting.snr_derivative(t, ALPHAS)
    assert np.abs(central / derivative - 1).max() < 1e-5
    assert np.array_equal(weighting.weights("snr-derivative", GRID, ALPHAS), -weighting.snr_derivative(GRID, ALPHAS))


def test_snr_derivative_of_a_known_schedule():
    """ᾱ = 1/(1 + exp(a + bt)) has SNR = exp(−a − bt)."""
    t = np.arange(1000)
    alphas = 1 / (1 + np.exp(-6 + 0.012 * t))
    assert np.allclose(weighting.snr(t, alphas), np.exp(6 - 0.012 * t), rtol=1e-9)
    assert np.allclose(weighting.snr_derivative(t, alphas), -0.012 * np.exp(6 - 0.012 * t), rtol=1e-7)


def test_apply():
    """Weights of one give the plain mean; others F' = W·F; maps are weighted as the matrix is."""
    rng = np.random.default_rng(0)
    maps = rng.random((5, 10, 10, 4, 6), dtype=np.float32)
    matrix = maps.mean((3, 4))
    plain = weighting.apply(matrix, weighting.weights("one", GRID, ALPHAS))
    assert plain.dtype == np.float32 and np.allclose(plain, matrix.mean((1, 2)), rtol=1e-6)
    for name in weighting.WEIGHTINGS:
        w = weighting.weights(name, GRID, ALPHAS)
        scores, weighted = weighting.apply(matrix, w), weighting.apply(maps, w)
        by_hand = [sum(w[n, m] * matrix[i, n, m] for n in range(10) for m in range(10)) / 100 for i in range(5)]
        assert np.allclose(scores, by_hand, rtol=1e-5), name
        assert weighted.shape == (5, 4, 6) and np.allclose(weighted.mean((1, 2)), scores, rtol=1e-4), name
    assert np.array_equal(weighting.apply(torch.from_numpy(matrix), np.ones((10, 10))), plain)


def labelled(seed=0, count=60, per_stage=4):
    """Matrices whose stages 3 and 8 (of ten) tell the classes apart, the one upwards and the other downwards."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    matrix = 1 + 0.3 * rng.normal(size=(count, 1, 1)) + 0.1 * rng.normal(size=(count, 10, per_stage))
    matrix[:, 2] += 0.12 * labels[:, None]
    matrix[:, 7] -= 0.12 * labels[:, None]
    return matrix.astype(np.float32), labels


def likelihood(probability, labels):
    return np.log(np.where(labels == 1, probability, 1 - probability)).mean()


def test_learned_weights_beat_the_plain_mean():
    """On the data they were fitted on, in likelihood and in AUROC; and on a second draw of the same kind."""
    matrix, labels = labelled()
    learned = weighting.fit(matrix, labels)
    w = learned.weights((10, 4))
    assert learned.v.shape == (10,) and w.shape == (10, 4) and (w == w[:, :1]).all()
    assert learned.v.argmax() == 2 and learned.v.argmin() == 7
    for other, truth in (matrix, labels), labelled(seed=1):
        scores, plain = weighting.apply(other, w), other.mean((1, 2))
        assert roc_auc_score(truth, scores) > roc_auc_score(truth, plain) + 0.2
    flat = np.broadcast_to(matrix.mean((1, 2), keepdims=True), (60, 10, 1))  # all that w = 1 leaves of a matrix
    best_plain = weighting.fit(flat, labels)
    assert likelihood(learned.probability(matrix), labels) > likelihood(best_plain.probability(flat), labels) + 0.1


def test_learned_weights_are_the_maximum():
    """No small step in any bucket's weight, nor in the offset, makes the labels likelier."""
    matrix, labels = labelled(count=200)
    learned = weighting.fit(matrix, labels, ridge=1e-9)
    best = likelihood(learned.probability(matrix), labels)
    for k in range(11):
        for step in (-0.05, 0.05):
            v, offset = learned.v.copy(), learned.offset
            if k < 10:
                v[k] += step
            else:
                offset += step
            assert likelihood(weighting.Learned(v, offset).probability(matrix), labels) < best


def test_probability_and_scores_agree():
    matrix, labels = labelled()
    learned = weighting.fit(matrix, labels)
    evidence = weighting.apply(matrix.astype(np.float64), learned.weights((10, 4))) + learned.offset
    assert np.allclose(learned.probability(matrix), 1 / (1 + np.exp(-evidence)), atol=1e-9)
    assert np.allclose(learned.probability(1e6 * matrix) % 1, 0), "no overflow far out"


def test_buckets_split_the_timesteps_in_order():
    """Ten stages are the ten buckets; five stages of four give two buckets each."""
    matrix, labels = labelled()
    ten, five = weighting.fit(matrix, labels), weighting.fit(matrix.reshape(-1, 5, 8), labels)
    assert np.allclose(ten.v, five.v)
    assert np.allclose(five.weights((5, 8)).reshape(10, 4), ten.weights((10, 4)))
    uneven = weighting.fit(matrix, labels, buckets=3)
    assert np.isclose((uneven.weights((10, 4)) / 40).sum(), uneven.v.sum())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: weighting.weights("snr2", GRID, ALPHAS), r"'snr2' is unknown; use one of \['one', 'snr', .*'learned'"),
        (lambda: weighting.weights("learned", GRID, ALPHAS), r"labelled auxiliary data: fit\(matrix, labels\)"),
        (lambda: weighting.apply(np.ones((2, 5, 4)), np.ones((4, 5))), r"shape \(4, 5\) do not fit .*\(5, 4\)"),
        (lambda: weighting.fit(np.ones((2, 10, 1)), [1, 1]), r"not labels \[1\]"),
        (lambda: weighting.fit(np.ones((2, 3, 2)), [0, 1]), "6 timesteps cannot fill 10 buckets"),
    ],
)
def test_errors(call, message):
    with pytest.raises(MethodError, match=message):
        call()
