"""Join definitions of several modules, and all that they need, into one source file.

Text is moved, not rewritten: comments and layout stay. Only names change that two modules define.
"""

from __future__ import annotations

import ast
import builtins
import functools
import importlib.util
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

OURS = ("xlstm_distill", "xlstm_kernels")
Place: TypeAlias = tuple[str, str]
"""A module's dotted name, and a name at its top level."""
Function: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


@dataclass(frozen=True)
class Reference:
    """A place in the source where a name of the module's top level is used."""

    name: str
    line: int
    column: int
    """In bytes, as Python's parser counts."""


@dataclass
class Module:
    """A parsed module: which statements define each name of its top level, and its imports."""

    name: str
    source: str
    statements: dict[str, list[ast.stmt]] = field(default_factory=dict)
    ours: dict[str, Place] = field(default_factory=dict)
    """Names that it imports from our packages, and where they come from."""
    others: dict[str, str] = field(default_factory=dict)
    """Other names that it imports, and the statement that imports each."""
    found: dict[int, list[Reference]] = field(default_factory=dict)
    """What `references` has found, by the statement's id."""

    @functools.cached_property
    def lines(self) -> list[bytes]:
        """The source's lines without their ends."""
        return [line.encode() for line in self.source.split("\n")]

    def knows(self, name: str) -> bool:
        """Tell whether a name is one of the top level."""
        return name in self.statements or name in self.ours or name in self.others


@functools.cache
def read_module(name: str) -> Module:
    """Parse one of our modules; it is found, not imported."""
    spec = importlib.util.find_spec(name)
    assert spec is not None, name
    assert spec.origin is not None, name
    source = Path(spec.origin).read_text(encoding="utf-8")
    module = Module(name, source)
    for statement in _statements(ast.parse(source).body):
        _enter(module, statement)
    return module


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements of a top level, as they are when the module runs.

    Imports for type checkers count too, because annotations use them.
    """
    for statement in body:
        checked = isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.dump(statement.test)
        if not checked:
            yield statement
            continue
        assert isinstance(statement, ast.If)
        yield from _statements(statement.orelse or statement.body)


def _enter(module: Module, statement: ast.stmt) -> None:
    """Note which names a statement of the top level defines."""
    if isinstance(statement, ast.ImportFrom):
        assert statement.module is not None
        for alias in statement.names:
            bound = alias.asname or alias.name
            if statement.module.split(".")[0] in OURS:
                module.ours[bound] = (statement.module, alias.name)
            elif statement.module != "__future__":
                renamed = f" as {alias.asname}" if alias.asname else ""
                module.others[bound] = f"from {statement.module} import {alias.name}{renamed}"
        return
    if isinstance(statement, ast.Import):
        for alias in statement.names:
            renamed = f" as {alias.asname}" if alias.asname else ""
            bound = alias.asname or alias.name.split(".")[0]
            module.others[bound] = f"import {alias.name}{renamed}"
        return
    for name in _defined(statement):
        module.statements.setdefault(name, []).append(statement)


def _defined(statement: ast.stmt) -> list[str]:
    """Return the names that a statement defines, or that it adds something to.

    `@forward.register_fake` above a function named _, and a call `forward.register_autograd(...)`,
    belong to `forward`.
    """
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        if statement.name != "_":
            return [statement.name]
        return [_first_name(statement.decorator_list[0])]
    if isinstance(statement, ast.Assign):
        return [n.id for t in statement.targets for n in ast.walk(t) if isinstance(n, ast.Name)]
    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
        return [statement.target.id]
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        return [_first_name(statement.value)]
    return []


def _first_name(node: ast.expr) -> str:
    """Return the name that a chain of calls and attributes begins with."""
    while not isinstance(node, ast.Name):
        assert isinstance(node, ast.Call | ast.Attribute), ast.dump(node)
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id


def references(module: Module, statement: ast.stmt) -> list[Reference]:
    """Find where a statement uses names of its module's top level, its own name included."""
    if id(statement) in module.found:
        return module.found[id(statement)]
    found: list[Reference] = []
    if isinstance(statement, ast.FunctionDef | ast.ClassDef) and module.knows(statement.name):
        word = "class " if isinstance(statement, ast.ClassDef) else "def "
        found.append(Reference(statement.name, statement.lineno, len(word)))
    _visit(statement, module, frozenset(), found)
    written = getattr(getattr(statement, "value", None), "value", None)
    if isinstance(statement, ast.AnnAssign) and isinstance(written, str):  # a type in quotes
        _visit(ast.parse(written), module, frozenset(), found)
    module.found[id(statement)] = found
    return found


