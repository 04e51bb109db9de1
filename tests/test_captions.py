"""Captions: statements checked one by one, the captioner that ships, prompted models, and files that survive a kill."""

import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import filelock
import numpy as np
import pytest
import tiny_captioners as tiny
import torch
from test_scoring import write_tree

from conftest import ROOT
from zsad_lib import manifest
from zsad_lib.data import captions
from zsad_lib.data.captions import (
    PROMPTS,
    PromptedCaptioner,
    caption_dataset,
    caption_path,
    check,
    exchange,
    load_captioner,
    read_captions,
    true_captions,
)
from zsad_lib.data.datasets import load_dataset
from zsad_lib.diffusion.loading import quiet
from zsad_lib.errors import DataError, ModelError
from zsad_lite import synthad


def test_check_asks_for_every_statement():
    truth = ["An image of a bottle, glass green, stripe red", "An image of a screw, metal brown"]
    said = ["An image of a bottle, glass green, stripe grey", "An image of a bottle, metal brown"]
    table = check(said, truth)
    assert table["image"].tolist() == [0, 0, 0, 1, 1]
    assert table["attribute"].tolist() == ["category", "glass", "stripe", "category", "metal"]
    assert table["right"].tolist() == [True, True, False, False, True]
    assert check(truth, truth)["right"].all()


def test_a_longer_value_is_not_taken_for_a_shorter_one():
    assert not check(["An image of a connector, wires red yellow blue"], ["An image of a connector, wires red"]).right[
        1
    ]


def test_check_wants_a_sentence_for_every_image():
    with pytest.raises(ValueError):
        check(["An image of a bottle"], [])


def test_the_captioner_that_ships_knows_its_categories():
    captioner, right = load_captioner("lite-captioner", "cpu"), []
    for category in synthad.CATEGORIES:
        drawings = [synthad.draw(category, f"heldout/test/{k}") for k in range(3)]
        images = torch.from_numpy(np.stack([d.image for d in drawings])).permute(0, 3, 1, 2) / 255
        said = captioner(images)
        assert said == [captioner(image[None])[0] for image in images], "each image alone says the same"
        right.append(check(said, [d.caption for d in drawings]))
    shares = [table.groupby(table["attribute"] == "category")["right"].mean() for table in right]
    assert np.mean([share[True] for share in shares]) > 0.95
    assert np.mean([share[False] for share in shares]) > 0.6


def test_the_captioner_resizes_what_it_is_shown():
    captioner = load_captioner("lite-captioner", "cpu")
    large = synthad.draw("gauge", "heldout/0", size=128).image
    assert captioner(torch.from_numpy(large).permute(2, 0, 1)[None] / 255)[0].startswith("An image of a gauge")


