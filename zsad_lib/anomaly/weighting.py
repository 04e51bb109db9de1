"""Weighting functions for DZAD's multi-timestep matrix: Table 4 by name, and one learned from labels.

DZAD (AAAI 2025): F' = W·F, W_n = w(n). Every function here gives one weight for each cell of the matrix, float64 [N,M]
for N stages of M timesteps; stages count n = 1 … N, from little noise to much. Their scale does not matter: a score is
only compared with scores of the same weighting.
"""

from dataclasses import dataclass

import numpy as np
from scipy.interpolate import CubicSpline

from zsad_lib.errors import MethodError

DEFAULT = "late-3"
BUCKETS = 10


def weights(name: str, timesteps: np.ndarray, alphas_cumprod: np.ndarray) -> np.ndarray:
    """The weights of a function of Table 4, float64 [N,M], for timesteps int [N,M] of a schedule [T].

    - "one": 1, the plain mean.
    - "snr": SNR(t) = ᾱ_t/(1 − ᾱ_t); the paper calls it the "simple" loss.
    - "snr-derivative": −SNR'(t), the likelihood's weight in variational diffusion models. SNR falls, so SNR' itself is
      negative and would turn the order of scores around.
    - "exp-6", "exp-7": exp(−6t), exp(−7t) with t in [0,1], from Clark and Jaini's classification with diffusion models.
    - "late-1", "late-3" (DEFAULT, the paper's choice), "late-5": 1 + exp(−k·(10 − n)) with k = 1, 3, 5.
    - "learned" has no formula: `fit` gives it.
    """
    if name == "learned":
        raise MethodError("'learned' weights come from labelled auxiliary data: fit(matrix, labels).weights(shape)")
    if name not in WEIGHTINGS:
        raise MethodError(f"weighting {name!r} is unknown; use one of {list(FORMULAS)}")
    return WEIGHTINGS[name](np.asarray(timesteps), alphas_cumprod)


def snr(t: np.ndarray, alphas_cumprod: np.ndarray) -> np.ndarray:
    """SNR(t) = ᾱ_t/(1 − ᾱ_t) of a schedule [T] at timesteps t of any shape, whole or between; float64.

    Between timesteps log SNR is a cubic spline, so that SNR is smooth and has a derivative.
    """
    return np.exp(_log_snr(alphas_cumprod)(t))


def snr_derivative(t: np.ndarray, alphas_cumprod: np.ndarray) -> np.ndarray:
    """dSNR/dt of `snr` at timesteps t of any shape, per timestep; float64, negative."""
    curve = _log_snr(alphas_cumprod)
    return np.exp(curve(t)) * curve(t, 1)


def _log_snr(alphas_cumprod):
    alphas = np.asarray(alphas_cumprod, dtype=np.float64)
    return CubicSpline(np.arange(len(alphas)), np.log(alphas) - np.log1p(-alphas))


def exponential(timesteps: np.ndarray, T: int, rate: float = 7) -> np.ndarray:
    """exp(−rate·t) with t = timestep/T in [0,1]; float64, of the timesteps' shape."""
    return np.exp(-rate * np.asarray(timesteps) / T)


def late(shape: tuple[int, int], k: float = 3) -> np.ndarray:
    """1 + exp(−k·(N − n)) for the stages n = 1 … N of a matrix of `shape` (N, M), float64; N = 10 in the paper.

    The noisiest stage counts twice, the one before it 1 + exp(−k) times, the first ones once.
    """
    stage = np.arange(1, shape[0] + 1)[:, None]
    return np.broadcast_to(1 + np.exp(-float(k) * (shape[0] - stage)), shape).copy()


WEIGHTINGS = {
    "one": lambda t, _: np.ones(t.shape),
    "snr": snr,
    "snr-derivative": lambda t, alphas: -snr_derivative(t, alphas),
    "exp-6": lambda t, alphas: exponential(t, len(alphas), 6),
    "exp-7": lambda t, alphas: exponential(t, len(alphas), 7),
    "late-1": lambda t, _: late(t.shape, 1),
    "late-5": lambda t, _: late(t.shape, 5),
    "late-3": lambda t, _: late(t.shape, 3),
}
# as Table 4 prints them, in its order
FORMULAS = {
    "one": "1",
    "snr": "SNR",
    "snr-derivative": "SNR'",
    "exp-6": "exp(-6t)",
    "exp-7": "exp(-7t)",
    "late-1": "1 + exp(-1·(10-n))",
    "late-5": "1 + exp(-5·(10-n))",
    "late-3": "1 + exp(-3·(10-n))",
    "learned": "learned (eq. 13)",
}


