"""Every import is declared in pyproject.toml, and every declaration is imported."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").is_file())
PACKAGES = ("ifvit", "cluster", "tune")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
COMMANDS = {"pytest-xdist", "ruff"}  # `make` runs them, and no file imports them
ELSEWHERE = {"cv2": ["opencv-python-headless"], "nbis": ["nbis-py"]}  # of an extra that is not installed for tests
THROUGH_OTHERS = {"flatbuffers"}  # jax.export asks for it
DEVICES = {"cuda", "tpu"}  # extras that name jax again, for another device


def names(requirements: Iterable[str]) -> set[str]:
    """Names of distributions, written as PyPI compares them: small letters, one hyphen."""
    return {re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", r)[0]).lower() for r in requirements}


DECLARED = names(r for wanted in (PROJECT["dependencies"], *EXTRAS.values()) for r in wanted)


def imported(*folders: str) -> set[str]:
    """The distributions that the files below `folders` import, wherever in the file."""
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    trees = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    modules = {alias.name for node in trees if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in trees if isinstance(node, ast.ImportFrom) and not node.level}
    ours = {*PACKAGES, *(file.stem for file in files), *(file.parent.name for file in files)}
    others = {module.split(".")[0] for module in modules} - ours - sys.stdlib_module_names
    distributions = ELSEWHERE | metadata.packages_distributions()
    found = (names(distributions.get(module, [module])) for module in others)
    return {name for several in found for name in (several & DECLARED or several)}  # MLflow comes in three parts


REQUIRED = names(PROJECT["dependencies"])
TESTS = {"test", "parity", "bench"}  # extras of what only tests import
OPTIONAL = names(r for extra, wanted in EXTRAS.items() if extra not in DEVICES | TESTS for r in wanted)
FOR_TESTS = names(r for extra in TESTS for r in EXTRAS[extra])


@pytest.mark.parametrize(
    "folders, declared", [(PACKAGES, REQUIRED | OPTIONAL), (("tests",), REQUIRED | OPTIONAL | FOR_TESTS)]
)
def test_every_import_is_declared(folders, declared):
    assert imported(*folders) - declared == set()


@pytest.mark.parametrize(
    "declared, folders",
    [((REQUIRED | OPTIONAL) - THROUGH_OTHERS, PACKAGES), (FOR_TESTS - COMMANDS, ("tests", *PACKAGES))],
)
def test_every_declaration_is_imported(declared, folders):
    assert declared - imported(*folders) == set()


@pytest.mark.parametrize("extra", sorted(DEVICES))
def test_the_devices_jax_is_the_same_jax(extra):
    (wanted,) = EXTRAS[extra]
    (plain,) = (r for r in PROJECT["dependencies"] if r.startswith("jax>"))
    assert re.sub(r"\[.*\]", "", wanted) == plain
