"""zsad_lib.diffusion.noise"""

import hashlib

import torch


def image_noise(ids, purpose, seed, shape):
    """Standard normal noise for each image, float32 [B,*shape] on the CPU.

    Each image draws from its own generator, seeded by (purpose, seed, id): its noise, and so its score, does
    not depend on the batch it came in, on the order, or on a resumed run.
    """
    return torch.stack([torch.randn(shape, generator=_generator(f"{purpose}|{seed}|{i}")) for i in ids])


def _generator(text):
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
    return torch.Generator().manual_seed(seed)


def to_host(tensor):
    """An ordinary float32 copy on the CPU; a tensor made under inference_mode cannot be changed in place."""
    return tensor.to("cpu", torch.float32, copy=True)
