"""Overrides of settings, given as "dotted.name=value"."""

import dataclasses
import difflib
import typing
from typing import Any, Literal

from fastlip.study.errors import StudyError
from fastlip.study.settings.serialization import dotted_names
from fastlip.study.settings.settings import Settings

#: Settings that the preset and the given files determine, which --set cannot change.
FIXED = ("preset", "dataset", "source", "corrupted", "checkpoints", "models")


def override(settings: Settings, assignments: list[str]) -> Settings:
    """``settings`` with all "dotted.name=value" applied at once, so that their order matters only for one name.

    Values of lists are separated by commas.

    Raises:
        StudyError: a name is unknown, a value is of the wrong type, or the settings do not fit each other; the message
            names the setting.
    """
    known = [name for name in dotted_names(settings) if name not in FIXED]
    changes: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise StudyError(f"--set {assignment}: write it as NAME=VALUE, as in pgd.steps=20", status=2)
        name, text = name.strip(), text.strip()
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise StudyError(f"--set {name}: no such setting; {hint}--help lists them", status=2)
        (*groups, last) = name.split(".")
        kind, inner = type(settings), changes
        for group in groups:
            kind, inner = typing.get_type_hints(kind)[group], inner.setdefault(group, {})
        inner[last] = _parse(typing.get_type_hints(kind)[last], text, name)
    changed: Settings = _replace(settings, changes)
    return changed


def _replace(settings: Any, changes: dict[str, Any]) -> Any:
    """A dataclass with changed values, those of the dataclasses in it by name."""
    values = {k: _replace(getattr(settings, k), v) if isinstance(v, dict) else v for k, v in changes.items()}
    return dataclasses.replace(settings, **values)


def _parse(kind: Any, text: str, name: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    try:
        if origin is tuple:
            return tuple(_parse(arguments[0], part, name) for part in text.strip("[]()").split(",") if part.strip())
        if origin is Literal:
            if text not in arguments:
                raise ValueError
            return text
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        return kind(text.strip())
    except (ValueError, KeyError):
        wanted = " or ".join(map(str, arguments)) if origin is Literal else getattr(kind, "__name__", str(kind))
        raise StudyError(f"--set {name}={text}: expected {wanted}", status=2) from None
