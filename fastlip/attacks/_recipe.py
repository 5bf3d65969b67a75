"""Small networks made anew after each step of training, without tracing the model again."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, fx, nn

from fastlip.attacks._interleaved import OneFunction, SmallNetwork
from fastlip.attacks._rewrite import folded_weights
from fastlip.ops import InterleavedLayers, LayerGeometry


@dataclass(frozen=True)
class Recipe:
    """What a copy that is one function is made of.

    Attributes:
        layers: of the function.
        names: of the model's modules with their weights, each with the name of the BatchNorm folded into it; None of
            pools.
        is_flat: whether the output is [B, N].
    """

    layers: tuple[LayerGeometry, ...]
    names: tuple[tuple[str, str | None] | None, ...]
    is_flat: bool

    def copy_of(self, model: nn.Module) -> OneFunction:
        """A copy of a model of the same structure, with the weights that it has now.

        Raises:
            AttributeError: the structure is another one. Not all that is different is seen.
        """
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
        return OneFunction(InterleavedLayers(self.layers, weights, biases), self.is_flat)


def recipe_of(
    made: fx.GraphModule, size: tuple[int, int], names: Mapping[int, str], folded: Mapping[str, str]
) -> Recipe | None:
    """How to make a copy of a model again on maps of this size; None if it is not one function.

    Args:
        made: the copy.
        size: of the images, whose copy has run.
        names: in the model, of modules by their ids.
        folded: names of BatchNorms that were folded into layers, by the names of these.
    """
    modules = dict(made.named_modules())
    calls = [node for node in made.graph.nodes if node.op not in ("placeholder", "output")]
    small = modules[str(calls[0].target)] if len(calls) == 1 and calls[0].op == "call_module" else None
    (output,) = (node for node in made.graph.nodes if node.op == "output")
    if not isinstance(small, SmallNetwork) or output.args != (calls[0],):
        return None
    whole, *rest = small.ways.get(size, [None])
    if rest or not isinstance(whole, OneFunction):
        return None
    own = [None if place is None else names[place] for place in whole.own]
    folded_into = tuple(None if name is None else (name, folded.get(name)) for name in own)
    return Recipe(whole.interleaved.layers, folded_into, whole.is_flat)
