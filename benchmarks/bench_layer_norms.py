"""Norms of ResNet-50's 53 convolutions, from both sides, against other methods.

    python benchmarks/bench_layer_norms.py [--checkpoint FILE] [--device cuda]

One run, one process, two threads on the CPU. Models: the CIFAR stem (3x3, no pooling) and the ImageNet stem on 3x32x32,
random weights, and trained ones where a checkpoint of the study (ImageNet stem) is given; the CIFAR stem then takes the
central 3x3 taps of its first layer. BatchNorm is left out, so that all methods see the same 53 operators. Compared:

- fastlip: :func:`fastlip.layer_norms` at several ``rtol`` (joint confidence 1 - 1e-6), Dixon's bound on power
  iteration, the deterministic bounds; time includes looking the layers up and exact 1x1 layers;
- torch power: 100 (and fewer) steps of power iteration by torch's convolutions, one-sided;
- Gram iteration on the circular convolution, and SciPy's svds, both written here (_norm_peers.py).

``truth`` is svds' value. ``width`` is the widest layer's upper / lower - 1; ``gap`` the worst |value / truth - 1| of
the upper side, or of the value where there is one side only; ``product`` the product of all 53 over the truth.
"""

import argparse
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _norm_peers import Layer, gram_iteration, power_iteration, scipy_svds
from _timing import Results, environment, percentiles, times
from torch import nn

import fastlip
from fastlip import models

INPUT = (3, 32, 32)
STEMS = ("cifar", "imagenet")


def build(stem: str, checkpoint: Path | None) -> nn.Module:
    """ResNet-50 with ten outputs: random, or with a checkpoint's weights."""
    model = models.resnet50(10, stem=stem, seed=0)
    if checkpoint is not None:
        state, _ = models.load_checkpoint(checkpoint)
        name = next(key for key in state if key.endswith("conv1.weight") and state[key].shape[1] == 3)
        if stem == "cifar":
            state[name] = state[name][..., 2:5, 2:5].clone()
        model.load_state_dict(state)
    # The convolutions alone, without the classifier, so that all methods bound the same operators.
    model[1].fc = nn.Identity()
    return model.eval()


def layers_of(model: nn.Module) -> list[Layer]:
    """Convolutions and the shapes of their inputs."""
    found: list[Layer] = []
    handles = [
        m.register_forward_hook(lambda m, x, _: found.append((m, tuple(x[0].shape[1:]))))
        for m in model.modules()
        if isinstance(m, nn.Conv2d)
    ]
    model(torch.zeros(1, *INPUT, device=next(model.parameters()).device))
    for handle in handles:
        handle.remove()
    return found


class Table:
    """Rows of one model."""

    def __init__(self, results: Results, device: str, stem: str, weights: str, repeats: int) -> None:
        self._results, self._device, self._repeats = results, device, repeats
        self._fixed = {"stem": stem, "weights": weights}
        self._base: float | None = None

    def time(self, method: str, setting: str, run: Callable[[], Any], repeats: int | None = None) -> tuple[dict, Any]:
        """Time a method; its row, which is not put down yet, and its last result."""
        results: list[Any] = []

        def once() -> None:
            results[:] = [run()]
            if self._device == "cuda":
                torch.cuda.synchronize()

        count = self._repeats if repeats is None else repeats
        ms = times(once, seconds=0.0, least=count, warm=min(1, count - 1))
        mid, low, high = percentiles(ms)
        row = self._fixed | {"method": method, "setting": setting, "ms": mid, "ms_p20": low, "ms_p80": high}
        return row | {"runs": len(ms)}, results[0]

    def add(self, row: dict[str, Any]) -> None:
        """Put a row down and print it."""
        self._results.add(row)
        numbers = (f"{row.get('ms', math.nan):>8.0f}", f"{row.get('x_torch_power', math.nan):>8.2f}")
        accuracy = (f"{row.get('width', math.nan):>9.2g}", f"{row.get('gap', math.nan):>9.2g}")
        extra = f" {row['ms_each']:.0f} ms each" if "ms_each" in row else ""
        print(f"{row['stem']:<9}{row['weights']:<8} {row['method']:<15} {row['setting']:<24}", end=" ")
        print(*numbers, *accuracy, extra, flush=True)

    def add_judged(
        self, row: dict[str, Any], lower: list[float] | None, value: list[float], truth: list[float]
    ) -> None:
        """Put a row down with its accuracy; its time is compared with 100 steps of power iteration, put down first."""
        if lower is not None:
            row["width"] = max(u / low for u, low in zip(value, lower, strict=True)) - 1.0
        row["gap"] = max(abs(v / t - 1.0) for v, t in zip(value, truth, strict=True))
        row["product"] = math.exp(sum(math.log(v / t) for v, t in zip(value, truth, strict=True)))
        self._base = row["ms"] if self._base is None else self._base
        self.add(row | {"x_torch_power": row["ms"] / self._base})


