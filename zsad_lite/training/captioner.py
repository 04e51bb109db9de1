"""The compact captioner: it says a drawing's category and the attributes it was drawn with."""

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    GPT2Config,
    PreTrainedTokenizerFast,
    SwinConfig,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
)

from zsad_lib.settings import Positive
from zsad_lib.training.cards import write_card
from zsad_lib.training.fit import begin, fit, pick, to_tensor
from zsad_lib.training.recipe import Recipe
from zsad_lite.training.features import write_preprocessor
from zsad_lite.training.pipeline import MAX_TOKENS
from zsad_lite.training.pools import draw_pool


def build_word_tokenizer(captions: list[str]) -> PreTrainedTokenizerFast:
    """One token a word, its comma included; decoding gives the sentence back with its spaces."""
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.WordLevelTrainer(special_tokens=[*special.values()], show_progress=False)
    words.train_from_iterator(captions, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=MAX_TOKENS, **special)


def build_captioner(tokenizer: PreTrainedTokenizerFast) -> VisionEncoderDecoderModel:
    encoder = SwinConfig(
        image_size=64, patch_size=4, embed_dim=32, depths=[2, 2, 2], num_heads=[2, 4, 8], window_size=4
    )
    ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    decoder = GPT2Config(vocab_size=len(tokenizer), n_positions=MAX_TOKENS, n_embd=128, n_layer=2, n_head=4, **ids)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = tokenizer.bos_token_id, tokenizer.pad_token_id
    model = VisionEncoderDecoderModel(config=config)
    start = {"decoder_start_token_id": tokenizer.bos_token_id, "max_length": MAX_TOKENS}
    model.generation_config = GenerationConfig(**ids, **start)
    return model


@dataclass(frozen=True)
class CaptionerRecipe(Recipe):
    """A vision encoder-decoder that writes a drawing's caption."""

    categories: tuple[str, ...]
    per_category: Positive  # drawings of each

    def train(self, out: Path, work: Path, seed: int, device: torch.device) -> None:
        images, captions = draw_pool(work, self.categories, self.per_category, seed)
        begin(work, repr(self), images, captions)
        tokenizer = build_word_tokenizer(captions)
        ids = tokenizer([c + tokenizer.eos_token for c in captions], padding=True, return_tensors="pt").input_ids
        labels = ids.masked_fill(ids == tokenizer.pad_token_id, -100)  # -100: left out of the loss

        def loss(m, generator):
            chosen = pick(generator, len(images), 32)
            return m(pixel_values=to_tensor(images[chosen.numpy()]).to(device), labels=labels[chosen].to(device)).loss

        torch.manual_seed(seed)
        model = fit("captioner", build_captioner(tokenizer).to(device), loss, work, self.steps, 1e-3, seed)
        model.half().save_pretrained(out)
        tokenizer.save_pretrained(out)
        write_preprocessor(out, 64)
        write_card(
            out, work, "transformers",
            "A compact captioner: it looks at a 64 x 64 image and writes a sentence with the category and the "
            "attributes it sees, such as \"An image of a bottle, glass green, label cream\".",
            "Its words are those of synthad. Shown anything else, it still says one of twelve categories. It was never "
            "shown a defect and has no word for one.",
            {"training images": f"{len(images)}: {self.per_category} drawings of each of {', '.join(self.categories)}"},
        )  # fmt: skip
