"""synthad, the drawn benchmark: `draw` one image, `export` all of it; `pictures` are of no product."""

from zsad_lite.synthad.benchmark import DEFECTS, GROUPS, STRUCTURE, SURFACE, Drawing, draw, export, layout
from zsad_lite.synthad.scenes import CATEGORIES

__all__ = ["CATEGORIES", "DEFECTS", "GROUPS", "STRUCTURE", "SURFACE", "Drawing", "draw", "export", "layout"]
