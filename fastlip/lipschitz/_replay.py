"""Comparison of the traced graph with the model, because a bound of the graph must be a bound of the model.

Each step is computed as its rule assumes and compared with the model, for one sample at a time; and what the model
makes of a sample in batches of several sizes must be what it makes of it alone. This proves nothing, but most models
that do something other than their traced graph are refused.
"""

import math
import operator
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastlip.lipschitz._calls import as_function
from fastlip.lipschitz._domain import Domain
from fastlip.lipschitz._graph import Traced
from fastlip.lipschitz._steps import Step
from fastlip.lipschitz._trace import module_name, run_model
from fastlip.norms._models.agreement import probe_inputs
from fastlip.norms._models.closeness import agree, rounding_of
from fastlip.norms._models.hooks import is_hooked
from fastlip.norms._models.inputs import Refused, random_inputs, runs_on
from fastlip.norms._models.outputs import tensor_in
from fastlip.norms._models.restore import MOST_COPIED, as_found, version_of

#: Largest difference of two ways to compute a step in float64, relative to its largest output: one of them may use
#: weights that the model computed in float32.
_ROUNDING = 1e-5
#: In the model's own dtype rounding grows over the steps between two modules, whose values are not known.
_GROWTH = 10.0
#: Largest relative difference between a model in float32 and in float64, where many terms may cancel.
_OTHER_DTYPE = 0.1
#: The same for the difference of two outputs, unless that is so small that rounding hides it.
_OTHER_SPREAD = 0.5
_HIDDEN = 1e-3
#: Models up to this size are also compared at inputs of other magnitudes.
SMALL = 1 << 22
#: Models up to this size are also run in batches of other sizes, and many times.
_TINY = 1 << 18
_SIZES = (4, 5, 6, 7, 8, 16, 64, *(2,) * 9)
MAGNITUDES = (30.0, 1e3, 1e-3)
#: Rounding error of the difference of two outputs, relative to an output, in float64 and in other dtypes.
_NOISE = 1e-9
_NOISE_NATIVE = 1e-3


def replay(model: nn.Module, input_shape: Sequence[int], traced: Traced, domain: Domain) -> None:
    """Compare the graph with the model, which must be in eval mode, on random inputs, alone and in batches.

    Sets ``moved`` and ``seen`` of each step, from two inputs of the domain.

    Raises:
        ValueError: they differ; the message names the first step that differs.
    """
    with torch.no_grad(), runs_on(model, input_shape):
        x = domain.sample(random_inputs(model, input_shape, 2 * traced.batch, seed=1), seed=1)
        try:
            with in_float64(model, x) as wide:
                result = _compare(model, wide, traced)
            with torch.enable_grad():
                native = run_model(model, x, after=x[traced.batch :])
            _require_one_function_in(x, native, result)
        except (Refused, torch.OutOfMemoryError):
            raise
        except Exception:  # the model may support one dtype only
            _compare(model, x, traced)


def _require_one_function_in(x: Tensor, native: Any, wide: Tensor) -> None:
    """Raise ValueError if a float32 model does something else in float64."""
    if x.dtype != torch.float32 or not isinstance(native, Tensor) or not torch.isfinite(native).all():
        return
    native = native.detach().double()
    alike = agree(native, wide, _OTHER_DTYPE)
    # A large offset would hide how the output depends on the input.
    apart, both = native[0] - native[1], wide[0] - wide[1]
    if alike and wide.numel() and both.abs().amax() > _HIDDEN * wide.abs().amax():
        alike = agree(apart, both, _OTHER_SPREAD)
    if not alike:
        raise Refused(
            "what the model does depends on the dtype or on what ran before: in float32, after other inputs, it "
            f"differs from float64 by {_share(native, wide)}"
        )


