"""synthad, the drawn benchmark: `draw` one image, `export` all of it; `pictures` are of no product."""

from zsad_lite.synthad.benchmark import CATEGORIES, GROUPS, Drawing, draw, export, layout
from zsad_lite.synthad.defects import DEFECTS, MASK_THRESHOLD, STRUCTURE, SURFACE

__all__ = [
    "CATEGORIES",
    "DEFECTS",
    "GROUPS",
    "MASK_THRESHOLD",
    "STRUCTURE",
    "SURFACE",
    "Drawing",
    "draw",
    "export",
    "layout",
]
