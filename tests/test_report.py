"""The report: exhibits on disk, an index that shows them, provenance, and clear failures."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch

from zsad_lib.errors import RunError
from zsad_lib.notebook import plots, report
from zsad_lib.profiles import PROFILES, profile_options
from zsad_lib.toy import LineModel
from zsad_lite import synthad


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
    with pytest.raises(RunError, match="03_tiny.ipynb failed .* ZeroDivisionError"):
        report.build(out="artifacts", only="03")


def test_two_notebooks_run_at_a_time_and_stand_in_their_order(project, monkeypatch):
    monkeypatch.setattr(report.torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
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


def test_a_failure_stops_what_has_not_begun(project, monkeypatch):
    monkeypatch.setattr(report.torch.cuda, "is_available", lambda: True)  # one at a time
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    _notebook(project / "notebooks/03_bad.ipynb", "1 / 0")
    for k in range(4, 8):
        _notebook(project / f"notebooks/0{k}_good.ipynb", "x = 1")
    with pytest.raises(RunError, match="03_bad"):
        report.build(out="artifacts")
    assert not (project / "artifacts/notebooks/07_good.html").exists() and "OMP_NUM_THREADS" not in report.os.environ


def test_no_such_notebook(project):
    with pytest.raises(RunError, match="no notebook 07"):
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


def test_heatmap_joins_the_parts_of_a_rows_name():
    rows = pd.MultiIndex.from_tuples([("a", "x"), ("b", "y")], names=["base", "in"])
    (axis,) = plots.heatmap(pd.DataFrame({"z": [1.0, 2.0]}, index=rows), "title").axes
    assert [text.get_text() for text in axis.get_yticklabels()] == ["a: x", "b: y"]
    plt.close(axis.figure)


def test_histograms_of_a_panel_share_their_bins_and_lose_nothing():
    groups = {"one": np.array([0.0, 1.0, 1.0]), "two": np.array([5.0, 9.0])}
    figure = plots.histograms({"left": groups, "right": {"same": np.ones(4)}}, "score", bins=3)
    left, right = figure.axes
    assert [[bar.get_height() for bar in bars] for bars in left.containers] == [[3, 0, 0], [0, 1, 1]]
    assert left.get_title() == "left" and left.get_xlabel() == "score"
    assert sum(bar.get_height() for bar in right.patches) == 4
    plt.close(figure)


def test_log_scale_is_shared_and_keeps_the_order():
    logs = plots.log_scale({"one": np.array([-99.0, 0.0]), "two": np.array([900.0])})
    np.testing.assert_allclose(np.concatenate(list(logs.values())), [0, 2, 3])
    np.testing.assert_allclose(plots.log_scale({"one": np.array([9.0, 99.0])})["one"], [1, 2])


def test_quartile_curves_end_at_the_last_timestep():
    values = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 60.0]])
    figure = plots.quartile_curves([0, 100, 200], {"error": {"a": values}, "SSIM": {"a": values}}, linear=["SSIM"])
    error, ssim = figure.axes
    np.testing.assert_array_equal(error.lines[0].get_xydata(), [[100, 3], [200, 4]])
    assert error.collections[0].get_paths()[0].vertices[:, 1].max() == 32  # the upper quartile of 2, 4 and 60
    assert (error.get_yscale(), ssim.get_yscale()) == ("log", "linear")
    plt.close(figure)


def test_the_line_is_drawn_with_its_own_score():
    line = LineModel()
    figure = plots.score_on_a_line(line, [0, 700])
    assert [axis.get_title() for axis in figure.axes] == ["t = 0", "t = 700", "", ""]
    x, score = figure.axes[3].lines[0].get_xydata().T
    np.testing.assert_allclose(score, line.score(torch.from_numpy(x), 700))
    plt.close(figure)


def test_paths_on_a_line_have_a_curve_a_point_and_a_count():
    points, noise = torch.rand(2, 4, 3)
    groups = {"one": (points, noise, torch.tensor([1.0, 10, 10, 1000])), "two": (points[:1], noise[:1], torch.ones(1))}
    figure = plots.paths_on_a_line([0, 10, 20], groups)
    for axis, values in zip(figure.axes, (points, noise), strict=False):
        np.testing.assert_allclose([line.get_ydata() for line in axis.lines], torch.cat([values, values[:1]]))
    assert [sum(bar.get_height() for bar in bars) for bars in figure.axes[2].containers] == [4, 1]
    assert {line.get_color() for line in figure.axes[0].lines} == {"C0", "C1"}
    plt.close(figure)


@pytest.mark.parametrize("profile", PROFILES)
def test_profiles_differ_in_names_and_sizes_only(profile):
    assert PROFILES[profile].keys() == PROFILES["lite"].keys()
    assert profile_options(profile, "divad").keys() == profile_options("lite", "divad").keys()
    assert profile_options(profile, "median").keys() == profile_options("lite", "median").keys()


def test_unknown_profile():
    with pytest.raises(KeyError, match="lite, paper"):
        profile_options("huge", "divad")
