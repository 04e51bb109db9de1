"""What a reader sees, in a real browser: the live widgets inside JupyterLab, and the report's page."""

import json
import os
import secrets
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest

from conftest import ROOT
from zsad_lib.notebook import plots, report

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM_FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
START_LIMIT, STEP_LIMIT = 60, 45  # seconds: a slow machine is not a broken widget


@pytest.fixture(scope="module")
def browser():
    reason = "playwright is not installed (pip install -e .[test])"
    playwright = pytest.importorskip("playwright.sync_api", reason=reason)
    path = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(CHROMIUM)} is on the PATH")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=path, args=CHROMIUM_FLAGS)
        yield chromium
        chromium.close()


# ------------------------------------------------------------------------------------------ live widgets

COLOURS = {"a": (200, 30, 30), "b": (30, 160, 30), "c": (30, 30, 200), "d": (120, 0, 140), "e": (240, 180, 0)}
NOTEBOOK = f"""
import matplotlib.pyplot as plt
from zsad_lib.notebook import widgets

colours = {COLOURS}

def draw(t, shade):
    figure = plt.figure(figsize=(2, 2), facecolor=[shade * c / 255 for c in colours[t]])
    figure.suptitle(t)
    return figure

def draw_most(n):
    if n == 2:
        raise ValueError("no <b>picture</b> for 2")
    return draw("abcde"[n], 1)

widgets.live(draw, t=widgets.slider("t", colours, "a"), shade=widgets.menu("shade", [1, 0.5]))
#
widgets.live(draw_most, n=widgets.slider("n", range(4), 1))
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Address of a JupyterLab on the loopback that shows one notebook; ends with its kernels."""
    root, home = tmp_path_factory.mktemp("lab"), tmp_path_factory.mktemp("home")
    cells = [nbformat.v4.new_code_cell(text.strip()) for text in NOTEBOOK.split("#\n")]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), root / "live.ipynb")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    own = {f"JUPYTER_{kind}_DIR": str(home / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    own |= {"IPYTHONDIR": str(home / "ipython"), "PYTHONPATH": os.pathsep.join(paths)}
    environment = {**os.environ, **own}
    environment.pop("MPLBACKEND", None)  # the kernel's own, which shows every figure left open
    token, log = secrets.token_hex(16), home / "log.txt"
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}"]
    command += ["--ServerApp.port_retries=0", f"--ServerApp.root_dir={root}", f"--IdentityProvider.token={token}"]
    command += ["--LabApp.news_url=None", "--LabApp.extension_manager=readonly"]
    address = f"http://127.0.0.1:{port}"
    with log.open("w") as output:
        server = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    try:
        _wait_for(server, f"{address}/api", log)
        yield f"{address}/doc/tree/live.ipynb?token={token}"
    finally:
        server.terminate()  # the server then ends its kernels
        try:
            server.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


def _wait_for(server, address, log):
    limit = time.monotonic() + START_LIMIT
    while time.monotonic() < limit and server.poll() is None:
        try:
            return urllib.request.urlopen(address, timeout=5).close()
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"JupyterLab did not answer within {START_LIMIT} s; its log ends:\n{log.read_text()[-3000:]}")


@pytest.fixture(scope="module")
def outputs(browser, lab):
    """The notebook's page after all cells ran, and the output areas of its two cells."""
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.set_default_timeout(STEP_LIMIT * 1000)
    page.goto(lab)
    page.locator(".jp-Cell .cm-content").first.click()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    areas = page.locator(".jp-Cell .jp-Cell-outputArea")
    areas.nth(1).locator("img.widget-image").wait_for()
    yield page, areas
    page.close()


# Whether a picture's colour at its middle left is [red, green, blue], to the rounding of the PNG.
IS_COLOUR = """([picture, expected]) => {
  if (!picture.complete || !picture.naturalWidth) return false;
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [picture.naturalWidth, picture.naturalHeight];
  const context = canvas.getContext("2d");
  context.drawImage(picture, 0, 0);
  const pixel = context.getImageData(5, canvas.height / 2, 1, 1).data;
  return expected.every((value, k) => Math.abs(pixel[k] - value) <= 1);
}"""


def _expect_colour(area, expected):
    """Waits until the cell's one picture has the colour."""
    picture = area.locator("img").element_handle()  # fails when there is a second picture
    area.page.wait_for_function(IS_COLOUR, arg=[picture, list(expected)])


