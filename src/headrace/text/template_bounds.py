"""Bounds on what a chat template may take of the machine.

A template is a program that comes with a checkpoint, and Jinja's sandbox keeps it from Python's
internals only. Bounded besides are the size of each value that it makes, where need be before it is
made, and the work of one rendering: so no template runs for ever, and none fills the memory. A few
filters and methods that no conversation needs, and that would be hard to bound, are left out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.filters import make_attrgetter
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, _PassArg, pass_context
from jinja2.visitor import NodeTransformer

from headrace.text.template_sizes import (
    ENTRY,
    GROWTH_OF_FILTERS,
    GROWTH_OF_METHODS,
    check_fields,
    check_operands,
    check_size,
    own_size,
    whole_size,
)

MOST_STEPS = 1 << 30
"""Of one rendering: characters that it makes or reads. A round of a loop counts as 4096 of them,
and each part of the program in it as 16.
"""

_ROUND = 1 << 12
_PART = 1 << 4
_LEFT = "steps left"
"""Where a rendering keeps its count: a name that no template can write."""
_FILTERS_LEFT_OUT = ("batch", "pprint", "slice", "urlize", "wordcount", "wordwrap", "xmlattr")
_METHODS_LEFT_OUT = ("encode", "expandtabs", "format_map", "maketrans", "translate")
_COMPARING_TESTS = (
    *("==", "!=", "<", "<=", ">", ">=", "eq", "ne", "lt", "le", "gt", "ge"),
    *("equalto", "lessthan", "greaterthan", "in"),
)

Node = TypeVar("Node", bound=nodes.For | nodes.Macro | nodes.CallBlock)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with bounds for templates from ``bounded_template``."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **options: Any) -> None:
        super().__init__(finalize=_put_out, **options)
        for name in _FILTERS_LEFT_OUT:
            del self.filters[name]
        for name, function in {**self.filters, **_FILTERS}.items():
            self.add_filter(name, function)
        self.tests |= {name: _bounded_test(self.tests[name]) for name in _COMPARING_TESTS}
        del self.globals["lipsum"]  # it makes any amount of text
        self.globals |= {"dict": _dict, "namespace": _Namespace}

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        """Have a filter, whose results are bounded."""
        first = _PassArg.from_obj(function)

        @pass_context
        @functools.wraps(function)
        def bounded(context: Context, value: Any, *args: Any, **names: Any) -> Any:
            _take(context, own_size(value))
            if name in GROWTH_OF_FILTERS:
                check_size(GROWTH_OF_FILTERS[name](value, *args, **names))
            asked = {
                _PassArg.context: context,
                _PassArg.eval_context: context.eval_ctx,
                _PassArg.environment: self,
            }
            before = [] if first is None else [asked[first]]
            return _counted(context, function(*before, value, *args, **names))

        self.filters[name] = bounded

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Whether a template may use an attribute."""
        if isinstance(obj, str) and attr in _METHODS_LEFT_OUT:
            return False
        return not isinstance(obj, int | float) and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """The method ``format`` of a text in a form for templates; ``None`` for other values."""
        function = super().wrap_str_format(value)
        if function is None or value.__name__ in _METHODS_LEFT_OUT:
            return None

        def bounded(*args: Any, **names: Any) -> str:
            check_fields(value.__self__, "{", [*args, *names.values()])
            return function(*args, **names)

        return bounded

    def call(self, context: Context, function: Any, /, *args: Any, **names: Any) -> Any:
        """The result of a call. Raises SecurityError."""
        _take(context, ENTRY * len(args))
        text, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        if isinstance(text, str):
            _take(context, len(text))
            if name == "join":
                args = tuple(map(list, args))  # what can be read but once is measured first
            if name in GROWTH_OF_METHODS:
                given = {key: value for key, value in names.items() if not key.startswith("_")}
                check_size(GROWTH_OF_METHODS[name](text, *args, **given))
        return _counted(context, super().call(context, function, *args, **names))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """The result of an operator that makes things grow. Raises SecurityError."""
        check_operands(operator, left, right)
        return _counted(context, super().call_binop(context, operator, left, right))

    def bounded_template(self, source: str) -> jinja2.Template:
        """Compile a template that counts its work. Raises jinja2.TemplateError."""
        tree = _Bounding().visit(self.parse(source))
        tree.set_environment(self)
        return self.from_string(tree)

    def render_bounded(self, template: jinja2.Template, values: dict[str, Any]) -> str:
        """The text that a template makes. Raises SecurityError, and whatever else it raises."""
        return self.concat(template.generate({**values, _LEFT: [MOST_STEPS]}))

    def count_round(self, context: Context, parts: int) -> bool:
        """Take note that another round of a loop, or call of a macro, of so many parts begins.
        True.
        """
        _take(context, _ROUND + _PART * parts)
        return True

    def counted(self, context: Context, value: Any) -> Any:
        """A value that is made or read without a call. It has one here, so ``call`` counts it."""
        return value

    def join_texts(self, context: Context, values: Iterable[Any]) -> str:
        """What ``~`` makes of its operands."""
        return self.concat(map(str, values))

    @staticmethod
    def concat(texts: Iterable[str]) -> str:
        """One text of many."""
        joined, length = [], 0
        for text in texts:
            length += len(text)
            check_size(length)
            joined.append(text)
        return "".join(joined)


