"""What a reader sees, in a real browser: the live widgets inside JupyterLab, and the report's page."""

import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest

from zsad_lib import plots, report

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM_FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
START_LIMIT, STEP_LIMIT = 60, 45  # seconds: a slow machine is not a broken widget


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install -e .[test])")
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
from zsad_lib import widgets

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
    paths = os.pathsep.join([str(Path(report.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment = {**os.environ, **own, "IPYTHONDIR": str(home / "ipython"), "PYTHONPATH": paths}
    environment.pop("MPLBACKEND", None)  # the kernel's own, which shows every figure left open
    options = {"ip": "127.0.0.1", "port": port, "port_retries": 0, "token": "", "password": "", "root_dir": root}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--LabApp.news_url=None"]
    command += [f"--ServerApp.{name}={value}" for name, value in options.items()]
    log, address = home / "log.txt", f"http://127.0.0.1:{port}"
    with log.open("w") as output:
        server = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    try:
        _wait_for(server, f"{address}/api/status", log)
        yield address
    finally:
        if server.poll() is None:
            server.send_signal(signal.SIGTERM)  # the server then ends its kernels
            try:
                server.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()


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
    page.goto(f"{lab}/doc/tree/live.ipynb")
    page.locator(".jp-Cell .cm-content").first.click()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    areas = page.locator(".jp-Cell .jp-Cell-outputArea")
    areas.nth(1).locator("img.widget-image").wait_for()
    yield page, areas
    page.close()


# The colour at the picture's middle left: [red, green, blue], or null while there is no picture.
PIXEL = """picture => {
  if (!picture.complete || !picture.naturalWidth) return null;
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [picture.naturalWidth, picture.naturalHeight];
  const context = canvas.getContext("2d");
  context.drawImage(picture, 0, 0);
  return Array.from(context.getImageData(5, canvas.height / 2, 1, 1).data.slice(0, 3));
}"""


def _expect_colour(area, expected):
    """Waits until the cell's one picture has the colour (to the rounding of the PNG), or fails with what it had."""
    picture, limit = area.locator("img"), time.monotonic() + STEP_LIMIT
    while True:
        found = picture.evaluate(PIXEL)  # fails when there is a second picture
        if found is not None and np.abs(np.subtract(found, expected)).max() <= 1:
            return
        assert time.monotonic() < limit, f"the picture's colour is {found}, not {expected}"
        area.page.wait_for_timeout(20)


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
    _expect_colour(area, np.divide(COLOURS["e"], 2))


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