def test_live_picture_follows_keyboard_mouse_and_menu(outputs, capsys):
    page, areas = outputs
    area = areas.first
    handle, readout = area.locator(".noUi-handle"), area.locator(".widget-readout")
    _expect_colour(area, COLOURS["a"])

    area.locator("img").evaluate("""picture => {
      window.pressed = []; window.shown = [];
      document.addEventListener("keydown", () => pressed.push(performance.now()), true);
      picture.addEventListener("load", () => requestAnimationFrame(() => shown.push(performance.now())));
    }""")
    handle.focus()
    presses = ["ArrowRight"] * 4 + ["ArrowLeft"] * 3
    for count, (key, value) in enumerate(zip(presses, "bcdedcb", strict=True), start=1):
        page.keyboard.press(key)
        _expect_colour(area, COLOURS[value])
        assert readout.inner_text() == value
        page.wait_for_function("count => shown.length >= count", arg=count)
    seconds = np.subtract(page.evaluate("shown"), page.evaluate("pressed")) / 1000
    with capsys.disabled():
        print(f"\nkey press to new picture: median {statistics.median(seconds):.3f} s, slowest {seconds.max():.3f} s")

    track, grip = area.locator(".noUi-base").bounding_box(), handle.bounding_box()
    page.mouse.move(grip["x"] + grip["width"] / 2, grip["y"] + grip["height"] / 2)
    page.mouse.down()
    page.mouse.move(track["x"] + track["width"] + 30, grip["y"] + 5, steps=4)
    _expect_colour(area, COLOURS["e"])  # while the button is still down
    page.mouse.up()
    area.locator("select").select_option("0.5")
    _expect_colour(area, [c / 2 for c in COLOURS["e"]])


def test_live_error_is_text_until_the_next_good_value(outputs):
    page, areas = outputs
    area = areas.nth(1)
    _expect_colour(area, COLOURS["b"])
    assert area.locator("pre").count() == 0
    area.locator(".noUi-handle").focus()
    page.keyboard.press("ArrowRight")
    message = area.locator("pre")
    message.wait_for()
    assert message.inner_text() == "ValueError: no <b>picture</b> for 2"
    page.keyboard.press("ArrowRight")
    _expect_colour(area, COLOURS["d"])
    message.wait_for(state="detached")


# --------------------------------------------------------------------------------------------- the report

FACTS = {"revision": "0123456789abcdef" * 2 + "01234567", "finished": "2026-01-02 03:04:05 UTC", "seconds": 61.5}
FACTS |= {"machine": "Linux x86_64, 2 CPUs"}
NOTE = "magnetic_tile is left out: no dataset at /data/" + "a_long_folder_name/" * 6
INTERVALS = pd.DataFrame(
    {f"metric {k}": ["87.2 [84.1, 90.0]", "n/a", "50.0 [45.0, 55.0]"] for k in range(12)},
    index=pd.Index(["divad", "divad (random U-Net)", "None"], name="method"),
)
LEVELS = pd.DataFrame(
    [[1 / 3, 12, 0.5, 7], [0.25, 9, np.nan, 8]],
    columns=pd.MultiIndex.from_product([["image", "pixel"], ["AUROC", "n"]], names=["level", "metric"]),
    index=pd.Index(["a_b", "a sentence that is a good deal longer than fifty characters are"], name="method"),
)
LONG = pd.DataFrame({"category": ["gauge", "mean"], "AUPRO": [93.25, 1e-7]}, index=pd.Index(["x", "x"], name="method"))


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """A report's folder with two sections of exhibits, and its index.html."""
    out = tmp_path_factory.mktemp("artifacts")
    benchmark, lesson = plots.Gallery("benchmark", out), plots.Gallery("02_divad", out)
    benchmark.table("intervals", INTERVALS, "Percent with 95 % intervals & <controls>.")
    benchmark.table("long", LONG, "Category by category.")
    wide, axes = plt.subplots(1, 14, figsize=(22, 2))
    for k, axis in enumerate(axes):
        axis.imshow(np.outer(np.arange(8), np.arange(8) + k))
        axis.set_title(f"t={k}", fontsize=9)
    lesson.figure("wide", wide, "A strip that is wider than the page.")
    small, axis = plt.subplots(figsize=(5, 2.6))
    axis.plot([1, 3, 2])
    axis.set(xlabel="timestep t", ylabel="error")
    lesson.figure("small", small, "A normal figure. " * 8)
    lesson.table("levels", LEVELS, "Two levels of columns.")
    (out / "notebooks").mkdir()
    (out / "notebooks" / "02_divad.html").write_text("the notebook")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "provenance", lambda *facts: FACTS)  # the real one hashes all data
        return report.write_index("lite", out, {"02_divad": 30.0, "benchmark": 31.5}, [NOTE], 0, 61.5)


@pytest.fixture(params=[1280, 390])
def page(request, browser, artifacts):
    page = browser.new_page(viewport={"width": request.param, "height": 900})
    page.goto(artifacts.as_uri())
    yield page
    page.close()


