"""How typical features are of reference features: a density fitted on the latter, from scikit-learn."""

import hashlib
import warnings

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.neighbors import KernelDensity
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from zsad_lib.data.image_sets import IMAGE_SETS, ImageSet, load_image_set
from zsad_lib.errors import MethodError

COVARIANCES = ("full", "tied", "diag", "spherical")


def fit_mixture(features, components, folds=10, covariances=COVARIANCES, seed=0):
    """Standardised features and a GaussianMixture, its size and covariance picked by held-out likelihood.

    features: [N,D]; components: the sizes to try. A grid search over `folds` folds of neighbouring rows, at most 200
    iterations a fit: `eval_6d.py` of clear-nus/diffpath, with a seed. Returns a pipeline with score_samples.
    MethodError when a fold would leave fewer rows than the largest mixture has components.
    """
    features = _finite(features)
    least = len(features) - -(-len(features) // folds) if folds <= len(features) else 0
    if least < max(components):
        raise MethodError(
            f"{len(features)} reference images are too few for {max(components)} components and {folds} folds: give "
            "more images, or smaller components"
        )
    mixture = GaussianMixture(max_iter=200, random_state=seed)
    grid = {"gaussianmixture__n_components": list(components), "gaussianmixture__covariance_type": list(covariances)}
    search = GridSearchCV(make_pipeline(StandardScaler(), mixture), grid, cv=KFold(folds))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a fit that stops at 200 iterations still competes
        return search.fit(features).best_estimator_


def fit_kernel(features, bandwidth="scott", standardise=True):
    """A Gaussian KernelDensity on features [N,D]; bandwidth: in units of the (standardised) features, or a rule."""
    kernel = KernelDensity(bandwidth=bandwidth)
    return (make_pipeline(StandardScaler(), kernel) if standardise else kernel).fit(_finite(features))


def atypicality(density, features):
    """Negative log-likelihood of features [N,D] under a fitted density, float64 [N]."""
    return -density.score_samples(_finite(features))


def reference_set(reference, count, size):
    """The images a typicality is fitted on: an ImageSet as it is, or the training split of the set of that name."""
    return reference if isinstance(reference, ImageSet) else load_image_set(reference, "train", count, size)


def describe(reference, count):
    """JSON-able: which reference images, for a method's configuration (None: none). MethodError: no such image set."""
    if reference is None:
        return None
    if isinstance(reference, ImageSet):
        pixels = hashlib.sha256(reference.images.numpy().tobytes()).hexdigest()[:16]
        return {"name": reference.name, "split": reference.split, "images": len(reference), "pixels": pixels}
    if reference not in IMAGE_SETS:
        raise MethodError(f"reference {reference!r} is unknown; give an ImageSet, or one of {', '.join(IMAGE_SETS)}")
    return {"name": reference, "split": "train", "images": count}


def _finite(features):
    features = np.asarray(features, np.float64)
    bad = ~np.isfinite(features).all(axis=1)
    if bad.any():
        raise MethodError(
            f"the features of {bad.sum()} of {len(bad)} images are NaN or infinite, first of number {bad.argmax()}"
        )
    return features
