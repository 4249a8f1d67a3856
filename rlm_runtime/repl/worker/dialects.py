"""What models write that Python does not mean as they do, put right in the syntax tree before a
cell is compiled.

`await llm_query(...)` (the helpers answer at once), `from rlm import llm_query` (they are there
already).
"""

from __future__ import annotations

import _ast
import sys


def put_right(tree, code: str, given):
    """`tree` of a cell with the source `code`, in place; `given` are the names that every cell
    finds."""
    if "await" in code:
        _without_awaits(tree, given)
    if "import" in code:
        _without_imports(tree, given)
    return tree


def _without_awaits(tree, given) -> None:
    for node in _nodes(tree):
        for field in node._fields:
            value = getattr(node, field, None)
            if isinstance(value, list):
                value[:] = [_awaited(item, given) for item in value]
            elif value is not None:
                setattr(node, field, _awaited(value, given))


def _awaited(node, given):
    if isinstance(node, _ast.Await) and isinstance(node.value, _ast.Call):
        called = node.value.func
        if isinstance(called, _ast.Name) and called.id in given and callable(given[called.id]):
            return node.value
    return node


def _without_imports(tree, given) -> None:
    """`from anything import llm_query as ask` binds the helper, unless there is such a module in
    the library."""
    for node in _nodes(tree):
        for field in ("body", "orelse", "finalbody"):
            body = getattr(node, field, None)
            if isinstance(body, list):
                body[:] = [_bound(item, given) for item in body]


def _bound(node, given):
    if not isinstance(node, _ast.ImportFrom) or node.level or not node.module:
        return node
    if node.module.split(".")[0] in sys.stdlib_module_names or not all(
        a.name in given for a in node.names
    ):
        return node
    place = {k: getattr(node, k) for k in ("lineno", "col_offset", "end_lineno", "end_col_offset")}
    names = [(a.asname or a.name, a.name) for a in node.names if (a.asname or a.name) != a.name]
    if not names:
        return _ast.Pass(**place)
    targets = _ast.Tuple(
        [_ast.Name(new, _ast.Store(), **place) for new, _ in names], _ast.Store(), **place
    )
    values = _ast.Tuple(
        [_ast.Name(old, _ast.Load(), **place) for _, old in names], _ast.Load(), **place
    )
    return _ast.Assign([targets], values, **place)


def _nodes(tree):
    stack = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, _ast.AST):
            yield node
            stack += [getattr(node, field, None) for field in node._fields]
        elif isinstance(node, list):
            stack += node