class _Bounding(NodeTransformer):
    """Puts calls of the environment's methods where the sandbox has none: at the beginning of each
    loop and macro, around lists, objects, slices and what is compared, and in place of ``~``.
    """

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802 - named by the base class
        if node.test is None:
            return self._counting(node)
        self.generic_visit(node)
        # Rounds that the condition leaves out count too.
        node.test = nodes.And(_count(node), node.test, lineno=node.lineno)
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Macro:  # noqa: N802
        return self._counting(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.CallBlock:  # noqa: N802
        return self._counting(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:  # noqa: N802
        self.generic_visit(node)
        return _call("join_texts", node.lineno, nodes.List(node.nodes, lineno=node.lineno))

    def visit_List(self, node: nodes.List) -> nodes.Expr:  # noqa: N802
        self.generic_visit(node)
        return _counted_node(node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Expr:  # noqa: N802
        self.generic_visit(node)
        return _counted_node(node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:  # noqa: N802
        self.generic_visit(node)
        return _counted_node(node) if node.ctx == "load" else node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:  # noqa: N802
        self.generic_visit(node)
        return _counted_node(node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:  # noqa: N802
        self.generic_visit(node)
        for operand in node.ops:
            operand.expr = _counted_node(operand.expr)
        return node

    def _counting(self, node: Node) -> Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_count(node), lineno=node.lineno))
        return node


def _count(node: nodes.Node) -> nodes.Call:
    parts = sum(1 for _ in node.find_all(nodes.Node))
    return _call("count_round", node.lineno, nodes.Const(parts, lineno=node.lineno))


def _counted_node(node: nodes.Expr) -> nodes.Expr:
    """A call with the value of a node, unless that stands in the template as it is."""
    try:
        node.as_const()
    except nodes.Impossible:
        return _call("counted", node.lineno, node)
    return node


def _call(method: str, line: int, *arguments: nodes.Expr) -> nodes.Call:
    """A call of a method of the environment, which no template can reach by itself."""
    target = nodes.EnvironmentAttribute(method, lineno=line)
    context = nodes.ContextReference(lineno=line)
    return nodes.Call(target, [context, *arguments], [], None, None, lineno=line)


def _dict(*args: Any, **names: Any) -> dict[Any, Any]:
    """Stands for the type, whose methods can change an object in spite of the sandbox."""
    return dict(*args, **names)


class _Namespace(Namespace):
    """Shown without what it holds, which may be itself."""

    def __repr__(self) -> str:
        return "<namespace>"


@pass_context
def _put_out(context: Context, value: Any) -> str:
    """The text of a value."""
    text = str(value)
    _take(context, len(text))
    return text


def _take(context: Context, work: int) -> None:
    left = context.parent[_LEFT]
    left[0] -= work
    if left[0] < 0:
        raise SecurityError(f"it takes more than {MOST_STEPS} steps")


def _counted(context: Context, value: Any) -> Any:
    """A value whose size is within bounds, after taking note of it."""
    size, entries = whole_size(value)
    # What a list holds was made before, and is compared at most, which is fast.
    _take(context, size if isinstance(value, str) else ENTRY * entries + size // ENTRY)
    return value


def _bounded_test(function: Any) -> Callable[..., bool]:
    """A test that compares a value with others."""

    @pass_context
    def bounded(context: Context, value: Any, *others: Any) -> bool:
        _take(context, whole_size(value)[0] + whole_size(others)[0])
        return bool(function(value, *others))

    return bounded


@pass_context
def _join(context: Context, values: Iterable[Any], d: str = "", attribute: Any = None) -> str:
    """Jinja's filter of this name."""
    if attribute is not None:
        values = map(make_attrgetter(context.environment, attribute), values)

    def parts() -> Iterator[str]:
        for index, value in enumerate(values):
            yield from ((str(d),) if index else ())
            yield str(value)

    return BoundedEnvironment.concat(parts())


@pass_context
def _sum(context: Context, values: Iterable[Any], attribute: Any = None, start: Any = 0) -> Any:
    """Jinja's filter of this name."""
    if attribute is not None:
        values = map(make_attrgetter(context.environment, attribute), values)
    for value in values:
        check_operands("+", start, value)
        start = _counted(context, start + value)
    return start


def _format(text: Any, *args: Any, **names: Any) -> Any:
    """Jinja's filter of this name."""
    if args and names:
        raise jinja2.TemplateRuntimeError("format takes values or names, not both")
    check_operands("%", str(text), names or args)
    return str(text) % (names or args)


_FILTERS: Mapping[str, Callable[..., Any]] = {"format": _format, "join": _join, "sum": _sum}
