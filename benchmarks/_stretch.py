"""The stretch that a layer attains, in float64, for bench_published_layers.py."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

#: Layers with up to this many inputs are written as dense matrices; larger ones are iterated.
DENSE = 800
Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Stretch:
    """The largest ||f(y) - f(x)|| / ||y - x|| found, and where.

    Attributes:
        attained: the stretch of the float64 copy.
        pair: the same two inputs through the layer as it is, in its own dtype.
        smallest: the smallest singular value where the dense matrix is known, else NaN.
        method: how the pair was found.
    """

    attained: float
    pair: float
    smallest: float
    method: str


def frozen(layer: nn.Module) -> nn.Module:
    """A float64 copy in eval mode that holds the weights as the layer applies them, without parametrisations."""
    out = copy.deepcopy(layer).eval()
    with torch.no_grad():
        for module in list(out.modules()):
            if parametrize.is_parametrized(module):
                # torch removes the tensor's property from the class, which the copy shares with the original.
                kind = type(module)
                module.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))
                for name in list(module.parametrizations):
                    parametrize.remove_parametrizations(module, name)
    return out.double().requires_grad_(False)


def is_affine(f: Map, shape: tuple[int, ...]) -> bool:
    """Whether f(a x + b y) = a f(x) + b f(y) + (1 - a - b) f(0) on random inputs of several magnitudes."""
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(8, *shape, generator=generator, dtype=torch.float64) for _ in range(2))
    x = x * torch.logspace(-3, 2, 8, dtype=torch.float64).reshape(8, *[1] * len(shape))
    zero = f(torch.zeros_like(x))
    gap = f(0.7 * x - 1.9 * y) - (0.7 * f(x) - 1.9 * f(y) + 2.2 * zero)
    return bool(gap.abs().max() <= 1e-9 * (1.0 + f(x).abs().max()))


def dense_matrix(f: Map, shape: tuple[int, ...]) -> Tensor:
    """The matrix of an affine map on inputs of one shape, column by column; [outputs, inputs] float64."""
    n = math.prod(shape)
    zero = f(torch.zeros(1, *shape, dtype=torch.float64)).flatten()
    basis = torch.eye(n, dtype=torch.float64)
    columns = [f(part.reshape(-1, *shape)).flatten(1) - zero for part in basis.split(256)]
    return torch.cat(columns).T


def matrix_stretch(matrix: Tensor, p: float = 2.0, q: float = 2.0) -> tuple[float, Tensor]:
    """The operator norm from l_p to l_q and an input that attains it.

    Raises:
        ValueError: there is no closed form for this pair of norms.
    """
    if (p, q) == (2.0, 2.0):
        _, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return values[0].item(), right[0]
    if p == 1.0:  # the longest column
        lengths = torch.linalg.vector_norm(matrix, q, dim=0)
        return lengths.max().item(), torch.eye(matrix.shape[1], dtype=matrix.dtype)[lengths.argmax()]
    if q == math.inf and p in (2.0, math.inf):  # the row of the largest dual norm
        lengths = torch.linalg.vector_norm(matrix, 2.0 if p == 2.0 else 1.0, dim=1)
        row = matrix[lengths.argmax()]
        return lengths.max().item(), row if p == 2.0 else row.sign()
    raise ValueError(f"no closed form for the norm from l_{p:g} to l_{q:g}")


def iterate(f: Map, x: Tensor, steps: int) -> Tensor:
    """Power iteration on J^T J at the point x by forward and reverse derivatives; the direction, of length 1."""
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    _, pull = torch.func.vjp(f, x)
    for _ in range(steps):
        v = v / torch.linalg.vector_norm(v)
        _, u = torch.func.jvp(f, (x,), (v,))
        (w,) = pull(u)
        if torch.linalg.vector_norm(w) == 0:
            break
        v = w
    return v / torch.linalg.vector_norm(v)


def ratio(f: Map, x: Tensor, y: Tensor, p: float = 2.0, q: float = 2.0) -> Tensor:
    """||f(y) - f(x)||_q / ||y - x||_p for each of a batch; [B] float64."""
    out = torch.linalg.vector_norm((f(y).double() - f(x).double()).flatten(1), q, dim=1)
    return out / torch.linalg.vector_norm((y.double() - x.double()).flatten(1), p, dim=1)


def _halve(f: Map, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The steeper half of each segment, which by the triangle inequality is as steep as the whole."""
    middle = (x + y) / 2
    keep = ratio(f, x, middle) >= ratio(f, middle, y)
    keep = keep.reshape(-1, *[1] * (x.ndim - 1))
    return torch.where(keep, x, middle), torch.where(keep, middle, y)


