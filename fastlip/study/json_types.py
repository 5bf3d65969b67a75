"""Checks that plain JSON has the structure that a type declares, so that nothing read from disk is used unchecked."""

import dataclasses
import functools
import json
import sys
import types
import typing
from typing import Any

#: The largest number accepted. Percentages and distortions times 255 would overflow beyond it.
_LARGEST = sys.float_info.max / 1e6


def require(value: Any, hint: Any, where: str) -> None:
    """Raise where ``value`` is not what :func:`json.loads` returns for a ``hint``.

    Args:
        value: plain lists, dicts, strings, numbers, booleans and None.
        hint: a TypedDict or dataclass (exactly its keys), ``list[T]``, ``tuple[T, ...]``, ``dict[str, T]``,
            ``Literal``, ``T | None``, ``float`` (finite; whole numbers too), ``int`` (of 64 bits), ``str``, ``bool`` or
            ``Any``.
        where: name of the value, with which the message begins.

    Raises:
        ValueError: it is not; the message names the part that differs.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return
    if typing.is_typeddict(hint) or dataclasses.is_dataclass(hint):
        _require_keys(value, _hints(hint), where)
    elif origin in (list, tuple):
        _need(isinstance(value, list), value, where, "a list")
        for i, item in enumerate(value):
            require(item, arguments[0], f"{where}[{i}]")
    elif origin is dict:
        _need(isinstance(value, dict), value, where, "an object")
        for name, item in value.items():
            require(item, arguments[1], f"{where}.{name}")
    elif origin is typing.Literal:
        _need(any(value is a or (isinstance(value, str) and value == a) for a in arguments), value, where, _list(hint))
    elif origin in (typing.Union, types.UnionType):
        if value is not None or type(None) not in arguments:
            (wanted,) = (a for a in arguments if a is not type(None))
            require(value, wanted, where)
    elif hint is float:
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        _need(fits and abs(value) <= _LARGEST, value, where, "a finite number")
    else:
        fits = type(value) is hint and (hint is not int or -(2**63) <= value < 2**63)
        _need(fits, value, where, {int: "a whole number", str: "a string", bool: "true or false"}[hint])


def shown(value: Any) -> str:
    """``value`` abbreviated for a message."""
    text = "an object" if isinstance(value, dict) else "a list" if isinstance(value, list) else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _require_keys(value: Any, hints: dict[str, Any], where: str) -> None:
    _need(isinstance(value, dict), value, where, "an object")
    if value.keys() != hints.keys():
        names = sorted(value.keys() ^ hints.keys())
        said = "lacks" if names[0] in hints else "should not have"
        raise ValueError(f"{where} {said} {shown(names[0])}")
    for name, inner in hints.items():
        require(value[name], inner, f"{where}.{name}")


def _need(fits: bool, value: Any, where: str, wanted: str) -> None:
    if not fits:
        raise ValueError(f"{where} must be {wanted}, got {shown(value)}")


def _list(hint: Any) -> str:
    return "one of " + ", ".join(map(str, typing.get_args(hint)))


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)
