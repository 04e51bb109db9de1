"""Bad inputs end in one line that names them, changed inputs are noticed, content stays content, kills lose nothing."""

import csv
import io
import itertools
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import coco_ad_tree, forked, save_image, write_tree
from PIL import EpsImagePlugin, Image

from conftest import ROOT
from zsad_lib import cli, profiles, store
from zsad_lib.data import captions
from zsad_lib.data.datasets import load_dataset
from zsad_lib.data.images import read_image
from zsad_lib.diffusion.guidance import SemanticGuide, save_guided
from zsad_lib.diffusion.latent import load_backbone
from zsad_lib.errors import DataError
from zsad_lib.evaluation import runs
from zsad_lib.evaluation.runs import load_results
from zsad_lib.methods import make_method
from zsad_lib.methods.baselines import Median
from zsad_lib.notebook import plots, report
from zsad_lib.training import fit
from zsad_lite.training import pixel

TALLY = {}  # what was tried: [tries, passed]; conftest.py says it at the end


@contextmanager
def tried(what):
    count = TALLY.setdefault(what, [0, 0])
    count[0] += 1
    yield
    count[1] += 1


# --- a small world of good inputs; each attack spoils one of them in a copy


@pytest.fixture(scope="module")
def good(saved, saved_pixel, tmp_path_factory):
    """A data set, models, a finished run and a caption file that all work together, in the current folder."""
    from transformers import ResNetConfig, ResNetModel

    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("good")
        patch.chdir(folder)
        shutil.copytree(saved, "sd")
        shutil.copytree(saved_pixel, "px")
        data = load_dataset("mvtec_ad", write_tree(Path("tree"), 2, ("box",)))
        for path in Path("tree").rglob("*.png"):  # not compressed: other pixels take as many bytes
            Image.open(path).save(path, compress_level=0)
        lines = [json.dumps({"id": sample.id, "caption": "a box"}) for sample in data.samples]
        Path("said.jsonl").write_text("\n".join(lines) + "\n")
        unet = load_backbone("sd", "cpu").unet
        facts = {"base": "sd", "mode": "only mid", "timesteps": 1000, "schedule": "rebuilt"}
        save_guided("guided", unet, SemanticGuide.from_unet(unet, 2), facts)
        size = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic"}
        ResNetModel(ResNetConfig(**size)).save_pretrained("eyes")
        eyes = {"size": 32, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
        Path("eyes/preprocessor_config.json").write_text(json.dumps(eyes))
        results = runs.score(data, make_method("median", size=16, sigma=1.0, pool=2), "r", progress=False)
        results.folder.rename("r/one")
        coco_ad_tree(Path("coco"), (0,))
        for name in ("OK/a.png", "NG/b.png", "NG/b_mask.png"):
            save_image(Path("iad/lid") / name, np.full((8, 8, 3), 255, np.uint8))
        entries = [{"image_path": "OK/a.png", "anomaly_class": "OK", "mask_path": None}]
        entries += [{"image_path": "NG/b.png", "anomaly_class": "pit", "mask_path": "NG/b_mask.png"}]
        write("iad/realiad_jsons/lid.json", json.dumps({"train": [], "test": entries}))
        shutil.copy(ROOT / "data_manifest.yaml", "m.yaml")
        shutil.copytree("tree/box/test/good", "pictures")
        write("full/notes.txt", "mine")
        write("notes.txt", "mine")
        torch.save({"weight": torch.zeros(2)}, "c.ckpt")
        kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        nbformat.write(nbformat.v4.new_notebook(metadata=kernel), write("notebooks/01_x.ipynb", ""))
    return folder


def write(path, content):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.fixture
def world(good, tmp_path, monkeypatch):
    shutil.copytree(good, tmp_path / "w")
    monkeypatch.chdir(tmp_path / "w")
    return tmp_path / "w"


@pytest.fixture
def ask(monkeypatch, capsys):
    """What a command line gives: exit code, stdout, stderr. NAME=VALUE words in front are for the environment."""

    def ask(words):
        words = words.split() if isinstance(words, str) else list(words)
        while "=" in words[0]:
            monkeypatch.setenv(*words.pop(0).split("="))
        monkeypatch.setattr(sys, "argv", ["zsad", *words])
        capsys.readouterr()
        signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"no answer in a minute: {words}"))
        signal.alarm(60)
        with pytest.raises(SystemExit) as stop:
            cli.main()
        signal.alarm(0)
        return stop.value.code or 0, *capsys.readouterr()

    return ask


ERROR = r"(?<!\w)(?:zsad|Error): "


def message(err):
    """The one line of an error, which is the last on stderr; a progress bar may stand before it."""
    last = re.split(r"[\r\n]", err.rstrip("\n"))[-1]
    assert "Traceback" not in err and len(re.findall(ERROR, last)) == 1, f"not one line: {err}"
    return re.search(ERROR + ".*", last)[0]


def contents():
    return {path: path.read_bytes() for path in Path(".").rglob("*") if path.is_file()}


# --- bad inputs

