"""judge: what an attack reads off logits in one step, and the record of its best iterates.

    python benchmarks/bench_judge.py           # CSV under benchmarks/results
    python benchmarks/bench_judge.py --device cuda

Rows, each with a full record (best loss, success, confirmation and doubt of every image) and float32 logits:

- judge: the operator by its public wrapper;
- torch autograd: the attacks' losses and decisions as they are written in PyTorch, the gradient by autograd, the record
  by ``torch.where``;
- floor: for "ce" torch's log softmax and its backward kernel; for the others a copy of the logits.

``x_judge`` is over judge of the same size and loss.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _timing import Results, environment, percentiles, times
from _torch_losses import attack_loss, in_doubt, is_adversarial
from torch import Tensor

from fastlip import ops

SIZES = ((64, 10), (512, 10), (64, 1000), (8, 21841))
REPEATS = 3  # calls that one measurement is made of


def new_record(batch: int, device: str) -> ops.BestRecord:
    loss = torch.full((batch,), -torch.inf, dtype=torch.float64, device=device)
    flags = [torch.zeros(batch, dtype=torch.bool, device=device) for _ in range(3)]
    return ops.BestRecord(loss, *flags, early_stop=False)


def by_autograd(logits: Tensor, labels: Tensor, loss: str, record: ops.BestRecord) -> Tensor:
    assert record.unconfirmed is not None
    assert record.doubtful is not None
    z = logits.detach().requires_grad_()
    value = attack_loss(loss, z, labels, None)
    (grad,) = torch.autograd.grad(value.sum(), z)
    value = value.detach().double()
    adversarial, doubtful = is_adversarial(logits, labels, None), in_doubt(logits, 1e-4)
    larger = value > record.loss
    better = (adversarial & ~record.succeeded) | ((adversarial == record.succeeded) & larger)
    torch.where(better, value, record.loss, out=record.loss)
    torch.where(better, adversarial, record.unconfirmed, out=record.unconfirmed)
    torch.where(better, doubtful, record.doubtful, out=record.doubtful)
    record.succeeded |= adversarial
    return grad


def measure(device: str, batch: int, classes: int, loss: ops.Loss, seconds: float, results: Results) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(batch, classes, generator=generator).to(device)
    labels = torch.randint(classes, (batch,), generator=generator).to(device)
    one, other = new_record(batch, device), new_record(batch, device)
    copy, ones = torch.empty_like(logits), torch.ones_like(logits)

    def floor() -> None:
        if loss == "ce":
            log_p = torch.log_softmax(logits, 1)
            torch.ops.aten._log_softmax_backward_data(ones, log_p, 1, torch.float32)
        else:
            copy.copy_(logits)

    methods: dict[str, Callable[[], Any]] = {
        "judge": lambda: ops.judge(logits, labels, loss=loss, rounding=1e-4, record=one),
        "torch autograd": lambda: by_autograd(logits, labels, loss, other),
        "floor": floor,
    }
    judged = 0.0
    for what, run in methods.items():

        def repeated(run: Callable[[], Any] = run) -> None:
            for _ in range(REPEATS):
                run()
            if device == "cuda":
                torch.cuda.synchronize()

        us = [1e3 * ms / REPEATS for ms in times(repeated, seconds=seconds)]
        median, low, high = percentiles(us)
        judged = judged or median  # judge comes first
        row = {"batch": batch, "classes": classes, "loss": loss, "what": what, "us": median, "us_p20": low}
        results.add(row | {"us_p80": high, "runs": len(us), "x_judge": median / judged})
        print(f"{batch:>5} {classes:>6} {loss:<7} {what:<15} {median:>9.2f} {median / judged:>8.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.5, help="per measurement")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shared = environment(args.device)
    results = Results(args.out / f"judge_{args.device}.csv", shared)
    print(f"{shared['device']}, {shared['isa']}, torch {shared['torch']}, {args.threads} thread(s)")
    print(f"{'batch':>5} {'classes':>6} {'loss':<7} {'what':<15} {'us':>9} {'x judge':>8}")
    losses: tuple[ops.Loss, ...] = ("dlr", "ce", "margin")
    for batch, classes in SIZES:
        for loss in losses:
            measure(args.device, batch, classes, loss, args.seconds, results)


if __name__ == "__main__":
    main()
