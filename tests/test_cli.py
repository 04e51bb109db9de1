import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import forked, save_image, write_tree
from typer.testing import CliRunner

from conftest import shared_path
from zsad_lib import cli, methods, profiles
from zsad_lib.errors import ModelError, RunError
from zsad_lib.evaluation.runs import load_results
from zsad_lib.methods import Method, Scores
from zsad_lib.methods.vlmdiff import VLMDiff
from zsad_lib.profiles import PROFILES, options_of, profile_options

run_cli = CliRunner().invoke
TINY = {"size": 16, "sigma": 1.0, "pool": 2}


@dataclass
class Net:
    """Stands where a loaded network stands; a control is told by its name in the record."""

    name: str
    control: str | None = None
    image_size = 16

    @property
    def config(self):
        return {"name": self.name + (f" (random {self.control})" if self.control else ""), "weights": len(self.name)}


@dataclass(kw_only=True)
class Model(Method):
    """Stands where a method with a backbone stands: random weights make its map worthless."""

    name = "model"

    backbone: Net
    features: Net
    start: str = "official"
    sigma: float = 1.0
    seed: int = 0

    def score(self, images, ids, categories):
        maps = torch.zeros(len(ids), 16, 16) if self.control else images.mean(1)
        return Scores(maps.amax((1, 2)), maps)


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A tiny dataset in the working folder, tiny profiles, and the method "model" instead of DIVAD."""
    tiny = {
        name: {"backbone": "net", "features": "pixels", "batch_size": size, "model": {"start": name}, "baseline": TINY}
        for name, size in (("lite", 3), ("paper", 8))
    }
    monkeypatch.setattr(profiles, "PROFILES", tiny)
    monkeypatch.setattr(
        methods, "LOADERS", {"model": lambda name, device, random_weights=None: Net(name, random_weights)}
    )
    monkeypatch.setattr(methods, "load_features", lambda name, device, random_weights=None: Net(name, random_weights))
    monkeypatch.setattr(
        methods, "METHODS", {"model": Model} | {name: methods.METHODS[name] for name in methods.BASELINES}
    )
    monkeypatch.chdir(tmp_path)
    return write_tree(tmp_path / "tree", per_class=4)


@pytest.fixture(autouse=True)
def own_signals():
    """`cli.main` leaves its handler behind."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def invoke(*words, code=0):
    result = run_cli(cli.app, [str(word) for word in words], env={"COLUMNS": "200"})
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result.stdout if code == 0 else result.output


def score(tree, *words, code=0):
    return invoke("score", "--dataset", "mvtec_ad", "--root", tree, "--method", "model", *words, code=code)


def runs(out="runs"):
    return [json.loads(path.read_text()) for path in sorted(Path(out).glob("*/run.json"))]


COMMANDS = [
    "",
    "data",
    "data make",
    "data list",
    "data check",
    "train",
    "measure",
    "score",
    "caption",
    "evaluate",
    "ood",
    "dzad",
    "report",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command):
    text = invoke(*command.split(), "--help")
    assert "Usage" in text and len(text.splitlines()) > 5


def test_score_then_evaluate_prints_the_method_beside_its_controls(tree):
    told = score(tree)
    table = invoke("evaluate")
    rows = ["model, net", "model, net (random unet)", "local_contrast", "median", "patch_knn"]
    for row in rows:
        assert f"\n{row}: 16 images" in "\n" + told
    lines = table.splitlines()
    assert [line for line in lines if line.startswith("mvtec_ad, 16 images")] == [lines[2]]
    positions = [table.index(row + "  ") for row in rows]
    assert positions == sorted(positions), "a method comes before its controls"
    for column in (
        "image_auroc",
        "image_ap",
        "image_f1max",
        "pixel_auroc",
        "pixel_ap",
        "pixel_f1max",
        "aupro",
    ):
        assert column in lines[0]
    assert "50.0 [50.0, 50.0]" in next(line for line in lines if "(random unet)" in line)
    assert "95 % bootstrap interval" in table


def test_only_leaves_the_controls_out_and_random_weights_picks_them(tree):
    score(tree, "--only")
    assert [run["config"]["backbone"]["name"] for run in runs()] == ["net"]
    score(tree, "--only", "--random-weights", "all", "--out", "control")
    assert [run["config"]["backbone"]["name"] for run in runs("control")] == ["net (random all)"]
    invoke("score", "--dataset", "mvtec_ad", "--root", tree, "--method", "median", "--out", "one")
    assert [run["method"] for run in runs("one")] == ["median"]
    invoke("score", "--dataset", "mvtec_ad", "--root", tree, "--method", "all", "--out", "all")
    assert sorted(run["method"] for run in runs("all")) == [
        "local_contrast",
        "median",
        "model",
        "model",
        "patch_knn",
    ]


