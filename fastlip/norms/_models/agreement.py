"""Whether layers do what their weights say: their recorded outputs against those of the maps whose norms are taken."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastlip.norms._models.closeness import gap, rounding_of
from fastlip.norms._models.hooks import is_intercepted
from fastlip.norms._models.inputs import Refused
from fastlip.norms._models.layer_output import layer_output

#: The allowed difference relative to the largest sum of magnitudes, which does not shrink where terms cancel, over the
#: one relative to the largest output.
_OF_MAGNITUDES = 0.1
#: Magnitudes of the inputs that a layer with hooks is called on.
_MAGNITUDES = (1.0, 30.0, 1e3)


@dataclass(frozen=True, eq=False)
class Use:
    """One call of a layer: its input after forward pre-hooks, and its output after forward hooks."""

    name: str
    module: nn.Module
    input: Tensor
    output: Tensor


def require_agreement(uses: Sequence[Use]) -> None:
    """Check that every layer did what its weight and settings, as they are now, say it does.

    A layer with hooks or a ``__call__`` of its own is called again: their effect on its input was not recorded, and
    they may treat other inputs differently. Devices are read once for all layers.

    Raises:
        ValueError: a layer did not; the message names it.
    """
    compared: list[tuple[Use, Tensor, Tensor]] = []
    for use in uses:
        seen = [(use.input, use.output)]
        if is_intercepted(use.module):
            seen += [(x, use.module(x.clone())) for x in (use.input, *probe_inputs(use.input))]
        for x, output in seen:
            said = layer_output(use.module, x, use.output.shape)
            if not isinstance(output, Tensor) or output.shape != said.shape:
                raise _disagreement(use, "its output has another shape")
            compared.append((use, x, gap(said, output)))
    if not compared:
        return
    gaps = torch.stack([gap.cpu() for *_, gap in compared]).tolist()
    for (use, x, _), (difference, largest) in zip(compared, gaps, strict=True):
        rounding = rounding_of(use.output)
        # Below this a dtype's numbers are equally far apart.
        tiny = 4.0 * torch.finfo(use.output.dtype).tiny
        if difference <= rounding * largest + tiny:
            continue
        with torch.no_grad():
            sums = layer_output(use.module, x.abs(), use.output.shape, magnitudes=True).abs().amax().item()
        if not difference <= _OF_MAGNITUDES * rounding * sums:
            raise _disagreement(use, f"they differ by {difference / max(largest, tiny):.2g} of its largest output")


def probe_inputs(x: Tensor) -> list[Tensor]:
    """Inputs of x's shape and of several magnitudes: a hook may leave x itself unchanged, and not these."""
    generator = torch.Generator().manual_seed(5)
    draws = (torch.randn(x.shape, generator=generator, dtype=torch.float64) for _ in _MAGNITUDES)
    return [(size * draw).to(x.device, x.dtype) for size, draw in zip(_MAGNITUDES, draws, strict=True)]


def _disagreement(use: Use, how: str) -> Refused:
    return Refused(
        f"layer {use.name} does not apply the map that its weight and settings describe ({how}): a hook, a forward "
        "that changes it for the call and puts it back, or other weights in its place can do that; check=False leaves "
        "this comparison out"
    )
