"""Models as they are found: looked at in eval mode, run on inputs of one shape, and left exactly as they were."""

import random
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

#: Containers a forward pass may write into; beyond this many items their insides are not followed.
_CONTAINERS = (list, dict, set, deque)
_MOST_ITEMS = 10_000
#: Numbers in parameters of which a copy is taken, and which may be widened to float64.
MOST_COPIED = 1 << 27
#: What every module has and forwards leave alone, hooks above all; put back at the end of all runs, and not of each.
_RARELY_CHANGED = frozenset(vars(nn.Module())) - {"_parameters", "_buffers"}


class Refused(ValueError):
    """What a model does is not what would be bounded; raised from within its runs."""


def checked_shape(input_shape: Sequence[int]) -> tuple[int, ...]:
    """The shape as a tuple.

    Raises:
        ValueError: ``input_shape`` is not a sequence of positive integers.
    """
    shape = tuple(input_shape) if isinstance(input_shape, Iterable) else ()
    if not shape or any(isinstance(n, bool) or not hasattr(n, "__index__") or n < 1 for n in shape):
        raise ValueError(f"input_shape must be positive integers without the batch axis, got {input_shape!r}")
    return tuple(int(n) for n in shape)


def bare_model(model: nn.Module) -> nn.Module:
    """What a data-parallel wrapper or ``torch.compile`` holds, or the model itself.

    Raises:
        TypeError: it is no module.
        ValueError: part of it is TorchScript, or a wrapper has hooks of its own on the forward pass.
    """
    _check_module(model)
    inner = model.module if isinstance(model, (nn.DataParallel, DistributedDataParallel)) else model
    inner = getattr(inner, "_orig_mod", inner)
    if inner is not model:
        if has_hooks(model):
            raise ValueError(
                f"{type(model).__name__} has hooks on its forward pass, which what it wraps lacks; register them on "
                "the model inside"
            )
        return bare_model(inner)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(f"{name} has no shape yet: run a lazy model once on an input before")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            where = f" (at {name})" if name else ""
            raise ValueError(f"model holds TorchScript{where}, which cannot be looked into; give what it was made of")
    return model


def has_hooks(module: nn.Module) -> bool:
    """Whether the module has hooks of its own on its forward pass."""
    return bool(vars(module).get("_forward_hooks") or vars(module).get("_forward_pre_hooks"))


def is_hooked(module: nn.Module) -> bool:
    """Whether hooks of the module or of all modules see it run."""
    everywhere = torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks
    return bool(everywhere) or has_hooks(module)


def is_dressed(module: nn.Module) -> bool:
    """Whether calling a module may do more than its ``forward``: by hooks, or a ``__call__`` of its own."""
    return is_hooked(module) or type(module).__call__ is not nn.Module.__call__


