"""Pictures of no product: the same bytes for a seed, varied, and made without anything of the benchmark."""

import ast
import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from zsad_lite.synthad import pictures

DIGEST = "58436980969fd57140adefff3be6d5b4fa867a0e61df5fb0b76401e82142a74c"
SURFACES = "3fc89d21d848a1e23c5cf15c213d9a9c2f0df952aa14397294ee6279d499a0c0"


def test_a_seed_gives_the_same_bytes_in_any_order_and_process():
    first = [pictures.draw(f"test/{k}") for k in range(12)]
    again = [pictures.draw(f"test/{k}") for k in reversed(range(12))][::-1]
    assert np.array_equal(first, again)
    digest = hashlib.sha256(np.stack(first).tobytes()).hexdigest()
    program = (
        "import hashlib; from zsad_lite.synthad import pictures; h = hashlib.sha256()\n"
        "for k in range(12): h.update(pictures.draw(f'test/{k}').tobytes())\n"
        "print(h.hexdigest())"
    )
    assert digest == subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.strip()
    assert digest == DIGEST  # on every machine: the shipped group models were trained on these


def test_surfaces_are_almost_grey_varied_and_repeatable():
    drawn = np.stack([pictures.draw_surface(f"test/{k}") for k in range(24)])
    assert drawn.shape == (24, 64, 64, 3) and drawn.dtype == np.uint8
    np.testing.assert_array_equal(drawn[3], pictures.draw_surface("test/3"))
    assert np.ptp(drawn.mean((1, 2)), axis=1).max() < 12  # colour
    assert drawn.mean((1, 2, 3)).std() > 20 and drawn.std((1, 2, 3)).min() > 1
    assert hashlib.sha256(drawn.tobytes()).hexdigest() == SURFACES


@pytest.mark.parametrize("size", [32, 64])
def test_pictures_are_images_and_no_two_alike(size):
    drawn = np.stack([pictures.draw(f"test/{k}", size) for k in range(40)])
    assert drawn.shape == (40, size, size, 3) and drawn.dtype == np.uint8
    apart = np.abs(drawn[:, None].astype(float) - drawn).mean((2, 3, 4))
    assert apart[~np.eye(40, dtype=bool)].min() > 5
    flat = drawn.reshape(40, -1, 3)
    assert (flat.std(1).max(1) > 2).all()  # none is empty
    assert flat.mean((1, 2)).std() > 20 and flat.std(1).mean(1).std() > 8  # bright and dark, calm and busy


def test_they_are_made_without_the_products():
    """A group that is tested on was never seen through them: the module imports the drawing primitives alone."""
    tree = ast.parse(Path(pictures.__file__).read_text())
    imported = {n.module if isinstance(n, ast.ImportFrom) else n.names[0].name for n in ast.walk(tree)
                if isinstance(n, (ast.Import, ast.ImportFrom))}  # fmt: skip
    assert imported == {"numpy", "zsad_lite.synthad.canvas"}
