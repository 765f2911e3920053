"""All mutants of a module: its source with one expression or statement changed, the rest untouched to the letter.

Each function below that yields ``Change``s is one kind of mistake. Left alone: strings and docstrings, type hints,
imports, and what stands in a ``raise`` (the message).
"""

import ast
import hashlib
from collections.abc import Iterator
from typing import NamedTuple


class Change(NamedTuple):
    """Replace the source of ``node`` by ``text``."""

    node: ast.AST
    text: str


class Mutant(NamedTuple):
    """One damaged version of a module."""

    module: str  # path from the root of the project, such as minunet/ops/relu.py
    line: int
    where: str  # the function or class, such as AdamW.step; empty outside of any
    old: str  # the first changed line as it was, stripped
    new: str  # and as it is
    source: str  # the whole damaged module
    key: str  # a name that stays as long as the function (or class, or statement of the module) does


def digest(module: str, source: str) -> str:
    """The key of damaged code: the same as long as it is the same."""
    return hashlib.sha256(f"{module}\n{source}".encode()).hexdigest()[:16]


def mutants(module: str, source: str) -> list[Mutant]:
    """Every mutant of ``source`` in a mixed but fixed order: any first part of it is a fair sample.

    >>> for m in sorted(mutants("m.py", "def f(x, y=1):\\n    return x - y\\n"), key=lambda m: m.new):
    ...     print(m.new)
    def f(x, y=0):
    def f(x, y=2):
    return (x + y)
    """
    tree = ast.parse(source)
    starts = _line_starts(source)
    data = source.encode()
    found: dict[str, Mutant] = {}
    for statement in tree.body:
        begin, finish = _span(statement, starts)
        for change in _changes(statement):
            start, end = _span(change.node, starts)
            if data[start:end] == change.text.encode():
                continue
            damaged_part = (data[begin:start] + change.text.encode() + data[end:finish]).decode()
            damaged = data[:begin].decode() + damaged_part + data[finish:].decode()
            key, line = digest(module, damaged_part), change.node.lineno  # type: ignore[attr-defined]
            old, new = _first_difference(source, damaged)
            found.setdefault(key, Mutant(module, line, _where(tree, line), old, new, damaged, key))
    return [found[key] for key in sorted(found)]


def _line_starts(source: str) -> list[int]:
    """The byte at which each line starts: ``ast`` counts columns in bytes."""
    starts = [0]
    for line in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    return starts


def _span(node: ast.AST, starts: list[int]) -> tuple[int, int]:
    """The first byte of ``node``, and the first one after it."""
    start = starts[node.lineno - 1] + node.col_offset  # type: ignore[attr-defined]
    return start, starts[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]


def _where(node: ast.AST, line: int) -> str:
    """The dotted name of the innermost function or class that holds ``line``."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef) and child.lineno <= line <= (child.end_lineno or 0):
            return f"{child.name}.{_where(child, line)}".rstrip(".")
    return ""


def _first_difference(old: str, new: str) -> tuple[str, str]:
    pairs = zip(old.splitlines(), new.splitlines(), strict=False)
    return next(((a.strip(), b.strip()) for a, b in pairs if a != b), ("", ""))


# --- Where to look ----------------------------------------------------------------------------------------------


def _changes(statement: ast.stmt) -> Iterator[Change]:
    for node in _code(ast.Module([statement], [])):
        for kind in KINDS:
            yield from kind(node)


def _code(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes below ``node`` that compute something."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or _is_text(child):
                continue
            yield child
            if not isinstance(child, ast.Raise):
                yield from _code(child)


def _is_text(node: ast.AST) -> bool:
    if isinstance(node, ast.Expr):
        node = node.value
    return isinstance(node, ast.JoinedStr | ast.Import | ast.ImportFrom) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


# --- The kinds of mistakes ---------------------------------------------------------------------------------------

ARITHMETIC: dict[type, type] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
COMPARISON: dict[type, type] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
FUNCTION = {
    "sum": "mean",
    "mean": "sum",
    "min": "max",
    "max": "min",
    "any": "all",
    "all": "any",
    "floor": "ceil",
    "sin": "cos",
    "cos": "sin",
    "argmax": "argmin",
    "zeros": "ones",
    "ones": "zeros",
    "zeros_like": "ones_like",
    "append": "extend",
}
DROPPABLE = (
    "copy",
    "astype",
    "sqrt",
    "abs",
    "swapaxes",
    "reshape",
    "round",
    "ascontiguousarray",
    "sorted",
    "float",
    "int",
)


def _parenthesised(node: ast.expr) -> str:
    return f"({ast.unparse(node)})"


def arithmetic(node: ast.AST) -> Iterator[Change]:
    """Another operator; ``x -= y`` and ``x += y`` also become ``x = y``; a minus sign is lost."""
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        yield Change(node, _parenthesised(ast.BinOp(node.left, ARITHMETIC[type(node.op)](), node.right)))
    elif isinstance(node, ast.AugAssign):
        if type(node.op) in ARITHMETIC:
            yield Change(node, ast.unparse(ast.AugAssign(node.target, ARITHMETIC[type(node.op)](), node.value)))
        yield Change(node, f"{ast.unparse(node.target)} = {ast.unparse(node.value)}")
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Invert):
        yield Change(node, _parenthesised(node.operand))


def comparison(node: ast.AST) -> Iterator[Change]:
    """``<`` for ``<=``, ``!=`` for ``==``, and so on."""
    if isinstance(node, ast.Compare):
        for place, op in enumerate(node.ops):
            ops = [*node.ops[:place], COMPARISON[type(op)](), *node.ops[place + 1 :]]
            yield Change(node, _parenthesised(ast.Compare(node.left, ops, node.comparators)))


def boolean(node: ast.AST) -> Iterator[Change]:
    """``and`` for ``or``, a ``not`` lost, True for False, a condition negated."""
    if isinstance(node, ast.BoolOp):
        op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield Change(node, _parenthesised(ast.BoolOp(op, node.values)))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield Change(node, _parenthesised(node.operand))
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield Change(node, str(not node.value))
    if isinstance(node, ast.If | ast.While | ast.IfExp) and not isinstance(node.test, ast.UnaryOp):
        yield Change(node.test, f"(not ({ast.unparse(node.test)}))")


def constant(node: ast.AST) -> Iterator[Change]:
    """A number that is one more or one less."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        yield Change(node, repr(node.value + 1))
        yield Change(node, f"({node.value - 1!r})" if node.value < 1 else repr(node.value - 1))


