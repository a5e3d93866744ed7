"""The floors of the house: what a module may import (docs/changing.md)."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the ground up. A module belongs to the longest name here that it begins with.
FLOORS = [
    {
        "ifvit.errors",
        "ifvit.constants",
        "ifvit.files",
        "ifvit.paths",
        "ifvit.gcs",
        "ifvit.config",
        "ifvit.fields",
        "ifvit.presets",
        "ifvit.cli",
        "ifvit.bar",
        "ifvit.flags",
        "ifvit.neighbours",
        "ifvit",
    },
    {"ifvit.devices"},
    {"ifvit.models"},
    {"ifvit.pixels"},
    {"ifvit.data"},
    {"ifvit.foreign", "ifvit.legacy"},
    {"ifvit.checkpoint"},
    {"ifvit.loftr", "ifvit.load_module1_weights"},
    {"ifvit.scoring"},
    {"ifvit.gallery"},
    {"ifvit.matcher"},
    {"ifvit.training"},
    {
        "ifvit.commands",
        "ifvit.checkpoint.__main__",
        "ifvit.weights.__main__",
        "ifvit.evaluate",
        "ifvit.enroll",
        "ifvit.export",
        "ifvit.gallery.__main__",
        "ifvit.identify",
        "ifvit.register",
        "ifvit.report",
        "ifvit.verify",
        "ifvit.prints",
        "ifvit.train_dense",
        "ifvit.train_match",
    },
    {"tune"},
    {"ifvit.train_all", "ifvit.tune"},
]
FLOOR = {name: n for n, names in enumerate(FLOORS) for name in names}


def modules() -> dict[str, Path]:
    files = [f for package in ("ifvit", "cluster", "tune") for f in (ROOT / package).rglob("*.py")]
    return {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in files}


MODULES = modules()


def imports(file: Path) -> set[str]:
    """Modules of ours that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {
                f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in MODULES else node.module for a in node.names
            }
    return found & MODULES.keys()


def floor(module: str) -> int:
    while module not in FLOOR:
        module = module.rpartition(".")[0]
    return FLOOR[module]


@pytest.mark.parametrize("module", sorted(m for m in MODULES if not m.startswith("cluster")))
def test_a_module_imports_nothing_from_a_floor_above(module):
    above = {m for m in imports(MODULES[module]) if not m.startswith("cluster") and floor(m) > floor(module)}
    assert not above, f"{module} imports {', '.join(sorted(above))}"


def test_the_page_for_who_changes_the_code_has_the_floors_as_they_are():
    page = (ROOT / "docs/changing.md").read_text(encoding="utf-8").partition("## The floors")[2].partition("\n## ")[0]
    *rooms, lowest = re.findall(r"^ {4}(\w+) {2,}", page, re.MULTILINE)
    told = [FLOOR.get(room, FLOOR.get(f"ifvit.{room}")) for room in rooms]
    assert told == list(range(len(FLOORS) - 1, 0, -1)) and lowest == "facts"


@pytest.mark.parametrize("module", sorted(m for m in MODULES if m.startswith("cluster")))
def test_the_cluster_knows_nothing_of_fingerprints(module):
    assert not {m for m in imports(MODULES[module]) if not m.startswith("cluster")}


@pytest.mark.parametrize("module", sorted(m for m in MODULES if m.startswith("ifvit.training")))
def test_training_knows_its_process_and_nothing_of_ray(module):
    source = MODULES[module].read_text(encoding="utf-8")
    assert "import ray" not in source and "from ray" not in source
    assert {m for m in imports(MODULES[module]) if m.startswith("cluster")} <= {"cluster.host"}


def test_no_module_imports_itself_by_way_of_others():
    left = {m: imports(f) - {m} for m, f in MODULES.items()}
    while free := [m for m, uses in left.items() if not uses & left.keys()]:
        for m in free:
            del left[m]
    assert not left, f"a circle among {', '.join(sorted(left))}"