def require_eval(model: nn.Module, training: bool, used: Iterable[nn.Module]) -> None:
    """See that the layers ``used`` that depend on the mode are in eval mode as the model is, or will be.

    Args:
        model: the model.
        training: whether it was found in training mode.
        used: layers that it uses.

    Raises:
        ValueError: one is in training mode although the model is not, and so stays there in :func:`eval_mode`; or the
            model is in training mode, and above such a module there is a ``train`` of its own, which alone knows what
            eval mode would be.
    """
    dependent = {m for m in used if isinstance(m, _BatchNorm) or (isinstance(m, _DropoutNd) and m.p > 0.0)}
    for name, module in model.named_modules() if dependent else ():
        if not training and module.training and module in dependent:
            raise ValueError(
                f"module {name or type(module).__name__} ({type(module).__name__}) is in training mode though the "
                "model is in eval mode, so that what it does depends on the batch or on chance; call model.eval() first"
            )
        own = type(module).train is not nn.Module.train or type(module).eval is not nn.Module.eval
        if training and own and any(m in dependent for m in module.modules()):
            raise ValueError(
                f"{type(module).__name__}{f' (at {name})' if name else ''} has a train() or eval() of its own, which "
                "decides over layers that depend on the mode; call model.eval() first"
            )


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, outside of inference mode, autocast and compiled code, to be run and traced.

    Modes are set as flags, since ``train()`` and ``eval()`` may do something (LoRA layers merge their weights); in a
    model that is in eval mode itself every module keeps the mode it has. Afterwards the model is as it was found, see
    :func:`as_found`, and so is the random state.

    Raises:
        TypeError: it is no module.
        ValueError: the model wrote into its own parameters, and they are too large for a copy.
    """
    _check_module(model)
    devices = {t.device.index or 0 for t in model.parameters() if t.device.type == "cuda"}
    with ExitStack() as stack:
        stack.enter_context(as_found(model, parameters=True))
        stack.enter_context(_random_state())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.random.fork_rng(devices))
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if model.training:
            for module in model.modules():
                vars(module)["training"] = False  # whatever assigning may do
        for module in model.modules():
            vars(module)["_compiled_call_impl"] = None
        yield


@contextmanager
def _random_state() -> Iterator[None]:
    """Python's and NumPy's random numbers as they were; torch has its own way."""
    kept = random.getstate(), np.random.get_state()  # noqa: NPY002, a forward may draw from it
    try:
        yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])  # noqa: NPY002


@contextmanager
def as_found(model: nn.Module, *, parameters: bool = False) -> Iterator[None]:
    """Undo afterwards what runs of a model change on its modules.

    All attributes are put back, containers among them, and what buffers and other tensors hold; with ``parameters``
    also what those hold.

    Raises:
        ValueError: a forward wrote into parameters that are too large for a copy.
    """
    found = _Found(model, parameters)
    try:
        yield
    finally:
        written = found.put_back()
    if written is not None:
        raise ValueError(f"the model's forward writes into its parameter {written}, so that no two runs are alike")


class _Found:
    """What a forward pass can change on a model's modules, to be put back."""

    def __init__(self, model: nn.Module, parameters: bool) -> None:
        self._attributes = [(vars(module), dict(vars(module))) for module in list(model.modules())]
        self._containers: dict[int, tuple[Any, Any]] = {}
        self._tensors: dict[int, Tensor] = {}
        self._arrays: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._generators: dict[int, tuple[torch.Generator, Tensor]] = {}
        for own, _ in self._attributes:
            for name, value in own.items():
                if parameters or name not in _RARELY_CHANGED:
                    self._keep(value)
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._outer = parameters
        copied = parameters and sum(p.numel() for p in model.parameters()) <= MOST_COPIED
        held = [t for t in self._tensors.values() if id(t) not in self._names]
        # Also where the data are, which a forward may exchange, and a copy of what they are.
        self._held = [(t, t.data, t.detach().clone(), t._version) for t in held]
        self._wanted = [(t, t.requires_grad) for t in self._tensors.values() if t.is_leaf]
        self._parameters = [
            (t, t.data, t.detach().clone() if copied else None, version_of(t))
            for t in self._tensors.values()
            if id(t) in self._names
        ]

    def _keep(self, value: object) -> None:
        if isinstance(value, Tensor):
            if not value.is_inference() or isinstance(value, nn.Parameter):
                self._tensors[id(value)] = value
        elif isinstance(value, np.ndarray):
            self._arrays[id(value)] = (value, value.copy())
        elif isinstance(value, torch.Generator):
            self._generators[id(value)] = (value, value.get_state())
        elif isinstance(value, tuple):
            for inner in value:
                self._keep(inner)
        elif isinstance(value, _CONTAINERS) and id(value) not in self._containers:
            self._containers[id(value)] = (value, value.copy())
            if len(value) <= _MOST_ITEMS:
                for inner in value.values() if isinstance(value, dict) else value:
                    self._keep(inner)

    def put_back(self) -> str | None:
        """Undo all changes; the name of a parameter that was written into, of which there is no copy."""
        for own, before in self._attributes:
            if not _same(own, before):
                own.clear()
                own.update(before)
        for container, before in self._containers.values():
            if _same(container, before):
                continue
            container.clear()
            container.extend(before) if isinstance(container, (list, deque)) else container.update(before)
        for tensor, data, *_ in (*self._held, *self._parameters):
            if tensor.dtype != data.dtype or tensor.shape != data.shape or _address(tensor) != _address(data):
                tensor.data = data
        for leaf, wanted in self._wanted:
            if leaf.requires_grad != wanted:
                leaf.requires_grad_(wanted)
        for array, numbers in self._arrays.values():
            array[...] = numbers
        for generator, state in self._generators.values():
            generator.set_state(state)
        for tensor, data, values, version in self._held:
            if tensor._version != version:
                data.copy_(values)
        copied = [(data, values) for _, data, values, _ in self._parameters if values is not None and data.numel()]
        if self._outer:
            copied += [(data, values) for _, data, values, _ in self._held if data.numel() and _is_dense(data)]
        if copied:
            # Writing through .data counts nowhere. One read for all.
            written = torch.stack([_differ(data, values).cpu() for data, values in copied]).tolist()
            for (data, values), changed in zip(copied, written, strict=True):
                if changed:
                    data.copy_(values)
        uncopied = [(t, v) for t, _, values, v in self._parameters if values is None and self._outer]
        return next((self._names[id(t)] for t, version in uncopied if version_of(t) != version), None)


