"""Comparison of the traced graph with the model, because a bound of the graph must be a bound of the model.

Each step is computed as its rule assumes and compared with the model, for one sample at a time; and what the model
makes of a sample in batches of several sizes must be what it makes of it alone. This proves nothing, but most models
that do something other than their traced graph are refused.
"""

import math
import operator
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastlip.lipschitz._calls import as_function
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


def replay(model: nn.Module, input_shape: Sequence[int], traced: Traced) -> None:
    """Compare the graph with the model, which must be in eval mode, on random inputs, alone and in batches.

    Sets ``moved`` of each step.

    Raises:
        ValueError: they differ; the message names the first step that differs.
    """
    with torch.no_grad(), runs_on(model, input_shape):
        x = random_inputs(model, input_shape, 2 * traced.batch, seed=1)
        try:
            with in_float64(model, x) as wide:
                result = _compare(model, wide, traced)
            with torch.enable_grad():
                native = run_model(model, x, after=x.flip(0))
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
        step.moved = None
    replayed = _Replay(traced, x)
    # The model may depend on whether gradients are enabled.
    runs = [_recorded(model, part, traced, i == 1) for i, part in enumerate(x.split(traced.batch))]
    alone = replayed.follow(runs)
    together = run_model(model, x)
    alike = [(together, alone)]
    size = size_of(model, traced)
    if size <= SMALL:
        alike.append((run_model(model, x, after=x.flip(0)), together))
        like = torch.cat([x, x])[: len(MAGNITUDES)]
        other = like * like.new_tensor(MAGNITUDES).view(-1, *(1,) * (x.dim() - 1))
        other = torch.cat([other, *[other[:1]] * (-len(other) % traced.batch)])
        runs = [_recorded(model, part, traced, False) for part in other.split(traced.batch)]
        alone = _Replay(traced, x).follow(runs)
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
    outputs: dict[int, deque[Tensor | None]]


def _recorded(model: nn.Module, x: Tensor, traced: Traced, differentiable: bool) -> _Recorded:
    """A run of the model on x; with ``differentiable`` gradients are enabled."""
    outputs: dict[int, deque[Tensor | None]] = defaultdict(deque)

    def record(module: nn.Module, args: Any, output: Any) -> None:
        # A later operation may overwrite it.
        outputs[id(module)].append(output.detach().clone() if isinstance(output, Tensor) else None)

    called = {str(node.target) for node in traced.graph_module.graph.find_nodes(op="call_module")}
    modules = {id(m): m for m in (traced.graph_module.get_submodule(target) for target in called)}
    handles = [module.register_forward_hook(record) for module in modules.values()]
    try:
        with torch.set_grad_enabled(differentiable):
            result = run_model(model, x)
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(result, Tensor):
        raise Refused(f"{type(model).__name__} returns {type(result).__name__}, where its traced graph has a tensor")
    return _Recorded(x, result.detach(), outputs)


class _Replay:
    """Computes each step as its rule assumes, and compares it with the recorded output of the model's module.

    Several runs are followed in step. Where graph and model agree, the replay goes on with the model's value, so that
    rounding does not accumulate.
    """

    def __init__(self, traced: Traced, x: Tensor) -> None:
        self.rounding = _ROUNDING if x.dtype == torch.float64 else _GROWTH * rounding_of(x)
        self._traced = traced
        self._wide = x.dtype == torch.float64
        self._agreed = "the input"
        self._tried: set[fx.Node] = set()

    def follow(self, runs: Sequence[_Recorded]) -> Tensor:
        """Replay all runs and compare with the model's results, which are returned in one batch.

        Raises:
            ValueError: they differ.
        """
        graph = self._traced.graph_module.graph
        env: dict[fx.Node, list[Any]] = {}
        last = {source: node for node in graph.nodes for source in node.all_input_nodes}
        for node in graph.nodes:
            if node.op == "output":
                break
            env[node] = self._values(node, env, runs)
            for source in node.all_input_nodes:
                if last[source] is node and source is not self._result:
                    del env[source]
        for node in graph.find_nodes(op="call_module"):
            if any(run.outputs.get(id(self._module(node))) for run in runs):
                raise _otherwise(f"{module_name(node, self._traced.graph_module)} runs more often")
        for value, run in zip(env[self._result], runs, strict=True):
            if not agree(value, run.result, self.rounding):
                raise _otherwise(f"they agree up to {self._agreed}, and then differ by {_share(value, run.result)}")
        return torch.cat([run.result for run in runs])

    @property
    def _result(self) -> fx.Node:
        (output,) = self._traced.graph_module.graph.find_nodes(op="output")
        return output.args[0]  # type: ignore[return-value]

    def _module(self, node: fx.Node) -> nn.Module:
        return self._traced.graph_module.get_submodule(str(node.target))

    def _values(self, node: fx.Node, env: dict[fx.Node, list[Any]], runs: Sequence[_Recorded]) -> list[Any]:
        """What a node gives in each run."""
        if node.op == "placeholder":
            values = [run.input.clone() for run in runs]
        elif node.op == "get_attr":
            constant = operator.attrgetter(str(node.target))(self._traced.graph_module)
            if self._wide and isinstance(constant, Tensor) and constant.is_floating_point():
                constant = constant.double()
            return [constant] * len(runs)
        else:
            step = self._traced.steps.get(node)
            function = as_function(node.target) if step is None else step.apply
            values = []
            for i in range(len(runs)):
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n, i=i: env[n][i])
                values.append(function(*args, **kwargs))
        step = self._traced.steps.get(node)
        if step is None:
            return values
        for i, run in enumerate(runs):
            if tuple(values[i].shape) != self._traced.values.shapes[node]:
                raise _otherwise(
                    f"{step.name} ({step.kind}) gives shape {list(values[i].shape)} in place of "
                    f"{list(self._traced.values.shapes[node])}"
                )
            if node.op == "call_module":
                values[i] = self._compared(node, step, values[i], run, env)
        if len(runs) > 1 and step.moved is None:
            # If outputs are much larger than their difference, it may consist of rounding alone.
            apart = torch.linalg.vector_norm((values[0] - values[1]).double())
            size = torch.hypot(*(torch.linalg.vector_norm(value) for value in values[:2]))
            step.moved = (apart - noise_of(values[0]) * size).clamp_min(0.0)
        return values

    def _compared(self, n: fx.Node, step: Step, value: Tensor, run: _Recorded, env: dict[fx.Node, list[Any]]) -> Tensor:
        """The recorded output of the model's module, if it agrees with ``value``; otherwise raises ValueError."""
        module = self._module(n)
        queue = run.outputs.get(id(module))
        if not queue:
            raise _otherwise(f"{step.name} runs less often")
        seen = queue.popleft()
        if seen is None:
            raise _otherwise(f"{step.name} returns no tensor")
        if not agree(value, seen, self.rounding):
            where = f"{step.name} ({step.kind})"
            differ = f"by {_share(value, seen)}" if value.shape == seen.shape else "in shape"
            raise _otherwise(f"they agree up to {self._agreed}, and differ {differ} at {where}")
        if n not in self._tried and is_hooked(module) and not n.kwargs and len(n.args) == 1:
            self._tried.add(n)
            _try_hooked(module, step, env[n.all_input_nodes[0]][0], self.rounding)
        self._agreed = step.name
        return seen


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
