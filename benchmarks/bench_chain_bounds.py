"""Lipschitz bounds of small networks: fastlip, the plain product of norms, ECLipsE-Fast, LipSDP, and the best stretch.

    pip install eclipse-nn cvxpy clarabel scs
    python benchmarks/bench_chain_bounds.py          # CSV under benchmarks/results

Networks: a multilayer perceptron 784-100-100-10, random and trained on grey CIFAR-10 images of 28 x 28 (of random
images with random labels where there is no data), one of tanh, 768-64x5-10, a narrow deep one, 20-30x3-5, a
convolutional one on 3 x 16 x 16, and two residual ones. Rows:

- stretch: largest Jacobian norm found by climbing from random points, a lower bound on the constant;
- fastlip: ``lipschitz_bound``, all of its checks included; "composed" is the same with ``tight_chains=False``, and
  "plain" with ``tight_residuals=False`` as well;
- ECLipsE-Fast: eclipse-nn, on chains of layers; convolutions as dense matrices;
- LipSDP: the semidefinite program with a multiplier for each unit, by cvxpy: Clarabel up to 100 units, otherwise SCS.

``ratio`` is over the stretch, ``x_plain`` the CPU seconds over those of the plain bound.
"""

import argparse
import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _timing import Results, environment
from torch import Tensor, nn

import fastlip
from fastlip.data import cifar10
from fastlip.lipschitz._graph import fold_scales, trace
from fastlip.lipschitz._multipliers import SlopeNetwork
from fastlip.lipschitz._regions import _network, find_regions
from fastlip.lipschitz._steps import topological_order


class Residual(nn.Module):
    """x + W2 f(W1 x), by layers or by convolutions."""

    def __init__(self, *branch: nn.Module) -> None:
        super().__init__()
        self.branch = nn.Sequential(*branch)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def perceptron(activation: Callable[[], nn.Module], *sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for n, m in itertools.pairwise(sizes):
        layers += [nn.Linear(n, m), activation()]
    return nn.Sequential(*layers[:-1])


def trained(model: nn.Sequential, data: Path | None) -> nn.Sequential:
    """The model after two hundred steps on grey images of 28 x 28."""
    if data is None:
        images, labels = torch.rand(2000, 784), torch.randint(10, (2000,))
    else:
        images_of = cifar10(data, train=True)
        grey, labels = images_of.images[:2000].float().mean(1, keepdim=True) / 255.0, images_of.labels[:2000]
        images = F.interpolate(grey, 28, mode="bilinear").flatten(1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for step in range(200):
        at = torch.arange(step * 50, (step + 1) * 50) % len(images)
        optimizer.zero_grad()
        F.cross_entropy(model(images[at]), labels[at]).backward()
        optimizer.step()
    return model


def networks(data: Path | None) -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    torch.manual_seed(0)
    convolutions = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )
    layers = [
        layer for _ in range(4) for layer in (Residual(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)), nn.ReLU())
    ]
    maps = [
        layer
        for _ in range(3)
        for layer in (Residual(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)), nn.ReLU())
    ]
    return {
        "MLP 784-100-100-10, random": (perceptron(nn.ReLU, 784, 100, 100, 10), (784,)),
        "MLP 784-100-100-10, trained": (trained(perceptron(nn.ReLU, 784, 100, 100, 10), data), (784,)),
        "tanh 768-64x5-10": (perceptron(nn.Tanh, 768, 64, 64, 64, 64, 64, 10), (768,)),
        "20-30x3-5": (perceptron(nn.ReLU, 20, 30, 30, 30, 5), (20,)),
        "CNN on 3x16x16": (convolutions, (3, 16, 16)),
        "residual MLP, 4 blocks": (nn.Sequential(nn.Linear(20, 32), nn.ReLU(), *layers, nn.Linear(32, 5)), (20,)),
        "residual CNN, 3 blocks": (
            nn.Sequential(
                nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), *maps, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
            ),
            (3, 12, 12),
        ),
    }


def stretch(model: nn.Module, shape: tuple[int, ...], points: int = 100, rounds: int = 120) -> float:
    """Largest Jacobian norm found: points move at random where that lengthens J v, and v by power iteration."""
    model = model.double()
    x = 3.0 * torch.randn(points, *shape, dtype=torch.float64)
    x[::2] *= 0.1
    v = torch.randn_like(x)
    ones = (-1, *(1,) * len(shape))
    sizes = 10.0 ** -torch.linspace(0.0, 2.0, points, dtype=torch.float64)
    for _ in range(rounds):
        v = v / v.flatten(1).norm(dim=1).view(ones)
        length = (sizes[torch.randperm(points)] * x.flatten(1).norm(dim=1)).view(ones)
        noise = torch.randn_like(x)
        moved = x + length * noise / noise.flatten(1).norm(dim=1).view(ones)
        before, after = (torch.func.jvp(model, (p,), (v,))[1].norm(dim=1) for p in (x, moved))
        x = torch.where((after > before).view(ones), moved, x)
        _, tangent = torch.func.jvp(model, (x,), (v,))
        _, pull = torch.func.vjp(model, x)
        (v,) = pull(tangent)
    found = fastlip.local_lipschitz(model, x, rtol=1e-6, max_steps=200).max().item()
    model.float()
    return found


