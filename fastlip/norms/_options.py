"""The options that every norm takes: one object, or the same names as keywords."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypedDict

import torch
from torch import Tensor

from fastlip._arguments import integer, number
from fastlip._generators import unpredictable_generator

DETERMINISTIC = ("ring", "gram", "cholesky")
METHODS = ("auto", "lanczos", "power", *DETERMINISTIC, "svd")

#: Bytes that an iteration's vectors may take where ``max_memory`` says nothing else.
_MEMORY = 1 << 31


@dataclass(frozen=True)
class NormOptions:
    """How to compute norms. Each field is also a keyword of the functions that take ``options``.

    Values are checked on construction, where numbers of NumPy become Python's.

    Attributes:
        rtol: relative width ``upper / lower - 1`` at which an iteration stops; positive and finite.
        confidence: probability that all upper sides of one call hold, where they depend on random start vectors.
        method: "auto" decomposes small operators, takes convolutions on large inputs as part of a circular one where
            that takes less time and is narrow enough, and iterates the others. "lanczos" or "power" iterate in any
            case. With certainty hold "svd" (the dense matrix), "cholesky" (a factorisation of its Gram matrix), "ring"
            (the circular convolution that this one is part of) and "gram" (Gram iteration on that one; Delattre et al.
            2023). The last two are upper bounds of another operator, loose on small inputs.
        starts: independent random start vectors of an iteration; at least 4 are advisable in float32.
        max_steps: most steps of an iteration; if None 300 for "lanczos" and 2000 for "power".
        dtype: arithmetic of "lanczos", torch.float32 or torch.float64; the bounds are evaluated in float64 either way.
        max_memory: bytes that an iteration's vectors, or the matrix of "svd", may take; if None 2 GiB, on a GPU half of
            what is free there.
        generator: source of the start vectors; if None one that the operating system seeds.
        progress: called with the number of operators done and their total, each time one is done.

    Raises:
        TypeError: a field is of the wrong type; the message names it.
        ValueError: a field's value is out of range; the message names it.

    Example:
        >>> import torch
        >>> import fastlip
        >>> options = fastlip.NormOptions(rtol=1e-3, generator=torch.Generator().manual_seed(0))
        >>> print(fastlip.conv_norm(torch.randn(4, 3, 3, 3), 8, options=options))
    """

    rtol: float = 1e-2
    confidence: float = 1.0 - 1e-6
    method: str = "auto"
    starts: int = 4
    max_steps: int | None = None
    dtype: torch.dtype = torch.float32
    max_memory: int | None = None
    generator: torch.Generator | None = None
    progress: Callable[[int, int], None] | None = None

    def __post_init__(self) -> None:
        checked = {
            "rtol": number(self.rtol, "rtol", "a positive number"),
            "confidence": number(self.confidence, "confidence", "a number strictly between 0 and 1"),
            "starts": integer(self.starts, "starts"),
            "max_steps": None if self.max_steps is None else integer(self.max_steps, "max_steps"),
            "max_memory": None if self.max_memory is None else integer(self.max_memory, "max_memory"),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if not 0.0 < self.rtol < math.inf:
            raise ValueError(f"rtol must be positive and finite, got {self.rtol}")
        if not 0.0 < self.confidence < 1.0:
            raise ValueError(f"confidence must lie strictly between 0 and 1, got {self.confidence}")
        if not isinstance(self.method, str) or self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if not isinstance(self.dtype, torch.dtype) or self.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype must be torch.float32 or torch.float64, got {self.dtype!r}")
        if not isinstance(self.generator, torch.Generator | None):
            raise TypeError(f"generator must be a torch.Generator or None, got {type(self.generator).__name__}")
        if self.progress is not None and not callable(self.progress):
            raise TypeError(f"progress must be callable or None, got {type(self.progress).__name__}")

    def resolved(self, tensors: Iterable[Tensor]) -> "ResolvedOptions":
        """The same for the device of ``tensors``, with a generator and a number of bytes in place of None."""
        generator = unpredictable_generator() if self.generator is None else self.generator
        given = {f.name: getattr(self, f.name) for f in fields(NormOptions)}
        given |= {"generator": generator, "max_memory": memory_for(self.max_memory, tensors)}
        return ResolvedOptions(**given)


@dataclass(frozen=True, kw_only=True)
class ResolvedOptions(NormOptions):
    """Options of which nothing is left open, as the solvers take them; made by :meth:`NormOptions.resolved`."""

    max_memory: int
    generator: torch.Generator


class NormKeywords(TypedDict, total=False):
    """The fields of :class:`NormOptions` as keywords."""

    rtol: float
    confidence: float
    method: str
    starts: int
    max_steps: int | None
    dtype: torch.dtype
    max_memory: int | None
    generator: torch.Generator | None
    progress: Callable[[int, int], None] | None


def chosen_options(
    function: str,
    options: NormOptions | None,
    keywords: Mapping[str, Any],
    names: Iterable[str] = NormKeywords.__annotations__,
) -> NormOptions:
    """The options of a call to ``function``, which was given ``options`` or some of the keywords ``names``.

    Raises:
        TypeError: a keyword is not one of ``names``, there are both options and keywords, or ``options`` are no
            :class:`NormOptions`.
        ValueError: an option's value is out of range.
    """
    unknown = [name for name in keywords if name not in names]
    if unknown:
        raise TypeError(f"{function}() got an unexpected keyword argument {unknown[0]!r}")
    if options is None:
        return NormOptions(**keywords)
    if not isinstance(options, NormOptions):
        raise TypeError(f"options must be a NormOptions or None, got {type(options).__name__}")
    if keywords:
        raise TypeError(f"{function}() takes options or keywords, not both: {', '.join(keywords)} belong into options")
    return options


def memory_for(given: int | None, tensors: Iterable[Tensor]) -> int:
    """``given``, or the default for the device of these tensors: 2 GiB, on a GPU half of what is free there.

    A GPU gains from iterating as many operators at once as fit, since it launches and waits once for all of them.

    Example:
        >>> import torch
        >>> import fastlip
        >>> print(fastlip.norms.memory_for(None, [torch.zeros(1)]))
    """
    if given is not None:
        return given
    device = next((t.device for t in tensors), None)
    if device is None or device.type != "cuda":
        return _MEMORY
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(_MEMORY, (torch.cuda.mem_get_info(device)[0] + unused) // 2)