def _compare(model: nn.Module, x: Tensor, traced: Traced) -> Tensor:
    """Compare graph and model on x, two batches of the graph's size; returns the model's output for both together.

    Raises:
        ValueError: they differ.
    """
    for step in traced.steps.values():
        step.moved = step.seen = None
    # The model may depend on whether gradients are wanted.
    runs = [_recorded(model, part, traced, differentiable=i == 1) for i, part in enumerate(x.split(traced.batch))]
    replayed = _Replay(traced, runs)
    alone = replayed.follow()
    if traced.batch > 1:
        _require_samples_apart(model, x, traced)
    together = run_model(model, x)
    alike = [(together, alone)]
    size = size_of(model, traced)
    if size <= SMALL:
        alike.append((run_model(model, x, after=x.flip(0)), together))
        like = torch.cat([x, x])[: len(MAGNITUDES)]
        other = like * like.new_tensor(MAGNITUDES).view(-1, *(1,) * (x.dim() - 1))
        other = torch.cat([other, *[other[:1]] * (-len(other) % traced.batch)])
        alone = _Replay(traced, [_recorded(model, part, traced) for part in other.split(traced.batch)]).follow()
        alike.append((run_model(model, other, after=x), alone))
    if size <= _TINY:
        with as_found(model):  # in one block, as some models count their calls
            batches = (torch.cat([x[:1], x[1:2].expand(n - 1, *x.shape[1:])]) for n in _SIZES)
            alike += [(tensor_in(model(batch))[:1], together[:1]) for batch in batches]
    if not all(isinstance(seen, Tensor) and agree(seen, first, replayed.rounding) for seen, first in alike):
        raise Refused(
            f"what {type(model).__name__} makes of one input depends on the others in its batch, on what ran before or "
            "on whether gradients are wanted, which no Lipschitz rule covers"
        )
    return together


def _require_samples_apart(model: nn.Module, x: Tensor, traced: Traced) -> None:
    """Raise Refused if a step of a graph of several samples has in the first one's row what comes of another."""
    parts = (x[: traced.batch], torch.cat([x[:1], x[-traced.batch + 1 :]]))
    _Replay(traced, [_recorded(model, part, traced) for part in parts], apart=True).follow()


def size_of(model: nn.Module, traced: Traced) -> int:
    """Number of elements of a model's parameters, and of the outputs of its steps for one sample."""
    return sum(p.numel() for p in model.parameters()) + sum(math.prod(step.shape) for step in traced.steps.values())


