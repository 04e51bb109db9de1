"""Live controls: a picture that is drawn again whenever a slider or a menu changes."""

import html
from collections.abc import Callable, Sequence

import ipywidgets as widgets
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from zsad_lib.notebook.plots import png_bytes


def slider(label: str, options: Sequence, value=None) -> widgets.SelectionSlider:
    """A slider over given values (timesteps, scales...), dragged or moved with the arrow keys."""
    options = list(options)
    return widgets.SelectionSlider(
        options=options, value=options[len(options) // 2] if value is None else value, description=label,
        continuous_update=True, style={"description_width": "initial"}, layout={"width": "360px"},
    )  # fmt: skip


def menu(label: str, options: Sequence, value=None) -> widgets.Dropdown:
    options = list(options)
    return widgets.Dropdown(options=options, value=options[0] if value is None else value, description=label,
                            style={"description_width": "initial"})  # fmt: skip


def text(label: str, suggestions: Sequence[str], value=None) -> widgets.Combobox:
    """A line to type in, with suggestions; it counts when Enter is pressed, a suggestion picked, or the line left."""
    suggestions = list(suggestions)
    return widgets.Combobox(options=suggestions, value=suggestions[0] if value is None else value, description=label,
                            continuous_update=False, ensure_option=False,
                            style={"description_width": "initial"}, layout={"width": "560px"})  # fmt: skip


def live(draw: Callable[..., Figure], **controls: widgets.ValueWidget) -> widgets.VBox:
    """Controls above the picture ``draw(**values)`` returns. An error in ``draw`` is shown instead of the picture
    and goes away with the next good value."""
    picture = widgets.Image(format="png", layout={"max_width": "100%", "width": "max-content"})
    message = widgets.HTML()

    def update(_change=None):
        open_before = set(plt.get_fignums())
        try:
            picture.value = png_bytes(draw(**{name: control.value for name, control in controls.items()}))
            message.value, picture.layout.display = "", None
        except Exception as error:
            for number in set(plt.get_fignums()) - open_before:
                plt.close(number)  # or the next cell would show the half-drawn figure
            picture.layout.display = "none"
            message.value = f"<pre style='color:#b00'>{html.escape(f'{type(error).__name__}: {error}')}</pre>"

    for control in controls.values():
        control.observe(update, names="value")
    update()
    return widgets.VBox([widgets.HBox(list(controls.values()), layout={"flex_flow": "row wrap"}), message, picture])
