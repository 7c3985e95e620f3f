"""Imports point one way: the rooms of docs/architecture.md, and which may import which."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each room may import those after it in its line, and itself. What lies loose in jaxdiff/ is the
# room "values", but for the command line.
ALLOWED = {
    "values": "",
    **dict.fromkeys(("models", "diffusion", "worlds", "checkpoint"), "values"),
    "images": "values diffusion",
    "devices": "values checkpoint",
    "weights": "values checkpoint devices",
    "families": "values images checkpoint weights models diffusion",
    "engine": "values images checkpoint weights diffusion devices families",
    "dataset": "values images checkpoint diffusion devices families",
    "training": "values images checkpoint weights models diffusion worlds devices families engine "
    "dataset",
    "evaluation": "values images checkpoint weights models worlds devices families dataset "
    "training",
    "pipelines": "values images checkpoint diffusion devices families engine dataset training "
    "evaluation",
    "cli": "values families dataset training pipelines",
}
LOOSE = {"__init__", "__main__", "cache", "checks", "cli", "errors", "processor", "request"}
JAX_HALVES = ("model", "networks")  # ends of the names of modules in families/


def modules() -> dict[str, Path]:
    """Every module of the two packages, by its dotted name."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for package in ("jaxdiff", "pipelines")
        for path in sorted((ROOT / package).rglob("*.py"))
    }


def imports(name: str, every: dict[str, Path], *, late: bool) -> set[str]:
    """The modules of ours that one imports; with those inside functions if `late`."""
    tree = ast.parse(every[name].read_text())
    nodes = ast.walk(tree) if late else tree.body
    found = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    found &= every.keys()
    # A package's own page counts only where nothing more exact is imported from it.
    return {each for each in found if not any(other.startswith(f"{each}.") for other in found)}


def room(name: str) -> str:
    package, _, rest = name.partition(".")
    if package == "pipelines":
        return "pipelines"
    first, _, inner = rest.partition(".")
    if first in ("cli", "__main__"):
        return "cli"
    is_folder = (ROOT / "jaxdiff" / first).is_dir() if first else False
    return first if inner or is_folder else "values"


def test_every_import_goes_to_an_allowed_room():
    every = modules()
    wrong = [
        f"{name} imports {other}"
        for name in every
        if name != "jaxdiff"  # whose own names come late, from the engine
        for other in imports(name, every, late=True)
        if room(other) not in (room(name), *ALLOWED[room(name)].split())
    ]
    assert wrong == []


def test_no_file_imports_itself_by_way_of_others():
    every = modules()
    graph = {name: imports(name, every, late=True) - {"jaxdiff"} for name in every}
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_nothing_else_lies_loose():
    assert {path.stem for path in (ROOT / "jaxdiff").glob("*.py")} == LOOSE


@pytest.mark.parametrize("room_name", ["checkpoint", "dataset", "families", "images"])
def test_planning_loads_no_jax(room_name):
    """Whatever it imports on its way; the JAX halves of families are imported when they build."""
    names = [
        name
        for name in modules()
        if name.startswith(f"jaxdiff.{room_name}") and not name.endswith(JAX_HALVES)
    ]
    code = f"import sys, {', '.join(names)}; assert not {{'jax', 'flax'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