def statement(node: ast.AST) -> Iterator[Change]:
    """A statement that is forgotten; not an assignment to a new name, whose loss any test would see."""
    stores_into = isinstance(node, ast.Assign) and all(
        isinstance(t, ast.Subscript | ast.Attribute) for t in node.targets
    )
    if stores_into or isinstance(node, ast.Expr | ast.AugAssign | ast.Raise | ast.Break | ast.Continue):
        yield Change(node, "pass")
    if isinstance(node, ast.If):
        for inner in node.body:
            if isinstance(inner, ast.Return):
                yield Change(inner, "pass")


def bounds(node: ast.AST) -> Iterator[Change]:
    """The two bounds of a slice exchanged, a slice from another end, its step forgotten."""
    if isinstance(node, ast.Slice):
        lower, upper, step = (ast.unparse(part) if part else "" for part in (node.lower, node.upper, node.step))
        tail = f":{step}" if step else ""
        if lower or upper:
            yield Change(node, f"{upper}:{lower}{tail}")
        if step:
            yield Change(node, f"{lower}:{upper}")


def argument(node: ast.AST) -> Iterator[Change]:
    """Two arguments, or two results, exchanged; a keyword argument forgotten."""
    if isinstance(node, ast.Call):
        for i in range(len(node.args) - 1):
            if _is_text(node.args[i]) or _name(node) in ("min", "max"):
                continue  # any test would see a name in the place of an array; and the order of numbers is none
            args = [*node.args[:i], node.args[i + 1], node.args[i], *node.args[i + 2 :]]
            yield Change(node, ast.unparse(ast.Call(node.func, args, node.keywords)))
        for keyword in node.keywords:
            rest = [other for other in node.keywords if other is not keyword]
            yield Change(node, ast.unparse(ast.Call(node.func, node.args, rest)))
    elif isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple):
        values = node.value.elts
        for i in range(len(values) - 1):
            if ast.unparse(values[i]) == ast.unparse(values[i + 1]):
                continue
            swapped = ast.Tuple([*values[:i], values[i + 1], values[i], *values[i + 2 :]], ast.Load())
            yield Change(node.value, ast.unparse(swapped))


def _name(call: ast.Call) -> str:
    """The last name of what is called: ``sum`` of ``x.sum(axis=0)``."""
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def function(node: ast.AST) -> Iterator[Change]:
    """Another function (the mean for the sum), or a call forgotten (a copy that is none)."""
    if not isinstance(node, ast.Call):
        return
    name, method = _name(node), node.func.attr if isinstance(node.func, ast.Attribute) else ""
    if isinstance(node.func, ast.Attribute) and method in FUNCTION:
        other = ast.Attribute(node.func.value, FUNCTION[method], ast.Load())
        yield Change(node.func, ast.unparse(other))
    if isinstance(node.func, ast.Name) and name in ("min", "max", "any", "all"):
        yield Change(node.func, FUNCTION[name])
    if name in DROPPABLE:
        is_module_function = not method or (
            isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
            and node.func.value.id in ("np", "xp", "math")
        )
        if not is_module_function:
            assert isinstance(node.func, ast.Attribute)
            yield Change(node, _parenthesised(node.func.value))
        elif node.args:
            yield Change(node, _parenthesised(node.args[0]))


KINDS = (arithmetic, comparison, boolean, constant, statement, bounds, argument, function)
