"""The reference of the operators that serve operator norms."""

import math

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.grad import conv2d_input

#: Halvings of a bracket, enough for the resolution of float64.
_BISECTIONS = 70


def pack_weights_(out: Tensor, weights: list[Tensor], groups: list[int], adjoint: bool) -> None:
    at = 0
    for weight, count in zip(weights, groups, strict=True):
        taps = math.prod(weight.shape[2:])
        if count == weight.shape[0] > 1 == weight.shape[1]:  # depthwise: one block of channels, [1, taps, 1, channels]
            blocks = weight.reshape(1, count, 1, taps).permute(0, 3, 2, 1)
        else:
            blocks = weight.reshape(count, -1, weight.shape[1], taps)  # [groups, Cout / groups, Cin / groups, taps]
            blocks = blocks.permute(0, 3, 1, 2) if adjoint else blocks.permute(0, 3, 2, 1)
        for group in blocks:
            for block in group.split(64, dim=2):
                block = functional.pad(block, (0, -block.shape[2] % 16)).flatten()
                out[at : at + len(block)] = block
                at += len(block)


def operator_step_(
    out: Tensor,
    out_square: Tensor,
    x: Tensor,
    x_square: Tensor | None,
    previous: Tensor | None,
    previous_square: Tensor | None,
    weights: Tensor,
    problems: Tensor,
    tiles: Tensor,
    gather_groups: Tensor,
    entries: Tensor,
    max_vectors: int,
    parts: int,
    matmul_precision: str,
    active: Tensor | None,
) -> None:
    """Each target element is a sum over the tables; tiles serve only to find the gather groups of an operator."""
    tile_rows, gather_group_rows = tiles.tolist(), gather_groups.tolist()
    for index, row in enumerate(problems.tolist()):
        if active is not None and not active[index]:
            continue
        depthwise, source_at, target_at, weight_at, vector_at, b, groups, taps, k, n, *rest = row
        from_pixels, to_pixels, tile_at, count = rest
        source = x[source_at : source_at + b * from_pixels * groups * k].reshape(b, from_pixels, groups, k)
        kernel = _unpacked(weights[weight_at:], bool(depthwise), groups, taps, k, n)
        target = x.new_zeros(b, to_pixels, groups, n)
        for gather_group in sorted({tile[1] for tile in tile_rows[tile_at : tile_at + count]}):
            t, m, taps_at, targets_at, sources_at = gather_group_rows[gather_group]
            total = x.new_zeros(b, m, groups, n)
            for j in range(t):
                pixels = entries[sources_at + j * m : sources_at + (j + 1) * m].long()
                read = torch.where((pixels >= 0)[:, None, None], source[:, pixels.clamp_min(0)], 0.0)
                total += torch.einsum("bmgk,gkn->bmgn", read, kernel[:, int(entries[taps_at + j])])
            target[:, entries[targets_at : targets_at + m].long()] = total
        target = target.flatten(1)
        vectors = slice(vector_at, vector_at + b)
        place = slice(target_at, target_at + target.numel())
        if x_square is not None:
            length = x_square[vectors].sqrt()[:, None]
            target = target * torch.where(length > 0, 1 / length, 0.0).to(x.dtype)
            if previous is not None and previous_square is not None:
                other = previous_square[vectors].sqrt()[:, None]
                shift = torch.where(other > 0, length / other, 0.0)
                target -= previous[place].reshape(b, -1) * shift.to(x.dtype)
        out[place] = target.flatten()
        out_square[vectors] = target.double().square().sum(1)


