"""The files that describe the project agree with each other, and the tree keeps its own rules."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib import metadata

import pytest
import typer
import yaml
from helpers import imports

from conftest import ROOT
from zsad_lib import cli

MEGABYTE = 10**6


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def pyproject():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def environment():
    return yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]


def required(with_tests=True):
    project = pyproject()["project"]
    requirements = project["dependencies"] + (project["optional-dependencies"]["test"] if with_tests else [])
    names = [normal(re.match(r"[A-Za-z0-9._-]+", requirement)[0]) for requirement in requirements]
    assert len(set(names)) == len(names), "a requirement is listed twice"
    return set(names)


def pins():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.strip()]
    wrong = [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!]+", line)]
    assert not wrong, f"constraints.txt holds only NAME==VERSION, not {wrong}"
    return {normal(line.split("==")[0]): line.split("==")[1] for line in lines}


def tracked_files():
    """Files of the checkout that git tracks or would track; skips outside a checkout."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [path for path in (ROOT / line for line in listed.splitlines()) if path.is_file()]


# --- packaging


def test_every_requirement_is_pinned():
    assert not required() - set(pins()), "add these to constraints.txt"
    assert pins()["torch"] == "2.13.0"


@pytest.mark.parametrize("folder", ["zsad_lib", "zsad_lite", "tests"])
def test_every_import_is_a_requirement(folder):
    allowed = required(with_tests=folder == "tests")
    local = {"zsad_lib", "zsad_lite"} | {path.stem for path in (ROOT / "tests").glob("*.py")}
    providers = metadata.packages_distributions()
    unnamed = set()
    for path in (ROOT / folder).rglob("*.py"):
        package = list(path.relative_to(ROOT).parent.parts)
        names = {name.split(".")[0] for name in imports(ast.parse(path.read_text()), package)}
        for name in names - local - set(sys.stdlib_module_names):
            if not {normal(dist) for dist in providers.get(name, [])} & allowed:
                unnamed.add(f"{path.relative_to(ROOT)}: {name}")
    assert not unnamed


def test_conda_installs_what_pip_installs():
    pip = next(entry["pip"] for entry in environment() if isinstance(entry, dict))
    assert pip == ["-c constraints.txt", "-e .[test]"]
    makefile = (ROOT / "Makefile").read_text()
    assert "-c constraints.txt -e '.[test]'" in makefile


def test_one_python_version():
    conda = next(entry for entry in environment() if str(entry).startswith("python="))
    project = pyproject()
    least = re.fullmatch(r">=(3\.\d+)", project["project"]["requires-python"])[1]
    assert conda == f"python={least}"
    assert project["tool"]["ruff"]["target-version"] == "py" + least.replace(".", "")


def test_version_and_licence_agree():
    project = pyproject()["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == project["version"]
    assert citation["license"] == project["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert len(citation["references"]) == 4


@pytest.mark.parametrize("text", ["README.md", "CONTRIBUTING.md", "docs/lite_models.md", "Makefile"])
def test_the_commands_that_a_text_names_exist(text):
    commands = typer.main.get_command(cli.app).commands
    named = re.findall(r"\bzsad ([a-z]+)([^`#\n|;),]*)", (ROOT / text).read_text())
    assert named
    for name, words in named:
        assert name in commands, f"zsad {name}"
        known = {option for parameter in commands[name].params for option in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", words)) <= known, f"zsad {name}{words}"


# --- the tree


def test_no_file_holds_a_path_of_one_machine():
    pattern = re.compile(r"/(work|farm)/")
    found = []
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        lines = enumerate(text.splitlines(), 1)
        found += [f"{path.relative_to(ROOT)}:{n}" for n, line in lines if pattern.search(line)]
    assert not found


def test_checkpoints_stay_small():
    files = {path.resolve() for path in (ROOT / "checkpoints").rglob("*") if path.is_file()}  # linked ones once
    sizes = {path: path.stat().st_size for path in files}
    if not sizes:
        pytest.skip("no checkpoints in this checkout")
    assert not [str(path.relative_to(ROOT)) for path, size in sizes.items() if size >= 16 * MEGABYTE]
    assert sum(sizes.values()) < 60 * MEGABYTE
