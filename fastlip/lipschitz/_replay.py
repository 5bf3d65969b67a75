"""The traced graph beside the model: what is bounded must be what runs.

The steps are carried out as their rules take them to be and compared with the model, and what two samples do is held
against the bound. Neither proves a bound; both turn silence about a mistake into a refusal.
"""

import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastlip.lipschitz._graph import BATCH, Step, Traced
from fastlip.lipschitz._local import unit
from fastlip.lipschitz._trace import location, module_name
from fastlip.norms._models.agreement import probe_inputs
from fastlip.norms._models.closeness import agree, rounding_of
from fastlip.norms._models.hooks import is_hooked
from fastlip.norms._models.inputs import Refused, random_inputs, runs_on
from fastlip.norms._models.restore import MOST_COPIED, as_found, version_of

#: Largest difference of two ways to compute a step in float64, relative to its largest output: weights that a model
#: computes by itself are float32's in one of them.
_ROUNDING = 1e-5
#: In the model's own dtype rounding grows from step to step, where nothing in between is known of the model.
_GROWTH = 10.0
#: Difference between a model in float32 and in float64, where terms may cancel all along.
_OTHER_DTYPE = 0.1
#: The same of the difference of two outputs, unless rounding hides it.
_OTHER_SPREAD = 0.5
_HIDDEN = 1e-3
#: What a search may cost, by the size of a model's weights and outputs: points, and rounds of power iteration.
_EFFORT = ((1 << 18, 8, 8), (1 << 22, 4, 3), (math.inf, 1, 1))
#: Models up to this size are compared at inputs of other magnitudes as well.
_SMALL = 1 << 22
#: Models up to this size are run in batches of more sizes, and a number of times.
_TINY = 1 << 18
_SIZES = (4, 5, 6, 7, 8, 16, 64, *(2,) * 9)
_MAGNITUDES = (30.0, 1e3, 1e-3)
#: A search ends when even its best stretch is this far below the bound.
_FAR_BELOW = -3.0
#: Share of an output that rounding may put into a difference, in float64 and in what models come in.
_NOISE = 1e-9
_NOISE_NATIVE = 1e-3
#: log10 of what rounding may add to a stretch.
_SLACK = 1e-6
_SLACK_NATIVE = 1e-2


def replay(model: nn.Module, input_shape: Sequence[int], traced: Traced) -> None:
    """Compare the graph with the model, which is in eval mode, on random inputs in batches of two sizes.

    Sets how far two samples are apart at each step.

    Raises:
        ValueError: they differ; the message names the first step that does.
    """
    with torch.no_grad(), runs_on(model, input_shape):
        x = random_inputs(model, input_shape, BATCH, seed=1)
        try:
            with _in_float64(model, x) as wide:
                result = _compare(model, wide, traced)
            with torch.enable_grad():
                native = _run(model, x, after=x.flip(0))
            _require_one_function_in(x, native, result)
        except (Refused, torch.OutOfMemoryError):
            raise
        except Exception:  # something in it takes one dtype only
            _compare(model, x, traced)


def _require_one_function_in(x: Tensor, native: Any, wide: Tensor) -> None:
    """Raise ValueError if a float32 model does something else than it does in float64."""
    if x.dtype != torch.float32 or not isinstance(native, Tensor) or not torch.isfinite(native).all():
        return
    native = native.detach().double()
    alike = agree(native, wide, _OTHER_DTYPE)
    # A large offset hides what becomes of the input.
    apart, both = native[0] - native[1], wide[0] - wide[1]
    if alike and wide.numel() and both.abs().amax() > _HIDDEN * wide.abs().amax():
        alike = agree(apart, both, _OTHER_SPREAD)
    if not alike:
        raise Refused(
            "what the model does depends on the dtype or on what ran before: in float32, after other inputs, it "
            f"differs from float64 by {_share(native, wide)}"
        )


