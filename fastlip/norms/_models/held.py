"""The tensors that a model holds, their names, and where the numbers of a layer come from."""

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastlip.norms._models.restore import version_of
from fastlip.norms._operators.modules import CONVS, TRANSPOSED

#: Name under which ``torch.nn.utils.parametrize`` keeps what a parameter is computed from.
_PARAMETRIZATIONS = "parametrizations"


@dataclass(frozen=True, eq=False)
class Source:
    """Where numbers come from: from a tensor that a module holds, or from one that the run computed.

    Attributes:
        module: place of the module in :func:`modules_of`.
        attribute: name of the module's tensor.
        rows: those that are taken, from the first to before the second.
        transposed: whether they are a transposed matrix.
        computed: the numbers themselves, which then are no other model's.
    """

    module: int = -1
    attribute: str = ""
    rows: tuple[int, int] | None = None
    transposed: bool = False
    computed: Tensor | None = None

    def of(self, modules: Sequence[nn.Module]) -> Tensor:
        """The numbers, of a model with these modules."""
        if self.computed is not None:
            return self.computed
        held: Tensor = getattr(modules[self.module], self.attribute).detach()
        if self.rows is not None:
            held = held[slice(*self.rows)]
        return held.mT if self.transposed else held

    @property
    def key(self) -> Hashable:
        """Equal for sources of the same numbers, as long as none is computed."""
        return self.module, self.attribute, self.rows, self.transposed, self.computed is not None


@dataclass(frozen=True, eq=False)
class Factors:
    """Numbers that the channels of a tensor are multiplied by, or divided by where ``inverse``.

    Attributes:
        source: where they come from.
        inverse: whether they divide.
        shape: the shape that they were given in.
    """

    source: Source
    inverse: bool
    shape: tuple[int, ...]

    def of(self, modules: Sequence[nn.Module]) -> Tensor:
        """The factors, [C] float64, of a model with these modules."""
        numbers = self.source.of(modules).double().flatten()
        return numbers.reciprocal() if self.inverse else numbers

    def along(self, axis: int, axes: int, channels: int) -> bool:
        """Whether these are one factor for each of so many channels, on one axis of a tensor with so many axes."""
        shape = (1,) * (axes - len(self.shape)) + tuple(self.shape)
        return shape[axis] == channels == torch.Size(shape).numel()

    @classmethod
    def computed(cls, numbers: Tensor, axes: int) -> "Factors":
        """Factors [C] of the second axis of a tensor with so many axes behind it, that the run computed."""
        return cls(Source(computed=numbers), False, (numbers.numel(), *(1,) * axes))

    @property
    def key(self) -> Hashable:
        """As :attr:`Source.key`."""
        return self.source.key, self.inverse, self.shape


class _Held(NamedTuple):
    """A tensor that a module holds: its qualified name and that of the module, and the module's place."""

    name: str
    owner: str
    module: int
    attribute: str
    tensor: Tensor
    version: int
    address: int


