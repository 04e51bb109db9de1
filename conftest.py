"""Rules for nbval: which outputs of a notebook are compared with the committed ones.

Text, tables and HTML are compared (after `tests/nbval_sanitize.cfg`); nbval itself leaves out pixels and
widget identifiers. Warnings and progress bars (stderr) and vector pictures, whose inner identifiers are drawn
anew on every run, are left out here.
"""

NOT_COMPARED = ("stderr", "image/svg+xml", "application/javascript")


def pytest_collectstart(collector):
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += NOT_COMPARED
