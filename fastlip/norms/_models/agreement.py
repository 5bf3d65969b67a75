"""Whether layers do what is said of them: their outputs as they ran, beside those of the maps whose norms are taken."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastlip.norms._models.model import Refused, is_dressed
from fastlip.norms._operators.modules import BATCHNORMS, TRANSPOSED, batchnorm_scales, module_operator
from fastlip.norms._operators.operator import Operator
from fastlip.norms._operators.torch_operator import TorchOperator

#: Largest difference between two ways to compute one layer, relative to its largest output, by what it computed in.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
#: On a GPU convolutions of float32 numbers may be done in TF32.
_ROUNDING_TF32 = 1e-2
#: The same relative to the largest sum of magnitudes, which does not shrink where terms cancel.
_OF_MAGNITUDES = 0.1
#: Of inputs on which a layer with hooks is tried.
_MAGNITUDES = (1.0, 30.0, 1e3)


@dataclass(frozen=True, eq=False)
class Use:
    """One call of a layer: what it was given, after hooks before it, and what came out, after those behind it."""

    name: str
    module: nn.Module
    input: Tensor
    output: Tensor


def apply_operator(
    operator: Operator,
    x: Tensor,  # [B, *input_shape], or [B, ..., Cin] where the operator is a matrix
    bias: Tensor | None = None,  # [Cout]
    *,
    transposed: bool = False,
    magnitudes: bool = False,
) -> Tensor:
    """What an operator makes of x, by torch and in x's dtype; of its adjoint where ``transposed``.

    With ``magnitudes`` weights and bias are replaced by their absolute values.
    """
    weight = operator.weight.to(x.dtype)
    bias = None if bias is None else bias.detach().to(x.dtype)
    if magnitudes:
        weight, bias = weight.abs(), None if bias is None else bias.abs()
    if not operator.kernel and operator.groups == 1:
        return torch.nn.functional.linear(x, weight, bias)
    by_torch = TorchOperator(operator, weight)
    y = by_torch.adjoint(x) if transposed else by_torch.forward(x)
    return y if bias is None else y.add_(bias.view(-1, *(1,) * (y.dim() - 2)))


def layer_output(module: nn.Module, x: Tensor, output_shape: Sequence[int], *, magnitudes: bool = False) -> Tensor:
    """The output of a layer on x, [B, ...], by the map that is said to be its own, in float32 at least.

    Raises:
        ValueError: there is no such map, see :func:`module_operator`.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if isinstance(module, BATCHNORMS):
        ones = (1,) * (x.dim() - 2)
        scale = batchnorm_scales([module])[0].to(x)
        shift = -scale * module.running_mean.to(x)  # type: ignore[union-attr]
        shift = shift if module.bias is None else shift + module.bias.detach().to(x)
        if magnitudes:
            scale, shift = scale.abs(), shift.abs()
        return x * scale.view(-1, *ones) + shift.view(-1, *ones)
    transposed = isinstance(module, TRANSPOSED)
    size = output_shape[2:] if transposed else None
    operator = module_operator(module, x.shape[1:], output_size=size, finite=False)
    return apply_operator(operator, x, module.bias, transposed=transposed, magnitudes=magnitudes)  # type: ignore[arg-type]


def require_agreement(uses: Sequence[Use]) -> None:
    """See that every layer did what its weight and settings, as they are now, say it does.

    A layer that hooks or a ``__call__`` of its own dress is called again, since what they do before it was not
    recorded, and what they do to other inputs may not have shown. Devices are read once for all layers.

    Raises:
        ValueError: one did not; the message names it.
    """
    compared: list[tuple[Use, Tensor, Tensor]] = []
    for use in uses:
        seen = [(use.input, use.output)]
        if is_dressed(use.module):
            seen += [(x, use.module(x.clone())) for x in (use.input, *unlike(use.input))]
        for x, output in seen:
            said = layer_output(use.module, x, use.output.shape)
            if not isinstance(output, Tensor) or output.shape != said.shape:
                raise _disagreement(use, "its output has another shape")
            compared.append((use, x, _gap(said, output)))
    if not compared:
        return
    gaps = torch.stack([gap.cpu() for *_, gap in compared]).tolist()
    for (use, x, _), (difference, largest) in zip(compared, gaps, strict=True):
        rounding = rounding_of(use.output)
        # Below it a dtype's numbers are equally far apart.
        tiny = 4.0 * torch.finfo(use.output.dtype).tiny
        if difference <= rounding * largest + tiny:
            continue
        with torch.no_grad():
            sums = layer_output(use.module, x.abs(), use.output.shape, magnitudes=True).abs().amax().item()
        if not difference <= _OF_MAGNITUDES * rounding * sums:
            raise _disagreement(use, f"they differ by {difference / max(largest, tiny):.2g} of its largest output")


def unlike(x: Tensor) -> list[Tensor]:
    """Inputs of x's shape and of several magnitudes, whatever x is: it may show nothing of what a hook does."""
    generator = torch.Generator().manual_seed(5)
    draws = (torch.randn(x.shape, generator=generator, dtype=torch.float64) for _ in _MAGNITUDES)
    return [(size * draw).to(x.device, x.dtype) for size, draw in zip(_MAGNITUDES, draws, strict=True)]


def rounding_of(output: Tensor) -> float:
    """Relative difference that rounding may make between two ways to compute a layer."""
    if output.dtype == torch.float32 and output.device.type == "cuda":
        return _ROUNDING_TF32
    return _ROUNDING.get(output.dtype, _ROUNDING[torch.bfloat16])


def agree(said: Tensor, seen: Tensor, rounding: float) -> bool:
    """Whether two results are one but for rounding, non-finite values in the same places."""
    if said.shape != seen.shape:
        return False
    if not said.numel():
        return True
    said, seen = said.double(), seen.double()
    difference = (said - seen).abs()
    largest = torch.maximum(said.abs(), seen.abs())
    finite = torch.isfinite(largest)
    alike = finite | (said == seen) | (said.isnan() & seen.isnan())
    difference, largest = (torch.where(finite, t, 0.0).amax() for t in (difference, largest))
    return bool(alike.all() & (difference <= rounding * largest))


def _gap(said: Tensor, seen: Tensor) -> Tensor:
    """Largest difference and largest magnitude, [2] float64; what is not finite is left to others."""
    if not said.numel():
        return said.new_zeros(2, dtype=torch.float64)
    both = torch.stack([(seen - said).abs(), said.abs(), seen.abs().to(said.dtype)]).nan_to_num_(0.0, 0.0, 0.0)
    difference, one, other = both.flatten(1).amax(1).double()
    return torch.stack([difference, torch.maximum(one, other)])


def _disagreement(use: Use, how: str) -> Refused:
    return Refused(
        f"layer {use.name} does not apply the map that its weight and settings describe ({how}): a hook, a forward "
        "that changes it for the call and puts it back, or other weights in its place can do that; check=False leaves "
        "this comparison out"
    )
