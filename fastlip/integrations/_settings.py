"""An attack's options as attributes under another library's names, so that a change after construction takes effect."""

import inspect
from collections.abc import Mapping
from typing import Any


class Settings:
    """Mixin of attacks that keep keywords for a function of :mod:`fastlip.attacks` in ``options``.

    Every option is an attribute, by its own name or by the one in ``_settings``; to assign it is to change the option.
    Any other assignment is refused, unless it is to an attribute that the attack has or that begins with an underscore:
    an option that is misspelt would be ignored otherwise.
    """

    #: The other library's names, each with that of the option.
    _settings: Mapping[str, str] = {}
    options: dict[str, Any]

    def _takes(self) -> Mapping[str, Any]:
        """The parameters of the function that the options go to."""
        raise NotImplementedError

    def _begin(self, options: dict[str, Any]) -> None:
        """Keep ``options``; from now on assignments are checked."""
        # Past any __setattr__ of the library's, which may look into what is assigned.
        self.__dict__["options"] = options

    def _set_option(self, name: str, value: Any) -> None:
        """Change the option called ``name``, by which another library may mean another value."""
        self.options[self._settings.get(name, name)] = value

    def __getattr__(self, name: str) -> Any:
        options = self.__dict__.get("options", {})
        option = self._settings.get(name, name)
        if option in options:
            return options[option]
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_") or "options" not in self.__dict__ or name in self.__dict__ or hasattr(type(self), name):
            super().__setattr__(name, value)
        elif name in self._settings or name in self._takes():
            self._set_option(name, value)
        else:
            known = ", ".join([*self._settings, *self._takes()])
            raise AttributeError(f"{type(self).__name__} has no setting {name!r}; it has {known}")


def keywords_of(function: Any) -> Mapping[str, Any]:
    """The keyword-only parameters of an attack, by name."""
    parameters = inspect.signature(function).parameters
    return {name: p for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