def test_options_reach_the_methods_that_have_them(tree):
    score(tree, "--set", "start=matched", "--set", "sigma=2.5", "--backbone", "other", "--profile", "paper")
    found = {run["method"]: run["config"] for run in runs()}
    assert found["model"]["start"] == "matched" and found["model"]["backbone"]["name"].startswith("other")
    assert {config["sigma"] for config in found.values()} == {2.5}
    score(tree, "--only", "--profile", "paper", "--out", "plain")
    assert runs("plain")[0]["config"]["start"] == "paper", "the profile gives what the command line does not"
    assert "--set nose=1: expected NAME=VALUE" in score(tree, "--set", "nose=1", code=2)
    assert "'huge'" in str(run_cli(cli.app, ["score", "--profile", "huge"]).exception)


def test_captions_reach_the_methods_that_read_them(tree, monkeypatch):
    @dataclass(kw_only=True)
    class Reader(Model):
        captions: Any = None

    monkeypatch.setitem(methods.METHODS, "model", Reader)
    said = {sample: f"about {sample}" for sample in ("lid/test/good/000", "lid/test/spot/000")}
    lines = [json.dumps({"id": sample, "caption": text}) for sample, text in said.items()]
    Path("said.jsonl").write_text("".join(f"{line}\n" for line in lines))
    score(tree, "--captions", "said.jsonl", "--limit", 1, "--category", "lid")
    read = {run["method"]: run["config"].get("captions") for run in runs()}
    assert read == {"model": said, "local_contrast": None, "median": None, "patch_knn": None}


def test_captions_for_a_method_that_reads_none_are_refused(tree, monkeypatch, capsys):
    words = ["score", "--dataset", "mvtec_ad", "--root", str(tree), "--captions", "no.jsonl"]
    assert "patch_knn reads none" in invoke(*words, "--method", "patch_knn", code=2)
    monkeypatch.setattr(sys, "argv", ["zsad", *words, "--method", "vlmdiff"])
    monkeypatch.setitem(methods.METHODS, "vlmdiff", VLMDiff)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2 and "zsad: no caption file at no.jsonl" in capsys.readouterr().err


def test_every_profile_has_what_score_needs():
    for profile, settings in PROFILES.items():
        assert settings["batch_size"] > 0
        for name in methods.METHODS:
            options = set(profile_options(profile, name))
            assert {"backbone", "features"} <= options
            assert options - {"backbone", "features"} <= set(methods.method_options(name)) <= set(options_of(name))


def test_batch_size_is_the_profiles_unless_given(tree):
    score(tree, "--only")
    assert len(list(Path("runs").glob("*/batch-*.npz"))) == 6
    score(tree, "--only", "--batch-size", 16, "--out", "one")
    assert len(list(Path("one").glob("*/batch-*.npz"))) == 1


def test_selection_of_images(tree):
    score(tree, "--only", "--limit", 2, "--category", "lid")
    assert [sample[0] for sample in runs()[0]["samples"]] == [
        f"lid/test/{defect}/{i:03}" for defect in ("good", "spot") for i in range(2)
    ]


def test_rows_that_differ_in_a_setting_say_so(tree):
    score(tree, "--only")
    score(tree, "--only", "--set", "start=matched")
    table = invoke("evaluate", "--bootstrap", 0)
    assert "model, net, start=lite " in table and "model, net, start=matched " in table
    assert "[" not in table.splitlines()[2]


def test_runs_over_different_images_never_share_a_row_group(tree):
    score(tree, "--only")
    score(tree, "--only", "--limit", 2)
    table = invoke("evaluate", "--bootstrap", 0)
    assert "mvtec_ad, 16 images" in table and "mvtec_ad, 8 images" in table


def test_formats_and_rows_of_evaluate(tree):
    score(tree, "--only")
    folder = next(Path("runs").glob("mvtec_ad-*"))
    csv = invoke("evaluate", folder, "--format", "csv", "--per-category").splitlines()
    assert csv[0] == "dataset,method,category,metric,value,low,high,n_normal,n_anomalous,reason"
    assert len(csv) == 1 + 3 * 7 and '"model, net",box,image_auroc,1.0,1.0,1.0,4,4,' in csv[1]
    assert "| model, net | lid" in invoke("evaluate", folder, "--format", "markdown", "--per-category")
    assert r"\begin{tabular}" in invoke("evaluate", folder, "--format", "latex", "--variant", "official")
    assert "box/spot" in invoke("evaluate", folder, "--per-defect", "--bootstrap", 0)


