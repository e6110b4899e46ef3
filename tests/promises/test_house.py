# SPDX-License-Identifier: MIT
"""The layout of the packages: no circles of modules, small folders and modules, one place that knows suffixes."""

from __future__ import annotations

import ast
import re
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from cmfast.backends import BACKENDS
from cmfast.formats.table import FORMATS
from helpers import ROOT

HOMES = {"cmfast": ROOT, "cmfast_train": ROOT / "train", "cmfast_export": ROOT / "export"}
LOWEST_FIRST = tuple(HOMES)
MOST_MODULES, MOST_LINES = 14, 400


def modules() -> dict[str, Path]:
    """Return the file of each module of the three packages, by its dotted name."""
    files = [(home, file) for package, home in HOMES.items() for file in (home / package).rglob("*.py")]
    return {
        ".".join(file.relative_to(home).with_suffix("").parts).removesuffix(".__init__"): file for home, file in files
    }


def statements(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yield all imports that run, also those inside functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield from (found for branch in node.orelse for found in statements(branch))
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        yield from statements(node)


def uses(source: str, known: Mapping[str, object]) -> set[str]:
    """Return which of the known modules a module imports."""
    found = set()
    for node in statements(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        else:
            assert not node.level, f"{ast.unparse(node)}: imports name their package"
            package = node.module or ""
            names = {f"{package}.{alias.name}" for alias in node.names}
            found |= {name if name in known else package for name in names}
    return found & known.keys()


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Return the modules that can be reached from themselves, those of one circle together."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        front = set(graph[start])
        while front:
            seen |= front
            front = {module for each in front for module in graph[each]} - seen
        return seen

    reach = {module: reached(module) for module in graph}
    found = {frozenset(other for other in reach[m] if m in reach[other]) for m in graph if m in reach[m]}
    return sorted(sorted(circle) for circle in found)


def graph_of(files: Mapping[str, Path]) -> dict[str, set[str]]:
    return {module: uses(file.read_text(), files) - {module} for module, file in files.items()}


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = graph_of(modules())
    assert len(graph) > 150
    assert sum(map(len, graph.values())) > 500, "the walk sees the imports"
    assert circles(graph) == []


def test_a_circle_is_seen() -> None:
    sources = {"a": "def f():\n    from b import x", "b": "import c", "c": "import a", "d": "import a"}
    assert circles({module: uses(source, sources) for module, source in sources.items()}) == [["a", "b", "c"]]
    checked = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import a"
    assert uses(checked, sources) == set()


def test_a_relative_import_is_refused() -> None:
    with pytest.raises(AssertionError, match="imports name their package"):
        uses("from . import a", {"a": ""})


def test_no_arrow_goes_up() -> None:
    level = {module: LOWEST_FIRST.index(module.partition(".")[0]) for module in modules()}
    up = [
        (module, other)
        for module, found in graph_of(modules()).items()
        for other in found
        if level[other] > level[module]
    ]
    assert up == []


@pytest.mark.parametrize(
    ("below", "above"),
    [
        ("cmfast.formats", "cmfast.backends"), ("cmfast.backends", "cmfast.bench"),
        ("cmfast_train.kernels", "cmfast_train.training"), ("cmfast_train.networks", "cmfast_train.training"),
        ("cmfast_export.graphs", "cmfast_export.targets"),
    ],
)  # fmt: skip
def test_a_folder_does_not_import_what_is_built_on_it(below: str, above: str) -> None:
    graph = graph_of(modules())
    assert any(module.startswith(f"{below}.") for module in graph)
    found = {module: {other for other in graph[module] if f"{other}.".startswith(f"{above}.")} for module in graph}
    assert {module: up for module, up in found.items() if f"{module}.".startswith(f"{below}.") and up} == {}


def test_libraries_do_not_import_commands() -> None:
    graph = graph_of(modules())
    commands = {module for module in graph if "cli" in module.split(".") or module.endswith((".commands", ".__main__"))}
    assert len(commands) > 8
    assert [(module, other) for module in graph.keys() - commands for other in graph[module] & commands] == []


def test_no_folder_has_more_than_14_modules_and_no_module_more_than_400_lines() -> None:
    files = [file for file in modules().values() if file.name not in ("__init__.py", "__main__.py")]
    counts = Counter(file.parent.relative_to(ROOT).as_posix() for file in files)
    assert {folder: count for folder, count in counts.items() if count > MOST_MODULES} == {}
    lines = {file.relative_to(ROOT).as_posix(): len(file.read_text().splitlines()) for file in modules().values()}
    assert {file: count for file, count in lines.items() if count > MOST_LINES} == {}


def test_each_format_has_a_backend() -> None:
    assert set(BACKENDS) == {each.name for each in FORMATS}


# What a suffix of an exported model means is decided in cmfast/formats/table.py.
DECIDES = re.compile(r"""(suffix|suffixes|endswith)\b[^#\n]*["']\.(onnx|engine|plan)["']""")
MAY = {
    "cmfast/formats/table.py": "the table",
    "cmfast/images.py": "names that an image file must not have",
    "cmfast/backends/cache.py": "entries of a cache, which are no models",
    "train/cmfast_train/recognise.py": "what a file is that was given as weights, told by its content",
}


def test_only_the_table_of_formats_says_what_a_suffix_means() -> None:
    found = {
        file.relative_to(ROOT).as_posix()
        for file in modules().values()
        if any(DECIDES.search(line) for line in file.read_text().splitlines())
    }
    assert found <= MAY.keys()


@pytest.mark.parametrize(
    "line", ['if file.suffix == ".onnx":', "if name.endswith('.engine'):", 'x.suffix in (".pt", ".plan")']
)
def test_such_a_line_is_seen(line: str) -> None:
    assert DECIDES.search(line)


def names_a_label(source: str) -> bool:
    """Whether a function has a parameter called label: conditions pass as one mapping, whatever their names."""
    functions = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
    ]
    return any(
        each.arg in ("label", "labels")
        for node in functions
        for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
    )


# Where a label is what it is: the public API, its arrays in files, the command line, data sets, networks.
OF_LABELS = ("cmfast.model", "cmfast.images", "cmfast.shards.", "cmfast.editing.", "cmfast.cli.", "cmfast_train.data.",
             "cmfast_train.networks.", "cmfast_train.kernels.networks")  # fmt: skip


def test_only_the_api_data_and_networks_have_a_parameter_called_label() -> None:
    found = {name for name, file in modules().items() if names_a_label(file.read_text())}
    assert {name for name in found if not name.startswith(OF_LABELS)} == set()
    assert "cmfast.model" in found


@pytest.mark.parametrize("line", ["def f(x, label): ...", "lambda *, label: 0", "async def f(labels=None): ..."])
def test_such_a_parameter_is_seen(line: str) -> None:
    assert names_a_label(line)
    assert not names_a_label(line.replace("label", "conditions"))


def untyped(source: str) -> list[str]:
    """Return the functions that are no Triton kernels and lack a type of an argument or of the result."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef):
            continue
        if any(ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list):
            continue
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
        given = [each for each in arguments if each is not None and each.arg != "self"]
        if node.returns is None or any(each.annotation is None for each in given):
            found.append(node.name)
    return found


def test_mypy_is_strict_everywhere_but_in_kernels() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]
    assert config["strict"]
    assert set(config["packages"]) == set(HOMES)
    assert all((home / package / "py.typed").exists() for package, home in HOMES.items())
    relaxed = [each for each in config["overrides"] if each.keys() - {"module", "ignore_missing_imports"}]
    files = modules()
    for module in (name for override in relaxed for name in override["module"]):
        source = files[module].read_text()
        assert "@triton.jit" in source, f"{module} has no kernels, so mypy need not be less strict there"
        assert untyped(source) == [], module


def test_a_function_without_types_beside_kernels_is_seen() -> None:
    typed = "def f(x: int, *, y: int) -> int: ...\n@triton.jit\ndef g(x): ...\n"
    assert untyped(typed) == []
    assert untyped(typed + "def h(x, y: int) -> None: ...\ndef k(x: int): ...\n") == ["h", "k"]


def private_imports(module: str, source: str) -> list[str]:
    """Return the private names of other modules that one imports; a private module belongs to the package around it."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            first = next((i for i, part in enumerate(parts) if re.match(r"_(?!_)", part)), None)
            if first is None or parts[0] not in HOMES or f"{module}.".startswith(f"{'.'.join(parts[:first])}."):
                continue
            found.append(".".join(parts[: first + 1]))
    return found


def test_no_module_imports_a_private_name_of_another() -> None:
    files = modules() | {f"benchmarks.{file.stem}": file for file in (ROOT / "benchmarks").glob("*.py")}
    found = {name for module, file in files.items() for name in private_imports(module, file.read_text())}
    assert found == set()


def test_an_import_of_a_private_name_is_seen() -> None:
    source = "from cmfast.a import _x\nfrom cmfast.b._c import d\nimport cmfast.e._f\nfrom cmfast.g import _h as h"
    names = ["cmfast.a._x", "cmfast.b._c", "cmfast.e._f", "cmfast.g._h"]
    assert private_imports("cmfast.m", source) == names
    assert private_imports("cmfast.b.m", source) == [name for name in names if name != "cmfast.b._c"]
    assert (
        private_imports("cmfast.b", "from cmfast.b._c import d\nfrom torch import _x\nfrom cmfast import __version__")
        == []
    )
