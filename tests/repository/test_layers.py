"""Imports point down a list of layers and never run in a circle, and files stay short.

Imports are read from the source: those inside functions, those for type checkers, and modules that
a string names count like any other.
"""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# From top to bottom; | parts rooms on one floor. A module imports from its own room and from the
# floors below: nothing from above, nothing from the room next door. `fastsfvae` is what the package
# itself shows.
LAYERS = """
    __main__
    cli
    reproduce | hub
    results
    fastsfvae
    training | evaluate | step_comparison
    objectives
    loss elbo likelihoods _noise _spread distributions graphed fit levenberg_marquardt geometry
    gram
    jacobian
    jacobian.run
    jacobian.plan
    jacobian.rules
    jacobian.cost | jacobian.validate
    ops
    kernels | reference | models | data | piecewise
    ground | _checks | _constants | _ranges
"""
# What a decoder and its loss do without.
LATE = {"training", "data", "results", "reproduce", "cli"}
MOST_MODULES = 60
LINES = 400

PLACES = {
    name: (floor, room)
    for floor, rooms in enumerate(LAYERS.strip().splitlines())
    for room, names in enumerate(rooms.split("|"))
    for name in names.split()
}


def place_of(module):
    """The floor and the room of "fastsfvae.a.b": that of a.b or else of a."""
    name = module.removeprefix("fastsfvae.")
    while name and name not in PLACES:
        name = name.rpartition(".")[0]
    assert name, f"{module} has no place among the layers"
    return PLACES[name]


def read_sources():
    """The text of each module by its name."""
    sources = {}
    # Of a clone's fastsfvae/kernels/, which only points to kernels/, nothing is left.
    for folder, package in (("fastsfvae", "fastsfvae"), ("kernels", "fastsfvae.kernels")):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            sources[".".join((package, *parts)).removesuffix(".__init__")] = path.read_text()
    return sources


def imports(sources):
    """module -> those of the modules that it imports."""
    return {
        name: (set(_named(name, text, sources)) & sources.keys()) - {name}
        for name, text in sources.items()
    }


def _named(module, text, sources):
    is_package = any(name.startswith(f"{module}.") for name in sources)
    parents = [*module.split("."), *[""] * is_package]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = parents[: -node.level] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                submodule = f"{base}.{alias.name}"
                yield submodule if submodule in sources else base
        # The package's own name stands in strings that import nothing.
        elif isinstance(node, ast.Constant) and "." in str(node.value):
            yield node.value


def arrows_up(graph):
    """The pairs (module, one that it imports) that do not point down."""

    def down(module, other):
        here, there = place_of(module), place_of(other)
        return here == there or here[0] < there[0]

    return [(name, x) for name, found in graph.items() for x in found if not down(name, x)]


def circle(graph):
    """Modules each of which imports the next one and the last the first; or none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


SOURCES = read_sources()
GRAPH = imports(SOURCES)


def test_imports_point_down():
    assert not arrows_up(GRAPH)


def test_no_modules_import_each_other():
    assert not circle(GRAPH)


def test_kernels_import_nothing_else_of_the_package():
    kernels = {name for name in GRAPH if name.startswith("fastsfvae.kernels")}
    assert kernels and not set().union(*(GRAPH[name] for name in kernels)) - kernels


def test_wrong_imports_are_found():
    sources = {
        "fastsfvae": "import torch",
        "fastsfvae.loss": "from fastsfvae.ops import a",
        "fastsfvae.ops": "",
        "fastsfvae.ops.a": "def late():\n    from fastsfvae import loss",
        "fastsfvae.kernels": "",
        "fastsfvae.kernels.a": "if TYPE_CHECKING:\n    from .b import nothing",
        "fastsfvae.kernels.b": "from torch import nn",
        "fastsfvae.reference": "late = 'fastsfvae.kernels.b'",
    }
    graph = imports(sources)
    assert arrows_up(graph) == [
        ("fastsfvae.ops.a", "fastsfvae.loss"),
        ("fastsfvae.reference", "fastsfvae.kernels.b"),
    ]
    assert set(circle(graph)) == {"fastsfvae.ops.a", "fastsfvae.loss"}
    sources["fastsfvae.ops.a"] = ""
    assert not circle(imports(sources))
    sources["fastsfvae.kernels.b"] = "from . import a"
    assert set(circle(imports(sources))) == {"fastsfvae.kernels.a", "fastsfvae.kernels.b"}
    with pytest.raises(AssertionError, match="fastsfvae.attic.a has no place among the layers"):
        place_of("fastsfvae.attic.a")


def test_the_package_loads_what_a_loss_needs():
    code = "import sys, fastsfvae; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    loaded = [name.split(".") for name in done.stdout.split()]
    loaded = [[*parts, ""][1] for parts in loaded if parts[0] == "fastsfvae"]
    assert not LATE.intersection(loaded)
    assert 0 < len(loaded) <= MOST_MODULES


def test_files_are_short():
    assert not {name for name, text in SOURCES.items() if text.count("\n") >= LINES}
