"""Settings as JSON, and by their dotted names."""

import dataclasses
import json
import typing
from typing import Any

from fastlip.study.errors import StudyError
from fastlip.study.json_types import require
from fastlip.study.settings.settings import Settings

#: Settings that runs written before them lack. What they say is about arms that such a run has not.
_LATER = {"norm_bounds"}


def dotted_names(settings: Settings) -> dict[str, Any]:
    """The value of every setting by its dotted name."""

    def flattened(value: Any, prefix: str) -> typing.Iterator[tuple[str, Any]]:
        for f in dataclasses.fields(value):
            inner = getattr(value, f.name)
            if dataclasses.is_dataclass(inner):
                yield from flattened(inner, f"{prefix}{f.name}.")
            else:
                yield prefix + f.name, inner

    return dict(flattened(settings, ""))


def to_json(settings: Settings) -> dict[str, Any]:
    """The settings as plain lists, dicts and numbers, as config.json holds them."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(settings)))
    return plain


def from_json(plain: dict[str, Any]) -> Settings:
    """The settings that :func:`to_json` wrote.

    Raises:
        ValueError: a value is of another type.
        StudyError: settings were added or removed since then, or one is out of range.
    """
    settings: Settings = _build(Settings, plain, "")
    return settings


def _build(kind: Any, plain: Any, prefix: str) -> Any:
    hints = typing.get_type_hints(kind)
    require(plain, dict[str, Any], prefix.rstrip(".") or "settings")
    later = {f.name: f.default for f in dataclasses.fields(kind) if prefix + f.name in _LATER}
    plain = json.loads(json.dumps(later)) | plain
    if set(plain) != set(hints):
        names = sorted(prefix + name for name in set(plain) ^ set(hints))
        raise StudyError(f"the run was made by another version of fastlip: {names[:3]} differ")
    values = {}
    for name, value in plain.items():
        if dataclasses.is_dataclass(hints[name]):
            value = _build(hints[name], value, f"{prefix}{name}.")
        else:
            require(value, hints[name], prefix + name)
            value = tuple(value) if isinstance(value, list) else value
        values[name] = value
    return kind(**values)