def measure(results: Results, stem: str, checkpoint: Path | None, device: str, repeats: int, peers: bool) -> None:
    model = build(stem, checkpoint).to(device)
    layers = layers_of(model)
    table = Table(results, device, stem, "random" if checkpoint is None else "trained", repeats)
    exact, truth = table.time("scipy svds", "float64", lambda: scipy_svds(layers), 1)
    for steps in (100, 30):
        row, value = table.time("torch power", f"{steps} steps", lambda steps=steps: power_iteration(layers, steps))
        table.add_judged(row, None, value, truth)
    table.add_judged(exact, None, truth, truth)

    def norms(**options: Any) -> Callable[[], fastlip.NormReport]:
        return lambda: fastlip.layer_norms(model, INPUT, fold_batchnorm=False, **options)

    def two_sided(method: str, setting: str, run: Callable[[], fastlip.NormReport], count: int | None = None) -> None:
        row, report = table.time(method, setting, run, count)
        found = [report[name] for name in report if "bn" not in name and "downsample.1" not in name]
        lower, upper = [i.lower for i in found], [i.upper for i in found]
        assert len(found) == len(layers)
        assert all(u >= t * (1.0 - 1e-9) for u, t in zip(upper, truth, strict=True)), "an upper side is below the truth"
        table.add_judged(row, lower, upper, truth)

    for rtol in (1e-1, 3e-2, 1e-2, 3e-3, 1e-3):
        two_sided("fastlip", f"rtol {rtol:g}", norms(rtol=rtol))
    if peers:
        two_sided("fastlip power", "rtol 0.1", norms(rtol=1e-1, method="power"), 1)
        # What the deterministic bounds of the CIFAR stem's maps take is minutes, but for the ring's.
        for method in ("ring", "gram", "cholesky") if stem == "imagenet" else ("ring",):
            two_sided(f"fastlip {method}", "rtol 0.01", norms(method=method, max_memory=1 << 33), 1)
        row, value = table.time("Gram iteration", "5 steps", lambda: gram_iteration(layers, 5), 1)
        table.add_judged(row, None, value, truth)