def test_report_shows_every_picture_within_the_page(page):
    assert page.evaluate("Array.from(document.images, i => i.naturalWidth > 0)") == [True, True]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    cut_off = page.evaluate("""Array.from(document.querySelectorAll("body *"))
      .filter(e => !e.closest("table") && e.getBoundingClientRect().right > innerWidth).map(e => e.outerHTML)""")
    assert cut_off == []
    (wide, _), (small, pixels) = page.evaluate("Array.from(document.images, i => [i.clientWidth, i.naturalWidth])")
    assert small == min(round(pixels / 1.6), wide)  # 100 CSS pixels an inch, or the page where that is narrower


def test_report_tables_scroll_by_themselves_and_keep_intervals_on_one_line(page):
    boxes = page.evaluate("""Array.from(document.querySelectorAll("table"), t => {
      const box = t.parentElement, text = document.createRange();
      const lines = cell => (text.selectNodeContents(cell), text.getClientRects().length);
      box.scrollLeft = 1e6;
      return {scrolls: getComputedStyle(box).overflowX, hidden: box.scrollWidth - box.clientWidth - box.scrollLeft,
              lines: Math.max(...Array.from(t.querySelectorAll("td"), lines)),
              wider: t.offsetWidth > box.clientWidth};
    })""")
    assert len(boxes) == 3
    assert boxes[0]["wider"]  # twelve columns of intervals do not fit even the wide page
    for box in boxes:
        assert box["scrolls"] == "auto" and box["hidden"] <= 1 and box["lines"] == 1


def test_report_links_lead_somewhere(page, artifacts):
    links = page.evaluate('Array.from(document.querySelectorAll("a"), a => a.getAttribute("href"))')
    anchors = [link[1:] for link in links if link.startswith("#")]
    assert anchors == ["benchmark", "02_divad"]
    assert page.evaluate("ids => ids.every(id => document.getElementById(id))", anchors)
    files = {link for link in links if not link.startswith("#")}
    assert [link for link in files if not (artifacts.parent / link).is_file()] == []
    kinds = {f"tables/benchmark_intervals.{kind}" for kind in ("csv", "md", "tex")}
    assert files >= kinds | {"provenance.json", "notebooks/02_divad.html", "figures/02_divad_wide.svg"}
    assert page.get_by_text(NOTE).is_visible() and page.get_by_text(FACTS["revision"]).is_visible()
    assert page.get_by_text("Percent with 95 % intervals & <controls>.").is_visible()


def test_report_tables_say_what_the_frames_say(page):
    read = """Array.from(document.querySelectorAll("table"), t => ["thead", "tbody"].map(part =>
      Array.from(t.querySelectorAll(part + " tr"), row => Array.from(row.cells, c => c.innerText.trim()))))"""
    (head, body), (long_head, long_body), (levels_head, levels_body) = page.evaluate(read)
    assert head == [["method", *INTERVALS.columns]]
    assert body == [[name, *row] for name, row in zip(INTERVALS.index, INTERVALS.values.tolist(), strict=True)]
    assert long_head == [["method", "category", "AUPRO"]]
    assert long_body == [["x", "gauge", "93.25"], ["x", "mean", "1e-07"]]
    assert levels_head[:2] == [["level", "image", "image", "pixel", "pixel"], ["metric", "AUROC", "n", "AUROC", "n"]]
    assert levels_head[2][0] == "method"
    assert levels_body == [["a_b", "0.333333", "12", "0.5", "7"], [LEVELS.index[1], "0.25", "9", "", "8"]]


def test_gallery_writes_tables_that_read_back(artifacts):
    tables = artifacts.parent / "tables"
    back = pd.read_csv(tables / "02_divad_levels.csv", header=[0, 1], index_col=0)
    pd.testing.assert_frame_equal(back, LEVELS)
    plain = pd.read_csv(tables / "benchmark_intervals.csv", index_col=0, keep_default_na=False)
    pd.testing.assert_frame_equal(plain, INTERVALS)
    markdown = (tables / "benchmark_intervals.md").read_text().splitlines()
    assert [cell.strip() for cell in markdown[0].split("|")[1:-1]] == ["method", *INTERVALS.columns]
    assert [len(line.split("|")) for line in markdown] == [15] * 5
    latex = (tables / "02_divad_levels.tex").read_text()
    assert r"a\_b &" in latex and "method" in latex and r"\label{tab:02_divad_levels}" in latex
    assert "AUROC" in latex and latex.count(r"\multicolumn{2}") == 2


def test_gallery_lists_exhibits_in_order(artifacts):
    lines = (artifacts.parent / "exhibits" / "02_divad.jsonl").read_text().splitlines()
    listed = [(entry["kind"], entry["name"]) for entry in map(json.loads, lines)]
    assert listed == [("figure", "02_divad_wide"), ("figure", "02_divad_small"), ("table", "02_divad_levels")]
