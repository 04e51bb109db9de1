"""Noise: what each image draws for itself, and what a network predicts."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from zsad_lib import store
from zsad_lib.diffusion.loading import CONTROL_NAMES
from zsad_lib.errors import ModelError


def image_noise(ids: Iterable[str], purpose: str, seed: int, shape: Sequence[int]) -> Tensor:
    """Standard normal noise for each image, float32 [B,*shape] on the CPU.

    Each image draws from its own generator, seeded by (purpose, seed, id), whatever batch, order or run it came in.
    """
    digests = [hashlib.sha256(f"{purpose}|{seed}|{i}".encode()).digest() for i in ids]
    generators = [torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1) for digest in digests]
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def to_host(tensor: Tensor) -> Tensor:
    """An ordinary float32 copy on the CPU; a tensor made under inference_mode cannot be changed in place."""
    return tensor.to("cpu", torch.float32, copy=True)


BETAS = ("beta_schedule", "beta_start", "beta_end", "trained_betas", "num_train_timesteps", "rescale_betas_zero_snr")


class NoisePredictor:
    """What `Backbone` and `PixelModel` have in common: a U-Net that predicts noise or "v", and its schedule."""

    unet: Any
    scheduler: Any
    name: str
    control: str | None

    def __post_init__(self) -> None:
        size = self.unet.config.sample_size
        if not all(type(side) is int and side > 0 for side in (size if isinstance(size, (list, tuple)) else [size])):
            raise ModelError(f"{self.name}: the U-Net has a sample_size of {size!r}, not an int of 1 or more")
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ModelError(
                f"{self.name}: prediction type {self.prediction_type!r} is not supported; "
                "use a model that predicts 'epsilon' or 'v_prediction'"
            )

    @property
    def prediction_type(self) -> str:
        """What the U-Net predicts: "epsilon" or "v_prediction"."""
        return self.scheduler.config.prediction_type

    @property
    def betas(self) -> str:
        """16 hex digits of what the schedule is made from, alike on every machine."""
        return store.fingerprint(
            [list(v) if isinstance(v, tuple) else v for v in map(self.scheduler.config.get, BETAS)]
        )[:16]

    @property
    def label(self) -> str:
        """The name, and for a control what of it is random."""
        return self.name + CONTROL_NAMES[self.control]

    def _noise(self, out: Tensor, z: Tensor, timesteps: Tensor) -> Tensor:
        """ε of the network's output: for a v-prediction √ᾱ·v + √(1 − ᾱ)·z (Salimans and Ho 2022, appendix D)."""
        if self.prediction_type == "epsilon":
            return out
        alphas = self.alphas_cumprod
        alpha = alphas[timesteps.to(alphas.device)].to(out).view(-1, 1, 1, 1)
        return alpha.sqrt() * out + (1 - alpha).sqrt() * z.to(out)