def apply(values: np.ndarray, w: np.ndarray) -> np.ndarray:
    """The mean of F' = W·F over all cells: values [I,N,M] -> scores [I], or maps [I,N,M,h,w] -> maps [I,h,w].

    In the dtype of `values`; with w = 1 the plain mean.
    """
    values, w = np.asarray(values), np.asarray(w)
    if values.shape[1:3] != w.shape:
        raise MethodError(f"weights of shape {w.shape} do not fit a matrix of {values.shape[1:3]} stages, timesteps")
    cells = values.reshape(len(values), w.size, -1)
    return (w.ravel().astype(values.dtype) @ cells / w.size).reshape(len(values), *values.shape[3:])


@dataclass
class Learned:
    """Bucket weights and offset, from `fit`."""

    v: np.ndarray  # float64 [10]
    offset: float

    def weights(self, shape: tuple[int, int]) -> np.ndarray:
        """Weights float64 [N,M] of a matrix of `shape`, for which `apply` gives Σ_i v_i·(mean error in bucket i)."""
        shares = _shares(shape, len(self.v))
        return (self.v @ shares).reshape(shape) * shares.shape[1]

    def probability(self, matrix: np.ndarray) -> np.ndarray:
        """p(anomalous | image) by eq. 13, float64 [I], for a matrix [I,N,M]."""
        evidence = _bucket_means(matrix, len(self.v)) @ self.v + self.offset
        return 0.5 + 0.5 * np.tanh(0.5 * evidence)  # 1/(1 + exp(−evidence)), which does not overflow


def fit(matrix: np.ndarray, labels: np.ndarray, buckets: int = BUCKETS, ridge: float = 1e-3) -> Learned:
    """Learn a weight for each of ten buckets of timesteps by maximum likelihood on auxiliary images (eq. 13).

    matrix: [I,N,M]; labels: [I], 0 normal and 1 anomalous. The N·M timesteps, in order, are split into buckets of equal
    number (ten stages: the stages); x_i is an image's mean error in bucket i.

    Reading "logistic" of eq. 13, whose bracket (n b_i − x, y_k) is not explained: the evidence for a class is
    s_k = ±Σ_i v_i·(x_i − b_i), + for anomalous and − for normal, b_i the bucket's level between the classes. Then
    (1 + exp s_a) / ((1 + exp s_a) + (1 + exp s_n)) = 1/(1 + exp(−s_a)): logistic regression on the ten buckets, where
    all b_i together make one offset. `ridge` weighs ‖v‖² (of errors scaled to unit variance) against the summed
    log-likelihood: it keeps v finite where the classes separate.
    """
    from sklearn.linear_model import LogisticRegression

    labels = np.asarray(labels)
    kinds = set(labels.tolist())
    if kinds != {0, 1}:
        raise MethodError(f"learning needs normal (0) and anomalous (1) images, not labels {sorted(kinds)}")
    x = _bucket_means(matrix, buckets)
    mean, scale = x.mean(0), x.std(0) + 1e-12
    model = LogisticRegression(C=0.5 / ridge, tol=1e-8, max_iter=10_000).fit((x - mean) / scale, labels)
    v = model.coef_[0] / scale
    return Learned(v, float(model.intercept_[0] - v @ mean))


def _bucket_means(matrix, buckets):
    """Mean error of each image in each bucket: float64 [I,buckets]."""
    matrix = np.asarray(matrix, dtype=np.float64)
    return matrix.reshape(len(matrix), -1) @ _shares(matrix.shape[1:], buckets).T


def _shares(shape, buckets):
    """[buckets, N·M]: each row averages the timesteps of one bucket."""
    count = int(np.prod(shape))
    if count < buckets:
        raise MethodError(f"a matrix of {count} timesteps cannot fill {buckets} buckets: measure more, or fit fewer")
    member = np.arange(count) * buckets // count == np.arange(buckets)[:, None]
    return member / member.sum(1, keepdims=True)
