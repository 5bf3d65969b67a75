"""A traced model as steps: what each of them does, on which shapes, and the factor that its rule gives it."""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from fastlip.lipschitz._combinations import Combination
from fastlip.lipschitz._intervals import Interval
from fastlip.lipschitz._registry import Factor
from fastlip.norms import Operator
from fastlip.norms._models.linear_calls import Pad
from fastlip.norms._operators.modules import TRANSPOSED


@dataclass(eq=False)
class Step:
    """One node of the graph that depends on the input.

    Attributes:
        name: qualified name of the module, or the node's name.
        kind: class of the module, or name of the function.
        inputs: the steps whose outputs it reads.
        factor: factor of the Lipschitz constant of its only input, or how those of several inputs combine.
        shape: shape of one output sample: the batch's axis is left out where it is alone in front.
        alone: whether it is; otherwise ``shape`` has all axes of the output for a batch of one, in the graph's order.
        module: the module called, or one that does the same as the function; None if values are only moved.
        apply: what the rule bounds, as a function of the node's arguments: out of place, without hooks, and with the
            operator, factors or constants from which the bound is computed.
        interval: bounds of the output's values, as a function of the node's arguments with an interval in place of
            each tensor that depends on the input; None if nothing is known of them.
        users: the steps that read its output.
        folded: whether ``factor`` was multiplied into a neighbouring step and is 1 now.
        scaled: whether a neighbour's factors were multiplied into this step.
        ahead: whether the constant up to this step misses the factors of a neighbour, or contains them too early.
        exact: whether a linear ``factor`` is the map itself, and not only a map of at least its norm.
        same: whether the output is the input's values in their order, moved by a constant.
        places: for what only moves values, each to one place, where in the input's sample they come from, flat,
            [elements] int64; None for all else, and where that is not known.
        linear: whether it is a linear map of its only input, whose ``factor`` is a number that also bounds the norm of
            the map with the magnitudes of its coefficients.
        pad: what it does, of padding.
        selected: for what selects elements, on which elements of the input's tensor in the graph the output depends,
            flat, bool; None if that is not known.
        moved: lower and upper bound on the distance of the outputs of two samples, [2]; None before the replay.
        seen: the least and the largest element of these outputs, [2]; None before the replay, or without elements.
    """

    name: str
    kind: str
    inputs: list["Step"]
    factor: Factor | Combination
    shape: tuple[int, ...]
    module: nn.Module | None = None
    apply: Callable[..., Tensor] = operator.pos
    interval: Callable[..., Interval] | None = None
    alone: bool = True
    users: list["Step"] = field(default_factory=list)
    folded: bool = False
    scaled: bool = False
    ahead: bool = False
    exact: bool = True
    same: bool = False
    linear: bool = False
    places: Callable[[], Tensor] | None = None
    pad: Pad | None = None
    selected: Tensor | None = None
    moved: Tensor | None = None
    seen: Tensor | None = None

    @property
    def entry_shape(self) -> tuple[int, ...]:
        """Shape of one entry along the first axis, which a layer that takes batches takes for a sample."""
        return self.shape if self.alone or len(self.shape) == 1 else self.shape[1:]


def is_its_operator(step: Step) -> bool:
    """Whether a step is its operator, but for an offset; the operator of a transposed convolution is its adjoint."""
    return (
        isinstance(step.factor, Operator)
        and step.exact
        and not isinstance(step.module, TRANSPOSED)
        and step.factor.input_shape == step.inputs[0].shape
        and step.factor.output_shape == step.shape
    )


def in_graph(
    t: Tensor,  # [1, *shape]
    step: Step,
    batch: int,
) -> Tensor:
    """One sample of a step's output as the tensor of the graph, which takes ``batch`` samples at once: equal ones."""
    return t.expand(batch, *t.shape[1:]) if step.alone else t[0]


def in_sample(t: Tensor, step: Step) -> Tensor:
    """The first sample in the tensor of the graph that is a step's output, [1, *shape]."""
    return first_sample(t, step.alone)


def first_sample(t: Tensor, alone: bool) -> Tensor:
    """The first sample in a tensor of the graph, [1, *shape]; ``alone`` as in :class:`Step`."""
    return t[:1] if alone else t[None]


def topological_order(last: Step) -> list[Step]:
    """All steps on which ``last`` depends, and itself, each after its inputs."""
    order: list[Step] = []
    seen: set[Step] = set()
    stack: list[tuple[Step, bool]] = [(last, False)]
    while stack:
        step, ready = stack.pop()
        if ready:
            order.append(step)
        elif step not in seen:
            seen.add(step)
            stack.append((step, True))
            stack.extend((source, False) for source in step.inputs)
    return order


def between(origin: Step, end: Step, order: Mapping[Step, int]) -> list[Step]:
    """The steps on paths from ``origin``, which is left out, to ``end``; each after its inputs."""
    found, pending = {end}, [end]
    while pending:
        for source in pending.pop().inputs:
            if source is not origin and source not in found:
                found.add(source)
                pending.append(source)
    return sorted(found, key=order.__getitem__)


def origin_of(step: Step, order: Mapping[Step, int]) -> Step:
    """The last step on every path from the model's input to ``step``; ``order`` as in :func:`topological_order`."""
    pending = set(step.inputs)
    while len(pending) > 1:
        latest = max(pending, key=lambda s: order[s])
        pending.remove(latest)
        pending.update(latest.inputs)
    return pending.pop()
