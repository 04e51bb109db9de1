"""The report: exhibits on disk, an index that shows them, provenance, and clear failures."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pytest
import torch

from zsad_lib import plots, report, synthad
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
    """An empty project folder whose checkpoints and data have no hashes to compute."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report.manifest, "folder_hash", lambda path: "0" * 64)
    monkeypatch.setattr(report, "DATASETS", ())
    return tmp_path


GALLERY = """
import pandas as pd, matplotlib.pyplot as plt
from zsad_lib.plots import Gallery
gallery = Gallery("03_tiny", out)
figure, axis = plt.subplots()
axis.plot([0, 1])
gallery.figure("line", figure, "A line.")
gallery.table("numbers", pd.DataFrame({"AUROC": ["87.2 [84.1, 90.0]"]}, index=["gauge"]), "Some numbers.")
"""


def test_build_writes_every_exhibit_the_notebooks_and_where_they_come_from(project):
    _notebook(project / "notebooks/03_tiny.ipynb", GALLERY)
    index = report.build(out="artifacts")
    out = project / "artifacts"
    for name in ("figures/03_tiny_line.png", "figures/03_tiny_line.svg", "notebooks/03_tiny.html"):
        assert (out / name).stat().st_size > 1000
    for suffix in ("csv", "md", "tex"):
        assert "87.2 [84.1, 90.0]" in (out / f"tables/03_tiny_numbers.{suffix}").read_text()
    page = index.read_text()
    assert 'src="figures/03_tiny_line.png"' in page and "87.2 [84.1, 90.0]" in page and "Some numbers." in page
    facts = json.loads((out / "provenance.json").read_text())
    assert set(facts["durations_s"]) == {"benchmark", "03_tiny"} and facts["durations_s"]["03_tiny"] > 0
    assert (
        facts["packages"]["torch"] == torch.__version__.split("+")[0] or facts["packages"]["torch"] == torch.__version__
    )
    assert {"revision", "checkpoints_sha256", "datasets_sha256", "seed", "command"} <= set(facts)


def test_a_failing_notebook_is_named_with_its_error(project):
    _notebook(project / "notebooks/03_tiny.ipynb", "1 / 0")
    with pytest.raises(report.ReportError, match="03_tiny.ipynb failed .* ZeroDivisionError"):
        report.build(out="artifacts", only="03")


def test_no_such_notebook(project):
    with pytest.raises(report.ReportError, match="no notebook 07"):
        report.build(only="07")


def test_gallery_without_a_folder_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plots.Gallery("x").table("t", pd.DataFrame({"a": [1]}), "Shown only.")
    assert not list(tmp_path.iterdir())


def test_exhibit_names_are_file_names(tmp_path):
    figure, _ = plt.subplots()
    with pytest.raises(ValueError, match="lower case"):
        plots.Gallery("x", tmp_path).figure("Top left/../x", figure, "")


def test_an_svg_is_the_same_twice(tmp_path):
    for folder in ("one", "two"):
        figure, axis = plt.subplots()
        axis.plot([0, 1])
        plots.Gallery("x", tmp_path / folder).figure("line", figure, "A line.")
    one, two = ((tmp_path / folder / "figures/x_line.svg").read_bytes() for folder in ("one", "two"))
    assert one == two


def test_overlay_is_hottest_where_the_map_is():
    image, heat = torch.full((3, 8, 8), 0.5), torch.zeros(8, 8)
    heat[2, 5] = 1
    assert plots.overlay(image, heat).sum(0).argmax().item() == 2 * 8 + 5


def test_picture_grid_has_a_cell_for_each_picture():
    drawing = torch.from_numpy(synthad.draw("gauge", "0").image).permute(2, 0, 1) / 255
    figure = plots.picture_grid([[drawing, drawing[0]], [drawing]], titles=["a", "b"], labels=["r", "s"])
    assert [len(axis.images) for axis in figure.axes] == [1, 1, 1, 0]
    plt.close(figure)


@pytest.mark.parametrize("profile", PROFILES)
def test_profiles_differ_in_names_and_sizes_only(profile):
    assert PROFILES[profile].keys() == PROFILES["lite"].keys()
    assert profile_options(profile, "divad").keys() == profile_options("lite", "divad").keys()
    assert profile_options(profile, "median").keys() == profile_options("lite", "median").keys()


def test_unknown_profile():
    with pytest.raises(KeyError, match="lite, paper"):
        profile_options("huge", "divad")
