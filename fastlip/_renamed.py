"""Former names of keyword arguments, which stay accepted for a while."""

import warnings
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Returned = TypeVar("Returned")


def renamed_keywords(**new_names: str) -> Callable[[Callable[Parameters, Returned]], Callable[Parameters, Returned]]:
    """Accept former names of keyword arguments, with a DeprecationWarning that is attributed to the caller.

    Args:
        new_names: the present name of each former one.

    Raises:
        TypeError: on a call with both the former and the present name.
    """

    def decorate(function: Callable[Parameters, Returned]) -> Callable[Parameters, Returned]:
        @wraps(function)
        def accepting(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Returned:
            for old in new_names.keys() & kwargs.keys():
                new = new_names[old]
                if new in kwargs:
                    raise TypeError(f"{function.__name__}() got both {new!r} and its former name {old!r}")
                warnings.warn(f"{function.__name__}({old}=) is now {new}=", DeprecationWarning, stacklevel=2)
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return accepting

    return decorate
