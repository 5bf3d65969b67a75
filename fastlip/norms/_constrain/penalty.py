"""A penalty on norms above a bound, for those who regularise instead of constraining."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastlip._arguments import integer
from fastlip.norms._constrain.choice import ConstrainableLayer, Layers, constrainable_layers
from fastlip.norms._constrain.norm_gradients import (
    BETWEEN_WAVES,
    NormGradient,
    computable,
    encode,
    norm_gradients,
    with_wave,
)
from fastlip.norms._constrain.one_layer import positive_bound
from fastlip.norms._constrain.transforms import is_batched, outside_of_transforms, unwrapped, without_autocast
from fastlip.norms._models.wrappers import bare_model
from fastlip.norms._options import NormOptions
from fastlip.norms._solvers.waves import Waves, has_waves


class SpectralPenalty:
    """The sum over layers of max(0, norm - bound)^2, with its gradient in the weights.

    Made by :func:`spectral_penalty`. Each call takes Krylov steps from the vectors of the last one, and on a CPU every
    fourth looks for waves that overtake. The weights are read from the model, in which the layers must still be.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[ConstrainableLayer],
        bound: float,
        iterations: int,
        generator: torch.Generator,
    ) -> None:
        self._model = model
        self._layers, self._bound, self._iterations = list(layers), bound, iterations
        self._vectors = [layer.start_vectors(generator) for layer in layers]
        self._encoded = [number for layer in layers for number in encode(layer.geometry)]
        self._norms: list[Tensor] = []
        self._waves: dict[int, Waves] = {}
        self._calls = 0

    def norms(self) -> dict[str, Tensor]:
        """The norm of each layer, by name: a scalar approached from below, with its gradient in the weight.

        Raises:
            ValueError: a layer was replaced, or the weights are several; the message names it.
        """
        self._require_present()
        weights = [layer.weight for layer in self._layers]
        if not weights:
            return {}
        if any(map(is_batched, weights)):
            raise ValueError("a penalty on norms cannot take several weights at once")
        self._vectors = [v.to(w.device) for v, w in zip(self._vectors, weights, strict=True)]
        with torch.no_grad(), outside_of_transforms():
            own = [unwrapped(weight.detach()) for weight in weights]
            starts = self._vectors if torch.compiler.is_compiling() else self._starts(own)
            found = norm_gradients(own, starts, self._encoded, self._iterations)
        self._vectors, self._norms = found[::4], found[1::4]
        with without_autocast(weights[0].device):
            return {
                layer.name: NormGradient(left, right).norm_of(computable(weight))
                for layer, weight, left, right in zip(self._layers, weights, found[2::4], found[3::4], strict=True)
            }

    def _require_present(self) -> None:
        if torch.compiler.is_compiling():
            return
        present = set(self._model.modules())
        for layer in self._layers:
            if layer.module not in present:
                raise ValueError(
                    f"layer {layer.name}: it was replaced after its penalty, which reads the former one; call "
                    "spectral_penalty again"
                )

    def _starts(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """The vectors of all layers, and now and then on a CPU those of waves that overtake."""
        self._calls += 1
        if self._calls % BETWEEN_WAVES:
            return self._vectors
        starts = list(self._vectors)
        for place, (layer, weight) in enumerate(zip(self._layers, weights, strict=True)):
            op = layer.geometry.with_weight(weight.reshape(layer.geometry.weight.shape))
            if weight.device.type == "cpu" and has_waves(op):
                if place not in self._waves:
                    self._waves[place] = Waves(op)
                starts[place] = with_wave(starts[place], self._waves[place], op, self._norms[place][1].item())
        return starts

    def __call__(self) -> Tensor:
        """The penalty, a scalar; raises as :meth:`norms` does."""
        norms = list(self.norms().values())
        if not norms:
            return torch.zeros(())
        terms = [(norm - self._bound).clamp_min(0.0).square().to(norms[0]) for norm in norms]
        return torch.stack(terms).sum()


def spectral_penalty(
    model: nn.Module,
    input_shape: Sequence[int],
    *,
    bound: float = 1.0,
    layers: Layers | None = None,
    iterations: int = 1,
    generator: torch.Generator | None = None,
) -> SpectralPenalty:
    """A function of no arguments that gives the sum over layers of max(0, norm - bound)^2, to add to a loss.

    The norms are those of the convolutions as the model applies them, on inputs of ``input_shape``. They are tracked as
    in :func:`constrain_norms`, from below, and certify nothing: use :func:`layer_norms` for that.

    Args:
        model: the model, which is left as it is.
        input_shape: shape of one input without the batch axis, such as (3, 32, 32).
        bound: norms up to this one cost nothing.
        layers: as in :func:`constrain_norms`.
        iterations: Krylov steps in each call.
        generator: of the first vectors; if None one with a random seed.

    Raises:
        TypeError: an argument is of the wrong type; the message names it.
        ValueError: as :func:`constrain_norms`.

    Example:
        >>> from torch import nn
        >>> import fastlip
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 5))
        >>> penalty = fastlip.norms.spectral_penalty(model, (3, 8, 8), bound=0.5)
        >>> (0.01 * penalty()).backward()
    """
    bound, iterations = positive_bound(bound), integer(iterations, "iterations")
    root = bare_model(model)
    found = constrainable_layers(root, input_shape, layers)
    return SpectralPenalty(root, found, bound, iterations, NormOptions(generator=generator).resolved([]).generator)
