"""Captions: the captioner that ships, prompted models, and files that survive a kill."""

import ast
import json
import os
import re
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import tiny_captioners as tiny
import torch
from helpers import coco_ad_tree, forked, write_tree

from conftest import ROOT
from zsad_lib import manifest
from zsad_lib.data import captions
from zsad_lib.data.captions import PROMPTS, captions_of_next_category, load_captioner, read_captions
from zsad_lib.data.datasets import load_dataset
from zsad_lib.diffusion.loading import quiet
from zsad_lib.errors import DataError, ModelError, RunError
from zsad_lib.store import locked
from zsad_lite import synthad
from zsad_lite.synthad.truth import check_captions


def test_the_captioner_that_ships_knows_its_categories():
    captioner, right = load_captioner("lite-captioner", "cpu"), []
    for category in synthad.CATEGORIES:
        drawings = [synthad.draw(category, f"heldout/test/{k}") for k in range(3)]
        images = torch.from_numpy(np.stack([d.image for d in drawings])).permute(0, 3, 1, 2) / 255
        said = captioner(images)
        assert said == [captioner(image[None])[0] for image in images], "each image alone says the same"
        right.append(check_captions(said, [d.caption for d in drawings]))
    shares = [table.groupby(table["attribute"] == "category")["right"].mean() for table in right]
    assert np.mean([share[True] for share in shares]) > 0.95
    assert np.mean([share[False] for share in shares]) > 0.6
    large = torch.from_numpy(synthad.draw("gauge", "heldout/0", size=128).image).permute(2, 0, 1) / 255
    assert captioner(large[None])[0].startswith("An image of a gauge"), "it resizes what it is shown"


@pytest.mark.parametrize(
    "config, message",
    [
        (None, "captioner folder: it lacks config.json"),
        ('{"model_type": "vision-encoder-decoder"}', "lacks generation_config"),
        ('{"model_type": "resnet"}', "'resnet' model"),
        ("{}", "None model"),
        ("{", "config.json"),
    ],
)
def test_what_is_no_captioner_is_refused(tmp_path, config, message):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ModelError, match=message):
        load_captioner(tmp_path)


def test_the_revision_of_a_folder_is_its_hash():
    captioner = load_captioner("lite-captioner", "cpu")
    assert captioner.revision == f"sha256:{manifest.checkpoint_entry('lite-captioner')['sha256']}"
    with pytest.raises(ModelError, match="lite-captioner .* no revision 'v2'"):
        load_captioner("lite-captioner", "cpu", revision="v2")
    with pytest.raises(ModelError, match="no-such-captioner"):
        load_captioner("no-such-captioner")


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
    assert isinstance(captioner, captions.PromptedCaptioner) and captioner.name == tiny_models[kind].name
    images = [torch.rand(3, 20, 24), torch.zeros(3, 33, 17), torch.ones(3, 16, 16)]
    inputs = captioner.inputs(images, "Why?")
    shown = captioner.processor.tokenizer.batch_decode(inputs["input_ids"])
    assert shown[0] == SHOWN[kind]
    assert all(text.endswith(SHOWN[kind][-9:]) for text in shown), "padding is on the left"
    captioner.new_tokens = 7
    said = captioner(images, "Why?")
    assert said == [captioner([image], "Why?")[0] for image in images], "each image alone says the same"
    assert all(0 < len(text) <= 7 for text in said), "the new tokens, without the prompt"
    assert captioner(torch.stack([images[2]] * 2), "Why?") == [said[2]] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_image_and_prompt_reach_the_model(tiny_models, kind):
    """Not always its words, with so few random weights, but its scores for the first one."""
    captioner, noise = load_captioner(tiny_models[kind], "cpu"), torch.rand(3, 16, 16)
    options = {"do_sample": False, "max_new_tokens": 1, "output_scores": True, "return_dict_in_generate": True}

    def scores(images, prompt):
        with torch.inference_mode(), quiet(bars=False):
            return captioner.model.generate(**captioner.inputs(images, prompt), **options).scores[0]

    of_noise, of_black, again = scores([noise, torch.zeros(3, 16, 16), noise], "Why?")
    torch.testing.assert_close(of_noise, again)
    asked = scores([noise], "What would an inspector say?")[0]
    assert (of_noise - of_black).abs().max() > 1e-3 and (of_noise - asked).abs().max() > 1e-3


