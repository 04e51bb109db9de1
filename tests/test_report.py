"""The report: exhibits on disk, an index that shows them, provenance, and clear failures."""

import json
from importlib.metadata import version
from pathlib import Path

import nbformat
import pytest

from zsad_lib.errors import MethodError, RunError
from zsad_lib.notebook import report
from zsad_lib.profiles import PROFILES, profile_options


def _notebook(path: Path, *cells: str) -> None:
    parameters = nbformat.v4.new_code_cell('profile = "lite"\nseed = 0\nout = ""')
    parameters.metadata["tags"] = ["parameters"]
    notebook = nbformat.v4.new_notebook(cells=[parameters, *map(nbformat.v4.new_code_cell, cells)])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path.parent.mkdir(exist_ok=True)
    nbformat.write(notebook, path)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """An empty project folder whose checkpoints and data have no hashes to compute; one notebook runs at a time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report.manifest, "folder_hash", lambda path: "0" * 64)
    monkeypatch.setattr(report, "DATASETS", ())
    monkeypatch.setattr(report.torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return tmp_path


GALLERY = """
import pandas as pd, matplotlib.pyplot as plt
from zsad_lib.notebook.plots import Gallery
gallery = Gallery("03_tiny", out)
figure, axis = plt.subplots()
axis.plot([0, 1])
gallery.figure("line", figure, "A line.")
gallery.table("numbers", pd.DataFrame({"AUROC": ["87.2 [84.1, 90.0]"]}, index=["gauge"]), "Some numbers.")
"""


def test_build_writes_every_exhibit_the_notebooks_and_where_they_come_from(project):
    _notebook(project / "notebooks/03_tiny.ipynb", GALLERY)
    page = report.build(out="artifacts").read_text()
    out = project / "artifacts"
    for name in ("figures/03_tiny_line.png", "figures/03_tiny_line.svg", "notebooks/03_tiny.html"):
        assert (out / name).stat().st_size > 1000
    for suffix in ("csv", "md", "tex"):
        assert "87.2 [84.1, 90.0]" in (out / f"tables/03_tiny_numbers.{suffix}").read_text()
    assert 'src="figures/03_tiny_line.png"' in page and "87.2 [84.1, 90.0]" in page and "Some numbers." in page
    facts = json.loads((out / "provenance.json").read_text())
    assert set(facts["durations_s"]) == {"benchmark", "03_tiny"} and facts["durations_s"]["03_tiny"] > 0
    assert facts["packages"]["torch"] == version("torch")
    assert {"revision", "checkpoints_sha256", "datasets_sha256", "seed", "command"} <= set(facts)


def test_two_notebooks_run_at_a_time_and_stand_in_their_order(project, monkeypatch):
    monkeypatch.setattr(report.torch.cuda, "is_available", lambda: False)
    meet = """
import os, pathlib, time
here, there = pathlib.Path(out, {!r}), pathlib.Path(out, {!r})
here.touch()
while not there.exists():
    time.sleep(0.05)
assert int(os.environ["OMP_NUM_THREADS"]) == max(1, os.cpu_count() // 2)
time.sleep({})
"""
    _notebook(project / "notebooks/03_slow.ipynb", meet.format("three", "four", 1))
    _notebook(project / "notebooks/04_fast.ipynb", meet.format("four", "three", 0))
    page = report.build(out="artifacts").read_text()
    assert page.index('id="benchmark"') < page.index('id="03_slow"') < page.index('id="04_fast"')
    facts = json.loads((project / "artifacts/provenance.json").read_text())
    assert facts["seconds"] < sum(facts["durations_s"].values())
    assert "OMP_NUM_THREADS" not in report.os.environ


def test_a_failing_notebook_is_named_with_its_error_and_stops_what_has_not_begun(project):
    _notebook(project / "notebooks/03_bad.ipynb", "1 / 0")
    for k in range(4, 8):
        _notebook(project / f"notebooks/0{k}_good.ipynb", "x = 1")
    with pytest.raises(RunError, match="03_bad.ipynb .* ZeroDivisionError"):
        report.build(out="artifacts")
    assert not (project / "artifacts/notebooks/07_good.html").exists() and "OMP_NUM_THREADS" not in report.os.environ
    with pytest.raises(RunError, match="09"):
        report.build(only="09")


def test_an_unknown_profile_is_said_before_anything_is_run(project):
    with pytest.raises(MethodError, match="'huge'"):
        report.build(profile="huge")
    assert not (project / "artifacts").exists()


def test_notes_and_captions_stay_text_on_the_page(project):
    _notebook(project / "notebooks/03_tiny.ipynb", GALLERY)
    out = project / "artifacts"
    (out / "exhibits").mkdir(parents=True)
    (out / "tables").mkdir()
    entry = {"kind": "table", "name": "03_tiny_t", "caption": "<script>alert(1)</script>"}
    (out / "exhibits/03_tiny.jsonl").write_text(json.dumps(entry) + "\n")
    (out / "tables/03_tiny_t.html").write_text("<table></table>")
    page = report.write_index("lite", out, {"03_tiny": 1.0}, ['"><img onerror=x> \udcff'], 0, 1.0).read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page and "<img onerror" not in page


@pytest.mark.parametrize("profile", PROFILES)
def test_profiles_differ_in_names_and_sizes_only(profile):
    assert PROFILES[profile].keys() == PROFILES["lite"].keys()
    for method in ("divad", "median"):
        assert profile_options(profile, method).keys() == profile_options("lite", method).keys()
    with pytest.raises((KeyError, ValueError), match="huge.*lite, paper"):
        profile_options("huge", "divad")