def names_used(module: Module, node: ast.AST) -> set[str]:
    """Return the names of a module's top level that a part of a statement uses."""
    found: list[Reference] = []
    _visit(node, module, frozenset(), found)
    return {reference.name for reference in found}


def _visit(node: ast.AST, module: Module, local: frozenset[str], found: list[Reference]) -> None:
    """Collect the references below a node; `local`: names that functions around it bind."""
    if isinstance(node, ast.Name):
        if node.id not in local and module.knows(node.id):
            found.append(Reference(node.id, node.lineno, node.col_offset))
        return
    inner, children = local, list(ast.iter_child_nodes(node))
    if isinstance(node, Function):
        inner = local | _bound(node)
        # Read where the function is defined, not inside it.
        for part in _outside(node):
            _visit(part, module, local, found)
        children = list(node.body) if isinstance(node.body, list) else [node.body]
    elif isinstance(node, ast.ClassDef):
        # A field of a class is none of the module's names.
        children = [*node.bases, *node.keywords, *node.decorator_list]
        for statement in node.body:
            fields = isinstance(statement, ast.Assign | ast.AnnAssign)
            children += _without_targets(statement) if fields else [statement]
    for child in children:
        _visit(child, module, inner, found)


def _outside(function: Function) -> list[ast.expr]:
    """Return the parts of a function that its definition evaluates."""
    arguments = function.args
    found = [*arguments.defaults, *(value for value in arguments.kw_defaults if value)]
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    every += [argument for argument in (arguments.vararg, arguments.kwarg) if argument]
    found += [argument.annotation for argument in every if argument.annotation]
    if not isinstance(function, ast.Lambda):
        found += [*function.decorator_list, *([function.returns] if function.returns else [])]
    return found


def _without_targets(statement: ast.AST) -> list[ast.AST]:
    """Return the parts of an assignment but the names that it assigns."""
    targets = [
        *getattr(statement, "targets", []),
        *([statement.target] if isinstance(statement, ast.AnnAssign) else []),
    ]
    return [child for child in ast.iter_child_nodes(statement) if child not in targets]


def _bound(function: Function) -> frozenset[str]:
    """Return the names that a function binds itself: arguments, and what it assigns."""
    bound = {arg.arg for arg in ast.walk(function.args) if isinstance(arg, ast.arg)}
    waiting: list[ast.AST] = list(ast.iter_child_nodes(function))
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound.add(node.id)
        if isinstance(node, ast.FunctionDef):
            bound.add(node.name)
        # What a function inside binds is its own.
        if not isinstance(node, Function):
            waiting.extend(ast.iter_child_nodes(node))
    return frozenset(bound)


