"""Modules of this package as one file that needs none of it."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "lightning_ft."
ALLOWED = ("numpy",)
"""What a bundled module may import at its top beside the standard library: that which every reader needs."""


def bundle(root: str) -> str:
    """A module, and what it imports of this package, as the text of one module.

    The modules come one after another, each after those that it imports; imports of the package are left out, and
    others stand at the top, once. Functions may import further packages.

    Args:
        root: The module's full name. Its docstring becomes the whole's; it alone may have ``if __name__ == …``.

    Raises:
        ValueError: Two modules define one name, or a module does what a part of one file cannot: imports under another
            name, or in a function, of the package; packages beyond numpy at its top; a dataclass, which cannot be
            made in a file that is run without being registered in ``sys.modules``.

    Example:
        >>> text = bundle("lightning_ft.export.reading.graph")
        >>> "lightning_ft" in text.split("# ----")[0], "def open_graph" in text
        (False, True)
    """
    modules: dict[str, _Module] = {}
    _collect(root, modules)
    for module in modules.values():
        if module.runs and module.name != root:
            raise ValueError(f"{module.name}: only the root may have `if __name__ == ...`")
    owners: dict[str, str] = {}
    for module in modules.values():
        for name in module.defined:
            if (other := owners.setdefault(name, module.name)) != module.name:
                raise ValueError(f"{module.name} and {other} both define {name}: rename one of them")
    hoisted = sorted({line for module in modules.values() for line in module.imports})
    for line in hoisted:
        for name in _bound(line) & owners.keys():
            raise ValueError(f"{owners[name]} defines {name}, which `{line}` imports elsewhere: rename it")
    foreign = sorted({name for module in modules.values() for name in module.foreign} - owners.keys())
    hoisted = sorted({*hoisted, *(["from typing import Any"] if foreign else [])})
    ours = [line for line in hoisted if line.split()[1].split(".")[0] in ALLOWED]
    head = [f'"""{modules[root].docstring}"""', "from __future__ import annotations"]
    head += [_grouped([line for line in hoisted if line not in ours]), _grouped(ours)]
    head += ["\n".join(f"{name} = Any  # named in annotations" for name in foreign)]
    bodies = [f"# ---- {module.name.replace('.', '/')}.py\n\n\n{module.body}" for module in modules.values()]
    return "\n\n".join(part for part in head if part) + "\n\n" + "\n\n\n".join(bodies) + "\n"


class _Module:
    """A module in pieces.

    Args:
        name: Its full name.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        spec = find_spec(name)
        if spec is None or spec.origin is None:
            raise ValueError(f"{name} is no module of this package")
        self.text = Path(spec.origin).read_text(encoding="utf-8")
        self.tree = ast.parse(self.text)
        self.docstring = ast.get_docstring(self.tree, clean=False) or ""
        self.imports: set[str] = set()
        self.foreign: set[str] = set()
        self.runs = False
        self.needs: list[str] = []
        self._dropped: list[tuple[int, int]] = []
        self.defined = {name for node in self.tree.body for name in self._read(node)}
        for function in _functions(self.tree):
            self._check_lazy(function)
        self.body = self._body()

    def _read(self, node: ast.stmt) -> Iterator[str]:
        """Names that a statement at the top defines; imports are taken out."""
        if isinstance(node, ast.Import | ast.ImportFrom):
            self._take(node)
        elif isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            for inner in node.body:
                assert isinstance(inner, ast.Import | ast.ImportFrom)
                # Annotations are never evaluated; classes of other packages need not be there to be named.
                if _roots(inner) <= {*ALLOWED, *sys.stdlib_module_names}:
                    self._take(inner)
                else:
                    self.foreign |= {alias.asname or alias.name for alias in inner.names}
            self._drop(node)
        elif isinstance(node, ast.If):
            self.runs = True
        elif isinstance(node, ast.Expr) and node is self.tree.body[0]:
            self._drop(node)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))

    def _take(self, node: ast.Import | ast.ImportFrom) -> None:
        self._drop(node)
        roots = _roots(node)
        if roots == {"lightning_ft"}:
            whole = not isinstance(node, ast.ImportFrom) or "." not in str(node.module)
            if whole or any(alias.asname for alias in node.names):
                raise ValueError(f"{self.name}: `{ast.unparse(node)}`: bundled modules are imported from, by name")
            self.needs.append(str(getattr(node, "module", "")))
        elif roots == {"__future__"}:
            return
        elif roots == {"dataclasses"}:
            raise ValueError(
                f"{self.name}: a dataclass cannot be made in a file that is run without being registered: take a "
                "NamedTuple"
            )
        elif not roots <= {*ALLOWED, *sys.stdlib_module_names}:
            raise ValueError(f"{self.name}: `{ast.unparse(node)}` at its top: import it in the function that needs it")
        elif isinstance(node, ast.ImportFrom):
            names = [alias for alias in node.names if alias.name != "TYPE_CHECKING"]
            self.imports |= {ast.unparse(ast.ImportFrom(node.module, [alias], 0)) for alias in names}
        else:
            self.imports |= {ast.unparse(ast.Import([alias])) for alias in node.names}

    def _check_lazy(self, function: ast.AST) -> None:
        for node in ast.walk(function):
            if isinstance(node, ast.Import | ast.ImportFrom) and "lightning_ft" in _roots(node):
                raise ValueError(f"{self.name}: `{ast.unparse(node)}` in a function: import it at the top")
            if isinstance(node, ast.Import) and _roots(node) <= set(ALLOWED):  # stands at the top of the whole
                self.imports |= {ast.unparse(node)}
                self._drop(node)

    def _drop(self, node: ast.stmt) -> None:
        self._dropped.append((node.lineno - 1, node.end_lineno or node.lineno))

    def _body(self) -> str:
        """What is left of the text."""
        lines: list[str | None] = list(self.text.split("\n"))
        for start, end in self._dropped:
            lines[start:end] = [None] * (end - start)
            # The blank line that set an import in a function apart goes with it.
            if lines[end : end + 1] == [""] and self.text.split("\n")[start].startswith(" "):
                lines[end] = None
        return "\n".join(line for line in lines if line is not None).strip("\n")


def _collect(name: str, modules: dict[str, _Module], above: tuple[str, ...] = ()) -> None:
    """A module behind those that it needs."""
    if name in above:
        raise ValueError(f"{' imports '.join((*above, name))}: parts of one file cannot import each other in a circle")
    if name in modules:
        return
    module = _Module(name)
    for needed in module.needs:
        _collect(needed, modules, (*above, name))
    modules[name] = module


def _functions(tree: ast.AST) -> Iterator[ast.AST]:
    """Functions and methods, those within others not apart."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef):
            yield node
        else:
            yield from _functions(node)


def _roots(node: ast.Import | ast.ImportFrom) -> set[str]:
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
    return {name.split(".")[0] for name in names}


def _grouped(lines: Sequence[str]) -> str:
    """Imports of one name each, in order, with one line for each module."""
    of: dict[str, list[str]] = {}
    for line in lines:
        if line.startswith("from "):
            of.setdefault(line.split()[1], []).append(line.partition(" import ")[2])
    plain = [line for line in lines if line.startswith("import ")]
    return "\n".join([*plain, *(f"from {module} import {', '.join(names)}" for module, names in of.items())])


def _bound(line: str) -> set[str]:
    """The names that an import binds."""
    [node] = ast.parse(line).body
    assert isinstance(node, ast.Import | ast.ImportFrom)
    return {(alias.asname or alias.name).split(".")[0] for alias in node.names}
