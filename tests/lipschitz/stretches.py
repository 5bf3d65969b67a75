"""How far a model stretches its inputs: a search that only runs the model and does not use fastlip."""

import contextlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Shape = tuple[int, ...]


class _Function:
    """A network as a function of single points, [N, *shape] -> [N, m]; a point may be a whole batch.

    ``eps`` is that of its dtype, or of what it returned where that is coarser.
    """

    def __init__(self, model: nn.Module, together: bool, dtype: torch.dtype, gradients: bool = False) -> None:
        self.model, self.together, self.dtype, self.gradients = model, together, dtype, gradients
        self.eps = torch.finfo(dtype).eps

    def __call__(self, points: Tensor, gradients: bool | None = None) -> Tensor:
        with torch.set_grad_enabled(self.gradients if gradients is None else gradients):
            # Copies, since some networks write into what they are given.
            if self.together:
                return self._wide(tensor_of(self.model(points.clone()))).flatten(1)
            return torch.stack([self._wide(tensor_of(self.model(p.clone()))).flatten() for p in points])

    def _wide(self, output: Tensor) -> Tensor:
        if output.is_floating_point():
            self.eps = max(self.eps, torch.finfo(output.dtype).eps)
        return output.to(torch.float64)


def tensor_of(output: Any) -> Tensor:
    """What a network returns, or the first of several things."""
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise TypeError(f"the network returned {type(output).__name__}")
    return output


