"""What notebooks show: exhibits and their files, figures that hold the data they were given, controls."""

from importlib import resources

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from tiny import guided_model

from conftest import shared_path
from zsad_lib.evaluation import metrics
from zsad_lib.notebook import diagrams, plots, widgets


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


def line_figure():
    figure, axis = plt.subplots()
    axis.plot([0, 1])
    return figure


# --- exhibits


@pytest.mark.parametrize("name", ["Top left/../x", "No Good"])
def test_exhibit_names_are_file_names(tmp_path, name):
    with pytest.raises(ValueError, match=name):
        plots.Gallery("x", tmp_path).figure(name, line_figure(), "")
    with pytest.raises(ValueError, match=name):
        plots.Gallery("x", tmp_path).table(name, pd.DataFrame({"a": [1]}), "")
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size]


def test_an_svg_is_the_same_twice_and_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plots.Gallery("x").table("t", pd.DataFrame({"a": [1]}), "Shown only.")
    assert not list(tmp_path.iterdir())
    for folder in ("one", "two"):
        plots.Gallery("x", tmp_path / folder).figure("line", line_figure(), "A line.")
    one, two = ((tmp_path / folder / "figures/x_line.svg").read_bytes() for folder in ("one", "two"))
    assert one == two


def test_names_stay_text_in_every_form_of_a_table(tmp_path, monkeypatch):
    shown, caption = [], "100 % of a_b <script>`x` [y](javascript:1) $z$"
    monkeypatch.setattr(plots, "get_ipython", lambda: True)
    monkeypatch.setattr(plots, "display", lambda *things: shown.append(things[1].data))
    frame = pd.DataFrame({"<b>|": ["<script>x|y\udcff"]}, index=["$|_"])
    plots.Gallery("x", tmp_path).table("t", frame, caption)
    text = {path.suffix: path.read_text(encoding="utf-8") for path in (tmp_path / "tables").iterdir()}
    assert r"<script>x\|y" in text[".md"] and r"$\|_" in text[".md"]
    assert r"100 \% of a\_b" in text[".tex"] and "&lt;script&gt;" in text[".html"] and "<b>" not in text[".html"]
    assert shown == [r"*100 % of a_b \<script>\`x\` [y]\(javascript:1) \$z\$*"]


def test_no_cell_of_a_csv_file_is_a_formula(tmp_path):
    plots.Gallery("x", tmp_path).table("t", pd.DataFrame({"a": ["=1+1", "b"]}), "")
    assert (tmp_path / "tables/x_t.csv").read_text().splitlines() == [",a", "0,'=1+1", "1,b"]


# --- pictures and maps


def test_overlay_is_hottest_where_the_map_is():
    image, heat = torch.full((3, 8, 8), 0.5), torch.zeros(8, 8)
    heat[2, 5] = 1
    assert plots.overlay(image, heat).sum(0).argmax().item() == 2 * 8 + 5


def test_picture_grid_has_a_cell_for_each_picture():
    image = torch.rand(3, 8, 8)
    axes = plots.picture_grid([[image, image[0]], [image]], titles=["a", "b"], labels=["r", "s"]).axes
    assert [len(axis.images) for axis in axes] == [1, 1, 1, 0]
    assert [axis.get_title() for axis in axes[:2]] == ["a", "b"] and axes[2].get_ylabel() == "s"


def test_a_perfect_score_reaches_the_corner_of_its_curve():
    figure = plots.roc_and_pictures([0, 0, 1], [0.1, 0.2, 0.9], "AUROC 100", [torch.rand(3, 8, 8)], ["image"])
    curve, picture = figure.axes
    assert [0, 1] in curve.lines[0].get_xydata().tolist() and picture.get_title() == "image"


# --- numbers


def test_heatmap_joins_the_parts_of_a_rows_name():
    rows = pd.MultiIndex.from_tuples([("a", "x"), ("b", "y")], names=["base", "in"])
    (axis,) = plots.heatmap(pd.DataFrame({"z": [1.0, 2.0]}, index=rows), "title").axes
    assert [text.get_text() for text in axis.get_yticklabels()] == ["a: x", "b: y"]


def test_matrices_share_their_scale():
    figure = plots.matrices({"a": np.ones((4, 2)), "b": np.full((4, 2), 3.0)})
    assert {axis.collections[0].get_clim() for axis in figure.axes} == {(0, 3)}
    assert [axis.get_title() for axis in figure.axes] == ["a", "b"]


