"""Local Lipschitz constants on balls around images, against auto_LiRPA's bounds of Jacobians.

    python benchmarks/bench_local_bounds.py --lirpa DIRECTORY [--data DIRECTORY] [--images 100] [--peer-images 100]

One run, one process, one thread. Images: CIFAR-10's test set where ``--data`` has it, averaged to 3x8x8, the size of
auto_LiRPA's own example, as its time grows with the inputs; uniform noise otherwise. Networks: the MLP 192-100-200-10
of that example, a deeper one and two CNNs, trained for a few epochs, and the first one random as well. ``DIRECTORY`` is
a checkout of auto_LiRPA that has
``JacobianOP`` (0.7.1 was used; the version on package indexes is older and lacks it). Compared:

- fastlip: :func:`fastlip.lipschitz.local_lipschitz_bounds` with its search for lower sides, and without (1 point);
- auto_LiRPA: elementwise bounds of the Jacobian by CROWN (Z. Shi et al., NeurIPS 2022), and by IBP. It takes one image
  at a time there, and one output at a time where there are convolutions. The L2 constant is the least of what they
  imply: the norm of the centre plus that of the radius, and the norm of the largest magnitudes. Building the bounded
  module is not counted.

``upper`` is the mean over the images; ``over_lower`` the geometric mean of upper / lower, where lower is the largest
Jacobian norm that fastlip found in the ball; ``x_fastlip`` the geometric mean of this method's bound over fastlip's on
the same images; ``tighter`` the share of images on which it is below fastlip's; ``cpu_s_100`` CPU seconds per 100
images; ``x_cpu`` the same over that of fastlip with both sides. Before a network is timed, auto_LiRPA's bounds of three
images must contain the Jacobian there.
"""

import argparse
import itertools
import logging
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _timing import Results, environment
from torch import Tensor, nn

from fastlip import data
from fastlip.lipschitz import local_lipschitz_bounds

CLASSES, SIZE = 10, 8
BALLS = [("l2", 0.1), ("l2", 0.5), ("linf", 4 / 255)]


def networks() -> dict[str, nn.Module]:
    """Untrained networks by name."""
    inputs = 3 * SIZE**2

    def mlp(*widths: int) -> nn.Module:
        layers: list[nn.Module] = [nn.Flatten()]
        for a, b in itertools.pairwise(widths):
            layers += [nn.Linear(a, b), nn.ReLU()]
        return nn.Sequential(*layers[:-1])

    narrow = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.Flatten(),
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, CLASSES),
    )  # fmt: skip
    deep = nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(32, CLASSES),
    )  # fmt: skip
    return {
        "mlp 192-100-200-10": mlp(inputs, 100, 200, CLASSES),
        "mlp 192-64x5-10": mlp(inputs, *(64,) * 5, CLASSES),
        "cnn 8-16, 64": narrow,
        "cnn 8-8-8": deep,
    }


