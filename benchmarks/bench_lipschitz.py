"""lipschitz_bound of whole networks: CPU seconds and memory, beside another build where there is one.

    python benchmarks/bench_lipschitz.py --other ../older-checkout          # CSV under benchmarks/results

Each bound is computed in a process of its own, with random weights from one seed, all of its checks included. ``other``
is the root of another checkout with its extension built; ``x_other`` is the CPU time over that of the other build, of
the same network and in the same run. ``MiB`` is the peak resident memory beyond that with the model loaded.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from _timing import Results, environment

import fastlip

#: Torchvision models and input sizes.
MODELS = (
    ("resnet18", 32),
    ("vgg11_bn", 32),
    ("squeezenet1_1", 64),
    ("densenet121", 64),
    ("resnet18", 224),
    ("resnet50", 64),
    ("resnet50", 224),
)

_CODE = """
import json, re, sys, time, torch, torchvision
import fastlip
torch.set_num_threads({threads})
torch.manual_seed(0)
model = torchvision.models.get_model({name!r}).eval()
used = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1024
before, wall, cpu = used(), time.perf_counter(), time.process_time()
bound = fastlip.lipschitz_bound(model, (3, {size}, {size}))
print(json.dumps({{
    'log10_upper': bound.log10_upper, 'log10_plain': bound.log10_plain, 'cpu_seconds': time.process_time() - cpu,
    'seconds': time.perf_counter() - wall, 'MiB': used() - before,
}}))
"""


def measure(name: str, size: int, root: Path, threads: int) -> dict[str, Any]:
    """A row of one network, computed by the build under ``root``."""
    code = _CODE.format(name=name, size=size, threads=threads)
    shared = os.environ | {"PYTHONPATH": str(root), "PYTHONWARNINGS": "ignore"}
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=shared).stdout
    return json.loads(out.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--other", type=Path, help="root of another checkout, built")
    parser.add_argument("--only", help="models to measure, as name:size, separated by commas")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    chosen = MODELS
    if args.only:
        chosen = tuple((name, int(size)) for name, size in (part.split(":") for part in args.only.split(",")))
    results = Results(args.out / "lipschitz_cpu.csv", environment("cpu") | {"threads": str(args.threads)})
    here = Path(fastlip.__file__).parent.parent
    for name, size in chosen:
        builds = {"other": args.other.resolve()} if args.other else {}
        rows = {build: measure(name, size, root, args.threads) for build, root in (builds | {"this": here}).items()}
        for build, row in rows.items():
            compared = {"x_other": row["cpu_seconds"] / rows["other"]["cpu_seconds"]} if "other" in rows else {}
            results.add({"model": name, "size": size, "build": build} | row | compared)
            print(f"{name:<16} {size:>4} {build:<6} {row['log10_upper']:>9.3f}", end=" ")
            print(f"{row['cpu_seconds']:>8.2f} CPU s {row['MiB']:>7.0f} MiB", flush=True)


if __name__ == "__main__":
    main()
