"""What a norm constraint on every layer adds to a training step.

    pip install torchvision deel-torchlip
    python benchmarks/bench_constrain.py          # CSV under benchmarks/results, about 35 minutes on one core
    python benchmarks/bench_constrain.py --device cuda --batch 128

ResNet-18 and ResNet-50 for 32x32 images (3x3 stem, no pooling), random batches, SGD with momentum. The ways to
constrain are trained side by side, one step each in turn; times are CPU time of this process, and on a GPU time until
its work is done. ``added_ms`` is the mean
over the steps of what a way takes longer than the network without a constraint in the same round. ``alone_ms`` is that
of computing all weights and their gradients for given ones, without the network, which varies less. Both follow
``warm`` steps on two images each, after which the vectors of ``constrain_norms`` rest for as long as they do in a run.
``memory_mb`` is
the growth of the highest resident memory over the network's own, of a process that takes three steps and gives large
blocks back as soon as they are free.

"power iteration, each layer" is what ``constrain_norm`` was at first: a warm step of power iteration for each layer, by
torch's operations, and autograd's gradient. "scaled by a constant" is the floor of whatever scales weights: each is
multiplied by a number, and its gradient too. Layers that are constrained one by one are due in the same forward, which
fewer rounds than their interval may miss. Torch's ``spectral_norm`` takes the norm of the reshaped kernel, which is
not that of the convolution, and deel-torchlip's layers orthogonalise it in addition; where that is not installed it is
left out.
"""

import argparse
import copy
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from _timing import Results, environment
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from fastlip.norms import constrain_norm, constrain_norms, module_operator
from fastlip.norms._operators.torch_operator import TorchOperator
from fastlip.norms._spectral_norm_value import stretch, unit

SHAPE = (3, 32, 32)
NETWORKS = ("resnet18", "resnet50")
Constrain = Callable[[nn.Module], nn.Module]


def network(name: str) -> nn.Module:
    """A ResNet for small images, with random weights."""
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.get_model(name, num_classes=10)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    return model


def input_sizes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Spatial size of the input of each convolution and linear layer, by name."""
    sizes: dict[str, tuple[int, ...]] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda module, args, output: sizes.update({name: tuple(args[0].shape[2:])})

    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    handles = [layer.register_forward_hook(note(name)) for name, layer in layers.items()]
    with torch.no_grad():
        model.eval()(torch.rand(1, *SHAPE))
    model.train()
    for handle in handles:
        handle.remove()
    return sizes


def by_torch(model: nn.Module) -> nn.Module:
    for name in input_sizes(model):
        parametrizations.spectral_norm(model.get_submodule(name))
    return model


class Times(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 0.5 * weight


def by_a_constant(model: nn.Module) -> nn.Module:
    for name in input_sizes(model):
        parametrize.register_parametrization(model.get_submodule(name), "weight", Times())
    return model


class PowerIteration(nn.Module):
    """The weight over its map's norm, by a step of power iteration in each forward."""

    def __init__(self, layer: nn.Conv2d | nn.Linear, size: tuple[int, ...]) -> None:
        super().__init__()
        op = module_operator(layer, (0, *size))
        self.op = op.with_weight(torch.empty(op.weight.shape, device="meta"))
        self.register_buffer("v", unit(torch.randn(op.input_shape)))

    def forward(self, weight: Tensor) -> Tensor:
        convolution = TorchOperator(self.op, weight.detach())
        with torch.no_grad():
            image = unit(convolution.adjoint(unit(convolution.forward(self.v[None]))))
            self.v.copy_(torch.where(image.any() & image.isfinite().all(), image, self.v)[0])
        return weight / stretch(self.op, weight, self.v.clone()).clamp_min(1.0)


def by_power_iteration(model: nn.Module) -> nn.Module:
    for name, size in input_sizes(model).items():
        layer = model.get_submodule(name)
        parametrize.register_parametrization(layer, "weight", PowerIteration(layer, size))
    return model


def layer_by_layer(model: nn.Module) -> nn.Module:
    for name, size in input_sizes(model).items():
        constrain_norm(model.get_submodule(name), size)
    return model


def by_deel(model: nn.Module) -> nn.Module:
    from deel import torchlip

    for name in input_sizes(model):
        old = model.get_submodule(name)
        if isinstance(old, nn.Conv2d):
            new = torchlip.SpectralConv2d(
                old.in_channels, old.out_channels, old.kernel_size, old.stride, old.padding, bias=False
            )
        else:
            new = torchlip.SpectralLinear(old.in_features, old.out_features)
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, new)
    return model


WAYS: dict[str, Constrain] = {
    "nothing": lambda model: model,
    "scaled by a constant": by_a_constant,
    "torch spectral_norm": by_torch,
    "power iteration, each layer": by_power_iteration,
    "constrain_norm, each layer": layer_by_layer,
    "constrain_norms": lambda model: constrain_norms(model, SHAPE),
    "deel-torchlip layers": by_deel,
}


