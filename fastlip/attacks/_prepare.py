"""A faster copy of a model for the gradients of an attack, which differs from the model by rounding alone.

Successes are always confirmed on the model itself, so a copy can make an attack weaker but never wrong.
"""

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from fastlip._precision import Precision, least_seconds, precision_for
from fastlip.attacks._arguments import check_images, check_model, check_precision, flag
from fastlip.attacks._diagnose import AttackWarning
from fastlip.attacks._graphs import IterationGraphs
from fastlip.attacks._interleaved import FEW
from fastlip.attacks._model import Model, Network, logits_of, unwrapped
from fastlip.attacks._outputs import logits_in
from fastlip.attacks._packed import PackedConv
from fastlip.attacks._recipe import Recipe, Remade, code_of, recipe_of
from fastlip.attacks._rewrite import fold, fuse, is_hooked, lower, takes_either_format
from fastlip.norms._models.restore import version_of
from fastlip.norms._models.tracing import InPlaceTracer, Tracer

#: Largest difference of logits, relative to their spread, that counts as rounding.
_ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-9, torch.float16: 0.05, torch.bfloat16: 0.2}
#: The same of copies that are made anew without tracing: no more than what is to be expected of their sums.
_ROUNDING_AGAIN = 2e-5
#: The number of inputs on which a new copy and the model are compared, and of those before it is used again; the factor
#: by which they may differ more on other inputs, and the smallest difference assumed.
_COMPARED, _COMPARED_AGAIN, _MARGIN, _LEAST = 4, 2, 4.0, 1e-6
#: The number of inputs on which copies of two precisions are timed.
_TIMED = 16
#: The number of copies of a model that are kept, for different precisions or shapes of inputs.
_MOST_KEPT = 3
#: Multiply-adds in the convolutions of one image from which on fused ones save more than a copy costs, and how many
#: times as many where the weights have changed since the last attack, so that they may change before the next one.
_LEAST_MULTIPLY_ADDS = 1e5
_IN_TRAINING = 30.0
#: The share of these from which on networks of few channels gain, where the weights stay; and their most parameters.
_SHARE_OF_FEW, _MOST_PARAMETERS = 0.05, 1e6


