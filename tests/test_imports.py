"""Imports between the modules of janus_jax: no cycles, and the lower packages stay independent."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "janus_jax"

# What each of the lower packages may import of janus_jax, besides itself.
ALLOWED = {"models": set(), "processing": {"checks", "paths"}}


def _module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported_names(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (module, name) of every import in a file, those in functions and under TYPE_CHECKING
    included; name is empty for `import module`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} line {node.lineno}: use an absolute import"
            yield from ((node.module, alias.name) for alias in node.names)


def _import_graph() -> dict[str, set[str]]:
    """Return the modules of janus_jax that each module of janus_jax imports."""
    paths = {_module_name(path): path for path in PACKAGE.rglob("*.py")}
    graph = {}
    for module, path in paths.items():
        # `from package import x` imports either a module x or a name x of the package
        targets = (
            f"{source}.{name}" if f"{source}.{name}" in paths else source
            for source, name in _imported_names(path)
        )
        graph[module] = {target for target in targets if target in paths}
    return graph


def test_no_cycle():
    graph = _import_graph()
    assert "janus_jax.models.kv_cache" in graph["janus_jax.models.llama"]
    tuple(graphlib.TopologicalSorter(graph).static_order())  # a CycleError names the modules


@pytest.mark.parametrize("package", ALLOWED)
def test_lower_packages(package: str):
    own = f"janus_jax.{package}"
    imported = {
        f"{module} imports {target}"
        for module, targets in _import_graph().items()
        if module == own or module.startswith(f"{own}.")
        for target in targets
        if target.removeprefix("janus_jax.").split(".")[0] not in {package, *ALLOWED[package]}
    }
    assert not imported