class Run:
    """A network in training, one step at a time."""

    def __init__(self, model: nn.Module, batch: int, device: str) -> None:
        self.model, self.batch, self.device = model.to(device).train(), batch, device
        self.optimiser = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        self.generator = torch.Generator().manual_seed(0)

    def step(self, batch: int | None = None) -> float:
        """Take a step; returns milliseconds of CPU time."""
        batch = batch or self.batch
        x = torch.rand(batch, *SHAPE, generator=self.generator).to(self.device)
        y = torch.randint(10, (batch,), generator=self.generator).to(self.device)
        begin = self.now()
        self.optimiser.zero_grad()
        F.cross_entropy(self.model(x), y).backward()
        self.optimiser.step()
        return (self.now() - begin) * 1e3

    def now(self) -> float:
        """Seconds on the clock that steps are timed by."""
        if self.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def weights(self) -> Callable[[], float]:
        """A function that computes all weights and the gradients of what they are made of, as the network would."""
        layers = [m for m in self.model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        drawn = [1e-3 * torch.randn(layer.weight.shape, generator=self.generator) for layer in layers]
        given = [grad.to(self.device) for grad in drawn]

        def compute() -> float:
            begin = self.now()
            for hook in self.model._forward_pre_hooks.values():
                hook(self.model, ())
            weights: list[Tensor] = [layer.weight for layer in layers]
            for hook in self.model._forward_hooks.values():
                hook(self.model, (), None)
            torch.autograd.backward(weights, given)
            spent = self.now() - begin
            with torch.no_grad():  # so that weights change as they do in training
                for parameter in self.model.parameters():
                    if parameter.grad is not None:
                        parameter.sub_(parameter.grad, alpha=0.01)
                        parameter.grad = None
            return spent * 1e3

        return compute


def peak_memory(name: str, way: str, batch: int, device: str) -> float:
    """Highest resident memory, or memory of the GPU, in MB, of a process that takes three steps."""
    command = [sys.executable, __file__, "--memory", way, "--networks", name, "--batch", str(batch), "--device", device]
    given_back = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=given_back)
    return float(done.stdout.split()[-1])


def measure(name: str, batch: int, rounds: int, warm: int, device: str, with_memory: bool, results: Results) -> None:
    base = network(name)
    runs: dict[str, Run] = {}
    for way, constrain in WAYS.items():
        try:
            runs[way] = Run(constrain(copy.deepcopy(base)), batch, device)
        except ImportError as error:
            print(f"{way} is left out: {error}", file=sys.stderr)
    for way, run in runs.items():
        for _ in range(warm if way.startswith("constrain_norm") else 0):
            run.step(batch=2)
        for _ in range(2):
            run.step()
    steps: dict[str, list[float]] = {way: [] for way in runs}
    for turn in range(rounds):
        for way, run in runs.items():
            if way != "deel-torchlip layers" or turn < 3:
                steps[way].append(run.step())
    alone = {way: run.weights() for way, run in runs.items() if way not in ("nothing", "deel-torchlip layers")}
    seconds: dict[str, list[float]] = {way: [] for way in alone}
    for _ in range(rounds):
        for way, compute in alone.items():
            seconds[way].append(compute())
    memory = {way: peak_memory(name, way, batch, device) for way in runs} if with_memory else {}
    added = {w: mean(a - b for a, b in zip(own, steps["nothing"], strict=False)) for w, own in steps.items()}
    for way in runs:
        row: dict[str, Any] = {"network": name, "batch": batch, "what": way, "step_ms": mean(steps[way])}
        row |= {"added_ms": added[way], "alone_ms": mean(seconds[way]) if way in seconds else ""}
        row |= {
            f"x_{short}": added[way] / added[other] if way != "nothing" else ""
            for short, other in (("torch", "torch spectral_norm"), ("power", "power iteration, each layer"))
        }
        for short, other in (("torch", "torch spectral_norm"), ("power", "power iteration, each layer")):
            row[f"alone_x_{short}"] = mean(seconds[way]) / mean(seconds[other]) if way in seconds else ""
        row |= {"memory_mb": memory[way] - memory["nothing"] if memory else "", "steps": len(steps[way])}
        results.add(row)
        print(row, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=32)
    parser.add_argument("--warm", type=int, default=1040)
    parser.add_argument("--networks", nargs="*", default=NETWORKS)
    parser.add_argument("--memory", choices=WAYS, help="only print the peak memory of three steps of this way, in MB")
    parser.add_argument("--no-memory", action="store_true", help="leave out memory, which takes a process for each way")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory:
        run = Run(WAYS[args.memory](network(args.networks[0])), args.batch, args.device)
        for _ in range(3):
            run.step()
        if args.device == "cuda":
            print(torch.cuda.max_memory_allocated() / 2**20)
            return
        # Unlike getrusage's number, this one begins anew with the program.
        status = Path("/proc/self/status").read_text()
        print(float(status.split("VmHWM:")[1].split()[0]) / 1024)
        return
    results = Results(args.out / f"constrain_{args.device}.csv", environment(args.device), digits=4)
    for name in args.networks:
        measure(name, args.batch, args.rounds, args.warm, args.device, not args.no_memory, results)


if __name__ == "__main__":
    main()