def prepare(
    model: Model,
    inputs: Tensor,  # [B, ...]
    *,
    fast: bool = True,
    precision: Precision = None,
    draws: int = 1,
    eot: int = 1,
    same_size: bool | None = None,
) -> Network:
    """The model together with a faster copy of it, which any attack takes in place of the model.

    With ``fast`` the copy is traced, for inputs of this shape where the model's forward asks for shapes; BatchNorm is
    folded into convolutions, nothing is computed for the gradients of weights, and images are stored channels last. On
    a CPU, convolutions are fused with the sums and ReLUs that follow, in both passes. In float32, if fastlip was
    compiled, their weights are packed once for both passes, which takes as much memory as the model's weights, and 3x3
    kernels at stride 1 go by Winograd's filtering, which takes a quarter of the products and rounds about five times as
    much (on maps of 2x2 pixels 9 in 16, at a lower price): where a gradient is exactly 0, the copy's may be at the
    level of rounding, and a step in Linf goes by its sign. Convolutions of up to 16 channels on one side, with the
    pools and linear layers behind them, are one function of sixteen images at a time.

    Attacks with ``fast=True`` leave out networks with next to nothing in convolutions, which have nothing to gain, and
    small ones whose weights have changed since the last attack, as in training, except those that are one function,
    which is made anew without tracing. On a GPU, CUDA graphs are replayed.

    ``precision`` makes the copy compute all but its first layer in low precision. A low precision that this machine
    computes more slowly than float32 (bfloat16 on a CPU without AVX512-BF16 or AMX, for example) is not used: a warning
    says so, once for each precision, and the copy stays in float32. With "auto" the copy is in bfloat16 where the
    machine has instructions for it and, on a CPU, where a copy in bfloat16 is faster on ``inputs`` than one in float32;
    a model that is no module runs under autocast where the machine has the instructions.

    A model with random outputs is judged by ``draws`` passes, whose mean probabilities decide, and attacked through the
    gradients of the mean over ``eot`` passes. In every attack an image that a single pass may change by chance then
    falls only where the average does.

    The copy is compared with the model on the first four of ``inputs``. Whatever cannot be done for a model, because it
    cannot be traced or draws random numbers, is left out; in the last resort the model's own gradients are followed.

    An attack makes the copy anew where the model's parameters or buffers have changed since, by a step of training for
    example, and warns of it once, because that takes time. Changes through ``.data`` that leave a tensor where it is
    cannot be seen: the copy's gradients are then those of the former model.

    While one thread makes a copy, others must not run models: tracing changes how modules are called in the whole
    process. Copies are kept for as long as the model lives. A copy is used again if the model's tensors are still the
    same and both still agree on the first two of ``inputs``.

    Args:
        model: maps inputs to logits [B, C].
        inputs: a few inputs, for tracing, comparing and timing.
        fast: make the copy fast in eval mode.
        precision: torch.bfloat16 or torch.float16 for the copy, or "auto"; the model's own if None.
        draws: passes that judge an image together.
        eot: passes whose mean probabilities are differentiated; their activations are in memory at once.
        same_size: give the model batches of one size, by repeating an image as others fall. If None, do so for what
            ``torch.compile`` made and from the first smaller batch on that the model fails on.

    Raises:
        ValueError: the precision is another one, ``inputs`` have no batch dimension, or a number of passes is below 1.
        TypeError: ``model`` cannot be called, or ``inputs`` is not a tensor of floating-point numbers.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from fastlip import attacks
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).eval()
        >>> images = torch.rand(2, 3, 2, 2)
        >>> labels = model(images).argmax(1)
        >>> network = attacks.prepare(model, images, fast=True)
        >>> adversarial = attacks.pgd(network, images, labels, eps=8 / 255)
    """
    check_precision(precision)
    flag(fast, "fast")
    check_model(model)
    averaged: dict[str, Any] = {"draws": draws, "eot": eot, "same_size": same_size}
    if isinstance(model, Network):
        if draws == eot == 1 and same_size is None:
            return model
        if isinstance(model, _Prepared):
            return model.averaging(**averaged)
        return Network(model.model, model.faster, model.rounding, graphs=model.graphs, **averaged)
    check_images(inputs)
    made = network_of(model, inputs, fast=fast, precision=precision, however_small=True)
    return _Prepared(made, fast, precision, **averaged)


class _Prepared(Network):
    """A network whose copy an attack makes anew where the model has changed since."""

    def __init__(self, made: Network, fast: bool, precision: Precision, **averaged: Any) -> None:
        super().__init__(made.model, made.faster, made.rounding, graphs=made.graphs, **averaged)
        self.made, self.fast, self.precision = made, fast, precision
        self._fingerprint = self._present_fingerprint()
        self._warned = False

    def averaging(self, **averaged: Any) -> "_Prepared":
        """The same copy, of the same state of the model, with other numbers of passes."""
        other = _Prepared(self.made, self.fast, self.precision, **averaged)
        other._fingerprint = self._fingerprint
        return other

    def renew(self, inputs: Tensor) -> None:
        """Make the copy anew unless the model's tensors are those that it was made of."""
        present = self._present_fingerprint()
        if present == self._fingerprint or len(inputs) == 0:
            return
        if not self._warned:
            warnings.warn(
                "the model has changed since it was prepared, and is prepared again: attacks on a model in training "
                "cost less without prepare and fast=True, which make a copy for each attack then",
                AttackWarning,
                stacklevel=4,
            )
            self._warned = True
        self.made = network_of(self.model, inputs, fast=self.fast, precision=self.precision, however_small=True)
        self.follow(self.made.faster, self.made.rounding, self.made.graphs)
        self._fingerprint = present

    def _present_fingerprint(self) -> object:
        if self.faster is None or not isinstance(self.model, nn.Module):
            return None
        return _fingerprint(self.model)


