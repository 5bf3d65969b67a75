"""Lipschitz bounds of small networks: fastlip, the plain product of norms, ECLipsE-Fast, LipSDP, and the best stretch.

    pip install eclipse-nn cvxpy clarabel scs
    python benchmarks/bench_chain_bounds.py --data DIR      # CSV under benchmarks/results
    python benchmarks/bench_chain_bounds.py --most 400      # up to 400 units by a solver as well

Networks: a multilayer perceptron 784-100-100-10, random and trained on grey CIFAR-10 images of 28 x 28 (of random
images with random labels where there is no data), one of tanh, 768-64x5-10, a narrow deep one, 20-30x3-5, a
convolutional one on 3 x 16 x 16, and residual ones, of layers and of convolutions, random and trained. Rows:

- stretch: largest Jacobian norm found by climbing from random points, a lower bound on the constant;
- fastlip: ``lipschitz_bound``, all of its checks included; "composed" is the same with ``tight_chains=False``, and
  "plain" with ``tight_residuals=False`` as well;
- ECLipsE-Fast: eclipse-nn, on chains of layers; convolutions as dense matrices;
- LipSDP, at least: what no multipliers of the units (LipSDP-Neuron) can prove a smaller bound than: the value of a
  feasible point of the semidefinite program's dual, whose constraints are checked here in float64;
- LipSDP: that program by cvxpy, up to ``--most`` units: Clarabel up to 100, otherwise SCS. ``how`` has the solver's
  version, tolerance and iterations.

``ratio`` is over the stretch, ``x_lipsdp`` over "LipSDP, at least", ``x_plain`` the CPU seconds over those of the plain
bound.
"""

import argparse
import copy
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _timing import Results, environment
from torch import Tensor, nn

import fastlip
from fastlip.data import cifar10
from fastlip.lipschitz._graph import fold_scales, trace
from fastlip.lipschitz._multipliers import Map, SlopeNetwork
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


def trained(model: nn.Module, shape: tuple[int, ...], data: Path | None) -> nn.Module:
    """The model after two hundred steps on images of this shape: grey where it is that of a vector."""
    size, channels = (shape[1], shape[0]) if len(shape) == 3 else (math.isqrt(shape[0]), 1)
    if data is None:
        images, labels = torch.rand(2000, *shape), torch.randint(10, (2000,))
    else:
        images_of = cifar10(data, train=True)
        pixels, labels = images_of.images[:2000].float() / 255.0, images_of.labels[:2000]
        pixels = pixels.mean(1, keepdim=True) if channels == 1 else pixels
        images = F.interpolate(pixels, size, mode="bilinear").view(-1, *shape)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    model.train()
    for step in range(200):
        at = torch.arange(step * 50, (step + 1) * 50) % len(images)
        optimizer.zero_grad()
        F.cross_entropy(model(images[at]), labels[at]).backward()
        optimizer.step()
    return model


def residual_perceptron(inputs: int, width: int, hidden: int, blocks: int, outputs: int) -> nn.Sequential:
    def block() -> Residual:
        return Residual(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))

    layers = [layer for _ in range(blocks) for layer in (block(), nn.ReLU())]
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), *layers, nn.Linear(width, outputs))


def residual_convolutions(channels: int, blocks: int, *, norm: bool) -> nn.Sequential:
    def conv(n: int, stride: int = 1) -> list[nn.Module]:
        return [nn.Conv2d(n, channels, 3, stride, 1), *([nn.BatchNorm2d(channels)] if norm else [])]

    def block() -> Residual:
        return Residual(*conv(channels), nn.ReLU(), *conv(channels))

    layers = [layer for _ in range(blocks) for layer in (block(), nn.ReLU())]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)]
    return nn.Sequential(*conv(3, 2), nn.ReLU(), *layers, *head)


def convolutions() -> nn.Sequential:
    layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 10))


