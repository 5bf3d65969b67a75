"""What the functions that a model calls do with the tensors that it holds."""

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from fastlip.norms._models.aten import as_function
from fastlip.norms._models.held import Factors, HeldTensors, storage_address
from fastlip.norms._models.linear_calls import TAKE_A_WEIGHT, LinearCall, LinearMap, Pad, linear_call
from fastlip.norms._models.restore import version_of
from fastlip.norms._operators.batchnorm import NO_STATISTICS, batchnorm_factors
from fastlip.norms._operators.operator import Operator

#: Functions that make a tensor of numbers that no other tensor has a part in.
_MAKES = frozenset(("zeros", "ones", "empty", "arange", "linspace", "eye"))
#: Functions whose result depends on the first argument's numbers, and on the others' shape or dtype alone.
_OF_THE_FIRST = frozenset(("expand_as", "view_as", "reshape_as", "type_as", "to"))
#: Functions of several tensors of which none is multiplied: what such a function adds, no norm depends on.
_ADDS = frozenset((
    *("add", "radd", "iadd", "sub", "rsub", "isub", "subtract", "cat", "concat", "concatenate", "stack", "hstack"),
    *("vstack", "where", "masked_fill", "masked_scatter", "setitem", "copy", "index_put", "index_copy", "scatter"),
))  # fmt: skip
_MULTIPLIES = frozenset(("mul", "rmul", "imul", "multiply"))
_DIVIDES = frozenset(("div", "truediv", "itruediv", "idiv", "divide", "true_divide"))
_ATTENTION = inspect.signature(F.multi_head_attention_forward)
_BATCHNORM = inspect.signature(F.batch_norm)
_PAD = inspect.signature(F.pad)


_DEVIATION = "{} divides by a deviation of its input, so that it has no factor that holds for every input"
_STEPS = "{} applies it at each step of a sequence, between gates"
#: Why a function has no norm.
_REASONS = {
    **dict.fromkeys(("layer_norm", "group_norm", "instance_norm", "rms_norm"), _DEVIATION),
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell"), _STEPS),
    **dict.fromkeys(("rnn_tanh_cell", "rnn_relu_cell"), _STEPS),
    **dict.fromkeys(("embedding", "embedding_bag"), "{} looks its rows up by whole numbers"),
    "bilinear": "{} multiplies two inputs with each other",
    "prelu": "{} takes it as the slope of an activation",
}
_UNKNOWN = "it is used in {}, which is not known as a linear map of its input"


class Listener(Protocol):
    """What is told of the functions that were called outside of layers that speak for themselves."""

    def silent(self) -> bool:
        """Whether a layer is running that speaks for all that it does."""

    def has_weight(self, weight: Tensor) -> None:
        """The layer that runs has a weight that may be another in the next run."""

    def output_of(self, x: Tensor) -> Any:
        """The call of a layer that returned this very tensor, unchanged since, or None."""

    def linear(self, call: LinearCall, tensors: frozenset[int], label: str = "") -> None:
        """A linear map was applied, whose weight is computed from these tensors."""

    def scales(
        self,
        x: Tensor,
        y: Tensor,
        before: Any,
        tensors: frozenset[int],
        factors: Factors | nn.Module,
        batchnorm: bool,
    ) -> None:
        """Channels were multiplied by factors, or by those of a BatchNorm, computed from these tensors."""

    def adds(self, tensors: Collection[int]) -> None:
        """These tensors were added."""

    def leaves_out(self, tensors: Collection[int], reason: str) -> None:
        """These tensors were used in another way."""

    def leaves_out_weight_of(self, name: str) -> None:
        """A function that takes a weight was given one that is not made of the model's tensors alone."""


