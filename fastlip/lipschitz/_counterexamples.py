"""Search for counter-examples to a bound: pairs of inputs that the model moves further apart than the bound allows.

Finding none proves nothing, but a bound that a wrong rule made too small is often refuted.
"""

import math
from collections.abc import Sequence, Set
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from fastlip.lipschitz._domain import Domain
from fastlip.lipschitz._graph import Traced
from fastlip.lipschitz._intervals import as_rows
from fastlip.lipschitz._local import unit
from fastlip.lipschitz._replay import MAGNITUDES, SMALL, in_float64, noise_of, size_of
from fastlip.lipschitz._steps import Step
from fastlip.lipschitz._trace import run_model
from fastlip.norms._models.inputs import Refused, random_inputs, runs_on
from fastlip.norms._models.restore import as_found

#: Effort of the search by the size of a model's weights and outputs: number of points, and rounds of power iteration.
_EFFORT = ((1 << 18, 8, 8), (1 << 22, 4, 3), (math.inf, 1, 1))
#: log10 of a stretch over the bound below which the search ends.
_FAR_BELOW = -3.0
#: Methods that may round what is in float64, so that small steps show their rounding.
_CONVERSIONS = ("to", "float", "half", "bfloat16", "type", "type_as")
#: Error of log10 of a stretch by rounding, in float64 and in other dtypes.
_SLACK = 1e-6
_SLACK_NATIVE = 1e-2


def require_bounded(steps: Sequence[Step], totals: dict[Step, float], ends: Set[Step] = frozenset()) -> None:
    """Check that no step, and no sequence of steps from the input, moves two samples of the replay apart too far.

    The constant from the input to one of ``ends`` is not that of the step before times its own.

    Raises:
        ValueError: at some step they are further apart than the bound allows; the message names it.
    """
    compared = [step for step in steps if step.moved is not None and not step.ahead]
    if not compared or steps[0].moved is None:
        return
    moved = torch.stack([step.moved.cpu() for step in compared if step.moved is not None]).tolist()
    distance = dict(zip(compared, moved, strict=True))
    for step in compared:
        for source in {steps[0], *step.inputs[:1]}:
            own = len(step.inputs) == 1 and step not in ends
            if source not in distance or not (own or source is steps[0]):
                continue
            allowed, (_, before), (after, _) = totals[step] - totals[source], distance[source], distance[step]
            if _exceeds(after, before, allowed, _SLACK_NATIVE):
                raise _refuted(
                    f"from {source.name} to {step.name} ({step.kind}) two inputs {before:.4g} apart come out "
                    f"{after:.4g} apart, where the bound allows 10^{allowed:.4f} times as much"
                )


def _exceeds(moved: float, distance: float, log10_bound: float, slack: float) -> bool:
    """Whether the stretch ``moved / distance`` exceeds the bound by more than rounding."""
    if not (math.isfinite(moved) and distance > 0.0 and moved > 0.0) or math.isinf(distance):
        return False
    return math.log10(moved) - math.log10(distance) > log10_bound + slack


def refute(model: nn.Module, input_shape: Sequence[int], traced: Traced, domain: Domain, log10_upper: float) -> None:
    """Search a domain for two inputs that the model, in eval mode, moves further apart than the bound allows.

    The search takes random directions, and those of a power iteration on the Jacobian, at several points, in small and
    large steps.

    Raises:
        ValueError: there are such inputs.
    """
    size = size_of(model, traced)
    points, rounds = next((points, rounds) for most, points, rounds in _EFFORT if size <= most)
    x = random_inputs(model, input_shape, points, seed=2)
    for index, magnitude in enumerate(MAGNITUDES[: points - 1], start=1):
        x[-index] *= magnitude
    x = domain.sample(x, seed=5)
    with runs_on(model, input_shape):
        found = None
        try:
            narrow = size > SMALL or any(step.kind in _CONVERSIONS for step in traced.steps.values())
            with nullcontext(x) if narrow else in_float64(model, x) as chosen:
                found = _search(model, chosen, domain, rounds, log10_upper)
        except torch.OutOfMemoryError:
            raise
        except Exception:
            found = _search(model, x, domain, rounds, log10_upper)
    if found is not None:
        moved, distance = found
        raise _refuted(
            f"two inputs {distance:.4g} apart come out {moved:.4g} apart, where the bound allows 10^{log10_upper:.4f} "
            "times as much"
        )


def _search(model: nn.Module, x: Tensor, domain: Domain, rounds: int, log10_upper: float) -> tuple[float, float] | None:
    """Distances of the outputs and of the inputs of a pair that refutes the bound; None if none is found."""
    with torch.no_grad():
        here = run_model(model, x).detach()
    # A model may write what is in float64 into float32.
    native, noise = {x.dtype, here.dtype} != {torch.float64}, max(noise_of(x), noise_of(here))
    slack = _SLACK_NATIVE if native else _SLACK
    generator = torch.Generator().manual_seed(3)
    v = unit(torch.randn(x.shape, generator=generator, dtype=torch.float64)).to(x)
    length = torch.linalg.vector_norm(as_rows(x), dim=1).clamp_min(1.0).view(-1, *(1,) * (x.dim() - 1))
    steps = (1e-2,) if native else (1e-6,)
    best = -math.inf
    for round_ in range(rounds + 1):
        # In the first and the last round also far enough to cross kinks and thresholds.
        sizes = (*steps, 1e-1, 10.0) if round_ == rounds or (round_ == 0 and len(x) > 1) else steps
        for size in sizes:
            there = domain.project((x + size * length * v).detach())
            with torch.no_grad():
                moved = as_rows(run_model(model, there).detach() - here).double()
            apart = torch.linalg.vector_norm(as_rows(there - x).double(), dim=1)
            rounded = noise * torch.linalg.vector_norm(as_rows(here).double(), dim=1)
            ends = torch.linalg.vector_norm(moved, dim=1)
            for end, start, lost in torch.stack([ends, apart, rounded], 1).tolist():
                if _exceeds(end - lost, start, log10_upper, slack):
                    return end, start
                if math.isfinite(end) and end > 0.0 and start > 0.0:
                    best = max(best, math.log10(end / start))
            if size == steps[0]:
                direction = moved.reshape(here.shape).to(here)
        if round_ == rounds or best < log10_upper + _FAR_BELOW:
            return None
        back = _pulled_back(model, x, direction)
        if back is None:
            return None
        v = unit(back.double()).to(x)
    return None


def _pulled_back(model: nn.Module, x: Tensor, direction: Tensor) -> Tensor | None:
    """The adjoint of the Jacobian at x, applied to a direction; None if the model cannot be differentiated."""
    try:
        with as_found(model), torch.enable_grad():
            for module in model.modules():  # hooks on gradients do not change the function
                vars(module).update(_backward_hooks={}, _backward_pre_hooks={})
            point = x.detach().clone().requires_grad_()
            (back,) = torch.autograd.grad(run_model(model, point), point, direction, allow_unused=True)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a custom backward pass may raise anything
        return None
    return back if back is not None and bool(torch.isfinite(back).all()) else None


def _refuted(how: str) -> Refused:
    return Refused(
        f"the bound does not hold: {how}. If the model has a rule of its own, that is wrong; otherwise please report "
        "this model to fastlip's developers"
    )