def networks(data: Path | None) -> dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]]:
    """How each network is made, and the shape of its input."""
    wide, image = (784,), (3, 16, 16)
    return {
        "MLP 784-100-100-10, random": (lambda: perceptron(nn.ReLU, 784, 100, 100, 10), wide),
        "MLP 784-100-100-10, trained": (lambda: trained(perceptron(nn.ReLU, 784, 100, 100, 10), wide, data), wide),
        "tanh 768-64x5-10": (lambda: perceptron(nn.Tanh, 768, 64, 64, 64, 64, 64, 10), (768,)),
        "20-30x3-5": (lambda: perceptron(nn.ReLU, 20, 30, 30, 30, 5), (20,)),
        "CNN on 3x16x16": (convolutions, image),
        "residual MLP, 4 blocks": (lambda: residual_perceptron(20, 32, 64, 4, 5), (20,)),
        "residual MLP, 2 blocks": (lambda: residual_perceptron(20, 16, 16, 2, 5), (20,)),
        "residual MLP, 3 blocks, trained": (lambda: trained(residual_perceptron(784, 48, 48, 3, 10), wide, data), wide),
        "residual CNN, 3 blocks": (lambda: residual_convolutions(8, 3, norm=False), (3, 12, 12)),
        "residual CNN, 1 block": (lambda: residual_convolutions(6, 1, norm=False), (3, 12, 12)),
        "residual CNN, 2 blocks, trained": (
            lambda: trained(residual_convolutions(8, 2, norm=True), image, data),
            image,
        ),
    }


