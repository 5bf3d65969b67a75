"""Small networks made anew after each step of training, without tracing the model again."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from fastlip.attacks._interleaved import OneFunction, SmallNetwork
from fastlip.attacks._rewrite import HOOKS, POINTWISE, folded_weights
from fastlip.ops import InterleavedLayers, LayerGeometry


@dataclass(frozen=True)
class _Held:
    """A parameter or buffer of the model."""

    name: str


class _SoFar:
    """The place of the value so far among a function's arguments; the class itself, of which there are no copies."""


_PLAIN = (bool, int, float, str, type(None))
#: A function element by element, and its arguments.
_Pointwise = tuple[Callable[..., Tensor], tuple[object, ...], dict[str, Any]]


class Remade(nn.Module):
    """A copy by a recipe, for images of one size: functions element by element, then one function."""

    def __init__(self, before: Sequence[_Pointwise], function: OneFunction) -> None:
        super().__init__()
        self.before, self.function = before, function

    def forward(self, x: Tensor) -> Tensor:
        """What the model gives, up to rounding."""
        for function, arguments, keywords in self.before:
            x = function(*(x if given is _SoFar else given for given in arguments), **keywords)
        found: Tensor = self.function(x)
        return found


@dataclass(frozen=True)
class Recipe:
    """What a copy is made of that is one function, perhaps behind a normalisation.

    Attributes:
        structure: of the model, as :func:`structure_of` gives it.
        before: what is computed element by element before.
        layers: of the function.
        names: of the model's modules with their weights, each with the name of the BatchNorm folded into it; None of
            pools.
        is_flat: whether the output is [B, N].
    """

    structure: object
    before: tuple[_Pointwise, ...]
    layers: tuple[LayerGeometry, ...]
    names: tuple[tuple[str, str | None] | None, ...]
    is_flat: bool

    def copy_of(self, model: nn.Module) -> Remade:
        """A copy of a model, with the weights that it has now.

        Raises:
            ValueError: its structure is another one by now.
            AttributeError: likewise. A module's forward may do something else without either.
        """
        if structure_of(model) != self.structure:
            raise ValueError("the model has changed otherwise than in its weights")
        weights: list[Tensor | None] = []
        biases: list[Tensor | None] = []
        for names in self.names:
            weight, bias = None, None
            if names is not None:
                layer, norm = (None if name is None else model.get_submodule(name) for name in names)
                assert isinstance(layer, nn.Conv2d | nn.Linear)
                weight, bias = (layer.weight, layer.bias) if norm is None else folded_weights(layer, norm)
            weights.append(weight)
            biases.append(bias)

        def now(given: object) -> object:
            if not isinstance(given, _Held):
                return given
            path, _, name = given.name.rpartition(".")
            held: Tensor = getattr(model.get_submodule(path), name)
            return held.detach().clone()

        before = [(f, tuple(map(now, given)), keywords) for f, given, keywords in self.before]
        return Remade(before, OneFunction(InterleavedLayers(self.layers, weights, biases), self.is_flat))


def recipe_of(
    made: fx.GraphModule, size: tuple[int, int], names: Mapping[int, str], folded: Mapping[str, str], model: nn.Module
) -> Recipe | None:
    """How to make a copy of a model again on maps of this size; None if more than one function is needed.

    Args:
        made: the copy.
        size: of the images, whose copy has run.
        names: in the model, of modules by their ids.
        folded: names of BatchNorms that were folded into layers, by the names of these.
        model: what it is a copy of.
    """
    modules = dict(made.named_modules())
    value, *nodes = (node for node in made.graph.nodes if node.op != "get_attr")
    before: list[_Pointwise] = []
    while nodes and (node := nodes[0]).op == "call_function" and node.target in POINTWISE:
        arguments = tuple(_argument(given, value) for given in node.args)
        if any(isinstance(given, fx.Node) for given in (*arguments, *node.kwargs.values())):
            return None
        before.append((node.target, arguments, dict(node.kwargs)))
        value = nodes.pop(0)
    if len(nodes) != 2 or nodes[0].op != "call_module" or nodes[0].args != (value,) or nodes[1].args != (nodes[0],):
        return None
    small = modules[str(nodes[0].target)]
    whole, *rest = small.ways.get(size, [None]) if isinstance(small, SmallNetwork) else [None]
    if rest or not isinstance(whole, OneFunction):
        return None
    own = [None if place is None else names[place] for place in whole.own]
    folded_into = tuple(None if name is None else (name, folded.get(name)) for name in own)
    return Recipe(structure_of(model), tuple(before), whole.interleaved.layers, folded_into, whole.is_flat)


def code_of(model: nn.Module) -> object:
    """Classes, forwards and hooks of all modules, but for the model's own hooks, which see what its copies give."""
    parts = [(type(part), id(vars(part).get("forward"))) for part in model.modules()]
    inner = list(model.modules())[1:]
    return parts, [[tuple(getattr(part, hooks, ())) for hooks in HOOKS] for part in inner]


def structure_of(model: nn.Module) -> object:
    """What differs where a model computes something else with the same weights, as far as it can be seen."""
    return code_of(model), [(name, _settings(part)) for name, part in model.named_modules()]


def _settings(module: nn.Module) -> list[tuple[str, object]]:
    """Attributes that are numbers, words, or tuples of them."""
    return [
        (name, value)
        for name, value in vars(module).items()
        if name != "training"
        and all(isinstance(part, _PLAIN) for part in (value if isinstance(value, tuple) else (value,)))
    ]


def _argument(given: object, value: fx.Node) -> object:
    """An argument of a function that is given ``value``, the only one that depends on the input."""
    if given is value:
        return _SoFar
    return _Held(str(given.target)) if isinstance(given, fx.Node) and given.op == "get_attr" else given
