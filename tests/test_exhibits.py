"""What notebook 06 shows things with: dots with intervals, a line to type in, and the printed figures of VLMDiff."""

from importlib import resources

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from conftest import shared_path
from zsad_lib.evaluation import metrics
from zsad_lib.notebook import plots, widgets


def measured():
    rows = [("a", "x", 0.5, 0.4, 0.7), ("a", "y", 0.9, 0.8, 1.0), ("b", "x", 0.6, 0.5, 0.6), ("b", "y", np.nan, 0, 0)]
    frame = pd.DataFrame(rows, columns=["method", "category", "value", "low", "high"])
    return pd.concat([frame.assign(metric="aupro"), frame.assign(metric="pixel_ap", value=0.1)])


def test_interval_dots_puts_every_value_in_its_row():
    figure = plots.interval_dots(measured(), "aupro", "AUPRO")
    axis = figure.axes[0]
    assert [text.get_text() for text in axis.get_yticklabels()] == ["y", "x"] and axis.get_xlabel() == "AUPRO"
    points = {part.get_label(): part.lines[0].get_xydata() for part in axis.containers}
    np.testing.assert_allclose(points["a"][:, 0], [90, 50])
    np.testing.assert_allclose(points["a"][:, 1].round(), [0, 1])
    np.testing.assert_allclose(points["b"][:, 0], [np.nan, 60])
    bars = {part.get_label(): part.lines[2][0].get_segments() for part in axis.containers}
    np.testing.assert_allclose(bars["a"][1][:, 0], [40, 70])
    assert (points["a"][1, 1] > points["b"][1, 1]) and abs(points["a"][1, 1] - points["b"][1, 1]) < 0.5
    plt.close(figure)


def test_a_line_to_type_in_redraws_when_it_is_left():
    drawn = []

    def draw(words):
        drawn.append(words)
        return plt.figure(figsize=(1, 1))

    line = widgets.text("caption", ["a nut", "a tile"])
    assert line.value == "a nut" and line.options == ("a nut", "a tile") and not line.continuous_update
    widgets.live(draw, words=line)
    line.value = "anything else"
    assert drawn == ["a nut", "anything else"]
    assert widgets.text("caption", ["a nut"], "").value == ""


def test_the_printed_figures_of_vlmdiff_are_those_that_were_published():
    with resources.as_file(resources.files("zsad_lib") / "published" / "vlmdiff.csv") as path:
        ours = pd.read_csv(path, comment="#", index_col="dataset")
        source = path.read_text(encoding="utf-8").splitlines()[0]
    assert tuple(ours.columns) == metrics.METRICS and "giddyyupp/VLMDiff" in source
    assert ((ours > 0) & (ours < 100)).all(axis=None)
    theirs = pd.read_csv(shared_path("published/vlmdiff_official_results.csv"), index_col="dataset")
    pd.testing.assert_frame_equal(ours, theirs)
