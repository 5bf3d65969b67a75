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

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from _timing import write_csv
from bench_pgd_step import BATCH_SHAPES, BUDGET, Table, floor_of, shapes_for, sort_project_l1
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


def measure_norm(table: Table, norm: Norm, x0: Tensor, grad: Tensor, compile_peers: bool) -> None:
    pixels = x0[0].numel() / (3 * 32 * 32)
    eps = BUDGET[norm][0] * {"linf": 1.0, "l2": pixels**0.5, "l1": pixels}[norm]
    generator = torch.Generator(device=x0.device).manual_seed(1)
    x = ops.random_start(x0, eps=eps, norm=norm, generator=generator)
    loss = torch.zeros(len(x), device=x.device)
    state = ops.apgd_state(x, steps=0, eps=eps, norm=norm)
    state.counters[:, 0] = 1

    def next_loss() -> None:
        loss[::2] += 1

    here = x.clone()
    table.add(
        norm, "fastlip apgd_step_", lambda: ops.apgd_step_(here, grad, loss, x0, state, eps=eps, norm=norm), next_loss
    )
    eager = Eager(x, x0, grad, loss, eps, norm)
    table.add(norm, "eager", lambda: eager.step(x, grad, loss), next_loss)
    if compile_peers:
        compiled: Callable[..., object] = torch.compile(eager.traceable)
        table.add(norm, "compiled", lambda: compiled(x, grad, loss, eager.x_best, eager.grad_best), next_loss)


def measure(device: str, name: str, shape: tuple[int, ...], seconds: float, compile_peers: bool) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    x0 = torch.rand(shape, generator=generator).to(device)
    grad = torch.randn(shape, generator=generator).to(device)
    table = Table(device, name, seconds)
    stream = floor_of(device, x0.clone(), grad, x0)
    for norm in BUDGET:
        table.add(norm, "floor", stream)
        table.rescale_floor(24 / 16)
        measure_norm(table, norm, x0, grad, compile_peers)
    return table.rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="per measurement")
    parser.add_argument("--shape", nargs="*", help="only these, such as 256x3x32x32")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for name, shape in shapes_for(args.device).items():
        if args.shape and name not in args.shape:
            continue
        compiled = not args.no_compile and (args.device == "cpu" or name in BATCH_SHAPES)
        rows += measure(args.device, name, shape, args.seconds, compiled)
    write_csv(args.out / f"apgd_step_{args.device}.csv", rows)
    print(f"{rows[0]['device']}, {rows[0]['isa']}, torch {rows[0]['torch']}, {args.threads} thread(s)")
    print(f"{'shape':<14} {'norm':<5} {'what':<20} {'ms':>9} {'x floor':>8}")
    for r in rows:
        print(f"{r['shape']:<14} {r['norm']:<5} {r['what']:<20} {r['ms']:>9.3f} {r['x_floor']:>8.2f}")


if __name__ == "__main__":
    with torch.no_grad():
        main()