def test_pictures_keep_their_pixels():
    pixels = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    picture = captions._picture(torch.from_numpy(pixels).permute(2, 0, 1) / 255)
    assert picture.mode == "RGB" and np.array_equal(np.asarray(picture), pixels)


def test_prompts_are_three_and_ask_for_what_the_paper_asks():
    assert set(PROMPTS) == {"objects", "scenes", "inspector"} and len(set(PROMPTS.values())) == 3
    for kind, words in {"objects": "main object", "scenes": "as a whole", "inspector": "defects"}.items():
        assert words in PROMPTS[kind]
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
    with pytest.raises(ModelError, match="own Python code.*-hf"):
        load_captioner(folder, "cpu")
    assert not mark.exists()


def test_no_module_trusts_remote_code():
    found = []
    for path in sorted((ROOT / "zsad_lib").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                found += [(keyword.arg, keyword.value) for keyword in node.keywords]
            elif isinstance(node, ast.Dict):
                found += [(getattr(k, "value", None), value) for k, value in zip(node.keys, node.values, strict=True)]
    found = [ast.unparse(value) for name, value in found if name == "trust_remote_code"]
    assert len(found) >= 4 and set(found) == {"False"}
    calls = re.findall(r"\.from_pretrained\b[^)]*\)", (ROOT / "zsad_lib/data/captions.py").read_text())
    assert len(calls) == 2 and all("trust_remote_code=False" in call for call in calls)


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

    prompted, size = True, None

    def __init__(self, name="echo", revision="1"):
        self.name, self.revision, self.shown = name, revision, 0

    def __call__(self, images, prompt):
        self.shown += len(images)
        return [f"{prompt} {image.mean():.6f}" for image in images]


def describe(*words, **options):
    return captions.caption_dataset(*words, progress=False, **options)


@pytest.fixture
def tree(tmp_path):
    return load_dataset("mvtec_ad", write_tree(tmp_path / "tree", per_class=3))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_caption_file_has_a_line_an_image(tree, tmp_path):
    path, echo = tmp_path / "deep" / "c.jsonl", Echo()
    said = describe(tree, echo, path, "How bright?", batch_size=5)
    assert list(said) == [sample.id for sample in tree] and len(set(said.values())) > 1
    assert read_captions(path) == said and echo.shown == len(tree) == 12
    assert [line["id"] for line in lines(path)] == list(said)
    for line, sample in zip(lines(path), tree, strict=True):
        same = {"model": "echo", "revision": "1", "prompt": "How bright?"}
        own = {"id": sample.id, "caption": said[sample.id], "bytes": sample.image_path.stat().st_size}
        assert line == same | own
    assert describe(tree, echo, path, "How bright?") == said and echo.shown == 12


def test_other_selections_add_to_a_file(tree, tmp_path):
    path, echo = tmp_path / "c.jsonl", Echo()
    few = describe(tree.select(limit=1), echo, path)
    assert len(few) == echo.shown == 4 and lines(path)[0]["prompt"] == PROMPTS["objects"]
    everything = describe(tree, echo, path, batch_size=3)
    assert len(everything) == echo.shown == len(lines(path)) == 12 and few.items() <= everything.items()


def test_an_image_with_several_ids_is_described_once(tmp_path):
    data, echo, path = load_dataset("coco_ad", coco_ad_tree(tmp_path / "coco")), Echo(), tmp_path / "c.jsonl"
    describe(data.select(categories="coco_1"), echo, path)
    said = describe(data, echo, path)
    assert echo.shown == 3 and list(said) == [s.id for s in data] and set(read_captions(path)) == set(said)


def test_a_captioner_without_prompt_is_not_asked(tree, tmp_path):
    captioner = load_captioner("lite-captioner", "cpu")
    said = describe(tree.select(limit=1), captioner, tmp_path / "c.jsonl", PROMPTS["scenes"])
    assert all(text.startswith("An image of a ") for text in said.values())
    assert {line["prompt"] for line in lines(tmp_path / "c.jsonl")} == {None}


@pytest.mark.parametrize("change", [{"model": "parrot"}, {"revision": "2"}, {"prompt": "B?"}])
def test_a_file_of_another_run_is_refused_or_started_anew(tree, tmp_path, change):
    (key, value), path = *change.items(), tmp_path / "c.jsonl"
    first = {"model": "echo", "revision": "1", "prompt": "A?"}
    describe(tree, Echo(), path, "A?")
    before, new = path.read_bytes(), first | change
    words = tree, Echo(new["model"], new["revision"]), path, new["prompt"]
    with pytest.raises(DataError, match=re.escape(f"line 1 of {path} has {key} {first[key]!r}, not {value!r}")):
        describe(*words)
    assert path.read_bytes() == before
    describe(*words, overwrite=True)
    assert len(lines(path)) == 12 and all(line | new == line for line in lines(path))


def test_images_that_changed_are_not_taken_for_described(tree, tmp_path):
    path = tmp_path / "c.jsonl"
    describe(tree, Echo(), path)
    with open(tree[4].image_path, "ab") as file:
        file.write(b"more")
    with pytest.raises(DataError, match=f"{tree[4].image_path} .* {tree[4].id}"):
        describe(tree, Echo(), path)


def test_two_processes_never_write_one_file(tree, tmp_path):
    with locked(tmp_path / ".c.jsonl.lock", "it"), pytest.raises(RunError, match="c.jsonl"):
        describe(tree, Echo(), tmp_path / "c.jsonl")
    assert not (tmp_path / "c.jsonl").exists()


def test_what_a_captioner_owes(tree, tmp_path):
    silent = type("Silent", (Echo,), {"__call__": lambda self, images, prompt: []})
    for captioner, batch_size, why in ((Echo(), 0, "batch_size"), (silent(), 8, "0 captions for 8 images")):
        with pytest.raises(DataError, match=why):
            describe(tree, captioner, tmp_path / "c.jsonl", batch_size=batch_size)


def test_a_file_torn_at_any_byte_is_mended(tree, tmp_path):
    path, few = tmp_path / "c.jsonl", tree.select(categories="box", defects="good")
    said = describe(few, Echo(), path, "é?")
    whole = path.read_bytes()
    start = whole[:-1].rindex(b"\n") + 1
    for cut in [*range(start, len(whole), 7), len(whole) - 1]:
        path.write_bytes(whole[:cut])
        if start < cut < len(whole) - 1:
            with pytest.raises(RunError, match=f"line {len(few)} of {path}"):
                read_captions(path)
        echo = Echo()
        assert describe(few, echo, path, "é?") == said
        assert path.read_bytes() == whole and echo.shown == (cut < len(whole) - 1)


GOOD = '{"id": "a", "caption": "A bottle."}\n'


@pytest.mark.parametrize(
    "content, kind, why",
    [
        (None, DataError, "zsad caption"),
        ("", DataError, "holds no caption"),
        (GOOD + "{\n" + GOOD, RunError, "line 2"),
        (GOOD + "[]\n", RunError, "line 2"),
        (GOOD + '{"id": "b", "cap', RunError, "line 2"),
        (GOOD + '{"id": "b"}\n', DataError, "line 2"),
        (GOOD + '{"id": "b", "caption": ' + "[" * 100_000 + "]" * 100_000 + "}", DataError, "line 2"),
        (GOOD + GOOD, DataError, "line 2 .*a second time"),
    ],
)
def test_damaged_files_say_where(tmp_path, content, kind, why):
    path = tmp_path / "c.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(kind, match=why) as error:
        read_captions(path)
    assert str(path) in str(error.value)
    path.write_text(GOOD.strip())  # an editor may leave out the end of the last line
    assert read_captions(path) == {"a": "A bottle."}


DEEP = '{"id": "a", "caption": ' + "[" * 100_000 + "]" * 100_000 + "}"


@pytest.mark.parametrize(
    "content",
    [
        b"\x89PNG\r\n\x1a\n\0\0",
        b"my notes",
        b"my notes\nand more",
        b'{"name": "a", "state": "fin',
        b'{"id": "a"}',
        b'{"id": "a", "words": "b"}\n{"id',
        b'{"id": 7, "caption": "A bottle."}\n',
        b'{"id": "a", "caption": null}\n',
        b'{"id": "a", "caption": NaN}',
        b'[{"id": "a", "caption": "b"}]',
        DEEP.encode(),
    ],
)
def test_files_of_another_kind_stay_as_they_are(tree, tmp_path, content):
    path = tmp_path / "mine.txt"
    path.write_bytes(content)
    for overwrite in (False, True):
        with pytest.raises(DataError, match=re.escape(str(path))):
            describe(tree, Echo(), path, overwrite=overwrite)
        assert path.read_bytes() == content


@pytest.mark.parametrize("more", ["words\n", "[]", '{"id": 7}', '{"id": "b", "caption": null}\n{"id', DEEP])
def test_a_file_is_read_before_it_is_mended(tree, tmp_path, more):
    path = tmp_path / "c.jsonl"
    describe(tree.select(limit=1), Echo(), path)
    path.write_bytes(path.read_bytes() + more.encode())
    before = path.read_bytes()
    with pytest.raises((DataError, RunError), match=re.escape(f"line 5 of {path}")):
        describe(tree, Echo(), path)
    assert path.read_bytes() == before
    describe(tree, Echo(), path, overwrite=True)
    assert len(lines(path)) == len(tree)


class Slow(Echo):
    def __call__(self, images, prompt):
        time.sleep(0.02)
        return super().__call__(images, prompt)


def slowly(data, path, tear):
    """In a process of its own: describe the images; with `tear`, die half way through the line after so many."""
    written, append = [], captions.append_line

    def torn(file, line):
        written.append(line)
        if len(written) <= tear:
            return append(file, line)
        file.write(b'{"id": "box/te')
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    captions.append_line = torn if tear else append
    describe(data, Slow("slow"), path, "How bright?", batch_size=2)


def test_a_run_killed_at_any_moment_goes_on(tmp_path):
    """kill -9: from outside, whatever it is at, and once half way through a line. No line is lost or doubled."""
    data = load_dataset("mvtec_ad", write_tree(tmp_path / "tree", per_class=20))
    path = tmp_path / "c.jsonl"

    def written():
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def ended(process):
        process.join()
        return process.exitcode

    for more in (3, 12):
        before, process = written(), forked(slowly, data, path, 0)
        while written() < before + more and process.is_alive():
            time.sleep(0.002)
        process.kill()
        assert ended(process) == -signal.SIGKILL, "it was still at work"
        assert before + more <= written() < len(data)
    whole = written()
    assert ended(forked(slowly, data, path, 5)) == -signal.SIGKILL
    assert written() == whole + 5 and path.read_bytes().endswith(b'\n{"id": "box/te')
    kept = path.read_bytes().rpartition(b"\n")[0]
    assert ended(forked(slowly, data, path, 0)) == 0
    assert path.read_bytes().startswith(kept + b"\n"), "what was written stays as it was"
    ids = [line["id"] for line in lines(path)]
    assert sorted(ids) == sorted(sample.id for sample in data) and len(set(ids)) == len(ids) == 80
    assert read_captions(path) == describe(data, Echo("slow"), tmp_path / "o.jsonl", "How bright?")


def test_where_captions_are_kept():
    for words, path in {
        ("synthad", "lite-captioner"): "runs/captions/synthad-lite-captioner-objects.jsonl",
        ("coco_ad", "a/B-hf", "scenes", "there"): "there/coco_ad-a_B-hf-scenes.jsonl",
    }.items():
        assert str(captions.caption_path(*words)) == path


# --- other captions for the same images


def test_exchanged_captions_are_those_of_the_next_category(tmp_path):
    """They start over where the next category has fewer."""
    images = load_dataset("mvtec_ad", write_tree(tmp_path / "tree", per_class=2))
    wrong = captions_of_next_category(images, {s.id: s.id for s in images})
    names = images.categories
    following = dict(zip(names, (*names[1:], names[0]), strict=True))
    assert list(wrong) == [s.id for s in images]
    assert all(wrong[s.id].startswith(f"{following[s.category]}/") for s in images)
    with pytest.raises(DataError, match=images.name):
        captions_of_next_category(images.select(categories=names[0]), wrong)
    *first, last = kept = images.samples[:5]  # four of one category and one of the other
    wrong = captions_of_next_category(replace(images, samples=kept), {s.id: s.id for s in kept})
    assert {wrong[s.id] for s in first} == {last.id} and wrong[last.id] == first[0].id
