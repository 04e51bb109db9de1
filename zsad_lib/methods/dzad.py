"""DZAD: noise errors at many timesteps tell whether an image is anomalous, a guided reconstruction shows where.

Source: Zhang, Gao, Li and Gao, "Diffusion-based Zero-shot Anomaly Detection" (AAAI 2025), eqs. 11-15. One pass over the
images (`Measuring`) costs N·M·K network evaluations for the matrix F, and one for each DDIM step of the reconstruction
(the last, idle one is left out: 9 of 10 from the top). Every decision, weighting and map is a `Reading` of what it
keeps.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
import torch

from zsad_lib.anomaly import maps, noise_errors
from zsad_lib.anomaly.features import FeatureExtractor
from zsad_lib.diffusion import ddim
from zsad_lib.diffusion.guidance import GuidedModel
from zsad_lib.diffusion.latent import Backbone
from zsad_lib.diffusion.noise import image_noise, to_host
from zsad_lib.errors import MethodError
from zsad_lib.methods.base import Method, Scores, check_batch, setting
from zsad_lib.methods.dzad_reading import (
    BRANCHES,
    DECISIONS,
    MAPS,
    Decision,
    Map,
    Measured,
    Reading,
    best_threshold,
    branch_weights,
    class_distances,
    join,
)
from zsad_lib.settings import Positive

__all__ = ["BRANCHES", "DECISIONS", "DZAD", "MAPS", "Measured", "Measuring", "Reading"]
__all__ += ["best_threshold", "branch_weights", "class_distances", "join"]


@dataclass(kw_only=True)
class Measuring(Method):
    """DZAD's one pass over the images: the multi-timestep matrix (Fig. 2) and the guided reconstruction."""

    backbone: GuidedModel | Backbone  # a plain Backbone for the ablation without guidance ("SD")
    features: FeatureExtractor
    stages: Positive = 10  # N of the matrix
    per_stage: Positive = 10  # M, timesteps a stage
    seeds: Positive = 1  # K, noises a timestep
    steps: Positive = 10  # DDIM steps of the reconstruction
    t_start: int | None = None  # where it starts: the nearest level of the steps at or below it (default: the last)
    prompt: str = ""  # the paper uses none
    map_size: Positive | None = None  # of every map, in pixels (default: the backbone's image size, at most 256)
    batch_size: Positive = setting(16)  # cells in one network call; more no longer fit into the cache of a CPU core

    def __post_init__(self) -> None:
        super().__post_init__()
        self.guided = isinstance(self.backbone, GuidedModel)
        self.latent_model = self.backbone.backbone if self.guided else self.backbone
        T, offset = len(self.latent_model.alphas_cumprod), self.latent_model.steps_offset
        noise_errors.timestep_grid(T, self.stages, self.per_stage)
        self.levels = ddim.ascending_grid(self.steps, T, offset)
        self.map_size = min(256, self.size) if self.map_size is None else self.map_size
        start = max((t for t in self.levels if self.t_start is None or t <= self.t_start), default=None)
        if start is None:
            raise MethodError(f"t_start={self.t_start} is below the lowest level of {self.steps} steps: {self.levels}")
        self.t_start = start

    @property
    def size(self) -> int:
        return (self.backbone.backbone if isinstance(self.backbone, GuidedModel) else self.backbone).image_size

    def predictor(self, images: torch.Tensor) -> Callable:
        """The noise prediction (z, t, rows) -> eps for these images, rows saying which image each latent is of."""
        words = self.latent_model.embed([self.prompt])[0]
        if self.guided:
            network = self.backbone.condition_on(images)
            return lambda z, t, rows: network.predict_noise(z, t, words.expand(len(z), -1, -1), rows=rows)
        return lambda z, t, rows: self.latent_model.predict_noise(z, t, words.expand(len(z), -1, -1))

    @torch.no_grad()
    def reconstruct(self, images: torch.Tensor, ids: list[str]) -> torch.Tensor:
        """x̂₀ [B,3,H,W] in [0,1]: the images noised to t_start and denoised in DDIM steps, guided by themselves."""
        latents, predict = self.latent_model.encode(images), self.predictor(images)
        rows, alphas = torch.arange(len(images), device=latents.device), self.latent_model.alphas_cumprod
        noise = image_noise(ids, "dzad-start", 0, latents.shape[1:]).to(latents)
        z = ddim.add_noise(latents, noise, alphas[self.t_start])
        skipped, offset = len(self.levels) - 1 - self.levels.index(self.t_start), self.latent_model.steps_offset
        z = ddim.denoise(lambda z, t: predict(z, t, rows), z, alphas, self.steps, skipped, offset)
        return self.latent_model.decode(z)

    @torch.inference_mode()
    def errors(self, images: torch.Tensor, ids: list[str]) -> noise_errors.NoiseErrors:
        """The multi-timestep matrix of images [B,3,H,W] in [0,1] with B ids, its maps included."""
        grid = {"stages": self.stages, "per_stage": self.per_stage, "seeds": tuple(range(self.seeds))}
        inputs = self.predictor(images), self.latent_model.encode(images), ids, self.latent_model.alphas_cumprod
        return noise_errors.multi_timestep_errors(*inputs, batch_size=self.batch_size, **grid)

    @torch.inference_mode()
    def similarity(self, images: torch.Tensor, ids: list[str]) -> tuple[np.ndarray, int]:
        """(Σ over layers of cos(Φ(x), Φ(x̂₀)) at every pixel, float32 [B,map_size,map_size]; how many layers)."""
        pairs = self.features(images), self.features(self.reconstruct(images, ids))
        layers = len(pairs[0])
        return layers - to_host(maps.anomaly_map(*pairs, self.map_size)).numpy(), layers

    def measure(
        self, images: torch.Tensor, ids: list[str], labels: Sequence[int] | None = None, reconstruct: bool = True
    ) -> Measured:
        """One pass over images [B,3,H,W] in [0,1] with B ids and labels (default: unknown)."""
        labels = np.full(len(ids), -1) if labels is None else np.asarray(labels)
        drawn = self.similarity(images, ids) if reconstruct else (None, 0)
        return Measured(self.errors(images, ids), *drawn, labels, self.map_size)

    def measure_batches(self, batches: Iterable, reconstruct: bool = True) -> Measured:
        """`measure` of batches (images, ids, labels), such as those of a `Reference`."""
        return join([self.measure(*batch, reconstruct) for batch in batches])


