"""Chat templates that come with a downloaded model, rendered within bounds: what they compute is counted, and too much
ends the rendering with a message.

Counted are loop rounds, calls, filters, operators and the sizes of what they read and write, before it is written where
that can be told. The environment is transformers' own, with the same filters and globals, so that a template renders as
it does there. Nothing is changed silently: what is out of bounds is a `BoundError`, and no template can catch one.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import cache, lru_cache, wraps
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_SOURCE = 1_000_000
"""Characters of a template; those of model families have up to 30,000."""
MAX_WORK = 100_000_000
"""Of one rendering, about a character or an item each; real ones need a few times the conversation's length."""
STEP = 30
"""What a loop round or an operator costs beside what it reads and writes."""
CALL = 120
"""And a call or a filter."""
ITEM = 10
"""What an item of a list costs where it is looked into."""
MAX_BITS = 4096
"""Of a whole number."""

MAX_NUMBER = 1_000_000
"""That a filter is given."""

_SHALLOW = {
    "attr", "count", "d", "default", "first", "items", "last", "length", "list", "map", "reject", "rejectattr",
    "reverse", "select", "selectattr",
}  # fmt: skip
"""Filters that look at no item's inside, or whose result is counted when it is read."""
_COMPARING = {
    "==", "!=", "<", "<=", ">", ">=", "eq", "equalto", "ge", "greaterthan", "gt", "in", "le", "lessthan", "lt", "ne",
}  # fmt: skip
"""Tests that read what they are given."""
_WIDENING = {"center", "expandtabs", "ljust", "rjust", "to_bytes", "zfill"}
"""Methods that write as much as a number says."""
_REPEATING = {
    "decode", "encode", "indent", "join", "lstrip", "replace", "rfind", "rindex", "rpartition", "rsplit", "rstrip",
    "strip", "tojson", "translate", "trim",
}  # fmt: skip
"""Methods and filters that may read or write one text once for each character or item of another."""
_REFUSED = {"lipsum", "pprint", "striptags", "urlize", "wordwrap", "xmlattr"}
"""Made for web pages or for finding faults, and slow on some texts; no conversation needs them."""


class BoundError(jinja2.TemplateError):
    """A template that computes or writes too much."""


class _Meter(threading.local):
    left = MAX_WORK


_METER = _Meter()


def render(text: str, messages: list[dict[str, Any]], **values: Any) -> str:
    """The template's text of a conversation. Raises `BoundError`, and whatever else a template's code comes to."""
    if len(text) > MAX_SOURCE:
        raise BoundError(f"it has {len(text):,} characters, and may have {MAX_SOURCE:,}")
    _METER.left = MAX_WORK
    return _compiled(text).render(messages=messages, tools=None, documents=None, **values)


@lru_cache(maxsize=16)
def _compiled(text: str) -> jinja2.Template:
    return _environment().from_string(text)


@cache
def _environment() -> jinja2.Environment:
    from transformers.utils.chat_template_utils import _compile_jinja_template

    theirs: Any = _compile_jinja_template("").environment
    own: Any = _Bounded(
        trim_blocks=theirs.trim_blocks, lstrip_blocks=theirs.lstrip_blocks,
        extensions=[type(e) for e in theirs.extensions.values()],
    )  # fmt: skip
    own.globals.update(theirs.globals)
    own.globals["lipsum"] = _refused("lipsum")
    for name, function in theirs.filters.items():
        own.filters[name] = _refused(name) if name in _REFUSED else _filter(name, function)
    for name, function in theirs.tests.items():
        own.tests[name] = _test(name, function)
    own.filters |= {f"metered {f.__name__}": f for f in (_read, _sliced, _rounds)}
    return own


# ---------------------------------------------------------------------------------------------------------------
# The meter


def _charge(work: int) -> None:
    _METER.left -= work
    if _METER.left < 0:
        raise BoundError(f"it loops, or writes, more than a conversation needs (over {MAX_WORK:,} characters or items)")


