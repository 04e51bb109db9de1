"""Live controls: a picture that is drawn again whenever a slider or a menu changes."""

import html
import io
from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets as widgets
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

WHOLE_LABEL = {"description_width": "initial"}


def slider(label: str, options: Sequence, value: Any = None) -> widgets.SelectionSlider:
    """A slider over given values (timesteps, scales...), dragged or moved with the arrow keys."""
    options = list(options)
    value = options[len(options) // 2] if value is None else value
    shown = {"description": label, "style": WHOLE_LABEL, "layout": {"width": "360px"}}
    return widgets.SelectionSlider(options=options, value=value, continuous_update=True, **shown)


def menu(label: str, options: Sequence, value: Any = None) -> widgets.Dropdown:
    """A menu of given values."""
    options = list(options)
    value = options[0] if value is None else value
    return widgets.Dropdown(options=options, value=value, description=label, style=WHOLE_LABEL)


def text(label: str, suggestions: Sequence[str], value: str | None = None) -> widgets.Combobox:
    """A line to type in, with suggestions; it counts when Enter is pressed, a suggestion picked, or the line left."""
    suggestions = list(suggestions)
    value = suggestions[0] if value is None else value
    shown = {"description": label, "style": WHOLE_LABEL, "layout": {"width": "560px"}}
    return widgets.Combobox(options=suggestions, value=value, continuous_update=False, ensure_option=False, **shown)


def live(draw: Callable[..., Figure], **controls: widgets.ValueWidget) -> widgets.VBox:
    """Controls above the picture that ``draw(**values)`` returns, or above its error until the next good value."""
    picture = widgets.Image(format="png", layout={"max_width": "100%", "width": "max-content"})
    message = widgets.HTML()

    def update(_change=None):
        open_before = set(plt.get_fignums())
        try:
            picture.value = _png(draw(**{name: control.value for name, control in controls.items()}))
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


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80)
    plt.close(figure)
    return buffer.getvalue()