def images(root: str | None, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images to train on, [N, 3, 8, 8], their labels, and ``count`` images to bound at."""
    if root is None:
        noise = torch.rand(4000 + count, 3, SIZE, SIZE)
        return noise[count:], torch.randint(CLASSES, (4000,)), noise[:count]

    def small(x: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(x.float() / (255.0 if x.dtype == torch.uint8 else 1.0), 32 // SIZE)

    train, test = data.cifar10(root, train=True), data.cifar10(root, train=False)
    return small(train.images[:20000]), train.labels[:20000], small(test.images[:count])


def fit(net: nn.Module, x: Tensor, y: Tensor, epochs: int = 5) -> nn.Module:
    """Train with Adam."""
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(128):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
    return net


class Lirpa:
    """auto_LiRPA's bounds of a network's Jacobian."""

    def __init__(self, net: nn.Module, x: Tensor) -> None:
        from auto_LiRPA import BoundedModule, BoundedTensor  # type: ignore[import-not-found]
        from auto_LiRPA.jacobian import JacobianOP  # type: ignore[import-not-found]
        from auto_LiRPA.perturbations import PerturbationLpNorm  # type: ignore[import-not-found]

        class Jacobian(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = net

            def forward(self, x: Tensor, outputs: Tensor) -> Tensor:
                return JacobianOP.apply(self.net(x) @ outputs, x)

        # The gradient of a convolution takes one output at a time.
        convolutions = any(isinstance(m, nn.Conv2d) for m in net.modules())
        self._outputs = torch.eye(CLASSES).split(1 if convolutions else CLASSES, 1)
        # The bounded graph keeps this very tensor, and reads no other that is passed later: it is written in place.
        self._chosen = self._outputs[0].clone()
        self._module = BoundedModule(
            Jacobian(), (BoundedTensor(x[:1]), self._chosen), bound_opts={"conv_mode": "matrix"}
        )
        self._net = net
        self._ball = lambda x, norm, radius: BoundedTensor(
            x, PerturbationLpNorm(norm=2 if norm == "l2" else float("inf"), eps=radius)
        )

    def crown(self, x: Tensor, norm: str, radius: float) -> Tensor:
        """By CROWN, intermediate bounds too."""
        return self._each(x, norm, radius, self._by_crown)

    def ibp(self, x: Tensor, norm: str, radius: float) -> Tensor:
        """By interval arithmetic."""
        return self._each(x, norm, radius, self._by_ibp)

    def _by_crown(self, of: Any) -> Any:
        return self._module.compute_jacobian_bounds(of, optimize=False)

    def _by_ibp(self, of: Any) -> Any:
        return self._module.compute_bounds(x=of, method="IBP")

    def _each(self, x: Tensor, norm: str, radius: float, bounds: Callable[[Any], tuple[Tensor, Tensor]]) -> Tensor:
        found = []
        for t in x.split(1):
            low, high = self._jacobian(self._ball(t, norm, radius), bounds)
            centre, half, largest = 0.5 * (low + high), 0.5 * (high - low), torch.maximum(-low, high)
            by_centre = torch.linalg.matrix_norm(centre, 2) + torch.linalg.matrix_norm(half, 2)
            found.append(torch.minimum(by_centre, torch.linalg.matrix_norm(largest, 2)))
        return torch.stack(found)

    def _jacobian(self, ball: Tensor, bounds: Callable[[Any], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Elementwise bounds of the Jacobian on a ball, [classes, inputs] each."""
        parts = []
        for outputs in self._outputs:
            self._chosen.copy_(outputs)
            ends = bounds((ball, self._chosen))
            parts.append([end.detach().double().reshape(-1, ball.numel()) for end in ends])
        low, high = (torch.cat(ends) for ends in zip(*parts, strict=True))
        return low, high

    def check(self, x: Tensor) -> None:
        """Raise ValueError unless the bounds contain the Jacobians at samples."""
        for t in x.split(1):
            exact = torch.autograd.functional.jacobian(self._net, t).double().view(CLASSES, -1)
            for bounds in (self._by_crown, self._by_ibp):
                low, high = self._jacobian(self._ball(t, "l2", 1e-3), bounds)
                slack = 1e-5 * exact.abs().max()
                if bool(((low > exact + slack) | (exact > high + slack)).any()):
                    raise ValueError("auto_LiRPA's bounds do not contain the Jacobian at the centre")


def geometric(ratio: Tensor) -> float:
    return ratio.double().log().mean().exp().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lirpa", required=True, help="checkout of auto_LiRPA, or several directories joined by ':'")
    parser.add_argument("--data", help="directory with CIFAR-10")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--peer-images", type=int, default=100, help="of these, how many auto_LiRPA bounds")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "local_bounds_cpu.csv")
    args = parser.parse_args()
    sys.path += args.lirpa.split(":")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    import auto_LiRPA  # type: ignore[import-not-found]

    logging.disable(logging.CRITICAL)
    results = Results(args.out, environment("cpu") | {"auto_LiRPA": auto_LiRPA.__version__})
    x, y, at = images(args.data, args.images)
    nets = networks()
    first = next(iter(nets.values()))
    for name, net in nets.items():
        for weights in ("random", "trained") if net is first else ("trained",):
            model = (fit(net, x, y) if weights == "trained" else net).eval().requires_grad_(False)
            peer = Lirpa(model, at)
            peer.check(at[:3])
            for norm, radius in BALLS:
                fixed = {"network": name, "weights": weights, "norm": norm, "radius": radius}
                compare(results, fixed, model, peer, at, args.peer_images)
            net.requires_grad_(True)


def compare(results: Results, fixed: dict[str, Any], model: nn.Module, peer: Lirpa, at: Tensor, count: int) -> None:
    """Put down the rows of one network and ball."""
    norm, radius = fixed["norm"], fixed["radius"]
    begin = time.process_time()
    ours = local_lipschitz_bounds(model, at, radius, norm=norm)
    both = time.process_time() - begin

    def put(method: str, upper: Tensor, seconds: float) -> None:
        number = len(upper)
        row = fixed | {
            "method": method,
            "images": number,
            "upper": upper.mean().item(),
            "over_lower": geometric(upper / ours.lower[:number]),
            "x_fastlip": geometric(upper / ours.upper[:number]),
            "tighter": (upper < ours.upper[:number] * (1.0 - 1e-6)).double().mean().item(),
            "cpu_s_100": 100.0 * seconds / number,
            "x_cpu": (seconds / number) / (both / len(at)),
        }
        results.add(row)
        print(row, flush=True)

    put("fastlip, both sides", ours.upper, both)
    methods: dict[str, Callable[[], Tensor]] = {
        "fastlip, 1 point": lambda: local_lipschitz_bounds(model, at, radius, norm=norm, points=1).upper,
        "auto_LiRPA CROWN": lambda: peer.crown(at[:count], norm, radius),
        "auto_LiRPA IBP": lambda: peer.ibp(at[:count], norm, radius),
    }
    for method, run in methods.items():
        begin = time.process_time()
        upper = run()
        put(method, upper, time.process_time() - begin)


if __name__ == "__main__":
    main()