def test_what_is_no_captioner_is_refused(tmp_path):
    with pytest.raises(ModelError, match="not a captioner folder: it lacks config.json"):
        load_captioner(tmp_path)
    with pytest.raises(ModelError, match="no folder, no hub id"):
        load_captioner("no-such-captioner")
    (tmp_path / "config.json").write_text('{"model_type": "vision-encoder-decoder"}')
    with pytest.raises(ModelError, match="not a VisionEncoderDecoderModel folder: it lacks generation_config"):
        load_captioner(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
    with pytest.raises(DataError, match="is a 'resnet' model, which transformers does not know as one that describes"):
        load_captioner(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataError, match="config.json is not JSON"):
        load_captioner(tmp_path)


def test_the_revision_of_a_folder_is_its_hash():
    captioner = load_captioner("lite-captioner", "cpu")
    assert captioner.revision == f"sha256:{manifest.checkpoint_entry('lite-captioner')['sha256']}"
    with pytest.raises(DataError, match="is a folder and has no revision 'v2'"):
        load_captioner("lite-captioner", "cpu", revision="v2")


# --- models that take a prompt

KINDS = {
    "llava": tiny.save_llava,
    "llava without a template": lambda folder: tiny.save_llava(folder, None),
    "blip-2": tiny.save_blip2,
    "blip-2 with an encoder": lambda folder: tiny.save_blip2(folder, decoder_only=False),
    "qwen2-vl": tiny.save_qwen,
    "internvl": tiny.save_internvl,
}
SHOWN = {
    "llava": "USER: <image><image><image><image>Why? BOT:",
    "llava without a template": "USER: <image><image><image><image>\nWhy? ASSISTANT:",
    "blip-2": "<image><image><image><image>Question: Why? Answer:",
    "blip-2 with an encoder": "<image><image><image><image>Question: Why? Answer:",
    "qwen2-vl": "<pad><pad>USER: <|vision_start|>" + 6 * "<|image_pad|>" + "<|vision_end|>Why? BOT:",
    "internvl": 8 * "<pad>" + "USER: <img><IMG_CONTEXT><IMG_CONTEXT><IMG_CONTEXT><IMG_CONTEXT></img>Why? BOT:",
}


def make(save, folder, **options):
    folder.mkdir(parents=True, exist_ok=True)
    with quiet(bars=True):
        return save(folder, **options)


@pytest.fixture(scope="module")
def tiny_models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {kind: make(save, root / kind.replace(" ", "-")) for kind, save in KINDS.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_is_asked_in_its_own_way(tiny_models, kind):
    captioner = load_captioner(tiny_models[kind], "cpu")
    assert isinstance(captioner, PromptedCaptioner) and captioner.name == tiny_models[kind].name
    images = [torch.rand(3, 20, 24), torch.zeros(3, 33, 17), torch.ones(3, 16, 16)]
    inputs = captioner.inputs([captions._picture(image) for image in images], "Why?")
    shown = captioner.processor.tokenizer.batch_decode(inputs["input_ids"])
    assert shown[0] == SHOWN[kind]
    assert all(text.endswith(SHOWN[kind][-9:]) for text in shown), "padding is on the left"
    captioner.new_tokens = 7
    said = captioner(images, "Why?")
    assert said == [captioner([image], "Why?")[0] for image in images], "each image alone says the same"
    assert all(0 < len(text) <= 7 for text in said), "the new tokens, without the prompt"
    assert captioner(torch.stack([images[2]] * 2), "Why?") == [said[2]] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_image_and_prompt_reach_the_model(tiny_models, monkeypatch, kind):
    """Not always its words, with so few random weights, but its scores for the first one."""
    found = []
    monkeypatch.setattr(captions._Steps, "__call__", lambda self, tokens, scores: found.append(scores) or scores)
    captioner, noise = load_captioner(tiny_models[kind], "cpu"), torch.rand(3, 16, 16)
    captioner.new_tokens = 1
    captioner([noise, torch.zeros(3, 16, 16), noise], "Why?")
    captioner([noise], "What would an inspector say?")
    of_noise, of_black, again = found[0]
    torch.testing.assert_close(of_noise, again)
    assert (of_noise - of_black).abs().max() > 1e-3 and (of_noise - found[1][0]).abs().max() > 1e-3


def test_pictures_keep_their_pixels():
    pixels = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    picture = captions._picture(torch.from_numpy(pixels).permute(2, 0, 1) / 255)
    assert picture.mode == "RGB" and np.array_equal(np.asarray(picture), pixels)


def test_prompts_are_three_and_ask_for_what_the_paper_asks():
    assert set(PROMPTS) == {"objects", "scenes", "inspector"} and len(set(PROMPTS.values())) == 3
    assert (
        "main object" in PROMPTS["objects"] and "as a whole" in PROMPTS["scenes"] and "defects" in PROMPTS["inspector"]
    )
    assert all("60 words" in prompt and "four or five" in prompt for prompt in PROMPTS.values())


def test_code_of_a_model_is_never_run(tmp_path, tiny_models, monkeypatch):
    """Named in config.json or in the processor's files, it stays unread; asking for it is not even a question."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run it"))
    folder = make(tiny.save_llava, tmp_path / "model")
    mark = tmp_path / "it-ran"
    (folder / "own.py").write_text(f"open({str(mark)!r}, 'w')\nfrom transformers import *\n")
    for name, entries in {
        "config.json": {"AutoConfig": "own.Config", "AutoModelForImageTextToText": "own.Model"},
        "processor_config.json": {"AutoProcessor": "own.Processor"},
        "tokenizer_config.json": {"AutoTokenizer": ["own.Tokenizer", None]},
    }.items():
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | {"auto_map": entries}))
    assert load_captioner(folder, "cpu").model.config.model_type == "llava"
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "internvl_chat"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="own Python code, and that is never run here.*-hf"):
        load_captioner(folder, "cpu")
    assert not mark.exists()


def test_no_module_trusts_remote_code():
    found = []
    for path in sorted((ROOT / "zsad_lib").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            pairs = []
            if isinstance(node, ast.Call):
                pairs = [(keyword.arg, keyword.value) for keyword in node.keywords]
            elif isinstance(node, ast.Dict):
                pairs = [
                    (getattr(key, "value", None), value) for key, value in zip(node.keys, node.values, strict=True)
                ]
            found += [ast.unparse(value) for name, value in pairs if name == "trust_remote_code"]
    assert len(found) >= 4 and set(found) == {"False"}
    called = re.findall(r"Auto\w+\.from_pretrained\b[^)]*\)", (ROOT / "zsad_lib/captions.py").read_text())
    assert called and all("trust_remote_code=False" in call for call in called)


def hub(cache, folder, commit):
    """A folder as the hub's client would have left it in its cache, at the branch main."""
    home = cache / "models--someone--describer"
    (home / "snapshots").mkdir(parents=True, exist_ok=True)
    folder.rename(home / "snapshots" / commit)
    (home / "refs").mkdir(exist_ok=True)
    (home / "refs" / "main").write_text(commit)


def test_a_hub_model_is_recorded_with_its_commit(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    for seed, digit in enumerate("ab"):
        hub(tmp_path / "cache", make(tiny.save_llava, tmp_path / digit, seed=seed), digit * 40)
    newest, older = load_captioner("someone/describer", "cpu"), load_captioner("someone/describer", "cpu", "a" * 40)
    assert (newest.name, newest.revision) == ("someone/describer", f"main at {'b' * 40}")
    assert older.revision == "a" * 40
    assert not torch.equal(newest.model.lm_head.weight, older.model.lm_head.weight)
    with pytest.raises(ModelError, match="someone/describer is neither a folder here nor complete"):
        load_captioner("someone/describer", "cpu", "v3")
    entry = {"path": None, "hub_id": "someone/describer", "revision": "a" * 40}
    monkeypatch.setattr(manifest, "checkpoint_entry", lambda name: entry)
    assert load_captioner("describer", "cpu").revision == "a" * 40, "the manifest's"


# --- caption files


class Echo:
    """Says how bright an image is, and counts the images it was shown."""

    name, revision, prompted, size = "echo", "1", True, None

    def __init__(self):
        self.shown = 0

    def __call__(self, images, prompt):
        self.shown += len(images)
        return [f"{prompt} {image.mean():.6f}" for image in images]


@pytest.fixture
def tree(tmp_path):
    return load_dataset("mvtec_ad", write_tree(tmp_path / "tree", per_class=3))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_caption_file_has_a_line_an_image(tree, tmp_path):
    path, echo = tmp_path / "deep" / "c.jsonl", Echo()
    said = caption_dataset(tree, echo, path, "How bright?", batch_size=5, progress=False)
    assert list(said) == [sample.id for sample in tree] and len(set(said.values())) > 1
    assert read_captions(path) == said and echo.shown == len(tree) == 12
    assert [line["id"] for line in lines(path)] == list(said)
    for line, sample in zip(lines(path), tree, strict=True):
        assert line == {
            "id": sample.id,
            "caption": said[sample.id],
            "model": "echo",
            "revision": "1",
            "prompt": "How bright?",
            "bytes": sample.image_path.stat().st_size,
        }
    assert caption_dataset(tree, echo, path, "How bright?", progress=False) == said and echo.shown == 12


def test_other_selections_add_to_a_file(tree, tmp_path):
    path, echo = tmp_path / "c.jsonl", Echo()
    few = caption_dataset(tree.select(limit=1), echo, path, progress=False)
    assert len(few) == echo.shown == 4 and lines(path)[0]["prompt"] == PROMPTS["objects"]
    everything = caption_dataset(tree, echo, path, batch_size=3, progress=False)
    assert len(everything) == echo.shown == len(lines(path)) == 12 and few.items() <= everything.items()


def test_an_image_with_several_ids_is_described_once(tmp_path):
    from test_datasets import coco_ad_tree

    data, echo, path = load_dataset("coco_ad", coco_ad_tree(tmp_path / "coco")), Echo(), tmp_path / "c.jsonl"
    caption_dataset(data.select(categories="coco_1"), echo, path, progress=False)
    said = caption_dataset(data, echo, path, progress=False)
    assert echo.shown == 3 and list(said) == [s.id for s in data] and set(read_captions(path)) == set(said)


def test_a_captioner_without_prompt_is_not_asked(tmp_path):
    said = caption_dataset(
        load_dataset("mvtec_ad", write_tree(tmp_path / "tree", per_class=1)),
        load_captioner("lite-captioner", "cpu"),
        tmp_path / "c.jsonl",
        PROMPTS["scenes"],
        progress=False,
    )
    assert all(text.startswith("An image of a ") for text in said.values())
    assert {line["prompt"] for line in lines(tmp_path / "c.jsonl")} == {None}


def test_a_file_of_another_run_is_refused(tree, tmp_path):
    path, options = tmp_path / "c.jsonl", {"progress": False}
    caption_dataset(tree, Echo(), path, "A?", **options)
    before = path.read_bytes()
    other, newer = Echo(), Echo()
    other.name, newer.revision = "parrot", "2"
    for captioner, prompt, why in [
        (other, "A?", "model 'echo', not 'parrot'"),
        (newer, "A?", "revision '1', not '2'"),
        (Echo(), "B?", "prompt 'A.', not 'B.'"),
    ]:
        with pytest.raises(DataError, match=rf"line 1 of .*c\.jsonl has {why}: choose another --out.*--overwrite"):
            caption_dataset(tree, captioner, path, prompt, **options)
    assert path.read_bytes() == before
    caption_dataset(tree, newer, path, "B?", overwrite=True, **options)
    assert {(line["revision"], line["prompt"]) for line in lines(path)} == {("2", "B?")} and len(lines(path)) == 12


def test_images_that_changed_are_not_taken_for_described(tree, tmp_path):
    path = tmp_path / "c.jsonl"
    caption_dataset(tree, Echo(), path, progress=False)
    with open(tree[4].image_path, "ab") as file:
        file.write(b"more")
    with pytest.raises(DataError, match=f"is not the image that .* has described as {tree[4].id}"):
        caption_dataset(tree, Echo(), path, progress=False)


def test_two_processes_never_write_one_file(tree, tmp_path):
    with filelock.FileLock(tmp_path / ".c.jsonl.lock"):
        with pytest.raises(DataError, match="another process is writing"):
            caption_dataset(tree, Echo(), tmp_path / "c.jsonl", progress=False)
    assert not (tmp_path / "c.jsonl").exists()


def test_what_a_captioner_owes(tree, tmp_path):
    with pytest.raises(DataError, match="batch_size must be 1 or more"):
        caption_dataset(tree, Echo(), tmp_path / "c.jsonl", batch_size=0)
    silent = Echo()
    silent.__class__ = type("Silent", (Echo,), {"__call__": lambda self, images, prompt: []})
    with pytest.raises(DataError, match="gave 0 captions for 8 images"):
        caption_dataset(tree, silent, tmp_path / "c.jsonl", progress=False)


def test_a_file_torn_at_any_byte_is_mended(tree, tmp_path):
    path, few = tmp_path / "c.jsonl", tree.select(categories="box", defects="good")
    said = caption_dataset(few, Echo(), path, "é?", progress=False)
    whole = path.read_bytes()
    start = whole[:-1].rindex(b"\n") + 1
    for cut in [*range(start, len(whole), 7), len(whole) - 1]:
        path.write_bytes(whole[:cut])
        if start < cut < len(whole) - 1:
            with pytest.raises(DataError, match="the last line of .* is torn"):
                read_captions(path)
        echo = Echo()
        assert caption_dataset(few, echo, path, "é?", progress=False) == said
        assert path.read_bytes() == whole and echo.shown == (cut < len(whole) - 1)


def test_damaged_files_say_where(tmp_path):
    path = tmp_path / "c.jsonl"
    with pytest.raises(DataError, match="no caption file at .*zsad caption"):
        read_captions(path)
    good = '{"id": "a", "caption": "A bottle."}\n'
    for content, why in {
        "": "holds no caption",
        good + "{\n" + good: "line 2 of .* is no caption",
        good + '{"id": "b"}\n': "line 2 of .* is no caption",
        good + "[]\n": "line 2 of",
        good + good: "line 2 of .* describes a a second time",
        good + '{"id": "b", "cap': "the last line of .* is torn",
    }.items():
        path.write_text(content)
        with pytest.raises(DataError, match=why):
            read_captions(path)
    path.write_text(good.strip())
    assert read_captions(path) == {"a": "A bottle."}, "an editor may leave out the end of the last line"


SLOW = """
import os, signal, sys, time
from zsad_lib import captions
from zsad_lib.datasets import load_dataset

class Slow:
    name, revision, prompted, size = "slow", "1", True, None
    def __call__(self, images, prompt):
        time.sleep(0.02)
        return [f"{prompt} {image.mean():.6f}" for image in images]

def torn(file, line, written=[], append=captions._append):
    written.append(line)
    if len(written) <= tear:
        return append(file, line)
    file.write(b'{"id": "box/te')
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

root, path, tear = sys.argv[1], sys.argv[2], int(sys.argv[3])
if tear:
    captions._append = torn
data = load_dataset("mvtec_ad", root)
captions.caption_dataset(data, Slow(), path, "How bright?", batch_size=2, progress=False)
"""


def test_a_run_killed_at_any_moment_goes_on(tmp_path):
    """kill -9: from outside, whatever it is at, and once half way through a line. No line is lost or doubled."""
    data = load_dataset("mvtec_ad", write_tree(tmp_path / "tree", per_class=20))
    path, script = tmp_path / "c.jsonl", tmp_path / "slow.py"
    script.write_text(SLOW)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def start(tear=0):
        words = [sys.executable, str(script), str(tmp_path / "tree"), str(path), str(tear)]
        return subprocess.Popen(words, env=environment)

    def written():
        return path.read_bytes().count(b"\n") if path.exists() else 0

    for more in (3, 12):
        before, process = written(), start()
        while written() < before + more and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it was still at work"
        assert before + more <= written() < len(data)
    whole = written()
    assert start(tear=5).wait() == -signal.SIGKILL
    assert written() == whole + 5 and path.read_bytes().endswith(b'\n{"id": "box/te')
    kept = path.read_bytes().rpartition(b"\n")[0]
    assert start().wait() == 0
    assert path.read_bytes().startswith(kept + b"\n"), "what was written stays as it was"
    ids = [line["id"] for line in lines(path)]
    assert sorted(ids) == sorted(sample.id for sample in data) and len(set(ids)) == len(ids) == 80
    once = Echo()
    once.name = "slow"
    assert read_captions(path) == caption_dataset(data, once, tmp_path / "o.jsonl", "How bright?", progress=False)


def test_where_captions_are_kept():
    assert str(caption_path("synthad", "lite-captioner")) == "runs/captions/synthad-lite-captioner-objects.jsonl"
    assert caption_path("coco_ad", "OpenGVLab/InternVL3-8B-hf", "scenes", "there").name == (
        "coco_ad-OpenGVLab_InternVL3-8B-hf-scenes.jsonl"
    )


# --- other captions for the same images


def test_true_captions_are_what_the_drawings_were_made_from(tmp_path):
    images = load_dataset("synthad", synthad.export(tmp_path / "synthad", 16, ["bottle", "screw"]))
    truth = true_captions(images.select(limit=1, categories="screw"))
    assert list(truth) == [s.id for s in images.select(limit=1, categories="screw").samples]
    assert truth["screw/test/crack/000"] == synthad.draw("screw", "test/test/crack/0", "crack", 16).caption
    assert set(truth) < set(true_captions(images))


def test_true_captions_need_synthads_list(tmp_path):
    folder = synthad.export(tmp_path / "synthad", 16, ["screw"])
    lines = (folder / "attributes.jsonl").read_text().splitlines(keepends=True)
    images = load_dataset("synthad", folder)
    (folder / "attributes.jsonl").write_text("".join(line for line in lines if "crack/001" not in line))
    with pytest.raises(DataError, match="no line for screw/test/crack/001.png and 0 other images"):
        true_captions(images)
    with pytest.raises(DataError, match="no true captions for mvtec_ad"):
        true_captions(load_dataset("mvtec_ad", write_tree(tmp_path / "tree", per_class=2)))


def test_exchanged_captions_are_those_of_the_next_category(tmp_path):
    images = load_dataset("mvtec_ad", write_tree(tmp_path / "tree", per_class=2))
    said = {sample.id: f"about {sample.id}" for sample in images.samples}
    wrong = exchange(images, said)
    assert list(wrong) == list(said)
    names = images.categories
    for sample in images.samples:
        following = names[(names.index(sample.category) + 1) % len(names)]
        assert wrong[sample.id].startswith(f"about {following}/")
    with pytest.raises(ValueError, match="has one here"):
        exchange(images.select(categories=names[0]), said)


def test_exchange_starts_over_where_the_next_category_has_fewer(tmp_path):
    images = load_dataset("mvtec_ad", write_tree(tmp_path / "tree", per_class=2))
    first, second = images.categories[:2]
    kept = [s for s in images.samples if s.category == first] + [s for s in images.samples if s.category == second][:1]
    wrong = exchange(replace(images, samples=tuple(kept)), {s.id: s.id for s in kept})
    assert {wrong[s.id] for s in kept[:-1]} == {kept[-1].id} and wrong[kept[-1].id] == kept[0].id