def _compare(model: nn.Module, x: Tensor, traced: Traced) -> Tensor:
    """Compare graph and model on x and on parts of it; returns the model's output.

    Raises:
        ValueError: they differ.
    """
    for step in traced.steps.values():
        step.moved = None
    together, outputs = _recorded(model, x, traced)
    _Replay(traced, outputs).follow(x, together)
    other = x[:1]
    try:
        result, outputs = _recorded(model, other, traced, differentiable=True)
    except (IndexError, RuntimeError, ValueError):
        result = together[0]
    if result.shape != (1, *together.shape[1:]):
        # Some models lose the batch axis of a single sample; that is not what a bound of theirs speaks of.
        other = torch.cat([x[:1], x[1:].flip(-1), x[1:]])
        result, outputs = _recorded(model, other, traced, differentiable=True)
    replayed = _Replay(traced, outputs)
    replayed.follow(other, result)
    size = size_of(model, traced)
    alike = [(result[:1], together[:1])]
    if size <= _SMALL:
        alike.append((_run(model, x, after=x.flip(0)), together))
        like = torch.cat([x, x])[: len(_MAGNITUDES)]
        other = like * like.new_tensor(_MAGNITUDES).view(-1, *(1,) * (x.dim() - 1))
        result, outputs = _recorded(model, other, traced)
        _Replay(traced, outputs).follow(other, result)
        alike.append((_run(model, other, after=x), result))
    if size <= _TINY:
        with as_found(model):  # one after the other: some count their calls
            batches = (torch.cat([x[:1], x[1:].expand(n - 1, *x.shape[1:])]) for n in _SIZES)
            alike += [(model(batch)[:1], together[:1]) for batch in batches]
    if not all(agree(seen, first, replayed.rounding) for seen, first in alike):
        raise Refused(
            f"what {type(model).__name__} makes of one input depends on the others in its batch, on what ran before or "
            "on whether gradients are wanted, which no Lipschitz rule covers"
        )
    return together


def size_of(model: nn.Module, traced: Traced) -> int:
    """Numbers in a model's parameters and in the outputs of its steps, of one sample."""
    return sum(p.numel() for p in model.parameters()) + sum(math.prod(step.shape) for step in traced.steps.values())


