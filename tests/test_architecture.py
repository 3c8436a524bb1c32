"""The imports of the project follow the table of packages in docs/architecture.md."""

import ast
import re
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("janus_jax", "convert", "configs", "benchmarks")
FILES = [ROOT / "sample.py", ROOT / "train.py"]
FILES += sorted(path for folder in FOLDERS for path in ROOT.glob(f"{folder}/**/*.py"))
WITHOUT_JAX = ("processing", "base")  # packages that must not import JAX
JAX = {"jax", "flax", "optax", "orbax"}


def read_table() -> dict[str, tuple[list[str], list[str]]]:
    """Returns {package: (file patterns, imported packages)}, in the order of the table."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \| (`.*`) \| .* \| (.*)\|$", text, re.MULTILINE)
    return {
        name: (re.findall(r"`(.*?)`", files), re.findall(r"\w+", imports))
        for name, files, imports in rows
    }


TABLE = read_table()


def package_of(path: Path) -> str:
    """Returns the package with the longest pattern that matches a file."""
    name = path.relative_to(ROOT).as_posix()
    matches = [
        (len(pattern), package)
        for package, (patterns, _) in TABLE.items()
        for pattern in patterns
        if fnmatch(name, pattern)
    ]
    assert matches, f"add {name} to the table in docs/architecture.md"
    return max(matches)[1]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def imports_of(path: Path) -> Iterator[str]:
    """Yields the modules that a file imports, also those in functions and for type checkers."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: expected absolute imports"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES else node.module


def test_every_row_is_read():
    names = list(TABLE)
    assert (names[0], names[-1], len(names)) == ("benchmarks", "base", 15)
    for package, (patterns, _) in TABLE.items():
        for pattern in patterns:
            assert any(ROOT.glob(pattern)), f"{package}: no file matches {pattern}"


def test_packages_only_import_those_below():
    names = list(TABLE)
    for package, (_, imports) in TABLE.items():
        assert set(imports) <= set(names[names.index(package) + 1 :]), package


def violations(path: Path) -> Iterator[str]:
    """Yields an error message for each import that the package of a file may not have."""
    package = package_of(path)
    for name in imports_of(path):
        library = name.split(".")[0]
        if name in MODULES:
            imported = package_of(MODULES[name])
            allowed = imported in (package, *TABLE[package][1])
        elif package == "models":
            allowed = library in {"jax", "flax"} | sys.stdlib_module_names - {"os", "io", "pathlib"}
        else:
            allowed = package not in WITHOUT_JAX or library not in JAX
        if not allowed:
            yield f"{module_name(path)} ({package}) imports {name}"


def test_files_import_what_their_package_may():
    assert [error for path in FILES for error in violations(path)] == []
