"""How typical features are of reference features: a density fitted on the latter, from scikit-learn."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.neighbors import KernelDensity
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from zsad_lib.errors import MethodError

COVARIANCES = ("full", "tied", "diag", "spherical")


def fit_mixture(
    features: Any, components: Sequence[int], folds: int = 10, covariances: Sequence[str] = COVARIANCES, seed: int = 0
) -> Pipeline:
    """Standardised features [N,D] and a GaussianMixture, its size and covariance picked by held-out likelihood.

    A grid search over `folds` folds of neighbouring rows, at most 200 iterations a fit: `eval_6d.py` of
    clear-nus/diffpath, with a seed.
    """
    features = _finite(features)
    least = len(features) - -(-len(features) // folds) if folds <= len(features) else 0
    if least < max(components):
        raise MethodError(
            f"{len(features)} reference images are too few for {max(components)} components and {folds} folds: give "
            "more images, or smaller components"
        )
    mixture = GaussianMixture(max_iter=200, random_state=seed % 2**32)  # all that it takes
    grid = {"gaussianmixture__n_components": list(components), "gaussianmixture__covariance_type": list(covariances)}
    search = GridSearchCV(make_pipeline(StandardScaler(), mixture), grid, cv=KFold(folds))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a fit that stops at 200 iterations still competes
        return search.fit(features).best_estimator_


def fit_kernel(features: Any, bandwidth: float | str = "scott", standardise: bool = True) -> KernelDensity | Pipeline:
    """A Gaussian KernelDensity on features [N,D]; bandwidth: in units of the (standardised) features, or a rule."""
    kernel = KernelDensity(bandwidth=bandwidth)
    return (make_pipeline(StandardScaler(), kernel) if standardise else kernel).fit(_finite(features))


def atypicality(density: KernelDensity | Pipeline, features: Any) -> np.ndarray:
    """Negative log-likelihood of features [N,D] under a fitted density, float64 [N]."""
    return -density.score_samples(_finite(features))


def _finite(features):
    features = np.asarray(features, np.float64)
    bad = ~np.isfinite(features).all(axis=1)
    if bad.any():
        raise MethodError(
            f"the features of {bad.sum()} of {len(bad)} images are NaN or infinite, first of number {bad.argmax()}"
        )
    return features