def _unpacked(weights: Tensor, depthwise: bool, groups: int, taps: int, k: int, n: int) -> Tensor:
    """Packed weights as [groups, taps, source channels, target channels]; a depthwise kernel is a diagonal."""
    padded, rows = -(-n // 16) * 16, taps * (1 if depthwise else k)
    blocks = weights[: groups * rows * padded].reshape(groups, rows * padded)
    columns, at = [], 0
    for first in range(0, padded, 64):
        lanes = min(64, padded - first)
        columns.append(blocks[:, at : at + rows * lanes].reshape(groups, taps, -1, lanes))
        at += rows * lanes
    kernel = torch.cat(columns, dim=-1)[..., :n]
    return torch.diag_embed(kernel[:, :, 0]) if depthwise else kernel


def indirect_convs_(
    out: list[Tensor],
    x: list[Tensor],
    weight: list[Tensor],
    table: list[Tensor],
    adjoint: list[int],
    bias: list[Tensor],
    other: list[Tensor],
    active: list[Tensor],
    relu: list[int],
) -> None:
    """One convolution after the other; an operand that has no elements is left out."""
    for result, *operands in zip(out, x, weight, table, adjoint, bias, other, active, relu, strict=True):
        _indirect_conv_(result, *operands)


def winograd_conv_(
    out: Tensor, x: Tensor, weight: Tensor, adjoint: bool, bias: Tensor, other: Tensor, active: Tensor, relu: bool
) -> None:
    """Tap by tap, in float64."""
    height, width = out.shape[2:]
    taps = _tap_matrices(weight, 9, x.shape[1], out.shape[1], adjoint).unflatten(0, (3, 3))
    taps = taps.flip(0, 1) if adjoint else taps
    padded = functional.pad(x.double(), [(height - x.shape[2] + 2) // 2] * 4)
    total = torch.zeros(out.shape, dtype=torch.float64, device=out.device)
    for i, row in enumerate(taps):
        for j, matrix in enumerate(row):
            total += torch.einsum("bchw,ck->bkhw", padded[:, :, i : i + height, j : j + width], matrix)
    _finish_(out, total, bias, other, active, relu)


def direct_conv_(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    other: Tensor,
    active: Tensor,
    stride: list[int],
    padding: list[int],
    adjoint: bool,
    relu: bool,
) -> None:
    """Tap by tap, in float64."""
    image, maps = (out, x) if adjoint else (x, out)
    (down, across), (top, left), (height, width) = stride, padding, maps.shape[2:]
    rows = max((height - 1) * down + weight.shape[2], image.shape[2] + top)
    columns = max((width - 1) * across + weight.shape[3], image.shape[3] + left)
    padded = torch.zeros(*image.shape[:2], rows, columns, dtype=torch.float64, device=out.device)
    inside = padded[:, :, top : top + image.shape[2], left : left + image.shape[3]]
    total = torch.zeros(maps.shape, dtype=torch.float64, device=out.device)
    if not adjoint:
        inside += x
    for i in range(weight.shape[2]):
        for j in range(weight.shape[3]):
            met = padded[:, :, i : i + (height - 1) * down + 1 : down, j : j + (width - 1) * across + 1 : across]
            matrix = weight[:, :, i, j].double()
            if adjoint:
                met += torch.einsum("bkhw,kc->bchw", x.double(), matrix)
            else:
                total += torch.einsum("bchw,kc->bkhw", met, matrix)
    _finish_(out, inside if adjoint else total, bias, other, active, relu)


def interleaved_layers_(
    out: Tensor, x: Tensor, weight: list[Tensor], bias: list[Tensor], geometry: list[int], active: Tensor, adjoint: bool
) -> None:
    """Layer by layer, by PyTorch's convolutions in float64."""
    batch = len(x)
    numbers = [geometry[i : i + 14] for i in range(0, len(geometry), 14)]
    sizes = [  # of the layers' maps, the input's first
        [numbers[0][0], *numbers[0][2:4]],
        *([n[1], *((n[2 + a] + 2 * n[10 + a] - n[8 + a] * (n[4 + a] - 1) - 1) // n[6 + a] + 1 for a in (0, 1))]
          for n in numbers),
    ]  # fmt: skip
    elements = [math.prod(size) if n[12] or n[13] == 1 else 0 for size, n in zip(sizes[1:], numbers, strict=True)]
    kept = active.view(-1, sum(elements), 16) if active.numel() else None  # [blocks, elements, images]
    flags = kept.transpose(1, 2).flatten(0, 1)[:batch].split(elements, 1) if kept is not None else None
    value = x.double().reshape(batch, *sizes[-1 if adjoint else 0])
    for i in reversed(range(len(numbers))) if adjoint else range(len(numbers)):
        channels, outputs, height, width, h, w, *rest = numbers[i]
        stride, dilation, padding, relu, kind = rest[:2], rest[2:4], rest[4:6], rest[6], rest[7]
        if kind == 0:
            matrix = weight[i].permute(0, 3, 1, 2).flatten(0, 1)[: channels if adjoint else outputs].double()
            kernel = (matrix.transpose(0, 1) if adjoint else matrix).unflatten(2, (h, w))
        else:  # each channel by itself: the mean, or one tap of a maximum after another
            kernel = torch.eye(h * w, dtype=torch.float64).view(h * w, 1, h, w)
            kernel = kernel.mean(0, keepdim=True) if kind == 2 else kernel
        groups, each = (1, channels) if kind == 0 else (channels, 1)
        if adjoint:
            value = value.reshape(batch, *sizes[i + 1])
            if kind == 1 and flags is not None:
                taken = flags[i].view(value.shape).unsqueeze(2) == torch.arange(h * w).view(-1, 1, 1)
                value = (value.unsqueeze(2) * taken).flatten(1, 2)
            elif relu and flags is not None:
                value = torch.where(flags[i].view(value.shape) > 0, value, 0.0)
            kernel = kernel.repeat(groups, 1, 1, 1) if kind else kernel
            size = (batch, groups * each, height, width)
            value = conv2d_input(size, kernel, value, stride, padding, dilation, groups)
            continue
        value = value.reshape(batch, channels, height, width)
        own = bias[i].double() if bias[i].numel() else None
        if kind == 1:
            value, marks = _maxima(value, (h, w), stride, padding, dilation)
            marks = torch.where(value.float() <= 0, 255, marks) if relu else marks
        else:
            kernel = kernel.repeat(groups, 1, 1, 1) if kind else kernel
            value = functional.conv2d(value, kernel, own, stride, padding, dilation, groups)
            marks = ~(value.float() <= 0)
        if elements[i] and kept is not None:
            first, block = sum(elements[:i]), -(-batch // 16) * 16
            padded = functional.pad(marks.flatten(1).to(torch.uint8), (0, 0, 0, block - batch))
            kept[:, first : first + elements[i]] = padded.unflatten(0, (-1, 16)).transpose(1, 2)
        value = value.relu() if relu else value
    out.copy_(value.reshape(out.shape))


def _maxima(
    x: Tensor, kernel: tuple[int, int], stride: list[int], padding: list[int], dilation: list[int]
) -> tuple[Tensor, Tensor]:
    """The largest element of each window, and its tap: the first one, or the last NaN."""
    top, left = padding
    padded = functional.pad(x, (left, left, top, top), value=-torch.inf)
    inside = functional.pad(torch.ones_like(x), (left, left, top, top)) > 0
    height, width = (
        (n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(padded.shape[2:], kernel, stride, dilation, strict=True)
    )
    largest = torch.full((*x.shape[:2], height, width), -torch.inf, dtype=x.dtype)
    taken = torch.full(largest.shape, -1)
    for tap in range(math.prod(kernel)):
        rows, columns = (
            slice(first := i * d, first + (n - 1) * s + 1, s)
            for i, d, n, s in zip(divmod(tap, kernel[1]), dilation, (height, width), stride, strict=True)
        )
        value, there = padded[:, :, rows, columns], inside[:, :, rows, columns]
        better = there & ((value > largest) | value.isnan() | (taken < 0))
        largest, taken = torch.where(better, value, largest), torch.where(better, tap, taken)
    return largest, taken


def _tap_matrices(weight: Tensor, taps: int, channels: int, outputs: int, adjoint: int) -> Tensor:
    """The matrices of packed taps, [taps, channels, outputs]."""
    rows, columns = (outputs, channels) if adjoint else (channels, outputs)
    matrices = weight.transpose(0, 1).flatten(1)[:, :columns].double().unflatten(0, (taps, rows))
    return matrices.mT if adjoint else matrices


def _indirect_conv_(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    table: Tensor,
    adjoint: int,
    bias: Tensor,
    other: Tensor,
    active: Tensor,
    relu: int,
) -> None:
    """Tap by tap, in float64."""
    target, sources = table[:, 0].long(), table[:, 1:].long()
    matrices = _tap_matrices(weight, sources.shape[1], x.shape[1], out.shape[1], adjoint)
    total = torch.zeros(out.shape, dtype=torch.float64, device=out.device).flatten(2)
    for tap, source in enumerate(sources.T):
        met = torch.where(source >= 0, x.flatten(2)[:, :, source.clamp_min(0)], 0.0)
        total[:, :, target] += torch.einsum("bcp,ck->bkp", met.double(), matrices[tap])
    _finish_(out, total.view(out.shape), bias, other, active, relu)


def _finish_(out: Tensor, total: Tensor, bias: Tensor, other: Tensor, active: Tensor, relu: int) -> None:
    """What follows a convolution's sums; an operand that has no elements is left out."""
    for summand in (bias[:, None, None], other):
        total = total + summand if summand.numel() else total
    total = total.to(out.dtype)
    if relu and active.numel():
        active.copy_(~(total <= 0))
    elif active.numel():
        total = torch.where(active, total, 0.0)
    out.copy_(total.relu() if relu else total)


def norm_along(weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The sum of the products of elements, in float64."""
    return (weight.double() * _norm_gradient(left, right).view(weight.shape)).sum()


def scaled_weight_grad(grad: Tensor, scaled: Tensor, left: Tensor, right: Tensor, norm: float, bound: float) -> Tensor:
    """The two terms of the product rule, in float64."""
    gradient = _norm_gradient(left, right).view(grad.shape)
    by_norm = -(grad.double() * scaled.double().view(grad.shape)).sum() / norm
    return (grad.double() * (bound / norm) + by_norm * gradient).to(grad.dtype)


def _norm_gradient(left: Tensor, right: Tensor) -> Tensor:
    """The product of two factors, or the first where the other is empty, of one axis."""
    return left.double() @ right.double() if right.dim() == 2 else left.double()


def top_eigenpairs(diagonal: Tensor, off_diagonal: Tensor) -> tuple[Tensor, Tensor]:
    """By torch's eigenvalue solver on dense matrices; eigenvectors have non-negative entries."""
    values, vectors = torch.linalg.eigh(_tridiagonal(diagonal, off_diagonal))
    return values[:, -1].clamp_min(0.0), vectors[..., -1].abs()


def krylov_bound(
    diagonal: Tensor, off_diagonal: Tensor, last: Tensor, residual: Tensor, start_overlap: Tensor, tolerance: float
) -> Tensor:
    """By eigenvalues and first entries of eigenvectors, always with all bisections."""
    finite = diagonal.isfinite().all(1) & off_diagonal.isfinite().all(1)
    diagonal, off_diagonal = diagonal.clone(), off_diagonal.clone()
    diagonal[~finite], off_diagonal[~finite] = 0.0, 0.0  # the solver refuses others
    theta, vectors = torch.linalg.eigh(_tridiagonal(diagonal, off_diagonal))
    first, steps, eps = vectors[:, 0], theta.shape[1], torch.finfo(torch.float64).eps
    top = theta[:, -1].clamp_min(0.0)
    # The eigenvalues are those of a perturbed T, and the eigenvectors are orthonormal up to rounding: F covers both.
    residual = 1.01 * (residual + 8.0 * steps * eps * theta.abs().amax(1))
    log_product = off_diagonal.log().sum(1) + last.log()

    def exceeds(t: Tensor) -> Tensor:
        gaps = t[:, None] - theta
        tail = torch.exp(log_product - gaps.log().sum(1))
        # NaN counts as above.
        return ~(tail + residual * torch.linalg.vector_norm(first / gaps, dim=1) <= start_overlap)

    # At the far end both terms are below start_overlap / 2. The logarithm of the distance from the largest eigenvalue
    # is bisected.
    far_tail = (log_product + (2.0 / start_overlap).log()) / steps
    far = torch.maximum(far_tail, (2.0 * residual / start_overlap).log()) + 1.4
    scale = torch.where(top > 0.0, top, torch.ones_like(top))
    high, low = torch.maximum(far, scale.log()) + 1.0, (scale * 1e-12).log()
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        right = exceeds(top + middle.exp())
        low, high = torch.where(right, middle, low), torch.where(right, high, middle)
    upper = (top + high.exp()).sqrt() * (1.0 + 1e-12)
    return torch.where(finite & (start_overlap > 0.0) & upper.isfinite(), upper, torch.inf)


def _tridiagonal(diagonal: Tensor, off_diagonal: Tensor) -> Tensor:
    off = off_diagonal[:, :-1]
    return torch.diag_embed(diagonal) + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