def test_evaluate_leaves_out_unfinished_runs_and_other_datasets(tree):
    score(tree, "--only")
    path = next(Path("runs").glob("*/run.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"state": "interrupted"}))
    result = run_cli(cli.app, ["evaluate"])
    assert isinstance(result.exception, RunError) and "left out, interrupted" in str(result.exception)
    result = run_cli(cli.app, ["evaluate", "--dataset", "synthad"])
    assert "no finished run on synthad" in str(result.exception)


def test_own_folder_gets_scores_and_no_table(tree):
    told = invoke("score", "--dataset", "folder", "--root", tree / "box" / "test", "--method", "model")
    assert "no labels" in told and len(runs()) == 1
    lines = next(Path("runs").glob("*/scores.csv")).read_text().splitlines()
    assert len(lines) == 9 and lines[0] == "id,category,label,defect,pred_score"
    assert "left out, no labels" in str(run_cli(cli.app, ["evaluate"]).exception)


def test_data_check_names_bad_files(tree):
    assert "all readable" in invoke("data", "check", "mvtec_ad", "--root", tree)
    bad = tree / "box" / "test" / "good" / "001.png"
    bad.write_bytes(bad.read_bytes()[:60])
    small = tree / "lid" / "ground_truth" / "spot" / "002_mask.png"
    save_image(small, np.zeros((8, 8), np.uint8))
    text = invoke("data", "check", "mvtec_ad", "--root", tree, code=1)
    assert str(bad) in text and str(small) in text and "2 bad" in text


def test_data_list_and_make(tmp_path, monkeypatch):
    text = invoke("data", "list")
    assert "\nmvtec_ad: MVTec" in text and "CC BY-NC-SA" in text and "visa (no reader yet)" in text
    assert "\nreal_iad: Real-IAD" in text
    made = []
    monkeypatch.setattr("zsad_lite.synthad.export", made.append)
    invoke("data", "make", "synthad", "--out", tmp_path / "here")
    assert made == [tmp_path / "here"]
    assert "is not generated" in invoke("data", "make", "mvtec_ad", code=2)


def test_train_and_report_pass_their_options_on(monkeypatch):
    calls = []
    monkeypatch.setattr("zsad_lite.training.recipes.train", lambda *args, **options: calls.append((args, options)))
    monkeypatch.setattr("zsad_lib.notebook.report.build", lambda *args, **options: calls.append((args, options)))
    invoke("train", "lite-foundation", "--steps", 5, "--seed", 2, "--no-resume")
    invoke("report", "--only", "02", "--out", "there", "--seed", 3)
    assert calls[0] == (
        ("lite-foundation",),
        {"steps": 5, "seed": 2, "device": "auto", "resume": False, "overwrite": False},
    )
    assert calls[1] == ((), {"profile": "lite", "out": Path("there"), "only": "02", "seed": 3})


def test_convert_takes_a_preset_for_pixel_models(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr("zsad_lib.diffusion.convert_pixel.convert_pixel_checkpoint", lambda *args: calls.append(args))
    text = invoke("convert", "model.pt", "--preset", "diffpath-celeba32", "--out", tmp_path / "new")
    assert calls == [(Path("model.pt"), tmp_path / "new", "diffpath-celeba32")] and "every tensor placed" in text


def test_dzad_writes_and_prints_every_table(tmp_path, monkeypatch):
    from zsad_lib.papers import dzad_tables

    calls = []

    def study(*args, **options):
        calls.append((args, options))
        table = pd.DataFrame({"DZAD (measured, lite)": ["57.1 [48.0, 66.0]"]}, index=["synthad-B: mean"])
        return {"table1": table, "table2": table}, pd.DataFrame({"value": [0.571]}), {"magnetic_tile": "no folder"}

    monkeypatch.setattr(dzad_tables, "study", study)
    text = invoke("dzad", "--target", "synthad-B", "--limit", 2, "--every", 3, "--out", tmp_path / "new")
    given = {"limit": 2, "every": 3, "reference_limit": 1, "n_bootstrap": 200, "seed": 0, "folder": tmp_path / "new"}
    ((cross,), smoothing, profile), options = calls[0]
    assert (cross.target, cross.auxiliary, profile) == ("synthad-B", "synthad-A", "lite")
    assert smoothing == {"sigma": 1.5, "pool": 2} and options == {**given, "progress": None}
    assert "mvtec_ad" in str(run_cli(cli.app, ["dzad", "--target", "mvtec_ad"]).exception)
    assert text.count("57.1 [48.0, 66.0]") == 2 and "left out: magnetic_tile: no folder" in text
    assert "57.1 [48.0, 66.0]" in (tmp_path / "new/table2.md").read_text()
    assert (tmp_path / "new/aurocs.csv").read_text() == "value\n0.571\n"
    assert "'huge'" in str(run_cli(cli.app, ["dzad", "--profile", "huge"]).exception)


@pytest.mark.parametrize(
    "words, message",
    [
        (["evaluate", "--out", "nowhere"], "zsad: no finished run in nowhere"),
        (["data", "check", "mvtec_ad", "--root", "nowhere"], "zsad: no folder at nowhere"),
        (["data", "check", "nonsense"], "nonsense"),
    ],
)
def test_known_errors_are_one_line_and_exit_2(monkeypatch, capsys, tmp_path, words, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["zsad", *words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    errors = capsys.readouterr().err
    assert message in errors and "Traceback" not in errors and len(errors.strip().splitlines()) == 1


FAILURES = [
    (OSError(28, "No space left on device", "runs/a"), 2, "No space left on device: 'runs/a'"),
    (EOFError("Ran out of input"), 2, "Ran out of input"),
    (RecursionError("too deep"), 2, "RecursionError: too deep"),
    (RunError("a\nb \x1b[2J\u202e\udcff"), 2, "zsad: a b ?[2J??"),
    (RuntimeError("CUDA out of memory.\nTried to allocate 20.00 GiB"), 2, "use a smaller --batch-size"),
    (MemoryError(), 2, "use a smaller --batch-size"),
    (KeyboardInterrupt(), 130, "zsad: stopped"),
]


@pytest.mark.parametrize(("error", "code", "words"), FAILURES)
def test_every_failure_is_one_line_and_has_its_exit_code(monkeypatch, capsys, error, code, words):
    def fail():
        raise error

    monkeypatch.setattr("zsad_lib.manifest.load_manifest", fail)
    monkeypatch.setattr(sys, "argv", ["zsad", "data", "list"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    errors = capsys.readouterr().err
    assert stop.value.code == code and words in errors and len(errors.splitlines()) == 1


def test_a_mistake_of_the_program_is_not_hidden(monkeypatch):
    monkeypatch.setattr("zsad_lib.manifest.load_manifest", lambda: {}["not there"])
    monkeypatch.setattr(sys, "argv", ["zsad", "data", "list"])
    with pytest.raises(KeyError):
        cli.main()
    monkeypatch.setattr(cli, "app", lambda: (_ for _ in ()).throw(RuntimeError("shapes do not fit")))
    with pytest.raises(RuntimeError, match="shapes"):
        cli.main()


def end_oneself():
    cli.app = lambda: os.kill(os.getpid(), signal.SIGTERM)
    cli.main()


def test_sigterm_is_an_exception_with_its_own_exit_code():
    process = forked(end_oneself)
    process.join()
    assert process.exitcode == 143


def test_exit_codes_are_documented():
    words = " ".join(invoke("--help").split())
    assert "0 done, 1 found bad" in words and "2 asked wrongly" in words and "143 by SIGTERM" in words


@pytest.mark.parametrize(
    "words",
    [
        ["score", "--batch-size", "0"],
        ["score", "--limit", "-1"],
        ["caption", "synthad", "--batch-size", "0"],
        ["train", "lite-foundation", "--steps", "0"],
        ["train", "lite-foundation", "--seed", "-1"],
        ["evaluate", "--bootstrap", "-1"],
        ["ood", "--train", "0"],
        ["ood", "--test", "-3"],
        ["dzad", "--reference-limit", "0"],
        ["report", "--seed", str(2**32)],
        ["train", "nothing", "--set", "sigma=NaN"],
        ["train", "nothing", "--set", "sigma=[1, -Infinity]"],
    ],
)
def test_numbers_that_have_no_meaning_are_refused(monkeypatch, words):
    monkeypatch.setattr("zsad_lib.data.datasets.load_dataset", lambda *_, **__: None)
    text = invoke(*words, code=2)
    assert words[-2] in text and "Error" in text


def test_names_from_outside_cannot_steer_the_terminal(tree):
    bad = tree / "box" / "test" / "good" / "a\x1b[2J\nb\u202e\r.png"
    bad.write_text("no image")
    os.rename(tree / "lid", os.fsencode(tree) + b"/l\xff")
    result = run_cli(cli.app, ["data", "check", "mvtec_ad", "--root", str(tree)])
    assert result.exit_code == 1 and "a?[2J?b??.png" in result.output and "\x1b" not in result.output
    assert len([line for line in result.output.splitlines() if line.startswith("bad: ")]) == 1


def test_bars_and_underscores_of_names_stay_in_their_cells(tree):
    (tree / "lid").rename(tree / "a|b_c")
    score(tree, "--only")
    assert r"| a\|b_c" in invoke("evaluate", "--bootstrap", 0, "--format", "markdown", "--per-category")
    assert r"a|b\_c &" in invoke("evaluate", "--bootstrap", 0, "--format", "latex", "--per-category")


def test_unknown_errors_keep_their_traceback(monkeypatch):
    def broken():
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "app", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_missing_checkpoint_is_said_before_anything_is_scored(tree, monkeypatch):
    def load(name, device, random_weights=None):
        raise ModelError("checkpoint net is not there")

    monkeypatch.setattr(methods, "LOADERS", {"model": load})
    result = run_cli(cli.app, ["score", "--dataset", "mvtec_ad", "--root", str(tree), "--method", "model"])
    assert isinstance(result.exception, ModelError) and not Path("runs").exists()


def test_divad_on_a_tiny_stable_diffusion(tmp_path, monkeypatch):
    """The real method through the command line, its control included."""
    backbone = shared_path("golden/tiny_sd")
    settings = {"inversion_steps": 10, "inference_steps": 10, "start_step": 5, "sigma": 1.0, "pool": 2}
    models = {"backbone": str(backbone), "features": "pixels", "batch_size": 16}
    monkeypatch.setattr(profiles, "PROFILES", {"lite": {**models, "divad": settings, "baseline": TINY | {"size": 64}}})
    monkeypatch.chdir(tmp_path)
    tree = write_tree(tmp_path / "tree", per_class=1, categories=("box",))
    told = invoke("score", "--dataset", "mvtec_ad", "--root", tree)
    assert told.count("2 images") == 5 and "divad, tiny_sd (random U-Net)" in told
    maps = {
        results.run["config"]["backbone"]["name"]: results.maps
        for results in map(load_results, Path("runs").glob("*-divad-*"))
    }
    assert len(maps) == 2 and not np.allclose(maps["tiny_sd"], maps["tiny_sd (random U-Net)"])
    assert "divad, tiny_sd (random U-Net)" in invoke("evaluate", "--bootstrap", 10)


def test_ood_prints_and_keeps_both_tables(tmp_path, monkeypatch):
    from diffusers import DDPMPipeline, DDPMScheduler
    from tiny import tiny_unet

    from zsad_lib.methods.stein_ssim import Reading
    from zsad_lib.papers import ood

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ood, "all_readings", lambda _: {ood.label(r): r for r in (Reading(), ood.PathReading("1d"))})
    DDPMPipeline(tiny_unet(), DDPMScheduler()).save_pretrained("tiny")
    words = ["ood", "--base", "tiny", "--in", "digits", "--out-set", "noise", "--out-set", "magnetic_tile"]
    words += ["--train", 8, "--test", 5, "--bootstrap", 10, "--device", "cpu", "--out", "here"]
    text = invoke(*words)
    assert (
        text.startswith(f"{ood.label(Reading())}: AUROC") and "left out, no such folder at hand: magnetic_tile" in text
    )
    assert "tiny (random U-Net)" in text and "DiffPath-1D" in text and "[" in text
    numbers = Path("here/aurocs.csv").read_text().splitlines()
    assert numbers[0].startswith("base,in,out,reading,evaluations,value") and len(numbers) == 1 + 2 * 2 * 2
    assert "| tiny | digits |" in " ".join(Path("here/matrix.md").read_text().split())
    assert "(random U-Net)" not in invoke(*words, "--no-control", "--reading", "DiffPath-1D")
    assert "no reading 'none'" in invoke(*words, "--reading", "none", code=2)


def caption(tree, *words, code=0):
    return invoke("caption", "mvtec_ad", "--root", tree, "--device", "cpu", *words, code=code)


def test_caption_writes_a_file_and_goes_on(tree):
    from zsad_lib.data.captions import read_captions

    told = caption(tree, "--limit", 2, "--category", "lid")
    path = Path("runs/captions/mvtec_ad-lite-captioner-objects.jsonl")
    assert f"4 captions, in {path}" in told and "lite-captioner (sha256:" in told
    first = path.read_bytes()
    assert set(read_captions(path)) == {f"lid/test/{defect}/{i:03}" for defect in ("good", "spot") for i in range(2)}
    assert "16 captions" in caption(tree, "--batch-size", 5)
    assert path.read_bytes().startswith(first) and len(read_captions(path)) == 16
    save_image(tree / "lid" / "train" / "good" / "000.png", np.full((16, 16, 3), 90, np.uint8))
    caption(tree, "--split", "train", "--out", "there/train.jsonl", "--prompt-type", "scenes")
    caption(tree, "--split", "both", "--out", "there/both.jsonl")
    train, both = read_captions("there/train.jsonl"), read_captions("there/both.jsonl")
    assert set(train) == {"lid/train/good/000"} and set(both) == set(train) | set(read_captions(path))


def test_caption_asks_a_model_that_can_be_asked(tree):
    import tiny_captioners as tiny

    from zsad_lib.diffusion.loading import quiet

    with quiet(bars=True):
        Path("models/speaker").mkdir(parents=True)
        tiny.save_llava(Path("models/speaker"))
    words = ["--model", "models/speaker", "--limit", 1]
    caption(tree, *words, "--prompt-type", "inspector")
    caption(tree, *words, "--prompt", "What is it?")
    lines = {
        kind: [
            json.loads(line) for line in Path(f"runs/captions/mvtec_ad-speaker-{kind}.jsonl").read_text().splitlines()
        ]
        for kind in ("inspector", "custom")
    }
    assert {line["prompt"] for line in lines["custom"]} == {"What is it?"}
    assert all("inspect" in line["prompt"] and line["model"] == "speaker" for line in lines["inspector"])
    assert "4 captions" in caption(tree, *words, "--prompt", "And this?", "--overwrite")


@pytest.mark.parametrize(
    "words, message",
    [
        (["--prompt", "What is it?"], "zsad: lite-captioner takes no prompt: leave --prompt out"),
        (["--revision", "v2"], "has no revision 'v2'"),
        (["--model", "no-such-model"], "'no-such-model' is no folder"),
        (["--category", "cup"], "has no category 'cup'"),
    ],
)
def test_caption_errors_are_one_line(tree, monkeypatch, capsys, words, message):
    monkeypatch.setattr(sys, "argv", ["zsad", "caption", "mvtec_ad", "--root", str(tree), *words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    errors = capsys.readouterr().err
    assert stop.value.code == 2 and message in errors and len(errors.strip().splitlines()) == 1


def test_labels_say_in_a_few_words_what_sets_runs_apart():
    from zsad_lib.evaluation.labels import run_labels

    def run(control=None, **config):
        backbone = {"name": "net", "weights": "1"}
        features = {"name": "small+pixels", "parts": [{"name": "small", "size": 128}]}
        return {"method": "divad", "control": control, "fingerprint": "abcdef" + str(len(config)),
                "config": {"method": "divad", "backbone": backbone, "features": features, "start": "official",
                           "t_latent": 51, "t_denoise": 251, "captions": None, **config}}  # fmt: skip

    assert run_labels([run()]) == ["divad, net"]
    untrained = run("features", features={"name": "small (random weights)+pixels"})
    assert run_labels([run(), untrained]) == ["divad, net", "divad, net (untrained features)"]
    assert run_labels([run(), run(start="matched", t_latent=251)]) == [
        "divad, net, start=official", "divad, net, start=matched"
    ]  # fmt: skip
    assert run_labels([run(), run(t_latent=1)]) == ["divad, net, t_latent=51", "divad, net, t_latent=1"]
    assert run_labels([run(), run(features={"name": "pixels", "size": None})]) == [
        "divad, net, features=small+pixels", "divad, net, features=pixels"
    ]  # fmt: skip
    said = run(captions={"images": 9, "sha256": "aa"})
    assert run_labels([run(), said]) == ["divad, net, captions=None", "divad, net, captions of 9 images"]
    many = run(**dict(zip("abcdef", range(6), strict=True)))
    assert run_labels([many, run()])[0].endswith("…") and len(set(run_labels([many, run()]))) == 2
    other = run(backbone={"name": "net", "weights": "2"})
    assert len(set(run_labels([run(), other | {"fingerprint": "123456"}]))) == 2