class Rounded(nn.Module):
    """ReLU with a rounded corner, ``width`` times as wide as its arguments vary."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.deviation, self.measures = 1.0, 1.0, True

    def forward(self, x: Tensor) -> Tensor:
        if self.measures:
            self.deviation = x.std().item()
        return F.softplus(x, 1.0 / (self.width * self.deviation))


def rounded(model: nn.Module) -> nn.Module:
    """A copy with :class:`Rounded` in place of ReLU."""
    model = copy.deepcopy(model).requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.ReLU):
                setattr(parent, name, Rounded())
    return model


def stretch(model: nn.Module, shape: tuple[int, ...], steps: int = 300) -> float:
    """Largest Jacobian norm found: points x and directions v climb on ||J(x) v||, while rounded corners get sharper."""
    model = copy.deepcopy(model).double()
    smooth = rounded(model)
    corners = [module for module in smooth.modules() if isinstance(module, Rounded)]
    ones, points = (-1, *(1,) * len(shape)), 512 if math.prod(shape) <= 64 else 64
    size = torch.logspace(-1.5, 1.0, points, dtype=torch.float64).view(ones)
    x, v = (torch.randn(points, *shape, dtype=torch.float64).requires_grad_() for _ in range(2))
    optimizer = torch.optim.Adam([x, v], 0.1)
    for step in range(steps):
        for corner in corners:
            corner.width, corner.measures = 10.0 ** (-2.0 * step / steps), True
        with torch.no_grad():
            smooth(size * x)
        for corner in corners:
            corner.measures = False
        direction = v / v.flatten(1).norm(dim=1).view(ones)
        _, moved = torch.func.jvp(smooth, (size * x,), (direction,))
        optimizer.zero_grad()
        (-moved.flatten(1).norm(dim=1).clamp_min(1e-30).log().sum()).backward()
        optimizer.step()
    return fastlip.local_lipschitz(model, (size * x).detach(), rtol=1e-6, max_steps=200).max().item()


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


def applied(maps: Mapping[int, Map], outputs: Sequence[Tensor]) -> Tensor:
    return sum((m.matrix @ outputs[j] for j, m in maps.items()), torch.zeros(()))


def lipsdp_at_least(network: SlopeNetwork, columns: int = 16, iterations: int = 1000) -> tuple[float, str]:
    """||Y V_l||_F of matrices V_0, ..., V_l that satisfy, row by row, all that LipSDP knows of the slopes.

    A bound by multipliers is at least that: with X = V V^T, tr(F X) >= 0 for the F of a proof, where the terms of the
    multipliers are none of them negative. The rows are those of a fixed point of the derivatives' directions.
    """
    layers = network.activations
    points = [torch.randn(n, columns, dtype=torch.float64) for n in network.sizes]
    best, outputs = 0.0, list[Tensor]()
    for _ in range(iterations):
        found, arguments = [points[0] / points[0].norm()], list[Tensor]()
        directions = [x / x.norm(dim=1, keepdim=True).clamp_min(1e-300) for x in points[1:]]
        for layer, direction in zip(layers, directions, strict=True):
            arguments.append(applied(layer.maps, found))
            z = arguments[-1]
            found.append(layer.middle * z + layer.radius * z.norm(dim=1, keepdim=True) * direction)
        y = applied(network.output, found)
        if y.norm().item() > best:
            best, outputs = y.norm().item(), found
        points = [torch.zeros_like(v) for v in found]
        for j, m in network.output.items():
            points[j] += m.matrix.mT @ y
        for i in range(len(layers), 0, -1):
            layer, z = layers[i - 1], arguments[i - 1]
            along = (points[i] * directions[i - 1]).sum(1, keepdim=True)
            back = layer.middle * points[i] + layer.radius * along * z / z.norm(dim=1, keepdim=True).clamp_min(1e-300)
            for j, m in layer.maps.items():
                points[j] += m.matrix.mT @ back
    violation = abs(outputs[0].norm().item() - 1.0)
    for layer, v in zip(layers, outputs[1:], strict=True):
        z = applied(layer.maps, outputs)
        products = ((v - layer.low * z) * (layer.high * z - v)).sum(1)
        violation = max(violation, (-products / z.square().sum(1).clamp_min(1e-300)).max().item())
    assert violation < 1e-12, violation
    return best * (1.0 - 1e-9), f"dual point, {columns} columns, constraints to {violation:.1g}"


def lipsdp(network: SlopeNetwork) -> tuple[float, str]:
    import cvxpy
    import numpy as np

    sizes = network.sizes
    starts = np.cumsum([0, *sizes])
    total, units = int(starts[-1]), int(starts[-1]) - sizes[0]
    maps = []
    for layer in network.activations:
        wide = np.zeros((layer.size, total))
        for j, m in layer.maps.items():
            wide[:, starts[j] : starts[j + 1]] = m.matrix.numpy()
        maps.append(wide)
    stacked = np.concatenate(maps)
    output = np.zeros((len(next(iter(network.output.values())).matrix), total))
    for j, m in network.output.items():
        output[:, starts[j] : starts[j + 1]] = m.matrix.numpy()
    # The input enters by its products with the rows that read it alone: Z Z^T = R R^T.
    whole = np.concatenate([stacked[:, : sizes[0]], output[:, : sizes[0]]])
    reads = np.abs(whole).any(axis=1)
    if reads.sum() < sizes[0]:
        factor = np.zeros((len(whole), reads.sum()))
        factor[reads] = np.linalg.cholesky(whole[reads] @ whole[reads].T + 1e-12 * np.eye(reads.sum()))
        stacked = np.concatenate([factor[:units], stacked[:, sizes[0] :]], axis=1)
        output = np.concatenate([factor[units:], output[:, sizes[0] :]], axis=1)
    first = stacked.shape[1] - units
    multiplier, rho = cvxpy.Variable(units, nonneg=True), cvxpy.Variable()
    # In variables of the size of the product of norms, in which the solvers' tolerances mean something.
    scale = math.sqrt(lipsdp_at_least(network, 4, 50)[0])
    output = output / scale**2
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
        how = f"Clarabel {version('clarabel')}"
    else:
        problem.solve(solver="SCS", eps=1e-5, max_iters=5000)
        how = f"SCS {version('scs')}, eps 1e-5"
    how = f"{how}: {problem.status} after {problem.solver_stats.num_iters} iterations"
    return math.sqrt(float(rho.value)) * scale**2, how


def measure(name: str, model: nn.Module, shape: tuple[int, ...], results: Results, most: int) -> None:
    model.eval()
    begin = time.process_time()
    least = stretch(model, shape)
    rows: dict[str, tuple[float, str, float]] = {"stretch": (least, "", time.process_time() - begin)}

    def add(method: str, run: Callable[[], float | tuple[float, str]], repeats: int = 1) -> None:
        times = []
        for _ in range(repeats):
            begin = time.process_time()
            value = run()
            times.append(time.process_time() - begin)
        rows[method] = *(value if isinstance(value, tuple) else (value, "")), sorted(times)[len(times) // 2]

    fastlip.lipschitz_bound(model, shape)
    add("plain", lambda: fastlip.lipschitz_bound(model, shape, tight_chains=False, tight_residuals=False).upper, 5)
    add("composed", lambda: fastlip.lipschitz_bound(model, shape, tight_chains=False).upper, 5)
    add("fastlip", lambda: fastlip.lipschitz_bound(model, shape).upper, 5)
    network = slope_network(model, shape)
    weights = matrices(network)
    if weights is not None:
        add("ECLipsE-Fast", lambda: eclipse(weights), 3)
    add("LipSDP, at least", lambda: lipsdp_at_least(network))
    if sum(network.sizes[1:]) <= most:
        add("LipSDP", lambda: lipsdp(network))
    for method, (value, how, seconds) in rows.items():
        row: dict[str, Any] = {"network": name, "method": method, "value": value, "ratio": value / least}
        row |= {"x_lipsdp": value / rows["LipSDP, at least"][0], "how": how}
        row |= {"cpu_seconds": seconds, "x_plain": seconds / rows["plain"][2]}
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
    for name, (build, shape) in networks(args.data).items():
        if args.only is None or args.only in name:
            torch.manual_seed(0)
            measure(name, build(), shape, results, args.most)


if __name__ == "__main__":
    main()