@contextmanager
def in_float64(model: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """Convert the model's floating-point tensors to float64 within the block, in place; yields x in float64.

    A model too large to copy is left as it is, and x too.
    """
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


@dataclass(frozen=True)
class _Recorded:
    """One run of the model: its input, its output, and the outputs of the modules that its graph calls, in order."""

    input: Tensor
    result: Tensor
    outputs: dict[int, deque[Any]]


def _recorded(model: nn.Module, x: Tensor, traced: Traced, *, differentiable: bool = False) -> _Recorded:
    """A run of the model on x; with ``differentiable`` the gradient of x is wanted, on which the model may depend.

    Where it does not run with gradients, there is nothing that it does with them.
    """
    outputs: dict[int, deque[Any]] = defaultdict(deque)

    def record(module: nn.Module, args: Any, output: Any) -> None:
        # A later operation may overwrite it.
        outputs[id(module)].append(_clones(output))

    called = {str(node.target) for node in traced.graph_module.graph.find_nodes(op="call_module")}
    modules = {id(m): m for m in (traced.graph_module.get_submodule(target) for target in called)}
    handles = [module.register_forward_hook(record) for module in modules.values()]
    try:
        with torch.set_grad_enabled(differentiable):
            result = run_model(model, x.detach().requires_grad_(differentiable))
    except (Refused, torch.OutOfMemoryError):
        raise
    except Exception:  # some operations in place, for example
        if not differentiable:
            raise
        return _recorded(model, x, traced)
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(result, Tensor):
        raise Refused(f"{type(model).__name__} returns {type(result).__name__}, where its traced graph has a tensor")
    return _Recorded(x, result.detach(), outputs)


def _clones(output: Any) -> Any:
    """Copies of a tensor, or of those in a tuple; None for anything else."""
    if isinstance(output, (tuple, list)):
        return tuple(_clones(part) for part in output)
    return output.detach().clone() if isinstance(output, Tensor) else None


def _leave_out_constants(traced: Traced, runs: Sequence[_Recorded]) -> None:
    """Drop the recorded outputs of calls on constants, such as a first state of zeros.

    Such a call is a constant of the graph, of which nothing but its result is left. Of a module that ran more often
    than its graph calls it, as many outputs must be equal in all runs, whose inputs differ; else all are kept.
    """
    graph = traced.graph_module
    calls = [n for n in graph.graph.find_nodes(op="call_module") if n in traced.steps or n in traced.bundles]
    for module, count in Counter(id(graph.get_submodule(str(n.target))) for n in calls).items():
        queues = [run.outputs.get(module, deque()) for run in runs]
        more = len(queues[0]) - count
        if len(runs) < 2 or more <= 0 or any(len(queue) != len(queues[0]) for queue in queues):
            continue
        constant = [_all_equal(several) for several in zip(*queues, strict=True)]
        if constant.count(True) == more:
            for run, queue in zip(runs, queues, strict=True):
                run.outputs[module] = deque(out for out, alike in zip(queue, constant, strict=True) if not alike)


def _all_equal(outputs: Sequence[Any]) -> bool:
    """Whether the outputs of a call in several runs are one tensor's values, or one tuple's."""
    first, *others = outputs
    if isinstance(first, tuple):
        return all(isinstance(other, tuple) and len(other) == len(first) for other in others) and all(
            map(_all_equal, zip(first, *others, strict=True))
        )
    if not isinstance(first, Tensor):
        return all(other is first for other in others)
    return all(isinstance(other, Tensor) and torch.equal(first, other) for other in others)


class _Replay:
    """Computes each step as its rule assumes, and compares it with the recorded output of the model's module.

    Several runs are followed side by side. Where graph and model agree, the replay goes on with the model's value, so
    that rounding does not accumulate. With ``apart`` the first sample is the same in all runs, and must be so in every
    step.
    """

    def __init__(self, traced: Traced, runs: Sequence[_Recorded], *, apart: bool = False) -> None:
        dtype = runs[0].input.dtype
        self.rounding = _ROUNDING if dtype == torch.float64 else _GROWTH * rounding_of(runs[0].input)
        _leave_out_constants(traced, runs)
        self._traced = traced
        self._runs = runs
        self._dtype = dtype
        self._values: dict[fx.Node, list[Any]] = {}
        self._agreed = "the input"
        self._apart = apart
        self._tried: set[fx.Node] = set()

    def follow(self) -> Tensor:
        """Replay all runs and compare with the model's results, which are returned in one batch.

        Raises:
            ValueError: they differ.
        """
        graph = self._traced.graph_module.graph
        last = {source: node for node in graph.nodes for source in node.all_input_nodes}
        for node in graph.nodes:
            if node.op == "output":
                results = self._values[node.args[0]]
                break
            values = [self._value(node, i) for i in range(len(self._runs))]
            self._values[node] = values
            step = self._traced.steps.get(node)
            if step is not None and self._apart:
                if step.alone and not agree(values[0][:1], values[1][:1], self.rounding):
                    raise Refused(f"{step.name} ({step.kind}) mixes the batch axis into others, which no rule covers")
            elif step is not None:
                _set_moved(step, values)
            for source in node.all_input_nodes:
                if last[source] is node:
                    del self._values[source]
        for node in graph.find_nodes(op="call_module"):
            if any(run.outputs.get(id(self._module(node))) for run in self._runs):
                raise _otherwise(f"{self._name(node)} runs more often")
        for value, run in zip(results, self._runs, strict=True):
            if not agree(value, run.result, self.rounding):
                raise _otherwise(f"they agree up to {self._agreed}, and then differ by {_share(value, run.result)}")
        return torch.cat([run.result for run in self._runs])

    def _value(self, n: fx.Node, i: int) -> Any:
        """What a node gives in the i-th run."""
        if n.op == "placeholder":
            return self._runs[i].input.clone()
        if n.op == "get_attr":
            value = operator.attrgetter(str(n.target))(self._traced.graph_module)
            # Constants were computed in the model's own dtype.
            own = isinstance(value, Tensor) and value.is_floating_point() and self._dtype == torch.float64
            return value.double() if own else value
        given: Any = fx.node.map_arg((n.args, n.kwargs), lambda source: self._values[source][i])
        args, kwargs = given
        bundle = self._traced.bundles.get(n)
        if self._traced.takes_part(n):
            return args[0][args[1]]
        if bundle is not None:
            return self._bundle(n, bundle, args, kwargs, i)
        step = self._traced.steps.get(n)
        if step is None:
            return as_function(n.target)(*args, **kwargs)
        value = step.apply(*args, **kwargs)
        self._require_shape(step, value)
        if n.op != "call_module":
            return value
        seen = self._recorded_output(n, i)
        self._require_agreement(step, value, seen)
        module = self._module(n)
        if n not in self._tried and is_hooked(module) and not n.kwargs and len(n.args) == 1:
            self._tried.add(n)
            _try_hooked(module, step, args[0], self.rounding)
        return seen

    def _bundle(self, n: fx.Node, bundle: tuple[Step | None, ...], args: Any, kwargs: Any, i: int) -> tuple[Any, ...]:
        """The parts of a tuple, compared with the recorded ones if a module returns it."""
        value = tuple(None if step is None else step.apply(*args, **kwargs) for step in bundle)
        for step, part in zip(bundle, value, strict=True):
            if step is not None and part is not None:
                self._require_shape(step, part)
        if n.op != "call_module":
            return value
        seen = self._recorded_output(n, i)
        if not isinstance(seen, tuple) or len(seen) != len(value):
            raise _otherwise(f"{self._name(n)} does not return {len(value)} values")
        for step, part, other in zip(bundle, value, seen, strict=True):
            if step is not None and part is not None:
                self._require_agreement(step, part, other)
        return seen

    def _require_shape(self, step: Step, value: Tensor) -> None:
        expected = (self._traced.batch, *step.shape) if step.alone else step.shape
        if tuple(value.shape) != expected:
            raise _otherwise(f"{step.name} ({step.kind}) gives shape {list(value.shape)}, not {list(expected)}")

    def _recorded_output(self, n: fx.Node, i: int) -> Any:
        queue = self._runs[i].outputs.get(id(self._module(n)))
        if not queue:
            raise _otherwise(f"{self._name(n)} runs less often")
        return queue.popleft()

    def _require_agreement(self, step: Step, value: Tensor, seen: Any) -> None:
        if not isinstance(seen, Tensor):
            raise _otherwise(f"{step.name} returns no tensor")
        if not agree(value, seen, self.rounding):
            where = f"{step.name} ({step.kind})"
            differ = f"by {_share(value, seen)}" if value.shape == seen.shape else "in shape"
            raise _otherwise(f"they agree up to {self._agreed}, and differ {differ} at {where}")
        self._agreed = step.name

    def _module(self, n: fx.Node) -> nn.Module:
        return self._traced.graph_module.get_submodule(str(n.target))

    def _name(self, n: fx.Node) -> str:
        return module_name(n, self._traced.graph_module)


def _set_moved(step: Step, values: Sequence[Tensor]) -> None:
    """Set how far the outputs of the first two runs are apart at least, and between which numbers they lie."""
    if len(values) > 1 and step.moved is None:
        # If outputs are much larger than their difference, it may consist of rounding alone. Those elements
        # that are equal, such as what a mask hides, have none.
        difference = (values[0] - values[1]).double()
        apart, differ = torch.linalg.vector_norm(difference), difference != 0.0
        sizes = [torch.linalg.vector_norm(torch.where(differ, value, 0.0).double()) for value in values[:2]]
        rounding = noise_of(values[0]) * torch.linalg.vector_norm(torch.stack(sizes))
        step.moved = torch.stack([(apart - rounding).clamp_min(0.0), apart + rounding])
        if values[0].numel():
            ends = [torch.stack(torch.aminmax(value)).double() for value in values[:2]]
            step.seen = torch.stack([torch.minimum(*ends)[0], torch.maximum(*ends)[1]])


def _try_hooked(module: nn.Module, step: Step, x: Tensor, rounding: float) -> None:
    """Try a module with hooks on inputs that the model itself may never give it.

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
    """Wrap a module's hooks; the list is not empty once a hook returned a new tensor or wrote into its arguments."""
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


def noise_of(t: Tensor) -> float:
    """Rounding error of the difference of two outputs, relative to an output."""
    return _NOISE if t.dtype == torch.float64 else _NOISE_NATIVE