def test_interval_dots_puts_every_value_in_its_row():
    rows = [("a", "x", 0.5, 0.4, 0.7), ("a", "y", 0.9, 0.8, 1.0), ("b", "x", 0.6, 0.5, 0.6), ("b", "y", np.nan, 0, 0)]
    frame = pd.DataFrame(rows, columns=["method", "category", "value", "low", "high"])
    frame = pd.concat([frame.assign(metric="aupro"), frame.assign(metric="pixel_ap", value=0.1)])
    (axis,) = plots.interval_dots(frame, "aupro", "AUPRO").axes
    assert [text.get_text() for text in axis.get_yticklabels()] == ["y", "x"] and axis.get_xlabel() == "AUPRO"
    points = {part.get_label(): part.lines[0].get_xydata() for part in axis.containers}
    np.testing.assert_allclose(points["a"][:, 0], [90, 50])
    np.testing.assert_allclose(points["a"][:, 1].round(), [0, 1])
    np.testing.assert_allclose(points["b"][:, 0], [np.nan, 60])
    bars = {part.get_label(): part.lines[2][0].get_segments() for part in axis.containers}
    np.testing.assert_allclose(bars["a"][1][:, 0], [40, 70])
    assert (points["a"][1, 1] > points["b"][1, 1]) and abs(points["a"][1, 1] - points["b"][1, 1]) < 0.5


def test_histograms_of_a_panel_share_their_bins_and_lose_nothing():
    groups = {"one": np.array([0.0, 1.0, 1.0]), "two": np.array([5.0, 9.0])}
    left, right = plots.histograms({"left": groups, "right": {"same": np.ones(4)}}, "score", bins=3).axes
    assert [[bar.get_height() for bar in bars] for bars in left.containers] == [[3, 0, 0], [0, 1, 1]]
    assert left.get_title() == "left" and left.get_xlabel() == "score"
    assert sum(bar.get_height() for bar in right.patches) == 4


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
    assert (error.get_title(), error.get_yscale()) == ("error", "log")
    assert (ssim.get_title(), ssim.get_yscale(), ssim.get_xlabel()) == ("SSIM", "linear", "t")


def test_lines_bars_and_points_show_what_they_are_given():
    (axis,) = plots.curves([1, 2, 3], {"one": [1, 1, 1], "two": [1, 2, 4]}, "x", "y", log=True).axes
    assert [line.get_ydata().tolist() for line in axis.lines] == [[1, 1, 1], [1, 2, 4]]
    assert (axis.get_xlabel(), axis.get_ylabel(), axis.get_yscale()) == ("x", "y", "log")
    figure = plots.bars(pd.DataFrame({"u": [10, 20], "v": [30, 40]}, index=["a", "b"]), "percent", chance=50)
    assert sorted(bar.get_height() for bar in figure.axes[0].patches) == [10, 20, 30, 40]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["u", "v"]
    x, hollow = np.array([1.0, 2.0, 3.0]), np.array([True, False, False])
    figure = plots.scatter({"a": (x, x**2, hollow)}, ("full", "hollow"), ("x", "y"))
    full, empty, *_ = figure.axes[0].collections
    assert full.get_offsets().tolist() == [[2, 4], [3, 9]] and empty.get_offsets().tolist() == [[1, 1]]


def test_the_network_is_drawn_with_the_models_own_numbers():
    model, _ = guided_model()
    shown = " ".join(text.get_text() for text in diagrams.guided_network(model).axes[0].texts)
    for width in model.backbone.unet.config.block_out_channels:
        assert f"encoder\n{width}" in shown and f"decoder\n{width}" in shown
    assert f"[3,{model.backbone.image_size},{model.backbone.image_size}]" in shown


# --- controls, and figures that are printed


def test_a_line_to_type_in_redraws_when_it_is_left():
    drawn = []

    def draw(words):
        drawn.append(words)
        return plt.figure(figsize=(1, 1))

    line = widgets.text("caption", ["a nut", "a tile"])
    assert line.value == "a nut" and line.options == ("a nut", "a tile") and not line.continuous_update
    widgets.live(draw, words=line)
    line.value = "anything else"
    assert drawn == ["a nut", "anything else"] and not plt.get_fignums()
    assert widgets.text("caption", ["a nut"], "").value == ""


def test_the_printed_figures_of_vlmdiff_are_those_that_were_published():
    with resources.as_file(resources.files("zsad_lib.papers") / "published" / "vlmdiff.csv") as path:
        ours = pd.read_csv(path, comment="#", index_col="dataset")
        source = path.read_text(encoding="utf-8").splitlines()[0]
    assert tuple(ours.columns) == metrics.METRICS and "giddyyupp/VLMDiff" in source
    assert ((ours > 0) & (ours < 100)).all(axis=None)
    theirs = pd.read_csv(shared_path("published/vlmdiff_official_results.csv"), index_col="dataset")
    pd.testing.assert_frame_equal(ours, theirs)