SET = "score --dataset mvtec_ad --root tree --only --out new --device cpu"
MEDIAN = f"{SET} --method median"
DIVAD = f"{SET} --method divad --backbone sd --features pixels --set sigma=1 --set pool=2"
DIVAD += " --set inversion_steps=10 --set inference_steps=10 --set start_step=5"
GUIDED = f"{SET} --method vlmdiff --backbone guided --features pixels --captions said.jsonl"
PATH = f"{SET} --method diffpath --backbone px"
CAPTION = "caption mvtec_ad --root tree --device cpu"
PIXEL = "train lite-ddpm-cifar10 --data pictures --device cpu --steps 1 --out new"
OOD = "ood --in digits --out-set noise --device cpu --out new --train 8 --test 4"
BOTH = ("0", "-1", "1.5", "many", "nan")
NUMBERS = ("0", "-1", "1.5", "NaN", "Infinity", '"many"', "null", "[]", "true", "{}")
REALS = ("-1", "NaN", "Infinity", '"much"', "[]", "true")
OPTIONS = [  # (command, what the message names, values that are refused)
    (MEDIAN + " --batch-size {}", "batch", BOTH),
    (MEDIAN + " --limit {}", "limit", BOTH),
    (MEDIAN + " --set sigma={}", "sigma", (*REALS, "null")),
    (MEDIAN + " --set size={}", "size", NUMBERS),
    (MEDIAN + " --set pool={}", "pool", (*NUMBERS, "1000000")),
    (MEDIAN + " --set {}", "--set", ("sigma", "=1", "nose=1", "sigma:1")),
    (MEDIAN + " --{}", "No such option", ("nose", "sigma=1")),
    (MEDIAN + " --profile {}", "lite", ("huge", "LITE", "..", "0")),
    (MEDIAN + " --category {}", "box", ("cup", "..", "BOX")),
    (MEDIAN + " --root {}", "{}", ("nowhere", "notes.txt", "tree/box", "full")),
    (MEDIAN + " --dataset {}", "{}", ("nonsense", "visa", "..")),
    (MEDIAN + " --method {}", "{}", ("nonsense", "Median")),
    (MEDIAN + " --random-weights {}", "random", ("half", "unet")),
    (MEDIAN + " --captions {}", "captions", ("nowhere", "said.jsonl")),
    (MEDIAN + " --out {}", "notes.txt", ("notes.txt", "notes.txt/below")),
    (DIVAD + " --device {}", "device", ("tpu", "cuda:99", "cpu:x", "0")),
    (DIVAD + " --backbone {}", "{}", ("nowhere", "notes.txt", "full", "px")),
    (DIVAD + " --features {}", "{}", ("nowhere", "notes.txt", "full")),
    (DIVAD + " --features unet:{}", "{}", ("nowhere",)),
    (DIVAD + " --set map_size={}", "map_size", tuple(n for n in NUMBERS if n != "null")),
    (DIVAD + " --set sigma={}", "sigma", REALS),
    (DIVAD + " --set inversion_steps={}", "inversion_steps", NUMBERS),
    (DIVAD + " --set inversion_steps={}", "{}", ("1000000",)),
    (DIVAD + " --set inference_steps={}", "inference_steps", NUMBERS),
    (DIVAD + " --set start_step={}", "start", ("-1", "1000000", "1.5", '"x"')),
    (DIVAD + " --set start={}", "start", ("never", "1", "null")),
    (DIVAD + " --set guidance_scale={}", "guidance_scale", ("NaN", "Infinity", '"x"', "[]")),
    (DIVAD + " --set mode={}", "mode", ("mean", "1")),
    (DIVAD + " --set seed={}", "seed", ("1.5", '"x"', "NaN")),
    (PATH + " --set reference=synthad --set count={}", "count", ("0", "-1", "1.5", "NaN", '"x"')),
    (PATH + " --set reference={}", "{}", ("nonsense",)),
    (GUIDED + " --captions {}", "{}", ("nowhere", "notes.txt", "tree")),
    ("evaluate {}", "{}", ("nowhere", "notes.txt", "full")),
    ("evaluate --out {}", "{}", ("nowhere", "full")),
    ("evaluate r/one --bootstrap {}", "bootstrap", ("-1", "1.5", "nan")),
    ("evaluate r/one --{}", "Invalid value", ("variant=odd", "format=odd")),
    (CAPTION + " --batch-size {}", "batch", BOTH),
    (CAPTION + " --limit {}", "limit", BOTH),
    (CAPTION + " --model {}", "{}", ("nowhere", "full", "sd")),
    (CAPTION + " --out {}", "{}", ("notes.txt", "tree", "m.yaml", "c.ckpt")),
    (CAPTION + " --out {}", "notes.txt", ("notes.txt/below",)),
    (CAPTION + " --{}", "lite-captioner", ("prompt=What?", "revision=v2")),
    (CAPTION + " --split {}", "split", ("none",)),
    (CAPTION + " --device {}", "device", ("tpu",)),
    ("train {}", "lite-foundation", ("nonsense", "..", "stable-diffusion")),
    (PIXEL + " --steps {}", "steps", BOTH),
    (PIXEL + " --out {}", "{}", ("full", "notes.txt", "tree", "sd")),
    (PIXEL + " --data {}", "{}", ("nowhere", "notes.txt", "full")),
    (PIXEL + " --device {}", "device", ("tpu", "cuda:99")),
    (PIXEL + " --set {}", "--set", ("per_category", "=2")),
    (PIXEL + " --set {}=1", "{}", ("nose",)),
    ("train lite-ddpm-synthad --out new --set per_category={}", "per_category", ("-1", "1.5", "NaN", "many")),
    ("train dzad --out new --set base=lite-foundation --train-on {}", "{}", ("nonsense",)),
    ("train dzad --out new --train-on synthad-A --set timesteps={}", "timesteps", ("0", "1", "-1", "1.5")),
    ("convert {} --out new --base sd", "{}", ("nowhere", "tree", "notes.txt")),
    ("convert c.ckpt --out {} --base sd", "{}", ("full", "notes.txt", "sd")),
    ("convert c.ckpt --out new --hint {}", "hint", ("none",)),
    ("convert c.ckpt --out new --base {}", "{}", ("nowhere", "full", "px")),
    ("convert c.ckpt --out new --preset {}", "preset", ("none", "..")),
    ("convert {} --out new --base sd", "missing", ("c.ckpt",)),
    ("data make {}", "{}", ("nonsense", "mvtec_ad")),
    ("data make synthad --out {}", "{}", ("notes.txt", "full")),
    ("data make synthad --out {}", "notes.txt", ("notes.txt/below",)),
    ("data check {}", "{}", ("nonsense", "visa")),
    ("data check mvtec_ad --root {}", "{}", ("nowhere", "notes.txt", "full")),
    (OOD + " --base px --train {}", "train", BOTH),
    (OOD + " --base px --test {}", "test", BOTH),
    (OOD + " --base px --bootstrap {}", "bootstrap", ("-1", "x")),
    (OOD + " --base px --reading {}", "reading", ("none",)),
    (OOD + " --base px --device {}", "device", ("tpu",)),
    (OOD + " --base {}", "{}", ("nowhere", "full", "sd")),
    ("ood --base px --out-set noise --out new --train 8 --test 4 --in {}", "{}", ("nonsense",)),
    ("dzad --profile {}", "{}", ("huge",)),
    ("dzad --out new --target {}", "{}", ("mvtec_ad", "nonsense")),
    ("dzad --out new --every {}", "every", BOTH),
    ("dzad --out new --limit {}", "limit", BOTH),
    ("dzad --out new --reference-limit {}", "limit", BOTH),
    ("dzad --out new --bootstrap {}", "bootstrap", ("-1",)),
    ("report --out new --profile {}", "{}", ("huge",)),
    ("report --out new --only {}", "{}", ("99", "..")),
    ("report --out {}", "notes.txt", ("notes.txt", "notes.txt/below")),
]
DAMAGE = {
    "empty": b"",
    "truncated": b'{"a": ',
    "a list": b"[]",
    "a number": b"7",
    "a text": b'"x"',
    "nothing": b"null",
    "not a number": b"NaN",
    "deep": b"[" * 100_000,
    "not UTF-8": b'{"\xff\xfe": 1}',
}
JSON = {  # a file, by what is damaged in it as a whole: the command that reads it
    "r/one/run.json": "evaluate r/one",
    "guided/guided.json": GUIDED,
    "guided/guide/config.json": GUIDED,
    "eyes/preprocessor_config.json": f"{DIVAD} --features eyes",
    "eyes/config.json": f"{DIVAD} --features eyes",
    "sd/unet/config.json": DIVAD,
    "sd/vae/config.json": DIVAD,
    "sd/scheduler/scheduler_config.json": DIVAD,
    "sd/tokenizer/tokenizer.json": DIVAD,
    "px/unet/config.json": PATH,
    "px/scheduler/scheduler_config.json": PATH,
    "said.jsonl": GUIDED,
    "m.yaml": "ZSAD_MANIFEST=m.yaml data list",
    "iad/realiad_jsons/lid.json": "data check real_iad --root iad",
    "coco/meta_20_0.json": "data check coco_ad --root coco",
}
NAMED_BY = {"guided/guide/config.json": "guide", "eyes/config.json": "eyes"}  # where a part is named, not its file
NAMED_BY |= {f"{name}.json": name.rpartition("/")[0] for name in ("sd/unet/config", "sd/vae/config", "px/unet/config")}
NAMED_BY |= {"sd/scheduler/scheduler_config.json": "sched", "px/scheduler/scheduler_config.json": "sched"}
NAMED_BY |= {"sd/tokenizer/tokenizer.json": "token"}


