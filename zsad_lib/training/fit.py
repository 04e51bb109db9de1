"""What every training shares: the loop, which resumes where it stopped, and the losses of latent diffusion."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch.optim.swa_utils import AveragedModel
from tqdm.auto import tqdm

from zsad_lib import store
from zsad_lib.data.images import load_images
from zsad_lib.data.readers import Sample
from zsad_lib.errors import TrainingError

Loss = Callable[[torch.nn.Module, torch.Generator], torch.Tensor]  # of a model, on a batch that the generator picks

# --- data -------------------------------------------------------------------------------------------------------


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 [B,H,W,3] -> float32 [B,3,H,W] in [-1,1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def read_pixels(samples: Sequence[Sample], size: int) -> np.ndarray:
    """The images of samples, uint8 [N,size,size,3]."""
    with tqdm(samples, desc="reading", unit="img") as bar:  # which ends before an error is said
        pixels = [(load_images([sample], size) * 255).round().byte() for sample in bar]
    return torch.cat(pixels).permute(0, 2, 3, 1).numpy()


def pick(generator: torch.Generator, count: int, batch: int = 16) -> torch.Tensor:
    """`batch` random indices below `count`; with few images, many small steps learn more than few large ones."""
    return torch.randint(0, count, (batch,), generator=generator)


def begin(folder: Path, *inputs: Any) -> None:
    """Put the states in a work folder that are not of these inputs (arrays, or JSON-able) aside, and say so."""
    parts = [store.digest(part.tobytes()) if isinstance(part, np.ndarray) else part for part in inputs]
    record, key = folder / "inputs.json", store.fingerprint(parts)
    before = str(store.read_json(record)) if record.exists() else ""
    if before == key:
        return
    stale = [*folder.glob("*.pt"), *folder.glob("*.json")]
    if stale:
        aside = folder / f"before-{before[:8]}"
        aside.mkdir(exist_ok=True)
        tqdm.write(
            f"{folder} holds a training on other data, models or options: this one starts anew, that is in {aside}"
        )
    for path in stale:
        path.replace(aside / path.name)
    store.write_json(record, key)


@torch.inference_mode()
def encode_pool(vae: AutoencoderKL, images: np.ndarray, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation [N,C,h,w] of the VAE's posterior of images, uint8 [N,H,W,3]; kept in `folder`."""
    kept = folder / "latents.pt"
    if not kept.exists():
        means, stds = [], []
        for batch in tqdm(np.array_split(images, max(1, len(images) // 64)), desc="encoding", unit="batch"):
            posterior = vae.encode(to_tensor(batch).to(vae.device)).latent_dist
            means.append(posterior.mean.half().cpu())
            stds.append(posterior.std.half().cpu())
        _save(kept, {"mean": torch.cat(means), "std": torch.cat(stds)})
    stored = _load(kept)  # with its memory layout, which the last bits of a training depend on
    return stored["mean"].float(), stored["std"].float()


# --- losses -----------------------------------------------------------------------------------------------------


def vae_loss(vae: AutoencoderKL, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """L1 + squared error + edges + a light KL term, on random half-size crops (the network is convolutional)."""
    size = images.shape[-1] // 2
    top, left = (int(torch.randint(0, size + 1, (), generator=generator)) for _ in range(2))
    x = images[:, :, top : top + size, left : left + size]
    posterior = vae.encode(x).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator).to(x.device)
    y = vae.decode(posterior.mean + posterior.std * noise).sample
    edges = sum(((y - x).diff(dim=d)).abs().mean() for d in (2, 3))
    return (y - x).abs().mean() + (y - x).square().mean() + 0.5 * edges + 1e-5 * posterior.kl().mean()


def denoising_loss(
    predict: Callable, clean: torch.Tensor, alphas_cumprod: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Mean squared error of `predict(noisy, timesteps)` against the noise, at random timesteps."""
    noise = torch.randn(clean.shape, generator=generator).to(clean.device)
    timesteps = torch.randint(0, len(alphas_cumprod), (len(clean),), generator=generator).to(clean.device)
    alpha = alphas_cumprod[timesteps][:, None, None, None]
    noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
    return F.mse_loss(predict(noisy, timesteps).float(), noise)


def latent_loss(
    pool: tuple[torch.Tensor, torch.Tensor], scale: float, alphas_cumprod: torch.Tensor, predictor: Callable
) -> Loss:
    """The denoising loss on latents drawn from `encode_pool`'s posteriors, times the VAE's scaling factor.

    predictor(model, chosen, generator) -> predict(noisy, timesteps), for the images `chosen` (indices [B]).
    """
    mean, std = pool

    def loss(model, generator):
        chosen = pick(generator, len(mean))
        noise = torch.randn(mean[chosen].shape, generator=generator)
        latents = (scale * (mean[chosen] + std[chosen] * noise)).to(alphas_cumprod.device)
        return denoising_loss(predictor(model, chosen, generator), latents, alphas_cumprod, generator)

    return loss


# --- the loop ---------------------------------------------------------------------------------------------------


def fit(
    stage: str,
    model: torch.nn.Module,
    loss_of: Loss,
    folder: Path,
    steps: int,
    learning_rate: float,
    seed: int = 0,
    ema_decay: float = 0.995,
    checkpoint_every: int = 250,
    keep: tuple[int, ...] = (),  # steps after which the EMA is kept besides, as stage-STEP.pt
) -> torch.nn.Module:
    """Minimise `loss_of(model, generator)` by AdamW; returns the exponential moving average (EMA) of the weights.

    The state is kept in folder/stage.pt and picked up again; folder/stage.json holds every step's loss and the seconds
    spent. The generator depends on (seed, step) alone, so that a resumed run repeats an uninterrupted one.
    """
    device, plan, state_file = next(model.parameters()).device, [steps, seed], folder / f"{stage}.pt"
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=1e-2)
    # a short memory at first, or the average of a short run would still hold its random start
    ema = AveragedModel(model, avg_fn=lambda old, new, n: new.lerp(old, min(ema_decay, (1 + int(n)) / (10 + int(n)))))
    warm_up, schedulers = min(100, steps // 10 + 1), torch.optim.lr_scheduler
    rise = schedulers.LinearLR(optimizer, 0.02, 1.0, warm_up)
    fall = schedulers.CosineAnnealingLR(optimizer, max(1, steps - warm_up), learning_rate * 0.02)
    schedule = schedulers.SequentialLR(optimizer, [rise, fall], [warm_up])
    parts = {"model": model, "ema": ema, "optimizer": optimizer, "schedule": schedule}
    start, losses, before = _resume(state_file, parts, plan, device)
    multiplies = device.type == "cuda" or (device.type == "cpu" and torch.cpu._is_avx512_bf16_supported())  # bfloat16
    model.train()
    clock = time.perf_counter()
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=stage, unit="step")
    for step in bar:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        torch.manual_seed(seed * 1_000_003 + step)
        with torch.autocast(device.type, torch.bfloat16, enabled=multiplies):
            loss = loss_of(model, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        ema.update_parameters(model)
        losses.append(round(loss.item(), 5))
        bar.set_postfix(loss=f"{np.mean(losses[-50:]):.4f}")
        if step + 1 in keep:
            _save(folder / f"{stage}-{step + 1}.pt", ema.module.state_dict())
        if (step + 1) % checkpoint_every == 0 or step + 1 == steps:
            seconds = before + time.perf_counter() - clock
            log = {"plan": plan, "step": step + 1, "losses": losses, "seconds": seconds}
            _save(state_file, {key: part.state_dict() for key, part in parts.items()} | log)
            store.write_json(folder / f"{stage}.json", log | {"seconds": round(seconds, 1)})
    return ema.module.eval()


def fit_autoencoder(
    vae: AutoencoderKL, images: np.ndarray, folder: Path, steps: int, seed: int, learning_rate: float
) -> AutoencoderKL:
    """The stage "vae": `vae` trained on images, uint8 [N,H,W,3]."""

    def loss(model, generator):
        return vae_loss(model, to_tensor(images[pick(generator, len(images)).numpy()]).to(vae.device), generator)

    return fit("vae", vae, loss, folder, steps, learning_rate, seed, ema_decay=0.99)


def _resume(path: Path, parts: dict, plan: list[int], device: torch.device) -> tuple[int, list[float], float]:
    """(steps done, their losses, seconds) of a saved state, put into its parts; of no state, zeros."""
    if not path.exists():
        return 0, [], 0.0
    state = _load(path, device)
    if state["plan"] != plan:
        raise TrainingError(
            f"{path} belongs to a run of {state['plan'][0]} steps with seed {state['plan'][1]}; "
            f"this one has {plan[0]} steps with seed {plan[1]}. Delete the folder or choose another."
        )
    for key, part in parts.items():
        part.load_state_dict(state[key])
    return state["step"], state["losses"], state["seconds"]


def _load(path: Path, device: str | torch.device = "cpu") -> dict:
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # a torn file can raise nearly anything
        reason = str(error).strip().split("\n")[0]
        raise TrainingError(f"{path} is damaged ({reason}): delete it, and it is made anew") from error


def _save(path: Path, state: dict) -> None:
    with store.writing(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # of closing what the file has refused
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