@contextmanager
def _in_float64(model: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """The model's floating-point tensors in float64 for a while, in place, and x so."""
    held: dict[int, Tensor] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        held |= {id(v): v for v in vars(module).values() if isinstance(v, Tensor)}
    narrow = [t for t in held.values() if t.is_floating_point() and t.dtype != torch.float64]
    if sum(t.numel() for t in narrow) > MOST_COPIED:
        yield x
        return
    kept = [(t, t.data) for t in narrow]
    try:
        for tensor, data in kept:
            tensor.data = data.double()
        yield x.double()
    finally:
        for tensor, data in kept:
            tensor.data = data


def _run(model: nn.Module, x: Tensor, after: Tensor | None = None) -> Any:
    """What the model, as it was found, or after a run on other inputs, makes of a copy of x."""
    with as_found(model):
        if after is not None:
            model(after.clone())
        return model(x.clone())


def _recorded(
    model: nn.Module, x: Tensor, traced: Traced, *, differentiable: bool = False
) -> tuple[Tensor, dict[int, deque[Tensor | None]]]:
    """The model's output, and those of the modules that its graph calls, in order.

    ``differentiable`` runs it as for a gradient, which a model can tell.
    """
    outputs: dict[int, deque[Tensor | None]] = defaultdict(deque)

    def record(module: nn.Module, args: Any, output: Any) -> None:
        # What follows may overwrite it.
        outputs[id(module)].append(output.detach().clone() if isinstance(output, Tensor) else None)

    called = {str(node.target) for node in traced.graph_module.graph.find_nodes(op="call_module")}
    modules = {id(m): m for m in (traced.graph_module.get_submodule(target) for target in called)}
    handles = [module.register_forward_hook(record) for module in modules.values()]
    try:
        with torch.set_grad_enabled(differentiable):
            result = _run(model, x)
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(result, Tensor):
        raise Refused(f"{type(model).__name__} returns {type(result).__name__}, where its traced graph has a tensor")
    return result.detach(), outputs


class _Replay(fx.Interpreter):
    """Carries out each step as its rule takes it to be, beside what the modules of the model put out.

    Where the two agree the model's own value goes on, so that rounding does not add up.
    """

    def __init__(self, traced: Traced, outputs: dict[int, deque[Tensor | None]]) -> None:
        super().__init__(traced.graph_module)
        self.extra_traceback = False
        self.rounding = _ROUNDING
        self._traced = traced
        self._outputs = outputs
        self._batch = 0
        self._agreed = "the input"
        self._tried: set[fx.Node] = set()

    def follow(self, x: Tensor, result: Tensor) -> None:
        """Replay on x and compare with the model's result.

        Raises:
            ValueError: they differ.
        """
        self._batch = len(x)
        if x.dtype != torch.float64:
            self.rounding = _GROWTH * rounding_of(x)
        value = self.run(x.clone())
        for node in self._traced.graph_module.graph.find_nodes(op="call_module"):
            if self._outputs.get(id(self.fetch_attr(str(node.target)))):
                raise _otherwise(f"{self._name(node)} runs more often")
        if not agree(value, result, self.rounding):
            raise _otherwise(f"they agree up to {self._agreed}, and then differ by {_share(value, result)}")

    def run_node(self, n: fx.Node) -> Any:
        step = self._traced.steps.get(n)
        if step is None:
            value = super().run_node(n)
            self._require_constant(n, value)
            return value
        if n.op == "placeholder":
            value = super().run_node(n)
        else:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            value = step.apply(*args, **kwargs)
        if tuple(value.shape) != (self._batch, *step.shape):
            raise Refused(
                f"{step.name} ({step.kind}) gives shape {list(value.shape)} for {self._batch} samples where one has "
                f"{list(step.shape)}: it mixes the batch axis into others, which no Lipschitz rule covers"
            )
        if n.op == "call_module":
            value = self._compared(n, step, value)
        if self._batch == BATCH and step.moved is None:
            # Outputs much larger than their difference round it away, and may seem to move by what is rounding alone.
            apart, size = torch.linalg.vector_norm((value[0] - value[1]).double()), torch.linalg.vector_norm(value)
            step.moved = (apart - noise_of(value) * size).clamp_min(0.0)
        return value

    def _compared(self, n: fx.Node, step: Step, value: Tensor) -> Tensor:
        """The output of the model's own module where it agrees with the step's."""
        queue = self._outputs.get(id(self.fetch_attr(str(n.target))))
        if not queue:
            raise _otherwise(f"{step.name} runs less often")
        seen = queue.popleft()
        if seen is None:
            raise _otherwise(f"{step.name} returns no tensor")
        if not agree(value, seen, self.rounding):
            where = f"{step.name} ({step.kind})"
            differ = f"by {_share(value, seen)}" if value.shape == seen.shape else "in shape"
            raise _otherwise(f"they agree up to {self._agreed}, and differ {differ} at {where}")
        module = self.fetch_attr(str(n.target))
        if n not in self._tried and is_hooked(module) and not n.kwargs and len(n.args) == 1:
            self._tried.add(n)
            _try_hooked(module, step, self.env[n.all_input_nodes[0]], self.rounding)
        self._agreed = step.name
        return seen

    def _require_constant(self, n: fx.Node, value: Any) -> None:
        """Raise ValueError if what should not depend on the input's numbers does."""
        if self._batch != BATCH or n not in self._traced.varying or n.op == "output":
            return
        if not _equal(value, self._traced.constants.get(n)):
            raise Refused(
                f"{location(n)} depends on the numbers in the input and is no tensor of the batch, which no Lipschitz "
                "rule covers"
            )

    def _name(self, n: fx.Node) -> str:
        return module_name(n, self._traced.graph_module)


def _try_hooked(module: nn.Module, step: Step, x: Tensor, rounding: float) -> None:
    """Try a module with hooks on inputs that the model may never give it, where they might show.

    Raises:
        Refused: one of its hooks changes something.
    """
    where = f"{step.name} ({step.kind})"
    with as_found(module):
        changed = [_watch(hooks) for hooks in (module._forward_pre_hooks, module._forward_hooks)]
        for inputs in probe_inputs(x):
            said, seen = step.apply(inputs), module(inputs.clone())
            if not isinstance(seen, Tensor) or not agree(said, seen, rounding):
                raise _otherwise(f"hooks on {where} change what it does to other inputs")
    if any(changed):
        raise _otherwise(f"a hook on {where} returns other values than it was given, or writes into them")


def _watch(hooks: dict[int, Callable[..., Any]]) -> list[bool]:
    """Have a module's hooks note whether they return something of their own, or write into what they are given."""
    changed: list[bool] = []

    def watched(hook: Callable[..., Any]) -> Callable[..., Any]:
        def run(module: nn.Module, *given: Any) -> Any:
            tensors = _tensors(given)
            before = [(t.data_ptr(), version_of(t)) for t in tensors]
            result = hook(module, *given)
            after = [(t.data_ptr(), version_of(t)) for t in tensors]
            own = {t.data_ptr() for t in _tensors(result)} - {address for address, _ in before}
            if own or before != after:
                changed.append(True)
            return result

        return run

    for key, hook in list(hooks.items()):
        hooks[key] = watched(hook)
    return changed


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = tuple(value.values())
    return [t for inner in value for t in _tensors(inner)] if isinstance(value, (tuple, list)) else []


def _equal(now: Any, then: Any) -> bool:
    if isinstance(now, Tensor) and isinstance(then, Tensor):
        return now.shape == then.shape and bool(torch.isclose(now.double(), then.double(), 1e-5, equal_nan=True).all())
    if isinstance(now, (bool, int, float)) and isinstance(then, (bool, int, float)):
        return now == then or math.isclose(now, then, rel_tol=1e-5) or (math.isnan(now) and math.isnan(then))
    if isinstance(now, (tuple, list)) and isinstance(then, (tuple, list)):
        return len(now) == len(then) and all(map(_equal, now, then))
    return True  # dtypes, devices and the like


def _share(said: Tensor, seen: Tensor) -> str:
    if said.shape != seen.shape:
        return f"shape, {list(said.shape)} and {list(seen.shape)}"
    gap = (said.double() - seen.double()).abs().amax() / seen.double().abs().amax()
    return f"{gap.item():.2g} of the largest output"


def _otherwise(how: str) -> Refused:
    return Refused(
        f"the model does something else than its traced graph: {how}. A hook, a tensor changed in place under another "
        "name, a branch that tracing takes otherwise, or a layer that forward changes and puts back can do that; "
        "without it there is a bound"
    )


def require_bounded(steps: Sequence[Step], totals: dict[Step, float]) -> None:
    """See that two samples of the replay are nowhere further apart than the bound allows, nor taken apart by any step.

    Raises:
        ValueError: they are, at the step that the message names.
    """
    compared = [step for step in steps if step.moved is not None and not step.ahead]
    if not compared or steps[0].moved is None:
        return
    moved = torch.stack([step.moved.cpu() for step in compared if step.moved is not None]).tolist()
    distance = dict(zip(compared, moved, strict=True))
    for step in compared:
        for source in {steps[0], *step.inputs[:1]}:
            if source not in distance or (len(step.inputs) != 1 and source is not steps[0]):
                continue
            allowed = totals[step] - totals[source]
            if _exceeds(distance[step], distance[source], allowed, _SLACK_NATIVE):
                raise _refuted(
                    f"from {source.name} to {step.name} ({step.kind}) two inputs {distance[source]:.4g} apart come out "
                    f"{distance[step]:.4g} apart, where the bound allows 10^{allowed:.4f} times as much"
                )


def _exceeds(moved: float, distance: float, log10_bound: float, slack: float) -> bool:
    """Whether a stretch is above a bound by more than rounding."""
    if not (math.isfinite(moved) and distance > 0.0 and moved > 0.0) or math.isinf(distance):
        return False
    return math.log10(moved) - math.log10(distance) > log10_bound + slack


def refute(model: nn.Module, input_shape: Sequence[int], traced: Traced, log10_upper: float) -> None:
    """Search for two inputs that the model, which is in eval mode, takes further apart than the bound allows.

    Random directions and those of a power iteration on the Jacobian, at several points, small steps and large ones.

    Raises:
        ValueError: there are such inputs.
    """
    size = size_of(model, traced)
    points, rounds = next((points, rounds) for most, points, rounds in _EFFORT if size <= most)
    x = random_inputs(model, input_shape, points, seed=2)
    for index, magnitude in enumerate(_MAGNITUDES[: points - 1], start=1):
        x[-index] *= magnitude
    with runs_on(model, input_shape):
        found = None
        try:
            with _in_float64(model, x) if size <= _SMALL else nullcontext(x) as chosen:
                found = _climb(model, chosen, rounds, log10_upper)
        except torch.OutOfMemoryError:
            raise
        except Exception:
            found = _climb(model, x, rounds, log10_upper)
    if found is not None:
        moved, distance = found
        raise _refuted(
            f"two inputs {distance:.4g} apart come out {moved:.4g} apart, where the bound allows 10^{log10_upper:.4f} "
            "times as much"
        )


def _climb(model: nn.Module, x: Tensor, rounds: int, log10_upper: float) -> tuple[float, float] | None:
    """How far apart, at the end and at the start, a pair of inputs is that refutes the bound; None if none is found."""
    native, noise = x.dtype != torch.float64, noise_of(x)
    slack = _SLACK_NATIVE if native else _SLACK
    generator = torch.Generator().manual_seed(3)
    v = unit(torch.randn(x.shape, generator=generator, dtype=torch.float64)).to(x)
    length = torch.linalg.vector_norm(x.flatten(1), dim=1).clamp_min(1.0).view(-1, *(1,) * (x.dim() - 1))
    steps = (1e-2,) if native else (1e-6,)
    best = -math.inf
    with torch.no_grad():
        here = _run(model, x).detach()
    for round_ in range(rounds + 1):
        # Far enough to cross kinks and thresholds along a random direction, and along what was climbed.
        sizes = (*steps, 1e-1, 10.0) if round_ == rounds or (round_ == 0 and len(x) > 1) else steps
        for size in sizes:
            there = (x + size * length * v).detach()
            with torch.no_grad():
                moved = (_run(model, there).detach() - here).flatten(1).double()
            apart = torch.linalg.vector_norm((there - x).flatten(1).double(), dim=1)
            rounded = noise * torch.linalg.vector_norm(here.flatten(1).double(), dim=1)
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


def noise_of(t: Tensor) -> float:
    """Share of an output that rounding may put into the difference of two."""
    return _NOISE if t.dtype == torch.float64 else _NOISE_NATIVE


def _pulled_back(model: nn.Module, x: Tensor, direction: Tensor) -> Tensor | None:
    """The adjoint of the Jacobian at x, applied to a direction; None where the model cannot be differentiated."""
    try:
        with as_found(model), torch.enable_grad():
            for module in model.modules():  # their hooks on gradients are none of ours
                vars(module).update(_backward_hooks={}, _backward_pre_hooks={})
            point = x.detach().clone().requires_grad_()
            (back,) = torch.autograd.grad(_run(model, point), point, direction, allow_unused=True)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever a backward pass of someone's own may raise
        return None
    return back if back is not None and bool(torch.isfinite(back).all()) else None


def _refuted(how: str) -> Refused:
    return Refused(
        f"the bound does not hold: {how}. If the model has a rule of its own, that is wrong; otherwise please report "
        "this model to fastlip's developers"
    )