def network_of(
    model: Model, inputs: Tensor, *, fast: bool, precision: Precision, however_small: bool = False
) -> Network:
    """:func:`prepare` for an attack, which has checked the arguments; what is prepared already is kept up to date.

    Unless ``however_small``, a network with next to nothing in convolutions gets no copy in float32 on a CPU, because
    it would gain nothing by it.
    """
    if isinstance(model, _Prepared):
        model.renew(inputs)
    if isinstance(model, Network):
        return model
    model = unwrapped(model)
    low = precision_for(precision, inputs.device)
    if not (fast or low) or len(inputs) == 0:
        return Network(model)
    if not isinstance(model, nn.Module):
        return Network(model, _Autocast(model, inputs.device.type, low) if low else None)
    inside = compiled if isinstance(compiled := getattr(model, "_orig_mod", None), nn.Module) else model
    training = [m for m in model.modules() if getattr(m, "training", False)]
    for module in training:
        module.training = False
    try:
        with torch.inference_mode(False), torch.no_grad():
            inputs = inputs.detach()
            timed = inputs[:_TIMED].clone() if precision == "auto" and inputs.device.type == "cpu" else None
            purpose = (fast, low, timed is None, inputs.shape[1:], inputs.dtype, inputs.device)
            small = not (however_small or low or inputs.is_cuda) and _is_small(inside, inputs, purpose)
            made = None if small else _copy_of(inside, inputs, purpose, timed, any_size=however_small)
        return Network(model, made.model, made.rounding, graphs=made.graphs) if made else Network(model)
    finally:
        for module in training:
            module.training = True


