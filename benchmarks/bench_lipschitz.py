"""lipschitz_bound of whole networks: CPU seconds and memory, beside another build where there is one.

    python benchmarks/bench_lipschitz.py --other ../older-checkout          # CSV under benchmarks/results

Each bound is computed in a process of its own, with random weights from one seed, as ``zoo.py`` builds them, and with
all checks. ``other`` is the root of another checkout with its extension built; ``x_other`` is the CPU time over
that of the other build, of the same network and in the same run. ``MiB`` is the peak resident memory beyond that with
the model loaded, which is ``model_MiB``. A row without numbers says in ``note`` why there are none. Rows of an earlier
run stay until their model is measured again.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from _timing import Results, environment

import fastlip


class Case(NamedTuple):
    """A network and the set of inputs that its bound is for.

    Attributes:
        family: the library, as in ``_zoo_models.py``.
        name: as the library calls it.
        size: height and width of its input.
        box: whether the bound is for inputs in [0, 1]; networks with gates or attention have no other.
    """

    family: str
    name: str
    size: int
    box: bool = False


CASES = (
    Case("torchvision", "resnet50", 224),
    Case("torchvision", "vit_b_16", 224, box=True),
    Case("torchvision", "resnet18", 224),
    Case("torchvision", "resnet18", 32),
    Case("torchvision", "resnet50", 32),
    Case("torchvision", "squeezenet1_1", 224),
    Case("torchvision", "mobilenet_v2", 224),
    Case("torchvision", "shufflenet_v2_x1_0", 224),
    Case("torchvision", "regnet_y_400mf", 224, box=True),
    Case("torchvision", "mobilenet_v3_large", 224, box=True),
    Case("torchvision", "efficientnet_b0", 224, box=True),
    Case("torchvision", "googlenet", 224),
    Case("torchvision", "swin_t", 224, box=True),
    Case("torchvision", "convnext_tiny", 224),
    Case("timm", "mixer_s32_224", 224, box=True),
    Case("timm", "resnetv2_50", 224),
    Case("timm", "deit_tiny_patch16_224", 224, box=True),
    Case("torchvision", "densenet121", 224),
    Case("torchvision", "resnet101", 224),
    Case("torchvision", "wide_resnet50_2", 224),
    Case("torchvision", "vgg16", 224),
)

_CODE = """
import inspect, json, re, resource, sys, time
sys.path.append({benchmarks!r})
import torch
import _zoo_models
import fastlip
assert fastlip.__file__.startswith({root!r}), fastlip.__file__
fastlip.lipschitz_bound
torch.set_num_threads({threads})
_zoo_models.prepare({family!r})
model = _zoo_models.build(_zoo_models.Entry({family!r}, {name!r}, {size}))
for parameter in model.parameters():
    if not parameter.any():  # a last layer of zeros has a bound of 0
        parameter.normal_(std=0.02)
used = lambda key: int(re.search(key + r':\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1024
boxed = {box} and 'bounds' in inspect.signature(fastlip.lipschitz_bound).parameters
domain = dict(bounds=(0.0, 1.0)) if boxed else dict()
spent = int(time.process_time())
resource.setrlimit(resource.RLIMIT_CPU, (spent + {limit}, spent + {limit}))
before, loaded, wall, cpu = used('VmHWM'), used('VmRSS'), time.perf_counter(), time.process_time()
try:
    bound = fastlip.lipschitz_bound(model, (3, {size}, {size}), **domain)
except ValueError as error:
    print(json.dumps(dict(note='refused: ' + str(error)[:200])))
else:
    print(json.dumps({{
        'log10_upper': bound.log10_upper, 'log10_plain': bound.log10_plain, 'cpu_seconds': time.process_time() - cpu,
        'seconds': time.perf_counter() - wall, 'MiB': max(used('VmHWM') - before, 0.0), 'model_MiB': loaded,
    }}))
"""


def measure(case: Case, root: Path, threads: int, limit: int) -> dict[str, Any]:
    """A row of one network, computed by the build under ``root`` in at most ``limit`` CPU seconds."""
    code = _CODE.format(
        **case._asdict(), root=str(root), benchmarks=str(Path(__file__).parent), threads=threads, limit=limit
    )
    shared = os.environ | {"PYTHONPATH": str(root), "PYTHONWARNINGS": "ignore"}
    # With -P the folder that this runs in does not come before the build.
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, env=shared, check=False)
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return {"note": f"no bound within {limit} CPU seconds"}
    if done.returncode:
        raise RuntimeError(f"{case.name} failed: {done.stderr[-500:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--other", type=Path, help="root of another checkout, built")
    parser.add_argument("--only", help="models to measure, as name:size, separated by commas")
    parser.add_argument("--limit", type=int, default=300, help="CPU seconds after which a bound is given up")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    chosen = set(args.only.split(",")) if args.only else {f"{case.name}:{case.size}" for case in CASES}
    shared = environment("cpu") | {"threads": str(args.threads)}
    results = Results(args.out / "lipschitz_cpu.csv", shared, keys=("model", "size", "build"))
    here = Path(fastlip.__file__).parent.parent
    builds = {"other": args.other.resolve()} if args.other else {}
    for case in CASES:
        if f"{case.name}:{case.size}" not in chosen:
            continue
        other = None
        for build, root in (builds | {"this": here}).items():
            row = measure(case, root, args.threads, args.limit)
            other = row.get("cpu_seconds") if build == "other" else other
            if other is not None and "cpu_seconds" in row:
                row["x_other"] = row["cpu_seconds"] / other
            named = {"model": case.name, "size": case.size, "domain": "[0, 1]" if case.box else "everywhere"}
            results.add(named | {"build": build, "note": ""} | row)
            shown = (
                row.get("note") or f"{row['log10_upper']:>9.3f} {row['cpu_seconds']:>8.2f} CPU s {row['MiB']:.0f} MiB"
            )
            print(f"{case.name:<20} {case.size:>4} {build:<6} {shown}", flush=True)


if __name__ == "__main__":
    main()
