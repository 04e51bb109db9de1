"""DZAD: noise errors at many timesteps tell whether an image is anomalous, a guided reconstruction shows where.

Source: Zhang, Gao, Li and Gao, "Diffusion-based Zero-shot Anomaly Detection" (AAAI 2025), eqs. 11-15. One pass over the
images (`DZAD.measure`) costs N·M·K network evaluations for the matrix F, and one for each DDIM step of the
reconstruction (the last, idle one is left out: 9 of 10 from the top). Every decision, weighting and map is a `Reading`
of what it keeps. The paper leaves much open: what was taken is named at each function.
"""

from dataclasses import asdict, dataclass, replace
from itertools import zip_longest

import numpy as np
import torch
import torch.nn.functional as F

from zsad_lib.anomaly import maps, noise_errors, weighting
from zsad_lib.data.datasets import load_dataset
from zsad_lib.data.images import load_images
from zsad_lib.diffusion import ddim
from zsad_lib.diffusion.guidance import GuidedModel
from zsad_lib.diffusion.noise import image_noise, to_host
from zsad_lib.errors import MethodError
from zsad_lib.methods.base import Scores, check_batch
from zsad_lite import synthad

DECISIONS = ("class features", "weighted sum", "map maximum")
MAPS = ("two-branch", "features", "noise errors")
BRANCHES = ("level", "constant")
GROUPS = {f"synthad-{name}": categories for name, categories in synthad.GROUPS.items()}


@dataclass
class Measured:
    """What DZAD keeps of I images; NumPy arrays, in the order of errors.ids.

    errors: `NoiseErrors` with maps at latent resolution; similarity: float32 [I,H,W], the cosine of the features of an
    image and of its reconstruction, every layer upsampled and summed, or None when nothing was reconstructed; layers:
    how many; labels: int [I], 1 anomalous, 0 normal, −1 unknown; size: H = W of every map read from it, in pixels.
    """

    errors: noise_errors.NoiseErrors
    similarity: np.ndarray | None
    layers: int
    labels: np.ndarray
    size: int

    def take(self, rows):
        """The same of the images `rows` (indices, a slice or a bool array)."""
        errors = self.errors
        parts = {"ids": errors.ids[rows], "errors": errors.errors[rows], "maps": errors.maps[rows]}
        similarity = None if self.similarity is None else self.similarity[rows]
        return Measured(replace(errors, **parts), similarity, self.layers, self.labels[rows], self.size)

    def first_stages(self, count):
        """The same with the stages 1 … `count` alone, those with the least noise; all when there are fewer."""
        errors = self.errors
        parts = {"timesteps": errors.timesteps[:count], "errors": errors.errors[:, :count]}
        return replace(self, errors=replace(errors, maps=errors.maps[:, :count], **parts))


def join(parts):
    """One Measured of all images; MethodError when they were not measured alike."""
    similarity = None if parts[0].similarity is None else np.concatenate([part.similarity for part in parts])
    labels = np.concatenate([part.labels for part in parts])
    errors = noise_errors.join([part.errors for part in parts])
    return Measured(errors, similarity, parts[0].layers, labels, parts[0].size)


# --- from the matrix to a decision


def cells(errors, multi_timestep=True):
    """F [I,N,M] and the error maps [I,N,M,h,w]; without multi_timestep (Table 3's rows without M_t) of the one cell
    in the middle of the schedule, [I,1,1]: a single timestep, as the reading of "without"."""
    if multi_timestep:
        return errors.matrix, errors.maps
    stage = errors.matrix.shape[1] // 2
    return errors.matrix[:, stage : stage + 1, :1], errors.maps[:, stage : stage + 1, :1]


def class_distances(weighted, class_features):
    """Distance of matrices F' [I,N,M] to the nearest of a class's [J,N,M]: float64 [I], and which it is, int [I].

    Eq. 12 with class features F_n or F_a collected on the auxiliary set: the root mean square over the cells.
    """
    rows, known = (np.asarray(m, dtype=np.float64).reshape(len(m), -1) for m in (weighted, class_features))
    squares = (rows**2).sum(1)[:, None] - 2 * rows @ known.T + (known**2).sum(1)
    return np.sqrt(squares.min(1).clip(0) / rows.shape[1]), squares.argmin(1)


