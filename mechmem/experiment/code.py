"""Code: a hash of everything in the source that can change a table, and of nothing else.

It is taken over syntax trees without comments, docstrings and line numbers: a table stays valid
when its code is explained better, and not when its code is changed.
"""

from __future__ import annotations

import ast
import hashlib
import sys
import uuid
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.util import find_spec, resolve_name
from pathlib import Path
from typing import Any

from mechmem.spec.registry import Component

PACKAGE = "mechmem"
LIBRARIES = {"pydantic", "typing_extensions"}
"""Bases of components from elsewhere; a run's key holds versions instead of their code."""
UNKNOWN = uuid.uuid4().hex
"""Stands for code without a source file, as in a notebook. It differs in every process, so that no
table made by such code is taken from an earlier process."""


def code_hash(components: Iterable[Component]) -> str:
    """A hash of the code that these components run.

    It covers the modules that define their classes, the classes of their parts and all bases, and
    every module of this package (or next to a user's own file) that one of them imports.
    """
    return _hash_of(frozenset(cls for component in components for cls in _classes(component)))


@cache
def syntax(source: str) -> str:
    """The syntax tree of a module as text, without docstrings, comments and line numbers.

    Every bare string is left out, not only docstrings: below a field it is its description.
    """
    return ast.dump(_WithoutText().visit(ast.parse(source)))


def imported(source: str, module: str, is_package: bool = False) -> set[str]:
    """The modules that a module may import, also within functions; some names may be no modules.

    Args:
        source: of the module.
        module: its dotted name, from which relative imports start.
        is_package: whether the source is that of an `__init__.py`.
    """
    package = module if is_package else module.rpartition(".")[0]
    found: set[str] = set()
    facade: set[str] = set()
    tree = ast.parse(source)
    for node in _run_nodes(tree):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
            facade |= {n.asname or n.name for n in node.names if n.name == PACKAGE}
        elif isinstance(node, ast.ImportFrom):
            start = resolve_name("." * node.level + (node.module or ""), package or None)
            found |= {start} | {f"{start}.{name.name}" for name in node.names}
    # `import mechmem as mm` and `mm.Patch`: the façade tells which module that is.
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found |= {f"{PACKAGE}.{node.attr}"} if node.value.id in facade else set()
    found = {_facade_names().get(name, name) for name in found}
    return found | {parent for name in found for parent in _parents(name)}


def _parents(module: str) -> list[str]:
    """`a.b` and `a` for `a.b.c`: importing a module runs its packages first."""
    parts = module.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts))]


class _WithoutText(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        is_text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if is_text else node


def _run_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that may run: not those below `if TYPE_CHECKING:`, which serve type checkers."""
    yield node
    children: Iterable[ast.AST] = ast.iter_child_nodes(node)
    if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
        children = node.orelse
    for child in children:
        yield from _run_nodes(child)


@cache
def _facade_names() -> dict[str, str]:
    """From `mechmem.Patch` to the module that defines Patch, for every name of the façade."""
    stub = _package_folder() / "__init__.pyi"
    return {
        f"{PACKAGE}.{name.asname or name.name}": f"{PACKAGE}.{node.module}"
        for node in ast.parse(stub.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ImportFrom)
        for name in node.names
    }


def _package_folder() -> Path:
    return Path(__file__).parents[1]


@cache
def _hash_of(classes: frozenset[type]) -> str:
    modules = {base.__module__ for cls in classes for base in cls.__mro__}
    content = hashlib.sha256()
    for name, text in sorted(_sources({name for name in modules if not _is_library(name)}).items()):
        content.update(f"{name}\n{UNKNOWN if text is None else syntax(text)}\n".encode())
    return content.hexdigest()[:12]


def _classes(value: Any) -> Iterator[type]:
    """The classes of a component and of every component in its fields."""
    if isinstance(value, Component):
        yield type(value)
        for name in type(value).model_fields:
            yield from _classes(getattr(value, name))
    elif hasattr(value, "each"):
        yield from _classes(value.each)
    elif isinstance(value, (tuple, list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _classes(part)


def _sources(modules: set[str]) -> dict[str, str | None]:
    """The sources of these modules and of all of ours that they import; None for one without."""
    roots = {PACKAGE} | {name.partition(".")[0] for name in modules}
    sources: dict[str, str | None] = {}
    waiting = sorted(modules)
    while waiting:
        name = waiting.pop()
        path = _file(name)
        sources[name] = path.read_text(encoding="utf-8") if path else None
        for other in imported(sources[name] or "", name, bool(path and path.stem == "__init__")):
            is_new = other not in sources and other not in waiting
            if is_new and not _is_library(other) and _is_followed(other, roots):
                waiting.append(other)
    return sources


def _is_library(module: str) -> bool:
    root = module.partition(".")[0]
    is_standard = root in sys.stdlib_module_names and root != "__main__"
    # The package's own __init__ holds names only, and the version.
    return is_standard or root in LIBRARIES or module == PACKAGE


def _is_followed(module: str, roots: set[str]) -> bool:
    """Whether an imported name is a module whose code counts, rather than an installed library's
    or a name within a module."""
    path = _file(module)
    is_installed = path is not None and "site-packages" in path.parts
    return path is not None and (module.partition(".")[0] in roots or not is_installed)


def _file(module: str) -> Path | None:
    """The source file of a module, without importing it; None if there is none."""
    loaded = getattr(sys.modules.get(module), "__file__", None)
    if loaded:
        return Path(loaded) if Path(loaded).suffix == ".py" else None
    root, *parts = module.split(".")
    found = find_spec(root) if root not in sys.modules else sys.modules[root].__spec__
    if found is None:
        return None
    if not parts:
        return Path(found.origin) if found.origin and found.origin.endswith(".py") else None
    if not found.submodule_search_locations:
        return None
    place = Path(found.submodule_search_locations[0]).joinpath(*parts)
    candidates = (place.with_name(f"{place.name}.py"), place / "__init__.py")
    return next((path for path in candidates if path.is_file()), None)
