"""Small networks in all the ways they are written, and the comparison of their copies with them."""

import itertools

import torch
from torch import nn
from torch.nn import functional

from fastlip.attacks._interleaved import OneFunction, SmallNetwork
from fastlip.attacks._prepare import network_of


def body(channels=(3, 8, 16), stride=2):
    return [part for a, b in itertools.pairwise(channels) for part in (nn.Conv2d(a, b, 3, stride, 1), nn.ReLU())]


def sequential(*head, channels=(3, 8, 16)):
    return nn.Sequential(*body(channels), *head)


class Written(nn.Module):
    """A model whose forward makes vectors of maps in one of the usual ways."""

    def __init__(self, flatten):
        super().__init__()
        self.body = nn.Sequential(*body())
        self.hidden, self.drop, self.last = nn.Linear(16 * 16, 20), nn.Dropout(0.5), nn.Linear(20, 5)
        self.flatten = flatten

    def forward(self, x):
        x = self.flatten(self.body(x))
        return self.last(self.drop(functional.relu(self.hidden(x))))


WHOLE = {
    "modules": lambda: sequential(nn.Flatten(), nn.Linear(256, 5)),
    "a dropout": lambda: sequential(nn.Flatten(), nn.Dropout(), nn.Linear(256, 9), nn.ReLU(), nn.Linear(9, 5)),
    "batch norm": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3, 4), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5)
    ),
    "no bias": lambda: nn.Sequential(nn.Conv2d(3, 4, 5, 3, bias=False), nn.Flatten(), nn.Linear(64, 5, bias=False)),
    "view(size)": lambda: Written(lambda x: x.view(x.size(0), -1)),
    "view(shape)": lambda: Written(lambda x: x.view(x.shape[0], -1)),
    "reshape(shape)": lambda: Written(lambda x: x.reshape(x.shape[0], -1)),
    "torch.flatten": lambda: Written(lambda x: torch.flatten(x, 1)),
    "start_dim": lambda: Written(lambda x: torch.flatten(x, start_dim=1)),
    "flatten method": lambda: Written(lambda x: x.flatten(1)),
}


def problem(model, batch=5, size=16):
    torch.manual_seed(0)
    model = model().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
    return model, torch.rand(batch, 3, size, size)


def copy_of(model, x):
    return network_of(model, x, fast=True, precision=None, however_small=True).faster


def small_networks(made):
    return [m for m in made.model.modules() if isinstance(m, SmallNetwork)]


def interleaved(small):
    """The layers that have become one function, for each size that has come."""
    return [way[0].interleaved for way in small.ways.values() if isinstance(way[0], OneFunction)]


def check(made, model, x):
    seen = x.clone().requires_grad_()
    want = model(seen)
    weights = torch.linspace(-1, 1, want.numel()).view(want.shape)
    (wanted,) = torch.autograd.grad((want * weights).sum(), seen)
    found = made(other := x.clone().requires_grad_())
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.autograd.grad((found * weights).sum(), other)[0], wanted, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        assert torch.equal(made(x), found)


class Pooled(nn.Module):
    """Pools as functions, and ReLUs behind them."""

    def __init__(self, pool):
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3), nn.Linear(8 * 9, 5)
        self.pool = pool

    def forward(self, x):
        x = functional.relu(self.pool(self.first(x)))
        x = self.pool(self.second(x).relu())
        return self.last(x.flatten(1))


class Global(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.last = nn.Sequential(*body()), nn.Linear(16, 5)

    def forward(self, x):
        return self.last(functional.adaptive_avg_pool2d(self.body(x), 1).flatten(1))


POOLED = {  # models, and how many layers become one function
    "max": (lambda: Pooled(lambda x: functional.max_pool2d(x, 2)), 5),
    "max, torch": (lambda: Pooled(lambda x: torch.max_pool2d(x, (2, 2), (2, 2))), 5),
    "max, all arguments": (lambda: Pooled(lambda x: functional.max_pool2d(x, 3, 2, 1, 1, ceil_mode=False)), 5),
    "average": (lambda: Pooled(lambda x: functional.avg_pool2d(x, kernel_size=2, stride=2)), 5),
    "global": (Global, 4),
    "modules": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(6, 9, 3), nn.AvgPool2d(2, 1, 1), nn.ReLU(),
            nn.Dropout2d(), nn.Conv2d(9, 10, 1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(),
            nn.Linear(10, 4), nn.ReLU(), nn.ReLU(), nn.Linear(4, 3),
        ),
        8,
    ),
}  # fmt: skip


class Normalised(nn.Module):
    def __init__(self, model, also_read):
        super().__init__()
        self.model, self.also_read = model, also_read
        self.register_buffer("mean", torch.rand(1, 3, 1, 1))
        self.register_buffer("deviation", torch.rand(3, 1, 1) + 0.5)

    def forward(self, x):
        y = (x - self.mean) / self.deviation
        return self.model(y) + y.amax((1, 2, 3))[:, None] if self.also_read else self.model(y)