class Bundle:
    """Definitions of several modules, collected with all that they need.

    replaced: names that come from another place than the modules say.
    """

    def __init__(self, replaced: Mapping[Place, Place]) -> None:
        self.replaced = replaced
        self.taken: dict[Place, None] = {}
        self.imports: dict[str, str] = {}

    def add(self, place: Place) -> None:
        """Take a definition and all that it needs."""
        waiting = [self.origin(place)]
        while waiting:
            at = waiting.pop()
            if at in self.taken:
                continue
            self.taken[at] = None
            module = read_module(at[0])
            for statement in module.statements[at[1]]:
                # One statement may define several names, and they are taken together.
                waiting += [(at[0], name) for name in _defined(statement)]
                for reference in references(module, statement):
                    waiting += self._needed(module, reference.name)

    def _needed(self, module: Module, name: str) -> list[Place]:
        if name in module.others:
            known = self.imports.setdefault(name, module.others[name])
            assert known == module.others[name], f"{name} is imported in two ways"
            return []
        return [self.origin((module.name, name))]

    def origin(self, place: Place) -> Place:
        """Follow imports to the module that defines a name."""
        while True:
            place = self.replaced.get(place, place)
            imported = read_module(place[0]).ours.get(place[1])
            if imported is None:
                return place
            place = imported

    def names(self) -> dict[Place, str]:
        """Return each definition's name in the bundle; only those that two modules have change."""
        owners: dict[str, list[str]] = {}
        for module, name in self.taken:
            owners.setdefault(name, []).append(module)
        reserved = set(owners) | set(self.imports) | set(dir(builtins))
        found = {}
        for module, name in self.taken:
            new = name
            if len(owners[name]) > 1 or name in self.imports:
                bare = name.lstrip("_")
                new = f"{name[: len(name) - len(bare)]}{module.rpartition('.')[2]}_{bare}"
                assert new not in reserved, new
            found[module, name] = new
        return found

    def text(self) -> str:
        """Return the definitions, each module's after those of the modules that it imports."""
        names = self.names()
        modules = self._sorted([module for module, _ in self.taken])
        parts = []
        for module in modules:
            taken = [name for owner, name in self.taken if owner == module]
            parts.append(self._section(read_module(module), taken, names))
        return "\n\n\n".join(parts) + "\n"

    def _sorted(self, names: list[str]) -> list[str]:
        """Sort modules so that each comes after those it needs."""
        found: dict[str, None] = {}

        def visit(name: str) -> None:
            if name in found:
                return
            for owner, taken in self.taken:
                if owner != name:
                    continue
                for statement in read_module(owner).statements[taken]:
                    for reference in references(read_module(owner), statement):
                        if reference.name not in read_module(owner).others:
                            needed = self.origin((owner, reference.name))[0]
                            if needed != name:
                                visit(needed)
            found[name] = None

        for name in names:
            visit(name)
        return list(found)

    def _section(self, module: Module, taken: list[str], names: Mapping[Place, str]) -> str:
        """Return the text of a module's definitions that are taken, in their order."""
        chosen = {id(s): s for name in taken for s in module.statements[name]}
        ordered = sorted(chosen.values(), key=lambda s: s.lineno)
        title = (ast.get_docstring(ast.parse(module.source)) or "").split("\n")[0]
        texts = [f"# {module.name}: {title}"]
        for statement in ordered:
            texts.append(self._moved(module, statement, names))
        return "\n\n\n".join(texts)

    def _moved(self, module: Module, statement: ast.stmt, names: Mapping[Place, str]) -> str:
        """Return a statement's text, with the comment above it, under the bundle's names."""
        lines = list(module.lines)
        edits = []
        for reference in references(module, statement):
            if reference.name in module.others:
                continue
            new = names[self.origin((module.name, reference.name))]
            if new != reference.name:
                edits.append((reference.line, reference.column, reference.name, new))
        # From the right, so that places further left stay what they are.
        for line, column, old, new in sorted(set(edits), reverse=True):
            text = lines[line - 1]
            assert text[column:].startswith(old.encode()), (module.name, line, old)
            lines[line - 1] = text[:column] + new.encode() + text[column + len(old.encode()) :]
        first = _first_line(module, statement)
        moved = b"\n".join(lines[first - 1 : statement.end_lineno]).decode()
        # A statement inside `if TYPE_CHECKING` is indented.
        return textwrap.dedent(moved)


def _first_line(module: Module, statement: ast.stmt) -> int:
    """Return the line that a statement begins with: its decorators and the comment above count."""
    decorators = getattr(statement, "decorator_list", [])
    first = min([statement.lineno, *(node.lineno for node in decorators)])
    while first > 1 and module.lines[first - 2].startswith(b"#"):
        first -= 1
    return first
