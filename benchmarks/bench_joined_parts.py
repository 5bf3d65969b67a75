"""What it is worth to know that parts of a tensor are disjoint where they come together again.

    pip install torchvision timm
    python benchmarks/bench_joined_parts.py          # CSV under benchmarks/results

``log10_upper`` is that of ``lipschitz_bound`` without its checks, ``log10_independent`` what the same norms give if
parts count as independent inputs, and ``joins`` the number of places where parts come together. Weights are random, the
classifiers' own initialisation, but for scales of BatchNorm that start at 0: they are 1.
"""

import argparse
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from _timing import Results, environment

import fastlip
from fastlip.lipschitz import _bound
from fastlip.lipschitz._composition import Tighter, joined_parts

MODELS = ("shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "swin_t", "res2net50_26w_4s")


def build(name: str) -> torch.nn.Module:
    import timm
    import torchvision

    known = name in torchvision.models.list_models()
    return torchvision.models.get_model(name) if known else timm.create_model(name)


def measure(name: str, size: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = build(name).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)
    seen: dict[str, float] = {}

    def recorded(steps: Any, logs: Any, sizes: Any, *tighter: Tighter) -> Tighter:
        parts = joined_parts(steps, logs, sizes, *tighter)
        totals, _ = _bound._compose(steps, logs, sizes, *tighter)
        seen.update(independent=totals[steps[-1]], joins=len(parts))
        return parts

    begin = time.process_time()
    # Between the norms and their composition, so that both values come of one computation.
    with patch.object(_bound, "joined_parts", recorded):
        found = fastlip.lipschitz_bound(model, (3, size, size), bounds=(0.0, 1.0), check=False, rtol=0.05)
    row = {"network": name, "size": size, "log10_upper": found.log10_upper}
    row |= {"log10_independent": seen["independent"], "joins": int(seen["joins"])}
    return row | {
        "times_smaller": 10.0 ** (seen["independent"] - found.log10_upper),
        "cpu_s": time.process_time() - begin,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = Results(args.out / "joined_parts_cpu.csv", environment("cpu"), digits=5)
    for name in args.models:
        row = measure(name, args.size)
        results.add(row)
        print(row, flush=True)


if __name__ == "__main__":
    main()