def edit(path, *keys, value):
    """Put a value into a JSON file, below these keys."""
    content = part = json.loads(Path(path).read_text())
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    Path(path).write_text(json.dumps(content))


IAD, COCO = ("iad/realiad_jsons/lid.json", "test", 1), ("coco/meta_20_0.json", "test", "coco", 0)
CHECK_IAD, CHECK_COCO = JSON[IAD[0]], JSON[COCO[0]]
VALUES = [  # (command, what is named, where in a JSON file, values)
    ("evaluate r/one", "run.json", ("r/one/run.json", "samples"), (None, 7, "x", [[1]], [7], {"a": 1})),
    ("evaluate r/one", "run.json", ("r/one/run.json", "config"), (None, 7, [], "x")),
    ("evaluate r/one", "run.json", ("r/one/run.json", "method"), (None, 7, [])),
    (GUIDED, "timesteps", ("guided/guided.json", "timesteps"), (None, 0, -1, 1.5, "many", [], float("nan"))),
    (GUIDED, "mode", ("guided/guided.json", "mode"), (None, 7, "half", [])),
    (GUIDED, "schedule", ("guided/guided.json", "schedule"), (None, 7, "longer")),
    (GUIDED, "base", ("guided/guided.json", "base"), (7, ["sd"], {"a": 1})),
    (f"{DIVAD} --features eyes", "size", ("eyes/preprocessor_config.json", "size"), (None, 0, -1, "x", [], 1.5)),
    (f"{DIVAD} --features eyes", "image_mean", ("eyes/preprocessor_config.json", "image_mean"), (None, "x", [1], 7)),
    (f"{DIVAD} --features eyes", "image_std", ("eyes/preprocessor_config.json", "image_std"), ([0, 0, 0], ["x"] * 3)),
    (DIVAD, "cheduler", ("sd/scheduler/scheduler_config.json", "beta_schedule"), ("odd", 7)),
    (DIVAD, "cheduler", ("sd/scheduler/scheduler_config.json", "num_train_timesteps"), (0, -1, "x")),
    (DIVAD, "scaling_factor", ("sd/vae/config.json", "scaling_factor"), (0, "x", float("nan"))),
    (CHECK_IAD, "lid.json", (*IAD, "image_path"), (7, None, [], "gone.png")),
    (CHECK_IAD, "lid.json", (*IAD, "mask_path"), (7, [], {"a": 1}, "../../notes.txt")),
    (CHECK_IAD, "lid.json", (*IAD, "anomaly_class"), (7, None, [], {"a": 1}, "a/../../b")),
    (CHECK_IAD, "lid.json", (*IAD, "image_path"), ("../../pictures/000.png", "{here}/pictures/000.png", "out/000.png")),
    (CHECK_COCO, "meta_20_0.json", (*COCO, "img_path"), (7, None, [])),
    (CHECK_COCO, "meta_20_0.json", (*COCO, "img_path"), ("../pictures/000.png", "{here}/pictures/000.png")),
    (CHECK_COCO, "meta_20_0.json", (*COCO, "specie_name"), (7, "a/b")),
]


