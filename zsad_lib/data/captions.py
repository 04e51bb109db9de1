"""Captions: sentences for images, by a vision-language model, and the files they are kept in.

A captioner is the compact one of the lite profile (a vision encoder-decoder in transformers' layout) or any
image-text-to-text model of transformers, which also takes a prompt. What the compact one says of a drawing of synthad
can be checked word by word, because the drawing's attributes are known (`check`).

A caption file is JSON Lines, a line an image: id, caption, model, revision, prompt, and bytes, the size of the image
file. VLMDiff (arXiv 2511.08173) conditions its diffusion model on such captions.
"""

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm.auto import tqdm

from zsad_lib import manifest
from zsad_lib.data.datasets import AnomalyDataset
from zsad_lib.data.images import load_images, read_image
from zsad_lib.diffusion.loading import fetch, locate, pick_device, preprocessing, quiet, read_weights
from zsad_lib.errors import DataError

FILES = ("config.json", "generation_config.json", "preprocessor_config.json", "tokenizer_config.json")
COMPACT = "vision-encoder-decoder"
NEW_TOKENS = 100  # about 60 words of English, with some to spare
STAMP = ("model", "revision", "prompt")  # of a line: the same all through a file

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


# ----------------------------------------------------------------------------------------------- captioners


@dataclass
class Captioner:
    """Callable: images float32 RGB [B,3,H,W] in [0,1] -> list of B sentences, each word the likeliest one.

    Images are resized to size x size (bilinear, antialiased) and normalised. It takes no prompt (`prompted`): one that
    is given changes nothing. `revision`: of its files, see `load_captioner`.
    """

    model: Any
    tokenizer: Any
    name: str
    size: int
    mean: tuple
    std: tuple
    revision: str = "unknown"

    prompted = False

    @torch.inference_mode()
    def __call__(self, images, prompt=None):
        images = images.to(self.model.device, torch.float32)
        if images.shape[-2:] != (self.size, self.size):
            images = F.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True)
        mean, std = (images.new_tensor(values).view(1, 3, 1, 1) for values in (self.mean, self.std))
        with quiet(bars=False):  # a sentence that ends before the others is padded, and warned of
            tokens = self.model.generate(pixel_values=(images - mean) / std, do_sample=False)
        return self.tokenizer.batch_decode(tokens, skip_special_tokens=True)


@dataclass
class PromptedCaptioner:
    """Callable: images and a prompt -> list of B captions, each token the likeliest one, at most `new_tokens` of them.

    Images: float32 RGB in [0,1], a tensor [B,3,H,W] or a list of B tensors [3,H,W] of any size; the model's own
    processor resizes and normalises them. The prompt goes through the processor's chat template, or where there is none
    the way of `PLAIN`. Shorter inputs of a batch are padded on the left.
    """

    model: Any
    processor: Any
    name: str
    revision: str = "unknown"
    new_tokens: int = NEW_TOKENS

    prompted = True
    size = None  # every image at its own

    @torch.inference_mode()
    def __call__(self, images, prompt=PROMPTS["objects"]):
        inputs = self.inputs([_picture(image) for image in images], prompt)
        inputs = inputs.to(self.model.device, self.model.dtype)
        steps = _Steps()
        with quiet(bars=False):
            tokens = self.model.generate(
                **inputs, do_sample=False, num_beams=1, max_new_tokens=self.new_tokens, logits_processor=[steps]
            )
        said = tokens[:, -steps.taken :]  # some models return the prompt before it, others do not
        return [text.strip() for text in self.processor.tokenizer.batch_decode(said, skip_special_tokens=True)]

    def inputs(self, pictures, prompt):
        """What the model is given for B PIL `pictures`: input_ids [B,L], attention_mask [B,L], its kind of pixels."""
        if not self.processor.chat_template:
            mark = getattr(self.processor, "image_token", None) or ""
            mark = getattr(mark, "content", mark)  # a token, or its text
            plain = PLAIN.get(self.model.config.model_type, "{mark}\n{prompt}" if mark else "{prompt}")
            text = [plain.format(mark=mark, prompt=prompt)] * len(pictures)
            return self.processor(images=pictures, text=text, padding=True, return_tensors="pt")
        question = {"type": "text", "text": prompt}
        chats = [[{"role": "user", "content": [{"type": "image", "image": one}, question]}] for one in pictures]
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        return self.processor.apply_chat_template(chats, **options, processor_kwargs={"padding": True})


