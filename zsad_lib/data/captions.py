"""Captions: sentences for images, by a vision-language model, and the files they are kept in.

VLMDiff (arXiv 2511.08173) conditions its diffusion model on such captions. A caption file is JSON Lines, a line an
image: id, caption, model, revision, prompt, and bytes, the size of the image file.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from zsad_lib import manifest
from zsad_lib.anomaly.resize import resize
from zsad_lib.data.datasets import AnomalyDataset
from zsad_lib.data.images import read_image
from zsad_lib.diffusion.loading import fetch, locate, pick_device, preprocessing, quiet, read_weights
from zsad_lib.errors import DataError, ModelError, RunError
from zsad_lib.store import append_line, file_name, locked, mend_lines

FILES = ("config.json", "generation_config.json", "preprocessor_config.json", "tokenizer_config.json")

# VLMDiff asks for the main object in detail, for COCO for the whole image, and, as an ablation, as a defect inspector;
# the wording is this project's.
LENGTH = "Write about 60 words, in four or five plain sentences."
PROMPTS = {
    "objects": "Look closely at the main object in this picture and describe it: what it is, its shape and parts, its "
    f"colours, material and surface, and how it lies in the frame. {LENGTH}",
    "scenes": "Describe this picture as a whole: the place, the people and things in it, what they look like, where "
    f"they are and what is going on. {LENGTH}",
    "inspector": "You inspect products for defects. Does anything in this picture look damaged, missing, soiled or out "
    f"of place? Say what it is, where it is, and how a faultless product would look. {LENGTH}",
}
# What a model without a chat template is shown; a kind that is not here gets its image mark, if any, and the prompt.
PLAIN = {
    "blip-2": "Question: {prompt} Answer:",
    "instructblip": "{prompt}",
    "llava": "USER: {mark}\n{prompt} ASSISTANT:",
}


# --- captioners


@dataclass
class Captioner:
    """The compact one: images float32 RGB [B,3,H,W] in [0,1] -> B sentences, each word the likeliest one."""

    model: Any  # VisionEncoderDecoderModel
    tokenizer: Any
    name: str
    size: int  # images are resized to size x size
    mean: tuple
    std: tuple
    revision: str = "unknown"  # of its files: a hub's ("main at COMMIT" where not pinned), or "sha256:" of a folder

    prompted = False  # a prompt that is given changes nothing

    @property
    def config(self) -> dict[str, Any]:
        """JSON-able: what changes the sentences."""
        scale = {"size": self.size, "mean": list(self.mean), "std": list(self.std)}
        return {"name": self.name, "revision": self.revision} | scale

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor, prompt: str | None = None) -> list[str]:
        images = resize(images.to(self.model.device, torch.float32), self.size)
        mean, std = (images.new_tensor(values).view(1, 3, 1, 1) for values in (self.mean, self.std))
        with quiet(bars=False):  # a sentence that ends before the others is padded, and warned of
            tokens = self.model.generate(pixel_values=(images - mean) / std, do_sample=False)
        return self.tokenizer.batch_decode(tokens, skip_special_tokens=True)


@dataclass
class PromptedCaptioner:
    """Images [3,H,W] in [0,1] of any size, and a prompt -> B captions, each token the likeliest one."""

    model: Any  # of transformers' AutoModelForImageTextToText
    processor: Any  # resizes and normalises; pads shorter inputs of a batch on the left
    name: str
    revision: str = "unknown"
    new_tokens: int = 100  # at most: about 60 words of English, with some to spare

    prompted = True
    size = None  # every image at its own

    @property
    def config(self) -> dict[str, Any]:
        """JSON-able: what changes the captions."""
        asked = {"new_tokens": self.new_tokens, "prompt": PROMPTS["objects"]}
        return {"name": self.name, "revision": self.revision} | asked

    @torch.inference_mode()
    def __call__(self, images: Sequence[torch.Tensor], prompt: str = PROMPTS["objects"]) -> list[str]:
        inputs = self.inputs(images, prompt).to(self.model.device, self.model.dtype)
        with quiet(bars=False):
            tokens = self.model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=self.new_tokens)
        asked = inputs.get("input_ids", tokens[:, :0])
        if torch.equal(tokens[:, : asked.shape[1]], asked):  # some models return the prompt as well, others do not
            tokens = tokens[:, asked.shape[1] :]
        return [text.strip() for text in self.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    def inputs(self, images: Sequence[torch.Tensor], prompt: str) -> Any:
        """What the model is given: input_ids [B,L], attention_mask [B,L], its kind of pixels."""
        pictures = [_picture(image) for image in images]
        if not self.processor.chat_template:
            mark = str(getattr(self.processor, "image_token", None) or "")
            plain = PLAIN.get(self.model.config.model_type, "{mark}\n{prompt}" if mark else "{prompt}")
            text = [plain.format(mark=mark, prompt=prompt)] * len(pictures)
            return self.processor(images=pictures, text=text, padding=True, return_tensors="pt")
        question = {"type": "text", "text": prompt}
        chats = [[{"role": "user", "content": [{"type": "image", "image": one}, question]}] for one in pictures]
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        return self.processor.apply_chat_template(chats, **options, processor_kwargs={"padding": True})


def _picture(image):
    """float [3,H,W] in [0,1] -> PIL image: the one form that every processor takes and scales alike."""
    return Image.fromarray((image * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())


def load_captioner(
    name_or_path: Path | str, device: str = "auto", revision: str | None = None
) -> Captioner | PromptedCaptioner:
    """A captioner from a folder, a checkpoint of data_manifest.yaml, or the hub id of an image-text-to-text model.

    revision: a branch, tag or commit of the hub; default the manifest's, else "main". Its own code is never run.
    """
    from transformers import PreTrainedConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as known

    where = locate(name_or_path, ("config.json",), "captioner")
    if where.local and revision:
        raise ModelError(f"{where.source} is a folder and has no revision {revision!r}: leave --revision out")
    where.revision = revision or where.revision
    config, _ = fetch(where, None, PreTrainedConfig.get_config_dict)
    kind = config.get("model_type")
    if kind not in known:
        own = "images: it brings its own Python code, and that is never run here" if "auto_map" in config else "images"
        raise ModelError(
            f"{where.name} is a {kind!r} model, which transformers does not know as one that describes {own}. "
            "Take a model in transformers' own layout (of InternVL: the variants whose names end in -hf)"
        )
    load = _load_compact if kind == "vision-encoder-decoder" else _load_prompted
    return load(where, pick_device(device), _pin(where))


def _pin(where):
    """What to record as the revision; a hub id is fixed to the commit that its config.json came from."""
    from transformers.utils.hub import cached_file, extract_commit_hash

    if where.local:
        return f"sha256:{manifest.folder_hash(where.source)}"
    asked, path = where.revision or "main", fetch(where, None, cached_file, "config.json")
    where.revision = extract_commit_hash(str(path), None) or asked
    return asked if where.revision == asked else f"{asked} at {where.revision}"


def _load_compact(where, device, revision):
    from transformers import AutoTokenizer, VisionEncoderDecoderModel
    from transformers.utils import cached_file

    locate(where.source, FILES, "VisionEncoderDecoderModel")
    model = read_weights(where, None, VisionEncoderDecoderModel, dtype=torch.float32)
    tokenizer = fetch(where, None, AutoTokenizer.from_pretrained, trust_remote_code=False)
    size, mean, std = preprocessing(fetch(where, None, cached_file, "preprocessor_config.json"))
    model = model.to(device).eval().requires_grad_(False)
    return Captioner(model, tokenizer, where.name, size, mean, std, revision)


def _load_prompted(where, device, revision):
    from transformers import AutoModelForImageTextToText

    # in the precision of its files
    options = {"dtype": "auto" if device.type == "cuda" else torch.float32, "trust_remote_code": False}
    model = read_weights(where, None, AutoModelForImageTextToText, heads=True, **options)
    processor = _read_processor(where, model.config.model_type)
    return PromptedCaptioner(model.to(device).eval().requires_grad_(False), processor, where.name, revision)


def _read_processor(where, kind):
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    loader = transformers.AutoProcessor
    cls = getattr(transformers, PROCESSOR_MAPPING_NAMES.get(kind) or "", None)
    if cls is not None and "video_processor" in cls.get_attributes():
        # the video part of InternVL's and Qwen's processors needs torchvision, and nothing here is a video
        parts = [name for name in cls.get_attributes() if name != "video_processor"]
        loader = type(cls.__name__, (cls,), {"get_attributes": classmethod(lambda _: parts)})
    processor = fetch(where, None, loader.from_pretrained, trust_remote_code=False)
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None:
        raise ModelError(f"{where.name} has no processor for images and text: a {kind!r} model takes no prompt")
    tokenizer.padding_side = "left"  # every sequence goes on from its own last token
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return processor


# --- caption files

BEGINNING = b'{"id": "'  # of a line, so also of one that a kill tore


def caption_path(dataset: str, model: str, kind: str = "objects", out: Path | str = "runs/captions") -> Path:
    """Where `zsad caption` keeps its captions: out/DATASET-MODEL-KIND.jsonl."""
    return Path(out) / f"{file_name(f'{dataset}-{model}-{kind}')}.jsonl"


def caption_dataset(
    dataset: AnomalyDataset,
    captioner: Captioner | PromptedCaptioner,
    path: Path | str,
    prompt: str | None = None,  # by default PROMPTS["objects"]; null in the file of a captioner that takes none
    batch_size: int = 8,
    progress: bool = True,
    overwrite: bool = False,  # start the file anew; one that holds no captions stays as it is
) -> dict[str, str]:
    """Describe the images of a dataset into the caption file `path`; {image id: caption} in the dataset's order.

    What is in the file is not described again: a killed run goes on, and other selections of a dataset add to it. An
    image that stands in the dataset under several ids (COCO-AD's splits) is described once.
    """
    if batch_size < 1:
        raise DataError(f"batch_size must be 1 or more, not {batch_size}")
    path, asked = Path(path), PROMPTS["objects"] if prompt is None else prompt
    stamp = {"model": captioner.name, "revision": captioner.revision}
    stamp["prompt"] = asked if captioner.prompted else None
    with locked(path.with_name(f".{path.name}.lock"), str(path)):
        _check_kind(path)
        if overwrite:
            path.unlink(missing_ok=True)
        said = _described(path, stamp, dataset)
        known = {sample.image_path: said[sample.id] for sample in dataset.samples if sample.id in said}
        todo = defaultdict(list)
        for sample in dataset.samples:
            if sample.id not in said:
                todo[sample.image_path].append(sample.id)
        images, counts = list(todo), {"total": len(dataset), "initial": len(said), "unit": "img"}
        with open(path, "ab") as file, tqdm(desc=path.stem, disable=not progress, **counts) as bar:
            for first in range(0, len(images), batch_size):
                chunk = images[first : first + batch_size]
                known |= _describe(captioner, [image for image in chunk if image not in known], stamp["prompt"])
                for image, name in ((one, name) for one in chunk for name in todo[one]):
                    said[name] = known[image]
                    append_line(file, {"id": name, "caption": said[name], **stamp, "bytes": image.stat().st_size})
                    bar.update()
    return {sample.id: said[sample.id] for sample in dataset.samples}


def read_captions(path: Path | str) -> dict[str, str]:
    """{image id: caption} of a caption file."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"no caption file at {path}: `zsad caption` writes them")
    said = {name: line["caption"] for name, line in _lines(path).items()}
    if not said:
        raise DataError(f"{path} holds no caption: run `zsad caption` again")
    return said


def captions_of_next_category(dataset: AnomalyDataset, said: dict[str, str]) -> dict[str, str]:
    """{image id: the caption of an image of the next category}, the last category's from the first: all wrong.

    The k-th image of a category gets that of the next one's k-th, or, where there are fewer, starts over.
    """
    names = dataset.categories
    if len(names) < 2:
        raise DataError(f"captions are exchanged between categories, and {dataset.name} has one here")
    ids = {name: [sample.id for sample in dataset.samples if sample.category == name] for name in names}
    pairs = zip(names, [*names[1:], names[0]], strict=True)
    return {one: said[other] for name, following in pairs for one, other in zip(ids[name], cycle(ids[following]))}


def _describe(captioner, paths, prompt):
    """{image path: caption}; images at the captioner's size, or each at its own."""
    if not paths:
        return {}
    images = [read_image(path, captioner.size) for path in paths]
    said = captioner(images if captioner.size is None else torch.stack(images), prompt)
    if len(said) != len(paths):
        raise DataError(f"captioner {captioner.name} gave {len(said)} captions for {len(paths)} images")
    return dict(zip(paths, said, strict=True))


def _described(path, stamp, dataset):
    """{id: caption} of the dataset's images that the file has, once it is known to be of this run."""
    if not path.exists():
        return {}
    lines, anew = _lines(path, torn=True), "choose another --out, or start the file anew with --overwrite"
    for n, line in enumerate(lines.values(), 1):
        for key, value in stamp.items():
            if line.get(key) != value:
                raise DataError(f"line {n} of {path} has {key} {line.get(key)!r}, not {value!r}: {anew}")
    images = {sample.id: sample.image_path for sample in dataset.samples if sample.id in lines}
    for name, image in images.items():
        if lines[name].get("bytes") != image.stat().st_size:
            raise DataError(f"{image} is not the image that {path} has described as {name}: {anew}")
    mend_lines(path)
    return {name: lines[name]["caption"] for name in images}


def _check_kind(path):
    """DataError where a file does not begin as a caption file does."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        first = file.readline()
    if not (_is_torn(first) or _is_caption(_parsed(first))):
        raise DataError(f"{path} is no caption file and stays as it is: choose another --out")


def _lines(path, torn=False):
    """{image id: its line} of a caption file, in order; a `torn` last line may be left out."""
    lines, texts = {}, path.read_bytes().split(b"\n")
    if not texts[-1] or (torn and _is_torn(texts[-1])):
        texts.pop()
    for n, text in enumerate(texts, 1):
        line = _parsed(text)
        if not isinstance(line, dict):
            raise RunError(f"line {n} of {path} is torn or no record: start the file anew with --overwrite")
        if not _is_caption(line):
            raise DataError(f"line {n} of {path} is no caption: start the file anew with --overwrite")
        if line["id"] in lines:
            raise DataError(f"line {n} of {path} describes {line['id']} a second time: remove it")
        lines[line["id"]] = line
    return lines


def _is_torn(text):
    return BEGINNING.startswith(text[: len(BEGINNING)]) and not text.endswith(b"\n") and _parsed(text) is None


def _is_caption(line):
    return isinstance(line, dict) and all(isinstance(line.get(key), str) for key in ("id", "caption"))


def _parsed(text):
    """What a line of JSON holds; None where it is none."""
    try:
        return json.loads(text)
    except RecursionError:  # nested too deeply to be read, and to be a caption
        return {}
    except ValueError:
        return None