class HeldTensors:
    """All parameters, buffers and other tensors of a model, as they are before it runs, by identity."""

    def __init__(self, model: nn.Module) -> None:
        self.model_name = type(model).__name__
        self.parameters = {id(p): name for name, p in model.named_parameters()}
        self._held: dict[int, _Held] = {}
        self._modules = list(model.modules())
        self._names = {id(module): name for name, module in model.named_modules()}
        self._places = {id(module): place for place, module in enumerate(self._modules)}
        for place, module in enumerate(self._modules):
            own = vars(module)
            for held in (own["_parameters"], own["_buffers"], own):
                for attribute, t in held.items():
                    if isinstance(t, Tensor) and id(t) not in self._held:
                        owner = self._names[id(module)]
                        name = f"{owner}.{attribute}" if owner else attribute
                        self._held[id(t)] = _Held(name, owner, place, attribute, t, version_of(t), _address(t))

    def __contains__(self, t: Tensor) -> bool:
        return id(t) in self._held

    def name(self, tensor: int) -> str:
        """Qualified name of a tensor, from its identity."""
        return self._held[tensor].name

    def is_unchanged(self, tensor: int) -> bool:
        """Whether a tensor has its data where they were, and was not written into."""
        held = self._held[tensor]
        return _address(held.tensor) == held.address and version_of(held.tensor) == held.version

    def multiplies(self, tensor: int) -> bool:
        """Whether a tensor may be a weight: it holds no integers, and is no bias or running mean by its name."""
        held = self._held[tensor]
        numbers = held.tensor.is_floating_point() or held.tensor.is_complex()
        return numbers and "bias" not in held.attribute and held.attribute != "running_mean"

    def has_variance(self, tensors: Collection[int]) -> bool:
        """Whether one of the tensors is a BatchNorm's running variance."""
        return any(self._held[tensor].attribute == "running_var" for tensor in tensors)

    def batchnorm(self, variance: Tensor, weight: Tensor | None, eps: float) -> _BatchNorm | None:
        """The BatchNorm that holds these two, and has this eps."""
        held = self._held.get(id(variance))
        module = None if held is None else self._modules[held.module]
        if not isinstance(module, _BatchNorm) or module.eps != eps:
            return None
        return module if module.running_var is variance and module.weight is weight else None

    def place(self, module: nn.Module) -> int:
        """The module's place in :func:`modules_of`."""
        return self._places[id(module)]

    def module_name(self, module: nn.Module) -> str:
        """Qualified name of a module; of the model itself that of its class."""
        return self._names[id(module)] or self.model_name

    def below(self, module: nn.Module) -> set[int]:
        """The tensors of a module and of what it holds."""
        return {
            id(t)
            for part in module.modules()
            for held in (part._parameters, part._buffers, vars(part))
            for t in held.values()
            if isinstance(t, Tensor) and t in self
        }

    def layer_name(self, tensors: Collection[int]) -> str:
        """The name of a map whose numbers are, or are computed from, these tensors.

        That of the layer whose weight it is, or of the tensor; of several tensors that of the module that has them all.
        """
        if len(tensors) == 1:
            held = self._held[next(iter(tensors))]
            layer = isinstance(self._modules[held.module], (*CONVS, *TRANSPOSED, nn.Linear, _BatchNorm))
            if _PARAMETRIZATIONS not in held.owner.split("."):
                return (held.owner or self.model_name) if layer and held.attribute == "weight" else held.name
        paths = []
        for tensor in tensors:
            path = self._held[tensor].owner.split(".")
            paths.append(path[: path.index(_PARAMETRIZATIONS)] if _PARAMETRIZATIONS in path else path)
        shared = 0
        while all(len(path) > shared and path[shared] == paths[0][shared] for path in paths):
            shared += 1
        return ".".join(paths[0][:shared]) or self.model_name

    def source(
        self,
        tensors: Collection[int],
        numbers: Tensor,
        *,
        flat: bool = False,
    ) -> Source:
        """Where ``numbers``, which are computed from these tensors, can be read in each model of this structure.

        With ``flat`` their order does not matter.
        """
        computed = Source(computed=numbers.detach())
        if len(tensors) != 1:
            return computed
        held = self._held[next(iter(tensors))]
        t = held.tensor
        if t.dtype != numbers.dtype or version_of(t) != held.version or not held.address or not numbers.numel():
            return computed
        place = Source(held.module, held.attribute)
        address, size = _address(numbers), t.element_size()
        if address == held.address == _address(t):
            if (numbers.shape, numbers.stride()) == (t.shape, t.stride()):
                return place
            if flat and numbers.numel() == t.numel() and numbers.is_contiguous() and t.is_contiguous():
                return place
            if t.dim() == 2 and (numbers.shape, numbers.stride()) == (t.mT.shape, t.mT.stride()):
                return Source(held.module, held.attribute, transposed=True)
        rows = t.dim() == numbers.dim() >= 1 and numbers.shape[1:] == t.shape[1:] and numbers.stride() == t.stride()
        if rows and address and t.stride(0):
            first, rest = divmod(address - held.address, t.stride(0) * size)
            if not rest and 0 <= first <= len(t) - len(numbers):
                return Source(held.module, held.attribute, rows=(first, first + len(numbers)))
        return computed


def _address(t: Tensor) -> int:
    """The address of a tensor's data; 0 where it has none, as inside of a transform of torch.func."""
    if t.layout != torch.strided or t.device.type == "meta":
        return 0
    try:
        return t.data_ptr()
    except RuntimeError:
        return 0


def storage_address(t: Tensor) -> int:
    """The address of what a tensor is a view of; 0 as :func:`_address`."""
    return t.untyped_storage().data_ptr() if _address(t) else 0