def best_threshold(scores, labels):
    """The score that parts normal (0) from anomalous (1) images best: largest true minus false positive rate."""
    from sklearn.metrics import roc_curve

    false, true, thresholds = roc_curve(labels, scores)
    best = 1 + int((true - false)[1:].argmax())  # [0] is infinity, which judges nothing
    return float(thresholds[best])


def branch_weights(error_maps, level, anomalous, branch="level", factor=1.1):
    """w_pn and w_pa of eqs. 14 and 15 at every latent position: float32 [I,h,w].

    error_maps: weighted noise errors [I,h,w]; level: [I], the mean error of the most similar normal features F_n;
    anomalous: bool [I], how the image was judged. The paper gives no closed form. Readings:

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


@dataclass(frozen=True)
class Reading:
    """One way from what was measured to scores and maps. Defaults: the paper's.

    weighting: a name of `weighting.FORMULAS`. multi_timestep: see `cells`. decision, of the image score: "class
    features", distance to the nearest normal minus to the nearest anomalous matrix of the auxiliary set (eq. 12);
    "weighted sum", the mean of F' itself, which needs no auxiliary set; "map maximum", of the map, pooled eight times
    by `pool` pixels. map: "two-branch" (eqs. 14 and 15), "features" (both without their weights), "noise errors" (the
    error maps, weighted). branch, factor: see `branch_weights`. sigma: blur of the map, in its pixels. MethodError:
    unknown names, a factor below 1.
    """

    weighting: str = weighting.DEFAULT
    multi_timestep: bool = True
    decision: str = "class features"
    map: str = "two-branch"
    branch: str = "level"
    factor: float = 1.1
    sigma: float = 4.0
    pool: int = 8

    def __post_init__(self):
        names = {"weighting": weighting.FORMULAS, "decision": DECISIONS, "map": MAPS, "branch": BRANCHES}
        if self.factor < 1:
            raise MethodError(f"factor must be 1 or more, not {self.factor}")
        for what, known in names.items():
            if getattr(self, what) not in known:
                raise MethodError(f"{what} {getattr(self, what)!r} is unknown; use one of {list(known)}")

    @property
    def needs_reference(self):
        """Whether an auxiliary set is needed: for class features, two branches and learned weights."""
        return "class features" == self.decision or self.map == "two-branch" or self.weighting == "learned"

    def weights(self, measured, reference=None):
        """w [N,M] of the cells in use; "learned" is fitted on the reference (eq. 13)."""
        matrix, _ = cells(measured.errors, self.multi_timestep)
        if not self.multi_timestep:
            return np.ones(matrix.shape[1:])
        if self.weighting == "learned":
            return weighting.fit(reference.errors.matrix, reference.labels).weights(matrix.shape[1:])
        return weighting.weights(self.weighting, measured.errors.timesteps, measured.errors.alphas_cumprod)

    def read(self, measured, reference=None, weights=None):
        """(image scores float32 [I], maps float32 [I,H,W]) of a Measured.

        reference: a Measured of labelled images of the auxiliary set, both classes among them; weights: w [N,M] in
        place of `self.weights`. MethodError when a reference is needed and missing.
        """
        if self.needs_reference and reference is None:
            raise MethodError(f"{self} needs a reference: labelled images of an auxiliary set")
        w = self.weights(measured, reference) if weights is None else np.asarray(weights)
        matrix, positions = cells(measured.errors, self.multi_timestep)
        error_maps = weighting.apply(positions, w)
        scores = weighting.apply(matrix, w).astype(np.float64)
        level = None
        if reference is not None:
            scores, level, threshold = self._against(reference, matrix, w)
        anomaly = self._map(measured, error_maps, level, None if level is None else scores > threshold)
        anomaly = maps.smooth(torch.from_numpy(anomaly), self.sigma)
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
        w = branch_weights(error_maps, level, judged, self.branch, self.factor)
        w = _resize(w, measured.size)
        return measured.layers - w * measured.similarity


def _resize(values, size):
    values = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    return F.interpolate(values[:, None], (size, size), mode="bilinear")[:, 0].numpy()


# --- the pass over the images


class DZAD:
    """Method "dzad". backbone: a `GuidedModel`, or a plain `Backbone` for the ablation without guidance ("SD").

    features: a `FeatureExtractor`. stages, per_stage, seeds: the matrix (`noise_errors.measure`), ten stages in the
    paper. t_start: the level the reconstruction starts from, with noise drawn for each image (default: the last of the
    grid; the nearest level of `steps` DDIM steps at or below it). prompt: the paper uses none. map_size: of the map
    (default: the backbone's image size, at most 256). reference: an auxiliary set whose labelled images give the class
    features, "synthad-A", "synthad-B" or a dataset's name (`reference_samples`, with `limit`); measured on the first
    use. weighting … factor, sigma, pool: see `Reading`; without a reference decision "weighted sum" and map "features"
    are the default. MethodError on values that cannot work.
    """

    name = "dzad"

    def __init__(
        self,
        backbone,
        features,
        stages=10,
        per_stage=10,
        seeds=1,
        steps=10,
        t_start=None,
        prompt="",
        map_size=None,
        weighting=weighting.DEFAULT,
        multi_timestep=True,
        decision=None,
        map=None,
        branch="level",
        factor=1.1,
        sigma=4.0,
        pool=8,
        reference=None,
        limit=None,
        batch_size=64,
    ):
        alone = reference is None
        if not (alone or isinstance(reference, str)):
            raise MethodError(f"reference is the name of an auxiliary set, not a {type(reference).__name__}")
        decision = decision or ("weighted sum" if alone else "class features")
        chosen = map or ("features" if alone else "two-branch")
        self.reading = Reading(weighting, multi_timestep, decision, chosen, branch, float(factor), float(sigma), pool)
        if alone and self.reading.needs_reference:
            raise MethodError(f"{self.reading} needs reference=, the name of an auxiliary set with labels")
        self.model = backbone
        self.backbone = backbone.backbone if isinstance(backbone, GuidedModel) else backbone
        self.features, self.size = features, self.backbone.image_size
        T, offset = len(self.backbone.alphas_cumprod), self.backbone.steps_offset
        noise_errors.timestep_grid(T, stages, per_stage)
        try:
            self.levels = ddim.ascending_grid(steps, T, offset)
            map_size = map_size or min(256, self.size)
            maps.check_pools(map_size, pool)
        except ValueError as error:
            raise MethodError(str(error)) from error
        self.t_start = max((t for t in self.levels if t_start is None or t <= t_start), default=None)
        if self.t_start is None:
            raise MethodError(f"t_start={t_start} is below the lowest level of {steps} steps: {self.levels}")
        self.grid = {"stages": stages, "per_stage": per_stage, "seeds": tuple(range(seeds)), "batch_size": batch_size}
        self.steps, self.prompt, self.map_size = steps, prompt, map_size
        self.reference, self.limit = reference, limit
        self.config = {
            "method": self.name, "backbone": backbone.config, "features": features.config, "stages": stages,
            "per_stage": per_stage, "seeds": seeds, "steps": steps, "t_start": self.t_start, "prompt": prompt,
            "map_size": map_size, "reference": reference, "limit": limit, **asdict(self.reading),
        }  # fmt: skip

    def predictor(self, images):
        """The noise prediction (z, t, rows) -> eps for these images, rows saying which image each latent is of."""
        words = self.backbone.embed([self.prompt])[0]
        if isinstance(self.model, GuidedModel):
            seeing = self.model.seeing(images)
            return lambda z, t, rows: seeing.predict_noise(z, t, words.expand(len(z), -1, -1), rows=rows)
        return lambda z, t, rows: self.backbone.predict_noise(z, t, words.expand(len(z), -1, -1))

    @torch.no_grad()
    def reconstruct(self, images, ids, latents=None, predict=None):
        """x̂₀ [B,3,H,W] in [0,1]: the images noised to t_start and denoised in DDIM steps, guided by themselves."""
        latents = self.backbone.encode(images) if latents is None else latents
        predict = predict or self.predictor(images)
        rows, alphas = torch.arange(len(images), device=latents.device), self.backbone.alphas_cumprod
        noise = image_noise(ids, "dzad-start", 0, latents.shape[1:]).to(latents)
        z = ddim.add_noise(latents, noise, alphas[self.t_start])
        skipped = len(self.levels) - 1 - self.levels.index(self.t_start)
        offset = self.backbone.steps_offset
        z = ddim.denoise(lambda z, t: predict(z, t, rows), z, alphas, self.steps, skipped, offset)
        return self.backbone.decode(z)

    @torch.inference_mode()
    def measure(self, images, ids, labels=None, reconstruct=True):
        """One pass over images [B,3,H,W] in [0,1] with B ids and labels (default: unknown): a Measured."""
        predict, latents = self.predictor(images), self.backbone.encode(images)
        errors = noise_errors.measure(predict, latents, ids, self.backbone.alphas_cumprod, **self.grid)
        labels = np.full(len(ids), -1) if labels is None else np.asarray(labels)
        if not reconstruct:
            return Measured(errors, None, 0, labels, self.map_size)
        pairs = self.features(images), self.features(self.reconstruct(images, ids, latents, predict))
        distance = maps.anomaly_map(*pairs, self.map_size)
        layers = len(pairs[0])
        return Measured(errors, layers - to_host(distance).numpy(), layers, labels, self.map_size)

    def measure_reference(self):
        """The labelled images of the auxiliary set, a Measured; measured once. None without a reference."""
        if isinstance(self.reference, str):
            self.reference = self.measure_samples(reference_samples(self.reference, self.limit), reconstruct=False)
        return self.reference

    def measure_samples(self, samples, reconstruct=True, batch=16, progress=None):
        """`measure` of Samples of a dataset, in batches; progress: wraps the list of batches (tqdm)."""
        batches = [samples[k : k + batch] for k in range(0, len(samples), batch)]
        parts = (
            self.measure(load_images(part, self.size), [s.id for s in part], [s.label for s in part], reconstruct)
            for part in (progress(batches) if progress else batches)
        )
        return join(list(parts))

    def score(self, images, ids, categories):
        """images [B,3,H,W] in [0,1]; ids, categories: B strings each. Gives image [B], map [B,map_size,map_size];
        details: matrix [B,N,M] and evaluations [B]."""
        check_batch(images, ids, categories)
        reference, before = self.measure_reference(), self.backbone.evaluations
        measured = self.measure(images, ids)
        image, anomaly = self.reading.read(measured, reference)
        evaluations = torch.full((len(ids),), (self.backbone.evaluations - before) / len(ids))
        details = {"matrix": torch.from_numpy(measured.errors.matrix), "evaluations": evaluations}
        return Scores(torch.from_numpy(image), torch.from_numpy(anomaly), details)


def labelled_samples(name, limit=None):
    """The test images of a set, at most `limit` of each category and defect: a list of Samples. name: "synthad-A",
    "synthad-B" or a dataset's."""
    if name in GROUPS:
        return list(load_dataset("synthad", categories=list(GROUPS[name]), limit=limit).samples)
    return list(load_dataset(name, limit=limit).samples)


def reference_samples(name, limit=None):
    """The labelled images of an auxiliary set whose matrices are class features: a list of Samples.

    At most `limit` of each category and defect, and in each category as many normal images as anomalous ones: the
    nearest of many is nearer by number alone, and eq. 10 asks for no prior in favour of one class.
    """
    kept = []
    images = labelled_samples(name)
    for category in dict.fromkeys(sample.category for sample in images):
        normal = [s for s in images if s.category == category and s.label == 0]
        anomalous = _taking_turns([s for s in images if s.category == category and s.label == 1], limit)
        count = min(len(normal), len(anomalous))
        kept += normal[:count] + anomalous[:count]
    return kept


def _taking_turns(samples, limit):
    """At most `limit` of each defect: the first of every one, then the second, and so on."""
    kinds = [[s for s in samples if s.defect == defect][:limit] for defect in dict.fromkeys(s.defect for s in samples)]
    return [sample for turn in zip_longest(*kinds) for sample in turn if sample is not None]
