"""Whether layers do what is said of them: their recorded outputs against those of the maps whose norms are taken."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastlip.norms._models.closeness import gap, rounding_of
from fastlip.norms._models.hooks import is_intercepted
from fastlip.norms._models.layer_output import layer_output
from fastlip.norms._models.linear_calls import LinearMap

#: The allowed difference relative to the largest sum of magnitudes, which does not shrink where terms cancel, over the
#: one relative to the largest output.
_OF_MAGNITUDES = 0.1
#: Magnitudes of the inputs that a layer with hooks is called on.
_MAGNITUDES = (1.0, 30.0, 1e3)


@dataclass(frozen=True, eq=False)
class Use:
    """One call of a layer or of a function.

    Attributes:
        name: qualified name of the layer, or of the function's weight.
        module: the layer; None for a function.
        input: its input, after forward pre-hooks.
        output: its output, after forward hooks.
        map: what it is said to compute, as :class:`LinearMap`; by default what its class says.
        own: whether it has a forward of its own, which may treat other inputs differently.
    """

    name: str
    module: nn.Module | None
    input: Tensor
    output: Tensor
    map: LinearMap | None = None
    own: bool = False

    def said(self, x: Tensor, *, magnitudes: bool = False) -> Tensor:
        """What it is said to make of x."""
        if self.map is not None:
            return self.map.apply(x, magnitudes=magnitudes)
        assert self.module is not None
        return layer_output(self.module, x, self.output.shape, magnitudes=magnitudes)


def disagreements(uses: Sequence[Use]) -> dict[str, str]:
    """The layers that did something else than their weight and settings, as they are now, say, each with the reason.

    A layer with hooks, or a ``__call__`` or forward of its own, is called again: their effect on its input was not
    recorded, and they may treat other inputs differently. Devices are read once for all layers.
    """
    found: dict[str, str] = {}
    compared: list[tuple[Use, Tensor, Tensor]] = []
    for use in uses:
        seen: list[tuple[Tensor, object]] = [(use.input, use.output)]
        if use.module is not None and (use.own or is_intercepted(use.module)):
            seen += [(x, use.module(x.clone())) for x in (use.input, *probe_inputs(use.input))]
        for x, output in seen:
            try:
                said = use.said(x)
            except (TypeError, ValueError) as error:  # there is no such map
                found[use.name] = str(error)
                break
            except RuntimeError:
                found[use.name] = _disagreement(use, "that map takes another shape than its input's")
                break
            if not isinstance(output, Tensor) or output.shape != said.shape:
                found[use.name] = _disagreement(use, "its output has another shape")
                break
            compared.append((use, x, gap(said, output)))
    if not compared:
        return found
    gaps = torch.stack([gap.cpu() for *_, gap in compared]).tolist()
    for (use, x, _), (difference, largest) in zip(compared, gaps, strict=True):
        rounding = rounding_of(use.output)
        # Below this a dtype's numbers are equally far apart.
        tiny = 4.0 * torch.finfo(use.output.dtype).tiny
        if difference <= rounding * largest + tiny:
            continue
        with torch.no_grad():
            sums = use.said(x.abs(), magnitudes=True).abs().amax().item()
        if not difference <= _OF_MAGNITUDES * rounding * sums:
            how = f"they differ by {difference / max(largest, tiny):.2g} of its largest output"
            found.setdefault(use.name, _disagreement(use, how))
    return found


def probe_inputs(x: Tensor) -> list[Tensor]:
    """Inputs of x's shape and of several magnitudes: a hook may leave x itself unchanged, and not these."""
    generator = torch.Generator().manual_seed(5)
    draws = (torch.randn(x.shape, generator=generator, dtype=torch.float64) for _ in _MAGNITUDES)
    return [(size * draw).to(x.device, x.dtype) for size, draw in zip(_MAGNITUDES, draws, strict=True)]


def _disagreement(use: Use, how: str) -> str:
    return (
        f"{'the function' if use.module is None else type(use.module).__name__} does not apply the map that its weight "
        f"and settings describe ({how}): a hook, a forward that does more or that changes it for the call and puts it "
        "back, or other weights in its place can do that; fastlip.norms.layer_operator takes the map of such a layer"
    )
