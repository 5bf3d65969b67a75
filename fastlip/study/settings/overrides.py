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
    """``settings`` with all "dotted.name=value" applied at once, the last for each name; lists are separated by commas.

    Raises:
        StudyError: a name is unknown or a value is of the wrong type; the message names the setting.
    """
    texts: dict[str, str] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise StudyError(f"--set {assignment}: write it as NAME=VALUE, as in pgd.steps=20", status=2)
        name, text = name.strip(), text.strip()
        known = [known for known in dotted_names(settings) if known not in FIXED]
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise StudyError(f"--set {name}: no such setting; {hint}--help lists them", status=2)
        texts[name] = text
    replaced: Settings = _replace(settings, texts, "")
    return replaced


def _replace(settings: Any, texts: dict[str, str], group: str) -> Any:
    """A copy with the values of ``texts``, made at once: settings that do not fit each other are refused as a whole."""
    own = {name.removeprefix(group).partition(".")[0]: name for name in texts if name.startswith(group)}
    kinds = typing.get_type_hints(type(settings))
    values = {
        field: _parse(kinds[field], texts[name], name)
        if name == group + field
        else _replace(getattr(settings, field), texts, f"{group}{field}.")
        for field, name in own.items()
    }
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
