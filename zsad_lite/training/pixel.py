"""The compact unconditional pixel models: a DDPM of 32 x 32 pixels, on drawings or on a folder of images."""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from zsad_lib.data.datasets import load_dataset
from zsad_lib.errors import TrainingError
from zsad_lib.training.cards import write_card
from zsad_lib.training.fit import begin, denoising_loss, fit, pick, read_pixels, to_tensor
from zsad_lib.training.recipe import Count, Recipe
from zsad_lite.training.pools import draw_pool


def build_pixel_unet() -> UNet2DModel:
    return UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(32, 64, 96),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
        norm_num_groups=16,
    )


@dataclass(frozen=True)
class PixelRecipe(Recipe):
    """An unconditional DDPM."""

    categories: tuple[str, ...] = ()  # to draw
    per_category: Count = 0  # drawings of each
    data: str | Path | None = None  # or a folder of images

    def check(self) -> None:
        if not (self.data or self.categories):
            raise TrainingError("this recipe trains on a folder of images: give it one with --data FOLDER")

    def train(self, out: Path, work: Path, seed: int, device: torch.device) -> None:
        if self.data:
            images = read_pixels(load_dataset("folder", self.data).samples, 32)
            source = f"the images in a folder {'/'.join(Path(self.data).parts[-2:])}"
        else:
            images, _ = draw_pool(work, self.categories, self.per_category, seed, size=32)
            source = f"{self.per_category} drawings of each of {', '.join(self.categories)}"
        begin(work, repr(self), images)
        scheduler = DDPMScheduler()  # the linear schedule of Ho et al.: beta from 1e-4 to 0.02 over 1000 timesteps
        alphas_cumprod = scheduler.alphas_cumprod.to(device)

        def loss(m, generator):
            x = to_tensor(images[pick(generator, len(images)).numpy()])
            mirrored = torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5
            x = torch.where(mirrored, x.flip(3), x).to(device)
            return denoising_loss(lambda z, t: m(z, t).sample, x, alphas_cumprod, generator)

        torch.manual_seed(seed)
        model = fit("unet", build_pixel_unet().to(device), loss, work, self.steps, 1e-3, seed)
        DDPMPipeline(unet=model.half(), scheduler=scheduler).save_pretrained(out)
        write_card(
            out, work, "diffusers",
            "A compact unconditional DDPM for 32 x 32 images, in the layout of google/ddpm-cifar10-32.",
            "Trained for minutes: its samples have the colours and textures of its images, seldom their objects.",
            {"training images": f"{len(images)}: {source}, mirrored at random"},
        )  # fmt: skip