def search(f: Map, shape: tuple[int, ...], steps: int = 25) -> tuple[Tensor, Tensor]:
    """The steepest pair found for a map that need not be linear: (x, y), each [1, *shape] float64.

    Random pairs near and far, each narrowed to its steeper half as long as rounding allows, so that jumps are found;
    and pairs along the directions that power iteration finds at random points of several magnitudes.
    """
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(128, *shape, generator=generator, dtype=torch.float64)
    scale = torch.logspace(-2, 1, 128, dtype=torch.float64).reshape(128, *[1] * len(shape))
    far = torch.randn(128, *shape, generator=generator, dtype=torch.float64)
    pairs = [(x, x + scale * far), (scale * x, torch.zeros_like(x)), (x, -x), (x, x.flip(1))]
    for _ in range(12):
        pairs[0] = _halve(f, *pairs[0])
        pairs.append(pairs[0])
    for size in (0.0, 1e-2, 1.0, 10.0):
        for k in range(4):
            point = size * x[k : k + 1] + 1e-9 * far[k : k + 1]
            v = iterate(f, point, steps)
            pairs.append((point, point + 1e-3 * max(size, 1e-2) * v))
    first, second = (torch.cat([pair[i] for pair in pairs]) for i in (0, 1))
    apart = (second - first).flatten(1).abs().amax(1) > 0
    first, second = first[apart], second[apart]
    best = ratio(f, first, second).nan_to_num(-1.0).argmax()
    return first[best : best + 1], second[best : best + 1]


def stretch(layer: nn.Module, shape: tuple[int, ...], p: float = 2.0, q: float = 2.0) -> Stretch:
    """The stretch that a layer attains on inputs of one shape, from l_p to l_q.

    Affine layers of up to ``DENSE`` inputs are decomposed; larger ones are iterated, and others searched.

    Args:
        layer: takes [B, *shape]; left as it is, in eval mode.
        shape: of one input.
        p: norm of the inputs.
        q: norm of the outputs; norms other than 2 need a small affine layer.
    """
    f = frozen(layer)
    smallest = math.nan
    with torch.no_grad():
        affine = is_affine(f, shape)
        if affine and math.prod(shape) <= DENSE:
            matrix = dense_matrix(f, shape)
            _, direction = matrix_stretch(matrix, p, q)
            if p == q == 2.0:
                smallest = torch.linalg.svdvals(matrix)[-1].item()
            x, y = torch.zeros(1, *shape, dtype=torch.float64), direction.reshape(1, *shape)
            method = "dense matrix"
        elif (p, q) != (2.0, 2.0):
            raise ValueError("norms other than 2 need a small affine layer")
        elif affine:
            x = torch.zeros(1, *shape, dtype=torch.float64)
            y, method = iterate(f, x, 300), "power iteration"
        else:
            (x, y), method = search(f, shape), "search"
        attained = ratio(f, x, y, p, q).item()
        layer.eval()
        dtype = next((t.dtype for t in (*layer.parameters(), *layer.buffers()) if t.is_floating_point()), torch.float32)
        pair = ratio(layer, x.to(dtype), y.to(dtype), p, q).item()
    return Stretch(attained, pair, smallest, method)


def verdict(found: Stretch, promise: float, tolerance: float, orthogonal: bool) -> str:
    """One of "exceeds by x%", "below", "loose", "holds" and "not finite".

    "exceeds" takes both the float64 copy and the layer itself above the promise by more than the tolerance; "below" is
    for layers that promise that all singular values are the same; "loose" for less than 99% of the promise.
    """
    if not (math.isfinite(found.attained) and math.isfinite(found.pair)):
        return "not finite"
    excess = min(found.attained, found.pair) / promise - 1.0
    if excess > tolerance:
        return f"exceeds by {100 * excess:.2g}%"
    if orthogonal and found.smallest < promise * (1.0 - max(tolerance, 1e-3)):
        return "below"
    return "loose" if found.attained < 0.99 * promise else "holds"