@dataclass(kw_only=True)
class DZAD(Measuring, Reading):
    """The method: `Measuring` and one `Reading`; the labelled images of an auxiliary set come through `fit`."""

    name = "dzad"
    unfitted = {"reference": None, "limit": None}

    # None: the paper's reading of each when fitted; "weighted sum" and "features" need no auxiliary set
    decision: Decision | None = None
    map: Map | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.reading  # refuses what cannot work
        maps.check_pools(self.map_size, self.pool)

    @property
    def reading(self) -> Reading:
        """The settings of the `Reading`, its defaults filled in."""
        given = {f.name: getattr(self, f.name) for f in fields(Reading)}
        usual = ("weighted sum", "features") if self.reference is None else ("class features", "two-branch")
        return Reading(**given | {"decision": self.decision or usual[0], "map": self.map or usual[1]})

    @property
    def config(self) -> dict:
        return super().config | {"decision": self.reading.decision, "map": self.reading.map}

    @cached_property
    def auxiliary(self) -> Measured | None:
        """What was measured of the reference's images; None before `fit`."""
        return self.reference and self.measure_batches(self.reference.batches(self.size), reconstruct=False)

    def score(self, images: torch.Tensor, ids: list[str], categories: list[str]) -> Scores:
        """As `Method.score`; map [B,map_size,map_size]; details: matrix [B,N,M] and evaluations [B]."""
        check_batch(images, ids, categories)
        reference, before = self.auxiliary, self.latent_model.evaluations
        measured = self.measure(images, ids)
        image, anomaly = self.reading.read(measured, reference)
        evaluations = torch.full((len(ids),), (self.latent_model.evaluations - before) / len(ids))
        details = {"matrix": torch.from_numpy(measured.errors.matrix), "evaluations": evaluations}
        return Scores(torch.from_numpy(image), torch.from_numpy(anomaly), details)