def _compared(model: nn.Module, inputs: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``count`` inputs, or all of them where the model takes no other number; and the model's logits."""
    few = inputs[:count].clone()
    try:
        return few, logits_of(model, few)
    except Exception:  # a model may raise anything at a size that it was not made for
        return inputs.clone(), logits_of(model, inputs.clone())


@dataclass(frozen=True)
class _Copy:
    """A faster model, and how far its logits may be from the model's, relative to their spread."""

    model: Model
    rounding: float
    graphs: IterationGraphs | None  # of attacks on it

    @property
    def any_size(self) -> bool:
        """Whether it takes images of other sizes than those that it was made for, if the model does."""
        return not (isinstance(self.model, _OwnLayout) and isinstance(self.model.model, Remade))


#: What a copy is for: whether it is to be fast, its precision, whether that was not timed, and what it is given.
_Purpose = tuple[bool, torch.dtype | None, bool, torch.Size, torch.dtype, torch.device]


class _Kept:
    """The copies of one model, for as long as its tensors and its modules' code stay as they are."""

    def __init__(self, model: nn.Module, recipes: dict[_Purpose, Recipe]) -> None:
        self.fingerprint = _fingerprint(model)
        self.copies: dict[_Purpose, _Copy] = {}
        self.recipes = recipes  # of copies of other weights too, by their purpose


#: Copies hold no reference to the model, so that they are freed with it.
_kept: WeakKeyDictionary[nn.Module, _Kept] = WeakKeyDictionary()
#: Multiply-adds of models, by the shapes of inputs and parameters: a step of training changes neither.
_counted: WeakKeyDictionary[nn.Module, dict[object, float]] = WeakKeyDictionary()


def _fingerprint(model: nn.Module) -> object:
    tensors = (*model.parameters(), *model.buffers())
    return [(t.data_ptr(), version_of(t)) for t in tensors], code_of(model)


def _kept_of(model: nn.Module) -> _Kept:
    kept = _kept.get(model)
    if kept is None or kept.fingerprint != _fingerprint(model):
        kept = _kept[model] = _Kept(model, {} if kept is None else kept.recipes)
    return kept


def _is_small(model: nn.Module, inputs: Tensor, purpose: _Purpose) -> bool:
    """Whether fused convolutions would save less than a copy costs."""
    before = _kept.get(model)
    changed = before is not None and before is not _kept_of(model)
    share = _SHARE_OF_FEW if _is_of_few_channels(model) else 1.0
    least = _LEAST_MULTIPLY_ADDS * (_IN_TRAINING if changed and purpose not in _kept_of(model).recipes else share)
    counted = _counted.setdefault(model, {})
    shapes = (inputs.shape[1:], *(p.shape for p in model.parameters()))
    if shapes not in counted:
        counted[shapes] = _multiply_adds(model, inputs)
    return counted[shapes] < least


def _is_of_few_channels(model: nn.Module) -> bool:
    """Whether a model is likely to become one function (:class:`SmallNetwork`)."""
    for module in model.modules():
        if not any(True for _ in module.parameters(recurse=False)):
            continue
        if isinstance(module, nn.Conv2d):
            if min(module.in_channels, module.out_channels) > FEW:
                return False
        elif not isinstance(module, nn.Linear | nn.BatchNorm2d):
            return False
    return sum(p.numel() for p in model.parameters()) <= _MOST_PARAMETERS


def _copy_of(model: nn.Module, inputs: Tensor, purpose: _Purpose, timed: Tensor | None, any_size: bool) -> _Copy | None:
    """A copy with the model's logits, made before or anew; unless ``any_size``, perhaps for images of this size alone.

    That tensors are unchanged is not enough, because ``.data`` and submodules can be replaced unnoticed: logits are
    compared too.
    """
    kept = _kept_of(model)
    fast, low, *_ = purpose
    made = kept.copies.pop(purpose, None)
    if any_size and made is not None and not made.any_size:
        made = None
    if made is not None:
        few, want = _compared(model, inputs, _COMPARED_AGAIN)
        if not _distance(logits_of(made.model, few), want) <= made.rounding:
            made = None
    if made is None:
        few, want = _compared(model, inputs, _COMPARED)
        recipe = None if any_size else kept.recipes.pop(purpose, None)
        if recipe is not None:
            made = _first_to_agree([lambda: _made_again(recipe, model)], few, want, _ROUNDING_AGAIN, fast)
        made = made or _faster(model, few, want, fast, low, timed)
    if made is not None and not isinstance(made.model, _Autocast):  # which holds the model
        kept.copies[purpose] = made
        if isinstance(made.model, _OwnLayout) and made.model.recipe is not None:
            kept.recipes[purpose] = made.model.recipe
        for held in (kept.copies, kept.recipes):
            if len(held) > _MOST_KEPT:
                del held[next(iter(held))]
    return made


def _made_again(recipe: Recipe, model: nn.Module) -> Model:
    made = _OwnLayout(recipe.copy_of(model), torch.preserve_format)
    made.recipe = recipe
    return made


def _faster(
    model: nn.Module, inputs: Tensor, want: Tensor, fast: bool, low: torch.dtype | None, timed: Tensor | None
) -> _Copy | None:
    """A copy in precision ``low``, or a wider one where that is impossible or is slower on the ``timed`` inputs."""
    lows: list[Callable[[], Model]] = []
    wides: list[Callable[[], Model]] = []
    if low:
        if fast:
            lows.append(lambda: _rewritten(model, inputs, low))
        lows.append(lambda: _Autocast(model, inputs.device.type, low))
    if fast:
        wides.append(lambda: _rewritten(model, inputs, None))
        if inputs.is_cuda:
            wides.append(lambda: _laid_out(_copied(model), inputs, model))
    wide = torch.float64 if inputs.dtype == torch.float64 else torch.float32
    in_low = _first_to_agree(lows, inputs, want, _ROUNDING[low], fast) if low else None
    if in_low and timed is None:
        return in_low
    in_wide = _first_to_agree(wides, inputs, want, _ROUNDING[wide], fast)
    if in_low is None or timed is None:
        return in_wide
    own = in_wide.model if in_wide else model
    seconds = least_seconds([lambda: _pass(in_low.model, timed), lambda: _pass(own, timed)], rounds=2)
    return in_low if seconds[0] < seconds[1] else in_wide


def _first_to_agree(
    candidates: Sequence[Callable[[], Model]], inputs: Tensor, want: Tensor, rounding: float, fast: bool
) -> _Copy | None:
    """The first copy that gives ``want`` up to ``rounding`` and has gradients."""
    for build in candidates:
        try:
            made = build()
            apart = _distance(_pass(made, inputs), want)
        except Exception:  # a model may raise anything in a form that it was not written for
            continue
        if apart <= rounding:
            graphs = IterationGraphs() if fast and inputs.is_cuda else None
            return _Copy(made, _MARGIN * max(apart, _LEAST), graphs)
    return None


def _pass(model: Model, inputs: Tensor) -> Tensor:
    """The logits, after a backward pass, because some models fail only there."""
    with torch.enable_grad():
        logits: Tensor = logits_in(model(seen := inputs.clone().requires_grad_()), len(inputs))
        torch.autograd.grad(logits.sum(), seen)
    return logits.detach()


def _distance(got: Tensor, want: Tensor) -> float:
    """Largest difference of logits over their spread, NaN where there is one; -inf in both makes no difference."""
    got, want = got.double(), want.double()
    least = want.masked_fill(want == -torch.inf, torch.inf).amin(1)
    spread = (want.amax(1) - least).clamp_min(1e-30)
    apart = torch.where((got == -torch.inf) & (want == -torch.inf), 0.0, (got - want).abs())
    return float((apart.amax(1) / spread).amax())


def _rewritten(model: nn.Module, inputs: Tensor, precision: torch.dtype | None) -> Model:
    """A traced copy with BatchNorm folded, in low precision where one is given, and fused on a CPU."""
    if not inputs.is_cuda and any(_padded_pointwise(m) for m in model.modules()):
        raise ValueError("PyTorch's channels_last kernels do not take every padded 1x1 convolution")
    made = _traced(model, inputs)
    names = {id(module): name for name, module in made.named_modules()}
    folded = fold(made)
    if precision:
        lower(made, precision)
    if not inputs.is_cuda:
        fuse(made)
    made.delete_all_unused_submodules()
    made.recompile()
    if any(isinstance(m, PackedConv) for m in made.modules()):
        made.forward(inputs)  # packs weights, which need neither a layout nor storage of their own before
    laid_out = _laid_out(made, inputs, model)
    if inputs.dim() == 4:
        laid_out.recipe = recipe_of(made, (inputs.shape[2], inputs.shape[3]), names, folded, model)
    return _FewSizes(laid_out) if precision and not inputs.is_cuda else laid_out


def _traced(model: nn.Module, inputs: Tensor) -> fx.GraphModule:
    """A traced copy, which takes batches of all sizes but only the inputs' shape where its forward asks for that."""
    try:
        return _traced_by(_CopyTracer(), _copied(model))
    except Exception:  # a forward may do anything with what stands for a tensor
        other = inputs[:-1] if len(inputs) > 1 else torch.cat([inputs, inputs])
        return _traced_by(Tracer([inputs, other], is_hooked), _copied(model))


class _CopyTracer(InPlaceTracer):
    """Hooks are called where modules run, and not once with what stands for a tensor."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_hooked(m) or super().is_leaf_module(m, module_qualified_name)


def _traced_by(tracer: fx.Tracer, model: nn.Module) -> fx.GraphModule:
    try:
        return fx.GraphModule(model, tracer.trace(model))
    finally:
        # It is part of a cycle, and would hold the layers, with weights that are packed below, until that is collected.
        vars(tracer).clear()


def _multiply_adds(model: nn.Module, inputs: Tensor) -> float:
    """Those of the convolutions in a forward pass of one image; inf where they cannot be counted."""
    for few in (inputs[:1], inputs):  # a model may take no other number
        try:
            made = _copied(model)
            with FlopCounterMode(display=False) as counter:
                made(few)
        except Exception:  # a model may raise anything under a mode that it was not written for
            continue
        flops = counter.get_flop_counts().get("Global", {})
        return sum(count for operator, count in flops.items() if "convolution" in str(operator)) / (2.0 * len(few))
    return torch.inf


def _padded_pointwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.padding not in ((0, 0), "valid")


def _copied(model: nn.Module) -> nn.Module:
    """A copy without gradients and hooks, whose tensors share the model's storage."""
    tensors = (*model.parameters(), *model.buffers())
    memo = {
        id(t): nn.Parameter(t.detach(), requires_grad=False) if isinstance(t, nn.Parameter) else t.detach()
        for t in tensors
    }
    made = copy.deepcopy(model, memo)
    made._forward_hooks.clear()  # passes of the copy are reported to the model's hooks separately
    return made


def _laid_out(made: nn.Module, inputs: Tensor, model: nn.Module) -> "_OwnLayout":
    """``made``, changed to be in channels_last if the inputs are images, and to share no storage with the model."""
    if inputs.dim() == 4:
        made = made.to(memory_format=torch.channels_last)
    models = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    for tensor in (*made.parameters(), *made.buffers()):
        if tensor.untyped_storage().data_ptr() in models:
            tensor.data = tensor.data.clone()
    either = isinstance(made, fx.GraphModule) and takes_either_format(made)
    return _OwnLayout(made, torch.channels_last if inputs.dim() == 4 and not either else torch.preserve_format)


class _OwnLayout:
    """``model`` on inputs in its memory format, and in its own precision whatever autocast the caller is in."""

    def __init__(self, model: nn.Module, memory_format: torch.memory_format) -> None:
        self.model = model
        # A graph's __call__ prints the code of whatever fails, which is nobody's concern where a copy is only tried.
        self.call: Model = model.forward if isinstance(model, fx.GraphModule) else model
        self.memory_format = memory_format
        self.recipe: Recipe | None = None
        # Nothing but code of a module's own could keep what a graph is given.
        self.keeps_nothing = isinstance(model, fx.GraphModule | Remade) and not any(map(is_hooked, model.modules()))

    def __call__(self, x: Tensor) -> Tensor:
        if self.memory_format != torch.preserve_format:
            x = x.contiguous(memory_format=self.memory_format)
        if not torch.is_autocast_enabled(x.device.type):
            return self.call(x)
        with torch.autocast(x.device.type, enabled=False):
            return self.call(x)


class _FewSizes:
    """``model`` on batches of a few sizes, because oneDNN compiles its low-precision kernels for each size anew."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.largest = 0

    def __call__(self, x: Tensor) -> Tensor:
        size = len(x)
        self.largest = max(self.largest, size)
        room = min(padded_size(size), self.largest)
        if room > size:
            x = torch.cat([x, x.new_zeros(room - size, *x.shape[1:])])
        return self.model(x)[:size]


def padded_size(size: int) -> int:
    """The next size of 1, 2, 4, 8, 16, 32, 40, 48, 56, 64, 80, ...: close enough that padding costs little."""
    step = 1 << max(size.bit_length() - 3, 0)
    return 1 << (size - 1).bit_length() if size <= 32 else -(-size // step) * step


class _Autocast:
    """The model under autocast, for models that cannot be converted."""

    def __init__(self, model: Model, device: str, precision: torch.dtype) -> None:
        self.model = model
        self.device = device
        self.precision = precision

    def __call__(self, x: Tensor) -> Tensor:
        with torch.autocast(self.device, self.precision):
            return self.model(x)