class WatchedFunctions(TorchFunctionMode):
    """Sees every function of torch that is called, and tells a listener what it did with the model's tensors.

    Each tensor is made of some of the tensors that the model holds, or depends on the model's input. What comes from
    where no function of torch was seen, such as an ``autograd.Function``, is taken to depend on the input.
    """

    def __init__(self, held: HeldTensors, listener: Listener) -> None:
        super().__init__()
        self._held, self._listener = held, listener
        self._made_of: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._pads: WeakIdKeyDictionary = WeakIdKeyDictionary()
        # By address, storages that were made of the model's tensors before something that depends on the input was
        # written there. A tensor of each is kept, so that no other storage gets the address.
        self._written: dict[int, Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call the function and say what it did."""
        kwargs = kwargs or {}
        run = partial(func, *args, **kwargs)
        func, args, written_name = as_function(func, args)
        name = written_name.strip("_")
        made_of = [self.made_of(t) for t in _tensors((args, kwargs))]
        held = frozenset[int]().union(*(m for m in made_of if m))
        weight = (args[1] if len(args) > 1 else kwargs["weight"]) if func in TAKE_A_WEIGHT else None
        if None not in made_of:
            y = run()
            if made_of or name in _MAKES:
                for t in (*_tensors(y), *_written(written_name, args, kwargs)):
                    self._made_of[t] = held
            return y
        if not self._listener.silent() and isinstance(weight, Tensor) and self.made_of(weight) is None:
            self._listener.leaves_out_weight_of(name)
        if not held or self._listener.silent():
            if isinstance(weight, Tensor):
                self._see_weight(weight)
            y = run()
        elif name in _OF_THE_FIRST:
            y = run()
            first = self.made_of(args[0])
            if first is not None:
                self._made_of[y] = first
        else:
            y = self._call(func, name, args, kwargs, held, run)
        for t in _written(written_name, args, kwargs):
            if self.made_of(t) is not None:
                self._written[storage_address(t)] = t
        if func is F.pad and isinstance(y, Tensor):
            given = _PAD.bind(*args, **kwargs).arguments
            self._pads[y] = given.pop("input"), Pad(**given), version_of(y)
        return y

    def made_of(self, t: Tensor) -> frozenset[int] | None:
        """The model's tensors that a tensor is computed from, or None where it may depend on the input."""
        if self._written and storage_address(t) in self._written:
            return None
        if t in self._held:
            return frozenset((id(t),))
        found: frozenset[int] | None = self._made_of.get(t)
        return found

    def _is_weight(self, t: object) -> bool:
        return isinstance(t, Tensor) and bool(self.made_of(t))

    def _see_weight(self, weight: Tensor) -> None:
        """Say which weight a layer has, unless it is computed from the model's tensors as they were before the run."""
        made_of = self.made_of(weight)
        if made_of is None or not all(map(self._held.is_unchanged, made_of)):
            self._listener.has_weight(weight)

    def _call(
        self,
        func: Any,
        name: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        held: frozenset[int],
        run: Callable[[], Any],
    ) -> Any:
        """Call a function of the model's input and of some of the model's tensors, and say what it did."""
        if func is F.multi_head_attention_forward:
            self._attention(_ATTENTION.bind(*args, **kwargs).arguments, held)
            return run()
        if func is F.batch_norm:
            return self._batchnorm(args, kwargs, held, run)
        if func is F.scaled_dot_product_attention:  # the mask is added to the products of queries and keys
            mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
            added = frozenset[int]().union(*(self.made_of(t) or () for t in _tensors(mask)))
            self._listener.adds(added)
            held -= added
        scaled = self._scaled(name, args, kwargs)
        before = self._listener.output_of(scaled[0]) if scaled else None
        y = run()
        call = self._linear(func, args, kwargs, y)
        if call is not None:
            weights = self.made_of(call.given)
            assert weights is not None
            self._listener.linear(call, weights)
            self._listener.adds(held - weights)
        elif scaled and y.shape == scaled[0].shape:
            x, factor = scaled
            tensors = self.made_of(factor)
            assert tensors is not None
            factors = Factors(self._held.source(tensors, factor, flat=True), name in _DIVIDES, factor.shape)
            self._listener.scales(x, y, before, tensors, factors, self._held.has_variance(tensors))
            self._listener.adds(held - tensors)
        elif name in _ADDS:
            self._listener.adds(held)
        else:
            self._listener.leaves_out(held, _REASONS.get(name, _UNKNOWN).format(name))
        return y

    def _linear(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], y: Any) -> LinearCall | None:
        if isinstance(y, Tensor) and y.is_complex():
            return None  # a weight of complex numbers is left out by name
        try:
            call = linear_call(func, args, kwargs, y, self._is_weight)
        except (TypeError, ValueError):
            return None
        if call is None:
            return None
        x, pad, version = self._pads.get(call.x, (None, None, 0))
        joined = pad.before(call.map.operator) if pad and version == version_of(call.x) and _may_pad(call) else None
        if joined is None:
            return call
        return replace(call, x=x, map=replace(call.map, operator=joined))

    def _scaled(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
        """The tensor that is multiplied or divided, and the factors made of the model's tensors alone."""
        names = _MULTIPLIES | _DIVIDES
        if name == "addcmul" and len(args) == 3:  # the first is added
            args, names = args[1:], frozenset((name,))
        if kwargs or name not in names or len(args) != 2:
            return None
        first, second = args
        if not all(isinstance(t, Tensor) and t.is_floating_point() for t in args):
            return None
        if self._is_weight(second) and self.made_of(first) is None:
            return first, second
        return (second, first) if self._is_weight(first) and name not in _DIVIDES else None

    def _batchnorm(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], held: frozenset[int], run: Callable[[], Any]
    ) -> Any:
        bound = _BATCHNORM.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        x, variance, weight, bias = (given[name] for name in ("input", "running_var", "weight", "bias"))
        added = frozenset[int]() if bias is None else self.made_of(bias) or frozenset[int]()
        before = self._listener.output_of(x)
        y = run()
        self._listener.adds(added)
        factors = (variance, weight)
        if given["training"] or variance is None:
            self._listener.leaves_out(held - added, NO_STATISTICS)
        elif any(t is not None and self.made_of(t) is None for t in factors):
            self._listener.leaves_out(held - added, _UNKNOWN.format("batch_norm"))
        else:
            tensors = frozenset[int]().union(*(self.made_of(t) or () for t in factors if t is not None))
            module = self._held.batchnorm(variance, weight, given["eps"])
            computed = Factors.computed(batchnorm_factors(variance, weight, given["eps"]), x.dim() - 2)
            self._listener.scales(x, y, before, tensors, module or computed, True)
        return y

    def _attention(self, given: Mapping[str, Any], held: frozenset[int]) -> None:
        """The four matrices of multi-head attention."""
        width = given["embed_dim_to_check"]
        packed = given["in_proj_weight"]
        inputs = {"q": given["query"], "k": given["key"], "v": given["value"]}
        parts: list[tuple[Tensor, Tensor, Tensor, str]] = []
        if given.get("use_separate_proj_weight"):
            parts += [(x, w, w, "") for name, x in inputs.items() if (w := given[f"{name}_proj_weight"]) is not None]
        elif packed is not None:
            rows = packed.split(width)
            parts += [(x, packed, w, f"[{name}]") for (name, x), w in zip(inputs.items(), rows, strict=True)]
        parts.append((given["query"], given["out_proj_weight"], given["out_proj_weight"], ""))
        seen = frozenset[int]()
        for x, whole, weight, label in parts:
            made_of = self.made_of(whole)
            if made_of:
                seen |= made_of
                matrix = LinearMap(Operator(weight.detach()), False, None, "attention")
                self._listener.linear(LinearCall(matrix, x, x, weight, whole=False), made_of, label)
        self._listener.adds(held - seen)


def _may_pad(call: LinearCall) -> bool:
    return bool(call.map.operator.kernel) and not call.map.transposed and call.whole


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in arguments or results."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _tensors(inner)
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _tensors(inner)


def _written(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that a function of this name writes into."""
    in_place = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
    return [*_tensors(kwargs.get("out")), *(_tensors(args[:1]) if in_place else ())]
