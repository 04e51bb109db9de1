"""What every training shares: images drawn on the fly, the loop, the model card.

One loop (`fit`) serves every model: AdamW, cosine learning rate, an exponential moving average (EMA), atomic
checkpoints, and a random generator that depends on (seed, step) alone, so a resumed run repeats an uninterrupted
one.
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel
from tqdm.auto import tqdm

from zsad_lib.errors import TrainingError

# --- data -------------------------------------------------------------------------------------------------------


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1.0


@torch.inference_mode()
def encode_pool(vae, images: np.ndarray, folder: Path, device) -> tuple[torch.Tensor, torch.Tensor]:
    """The VAE posterior's mean and standard deviation of every training image, kept in ``folder``."""
    target = folder / "latents.pt"
    if not target.exists():
        means, stds = [], []
        for batch in tqdm(np.array_split(images, max(1, len(images) // 64)), desc="encoding", unit="batch"):
            posterior = vae.encode(to_tensor(batch).to(device)).latent_dist
            means.append(posterior.mean.half().cpu())
            stds.append(posterior.std.half().cpu())
        save_state(target, {"mean": torch.cat(means), "std": torch.cat(stds)})
    stored = torch.load(target, weights_only=True)
    return stored["mean"].float(), stored["std"].float()


def vae_loss(vae, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """L1 + squared error + edges + a light KL term, on random half-size crops (the network is convolutional)."""
    size = images.shape[-1] // 2
    top, left = (int(torch.randint(0, size + 1, (), generator=generator)) for _ in range(2))
    x = images[:, :, top : top + size, left : left + size]
    posterior = vae.encode(x).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator).to(x.device)
    y = vae.decode(posterior.mean + posterior.std * noise).sample
    edges = sum(((y - x).diff(dim=d)).abs().mean() for d in (2, 3))
    return (y - x).abs().mean() + (y - x).square().mean() + 0.5 * edges + 1e-5 * posterior.kl().mean()


def denoising_loss(predict, clean, alphas_cumprod, generator) -> torch.Tensor:
    """Mean squared error of ``predict(noisy, timesteps)`` against the noise, at random timesteps."""
    noise = torch.randn(clean.shape, generator=generator).to(clean.device)
    timesteps = torch.randint(0, len(alphas_cumprod), (len(clean),), generator=generator).to(clean.device)
    alpha = alphas_cumprod[timesteps][:, None, None, None]
    noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
    return F.mse_loss(predict(noisy, timesteps).float(), noise)


# --- the loop ---------------------------------------------------------------------------------------------------


def write_json(path: Path, value) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1))
    os.replace(temporary, path)


def save_state(path: Path, state: dict) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def fit(
    stage: str,
    model: torch.nn.Module,
    loss_of: Callable[[torch.nn.Module, torch.Generator], torch.Tensor],
    folder: Path,
    steps: int,
    learning_rate: float,
    seed: int = 0,
    ema_decay: float = 0.995,
    checkpoint_every: int = 250,
    keep: tuple[int, ...] = (),
) -> torch.nn.Module:
    """Minimise ``loss_of(model, generator)`` and return the EMA of ``model``.

    The state is kept in ``folder/stage.pt`` and picked up again when it exists; ``folder/stage.json`` holds the
    loss of every step and the seconds spent. keep: steps after which the EMA is kept besides, as ``stage-STEP.pt``.
    bfloat16 autocast where the device multiplies in it.
    """
    device = next(model.parameters()).device
    # a short memory at first, or the average of a short run would still hold its random start
    ema = AveragedModel(model, avg_fn=lambda old, new, n: new.lerp(old, min(ema_decay, (1 + int(n)) / (10 + int(n)))))
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=1e-2)
    warmup = min(100, steps // 10 + 1)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.02, 1.0, warmup),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - warmup), learning_rate * 0.02),
        ],
        [warmup],
    )
    state_file, start, losses, seconds = folder / f"{stage}.pt", 0, [], 0.0
    parts = {"model": model, "ema": ema, "optimizer": optimizer, "schedule": schedule}
    if state_file.exists():
        state = torch.load(state_file, map_location=device, weights_only=True)
        if state["plan"] != [steps, seed]:
            raise TrainingError(
                f"{state_file} belongs to a run of {state['plan'][0]} steps with seed {state['plan'][1]}; "
                f"this one has {steps} steps with seed {seed}. Delete the folder or choose another."
            )
        for key, part in parts.items():
            part.load_state_dict(state[key])
        start, losses, seconds = state["step"], state["losses"], state["seconds"]
    model.train()
    clock = time.perf_counter()
    with tqdm(total=steps, initial=start, desc=stage, unit="step") as bar:
        for step in range(start, steps):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
            torch.manual_seed(seed * 1_000_003 + step)
            with torch.autocast(device.type, torch.bfloat16, enabled=_has_bfloat16(device)):
                loss = loss_of(model, generator)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            ema.update_parameters(model)
            losses.append(round(loss.item(), 5))
            bar.update()
            bar.set_postfix(loss=f"{np.mean(losses[-50:]):.4f}")
            if step + 1 in keep:
                save_state(folder / f"{stage}-{step + 1}.pt", ema.module.state_dict())
            if (step + 1) % checkpoint_every == 0 or step + 1 == steps:
                spent = seconds + time.perf_counter() - clock
                state = {key: part.state_dict() for key, part in parts.items()}
                plan = {"plan": [steps, seed], "step": step + 1, "losses": losses, "seconds": spent}
                save_state(state_file, {**state, **plan})
                write_json(folder / f"{stage}.json", {**plan, "seconds": round(spent, 1)})
    return ema.module.eval()


def _has_bfloat16(device: torch.device) -> bool:
    return device.type == "cuda" or (device.type == "cpu" and torch.cpu._is_avx512_bf16_supported())


def pick(generator: torch.Generator, count: int, batch: int) -> torch.Tensor:
    return torch.randint(0, count, (batch,), generator=generator)


# --- model cards --------------------------------------------------------------------------------------------------
