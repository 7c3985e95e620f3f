"""Imports point one way: the rooms of docs/architecture.md, and which may import which."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Each room may import those after it in its line, and itself. What lies loose in jaxdiff/ is the
# room "values", but for the command line.
ALLOWED = {
    "values": "",
    "models": "values",
    "diffusion": "values",
    "worlds": "values",
    "checkpoint": "values",
    "devices": "values",
    "weights": "values devices checkpoint",
    "families": "values models diffusion checkpoint weights devices",
    "engine": "values diffusion checkpoint devices weights families",
    "dataset": "values diffusion checkpoint families devices",
    "training": "values models diffusion worlds checkpoint devices weights families engine dataset",
    "evaluation": "values models worlds checkpoint devices weights engine dataset training",
    "pipelines": "values diffusion checkpoint devices families engine dataset training evaluation",
    "cli": "values checkpoint families engine dataset training pipelines",
}
LOOSE = {"__init__", "__main__", "checks", "cli", "errors", "request"}
WITHOUT_JAX = ("values", "checkpoint", "dataset", "diffusion")


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


def test_some_rooms_never_load_jax():
    every = modules()
    for name in every:
        if room(name) in WITHOUT_JAX:
            tree = ast.parse(every[name].read_text())
            tops = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
            loaded = {
                (getattr(node, "module", None) or node.names[0].name).partition(".")[0]
                for node in tops
            }
            assert not loaded & {"jax", "flax"}, name