def measure_checkpoints(results: Results, device: str, repeats: int) -> None:
    """Time for several checkpoints in one call: the same network, its weights moved a little."""
    table = Table(results, device, "cifar", "random", repeats)
    networks = [build("cifar", None).to(device) for _ in range(16)]
    for i, network in enumerate(networks):
        for parameter in network.parameters():
            parameter.add_(0.01 * i * parameter)
    for count in (1, 4, 16):
        row, _ = table.time(
            "fastlip",
            f"rtol 0.01, {count} checkpoints",
            lambda count=count: fastlip.layer_norms(networks[:count], INPUT, fold_batchnorm=False),
            max(1, repeats // count),
        )
        table.add(row | {"ms_each": row["ms"] / count})


def narrow(module: nn.Module) -> None:
    """Leave every layer a thirty-second of its channels."""
    for name, layer in module.named_children():
        if isinstance(layer, nn.Conv2d):
            into = max(layer.in_channels // 32, 3 if layer.in_channels == 3 else 1)
            shape = (layer.kernel_size, layer.stride, layer.padding)
            setattr(module, name, nn.Conv2d(into, layer.out_channels // 32, *shape, bias=False))
        elif isinstance(layer, nn.BatchNorm2d):
            setattr(module, name, nn.BatchNorm2d(layer.num_features // 32))
        else:
            narrow(layer)


def measure_host(results: Results, device: str, repeats: int) -> None:
    """A network with as many layers and few channels, so that the host's work dominates."""
    table = Table(results, device, "cifar", "random", 10 * repeats)
    network = build("cifar", None)
    narrow(network)
    network = network.to(device).eval()
    setting = "rtol 0.01, 1/32 of the channels, iterated"
    row, _ = table.time("fastlip", setting, lambda: fastlip.layer_norms(network, (3, 8, 8), method="lanczos"))
    table.add(row)


def peak_memory(results: Results, device: str) -> None:
    """Memory that one call takes beyond the model's, each in a process of its own, in MiB."""
    code = (
        "import re, sys, torch; sys.path.insert(0, {here!r}); import bench_layer_norms as b, fastlip\n"
        "with torch.no_grad():\n"
        "    m = b.build('cifar', None).to({device!r}); layers = b.layers_of(m); cuda = {device!r} == 'cuda'\n"
        "    used = lambda: torch.cuda.max_memory_allocated() / 1024 if cuda else "
        "int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "    before = used(); {call}; print((used() - before) / 1024)"
    )
    calls = {
        ("torch power", "1 step"): "b.power_iteration(layers, 1)",
        ("fastlip", "rtol 0.01"): "fastlip.layer_norms(m, b.INPUT, fold_batchnorm=False)",
        ("fastlip", "rtol 0.001"): "fastlip.layer_norms(m, b.INPUT, fold_batchnorm=False, rtol=1e-3)",
    }
    for (method, setting), call in calls.items():
        text = code.format(here=str(Path(__file__).parent), device=device, call=call)
        out = subprocess.run([sys.executable, "-c", text], check=True, capture_output=True, text=True).stdout
        results.add({"stem": "cifar", "weights": "random", "method": method, "setting": setting, "MiB": float(out)})
        print(f"{'cifar':<9}{'random':<8} {method:<15} {setting:<24} {float(out):.0f} MiB", flush=True)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Interval width, or one-sided gap, against time, a line for each method."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(STEMS), figsize=(10.0, 4.8), sharey=True, layout="constrained")
    names = list(dict.fromkeys(r["method"] for r in rows if "gap" in r and r["method"] != "scipy svds"))
    colours = {name: f"C{i}" for i, name in enumerate(names)}  # svds is the truth itself
    lines = {}
    for stem, axes in zip(STEMS, panels, strict=True):
        chosen = [r for r in rows if r["stem"] == stem and r["weights"] == "random" and "gap" in r]
        for method in names:
            own = sorted((r for r in chosen if r["method"] == method), key=lambda r: r["ms"])
            if not own:
                continue
            one_sided = all("width" not in r for r in own)
            y = [max(r.get("width", r["gap"]), 1e-7) for r in own]
            label = f"{method} ({'one-sided: gap to the truth' if one_sided else 'two-sided: width'})"
            style = "o--" if one_sided else "o-"
            (line,) = axes.loglog([r["ms"] / 1e3 for r in own], y, style, color=colours[method], markersize=4)
            lines.setdefault(label, line)
        seconds = [r["ms"] / 1e3 for r in chosen if r["method"] in names]
        ticks = [t for t in (0.2, 0.5, 1, 2, 5, 10, 20, 50) if min(seconds) / 1.5 <= t <= max(seconds) * 1.5]
        axes.set_xticks(ticks, labels=[str(t) for t in ticks])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("seconds for all 53 convolutions")
        axes.set_title(f"{'CIFAR' if stem == 'cifar' else 'ImageNet'} stem", loc="left", fontsize=10)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("relative, widest layer")
    figure.suptitle("ResNet-50 on 3×32×32, random weights", fontsize=11)
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=3, fontsize=7, frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpoint", type=Path, help="trained weights: a checkpoint of the study's ResNet-50")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--no-peers", action="store_true", help="only power iteration, svds and fastlip's own intervals"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shared = environment(args.device)
    print(f"{shared['device']}, {shared['isa']}, torch {shared['torch']}, {args.threads} thread(s)")
    print(f"{'stem':<9}{'weights':<8} {'method':<15} {'setting':<24} {'ms':>8} {'x power':>8} {'width':>9} {'gap':>9}")
    results = Results(args.out / f"layer_norms_{args.device}.csv", shared)
    for stem in STEMS:
        for checkpoint in dict.fromkeys((None, args.checkpoint)):
            peers = not args.no_peers and checkpoint is None
            measure(results, stem, checkpoint, args.device, args.repeats, peers)
    measure_checkpoints(results, args.device, args.repeats)
    measure_host(results, args.device, args.repeats)
    peak_memory(results, args.device)
    plot(results.rows, args.out / f"layer_norms_{args.device}.png")


if __name__ == "__main__":
    with torch.no_grad():
        main()