def spoil_json(where, value):
    """Write the value; {here} is this folder, and out/ a link that leads out of the data set."""
    file, *keys = where
    if value == "out/000.png":
        Path("iad/lid/out").symlink_to(Path("pictures").resolve())
    edit(file, *keys, value=value.format(here=Path.cwd()) if isinstance(value, str) else value)


def tensors(kind):
    """A spoiled safetensors file of the U-Net."""
    from safetensors.torch import load_file, save_file

    path = Path("sd/unet/diffusion_pytorch_model.safetensors")
    content, state = path.read_bytes(), load_file(path)
    changed = {"integers": lambda t: t.to(torch.int32), "NaN": lambda t: t * torch.nan, "too few": lambda t: t[:1]}
    if kind in changed:
        save_file({name: changed[kind](t).contiguous() for name, t in state.items()}, path, {"format": "pt"})
    else:
        cut = {"no bytes": b"", "half": content[: len(content) // 2], "a long header": b"\xff" * 8 + content[8:]}
        path.write_bytes(cut[kind])


IMAGE, MASK = "tree/box/test/spot/000.png", "tree/box/ground_truth/spot/000_mask.png"
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
BAD_IMAGES = {
    "no bytes": b"",
    "words": b"no picture",
    "EPS": EPS,
    "half a header": PNG,
    "huge": PNG + (200_000).to_bytes(4) * 2 + b"\x08\x02\0\0\0" + b"\0" * 40,
    "PDF": b"%PDF-1.4\n%%EOF",
}
FILES = [  # (name, command, named, what spoils a file, exit code)
    *[(f"{n} tensors", DIVAD, "unet", partial(tensors, n), 2)
      for n in ("integers", "NaN", "too few", "no bytes", "half", "a long header")],
    *[(f"{what}, {n}", words, what, partial(write, what, content), code)
      for n, content in BAD_IMAGES.items() for what, words, code in (
          (IMAGE, MEDIAN, 2), (MASK, MEDIAN, 2), (IMAGE, CAPTION, 2), (IMAGE, "data check mvtec_ad --root tree", 1),
          (MASK, "data check mvtec_ad --root tree", 1), ("pictures/000.png", PIXEL, 2))],
    *[(f"a batch file, {n}", "evaluate r/one", "batch-000000.npz", partial(write, "r/one/batch-000000.npz", c), 2)
      for n, c in {"no bytes": b"", "words": b"words", "half a zip": b"PK\x03\x04" + b"\0" * 30}.items()],
    ("a mask of another size", MEDIAN, MASK, lambda: save_image(Path(MASK), np.zeros((8, 8), np.uint8)), 2),
    ("an anomalous image without a mask", MEDIAN, MASK, lambda: Path(MASK).unlink(), 2),
    ("no tokenizer", DIVAD, "token", lambda: Path("sd/tokenizer/tokenizer.json").unlink(), 2),
    ("half a tokenizer", DIVAD, "token",
     lambda: Path("sd/tokenizer/tokenizer.json").rename("sd/tokenizer/vocab.json"), 2),
    ("a schedule without noise levels", DIVAD, "FlowMatch", lambda: write(
        "sd/scheduler/scheduler_config.json", '{"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}'), 2),
    ("no guide", GUIDED, "guide", lambda: shutil.rmtree("guided/guide"), 2),
    ("a decoder of no bytes", GUIDED, "guided",
     lambda: write("guided/decoder/diffusion_pytorch_model.safetensors", b""), 2),
    ("a category with no image", MEDIAN, "lid", lambda: Path("tree/lid/test").mkdir(parents=True), 2),
    ("a manifest of words", JSON["m.yaml"], "datasets", lambda: write("m.yaml", "datasets: [a]\ncheckpoints: {}"), 2),
    ("entries that are words", JSON["m.yaml"], "m.yaml",
     lambda: write("m.yaml", "datasets: {a: b}\ncheckpoints: {}"), 2),
    ("aliases upon aliases", JSON["m.yaml"], "m.yaml",
     lambda: write("m.yaml", "a: &a [x, x]\ndatasets: {b: [*a, *a]}\ncheckpoints: {}"), 2),
    ("a run that is no run", "evaluate r/one", "run.json", lambda: Path("r/one/run.json").unlink(), 2),
    ("a caption file torn in the middle", f"{CAPTION} --out said.jsonl", "said.jsonl",
     lambda: write("said.jsonl", '{"id": "a", "caption"\n{"id": "b"}\n'), 2),
    ("captions without words", GUIDED, "said.jsonl", lambda: write("said.jsonl", '{"id": "a", "caption": 7}\n'), 2),
    ("captions of others", GUIDED, "box/test", lambda: write("said.jsonl", '{"id": "a", "caption": "b"}\n'), 2),
    ("a name that is not UTF-8", MEDIAN, "", lambda: Path(IMAGE).with_name(os.fsdecode(b"\xff.png")).hardlink_to(IMAGE)
     or Path(MASK).with_name(os.fsdecode(b"\xff_mask.png")).hardlink_to(MASK), 0),
    ("a name as long as can be", "score --dataset folder --root pictures --only --method median --out long", "",
     lambda: Path("pictures/000.png").rename(Path("pictures") / ("a" * 251 + ".png")), 0),
]  # fmt: skip


def attacks():
    """(name, command, named, what spoils a file or None, exit code)"""
    for words, named, values in OPTIONS:
        for value in values:
            shown = value if value in ("NaN", "Infinity") else named.format(value)
            yield words.format(value), words.replace("{}", value), shown, None, 2
    for file, words in JSON.items():
        for damage, content in DAMAGE.items():
            if not (file == "said.jsonl" and damage == "truncated"):  # torn is what a kill leaves
                yield f"{file}: {damage}", words, NAMED_BY.get(file, file), partial(write, file, content), 2
    for words, named, where, values in VALUES:
        for value in values:
            yield f"{'/'.join(map(str, where))}: {value!r}", words, named, partial(spoil_json, where, value), 2
    yield from FILES


@pytest.mark.parametrize("words, named, spoil, code", [pytest.param(*row, id=name) for name, *row in attacks()])
def test_what_is_wrong_is_said_in_one_line(world, ask, words, named, spoil, code):
    if spoil:
        spoil()
    before = contents()
    with tried("bad inputs clear"):
        found, out, err = ask(words)
        assert found == code, err
        assert named in (message(err) if code == 2 else out + err), err
        assert {path: path.read_bytes() for path in before} == before, "a file was changed"
        assert not (code and list(Path(".").glob("new/*.safetensors"))), "something was written all the same"


# --- code in a pickle

CALLS = [
    ("os", "system", "touch ran"), ("posix", "system", "touch ran"), ("subprocess", "getoutput", "touch ran"),
    ("subprocess", "call", ["touch", "ran"]), ("builtins", "exec", "open('ran', 'w')"),
    ("builtins", "eval", "open('ran', 'w')"), ("io", "open", "ran", "w"), ("os", "mkdir", "ran"),
    ("os", "makedirs", "ran"), ("os", "mkfifo", "ran"),
]  # fmt: skip


def _arguments(values):
    return b"".join(pickle.dumps(value, 0)[:-1] for value in values)


FORMS = {
    "GLOBAL REDUCE": lambda module, name, values: b"c%b\n%b\n(%bt" % (module, name, _arguments(values)) + b"R.",
    "STACK_GLOBAL": lambda module, name, values: b"\x80\x04V%b\nV%b\n\x93(%btR." % (module, name, _arguments(values)),
    "INST": lambda module, name, values: b"(%bi%b\n%b\n." % (_arguments(values), module, name),
    "OBJ": lambda module, name, values: b"(c%b\n%b\n%bo." % (module, name, _arguments(values)),
    "in a dict": lambda module, name, values: b"(Va\nc%b\n%b\n(%btRd." % (module, name, _arguments(values)),
    "BUILD": lambda module, name, values: (
        b"ccollections\nOrderedDict\n(tRc%b\n%b\n(%btRb." % (module, name, _arguments(values))
    ),
}


@pytest.mark.parametrize("form, call", itertools.product(FORMS, CALLS), ids=str)
def test_no_code_of_a_checkpoint_runs(world, ask, form, call):
    module, name, *values = call
    write("bad.ckpt", FORMS[form](module.encode(), name.encode(), values))
    with tried("attacks repelled"):
        code, _, err = ask("convert bad.ckpt --base sd --out new")
        assert code == 2 and "bad.ckpt" in message(err) and not Path("ran").exists() and not Path("new").exists()
    try:  # the payload is one
        pickle.loads(Path("bad.ckpt").read_bytes())
    except Exception:
        pass
    assert Path("ran").exists()


# --- content that must stay content

SCRIPT = "<script>alert(1)</script>"


def cells(text):
    return [cell for row in csv.reader(io.StringIO(text)) for cell in row]


@pytest.mark.parametrize("sign", "=+-@")
def test_no_cell_of_a_csv_is_a_formula(world, ask, sign):
    Path("tree/box").rename(f"tree/{sign}1+1")
    with tried("attacks repelled"):
        assert ask(f"{MEDIAN} --out f")[0] == 0
        code, out, _ = ask("evaluate --out f --format csv --per-category --bootstrap 0")
        scores = next(Path("f").glob("*/scores.csv")).read_text()
        plots.Gallery("x", "g").table("t", pd.DataFrame({"a": [f"{sign}1+1"]}, [f"{sign}2+2"]), "")
        found = [cell for text in (out, scores, Path("g/tables/x_t.csv").read_text()) for cell in cells(text)]
        assert code == 0 and any("1+1" in cell for cell in found)
        assert [cell for cell in found if cell.startswith(f"{sign}1+") or cell.startswith(f"{sign}2+")] == []


def test_names_and_captions_stay_text_in_a_page(world, monkeypatch):
    shown = []
    monkeypatch.setattr(plots, "get_ipython", lambda: "a notebook")
    monkeypatch.setattr(plots, "display", lambda *things: shown.extend(things))
    frame = pd.DataFrame({SCRIPT: [SCRIPT, "javascript:alert(1)"]}, pd.Index([SCRIPT, "a"], name=SCRIPT))
    with tried("attacks repelled"):
        plots.Gallery("01_x", "g").table("t", frame, SCRIPT)
        page = report.write_index("lite", Path("g"), {"01_x": 1.0}, [SCRIPT], 0, 1.0).read_text()
        texts = [page, shown[0]._repr_html_(), shown[1].data]
        assert "alert(1)" in page and not any(re.search(r"(?<!\\)<script>alert", text) for text in texts)


@pytest.mark.parametrize("name", ["a\x1b[2Jb", "a\x07b", "a\x08b", "a\rb", "a\nb", "a\u202eb", "a\x9bb", "a\x7fb"])
def test_a_name_never_steers_the_terminal(world, ask, name):
    bad = set(name) - set("ab[2J")
    shutil.copytree("tree/box", f"tree/{name}")
    write(f"tree/{name}/test/good/000.png", b"")
    with tried("attacks repelled"):
        _, out, _ = ask("data check mvtec_ad --root tree")
        _, _, err = ask([*MEDIAN.split(), "--category", name])
        _, _, other = ask(["train", name])
        for text in (out.replace("\n", ""), message(err), message(other)) if bad != {"\n"} else (message(err),):
            assert not bad & set(text) - {"\n"}, repr(text)


def test_a_page_description_never_reaches_its_interpreter(world, monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("it was run"))
    with tried("attacks repelled"), pytest.raises(DataError, match="000.png"):
        read_image(write(IMAGE, EPS))


def test_masks_of_zeros_and_ones_mark_what_is_one(world, ask):
    with tried("bad inputs clear"):
        assert ask(f"{MEDIAN} --out f")[0] == 0
        for path in Path("tree").rglob("*_mask.png"):
            Image.fromarray((np.asarray(Image.open(path)) > 127).astype(np.uint8)).save(path)
        assert ask(f"{MEDIAN} --out g")[0] == 0
        one, other = (load_results(next(Path(out).iterdir())).masks for out in "fg")
        assert one.any() and np.array_equal(one, other)


# --- inputs that change in place


def bump(path):
    """Another last bit in the second number of a safetensors file's largest tensor."""
    content = bytearray(Path(path).read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    spans = [entry["data_offsets"] for key, entry in json.loads(content[8:header]).items() if key != "__metadata__"]
    content[header + max(spans, key=lambda span: span[1] - span[0])[0] + 4] ^= 1
    Path(path).write_bytes(content)


def repaint(path):
    size, pixels = Path(path).stat().st_size, np.asarray(Image.open(path)).copy()
    pixels[0, 0] = 255 - pixels[0, 0]
    Image.fromarray(pixels).save(path, compress_level=0)
    assert Path(path).stat().st_size == size


def rewrite(path, old, new):
    text = Path(path).read_text()
    assert old in text
    Path(path).write_text(text.replace(old, new, 1))


EYES, UNET = f"{DIVAD} --features eyes", "diffusion_pytorch_model.safetensors"
STALE = {
    "an image": (MEDIAN, partial(repaint, IMAGE)),
    "a mask": (MEDIAN, partial(repaint, MASK)),
    "a weight of the U-Net": (DIVAD, partial(bump, f"sd/unet/{UNET}")),
    "a weight of the autoencoder": (DIVAD, partial(bump, f"sd/vae/{UNET}")),
    "a weight of the text encoder": (DIVAD, partial(bump, "sd/text_encoder/model.safetensors")),
    "the scaling factor": (DIVAD, partial(edit, "sd/vae/config.json", "scaling_factor", value=0.8)),
    "the schedule": (DIVAD, partial(edit, "sd/scheduler/scheduler_config.json", "beta_end", value=0.013)),
    "its offset": (DIVAD, partial(edit, "sd/scheduler/scheduler_config.json", "steps_offset", value=0)),
    "the tokenizer": (DIVAD, partial(rewrite, "sd/tokenizer/tokenizer.json", '"b"', '"\u00e9"')),
    "the mean of the features": (EYES, partial(edit, "eyes/preprocessor_config.json", "image_mean", value=[0.4] * 3)),
    "the spread of the features": (EYES, partial(edit, "eyes/preprocessor_config.json", "image_std", value=[0.4] * 3)),
    "a weight of the features": (EYES, partial(bump, "eyes/model.safetensors")),
    "a weight of the guide": (GUIDED, partial(bump, f"guided/guide/{UNET}")),
    "a weight of its decoder": (GUIDED, partial(bump, f"guided/decoder/{UNET}")),
    "a weight of its base": (GUIDED, partial(bump, f"sd/vae/{UNET}")),
    "a caption": (GUIDED, partial(rewrite, "said.jsonl", "a box", "a lid")),
    "an option": (DIVAD, lambda: " --set sigma=2"),
}


@pytest.mark.parametrize("words, change", STALE.values(), ids=list(STALE))
def test_a_changed_input_is_another_run(world, ask, words, change):
    words = f"{words} --out f"
    with tried("stale traps caught"):
        assert ask(words)[0] == 0 and ask(words)[0] == 0
        (first,) = Path("f").iterdir()
        before = {path.name: path.read_bytes() for path in first.iterdir()}
        assert ask(words + (change() or ""))[0] == 0
        runs = [json.loads(path.read_text()) for path in Path("f").glob("*/run.json")]
        now = {path.name: path.read_bytes() for path in first.iterdir()}
        assert len({run["fingerprint"] for run in runs}) == 2 or now != before, "the old scores were taken"


# --- kills, a full disk

SLOW = f"{MEDIAN} --batch-size 1 --out f"
KILLED = {  # a command, and the files that it ends with
    "score": (SLOW, "f/*/scores.csv"),
    "caption": (f"{CAPTION} --batch-size 1 --out f/c.jsonl", "f/c.jsonl"),
    "train": (PIXEL.replace("--steps 1", "--steps 6"), "new/unet/*"),
    "report": ("report --out a", "a/tables/*.csv"),
}


@pytest.fixture
def slowly(monkeypatch):
    """Commands take long enough to be killed at any stage; the report is of a tiny model and an empty notebook.

    Called, it makes each score ten times as slow."""

    def slow(function, seconds=0.05):
        return lambda *args, **options: time.sleep(seconds) or function(*args, **options)

    def controls(*_, **__):
        own = {"inversion_steps": 10, "inference_steps": 10, "start_step": 5}
        yield "divad", profiles.make("lite", "divad", None, "cpu", backbone="sd", features="pixels", **own)

    monkeypatch.setattr(Median, "score", slow(Median.score))
    monkeypatch.setattr(captions.Captioner, "__call__", slow(captions.Captioner.__call__))
    monkeypatch.setattr(pixel, "fit", partial(fit.fit, checkpoint_every=2))
    monkeypatch.setattr(report, "with_controls", controls)
    monkeypatch.setattr(report, "DATASETS", ("mvtec_ad",))
    return partial(monkeypatch.setattr, Median, "score", slow(Median.score, 0.5))


def child(words, pipe, limit):
    sys.stdout = sys.stderr = os.fdopen(pipe, "w")
    sys.argv = ["zsad", *words.split()]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background has it ignored
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    cli.main()


class Command:
    """A command line in a process of its own."""

    def __init__(self, words, limit=None):
        self.pipe, write = os.pipe()
        self.process = forked(child, words, write, limit)
        os.close(write)

    def end(self):
        """(exit code, what it said)"""
        with os.fdopen(self.pipe, errors="replace") as said:
            text = said.read()
        self.process.join()
        return self.process.exitcode, text


def ended(pattern):
    return {path.as_posix(): path.read_bytes() for path in Path(".").glob(pattern) if path.is_file()}


@pytest.fixture(scope="module")
def undisturbed():
    """What each command ends with, and in how many seconds."""
    return {}


ONCE = dict.fromkeys(KILLED, 1)
OFTEN = {"score": 14, "caption": 14, "train": 12, "report": 6}  # fifty in all


@pytest.mark.parametrize(
    "name, kills", [*ONCE.items(), *(pytest.param(*often, marks=pytest.mark.full) for often in OFTEN.items())]
)
def test_a_command_killed_at_any_moment_ends_with_the_same_numbers(good, world, slowly, undisturbed, name, kills):
    words, pattern = KILLED[name]
    Path("data").mkdir()
    for k in range(kills + 1):
        for folder in ("f", "new", "a", "runs", "training", "data/mvtec_ad"):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(good / "tree", "data/mvtec_ad")
        if name not in undisturbed:
            start = time.perf_counter()
            code, said = Command(words).end()
            assert code == 0, said
            undisturbed[name] = ended(pattern), time.perf_counter() - start
            assert undisturbed[name][0]
            continue
        expected, seconds = undisturbed[name]
        command = Command(words)
        time.sleep(random.Random(f"{name} {kills} {k}").uniform(0.05, seconds))
        with tried("kills survived"):
            command.process.kill()
            command.end()
            if name == "train":
                assert ended(pattern) in ({}, expected), "half a model stands under its name"
            code, said = Command(words).end()
            assert code == 0, said
            assert ended(pattern) == expected
            left = [path for path in Path(".").rglob(f"{store.WRITING}*") if "training" not in path.parts]
            assert not left, "a file that was half written is still there"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_run_marked_interrupted(world, slowly, number):
    slowly()
    with tried("kills survived"):
        command, start = Command(SLOW), time.monotonic()
        while not list(Path("f").glob("*/batch-*.npz")):
            assert time.monotonic() < start + 20
            time.sleep(0.002)
        os.kill(command.process.pid, number)
        code, said = command.end()
        (path,) = Path("f").glob("*/run.json")
        assert json.loads(path.read_text())["state"] == "interrupted" and code != 0 and "Traceback" not in said


def test_a_busy_run_names_its_process(world, slowly, ask):
    slowly()
    command, start = Command(SLOW), time.monotonic()
    while not list(Path("f").glob("*/run.json")):
        assert time.monotonic() < start + 20
        time.sleep(0.002)
    with tried("bad inputs clear"):
        code, _, err = ask(SLOW)
        assert code == 2 and f"process {command.process.pid}" in message(err)
    command.process.kill()
    command.end()


FULL = {  # a command, how many bytes there is room for, what was there before
    "score": (f"{MEDIAN} --out {{}}/f", 8192, None),
    "caption": (f"{CAPTION} --out {{}}/c.jsonl", 400, None),
    "train": (PIXEL.replace("--out new", "--seed 1 --overwrite --out {}/new"), 20_000, PIXEL),
    "data make": ("data make synthad --out {}/made", 400, None),
}


@pytest.fixture(params=["a full disk", "a limit on files"])
def disk(request, world):
    """Whether `disk` is a small disk of its own; else a limit on the size of files stands for one."""
    Path("disk").mkdir()
    if request.param == "a limit on files":
        yield False
        return
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", "disk"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
    yield True
    subprocess.run(["umount", "-l", "disk"], check=True)


@pytest.mark.parametrize("name", FULL)
def test_a_full_disk_is_said_and_what_was_there_stays(disk, slowly, name):
    words, room, before = FULL[name]
    if before:
        code, said = Command(before).end()
        assert code == 0, said
        shutil.move("new", "disk/new")
        shutil.rmtree("training")
    if disk:
        Path("disk/training").mkdir()
        Path("training").symlink_to("disk/training")
        try:
            write("disk/filler", b"\0" * 9_000_000)
        except OSError:
            pass
        os.truncate("disk/filler", max(0, Path("disk/filler").stat().st_size - room))
    old = {path: path.read_bytes() for path in Path("disk").rglob("*") if path.is_file()}
    with tried("full disks"):
        code, said = Command(words.format("disk"), None if disk else room).end()
        assert code == 2, said
        assert any(words in message(said) for words in ("No space left", "too large")), said
        assert {path: path.read_bytes() for path in old} == old, "an old file was lost"
