"""The schemas of ``torch.ops.fastlip``, and the groups of arguments that several operators share, each written once.

A group is a NamedTuple. An operator takes its fields one by one: a schema is spelled from the group's annotations
(:func:`_schema`), a checked wrapper builds the group and passes ``*group``, and an implementation in Python that is
decorated with :func:`takes_fields` has the group as one parameter. A number that may differ between samples or elements
is a float and an optional tensor that overrides it.
"""

import inspect
import string
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple, TypeVar, get_type_hints

from torch import Tensor


class StepSize(NamedTuple):
    """The length of a step."""

    step_size: float
    step_size_tensor: Tensor | None  # [B]


class Ball(NamedTuple):
    """The ball of radius ``eps`` in ``norm``, and the box from ``lo`` to ``hi``."""

    eps: float
    eps_tensor: Tensor | None  # [B]
    norm: str
    lo: float
    lo_tensor: Tensor | None  # [1 or B, ...]
    hi: float
    hi_tensor: Tensor | None  # [1 or B, ...]


class Normalised(NamedTuple):
    """What a model reads of the iterate, (x - mean) / std; the step writes it to ``model_input``."""

    model_input: Tensor | None = None  # [B, ...]
    mean: float = 0.0
    mean_tensor: Tensor | None = None  # [1, ...]
    std: float = 1.0
    std_tensor: Tensor | None = None  # [1, ...]


class Saved(NamedTuple):
    """What a step saves of the iterate that it leaves, and of the gradient that it reads."""

    best: Tensor | None = None  # [B, ...]
    better: Tensor | None = None  # [B] bool
    not_finite: Tensor | None = None  # [B] bool


class Best(NamedTuple):
    """What is known of the best iterates so far."""

    best_loss: Tensor | None = None  # [B] float64
    succeeded: Tensor | None = None  # [B] bool
    unconfirmed: Tensor | None = None  # [B] bool
    best_doubtful: Tensor | None = None  # [B] bool
    early_stop: bool = True


GROUPS: tuple[Any, ...] = (StepSize, Ball, Normalised, Saved, Best)
#: Fields of groups that operators change in place.
_CHANGED = ("model_input", "best", "not_finite", "best_loss", "succeeded", "unconfirmed", "best_doubtful")
#: How a schema spells the type of a field.
_TYPES = {bool: "bool", float: "float", str: "str", Tensor | None: "Tensor?"}


def _schema(*parts: Any, returns: str = "()") -> str:
    """A schema out of groups and of arguments as text; ``Tensor!`` is a tensor that is changed in place."""
    listed = ", ".join(part if isinstance(part, str) else _spelled(part) for part in parts)
    for letter in string.ascii_lowercase[: listed.count("Tensor!")]:
        listed = listed.replace("Tensor!", f"Tensor({letter}!)", 1)
    return f"({listed}) -> {returns}"


def _spelled(group: Any) -> str:
    arguments = []
    for name, hint in get_type_hints(group).items():
        kind = _TYPES[hint].replace("Tensor", "Tensor!") if name in _CHANGED else _TYPES[hint]
        default = f"={group._field_defaults[name]}" if name in group._field_defaults else ""
        arguments.append(f"{kind} {name}{default}")
    return ", ".join(arguments)


SCHEMAS = {
    "pgd_step_": _schema(
        "Tensor! x, Tensor grad, Tensor x0", StepSize, Ball, "float sparsity, Tensor? active", Normalised, Saved
    ),
    "project_": _schema("Tensor! x, Tensor x0", Ball, "Tensor? active"),
    "random_start": _schema("Tensor x0", Ball, "Tensor ids, Tensor key", returns="Tensor"),
    "apgd_step_": _schema(
        "Tensor! x, Tensor grad, Tensor loss, Tensor x0, Tensor! x_prev, Tensor! x_best, Tensor! grad_best, "
        "Tensor! best_loss, Tensor! past_loss, Tensor! step_size, Tensor! counters, Tensor schedule",
        Ball,
        "float momentum, float rho, Tensor? active",
        Normalised,
        Saved,
    ),
    "judge": _schema(
        "Tensor logits, Tensor labels, Tensor? targets, Tensor? toward, str loss, float rounding",
        Best,
        returns="(Tensor, Tensor, Tensor, Tensor, Tensor)",
    ),
    "operator_step_": _schema(
        "Tensor! out, Tensor! out_square, Tensor x, Tensor? x_square, Tensor? previous, Tensor? previous_square, "
        "Tensor weights, Tensor problems, Tensor tiles, Tensor gather_groups, Tensor entries, int max_vectors, "
        "int parts, str matmul_precision, Tensor? active"
    ),
    "pack_weights_": _schema("Tensor! out, Tensor[] weights, int[] groups, bool adjoint"),
}
#: Operators that run on the CPU alone, natively where the CPU library was built.
HOST_SCHEMAS = {
    "indirect_convs_": _schema(
        "Tensor![] out, Tensor[] x, Tensor[] weight, Tensor[] table, int[] adjoint, Tensor[] bias, "
        "Tensor[] other, Tensor![] active, int[] relu"
    ),
    "winograd_conv_": _schema(
        "Tensor! out, Tensor x, Tensor weight, bool adjoint, Tensor bias, Tensor other, Tensor! active, bool relu"
    ),
    "direct_conv_": _schema(
        "Tensor! out, Tensor x, Tensor weight, Tensor bias, Tensor other, Tensor! active, int[] stride, int[] padding, "
        "bool adjoint, bool relu"
    ),
    "interleaved_layers_": _schema(
        "Tensor! out, Tensor x, Tensor[] weight, Tensor[] bias, int[] geometry, Tensor! active, bool adjoint"
    ),
    "norm_along": _schema("Tensor weight, Tensor left, Tensor right", returns="Tensor"),
    "scaled_weight_grad": _schema(
        "Tensor grad, Tensor scaled, Tensor left, Tensor right, float norm, float bound", returns="Tensor"
    ),
    "top_eigenpairs": _schema("Tensor diagonal, Tensor off_diagonal", returns="(Tensor, Tensor)"),
    "krylov_bound": _schema(
        "Tensor diagonal, Tensor off_diagonal, Tensor last, Tensor residual, Tensor start_overlap, float tolerance",
        returns="Tensor",
    ),
}

Returned = TypeVar("Returned")


def takes_fields(function: Callable[..., Returned]) -> Callable[..., Returned]:
    """``function`` for the dispatcher: each parameter that is a group is replaced by the fields of the group."""
    hints = get_type_hints(function)
    groups = {name: hints[name] for name in inspect.signature(function).parameters if hints[name] in GROUPS}
    fields: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(function).parameters.items():
        fields += inspect.signature(groups[name]).parameters.values() if name in groups else [parameter]
    signature = inspect.Signature(fields)

    @wraps(function)
    def flat(*args: Any, **kwargs: Any) -> Returned:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        for name, group in groups.items():
            given[name] = group(*(given.pop(field) for field in group._fields))
        return function(**given)

    flat.__signature__ = signature  # type: ignore[attr-defined]
    return flat