def _size(value: Any, *, deep: bool) -> int:
    """Characters and items. ``deep``: as often as printing would show them, which for lists that share items may be
    far more than memory holds; so they are charged on the way."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, int):
        return value.bit_length() // 3
    if isinstance(value, Collection):
        if not deep or isinstance(value, range):
            return len(value)
        _charge(ITEM * len(value))
        items: Iterable[Any] = [x for pair in value.items() for x in pair] if isinstance(value, Mapping) else value
        return ITEM * len(value) + sum(_priced(x) for x in items)
    if deep and isinstance(value, jinja2.utils.Namespace):
        raise BoundError("it prints or compares a namespace")
    return 0


def _priced(value: Any) -> int:
    size = _size(value, deep=True)
    _charge(size)
    return size


@jinja2.pass_context  # Jinja computes no such filter before it renders
def _read(_context: Any, value: Any) -> Any:
    _charge(STEP + _size(value, deep=True))
    return value


@jinja2.pass_context
def _sliced(_context: Any, value: Any) -> Any:
    _charge(STEP + _size(value, deep=False))
    return value


@jinja2.pass_context
def _rounds(_context: Any, values: Any, cost: int = STEP) -> Any:
    cost = max(cost, STEP)
    return _Rounds(values, cost) if hasattr(values, "__len__") else _counted(values, cost)


def _counted(values: Iterable[Any], cost: int) -> Iterator[Any]:
    for value in values:
        _charge(cost)
        yield value


class _Rounds:
    """What a loop goes over, its length still known."""

    def __init__(self, values: Any, cost: int) -> None:
        self._values, self._cost = values, cost

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[Any]:
        return _counted(self._values, self._cost)


def _whole(values: Iterable[Any]) -> list[Any]:
    """Iterators among the arguments read out, so that what they hold is counted."""
    return [[_item(x) for x in value] if isinstance(value, Iterator) else value for value in values]


def _item(value: Any) -> Any:
    _charge(STEP + _size(value, deep=True))
    return value


def _check_format(text: str, arguments: Iterable[Any]) -> None:
    """What ``%`` and ``format`` write: each field is as wide as it says, or as all that it is given."""
    if re.search(r"%[^a-zA-Z%]*(\*|[0-9]{4})|\{[^{}]*([^{}]\{|[0-9]{4})", text):
        raise BoundError("it formats a text with a width that is computed or above 999")
    given = sum(_size(x, deep=True) for x in arguments)
    _charge((text.count("{") + text.count("%")) * (1000 + given))


def _check_call(name: str, given: list[Any], *, widens: bool, deep: bool) -> None:
    """``given``: what it is called on, then its arguments."""
    sizes = sum(_size(x, deep=deep) for x in given)
    if widens:
        number = max((abs(x) for x in given[1:] if isinstance(x, int)), default=0)
        if number > MAX_NUMBER:
            raise BoundError(f"it asks {name} for {number:.3g}" if number < 1e300 else f"it asks {name} for too much")
        sizes = (sizes + 1) * (1 + number)
    if name in _REPEATING and given:
        others = sum(_size(x, deep=True) for x in given[1:] if not isinstance(x, int))
        first = _size(given[0], deep=name == "tojson")
        if name in ("decode", "encode") and others:  # some codecs take quadratic time
            others = first
        sizes += (first + 1) * others
    _charge(CALL + sizes)


def _refused(name: str) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise BoundError(f"it uses {name}, which no conversation needs")

    return refuse


def _filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    passed = int(hasattr(function, "jinja_pass_arg"))
    deep = name not in _SHALLOW

    @wraps(function)
    def metered(*args: Any, **kwargs: Any) -> Any:
        first, given = args[:passed], list(args[passed:])
        if deep:
            given, kwargs = _whole(given), dict(zip(kwargs, _whole(kwargs.values()), strict=True))
        if name == "format" and given:
            _check_format(str(_item(given[0])), [*given[1:], *kwargs.values()])
        _check_call(name, [*given, *kwargs.values()], widens=deep, deep=deep)
        result = function(*first, *given, **kwargs)
        _charge(_size(result, deep=False))
        return result

    return metered


def _test(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def metered(*args: Any, **kwargs: Any) -> Any:
        _charge(STEP + (sum(_size(x, deep=True) for x in args) if name in _COMPARING else 0))
        return function(*args, **kwargs)

    return metered


# ---------------------------------------------------------------------------------------------------------------
# Where Jinja asks


class _Bounded(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        numbers = [x for x in (left, right) if isinstance(x, int)]
        if any(x.bit_length() > MAX_BITS for x in numbers):
            raise BoundError(f"it computes with a whole number of more than {MAX_BITS:,} bits")
        if operator == "**" and len(numbers) == 2 and left.bit_length() * abs(right) > MAX_BITS:
            raise BoundError(f"it computes a power of more than {MAX_BITS:,} bits")
        if operator == "%" and isinstance(left, str | bytes):
            _check_format(left if isinstance(left, str) else left.decode("latin-1"), [right])
        work = _size(left, deep=False) + _size(right, deep=False)
        if operator == "*" and len(numbers) == 1:  # a text or a list, so many times
            work = (work + 1) * max(1, numbers[0])
        _charge(STEP + work)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        name = str(getattr(__obj, "__name__", ""))
        if name in _REFUSED:  # of Markup
            raise BoundError(f"it uses {name}, which no conversation needs")
        own = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)
        if isinstance(own, str | bytes) and name == "join":
            args = tuple(_whole(args))
        given = [*args, *(v for k, v in kwargs.items() if not k.startswith("_"))]
        if isinstance(own, str) and name in ("format", "format_map"):
            _check_format(own, given)
        within = isinstance(__obj, jinja2.runtime.Macro) or __obj is __self.globals["namespace"]
        called_on = own if isinstance(own, str | bytes | int | list | tuple | range) else None
        _check_call(
            name if called_on is not None else "", [called_on, *given], widens=name in _WIDENING, deep=not within
        )
        result = super().call(__context, __obj, *args, **kwargs)
        _charge(_size(result, deep=False))
        return result

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        _put_meters(source)
        return super()._generate(source, *args, **kwargs)


def _put_meters(source: nodes.Template) -> None:
    """Where Jinja has no hook: around what is looped over, compared, sliced, looked up, joined and printed."""

    def metered(function: Callable[..., Any], value: nodes.Expr, *more: nodes.Expr) -> nodes.Expr:
        node = nodes.Filter(value, f"metered {function.__name__}", list(more), [], None, None, lineno=value.lineno)
        return node.set_environment(source.environment)

    def read(values: list[Any]) -> list[Any]:
        return [x if isinstance(x, nodes.TemplateData) else metered(_read, x) for x in values]

    looked_at = (nodes.For, nodes.Compare, nodes.Getitem, nodes.Dict, nodes.Concat, nodes.Output)
    for node in list(source.find_all(looked_at)):
        match node:
            case nodes.For():
                text = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
                node.iter = metered(_rounds, node.iter, nodes.Const(STEP + text, lineno=node.lineno))
            case nodes.Compare():
                node.expr = metered(_read, node.expr)
                for operand in node.ops:
                    operand.expr = metered(_read, operand.expr)
            case nodes.Getitem() if isinstance(node.arg, nodes.Slice):
                node.node = metered(_sliced, node.node)
            case nodes.Getitem() if not isinstance(node.arg, nodes.Const):
                node.arg = metered(_read, node.arg)  # a key is read to its end
            case nodes.Dict():
                for pair in node.items:
                    pair.key = metered(_read, pair.key)
            case nodes.Concat() | nodes.Output():
                node.nodes = read(node.nodes)
            case _:
                pass
