"""What every method shares: settings as dataclass fields, the record that follows from them, the form of a result."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, Literal, Protocol, Self

import torch

from zsad_lib.anomaly import maps
from zsad_lib.diffusion.noise import to_host
from zsad_lib.errors import MethodError
from zsad_lib.settings import NotNegative, Positive, check_settings

OVERSHOOT = 1e-3  # of images beyond [0,1], as rounding leaves it


@dataclass
class Scores:
    """The result for a batch, on the CPU; higher is more anomalous."""

    image: torch.Tensor  # float32 [B]
    map: torch.Tensor | None = None  # float32 [B,H,W]
    details: dict[str, torch.Tensor] = field(default_factory=dict)  # by name, B first; 1-D ones become columns


class Reference(Protocol):
    """Images that a method is fitted on, and what of them goes into its record."""

    record: dict[str, Any]

    def batches(self, size: int) -> Iterable[tuple[torch.Tensor, list[str], list[int]]]:
        """images [B,3,size,size] in [0,1], ids and labels (1 anomalous, 0 normal), batch by batch."""
        ...


@dataclass(kw_only=True)
class Method(ABC):
    """Base of all methods. A subclass is a dataclass whose fields are its settings, checked by their types."""

    name: ClassVar[str]  # as in METHODS
    unfitted: ClassVar[dict[str, Any]] = {}  # what stands in the record in place of a reference's

    def __post_init__(self) -> None:
        check_settings(self)
        self.reference: Reference | None = None

    @property
    def size(self) -> int:
        """The input resolution in pixels."""
        return self.backbone.image_size

    @property
    def control(self) -> str | None:
        """What a control has re-initialised: "unet", "all", "features"; "baseline" without any model."""
        parts = ((getattr(self, "backbone", None), None), (getattr(self, "features", None), "features"))
        return next((word or part.control for part, word in parts if getattr(part, "control", None)), None)

    @property
    def config(self) -> dict[str, Any]:
        """The record of a run: everything that changes the numbers, JSON-able."""
        record = {f.name: f.metadata.get("record", plain)(getattr(self, f.name)) for f in recorded(self)}
        return {"method": self.name, **record, **(self.reference.record if self.reference else self.unfitted)}

    def fit(self, reference: Reference) -> Self:
        """Take the images that scores are compared with; they pass the network when the first score is asked for."""
        if not self.unfitted:
            raise MethodError(f"method {self.name} takes no reference images")
        self.reference = reference
        return self

    @abstractmethod
    def score(self, images: torch.Tensor, ids: list[str], categories: list[str]) -> Scores:
        """Scores of images float32 RGB [B,3,H,W] in [0,1], with B ids and B categories."""


def setting(default: Any = MISSING, record: Any = None) -> Any:
    """A field that is left out of the record, or stands there as `record(value)`."""
    return field(default=default, metadata={"record": record or False})


def recorded(settings: Any) -> list:
    return [f for f in fields(settings) if f.metadata.get("record") is not False]


def plain(value: Any) -> Any:
    """A setting as JSON: a network by its own record, a tuple as a list."""
    if hasattr(value, "config"):
        return value.config
    return list(value) if isinstance(value, tuple) else value


def check_batch(images: torch.Tensor, ids: list[str], categories: list[str], channels: tuple[int, ...] = (3,)) -> None:
    """Refuse what is no batch as `Method.score` takes it."""
    if not (torch.is_tensor(images) and images.is_floating_point()):
        kind = getattr(images, "dtype", type(images).__name__)
        raise MethodError(f"images must be a tensor of floats in [0,1], not {kind}")
    if images.ndim != 4 or images.shape[1] not in channels or not images.numel():
        raise MethodError(f"images must be [B,3,H,W], at least one, not {list(images.shape)}")
    if not len(images) == len(ids) == len(categories):
        raise MethodError(f"{len(images)} images came with {len(ids)} ids and {len(categories)} categories")
    for one, *bounds in zip(ids, *(values.tolist() for values in images.flatten(1).aminmax(dim=1)), strict=True):
        if not all(-OVERSHOOT <= bound <= 1 + OVERSHOOT for bound in bounds):  # NaN is outside, too
            raise MethodError(f"image {one!r} has values from {bounds[0]:.4g} to {bounds[1]:.4g}: scale it to [0,1]")


@dataclass(kw_only=True)
class Redrawing(Method):
    """A method that draws an image anew and compares the features of the two: DIVAD, VLMDiff."""

    map_size: Positive | None = None  # of the map, in pixels (default: the backbone's image size, at most 256)
    sigma: NotNegative = 5.0  # blur of the map, in its pixels; 5 is meant for 256 px
    pool: Positive = 8  # the image score is the maximum after eight average pools of so many pixels; 8 is for 256 px
    mode: Literal["sum", "product"] = "sum"  # how the layers of the features are combined

    def __post_init__(self) -> None:
        super().__post_init__()
        self.map_size = min(256, self.size) if self.map_size is None else self.map_size
        maps.check_pools(self.map_size, self.pool)

    @abstractmethod
    def reconstruct(self, images: torch.Tensor, ids: list[str], categories: list[str]) -> tuple[torch.Tensor, ...]:
        """(reconstructions [B,3,H,W] in [0,1], latents [B,C,h,w] that denoising started from), where the model is."""

    def score(self, images: torch.Tensor, ids: list[str], categories: list[str]) -> Scores:
        """As `Method.score`, for square images: the features stretch any other.

        map: [B,map_size,map_size], in [0, 2·layers] before the blur for mode "sum"; details: reconstruction
        [B,3,H,W], latent [B,C,h,w], evaluations [B] (samples that went through the U-Net for each image).
        """
        check_batch(images, ids, categories)
        counter = getattr(self.backbone, "backbone", self.backbone)
        before = counter.evaluations
        with torch.inference_mode():
            drawn, latent = self.reconstruct(images, ids, categories)
            layers = self.features(images), self.features(drawn)
            anomaly, image = maps.compare(*layers, self.map_size, self.sigma, self.pool, self.mode)
        evaluations = torch.full((len(images),), (counter.evaluations - before) / len(images))
        details = {"reconstruction": to_host(drawn), "latent": to_host(latent), "evaluations": evaluations}
        return Scores(to_host(image), to_host(anomaly), details)
