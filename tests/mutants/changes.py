"""Changes a module's operators, bounds, constants and conditions, one at a time.

A changed module is a mutant. What only speaks to people or to type checkers stays as it is:
docstrings, annotations, decorators, messages, `raise` and `assert`.
"""

import ast
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

_COMPARISONS: Mapping[type[ast.cmpop], type[ast.cmpop]] = {
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
_OPERATORS: Mapping[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitOr,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}
_CALLS = {"min": "max", "max": "min", "any": "all", "all": "any", "reversed": "iter"}
_LOOP_ENDS = {ast.Break: ast.Continue, ast.Continue: ast.Break}
_SPOKEN = ast.Raise | ast.Assert | ast.JoinedStr | ast.Import | ast.ImportFrom
_SPOKEN_FIELDS = {"annotation", "returns", "decorator_list", "type_comment"}


@dataclass(frozen=True)
class Change:
    """One change of a syntax tree, made by `apply`.

    `function` is the line of the innermost function around it, where Python says that its code
    begins; None outside of functions."""

    line: int
    text: str
    function: int | None
    apply: Callable[[], None]


def changes(tree: ast.AST) -> list[Change]:
    """Returns all changes of a tree, in an order that the tree alone decides."""
    return [*_of_node(tree, function=None)]


def mutated(source: str, number: int) -> str:
    """Returns the source after its change of this number, without its comments."""
    tree = ast.parse(source)
    changes(tree)[number].apply()
    return ast.unparse(ast.fix_missing_locations(tree))


def _of_node(node: ast.AST, *, function: int | None) -> Iterator[Change]:
    if isinstance(node, _SPOKEN) or _is_text(node):
        return
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        function = min([node.lineno, *[place.lineno for place in node.decorator_list]])
    line = getattr(node, "lineno", 0)
    for text, apply in _own_changes(node, is_in_function=function is not None):
        yield Change(line, text, function, apply)
    for field, value in ast.iter_fields(node):
        if field in _SPOKEN_FIELDS:
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _of_node(child, function=function)


def _is_text(node: ast.AST) -> bool:
    """Reports whether a node is a docstring, or joins texts."""
    match node:
        case ast.Expr(value=ast.Constant(value=str())):
            return True
        case ast.BinOp(op=ast.Add(), left=left, right=right):
            return any(_is_string(side) for side in (left, right))
    return False


def _is_string(node: ast.AST) -> bool:
    is_constant = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return is_constant or isinstance(node, ast.JoinedStr)


def _own_changes(
    node: ast.AST, *, is_in_function: bool
) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yields the changes of this node alone, each with what it says."""
    match node:
        case ast.Compare(ops=ops):
            for place, op in enumerate(ops):
                other = _COMPARISONS[type(op)]
                yield _said(op, other), _setter(ops, place, other())
        case ast.BinOp(op=ast.BitOr()) if not is_in_function:
            return  # a union of types
        case ast.BinOp(op=op) | ast.AugAssign(op=op) if type(op) in _OPERATORS:
            yield _said(op, _OPERATORS[type(op)]), _setter(node, "op", _OPERATORS[type(op)]())
        case ast.BoolOp(op=op):
            others = ast.Or if isinstance(op, ast.And) else ast.And
            yield _said(op, others), _setter(node, "op", others())
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            twice = ast.UnaryOp(op=ast.Not(), operand=operand)
            yield "not x -> x", _setter(node, "operand", twice)
        case ast.UnaryOp(op=ast.USub()):
            yield "-x -> x", _setter(node, "op", ast.UAdd())
        case ast.Constant(value=bool() | int() | float() as value):
            other_value = _another(value)
            yield f"{value} -> {other_value}", _setter(node, "value", other_value)
        case ast.Call(func=ast.Name(id=name) as called) if name in _CALLS:
            yield f"{name} -> {_CALLS[name]}", _setter(called, "id", _CALLS[name])
        case ast.Return(value=ast.expr() as value) if _is_told(value):
            yield "return x -> return not x", _setter(node, "value", _negated(value))
    yield from _conditions(node)
    yield from _loop_ends(node)


def _conditions(node: ast.AST) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yields the negations of conditions that are neither comparisons nor negations."""
    if isinstance(node, ast.If | ast.While | ast.IfExp):
        if _is_plain(node.test) and not _is_for_type_checkers(node.test):
            yield "if x -> if not x", _setter(node, "test", _negated(node.test))
    elif isinstance(node, ast.comprehension):
        for place, test in enumerate(node.ifs):
            if _is_plain(test):
                yield "if x -> if not x", _setter(node.ifs, place, _negated(test))


def _loop_ends(node: ast.AST) -> Iterator[tuple[str, Callable[[], None]]]:
    for field in ("body", "orelse", "finalbody"):
        statements = getattr(node, field, None)
        if isinstance(statements, list):
            for place, statement in enumerate(statements):
                other = _LOOP_ENDS.get(type(statement))
                if other is not None:
                    text = f"{type(statement).__name__.lower()} -> {other.__name__.lower()}"
                    yield text, _setter(statements, place, other())


def _is_plain(test: ast.expr) -> bool:
    is_negation = isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)
    return not is_negation and not isinstance(test, ast.Compare | ast.BoolOp | ast.Constant)


def _is_told(value: ast.expr) -> bool:
    """Reports whether a value that is returned is a truth that calls or attributes tell."""
    return isinstance(value, ast.BoolOp)


def _is_for_type_checkers(test: ast.expr) -> bool:
    return isinstance(test, ast.Name) and test.id == "TYPE_CHECKING"


def _negated(test: ast.expr) -> ast.expr:
    return ast.UnaryOp(op=ast.Not(), operand=test)


def _another(value: bool | int | float) -> bool | int | float:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    return value * 2 if value else 1.0


def _said(before: ast.AST, after: type[ast.AST]) -> str:
    return f"{type(before).__name__} -> {after.__name__}"


def _setter(
    owner: ast.AST | list[ast.cmpop] | list[ast.expr] | list[ast.stmt],
    key: str | int,
    value: object,
) -> Callable[[], None]:
    def set_it() -> None:
        if isinstance(owner, list):
            owner.__setitem__(key, value)  # type: ignore[index, call-overload]
        else:
            setattr(owner, str(key), value)

    return set_it
