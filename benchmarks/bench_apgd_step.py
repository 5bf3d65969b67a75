"""One Auto-PGD step in one operator, against the same step as eager PyTorch and against the floor.

    python benchmarks/bench_apgd_step.py                  # one core, CSV under benchmarks/results
    python benchmarks/bench_apgd_step.py --device cuda

Compared in the same run, on the same float32 data, warm on the CPU and with a cold L2 on a GPU:

- floor: x, grad, x0, x_prev read and x, x_prev written, 24 bytes an element, from the measured time of 16 (as in
  bench_pgd_step.py). A step whose iterate is the best so far moves 32;
- eager: the sequence of a step between two gradients in torchattacks 3.5.1's APGD (bookkeeping of the best by
  ``nonzero``; checkpoints left out, in its favour), and ``torch.compile`` of it with ``torch.where`` in place of
  ``nonzero``. In L2 it alternates ball and box instead of projecting onto both. "l1": sparse APGD's step with the
  sort-based projection of bench_pgd_step.py.

Half of the samples have a new best iterate in every step.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache

import torch
from bench_pgd_step import (
    Calls,
    Data,
    Measurement,
    Problem,
    compared_with_compiler,
    parser_of,
    run,
    sort_project_l1,
)
from torch import Tensor

from fastlip import ops
from fastlip.ops import Norm


def project_linf(x: Tensor, x0: Tensor, eps: float) -> Tensor:
    return torch.clamp(torch.min(torch.max(x, x0 - eps), x0 + eps), 0.0, 1.0)


def project_l2(x: Tensor, x0: Tensor, eps: float) -> Tensor:
    length = ((x - x0) ** 2).sum(dim=(1, 2, 3), keepdim=True).sqrt()
    return torch.clamp(x0 + (x - x0) / (length + 1e-12) * length.clamp_max(eps), 0.0, 1.0)


class Eager:
    """State and step of the peers' loop body."""

    def __init__(self, x: Tensor, x0: Tensor, grad: Tensor, loss: Tensor, eps: float, norm: Norm) -> None:
        self.x0, self.eps, self.norm = x0, eps, norm
        self.x_prev, self.x_best, self.grad_best, self.best = x.clone(), x.clone(), grad.clone(), loss.clone()
        self.step_size = torch.full((len(x), 1, 1, 1), 2 * eps if norm != "l1" else eps, device=x.device)
        self.kept = torch.full((len(x), 1), x[0].numel() // 5, device=x.device)

    def move(self, x: Tensor, grad: Tensor) -> Tensor:
        if self.norm == "l1":
            size = grad.abs().flatten(1)
            ranked = size.sort(1, descending=True).values
            keep = (size >= ranked.gather(1, self.kept - 1)).view_as(grad)
            way = grad.sign() * keep
            way = way / (way.abs().sum(dim=(1, 2, 3), keepdim=True) + 1e-10)
            return sort_project_l1(x + self.step_size * way, self.x0, self.eps)
        update = x - self.x_prev
        if self.norm == "linf":
            z = project_linf(x + self.step_size * torch.sign(grad), self.x0, self.eps)
            return project_linf(x + (z - x) * 0.75 + update * 0.25, self.x0, self.eps)
        length = (grad**2).sum(dim=(1, 2, 3), keepdim=True).sqrt()
        z = project_l2(x + self.step_size * grad / (length + 1e-12), self.x0, self.eps)
        return project_l2(x + (z - x) * 0.75 + update * 0.25, self.x0, self.eps)

    def step(self, x: Tensor, grad: Tensor, loss: Tensor) -> Tensor:
        better = (loss > self.best).nonzero().squeeze()
        self.x_best[better] = x[better].clone()
        self.grad_best[better] = grad[better].clone()
        self.best[better] = loss[better] + 0
        out = self.move(x, grad)
        self.x_prev = x.clone()
        return out

    def traceable(self, x: Tensor, grad: Tensor, loss: Tensor, x_best: Tensor, grad_best: Tensor) -> tuple[Tensor, ...]:
        better = (loss > self.best).view(-1, 1, 1, 1)
        best = torch.where(better, x, x_best), torch.where(better, grad, grad_best), torch.maximum(loss, self.best)
        return self.move(x, grad), x.clone(), *best


def measurements(device: str, name: str, data: Data, norm: Norm) -> Iterator[Measurement]:
    """In the order of a CPU; see bench_pgd_step.py."""
    p = Problem(data, norm)

    @cache
    def loss() -> Tensor:
        return torch.zeros(len(p.start), device=p.start.device)

    def next_loss() -> None:
        loss()[::2] += 1

    def ours() -> Calls:
        state = ops.apgd_state(p.start, steps=0, eps=p.eps, norm=norm)
        state.counters[:, 0] = 1
        here, options = p.start.clone(), {"eps": p.eps, "norm": norm}
        return lambda: ops.apgd_step_(here, data.grad, loss(), data.x0, state, **options), next_loss

    def eager() -> Calls:
        peer = Eager(p.start, data.x0, data.grad, loss(), p.eps, norm)
        return lambda: peer.step(p.start, data.grad, loss()), next_loss

    def compiled() -> Calls:
        peer = Eager(p.start, data.x0, data.grad, loss(), p.eps, norm)
        step: Callable[..., object] = torch.compile(peer.traceable)
        return lambda: step(p.start, data.grad, loss(), peer.x_best, peer.grad_best), next_loss

    yield Measurement(name, norm, "floor", 0, p.floor, 24 / 16)
    yield Measurement(name, norm, "fastlip apgd_step_", 0, ours)
    yield Measurement(name, norm, "eager", 2, eager)
    if compared_with_compiler(device, name):
        yield Measurement(name, norm, "compiled", 3, compiled)


def main(argv: Sequence[str] | None = None) -> None:
    run(parser_of(__doc__).parse_args(argv), "apgd_step", measurements)


if __name__ == "__main__":
    with torch.no_grad():
        main()
