"""Unconditional diffusion models of pixels: the bases of the image-level methods, read from DDPMPipeline layouts."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zsad_lib.diffusion.loading import (
    Location,
    check_control,
    configuration,
    control_seed,
    fetch,
    fingerprint,
    locate,
    pick_device,
    read_object,
    read_scheduler,
    read_weights,
)
from zsad_lib.diffusion.noise import NoisePredictor
from zsad_lib.errors import ModelError

SCHEDULE_KEYS = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "trained_betas")


@dataclass
class PixelModel(NoisePredictor):
    """An unconditional U-Net that predicts the noise of RGB images, in float32.

    Pixels are float32 [B,3,H,W] in [-1,1], images RGB or grey in [0,1]. Of six output channels three are the noise.
    """

    unet: Any  # UNet2DModel
    scheduler: Any  # DDPMScheduler: only its schedule and configuration are used
    name: str
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    evaluations: int = 0  # samples that went through the network so far
    control: str | None = None  # "unet" or "all" when its weights are random: it is one network

    def __post_init__(self) -> None:
        super().__post_init__()
        config = self.unet.config
        if config.in_channels != 3 or config.out_channels not in (3, 6):
            raise ModelError(
                f"{self.name}: the U-Net has {config.in_channels} channels in and {config.out_channels} out; a pixel "
                "model takes 3 (RGB) and gives 3, or 6 when it learned its variances"
            )
        if config.get("class_embed_type") or config.get("num_class_embeds"):
            raise ModelError(f"{self.name}: the U-Net is conditional on a class; use an unconditional one")

    @property
    def alphas_cumprod(self) -> Tensor:
        """ᾱ_t of the T training timesteps, float64 [T] on the CPU: near t = 0 float32 would lose 1 − ᾱ."""
        return (1 - self.scheduler.betas.double()).cumprod(0)

    @property
    def image_size(self) -> int:
        """Height and width in pixels of the images that the network was trained on."""
        size = self.unet.config.sample_size
        return size if isinstance(size, int) else size[0]

    @property
    def config(self) -> dict:
        """JSON-able: what of this model changes a method's numbers, a fingerprint of the weights included."""
        schedule = {key: self.scheduler.config.get(key) for key in SCHEDULE_KEYS}
        return {
            "name": self.label,
            "prediction_type": self.prediction_type,
            "timesteps": schedule["num_train_timesteps"],
            "schedule": hashlib.sha256(json.dumps(schedule, default=list).encode()).hexdigest()[:16],
            "weights": fingerprint(self.unet),
            "configuration": configuration(self.unet),
            "betas": self.betas,
        }

    def to_pixels(self, images: Tensor) -> Tensor:
        """Images [B,3,H,W] or grey [B,1,H,W] in [0,1], of the model's size -> pixels [B,3,H,W], on its device."""
        size = self.image_size
        if images.ndim != 4 or images.shape[1] not in (1, 3) or set(images.shape[2:]) != {size}:
            raise ModelError(f"{self.name} takes images [B,3,{size},{size}] or grey ones, not {list(images.shape)}")
        return 2 * images.to(self.device, torch.float32).expand(-1, 3, -1, -1) - 1

    def to_images(self, pixels: Tensor) -> Tensor:
        """Pixels [B,3,H,W] -> images clamped to [0,1]."""
        return (pixels / 2 + 0.5).clamp(0, 1)

    def predict_noise(self, x: Tensor, t: int | Tensor) -> Tensor:
        """ε_θ(x, t), float32 [B,3,H,W], for noisy pixels x [B,3,H,W] and timestep t: an int, or int64 [B]."""
        x = x.to(self.device, torch.float32)
        timesteps = torch.as_tensor(t, device=self.device).expand(len(x))
        self.evaluations += len(x)
        return self._noise(self.unet(x, timesteps).sample[:, :3].float(), x, timesteps)


def load_pixel_model(
    name_or_path: str | Path,  # a DDPMPipeline folder, a checkpoint of data_manifest.yaml or a hub id
    device: str | torch.device = "auto",  # CUDA when there is one
    random_weights: str | None = None,  # "unet" or "all": freshly initialised, always alike: a control
) -> PixelModel:
    """Read an unconditional pixel model, its parts in subfolders or side by side as in google/ddpm-*."""
    check_control(random_weights)
    from diffusers import DDPMScheduler, UNet2DModel

    device = pick_device(device)
    where = locate(name_or_path, ("model_index.json",), "DDPMPipeline")
    unet_part, scheduler_part = ("unet", "scheduler") if _has_subfolders(where, UNet2DModel) else (None, None)
    if where.local:
        _check_folder(Path(where.source), unet_part, scheduler_part)
    scheduler = read_scheduler(where, scheduler_part, DDPMScheduler)
    unet = read_weights(where, unet_part, UNet2DModel, torch_dtype=torch.float32)
    if random_weights:
        with control_seed():  # torch's own initialisation, in place
            for module in (module for module in unet.modules() if hasattr(module, "reset_parameters")):
                module.reset_parameters()
    unet = unet.to(device).eval().requires_grad_(False)
    return PixelModel(unet, scheduler, where.name, device, control=random_weights)


def _has_subfolders(where: Location, cls: Any) -> bool:
    """Whether the parts lie in subfolders; the older pipelines of the hub keep everything at the top."""
    if where.local:
        return (Path(where.source) / "unet").is_dir()
    try:
        fetch(where, "unet", cls.load_config)
    except ModelError:
        return False
    return True


def _check_folder(folder: Path, unet_part: str | None, scheduler_part: str | None) -> None:
    files = [f"{unet_part or '.'}/config.json", f"{scheduler_part or '.'}/scheduler_config.json"]
    locate(folder, [file.removeprefix("./") for file in files], "DDPMPipeline")
    parts = read_object(folder / "model_index.json")
    foreign = sorted(key for key in parts if not key.startswith("_") and key not in ("unet", "scheduler"))
    if foreign:
        raise ModelError(
            f"{folder} has the parts {', '.join(foreign)} besides unet and scheduler: its U-Net does not see pixels; "
            "use a DDPMPipeline"
        )
