"""DZAD's readings: from what was measured of images to a decision and a map (AAAI 2025, eqs. 11-15).

The paper leaves much open; each reading that was taken is named where it is made.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Self, get_args

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_curve

from zsad_lib.anomaly import maps, noise_errors, weighting
from zsad_lib.errors import MethodError
from zsad_lib.settings import AtLeast, NotNegative, Positive, check_settings

Decision = Literal["class features", "weighted sum", "map maximum"]
Map = Literal["two-branch", "features", "noise errors"]
Branch = Literal["level", "constant"]
Weighting = Literal[tuple(weighting.FORMULAS)]
DECISIONS, MAPS, BRANCHES = get_args(Decision), get_args(Map), get_args(Branch)


@dataclass
class Measured:
    """What DZAD keeps of I images; NumPy arrays, in the order of errors.ids."""

    errors: noise_errors.NoiseErrors  # with maps at latent resolution
    similarity: np.ndarray | None  # float32 [I,H,W]: Σ over layers of cos(Φ(x), Φ(x̂₀)), upsampled; None: not drawn anew
    layers: int  # how many are summed there
    labels: np.ndarray  # int [I]: 1 anomalous, 0 normal, −1 unknown
    size: int  # H = W of every map read from it, in pixels

    def take(self, rows: Any) -> Self:
        """The same of the images `rows` (indices, a slice or a bool array)."""
        errors = self.errors
        parts = {"ids": errors.ids[rows], "errors": errors.errors[rows], "maps": errors.maps[rows]}
        similarity = None if self.similarity is None else self.similarity[rows]
        return Measured(replace(errors, **parts), similarity, self.layers, self.labels[rows], self.size)

    def first_stages(self, count: int) -> Self:
        """The same with the stages 1 … `count` alone, those with the least noise; all when there are fewer."""
        errors = self.errors
        parts = {"timesteps": errors.timesteps[:count], "errors": errors.errors[:, :count]}
        return replace(self, errors=replace(errors, maps=errors.maps[:, :count], **parts))


def join(parts: list[Measured]) -> Measured:
    """One Measured of all images, which were measured alike."""
    similarity = None if parts[0].similarity is None else np.concatenate([part.similarity for part in parts])
    labels = np.concatenate([part.labels for part in parts])
    errors = noise_errors.join([part.errors for part in parts])
    return Measured(errors, similarity, parts[0].layers, labels, parts[0].size)


def cells(errors: noise_errors.NoiseErrors, multi_timestep: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """F [I,N,M] and the error maps [I,N,M,h,w]; without multi_timestep (Table 3's rows without M_t) of the one cell in
    the middle of the schedule, [I,1,1]: a single timestep, as the reading of "without"."""
    if multi_timestep:
        return errors.matrix, errors.maps
    stage = errors.matrix.shape[1] // 2
    return errors.matrix[:, stage : stage + 1, :1], errors.maps[:, stage : stage + 1, :1]


def class_distances(weighted: np.ndarray, class_features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance of matrices F' [I,N,M] to the nearest of a class's [J,N,M]: float64 [I], and which it is, int [I].

    Eq. 12 with class features F_n or F_a collected on the auxiliary set: the root mean square over the cells.
    """
    rows, known = (np.asarray(m, dtype=np.float64).reshape(len(m), -1) for m in (weighted, class_features))
    squares = (rows**2).sum(1)[:, None] - 2 * rows @ known.T + (known**2).sum(1)
    return np.sqrt(squares.min(1).clip(0) / rows.shape[1]), squares.argmin(1)


def best_threshold(scores: np.ndarray, labels: np.ndarray) -> float:
    """The score that parts normal (0) from anomalous (1) images best: largest true minus false positive rate."""
    false, true, thresholds = roc_curve(labels, scores)
    best = 1 + int((true - false)[1:].argmax())  # [0] is infinity, which judges nothing
    return float(thresholds[best])


def branch_weights(
    error_maps: np.ndarray, level: np.ndarray, anomalous: np.ndarray, branch: Branch = "level", factor: float = 1.1
) -> np.ndarray:
    """w_pn and w_pa of eqs. 14 and 15 at every latent position, float32 [I,h,w]; the paper gives no closed form.

    error_maps: weighted noise errors [I,h,w]; level: [I], the mean error of the most similar normal features F_n;
    anomalous: bool [I], how the image was judged. Readings:

    - "level": level/error, for an image judged normal between 1 and `factor` (w_pn draws its features together where
      the noise was predicted better than is normal), for one judged anomalous between 1/factor and 1 (w_pa drives them
      apart where it was predicted worse).
    - "constant": `factor` and 1/factor, the same at every position.
    """
    low = np.where(anomalous, 1 / factor, 1.0)[:, None, None]
    high = np.where(anomalous, 1.0, factor)[:, None, None]
    if branch == "constant":
        return np.broadcast_to(low * high, error_maps.shape).astype(np.float32)
    ratio = np.asarray(level)[:, None, None] / np.maximum(error_maps, 1e-12)
    return ratio.clip(low, high).astype(np.float32)


@dataclass
class Reading:
    """One way from what was measured to scores and maps. Defaults: the paper's."""

    weighting: Weighting = weighting.DEFAULT  # w(t) of Table 4 by name, or learned (eq. 13): `anomaly.weighting`
    multi_timestep: bool = True  # False: `cells`' single timestep
    # the image score: distance to the nearest normal minus to the nearest anomalous matrix of the auxiliary set (eq.
    # 12); the mean of F' itself, which needs no auxiliary set; or the map's maximum after eight average pools
    decision: Decision = "class features"
    map: Map = "two-branch"  # eqs. 14 and 15; both without their weights; or the error maps, weighted
    branch: Branch = "level"  # `branch_weights`
    factor: Annotated[float, AtLeast(1)] = 1.1  # how far a branch may move a place
    sigma: NotNegative = 4.0  # blur of the map, in its pixels
    pool: Positive = 8  # of the map's maximum, in pixels

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def needs_reference(self) -> bool:
        """Whether an auxiliary set is needed: for class features, two branches and learned weights."""
        return "class features" == self.decision or self.map == "two-branch" or self.weighting == "learned"

    def weights(self, measured: Measured, reference: Measured | None = None) -> np.ndarray:
        """w [N,M] of the cells in use; "learned" is fitted on the reference (eq. 13)."""
        matrix, _ = cells(measured.errors, self.multi_timestep)
        if not self.multi_timestep:
            return np.ones(matrix.shape[1:])
        if self.weighting == "learned":
            return weighting.fit(reference.errors.matrix, reference.labels).weights(matrix.shape[1:])
        return weighting.weights(self.weighting, measured.errors.timesteps, measured.errors.alphas_cumprod)

    def read(
        self, measured: Measured, reference: Measured | None = None, weights: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(image scores float32 [I], maps float32 [I,H,W]).

        reference: labelled images of the auxiliary set, both classes among them; weights: w [N,M] in place of
        `self.weights`.
        """
        if self.needs_reference and reference is None:
            raise MethodError(f"{self} needs a reference: labelled images of an auxiliary set, given by fit")
        w = self.weights(measured, reference) if weights is None else np.asarray(weights)
        matrix, positions = cells(measured.errors, self.multi_timestep)
        error_maps = weighting.apply(positions, w)
        scores, level, judged = weighting.apply(matrix, w).astype(np.float64), None, None
        if reference is not None:
            scores, level, threshold = self._against(reference, matrix, w)
            judged = scores > threshold
        anomaly = maps.smooth(torch.from_numpy(self._map(measured, error_maps, level, judged)), self.sigma)
        if self.decision == "map maximum":
            scores = maps.image_score(anomaly, self.pool).numpy()
        return np.asarray(scores, dtype=np.float32), anomaly.numpy()

    def _against(self, reference, matrix, w):
        """Scores of a matrix, the error level of its most similar normal features, and the threshold of the scores."""
        known, _ = cells(reference.errors, self.multi_timestep)
        normal, anomalous = (known[reference.labels == label] * w for label in (0, 1))
        if not len(normal) or not len(anomalous):
            raise MethodError("the auxiliary set has only one class: normal and anomalous images are needed")
        to_normal, nearest = class_distances(matrix * w, normal)
        level = normal.reshape(len(normal), -1).mean(1)[nearest]
        if self.decision == "weighted sum":
            threshold = best_threshold(weighting.apply(known, w), reference.labels)
            return weighting.apply(matrix, w).astype(np.float64), level, threshold
        return to_normal - class_distances(matrix * w, anomalous)[0], level, 0.0

    def _map(self, measured, error_maps, level, judged):
        if self.map == "noise errors":
            return _resize(error_maps, measured.size)
        if measured.similarity is None:
            raise MethodError(f"map {self.map!r} compares with a reconstruction: measure with reconstruct=True")
        if self.map == "features":
            return measured.layers - measured.similarity
        w = _resize(branch_weights(error_maps, level, judged, self.branch, self.factor), measured.size)
        return measured.layers - w * measured.similarity


def _resize(values, size):
    values = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    return F.interpolate(values[:, None], (size, size), mode="bilinear")[:, 0].numpy()
