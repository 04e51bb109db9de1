"""Vision-language models of a few thousand random weights, saved in transformers' layout: for the plumbing alone."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SIDE = {"height": 16, "width": 16}
TEMPLATE = (
    "{% for message in messages %}USER: {% for part in message.content %}"
    "{% if part.type == 'image' %}MARK{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %} BOT:"
)


def letters(**marks):
    """A tokenizer with a token for each ASCII character, and the special `marks` (name: text)."""
    from transformers import PreTrainedTokenizerFast

    characters = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]  # how a byte-level one writes space and newline
    tokenizer = Tokenizer(models.BPE({letter: n for n, letter in enumerate(characters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, extra_special_tokens=marks)


def ids(tokenizer):
    return {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}


def text_of(tokenizer, **options):
    return {**SMALL, "num_key_value_heads": 2, "vocab_size": len(tokenizer), **ids(tokenizer), **options}


def save(model, folder, seed=0):
    """Weights larger than the libraries' own, so that images and prompts make a difference."""
    generator = torch.Generator().manual_seed(seed)
    for weights in model.parameters():
        weights.data.copy_(0.4 * torch.randn(weights.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


def save_llava(folder, template=TEMPLATE, seed=0):
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = letters(image_token="<image>")
    vision = CLIPVisionConfig(**SMALL | {"num_hidden_layers": 2}, image_size=16, patch_size=8)
    text, mark = LlamaConfig(**text_of(tokenizer)), tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=mark)
    sizes = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    template = template and template.replace("MARK", "<image>")
    images = CLIPImageProcessorPil(size=SIDE, crop_size=SIDE)
    LlavaProcessor(images, tokenizer, chat_template=template, **sizes).save_pretrained(folder)
    return save(LlavaForConditionalGeneration(config), folder, seed)


def save_blip2(folder, decoder_only=True):
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2Processor,
        Blip2QFormerConfig,
        Blip2VisionConfig,
        OPTConfig,
        T5Config,
    )
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    processor = Blip2Processor(BlipImageProcessorPil(size=SIDE), letters(), num_query_tokens=4)  # adds its mark
    processor.save_pretrained(folder)
    tokenizer = processor.tokenizer
    words = {"vocab_size": len(tokenizer), **ids(tokenizer)}
    if decoder_only:
        text = OPTConfig(**SMALL, **words, ffn_dim=16, word_embed_proj_dim=16, max_position_embeddings=512)
    else:
        start = tokenizer.pad_token_id
        text = T5Config(**words, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=start)
    parts = {
        "vision_config": Blip2VisionConfig(**SMALL, image_size=16, patch_size=8),
        "qformer_config": Blip2QFormerConfig(**SMALL, vocab_size=len(tokenizer), encoder_hidden_size=16),
        "text_config": text,
    }
    mark = tokenizer.convert_tokens_to_ids("<image>")
    config = Blip2Config(**parts, num_query_tokens=4, image_token_index=mark)
    return save(Blip2ForConditionalGeneration(config), folder)


def save_qwen(folder):
    """Its processor has a part for videos, and as many image tokens as the image is large."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    names = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    names |= {"vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>"}
    tokenizer = letters(**{f"{name}_token": mark for name, mark in names.items()})
    marks = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(mark) for name, mark in names.items()}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4, "mlp_ratio": 1}
    config = Qwen2VLConfig(text_config=text_of(tokenizer, rope_parameters=rope), vision_config=vision, **marks)
    images = Qwen2VLImageProcessorPil(patch_size=4, size={"shortest_edge": 64, "longest_edge": 1024})
    images.save_pretrained(folder)
    tokenizer.chat_template = TEMPLATE.replace("MARK", "<|vision_start|><|image_pad|><|vision_end|>")
    tokenizer.save_pretrained(folder)
    return save(Qwen2VLForConditionalGeneration(config), folder)


def save_internvl(folder):
    from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen2Config
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    names = {"start_image": "<img>", "end_image": "</img>", "context_image": "<IMG_CONTEXT>", "video": "<video>"}
    tokenizer = letters(**{f"{name}_token": mark for name, mark in names.items()})
    vision = InternVLVisionConfig(**SMALL, image_size=[16, 16], patch_size=[4, 4])
    config = InternVLConfig(
        vision_config=vision,
        text_config=Qwen2Config(**text_of(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
    )
    GotOcr2ImageProcessorPil(size=SIDE, max_patches=2).save_pretrained(folder)
    tokenizer.chat_template = TEMPLATE.replace("MARK", "<IMG_CONTEXT>")
    tokenizer.save_pretrained(folder)
    (folder / "processor_config.json").write_text('{"image_seq_length": 4, "processor_class": "InternVLProcessor"}')
    return save(InternVLForConditionalGeneration(config), folder)