@dataclass
class _Search:
    """The largest stretch seen, and between which points.

    Differences as small as rounding count less by what rounding may have made of them.
    """

    function: _Function
    generator: torch.Generator
    best: float = 0.0
    pair: tuple[Tensor, Tensor] | None = None

    @property
    def step(self) -> float:
        return 1e-6 if self.function.dtype == torch.float64 else 1.0

    def secants(self, a: Tensor, b: Tensor, visible: bool = False) -> Tensor:
        """Stretches between rows of two tensors of points, [N]; ``visible`` leaves out what float32 rounds away."""
        fa, fb = self.function(a), self.function(b)
        moved, distance = (fa - fb).norm(dim=1), (a - b).to(torch.float64).flatten(1).norm(dim=1)
        size = fa.norm(dim=1) + fb.norm(dim=1)
        rounding = 16 * self.function.eps * size
        seen = (distance > 0) & (moved > (1e-5 * size if visible else rounding))
        found = torch.where(seen, (moved - rounding) / distance, 0.0)
        found = torch.where(torch.isfinite(found), found, 0.0)
        if found.numel() and found.max() > self.best:
            at = int(found.argmax())
            self.best, self.pair = found[at].item(), (a[at], b[at])
        return found

    def random(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self.generator, dtype=torch.float64).to(self.function.dtype)

    def ascend(self, points: Tensor, directions: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
        """Power iteration on the Jacobian at each point: forward by differences, backward by gradients."""
        found = torch.zeros(len(points), dtype=torch.float64)
        best = directions
        for _ in range(rounds):
            directions = _unit(directions)
            moved = points + self.step * directions
            values = self.secants(points, moved)
            better = values > found
            found = torch.maximum(found, values)
            best = torch.where(better.view(-1, *[1] * (points.dim() - 1)), directions, best)
            x = points.clone().requires_grad_()
            try:
                y = self.function(x, True)
                change = self.function(moved) - y.detach()
                (gradient,) = torch.autograd.grad((y * change / self.step).sum(), x)
            except RuntimeError:
                break  # no gradients: directions stay as they are
            if not torch.isfinite(gradient).all():
                break
            flat = gradient.flatten(1).abs().amax(1).view(-1, *[1] * (x.dim() - 1)) == 0
            directions = torch.where(flat, directions, gradient)
        return found, best

    def jacobian(self, point: Tensor) -> None:
        """The largest singular direction of the Jacobian by differences."""
        n = point.numel()
        moves = self.step * torch.eye(n, dtype=point.dtype).reshape(n, *point.shape)
        here = self.function(point[None])
        columns = (self.function(point + moves) - here) / self.step
        if not torch.isfinite(columns).all():
            return
        direction = torch.linalg.svd(columns.T, full_matrices=False)[2][:2].reshape(-1, *point.shape).to(point.dtype)
        both = torch.cat([direction, -direction])
        self.secants(point.expand(both.shape), point + self.step * both)
        self.secants(point - self.step * both, point + self.step * both)

    def lines(self, points: Tensor, directions: Tensor, reach: float) -> None:
        """Look along lines, ever closer, for where the function is steepest."""
        nodes = torch.cat([-torch.logspace(0, -3, 24), torch.zeros(1), torch.logspace(-3, 0, 24)])
        grid = (reach * nodes).to(points.dtype).expand(len(points), -1)
        for _ in range(6):
            every, count = self._along(points, directions, grid), grid.shape[1]
            values = self.secants(every[:, :-1].flatten(0, 1), every[:, 1:].flatten(0, 1), visible=True)
            at = values.view(len(points), count - 1).argmax(1)[:, None]
            grid = self._between(grid.gather(1, at), grid.gather(1, at + 1))
            if (grid[:, -1] - grid[:, 0]).abs().max() < 100 * self.step:
                break

    def jumps(self, point: Tensor, direction: Tensor, reach: float) -> None:
        """Scan a line for where the slope changes most: Softplus jumps against its slope at its threshold."""
        grid = torch.linspace(-reach, reach, 2048, dtype=point.dtype)[None]
        y = self.function(self._along(point[None], direction[None], grid)[0])
        changes = y.diff(dim=0).diff(dim=0).norm(dim=1)
        at = changes.topk(8).indices
        grid = self._between(grid[0, at][:, None], grid[0, at + 2][:, None])
        points, directions = point.expand(8, *point.shape), direction.expand(8, *point.shape)
        for _ in range(4):
            every = self._along(points, directions, grid)
            self.secants(every[:, :-1].flatten(0, 1), every[:, 1:].flatten(0, 1), visible=True)
            y = self.function(every.flatten(0, 1)).view(8, grid.shape[1], -1)
            at = y.diff(dim=1).diff(dim=1).norm(dim=2).argmax(1)[:, None]
            grid = self._between(grid.gather(1, at), grid.gather(1, at + 2))

    @staticmethod
    def _along(points: Tensor, directions: Tensor, grid: Tensor) -> Tensor:
        return points[:, None] + grid[(..., *[None] * (points.dim() - 1))] * directions[:, None]

    @staticmethod
    def _between(low: Tensor, high: Tensor) -> Tensor:
        return low + (high - low) * torch.linspace(0, 1, 17, dtype=low.dtype)


def _unit(v: Tensor) -> Tensor:
    norm = v.flatten(1).norm(dim=1).clamp_min(1e-300 if v.dtype == torch.float64 else 1e-30)
    return v / norm.view(-1, *[1] * (v.dim() - 1))


def _points(search: _Search, shape: Shape, count: int) -> Tensor:
    """Points of all scales and kinds: noise, constants, peaks, and noise about a constant."""
    scales = [0.01, 0.1, 0.5, 1.0, 1.0, 3.0, 10.0, 100.0]
    made = [torch.zeros(shape, dtype=search.function.dtype)]
    made += [torch.full(shape, c, dtype=search.function.dtype) for c in (1.0, -1.0, 10.0)]
    for i in range(count - len(made)):
        noise = scales[i % len(scales)] * search.random(*shape)
        kind = i // len(scales) % 3
        if kind == 1:
            noise = noise + scales[(3 * i) % 7] * (1 if i % 2 else -1)
        elif kind == 2:
            noise = noise * (search.random(*shape) > 0.8)
        made.append(noise)
    return torch.stack(made)


def largest_stretch(
    model: nn.Module, input_shape: Shape, seed: int = 0, *, dtype: torch.dtype = torch.float64, effort: int = 2
) -> float:
    """The largest ||f(x) - f(y)|| / ||x - y|| that a search finds, of single samples and of batches.

    It is inf where the model is no function of its input: where it gives different outputs for one input.

    Args:
        model: runs as it is, hooks and all, in the mode that it is in, on inputs of ``dtype``.
        input_shape: shape of one sample.
        seed: of the search; the global random state is not touched.
        dtype: float64, or float32 where that makes a difference; only larger steps show then.
        effort: rounds of climbing from the best points.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        search = _search(model, tuple(input_shape), seed, dtype, effort)
    return search.best


def _search(model: nn.Module, shape: Shape, seed: int, dtype: torch.dtype, effort: int) -> _Search:
    generator = torch.Generator().manual_seed(seed)
    single = _Search(_Function(model, True, dtype), generator)
    probe = _points(single, shape, 64)
    first = None
    batches = []
    for size in (1, 2, 3, 4, 5, 7, 8, 16, 33, 64):
        with contextlib.suppress(RuntimeError, ValueError, IndexError):
            first = tensor_of(model(probe[:size].clone())).to(torch.float64)
            batches.append(size)
    if first is None:
        raise RuntimeError("the network does not run on any batch")
    earlier = _output(model, probe[: batches[-1]])
    if not _repeats(model, probe[: batches[-1]], earlier):
        single.best = math.inf
        return single
    found = []
    for gradients in (False, True) if _minds_gradients(model, probe[: batches[-1]]) else (False,):
        odd = _sizes_at_odds(model, probe, batches)
        if not odd:
            search = _Search(_Function(model, True, dtype, gradients), generator)
            points = _points(search, shape, 256 if math.prod(shape) <= 32 else 64)
            values, _ = search.ascend(points, search.random(*points.shape), 2)
            # The first are constant points, kept whatever they show.
            order = torch.cat([torch.arange(4), 4 + values[4:].topk(24).indices])
            _run(search, points[order], effort)
            found.append(search)
            continue
        usual = [size for size in (1, 2, 3, 64) if size in batches]
        for size in usual + [size for size in odd if size not in usual][:2]:
            search = _Search(_Function(model, False, dtype, gradients), generator)
            points = torch.stack([_points(search, shape, max(4, size))[-size:] for _ in range(4)])
            points[1] = points[1][:1]  # a batch of one sample, copied
            _run(search, points, min(effort, 1))
            same = torch.ones(2, *points.shape[1:], dtype=dtype)
            search.secants(0 * same, torch.tensor([1.0, 1e-2], dtype=dtype).view(2, *[1] * (same.dim() - 1)) * same)
            found.append(search)
    result = max(found, key=lambda s: s.best)
    if not _repeats(model, probe[: batches[-1]], earlier):
        result.best = math.inf
    return result


def _same(a: Tensor, b: Tensor) -> bool:
    eps = torch.finfo(a.dtype).eps if a.is_floating_point() else 0.0
    scale = max(a.abs().max().item(), b.abs().max().item()) if a.numel() else 0.0
    return a.shape == b.shape and bool(((a - b).abs() <= 1e6 * eps * (scale + 1e-6)).all())


def _output(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return tensor_of(model(x.clone())).clone()


def _repeats(model: nn.Module, x: Tensor, earlier: Tensor) -> bool:
    """Whether runs on one input agree with an earlier one, with other inputs between them."""
    _output(model, -2.0 * x)
    return all(_same(earlier, _output(model, x)) for _ in range(3))


def _minds_gradients(model: nn.Module, x: Tensor) -> bool:
    with torch.no_grad():
        without = tensor_of(model(x.clone()))
    try:
        with torch.enable_grad():
            return not _same(without, tensor_of(model(x.clone().requires_grad_() * 1.0)).detach())
    except RuntimeError:
        return False


def _sizes_at_odds(model: nn.Module, probe: Tensor, batches: list[int]) -> list[int]:
    """Sizes of batches in which a sample's output is not what it is in others; none where samples stay apart."""
    outputs = {size: _output(model, probe[:size]) for size in batches}
    smallest, largest = outputs[batches[0]], outputs[batches[-1]]
    odd = []
    for size, y in outputs.items():
        # Other samples of the largest batch, in a batch of this size.
        at = min(20, batches[-1] - size)
        later = _output(model, probe[at : at + size])
        apart = y.shape[:1] == (size,) and _same(smallest, y[: len(smallest)]) and _same(later, largest[at : at + size])
        if not apart:
            odd.append(size)
    return odd


def _run(search: _Search, points: Tensor, effort: int) -> None:
    together = search.function.together
    shape = points.shape[1:]
    n = math.prod(shape)
    found, directions = search.ascend(points, search.random(*points.shape), 7 if together else 5)
    for size in (1e-3, 0.1, 1.0, 10.0, 100.0) if together else (1.0,):
        search.secants(points - size * _unit(directions), points + size * _unit(directions))
    if n <= 256 and together:
        coordinates = torch.eye(n, dtype=points.dtype).reshape(n, *shape)
        for base in (points[0], points[2], points[-1]):
            search.secants(base.expand(coordinates.shape), base + 10.0 * coordinates)
            search.secants(base.expand(coordinates.shape), base - coordinates)
    for round_ in range(effort):
        if not together and n > 512:
            break
        chosen = found.topk(min(4, len(found))).indices
        parents, old = points[chosen], directions[chosen]
        children = parents.repeat_interleave(5, 0)
        spread = torch.tensor([0.02, 0.1, 0.5, 1.0, 4.0], dtype=points.dtype).repeat(len(chosen))
        size = 0.1 + children.flatten(1).norm(dim=1) / n**0.5
        noise = search.random(*children.shape)
        children = children + (spread * size / (1 + round_)).view(-1, *[1] * len(shape)) * noise
        values, turned = search.ascend(children, old.repeat_interleave(5, 0), 4)
        points, directions = torch.cat([parents, children]), torch.cat([old, turned])
        found = torch.cat([found[chosen], values])
    best = found.topk(min(3, len(found))).indices
    if n <= (256 if together else 64):
        for at in best[: 2 if together else 1]:
            search.jacobian(points[at])
    if together:
        ones = torch.ones(1, *shape, dtype=points.dtype)
        along = _unit(torch.cat([directions[best], search.random(2, *shape), ones]))
        start = torch.cat([points[best], torch.zeros(3, *shape, dtype=points.dtype)])
        for reach in (3.0, 300.0):
            search.lines(start, along, reach)
        if effort > 1:
            search.jumps(start[-1], along[-2], 50.0)
