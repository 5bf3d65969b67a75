"""A faster copy of a model for the gradients of an attack: it differs from the model by rounding alone.

Successes are always confirmed on the model itself, so that a copy can cost strength and never soundness.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from fastlip.attacks._graphs import Graphed
from fastlip.attacks._model import Model, Network, unwrapped

#: Largest difference of logits, relative to their spread, that counts as rounding.
_ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-9, torch.float16: 0.05, torch.bfloat16: 0.2}
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def prepare(
    model: Model,
    inputs: Tensor,  # [B, ...]
    *,
    fast: bool = True,
    precision: torch.dtype | None = None,
) -> Network:
    """The model beside a faster copy of it, to be handed to any attack in the model's place.

    ``fast`` folds BatchNorm into convolutions, drops everything about the weights' gradients, uses channels_last where
    it is faster (GPUs and low precision) and on a GPU replays CUDA graphs. ``precision`` runs all but the first layer
    in low precision. The copy is compared with the model on ``inputs``; where a part cannot be had (the model cannot
    be traced, or it draws random numbers) that part is left out, to the model itself. Changes made to the model
    afterwards do not reach the copy.

    Args:
        model: maps inputs to logits [B, C].
        inputs: a few inputs, for tracing and comparing.
        fast: make the copy fast in eval mode.
        precision: torch.bfloat16 or torch.float16 for the copy; its own precision if None.

    Raises:
        ValueError: the precision is none of those.
        TypeError: ``inputs`` is no tensor.
    """
    if precision not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"precision must be None, torch.bfloat16 or torch.float16, got {precision}")
    if isinstance(model, Network):
        return model
    if not isinstance(inputs, Tensor):
        raise TypeError(f"inputs must be a floating-point tensor, got {type(inputs).__name__}")
    model = unwrapped(model)
    if not (fast or precision) or len(inputs) == 0:
        return Network(model)
    if not isinstance(model, nn.Module):
        return Network(model, _Autocast(model, inputs.device.type, precision) if precision else None)
    training = [m for m in model.modules() if m.training]
    for module in training:
        module.training = False
    try:
        with torch.inference_mode(False), torch.no_grad():
            return Network(model, _faster(model, inputs[:8].detach().clone(), fast, precision))
    finally:
        for module in training:
            module.training = True


def network_of(model: Model, inputs: Tensor, *, fast: bool, precision: torch.dtype | None) -> Network:
    """What an attack works on: ``model`` where it is prepared already."""
    return prepare(model, inputs, fast=fast, precision=precision)


def _faster(model: nn.Module, inputs: Tensor, fast: bool, precision: torch.dtype | None) -> Model | None:
    """The first of several copies that agrees with the model, or None."""
    device = inputs.device.type
    wide = torch.float64 if inputs.dtype == torch.float64 else torch.float32
    candidates: list[tuple[torch.dtype, Callable[[], Model]]] = []
    if precision:
        if fast:
            candidates.append((precision, lambda: _laid_out(_lowered(_folded(model), inputs, precision), inputs)))
        candidates.append((precision, lambda: _Autocast(model, device, precision)))
    if fast:
        # On a CPU float32 convolutions are faster as they come.
        candidates.append((wide, lambda: _laid_out(_folded(model), inputs) if inputs.is_cuda else _folded(model)))
        if inputs.is_cuda:
            candidates.append((wide, lambda: _laid_out(_copied(model), inputs)))
    want = model(inputs)
    for dtype, build in candidates:
        try:
            made = build()
            agrees = _agree(made(inputs), want, _ROUNDING[dtype])
        except Exception:  # whatever a model may raise in another form than its own: that form is not to be had
            continue
        if agrees:
            graphed = Graphed(made) if fast and inputs.is_cuda else None
            return graphed if graphed and graphed.works(inputs) else made
    return None


def _agree(got: Tensor, want: Tensor, tolerance: float) -> bool:
    spread = (want.double().amax(1) - want.double().amin(1)).amax().clamp_min(1e-30)
    return bool(((got.double() - want.double()).abs().amax() / spread) <= tolerance)


def _copied(model: nn.Module) -> nn.Module:
    """A copy that has no gradients of its own."""
    made = copy.deepcopy(model).requires_grad_(False)
    made._forward_hooks.clear()  # they watch the model, and the copy's passes are reported to it already
    return made


def _folded(model: nn.Module) -> nn.Module:
    """A copy with each BatchNorm folded into the convolution or linear map before it, where nothing else reads that."""
    made = fx.symbolic_trace(_copied(model))
    modules = dict(made.named_modules())
    calls = [n.target for n in made.graph.nodes if n.op == "call_module"]
    for node in list(made.graph.nodes):
        if node.op != "call_module" or not isinstance(modules[node.target], _NORMS):
            continue
        before = node.args[0]
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        linear, norm = modules[str(before.target)], modules[node.target]
        if calls.count(before.target) > 1 or norm.running_mean is None:
            continue
        if type(linear) in _CONVS:
            fused: nn.Module = fuse_conv_bn_eval(linear, norm)
        elif type(linear) is nn.Linear:
            fused = fuse_linear_bn_eval(linear, norm)
        else:
            continue
        made.set_submodule(str(before.target), fused)
        node.replace_all_uses_with(before)
        made.graph.erase_node(node)
    made.delete_all_unused_submodules()
    made.recompile()
    return made.requires_grad_(False)


class _FullFirst(nn.Module):
    """The first layer: in its own precision, because small perturbations of the input vanish in a low one."""

    def __init__(self, layer: nn.Module, precision: torch.dtype) -> None:
        super().__init__()
        self.layer = layer
        self.precision = precision

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).to(self.precision)


def _lowered(model: nn.Module, inputs: Tensor, precision: torch.dtype) -> nn.Module:
    """``model`` (changed) with everything after its first convolution or linear map in ``precision``."""
    order: list[tuple[str, nn.Module]] = []
    handles = [
        m.register_forward_pre_hook(lambda module, args, name=name: order.append((name, module)))
        for name, m in model.named_modules()
        if not list(m.children())
    ]
    model(inputs)
    for handle in handles:
        handle.remove()
    first = next(i for i, (_, m) in enumerate(order) if isinstance(m, (*_CONVS, nn.Linear)))
    early = {m for _, m in order[: first + 1]}
    for _, module in order[first + 1 :]:
        if module not in early:
            module.to(precision)
    model.set_submodule(order[first][0], _FullFirst(order[first][1], precision))
    return model


def _laid_out(model: nn.Module, inputs: Tensor) -> Model:
    """``model`` (changed) in channels_last where inputs are images."""
    return _ChannelsLast(model.to(memory_format=torch.channels_last)) if inputs.dim() == 4 else model


class _ChannelsLast:
    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, x: Tensor) -> Tensor:
        return self.model(x.contiguous(memory_format=torch.channels_last))


class _Autocast:
    """The model under autocast, for what cannot be converted."""

    def __init__(self, model: Model, device: str, precision: torch.dtype) -> None:
        self.model = model
        self.device = device
        self.precision = precision

    def __call__(self, x: Tensor) -> Tensor:
        with torch.autocast(self.device, self.precision):
            return self.model(x)