def _is_dense(t: Tensor) -> bool:
    return t.layout == torch.strided


def _address(t: Tensor) -> int:
    """Where a tensor's numbers are; 0 for all sparse ones, which have no such place."""
    return t.data_ptr() if _is_dense(t) else 0


def _differ(now: Tensor, before: Tensor) -> Tensor:
    """Whether any number is another one, 0-d bool; a zero's sign counts."""
    differ = (now != before).any()
    if now.is_floating_point():
        differ |= (torch.signbit(now) != torch.signbit(before)).any()
    return differ


def version_of(t: Tensor) -> int:
    """Count of the in-place changes to a tensor; of those made in inference mode nobody counts."""
    return 0 if t.is_inference() else t._version


def _same(now: Any, before: Any) -> bool:
    """Whether a container holds the very objects it held, in their order."""
    if len(now) != len(before):
        return False
    if isinstance(now, dict):
        return all(k is j and v is w for (k, v), (j, w) in zip(now.items(), before.items(), strict=True))
    return all(v is w for v, w in zip(now, before, strict=True))


def example_input(model: nn.Module, input_shape: Sequence[int]) -> Tensor:
    """A zero input, [1, *input_shape], in the dtype and on the device of the model's first parameter or buffer.

    Raises:
        ValueError: ``input_shape`` is not a sequence of positive integers.
    """
    shape = checked_shape(input_shape)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            return torch.zeros(1, *shape, dtype=tensor.dtype, device=tensor.device)
    return torch.zeros(1, *shape)


def random_inputs(model: nn.Module, input_shape: Sequence[int], count: int, seed: int = 0) -> Tensor:
    """Inputs like images, uniform in [0, 1], and by turns Gaussian ones of twice the size, [count, *input_shape].

    They show whether two ways of computing are one, so their seed may be fixed: nothing is certified by chance here.
    """
    like = example_input(model, input_shape)
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, *like.shape[1:], generator=generator, dtype=torch.float64)
    x[1::2] = 2.0 * torch.randn(x[1::2].shape, generator=generator, dtype=torch.float64)
    return x.to(like.device, like.dtype)


@contextmanager
def runs_on(model: nn.Module, input_shape: Sequence[int]) -> Iterator[None]:
    """Errors of torch in a forward pass as ones that say what the model was given."""
    try:
        yield
    except (torch.OutOfMemoryError, Refused):
        raise
    except Exception as error:
        name, why = type(model).__name__, f"{error}" or type(error).__name__
        raise ValueError(
            f"{name} does not run on an input of shape {list(input_shape)}, without the batch axis: {why}"
        ) from error


def _check_module(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
