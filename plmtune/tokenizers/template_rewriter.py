"""Puts the counting into a template: steps into what repeats, characters where Python's own operators read."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.runtime import Context, markup_join, str_join
from jinja2.visitor import NodeTransformer

from plmtune.tokenizers.template_limits import COMPARISONS, Limits

_NODES_A_STEP = 8
_CHARS_A_STEP = 256
_CALL_STEPS = 10
# Names of filters that no template can write.
_TICK, _CONCAT, _ADD, _READ, _COPIED, _SEARCHED, _COMPARED = (
    f"{name} (counted)" for name in ("step", "~", "+", "read", "copy", "search", "compare")
)


def counters(limits: Limits) -> dict[str, Callable[..., Any]]:
    """Return the filters that `Rewriter` puts into a template."""
    spend, weigh = limits.spend, limits.weigh

    # Every turn of every template calls this, so it makes no further calls unless a limit is passed.
    @pass_context
    def step(context: Context, steps: int) -> bool:
        limits.steps -= steps if steps.__class__ is int and steps > 0 else 1
        if limits.steps < 0:
            limits.tick(0)
        return True

    @pass_context
    def add(context: Context, parts: Any) -> Any:
        size = 0
        for part in parts:
            if part.__class__ is not str:
                compute: Any = context.environment
                made = functools.reduce(lambda left, right: compute.call_binop(context, "+", left, right), parts)
                spend(4 * weigh(made))
                return made
            size += len(part)
        limits.chars -= size
        if limits.chars < 0:
            spend(0)
        return "".join(parts)

    @pass_context
    def concat(context: Context, parts: Any) -> str:
        size = 0
        for part in parts:
            size += len(part) if part.__class__ is str else 6 * weigh(part)
        spend(size)
        return (markup_join if context.eval_ctx.autoescape else str_join)(parts)

    @pass_context
    def read(context: Context, value: Any) -> Any:
        limits.chars -= len(value) if value.__class__ is str else 4 * weigh(value)
        if limits.chars < 0:
            spend(0)
        return value

    @pass_context
    def copied(context: Context, value: Any) -> Any:
        spend(limits.shallow(value))
        return value

    @pass_context
    def searched(context: Context, value: Any) -> Any:
        if not isinstance(value, dict):
            spend(len(value) if value.__class__ is str else weigh(value))
        return value

    @pass_context
    def compared(context: Context, left: Any, right: Any, how: str) -> Any:
        limits.compare(left, right)
        return COMPARISONS[how](left, right)

    return {
        _TICK: step, _CONCAT: concat, _ADD: add, _READ: read, _COPIED: copied, _SEARCHED: searched,
        _COMPARED: compared,
    }  # fmt: skip


def _through(name: str, node: Any) -> Any:
    return nodes.Filter(node, name, [], [], None, None).set_lineno(node.lineno)


class Rewriter(NodeTransformer):
    def visit_For(self, node: nodes.For) -> nodes.For:
        cost = _cost(node)
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_count(cost, node.lineno)).set_lineno(node.lineno))
        if node.test is not None:  # it also runs for items that the loop leaves out
            node.test = nodes.And(_count(cost, node.lineno), node.test).set_lineno(node.lineno)
        return node

    def visit_Macro(self, node: Any) -> Any:
        cost = _cost(node) + _CALL_STEPS
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_count(cost, node.lineno)).set_lineno(node.lineno))
        return node

    visit_CallBlock = visit_Macro
    visit_Block = visit_Macro

    def visit_Output(self, node: nodes.Output) -> nodes.Output:
        self.generic_visit(node)
        for index, one in enumerate(node.nodes):
            counted = isinstance(one, nodes.Filter) and one.name in (_ADD, _CONCAT)
            if not counted and not isinstance(one, nodes.TemplateData | nodes.Const):
                node.nodes[index] = _through(_READ, one)
        return node

    def visit_Concat(self, node: nodes.Concat) -> Any:
        self.generic_visit(node)
        return _through(_CONCAT, nodes.List(node.nodes).set_lineno(node.lineno))

    def visit_Add(self, node: nodes.Add) -> Any:
        parts: list[nodes.Expr] = []
        first: nodes.Expr = node
        while isinstance(first, nodes.Add):  # a + b + c as one operation
            parts.insert(0, first.right)
            first = first.left
        visited = [self.visit(part) for part in (first, *parts)]
        return _through(_ADD, nodes.List(visited).set_lineno(node.lineno))

    def visit_Compare(self, node: nodes.Compare) -> Any:
        self.generic_visit(node)
        first, constant = node.ops[0], isinstance(node.expr, nodes.Const) or isinstance(node.ops[0].expr, nodes.Const)
        if len(node.ops) == 1 and first.op in COMPARISONS and not constant:
            given = [first.expr, nodes.Const(first.op).set_lineno(node.lineno)]
            return nodes.Filter(node.expr, _COMPARED, given, [], None, None).set_lineno(node.lineno)
        sides: list[Any] = [node, *node.ops]
        searches = any(side.op in ("in", "notin") for side in node.ops)
        # A comparison reads no more of a text than its constant side is long.
        if searches or not any(isinstance(side.expr, nodes.Const) for side in sides):
            for side in sides:
                if not isinstance(side.expr, nodes.Const):
                    inside = getattr(side, "op", None) in ("in", "notin")
                    side.expr = _through(_SEARCHED if inside else _READ, side.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Getitem:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _through(_COPIED, node.node)
        elif not isinstance(node.arg, nodes.Const):
            node.arg = _through(_READ, node.arg)
        return node

    def visit_Tuple(self, node: nodes.Tuple) -> Any:
        self.generic_visit(node)
        return node if node.ctx != "load" else _through(_READ, node)

    def visit_Pair(self, node: nodes.Pair) -> nodes.Pair:
        self.generic_visit(node)
        if not isinstance(node.key, nodes.Const):
            node.key = _through(_READ, node.key)
        return node

    def visit_Name(self, node: nodes.Name) -> Any:
        return _through(_READ, node) if node.name == "varargs" and node.ctx == "load" else node


def _count(cost: int, lineno: int) -> Any:
    return _through(_TICK, nodes.Const(cost).set_lineno(lineno))


def _cost(node: nodes.Node) -> int:
    """Return the steps of one turn of a loop or one call of a macro, from its contents."""
    number = chars = 0
    for one in node.find_all((nodes.Expr, nodes.Stmt, nodes.TemplateData)):
        number += 1
        text = one.data if isinstance(one, nodes.TemplateData) else getattr(one, "value", None)
        chars += len(text) if isinstance(text, str) else 0
    return 1 + number // _NODES_A_STEP + chars // _CHARS_A_STEP
