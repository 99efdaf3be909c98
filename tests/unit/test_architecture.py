"""The shape of the house: who may import whom, where traces are, and that the command line starts light."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("interventions", "cluster", "pipeline")
LONGEST = 600

FORBIDDEN = {
    "interventions": {"pipeline", "cluster", "ray", "zarr", "dask", "xarray", "matplotlib"},
    "cluster": {"pipeline", "interventions", "torch", "zarr", "dask", "xarray", "diffusers", "nnsight", "matplotlib"},
}
HEAVY = ("torch", "ray", "dask", "matplotlib", "diffusers", "zarr", "xarray", "transformers", "nnsight")


@lru_cache
def modules() -> dict[str, Path]:
    """Every module of ours by its dotted name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@lru_cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(modules()[module].read_text(encoding="utf-8"))


def imported_by(node: ast.stmt, module: str) -> set[str]:
    """Names that one import statement may load, as dotted modules."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if not isinstance(node, ast.ImportFrom):
        return set()
    base = node.module or ""
    if node.level:
        is_package = modules()[module].name == "__init__.py"
        parts = module.split(".")
        kept = parts[: len(parts) - node.level + (1 if is_package else 0)]
        base = ".".join([*kept, *([node.module] if node.module else [])])
    return {base, *(f"{base}.{alias.name}" for alias in node.names)}


def every_import(module: str) -> set[str]:
    """Imports anywhere in a module, functions and type checking included."""
    return {
        name for node in ast.walk(tree_of(module)) if isinstance(node, ast.stmt) for name in imported_by(node, module)
    }


def imports_at_load(module: str) -> set[str]:
    """Imports that run when the module is loaded."""
    found: set[str] = set()

    def visit(body: list[ast.stmt]) -> None:
        for node in body:
            found.update(imported_by(node, module))
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                visit(node.orelse)
            elif isinstance(node, ast.If | ast.Try | ast.With | ast.For | ast.ClassDef):
                for name in ("body", "orelse", "finalbody"):
                    visit(getattr(node, name, []))

    visit(tree_of(module).body)
    return found


def in_package(package: str) -> list[str]:
    return [m for m in modules() if m == package or m.startswith(f"{package}.")]


def test_all_three_packages_are_looked_at():
    assert all(len(in_package(package)) > 3 for package in PACKAGES)


@pytest.mark.parametrize("module", [m for package in FORBIDDEN for m in in_package(package)])
def test_module_imports_nothing_from_above(module):
    forbidden = FORBIDDEN[module.split(".")[0]]
    above = {name for name in every_import(module) if name.split(".")[0] in forbidden}
    assert above == set()


def test_only_the_ray_pool_and_jobs_know_ray():
    knowing = {m for m in modules() if any(n.split(".")[0] == "ray" for n in every_import(m))}
    assert knowing <= {"cluster.ray_pool", "cluster.jobs", "pipeline.executors"}


def test_only_the_engine_traces():
    tracing = {
        module
        for module in modules()
        for node in ast.walk(tree_of(module))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "trace"
    }
    assert tracing == {"interventions.engine"}


def test_only_the_engine_knows_nnsight():
    knowing = {m for m in modules() if any(n.split(".")[0] == "nnsight" for n in every_import(m))}
    assert knowing == {"interventions.engine"}


@pytest.mark.parametrize("module", sorted(modules()))
def test_module_is_short(module):
    lines = len(modules()[module].read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST, f"{module} has {lines} lines"


@pytest.mark.parametrize("module", [m for m in sorted(modules()) if modules()[m].read_text(encoding="utf-8").strip()])
def test_module_says_what_it_is(module):
    docstring = ast.get_docstring(tree_of(module))
    assert docstring, f"{module} has no docstring"


@pytest.mark.parametrize(
    "module", [m for m in modules() if m.startswith(("interventions", "cluster")) or m == "pipeline.store"]
)
def test_library_does_not_print(module):
    prints = [
        node.lineno
        for node in ast.walk(tree_of(module))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert prints == []


def test_nothing_is_pickled():
    knowing = {
        m for m in modules() if any(n.split(".")[0] in ("pickle", "cloudpickle", "dill") for n in every_import(m))
    }
    assert knowing == set()


def load_graph() -> dict[str, set[str]]:
    """Which modules of ours a module loads, without the package that it is in."""
    graph = {}
    for module in modules():
        loaded = {name for name in imports_at_load(module) if name in modules()}
        graph[module] = {n for n in loaded if not module.startswith(f"{n}.") and n != module}
    return graph


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """Return the modules of one import cycle, or nothing."""
    finished: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in finished:
            return []
        for name in sorted(graph[module]):
            if cycle := walk(name, [*path, module]):
                return cycle
        finished.add(module)
        return []

    for module in sorted(graph):
        if cycle := walk(module, []):
            return cycle
    return []


def test_imports_run_in_no_circle():
    assert find_cycle(load_graph()) == []


@pytest.mark.parametrize(
    ("graph", "cycle"),
    [
        pytest.param({"a": {"b"}, "b": set()}, [], id="chain"),
        pytest.param({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": set()}, [], id="diamond"),
        pytest.param({"a": {"b"}, "b": {"a"}}, ["a", "b", "a"], id="pair"),
        pytest.param({"a": {"b"}, "b": {"c"}, "c": {"b"}}, ["b", "c", "b"], id="pair-below"),
    ],
)
def test_search_for_circles_finds_them(graph, cycle):
    assert find_cycle(graph) == cycle


def test_pipeline_rooms_are_entered_in_order():
    """A cell goes from config to store once and never back; a room may use those before it."""
    order = [
        "yaml_source",
        "experiment",
        "config",
        "layout",
        "plan",
        "store",
        "ledger",
        "replica",
        "executors",
        "sweep",
        "cli",
    ]
    for position, room in enumerate(order):
        later = {f"pipeline.{name}" for name in order[position + 1 :]}
        assert every_import(f"pipeline.{room}") & later == set(), room


def test_command_line_starts_light():
    code = (
        "import sys; before = set(sys.modules); import pipeline.cli; "
        f"print(sorted({set(HEAVY)!r} & {{m.split('.')[0] for m in sys.modules}}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "module",
    ["pipeline.cli", "pipeline.commands", "pipeline", "cluster.events", "pipeline.yaml_source", "pipeline.samples"],
)
def test_light_module_loads_nothing_heavy(module):
    seen: set[str] = set()
    queue = [module]
    while queue:
        current = queue.pop()
        if current not in seen:
            seen.add(current)
            queue += [name for name in imports_at_load(current) if name in modules()]
    heavy = {(m, name) for m in seen for name in imports_at_load(m) if name.split(".")[0] in HEAVY}
    assert heavy == set()


@pytest.mark.parametrize(
    "package", ["interventions.kinds", "interventions.families", "pipeline.metrics", "pipeline.tasks"]
)
def test_one_file_is_enough_to_add_one(package):
    """A new kind, family, metric or task is found by being there: its package names none of its files."""
    names = {m.rsplit(".", 1)[1] for m in modules() if m.startswith(f"{package}.")}
    tree = tree_of(package)
    mentioned = {n.split(".")[-1] for n in every_import(package)} | {
        node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert names & mentioned == set()
    assert "pkgutil" in every_import(package)