def slope_network(model: nn.Module, shape: tuple[int, ...]) -> SlopeNetwork:
    traced = trace(model.eval(), shape)
    fold_scales(traced.last)
    (region,) = find_regions(topological_order(traced.last), True)
    network = _network(region)
    assert network is not None
    return network


def matrices(network: SlopeNetwork) -> list[Tensor] | None:
    """The weights of a chain as dense matrices; None for what is no chain of slopes in [0, 1]."""
    weights = []
    for i, activation in enumerate(network.activations):
        if list(activation.maps) != [i] or (activation.low, activation.high) != (0.0, 1.0):
            return None
        weights.append(activation.maps[i].matrix)
    return [*weights, network.output[len(weights)].matrix] if list(network.output) == [len(weights)] else None


def eclipse(weights: list[Tensor]) -> float:
    from eclipse_nn.LipConstEstimator import LipConstEstimator

    estimator = LipConstEstimator(weights=weights)
    return float(estimator.estimate(method="ECLipsE_Fast"))


def lipsdp(network: SlopeNetwork) -> float:
    import cvxpy
    import numpy as np

    sizes = network.sizes
    starts = np.cumsum([0, *sizes])
    total, units = int(starts[-1]), int(starts[-1]) - sizes[0]
    # The input enters by its products with the first layer alone: Z Z^T = R R^T.
    maps = []
    for activation in network.activations:
        wide = np.zeros((activation.size, total))
        for j, m in activation.maps.items():
            wide[:, starts[j] : starts[j + 1]] = m.matrix.numpy()
        maps.append(wide)
    stacked = np.concatenate(maps)
    output = np.zeros((len(next(iter(network.output.values())).matrix), total))
    for j, m in network.output.items():
        output[:, starts[j] : starts[j + 1]] = m.matrix.numpy()
    if sizes[0] > units + len(output):
        whole = np.concatenate([stacked[:, : sizes[0]], output[:, : sizes[0]]])
        factor = np.linalg.cholesky(whole @ whole.T + 1e-12 * np.eye(len(whole)))
        stacked = np.concatenate([factor[:units], stacked[:, sizes[0] :]], axis=1)
        output = np.concatenate([factor[units:], output[:, sizes[0] :]], axis=1)
    first = stacked.shape[1] - units
    multiplier, rho = cvxpy.Variable(units, nonneg=True), cvxpy.Variable()
    low, high = network.activations[0].low, network.activations[0].high
    places = np.concatenate([np.zeros((units, first)), np.eye(units)], axis=1)
    scaled = cvxpy.diag(multiplier)
    coupling = places.T @ scaled @ (0.5 * (low + high) * stacked)
    form = places.T @ scaled @ places - coupling - coupling.T
    if low * high:
        form = form + low * high * stacked.T @ scaled @ stacked
    corner = np.zeros((stacked.shape[1],) * 2)
    corner[:first, :first] = np.eye(first)
    form = form + rho * corner - output.T @ output
    problem = cvxpy.Problem(cvxpy.Minimize(rho), [0.5 * (form + form.T) >> 0])
    if units <= 100:
        problem.solve(solver="CLARABEL")
    else:
        problem.solve(solver="SCS", eps=1e-5, max_iters=4000)
    return math.sqrt(float(rho.value))


def measure(name: str, model: nn.Module, shape: tuple[int, ...], results: Results, most: int) -> None:
    model.eval()
    begin = time.process_time()
    least = stretch(model, shape)
    rows: dict[str, tuple[float, float]] = {"stretch": (least, time.process_time() - begin)}

    def add(method: str, run: Callable[[], float], repeats: int = 1) -> None:
        times = []
        for _ in range(repeats):
            begin = time.process_time()
            value = run()
            times.append(time.process_time() - begin)
        rows[method] = value, sorted(times)[len(times) // 2]

    fastlip.lipschitz_bound(model, shape)
    add("plain", lambda: fastlip.lipschitz_bound(model, shape, tight_chains=False, tight_residuals=False).upper, 5)
    add("composed", lambda: fastlip.lipschitz_bound(model, shape, tight_chains=False).upper, 5)
    add("fastlip", lambda: fastlip.lipschitz_bound(model, shape).upper, 5)
    network = slope_network(model, shape)
    weights = matrices(network)
    if weights is not None:
        add("ECLipsE-Fast", lambda: eclipse(weights), 3)
    if sum(network.sizes[1:]) <= most:
        add("LipSDP", lambda: lipsdp(network))
    for method, (value, seconds) in rows.items():
        row: dict[str, Any] = {"network": name, "method": method, "value": value, "ratio": value / least}
        row |= {"cpu_seconds": seconds, "x_plain": seconds / rows["plain"][1]}
        results.add(row)
        print(f"{name:<30} {method:<14} {value:>10.4g} {value / least:>8.3f} {seconds:>9.3f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10")
    parser.add_argument("--most", type=int, default=100, help="units up to which the semidefinite program is solved")
    parser.add_argument("--only", help="part of the name of the networks to measure")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = Results(args.out / "chain_bounds_cpu.csv", environment("cpu"))
    for name, (model, shape) in networks(args.data).items():
        if args.only is None or args.only in name:
            measure(name, model, shape, results, args.most)


if __name__ == "__main__":
    main()
