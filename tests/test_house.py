"""The house: lower floors never import higher ones. Imports are read from the source, lazy ones included."""

import ast
from pathlib import Path

import pytest
from helpers import imports

from conftest import ROOT

# {room: what it must never import}; a room is a module or package of zsad_lib, "" all of it but the command line
NEVER = {
    "": "zsad_lite",
    "errors settings store manifest": "diffusion anomaly data methods evaluation papers training notebook profiles cli",
    "diffusion": "anomaly data methods evaluation papers training notebook profiles cli",
    "anomaly": "data methods evaluation papers training notebook profiles cli",
    "data": "methods evaluation papers training notebook profiles cli",
    "methods": "data evaluation papers training notebook profiles cli",
    "evaluation": "papers training notebook profiles cli",
    "training": "methods papers notebook cli",
    "papers": "profiles notebook cli",
    "profiles": "notebook cli",
    "notebook": "cli",
}
PAIRS = [(room, other) for rooms, others in NEVER.items() for room in rooms.split() or [""] for other in others.split()]


def modules(room: str) -> list[Path]:
    """The files of a room of zsad_lib."""
    house = ROOT / "zsad_lib"
    if not room:
        return [path for path in house.rglob("*.py") if path != house / "cli.py"]
    return [house / f"{room}.py"] if (house / f"{room}.py").exists() else list((house / room).rglob("*.py"))


@pytest.mark.parametrize(("room", "other"), PAIRS)
def test_no_room_imports_one_above_it(room, other):
    forbidden, found = other if other.startswith("zsad") else f"zsad_lib.{other}", []
    assert modules(room), f"zsad_lib has no room {room}"
    for path in modules(room):
        package = list(path.relative_to(ROOT).parent.parts)
        names = imports(ast.parse(path.read_text(encoding="utf-8")), package)
        found += [f"{path.relative_to(ROOT)}: {name}" for name in names if f"{name}.".startswith(f"{forbidden}.")]
    assert not found


FORMS = ["import zsad_lib.cli", "from zsad_lib import cli", "from zsad_lib.cli import main", "from .cli import main"]


@pytest.mark.parametrize("line", [*FORMS, "from . import cli"])
def test_imports_are_recognised_in_every_form(line):
    (name,) = imports(ast.parse(f"def f():\n    {line}\n"), ["zsad_lib"])
    assert f"{name}.".startswith("zsad_lib.cli.")
    (name,) = imports(ast.parse("from ..ddim import invert"), ["zsad_lib", "methods"])
    assert name == "zsad_lib.ddim.invert"


def test_public_signatures_have_type_hints():
    """Of functions and methods without a leading underscore, in all rooms."""
    missing = []
    for path in [*(ROOT / "zsad_lib").rglob("*.py"), *(ROOT / "zsad_lite").rglob("*.py")]:
        tree = ast.parse(path.read_text())
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name[0] != "_"]
        for node in (node for body in (tree, *classes) for node in body.body if isinstance(node, ast.FunctionDef)):
            arguments = [a for a in (*node.args.args, *node.args.kwonlyargs) if a.arg not in ("self", "cls")]
            whole = node.returns is not None and all(a.annotation is not None for a in arguments)
            missing += [] if whole or node.name[0] == "_" else [f"{path.name}: {node.name}"]
    assert missing == []
