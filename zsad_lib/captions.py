"""Captions: a sentence for an image, by a vision-language model.

Here is the compact captioner of the lite profile: a vision encoder-decoder in transformers' layout. What it says of a
drawing of synthad can be checked word by word, because the drawing's attributes are known (`check`).
"""

from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F

from zsad_lib.backbones import fetch, locate, pick_device, preprocessing, quiet, read_weights

FILES = ("config.json", "generation_config.json", "preprocessor_config.json", "tokenizer_config.json")


@dataclass
class Captioner:
    """Callable: images float32 RGB [B,3,H,W] in [0,1] -> list of B sentences, each word the likeliest one.

    Images are resized to size x size (bilinear, antialiased) and normalised.
    """

    model: Any
    tokenizer: Any
    name: str
    size: int
    mean: tuple
    std: tuple

    @torch.inference_mode()
    def __call__(self, images):
        images = images.to(self.model.device, torch.float32)
        if images.shape[-2:] != (self.size, self.size):
            images = F.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True)
        mean, std = (images.new_tensor(values).view(1, 3, 1, 1) for values in (self.mean, self.std))
        with quiet(bars=False):  # a sentence that ends before the others is padded, and warned of
            tokens = self.model.generate(pixel_values=(images - mean) / std, do_sample=False)
        return self.tokenizer.batch_decode(tokens, skip_special_tokens=True)


def load_captioner(name_or_path, device="auto"):
    """Read a VisionEncoderDecoderModel folder (a checkpoint of data_manifest.yaml, a hub id) as a Captioner.

    BackboneError as for `load_backbone`.
    """
    from transformers import AutoTokenizer, VisionEncoderDecoderModel
    from transformers.utils import cached_file

    where = locate(name_or_path, FILES, "VisionEncoderDecoderModel")
    model = read_weights(where, None, VisionEncoderDecoderModel, dtype=torch.float32)
    model = model.to(pick_device(device)).eval().requires_grad_(False)
    tokenizer = fetch(where, None, AutoTokenizer.from_pretrained)
    size, mean, std = preprocessing(fetch(where, None, cached_file, "preprocessor_config.json"))
    return Captioner(model, tokenizer, where.name, size, mean, std)


def check(said: list[str], truth: list[str]) -> pd.DataFrame:
    """Whether each statement of the true captions was made: columns image (index), attribute, truth, right (bool).

    A caption is statements joined by commas; the first names the category ("An image of a bottle"), the others an
    attribute and its value ("glass green"). ValueError when the lists differ in length.
    """
    rows = []
    for k, (sentence, true) in enumerate(zip(said, truth, strict=True)):
        statements = sentence.split(", ")
        for n, statement in enumerate(true.split(", ")):
            attribute = statement.split(" ")[0] if n else "category"
            rows.append((k, attribute, statement, statement in statements))
    return pd.DataFrame(rows, columns=["image", "attribute", "truth", "right"])