class _Steps:
    """A logits processor that changes nothing and counts the tokens that were generated."""

    taken = 0

    def __call__(self, input_ids, scores):
        self.taken += 1
        return scores


def _picture(image):
    """float [3,H,W] in [0,1] -> PIL image: the one form that every processor takes and scales alike."""
    return Image.fromarray((image * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())


def load_captioner(name_or_path, device="auto", revision=None):
    """Read a captioner: a Captioner from a VisionEncoderDecoderModel, else a PromptedCaptioner.

    `name_or_path`: a local folder, a checkpoint of data_manifest.yaml, or the hub id of an image-text-to-text model of
    transformers (InternVL, Qwen-VL, BLIP-2, LLaVA, ...). On CUDA in the precision of its files, elsewhere in float32.
    Code that comes with a model is never run (trust_remote_code is False).
    `revision`: a branch, tag or commit of the hub, by default the manifest's, else "main". The captioner's `revision`
    is the pinned one, "main at <commit>" for an unpinned one, and "sha256:<manifest.folder_hash>" for a folder.
    DataError: a model of another kind, or one that needs its own code. ModelError as for `load_backbone`.
    """
    from transformers import AutoTokenizer, VisionEncoderDecoderModel
    from transformers.utils import cached_file

    where = locate(name_or_path, ("config.json",), "captioner")
    if where.local and revision:
        raise DataError(f"{where.source} is a folder and has no revision {revision!r}: leave --revision out")
    where.revision = revision or where.revision
    path = fetch(where, None, cached_file, "config.json")
    kind, revision = _kind(where, path), _pin(where, path)
    if kind != COMPACT:
        return _load_prompted(where, kind, device, revision)
    locate(name_or_path, FILES, "VisionEncoderDecoderModel")
    model = read_weights(where, None, VisionEncoderDecoderModel, dtype=torch.float32)
    model = model.to(pick_device(device)).eval().requires_grad_(False)
    tokenizer = fetch(where, None, AutoTokenizer.from_pretrained, trust_remote_code=False)
    size, mean, std = preprocessing(fetch(where, None, cached_file, "preprocessor_config.json"))
    return Captioner(model, tokenizer, where.name, size, mean, std, revision)


def _kind(where, path):
    """The model_type of a config.json, once it is known to be a captioner's."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as known

    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{where.source}/config.json is not JSON ({error}): restore it") from error
    if config.get("model_type") in known:
        return config["model_type"]
    own = "auto_map" in config
    raise DataError(
        f"{where.name} is a {config.get('model_type')!r} model, which transformers does not know as one that describes "
        + ("images: it brings its own Python code, and that is never run here. " if own else "images. ")
        + "Take a model in transformers' own layout (of InternVL: the variants whose names end in -hf)"
    )


def _pin(where, path):
    """What to record as the revision; a hub id is fixed to the commit that its config.json came from."""
    from transformers.utils.hub import extract_commit_hash

    if where.local:
        return f"sha256:{manifest.folder_hash(where.source)}"
    asked, commit = where.revision or "main", extract_commit_hash(str(path), None)
    where.revision = commit or asked
    return asked if commit in (None, asked) else f"{asked} at {commit}"


def _load_prompted(where, kind, device, revision):
    from transformers import AutoModelForImageTextToText

    device, processor = pick_device(device), _read_processor(where, kind)
    dtype = "auto" if device.type == "cuda" else torch.float32
    options = {"dtype": dtype, "trust_remote_code": False}
    model = read_weights(where, None, AutoModelForImageTextToText, heads=True, **options)
    return PromptedCaptioner(model.to(device).eval().requires_grad_(False), processor, where.name, revision)


def _read_processor(where, kind):
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    cls = getattr(transformers, PROCESSOR_MAPPING_NAMES.get(kind) or "", None)
    if cls is not None and "video_processor" in cls.get_attributes():
        # the video part of InternVL's and Qwen's processors needs torchvision, and nothing here is a video
        parts = [name for name in cls.get_attributes() if name != "video_processor"]
        loader = type(cls.__name__, (cls,), {"get_attributes": classmethod(lambda _: parts)})
    else:
        loader = transformers.AutoProcessor
    processor = fetch(where, None, loader.from_pretrained, trust_remote_code=False)
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None:
        raise DataError(f"{where.name} has no processor for images and text: a {kind!r} model takes no prompt")
    tokenizer.padding_side = "left"  # every sequence goes on from its own last token
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return processor


# -------------------------------------------------------------------------------------------- caption files


def caption_path(dataset: str, model: str, kind: str = "objects", out: Path | str = "runs/captions") -> Path:
    """Where `zsad caption` keeps its captions: out/DATASET-MODEL-KIND.jsonl."""
    return Path(out) / (re.sub(r"[^\w.+-]+", "_", f"{dataset}-{model}-{kind}") + ".jsonl")


def caption_dataset(
    dataset: AnomalyDataset,
    captioner: Captioner | PromptedCaptioner,
    path: Path | str,
    prompt: str | None = None,
    batch_size: int = 8,
    progress: bool = True,
    overwrite: bool = False,
) -> dict[str, str]:
    """Describe the images of `dataset` into the caption file `path`; {id: caption} of them, in the dataset's order.

    `prompt`: by default PROMPTS["objects"]; a captioner that takes none is not given it, and the file says null. Every
    line is flushed to disk before the next one is written, and what is in the file is not described again: a run that
    was killed and started again ends with one line an image. Other selections of a dataset add to the same file. An
    image file that stands in the dataset under several ids (COCO-AD's splits) is described once. `overwrite` starts
    anew.

    Raises DataError: a file by another model, revision or prompt, a damaged one, one whose images have changed,
    another process at work on it; DataError: an unreadable image.
    """
    if batch_size < 1:
        raise DataError(f"batch_size must be 1 or more, not {batch_size}")
    path = Path(path)
    stamp = {"model": captioner.name, "revision": captioner.revision}
    stamp["prompt"] = (PROMPTS["objects"] if prompt is None else prompt) if captioner.prompted else None
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        held = filelock.FileLock(path.with_name(f".{path.name}.lock"), timeout=0).acquire()
    except filelock.Timeout:
        raise DataError(f"another process is writing {path}: wait, or choose another --out") from None
    with held:
        if overwrite:
            path.unlink(missing_ok=True)
        said = _done(path, stamp, dataset)
        said |= _fill(path, stamp, dataset, said, captioner, batch_size, progress)
    return {sample.id: said[sample.id] for sample in dataset.samples}


def read_captions(path: Path | str) -> dict[str, str]:
    """{image id: caption} of a caption file. Raises DataError when it is missing, empty or damaged."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"no caption file at {path}: `zsad caption` writes them")
    said = {line["id"]: line["caption"] for line in _lines(path)}
    if not said:
        raise DataError(f"{path} holds no caption: run `zsad caption` again")
    return said


def true_captions(dataset: AnomalyDataset) -> dict[str, str]:
    """{image id: the sentence its drawing was made from} for a dataset in synthad's folder, by its attributes.jsonl.

    The sentence of a damaged drawing is that of the drawing without the damage. DataError: another dataset, or an
    image without a line.
    """
    path = dataset.root / "attributes.jsonl"
    if not path.is_file():
        raise DataError(f"no true captions for {dataset.name}: {path} is not there, only synthad's folder has it")
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    truth = {line["file"]: line["caption"] for line in lines}
    files = {s.id: s.image_path.relative_to(dataset.root).as_posix() for s in dataset.samples}
    missing = [file for file in files.values() if file not in truth]
    if missing:
        raise DataError(f"{path} has no line for {missing[0]} and {len(missing) - 1} other images: draw synthad anew")
    return {name: truth[file] for name, file in files.items()}


def exchange(dataset: AnomalyDataset, said: dict[str, str]) -> dict[str, str]:
    """{image id: the caption of an image of the next category}, the last category's from the first: all wrong.

    The k-th image of a category gets that of the next one's k-th, or, where there are fewer, starts over.
    ValueError when there is but one category.
    """
    groups = defaultdict(list)
    for sample in dataset.samples:
        groups[sample.category].append(sample.id)
    if len(groups) < 2:
        raise ValueError(f"captions are exchanged between categories, and {dataset.name} has one here")
    names = list(groups)
    following = dict(zip(names, [*names[1:], names[0]], strict=True))
    return {
        name: said[groups[following[category]][k % len(groups[following[category]])]]
        for category, members in groups.items()
        for k, name in enumerate(members)
    }


def _fill(path, stamp, dataset, done, captioner, batch_size, progress) -> dict[str, str]:
    """Describe and append what `done` lacks. The caller holds the file's lock."""
    todo, known, added = defaultdict(list), {}, {}
    for sample in dataset.samples:
        if sample.id in done:
            known[sample.image_path] = done[sample.id]
        else:
            todo[sample.image_path].append(sample)
    images, counts = list(todo), {"total": len(dataset), "initial": len(done), "unit": "img"}
    with open(path, "ab") as file, tqdm(desc=path.stem, disable=not progress, **counts) as bar:
        for first in range(0, len(images), batch_size):
            chunk = images[first : first + batch_size]
            new = [todo[image][0] for image in chunk if image not in known]
            known |= _describe(captioner, new, stamp["prompt"])
            for sample in (sample for image in chunk for sample in todo[image]):
                added[sample.id] = known[sample.image_path]
                _append(file, {"id": sample.id, "caption": added[sample.id]} | stamp | {"bytes": _bytes(sample)})
                bar.update()
    return added


def _describe(captioner, samples, prompt) -> dict[Path, str]:
    """{image path: caption}; images at the captioner's size, or each at its own."""
    if not samples:
        return {}
    if captioner.size is None:
        images = [read_image(sample.image_path) for sample in samples]
    else:
        images = load_images(samples, captioner.size)
    said = captioner(images, prompt)
    if len(said) != len(samples):
        raise DataError(f"captioner {captioner.name} gave {len(said)} captions for {len(samples)} images")
    return {sample.image_path: caption for sample, caption in zip(samples, said, strict=True)}


def _append(file, line: dict) -> None:
    file.write(json.dumps(line).encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())


def _bytes(sample) -> int | None:
    try:
        return sample.image_path.stat().st_size
    except FileNotFoundError:
        return None  # reading it says so


def _done(path: Path, stamp: dict, dataset: AnomalyDataset) -> dict[str, str]:
    """{id: caption} of the dataset's images that the file has, once it is known to be of this run."""
    if not path.exists():
        return {}
    _mend(path)
    found = {}
    for n, line in enumerate(_lines(path), 1):
        for key in STAMP:
            if line.get(key) != stamp[key]:
                raise DataError(
                    f"line {n} of {path} has {key} {line.get(key)!r}, not {stamp[key]!r}: choose another --out, or "
                    "start the file anew with --overwrite"
                )
        found[line["id"]] = line
    for sample in dataset.samples:
        if sample.id in found and found[sample.id].get("bytes") != _bytes(sample):
            raise DataError(
                f"{sample.image_path} is not the image that {path} has described as {sample.id}: choose another --out, "
                "or start the file anew with --overwrite"
            )
    return {sample.id: found[sample.id]["caption"] for sample in dataset.samples if sample.id in found}


def _mend(path: Path) -> None:
    """End the last line of a file, or drop it when it was torn by a process that was killed while writing it."""
    content = path.read_bytes()
    last = content.rpartition(b"\n")[2]
    if not last:
        return
    with open(path, "r+b") as file:
        if _parsed(last) is None:
            file.truncate(len(content) - len(last))
        else:
            file.seek(0, os.SEEK_END)
            file.write(b"\n")
        file.flush()
        os.fsync(file.fileno())


def _lines(path: Path) -> Iterator[dict]:
    """The lines of a caption file, each a dict with a new id and a caption."""
    seen, content = set(), path.read_bytes().split(b"\n")
    torn = content.pop()  # nothing, after a last line that was ended
    for n, raw in enumerate([*content, torn] if torn else content, 1):
        line = _parsed(raw)
        if line is None and n > len(content):
            raise DataError(f"the last line of {path} is torn: go on with the `zsad caption` that wrote it")
        if line is None:
            raise DataError(f"line {n} of {path} is no caption: start the file anew with --overwrite")
        if line["id"] in seen:
            raise DataError(f"line {n} of {path} describes {line['id']} a second time: remove it")
        seen.add(line["id"])
        yield line


def _parsed(raw: bytes) -> dict | None:
    try:
        line = json.loads(raw)
    except ValueError:
        return None
    whole = isinstance(line, dict) and all(isinstance(line.get(key), str) for key in ("id", "caption"))
    return line if whole else None


# ------------------------------------------------------------------------------------- the compact captioner


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
