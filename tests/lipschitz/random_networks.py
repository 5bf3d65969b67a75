"""Random small networks as users write them, and how far each of them stretches its inputs.

An independent judge of :func:`fastlip.lipschitz_bound`. Every network is a program, printed in full where a test fails,
so that what is traced is what people write: modules and functions mixed, in-place forms, aliases, hooks, forwards
replaced. Its stretch is searched for in float64 by running the network alone; nothing of fastlip takes part in it.

    python tests/lipschitz/random_networks.py --seeds 0:2000 --json out.json [--compare earlier.json]
    python tests/lipschitz/random_networks.py --show 17
"""

import argparse
import contextlib
import copy
import functools
import itertools
import json
import linecache
import math
import random
import re
import sys
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from network_templates import HOSTILE_TEMPLATES, TEMPLATES
from stretches import largest_stretch, tensor_of
from torch import Tensor, nn
from torch.func import functional_call

Shape = tuple[int, ...]

# Numbers in one sample: a Jacobian by differences stays cheap.
_MOST_INPUTS = 160
_MOST_VALUES = 400

HEADER = """import copy, functools, math, types
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from random_networks import fill, layers_of

handles = []  # of what reaches beyond the network
"""


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def fill(net: nn.Module, style: str, seed: int) -> None:
    """Give a network structured weights, which attain products of norms, so that a wrong bound is noticed."""
    g = torch.Generator().manual_seed(seed)
    r = random.Random(seed)
    scale, bias = r.choice([0.5, 1.0, 1.0, 2.0, 4.0]), r.choice([0.0, 0.3, 0.3, 3.0, 50.0])
    if style in ("dirac", "positive", "permutation"):
        scale, bias = r.choice([0.5, 1.0, 1.0, 2.0]), r.choice([0.0, 50.0, 50.0])

    def normal(t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=g, dtype=torch.float64)

    with torch.no_grad():
        for name, p in net.named_parameters():
            last = name.rpartition(".")[2]
            if not p.is_floating_point() or p.numel() == 0:
                continue
            if "bias" in last:
                value = bias * (torch.ones(p.shape, dtype=torch.float64) if style != "normal" else normal(p))
            elif p.dim() < 2:
                value = 1.0 + 0.5 * normal(p) if style in ("normal", "orthogonal") else torch.ones(p.shape)
                if style == "normal" and r.random() < 0.15:
                    value = torch.zeros(p.shape)
            else:
                sign = -1.0 if style == "dirac" and r.random() < 0.4 else 1.0
                value = sign * scale * _matrix(p, style, normal(p), g)
            p.copy_(value)
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_var is not None:
                if style in ("normal", "orthogonal"):
                    module.running_mean.copy_(normal(module.running_mean))
                    module.running_var.copy_(0.05 + 2.0 * torch.rand(module.running_var.shape, generator=g))
                elif r.random() < 0.5:
                    module.running_var.fill_(r.choice([0.25, 1.0, 4.0]))


def _matrix(p: Tensor, style: str, noise: Tensor, g: torch.Generator) -> Tensor:
    rows = p.shape[0]
    flat = noise.reshape(rows, -1)
    if style == "normal":
        return noise / flat.shape[1] ** 0.5
    if style == "orthogonal":
        u, _, v = torch.linalg.svd(flat, full_matrices=False)
        return (u @ v).reshape(p.shape)
    if style == "positive":
        return torch.ones_like(noise) / flat.shape[1] ** 0.5
    value = torch.zeros_like(noise)
    mixed = style == "permutation" or p.shape[1] > 2 * rows
    order = torch.randperm(p.shape[1], generator=g) if mixed else torch.arange(p.shape[1])
    middle = tuple(n // 2 for n in p.shape[2:])
    for row in range(rows):
        value[(row, int(order[row % p.shape[1]]), *middle)] = 1.0
    return value


def layers_of(net: nn.Module, *kinds: type[nn.Module]) -> list[nn.Module]:
    """The modules of some kinds, those with weights by default."""
    conv = nn.modules.conv._ConvNd
    return [m for m in net.modules() if isinstance(m, kinds or (nn.Linear, conv))]


# ---------------------------------------------------------------------------------------------------------------------
# Programs


class Unfit(Exception):
    """An ingredient does not fit a shape."""


@dataclass(frozen=True)
class Value:
    """A variable of a program.

    Attributes:
        name: its name.
        shape: shape of one sample.
        owned: whether nothing else in the program uses its memory, so that it may be overwritten.
    """

    name: str
    shape: Shape
    owned: bool = True


class Program:
    """A program under construction."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.seed = seed
        self.classes: list[str] = []
        self.after: list[str] = []
        self.traits: set[str] = set()
        self.blocks = 0

    def source(self, style: str) -> str:
        parts = [*self.classes, f"net = Net()\nfill(net, {style!r}, {self.seed})"]
        return "\n\n".join([*parts, *self.after]) + "\n"


class Writer:
    """One class of a program: the lines of its ``__init__`` and ``forward``."""

    def __init__(self, program: Program, name: str) -> None:
        self.program, self.rng, self.name = program, program.rng, name
        self.init: list[str] = []
        self.body: list[str] = []
        self.methods: list[str] = []
        self.locked: set[str] = set()
        self.names = {"x"}
        self.made: list[tuple[str, str, Shape]] = []
        self.signature = "self, x"
        self.decorator = ""
        self._count: Counter[str] = Counter()

    def trait(self, *names: str) -> None:
        self.program.traits.update(names)

    def attach(self, prefix: str, expression: str) -> str:
        self._count[prefix] += 1
        name = f"{prefix}{self._count[prefix]}"
        self.init.append(f"self.{name} = {expression}")
        return f"self.{name}"

    def buffer(self, prefix: str, expression: str) -> str:
        self._count[prefix] += 1
        name = f"{prefix}{self._count[prefix]}"
        kind = self.rng.choice(["buffer", "buffer", "parameter"])
        if kind == "buffer":
            self.init.append(f'self.register_buffer("{name}", {expression})')
        else:
            self.init.append(f"self.{name} = nn.Parameter({expression})")
        return f"self.{name}"

    def say(self, line: str) -> None:
        self.body.append(line)

    def fresh(self) -> str:
        for name in ("x", "out", "h", "y", "z", "t", "feat", "u"):
            if name not in self.names:
                break
        else:
            name = f"h{len(self.names)}"
        self.names.add(name)
        return name

    def put(self, v: Value, expression: str, shape: Shape, owned: bool = True) -> Value:
        keep = v.name not in self.locked and self.rng.random() < 0.75
        name = v.name if keep else self.fresh()
        self.say(f"{name} = {expression}")
        return Value(name, shape, owned)

    def module(self, v: Value, prefix: str, expression: str, owned: bool = True) -> Value:
        """Attach a module and call it."""
        shape = _shape_of(f"({expression})(x)", v.shape)
        called = self.attach(prefix, expression)
        if owned:
            self.made.append((called, expression, v.shape))
        return self.put(v, f"{called}({v.name})", shape, owned)

    def function(self, v: Value, template: str, owned: bool = True) -> Value:
        """Apply an expression in ``{x}``."""
        shape = _shape_of(template.format(x="x"), v.shape)
        return self.put(v, template.format(x=v.name), shape, owned)

    def view(self, v: Value, template: str) -> Value:
        return self.function(v, template, v.owned)

    def source(self, result: str) -> str:
        lines = [f"class {self.name}(nn.Module):", "    def __init__(self):", "        super().__init__()"]
        lines += [f"        {line}" for line in self.init]
        lines += [f"    {line}" for method in self.methods for line in method.splitlines()]
        lines += [f"    {self.decorator}"] if self.decorator else []
        lines += [f"    def forward({self.signature}):", *(f"        {line}" for line in self.body)]
        return "\n".join([*lines, f"        return {result}"])


_SPACE: dict[str, Any] = {
    "torch": torch,
    "nn": nn,
    "F": F,
    "math": math,
    "types": types,
    "copy": copy,
    "functools": functools,
    "Tensor": Tensor,
    "functional_call": functional_call,
    "fill": fill,
    "layers_of": layers_of,
}


def _shape_of(expression: str, shape: Shape) -> Shape:
    try:
        with torch.no_grad():
            made = eval(expression, {**_SPACE, "x": torch.zeros(3, *shape)})
    except Exception as error:
        raise Unfit(str(error)) from None
    if not isinstance(made, Tensor) or made.shape[:1] != (3,) or made.dim() < 2:
        raise Unfit(expression)
    if not 0 < made[0].numel() <= _MOST_VALUES or made.dim() > 6:
        raise Unfit("size")
    return tuple(made.shape[1:])


Ingredient = Callable[[Writer, Value], Value]
_PLAIN: list[tuple[float, str, Ingredient]] = []
_UNCOVERED: list[tuple[float, str, Ingredient]] = []
_HOSTILE: list[tuple[float, str, Ingredient]] = []


def ingredient(trait: str, weight: float = 1.0, into: list[tuple[float, str, Ingredient]] = _PLAIN) -> Any:
    def register(function: Ingredient) -> Ingredient:
        into.append((weight, trait, function))
        return function

    return register


def _add(w: Writer, v: Value, choices: list[tuple[float, str, Ingredient]] = _PLAIN, tries: int = 12) -> Value:
    """Append one ingredient that fits."""
    weights = [weight for weight, *_ in choices]
    for _ in range(tries):
        _, trait, make = w.rng.choices(choices, weights)[0]
        kept = [(held, len(held)) for held in (w.init, w.body, w.made, w.methods, w.program.classes)]
        traits = set(w.program.traits)
        try:
            result = make(w, v)
        except Unfit:
            for held, length in kept:
                del held[length:]
            w.program.traits = traits
            continue
        w.trait(trait)
        return result
    return v


# -- layers


def _conv(w: Writer, v: Value, out: int, kernel: int | None = None, same: bool = False) -> str:
    r, axes, c = w.rng, len(v.shape) - 1, v.shape[0]
    k = kernel or r.choice([1, 1, 2, 3, 3])
    options = []
    if same:
        options += [f"padding={k // 2}"] if k > 1 else []
    else:
        options += [f"stride={r.choice([2, 2, 3])}"] if r.random() < 0.25 else []
        options += [f"padding={r.choice([1, k // 2, 2])}"] if r.random() < 0.6 else []
        options += ["dilation=2"] if r.random() < 0.15 else []
    groups = [g for g in range(2, c + 1) if c % g == 0 and out % g == 0]
    if groups and r.random() < 0.25:
        options.append(f"groups={r.choice(groups)}")
        w.trait("groups")
    if r.random() < 0.3:
        options.append("bias=False")
    if not same and r.random() < 0.12:
        mode = r.choice(["circular", "reflect", "replicate"])
        options.append(f'padding_mode="{mode}"')
        w.trait("padding mode")
    return f"nn.Conv{axes}d({', '.join([str(c), str(out), str(k), *options])})"


@ingredient("convolution", 6)
def _(w: Writer, v: Value) -> Value:
    if len(v.shape) < 2:
        raise Unfit
    return w.module(v, "conv", _conv(w, v, w.rng.randint(1, 5)))


@ingredient("transposed convolution", 1)
def _(w: Writer, v: Value) -> Value:
    r, axes = w.rng, len(v.shape) - 1
    if axes < 1:
        raise Unfit
    k, s = r.choice([1, 2, 3]), r.choice([1, 2])
    extra = f", output_padding={r.choice([0, s - 1])}" if s > 1 else ""
    expression = f"nn.ConvTranspose{axes}d({v.shape[0]}, {r.randint(1, 4)}, {k}, {s}, {r.choice([0, k // 2])}{extra})"
    if s > 1 and r.random() < 0.3:
        w.trait("output_size")
        expression = f"nn.ConvTranspose{axes}d({v.shape[0]}, {r.randint(1, 4)}, 3, 2, 1)"
        size = [2 * n - r.randint(0, 1) for n in v.shape[1:]]
        shape = _shape_of(f"({expression})(x, output_size={size})", v.shape)
        return w.put(v, f"{w.attach('up', expression)}({v.name}, output_size={size})", shape)
    return w.module(v, "up", expression)


@ingredient("linear", 4)
def _(w: Writer, v: Value) -> Value:
    if len(v.shape) > 1 and w.rng.random() < 0.6:
        raise Unfit
    if len(v.shape) > 1:
        w.trait("linear on the last axis")
    bias = w.rng.choice(["", "", ", bias=False"])
    return w.module(v, "fc", f"nn.Linear({v.shape[-1]}, {w.rng.randint(2, 6)}{bias})")


@ingredient("batch norm", 3)
def _(w: Writer, v: Value) -> Value:
    options = w.rng.choice(["", "", ", affine=False", ", eps=0.1", ", momentum=None"])
    axes = max(1, len(v.shape) - 1)
    return w.module(v, "bn", f"nn.BatchNorm{axes}d({v.shape[0]}{options})")


@ingredient("shared layer", 2)
def _(w: Writer, v: Value) -> Value:
    """A layer that was used before, on the same shape or on another one."""
    if not w.made:
        raise Unfit
    called, expression, shape = w.rng.choice(w.made)
    result = _shape_of(f"({expression})(x)", v.shape)
    w.trait("shared layer on two shapes" if shape != v.shape else "shared layer")
    return w.put(v, f"{called}({v.name})", result)


@ingredient("called with a keyword", 0.2)
def _(w: Writer, v: Value) -> Value:
    if len(v.shape) != 1:
        raise Unfit
    called = w.attach("fc", f"nn.Linear({v.shape[-1]}, 4)")
    return w.put(v, f"{called}(input={v.name})", (4,))


# -- activations: a module's expression, functional ones, in-place ones

_Forms = tuple[str, tuple[str, ...], tuple[str, ...]]


def _named(module: str, function: str, *arguments: str) -> _Forms:
    """The ways in which most activations can be called."""
    inside = "".join(f", {a}" for a in arguments)
    return f"nn.{module}({', '.join(arguments)})", (f"F.{function}({{x}}{inside})",), ()


def _activation(r: random.Random) -> tuple[str, _Forms]:
    def number(*values: float) -> str:
        return repr(r.choice(values))

    relu: _Forms = (
        "nn.ReLU()",
        ("F.relu({x})", "torch.relu({x})", "{x}.relu()", "F.relu({x}, inplace=False)"),
        ("F.relu({x}, inplace=True)", "F.relu_({x})", "torch.relu_({x})", "{x}.relu_()", "F.relu({x}, True)"),
    )
    slope = number(0.01, 0.2, 0.0, -0.5, 1.5, -2.0, 3.0)
    alpha = number(1.0, 0.5, 2.0, -1.5, 4.0)
    beta, threshold = number(1.0, 0.5, 2.0, 10.0), number(20.0, 20.0, 15.0)
    low, high = sorted([r.choice([-2.0, -1.0, 0.0]), r.choice([0.5, 1.0, 6.0])])
    table: dict[str, _Forms] = {
        "relu6": _named("ReLU6", "relu6"),
        "tanh": ("nn.Tanh()", ("torch.tanh({x})", "{x}.tanh()", "F.tanh({x})"), ("{x}.tanh_()", "torch.tanh_({x})")),
        "sigmoid": ("nn.Sigmoid()", ("torch.sigmoid({x})", "{x}.sigmoid()", "F.sigmoid({x})"), ("{x}.sigmoid_()",)),
        "silu": (*_named("SiLU", "silu")[:2], ("F.silu({x}, inplace=True)",)),
        "mish": _named("Mish", "mish"),
        "gelu": r.choice([_named("GELU", "gelu"), _named("GELU", "gelu", 'approximate="tanh"')]),
        "hardswish": (*_named("Hardswish", "hardswish")[:2], ("F.hardswish({x}, inplace=True)",)),
        "hardsigmoid": _named("Hardsigmoid", "hardsigmoid"),
        "hardtanh": _named("Hardtanh", "hardtanh", repr(low), repr(high)),
        "selu": (*_named("SELU", "selu")[:2], ("torch.selu_({x})", "F.selu({x}, inplace=True)")),
        "elu": (*_named("ELU", "elu", alpha)[:2], (f"F.elu_({{x}}, {alpha})", f"F.elu({{x}}, {alpha}, inplace=True)")),
        "celu": _named("CELU", "celu", number(1.0, 0.5, 2.0)),
        "leaky relu": (*_named("LeakyReLU", "leaky_relu", slope)[:2], (f"F.leaky_relu_({{x}}, {slope})",)),
        "softplus": _named("Softplus", "softplus", f"beta={beta}", f"threshold={threshold}"),
        "softsign": _named("Softsign", "softsign"),
        "logsigmoid": _named("LogSigmoid", "logsigmoid"),
        "softshrink": _named("Softshrink", "softshrink", "0.5"),
        "rrelu": ("nn.RReLU()", ("F.rrelu({x}, training=self.training)",), ()),
        "threshold": _named("Threshold", "threshold", repr(low), repr(low)),
        "tanhshrink": ("nn.Tanhshrink()", (), ()),
        "prelu": ("nn.PReLU()", (), ()),
    }
    if r.random() < 0.5:
        return "relu", relu
    return r.choice(list(table.items()))


@ingredient("activation", 7)
def _activate(w: Writer, v: Value) -> Value:
    r = w.rng
    name, (module, functions, inplace) = _activation(r)
    w.trait(name)
    if "(-" in module:
        w.trait("negative slope")
    if v.owned and r.random() < 0.4:
        if inplace and r.random() < 0.6:
            w.trait("in-place activation function")
            return w.function(v, r.choice(inplace))
        if name in ("relu", "relu6", "silu", "mish", "hardswish", "selu", "elu", "celu", "leaky relu", "hardtanh"):
            w.trait("in-place activation")
            return w.module(v, "act", module.replace(")", ", inplace=True)").replace("(, ", "("))
    if functions and r.random() < 0.5:
        w.trait("activation function")
        return w.function(v, r.choice(functions))
    if name == "prelu" and r.random() < 0.5 and v.shape[0] > 1:
        module = f"nn.PReLU({v.shape[0]}, init={r.choice([0.25, -1.5, 2.0])})"
    return w.module(v, "act", module)


# -- pools


@ingredient("pool", 5)
def _pool(w: Writer, v: Value, axes: int | None = None) -> Value:
    r = w.rng
    axes = axes or len(v.shape) - 1
    if not 1 <= axes <= 3:
        raise Unfit
    kind = r.choice(["Max", "Max", "Avg", "Avg", "AdaptiveAvg", "AdaptiveMax"])
    functional = r.random() < 0.4
    w.trait(f"{kind} pool".lower())
    if kind.startswith("Adaptive"):
        sizes = [r.choice([1, 1, 2, 3, n, n + 1, 2 * n]) for n in v.shape[-axes:]]
        same = r.random() < 0.5 or axes == 1
        arguments = str(sizes[0]) if same else f"({', '.join(map(str, sizes))})"
        if sizes[0] > v.shape[-axes]:
            w.trait("adaptive pool upsizes")
        if not same and r.random() < 0.2 and not functional:
            arguments = f"(None, {', '.join(map(str, sizes[1:]))})"
    else:
        k = r.choice([2, 2, 3, 3, 4])
        options = [str(k)]
        if axes > 1 and r.random() < 0.15:
            options = [str(tuple(r.choice([1, k]) for _ in range(axes)))]
        if r.random() < 0.6:
            options.append(f"stride={r.choice([1, 2, 3])}")
        if r.random() < 0.4:
            options.append("padding=1")
        if kind == "Max" and r.random() < 0.15:
            options.append("dilation=2")
            w.trait("dilated pool")
        if r.random() < 0.2:
            options.append("ceil_mode=True")
            w.trait("ceil_mode")
        if kind == "Avg" and r.random() < 0.25:
            options.append("count_include_pad=False")
        if kind == "Avg" and axes > 1 and r.random() < 0.15:
            options.append(f"divisor_override={r.choice([1, 2, 5])}")
            w.trait("divisor_override")
        arguments = ", ".join(options)
    if functional:
        function = kind.replace("Adaptive", "adaptive_").lower()
        return w.function(v, f"F.{function}_pool{axes}d({{x}}, {arguments})")
    return w.module(v, "pool", f"nn.{kind}Pool{axes}d({arguments})")


# -- shapes


@ingredient("shape function", 5)
def _reshape(w: Writer, v: Value) -> Value:
    r, rank = w.rng, len(v.shape)
    rest = ", ".join(map(str, v.shape))
    choices = ["{x}.contiguous()", "{x}.clone()", f"{{x}}.reshape({{x}}.size(0), {rest})", "{x}.unsqueeze(1)"]
    if rank == 1:
        choices += ["{x}.unsqueeze(-1)", "torch.flatten({x}, 1)", "{x}.view({x}.shape[0], -1)"]
        halves = [a for a in range(2, v.shape[0]) if v.shape[0] % a == 0]
        choices += [f"{{x}}.view(-1, {a}, {v.shape[0] // a})" for a in halves] * 2
    else:
        axes = list(range(1, rank + 1))
        r.shuffle(axes)
        i, j = r.sample(range(1, rank + 1), 2)
        choices += [
            f"{{x}}.transpose({i}, {j})",
            f"torch.transpose({{x}}, {i}, {j})",
            f"{{x}}.permute(0, {', '.join(map(str, axes))})",
            f"torch.permute({{x}}, (0, {', '.join(map(str, axes))}))",
            "{x}.transpose(-1, -2).contiguous()",
            f"{{x}}.transpose({i}, {j}).transpose({i}, {j})",
            f"{{x}}.transpose({i}, {j}).reshape({{x}}.shape[0], {rest})",
            f"{{x}}.transpose({i}, {j}).contiguous().view(-1, {rest})",
            "{x}.flatten(1)",
            "torch.flatten({x}, 1)",
            "{x}.flatten(-2)",
            "{x}.reshape({x}.size(0), -1)",
            "{x}.view({x}.size(0), -1).view({x}.size(0), " + rest + ")",
            "{x}.squeeze(1)",
            "{x}.squeeze(-1)",
        ]
    return w.view(v, r.choice(choices))


@ingredient("shape module", 1)
def _(w: Writer, v: Value) -> Value:
    r = w.rng
    choices = ["nn.Flatten()", "nn.Flatten(-2)", "nn.ZeroPad1d(1)", "nn.ZeroPad2d((1, 0, 2, 1))", "nn.ZeroPad2d(-1)"]
    choices += ["nn.PixelShuffle(2)", "nn.PixelUnshuffle(2)", "nn.ChannelShuffle(2)", "nn.Unflatten(1, (2, -1))"]
    return w.module(v, "shape", r.choice(choices), owned=False)


@ingredient("global mean", 1)
def _(w: Writer, v: Value) -> Value:
    if len(v.shape) < 2:
        raise Unfit
    dims = list(range(2, len(v.shape) + 1))
    chosen = w.rng.choice([str(dims), str(tuple(dims)), "-1", "1", f"{dims}, keepdim=True", "1, True"])
    return w.function(v, f"{{x}}.mean({chosen})")


@ingredient("dropout or identity", 2)
def _(w: Writer, v: Value) -> Value:
    r = w.rng
    if r.random() < 0.4:
        template = r.choice(["F.dropout({x}, 0.5, self.training)", "F.dropout({x}, training=self.training)"])
        plain = template.replace("self.training", "False")
        return w.put(v, template.format(x=v.name), _shape_of(plain.format(x="x"), v.shape), v.owned)
    expression = r.choice(["nn.Dropout(0.5)", "nn.Dropout()", "nn.Identity()", "nn.AlphaDropout(0.2)"])
    return w.put(v, f"{w.attach('drop', expression)}({v.name})", v.shape, v.owned)


# -- constants


def _broadcast(w: Writer, v: Value) -> str:
    """The expression of a tensor that multiplies a batch without enlarging it."""
    r, rank = w.rng, len(v.shape)
    keep = [n if r.random() < 0.5 else 1 for n in v.shape]
    shapes = [[v.shape[0], *[1] * (rank - 1)], [1, v.shape[0], *[1] * (rank - 1)], keep, list(v.shape)[-1:], [1], []]
    return f"{r.choice(['torch.randn', 'torch.rand', '1 + torch.rand'])}({r.choice(shapes)})"


@ingredient("constant", 4)
def _(w: Writer, v: Value) -> Value:
    r = w.rng
    c = r.choice(["2.0", "0.5", "3", "-1.5", "0.1", "math.pi", "1 / 3"])
    forms = ["{x} * " + c, c + " * {x}", "{x} / " + c, "{x} + " + c, c + " + {x}", "{x} - " + c, c + " - {x}"]
    forms += [f"{place}({{x}}, {c})" for place in ("torch.mul", "torch.add", "torch.sub", "torch.div")]
    forms += [f"{{x}}.{name}({c})" for name in ("mul", "add", "sub", "div")]
    if v.owned and r.random() < 0.4:
        w.trait("in-place constant")
        if r.random() < 0.5:
            w.say(f"{v.name} {r.choice(['*=', '+=', '-=', '/='])} {c}")
            return v
        return w.function(v, f"{{x}}.{r.choice(['mul_', 'add_', 'sub_', 'div_'])}({c})")
    if r.random() < 0.5:
        w.trait("constant tensor")
        name = w.buffer("scale", _broadcast(w, v))
        form = r.choice(["{x} * {s}", "{s} * {x}", "{x} + {s}", "{x} - {s}", "{s} - {x}", "{x} / (1 + {s}.abs())"])
        return w.put(v, form.format(x=v.name, s=name), v.shape)
    return w.function(v, r.choice(forms))


# -- wirings


def _turn(w: Writer, v: Value) -> Value:
    """Move values without changing the shape."""
    r, rank = w.rng, len(v.shape)
    rest = ", ".join(map(str, v.shape))
    choices = []
    for i, j in itertools.combinations(range(rank), 2):
        if v.shape[i] == v.shape[j]:
            choices.append(f"{{x}}.transpose({i + 1}, {j + 1})")
        choices.append(f"{{x}}.transpose({i + 1}, {j + 1}).reshape({{x}}.size(0), {rest})")
        choices.append(f"{{x}}.transpose({i + 1}, {j + 1}).contiguous().view({{x}}.size(0), {rest})")
    c = v.shape[0]
    for g in range(2, c):
        if c % g == 0:
            inner = ", ".join(map(str, (g, c // g, *v.shape[1:])))
            choices.append(f"{{x}}.view({{x}}.size(0), {inner}).transpose(1, 2).reshape({{x}}.size(0), {rest})")
            if rank > 1:
                choices.append("nn.ChannelShuffle(" + str(g) + ")({x})")
    if not choices:
        raise Unfit
    w.trait("shape functions in a residual block")
    return w.view(v, r.choice(choices))


def _branch(w: Writer, v: Value, layers: int, turns: bool) -> Value:
    """Layers with activations between them, back to the shape they started from."""
    r, shape = w.rng, v.shape
    width = r.choice([shape[0] if len(shape) > 1 else shape[-1]] * 2 + [2, 3])
    relu = r.choice(["module", "function", "shared", "odd"])
    shared = w.attach("relu", f"nn.ReLU(inplace={r.random() < 0.5})") if relu == "shared" else ""
    for i in range(layers):
        if turns and r.random() < 0.4:
            v = _turn(w, v)
        end = i == layers - 1
        if len(shape) == 1 or (len(shape) == 2 and r.random() < 0.3 and width == shape[-1]):
            out = shape[-1] if end else width
            v = w.module(v, "fc", f"nn.Linear({v.shape[-1]}, {out})")
        else:
            v = w.module(v, "conv", _conv(w, v, shape[0] if end else width, r.choice([1, 3]), same=True))
        if turns and r.random() < 0.3:
            v = _turn(w, v)
        if r.random() < 0.3:
            v = w.module(v, "bn", f"nn.BatchNorm{max(1, len(v.shape) - 1)}d({v.shape[0]})")
        if not end:
            if relu == "module":
                v = w.module(v, "relu", "nn.ReLU()")
            elif relu == "function":
                v = w.function(v, r.choice(["F.relu({x})", "torch.relu({x})", "{x}.relu()"]))
            elif relu == "shared":
                v = w.put(v, f"{shared}({v.name})", v.shape)
            else:
                v = _activate(w, v)
    if turns and r.random() < 0.3:
        v = _turn(w, v)
    if v.shape != shape:
        raise Unfit
    return v


@ingredient("residual", 4)
def _residual(w: Writer, v: Value) -> Value:
    r = w.rng
    skip = v
    if r.random() < 0.5:
        names = ["identity", "residual", "shortcut", "skip", *(f"skip{i}" for i in range(99))]
        name = next(n for n in names if n not in w.names)
        w.names.add(name)
        w.say(f"{name} = {v.name}")
        skip = Value(name, v.shape, False)
    had = skip.name in w.locked
    w.locked.add(skip.name)
    turns = r.random() < 0.35
    start = Value(v.name, v.shape, False)
    if r.random() < 0.2:
        start = _activate(w, start)
        w.trait("pre-activation")
    out = _branch(w, start, r.choice([1, 2, 2, 2, 3, 3]), turns)
    if not had:
        w.locked.discard(skip.name)
    s = skip.name
    if turns and r.random() < 0.4:
        s = _turn(w, Value(s, v.shape, False)).name
    elif r.random() < 0.25:
        if len(v.shape) == 1:
            s = f"{w.attach('proj', f'nn.Linear({v.shape[0]}, {v.shape[0]})')}({s})"
        else:
            made = f"nn.Conv{len(v.shape) - 1}d({v.shape[0]}, {v.shape[0]}, 1)"
            if r.random() < 0.5:
                made = f"nn.Sequential({made}, nn.BatchNorm{len(v.shape) - 1}d({v.shape[0]}))"
            s = f"{w.attach('downsample', made)}({s})"
        w.trait("projection")
    o = out.name
    if r.random() < 0.45:
        w.trait("augmented sum")
        w.say(r.choice([f"{o} += {s}", f"{o} += {s}", f"{o} -= {s}", f"{o} = {o}.add_({s})", f"{o} = {o}.sub_({s})"]))
        return Value(o, v.shape, True)
    forms = [f"{s} + {o}", f"{o} + {s}", f"{s} - {o}", f"{o} - {s}", f"torch.add({s}, {o})", f"{s} + 0.1 * {o}"]
    forms += [f"0.5 * {s} + {o}", f"{s}.add({o})", f"{s} + {o} + {s}", f"({s} + {o}) / 2"]
    return w.put(out, r.choice(forms), v.shape)


@ingredient("x + x", 0.5)
def _(w: Writer, v: Value) -> Value:
    x = v.name
    return w.put(v, w.rng.choice([f"{x} + {x}", f"torch.add({x}, {x})", f"{x} + 2 * {x}", f"3 * {x} - {x}"]), v.shape)


@ingredient("concatenation", 2)
def _(w: Writer, v: Value) -> Value:
    r, x = w.rng, v.name
    axis = r.choice([1, 1, 1, -1, len(v.shape)])
    had = x in w.locked
    w.locked.add(x)
    out = _branch(w, Value(x, v.shape, False), r.choice([1, 2]), r.random() < 0.2) if r.random() < 0.8 else v
    if not had:
        w.locked.discard(x)
    call = r.choice(["torch.cat", "torch.cat", "torch.concat"])
    parts = r.choice([f"[{x}, {out.name}]", f"({out.name}, {x})", f"[{x}, {out.name}, {x}]"])
    result = w.put(out, f"{call}({parts}, {r.choice(['', 'dim='])}{axis})", v.shape)
    copies = 3 if parts.count(",") == 2 else 2
    shape = list(v.shape)
    shape[axis if axis < 0 else axis - 1] *= copies
    if math.prod(shape) > _MOST_VALUES:
        raise Unfit
    return Value(result.name, tuple(shape))


@ingredient("two branches", 1)
def _(w: Writer, v: Value) -> Value:
    """Both sides of a sum are branches."""
    x = v.name
    had = x in w.locked
    w.locked.add(x)
    a = _branch(w, Value(x, v.shape, False), w.rng.choice([1, 2]), w.rng.random() < 0.3)
    w.locked.add(a.name)
    b = _branch(w, Value(x, v.shape, False), w.rng.choice([1, 2]), w.rng.random() < 0.3)
    w.locked.discard(a.name)
    if not had:
        w.locked.discard(x)
    return w.put(b, f"{a.name} {w.rng.choice('+-')} {b.name}", v.shape)


@ingredient("block of its own", 2)
def _block(w: Writer, v: Value) -> Value:
    """A class of its own, or a Sequential."""
    r = w.rng
    if w.program.blocks > 3:
        raise Unfit
    w.program.blocks += 1
    inner = Writer(w.program, f"Block{w.program.blocks}")
    out = Value("x", v.shape, False)
    for _ in range(r.randint(1, 4)):
        out = _add(inner, out)
    w.program.classes.append(inner.source(out.name))
    called = w.attach("block", f"{inner.name}()")
    result = w.put(v, f"{called}({v.name})", out.shape, out.owned)
    if out.shape == v.shape and r.random() < 0.3:
        w.trait("shared block")
        result = w.put(result, f"{called}({result.name})", out.shape, out.owned)
    return result


@ingredient("sequential", 2)
def _(w: Writer, v: Value) -> Value:
    r, parts, shape = w.rng, [], v.shape
    for _ in range(r.randint(1, 3)):
        c = shape[0]
        choices = [_activation(r)[1][0], "nn.ReLU(inplace=True)" if parts else "nn.ReLU()", "nn.Dropout(0.3)"]
        if len(shape) == 1:
            choices += [f"nn.Linear({c}, {r.randint(2, 6)})"] * 3 + [f"nn.BatchNorm1d({c})"]
        else:
            axes = len(shape) - 1
            choices += [_conv(w, Value("", shape), r.randint(2, 4))] * 3 + [f"nn.BatchNorm{axes}d({c})", "nn.Flatten()"]
        part = r.choice(choices)
        shape = _shape_of(f"({part})(x)", shape)
        parts.append(part)
    return w.module(v, "net", f"nn.Sequential({', '.join(parts)})", owned=False)


@ingredient("harmless question", 0.7)
def _(w: Writer, v: Value) -> Value:
    """Python branches that are taken alike in a trace and in a run."""
    r, x = w.rng, v.name
    asked = r.choice(["self.training", "torch.jit.is_scripting()", "not isinstance(self, nn.Module)", f"{x} is None"])
    w.say(f"if {asked}:")
    w.say(f"    {x} = {x} * 7.0")
    return v


@ingredient("feature kept on the module", 0.5)
def _(w: Writer, v: Value) -> Value:
    kinds = ["self.features = {x}", "self.seen.append({x})", "self.calls = self.calls + 1", "self.last = {x}.shape"]
    kind = w.rng.choice(kinds)
    if "seen" in kind:
        w.init.append("self.seen = []")
    if "calls" in kind:
        w.init.append("self.calls = 0")
    w.say(kind.format(x=v.name))
    return Value(v.name, v.shape, False)


# -- what no rule covers yet, and may be refused

_FORMS_WITHOUT_RULES = [
    "F.pad({x}, (1, 1))",
    "{x}[:, :1]",
    "{x}.chunk(2, 1)[0]",
    "torch.stack([{x}, {x}], 1)",
    "-{x}",
    "{x}.abs()",
    "{x}.clamp(0, 1)",
    "torch.clamp({x}, min=-0.5)",
    "{x}.flip(1)",
    "{x}.roll(1, 1)",
    "{x}.swapaxes(1, -1)",
    "{x}.sum(-1, keepdim=True)",
    "{x}.softmax(1)",
    "{x} * {x}.sigmoid()",
    "{x} * {x}",
    "{x} ** 2",
    "{x} + {x}.mean(1, keepdim=True)",
    "torch.maximum({x}, 0.1 * {x})",
    "torch.where({x} > 0, {x}, 0.1 * {x})",
    "{x}.float()",
    "{x}.to(torch.float32)",
    "{x}.expand(-1, *{x}.shape[1:])",
    "{x}.repeat(1, 2, *[1] * ({x}.dim() - 2))",
    "torch.add({x}, {x}, alpha=2)",
    "{x}.cumsum(1)",
    "{x}.amax(-1, keepdim=True)",
    "{x} / (1e-3 + {x}.norm())",
    "{x} + ({x}.round() - {x}).detach()",
    "2.0 / (3.0 + {x}.abs())",
    "{x}.double().to({x}.dtype)",
    "torch.sin({x})",
    "{x}.view_as({x})",
    "F.hardshrink({x})",
    "F.threshold({x}, 0.1, 3.0)",
    "F.normalize({x}, dim=1)",
    "F.layer_norm({x}, {x}.shape[1:])",
    "F.interpolate({x}, scale_factor=2)",
    "{x}.unflatten(1, (1, -1))",
    "{x}.movedim(1, -1)",
    "{x}.type_as({x})",
    "torch.utils.checkpoint.checkpoint(torch.relu, {x}, use_reentrant=False)",
    "torch.lerp({x}, {x}.flip(1), 0.3)",
    "torch.lerp({x}, torch.relu({x}), {x}.sigmoid())",
    "torch.hypot({x}, 0.5 * {x}.flip(1))",
    "torch.tensordot({x}, torch.full(({x}.shape[-1], 2), 0.5).to({x}), dims=1)",
    "torch.baddbmm({x}, {x}, {x}.mT)",
    "F.lp_pool1d({x}, 2, 3, 1)",
    "F.lp_pool2d({x}, 4, 2)",
    "F.grid_sample({x}, (torch.arange(40.0).view(1, 4, 5, 2) / 17 - 1).expand(len({x}), 4, 5, 2), align_corners=False)",
]


@ingredient("function without a rule", 4, _UNCOVERED)
def _(w: Writer, v: Value) -> Value:
    template = w.rng.choice(_FORMS_WITHOUT_RULES)
    return w.function(v, template, owned=False)


@ingredient("functional layer", 1, _UNCOVERED)
def _(w: Writer, v: Value) -> Value:
    if len(v.shape) > 1 and len(v.shape) < 5:
        axes = len(v.shape) - 1
        weight = w.buffer("weight", f"torch.randn({[3, v.shape[0], *[1] * axes]})")
        return w.put(v, f"F.conv{axes}d({v.name}, {weight})", (3, *v.shape[1:]))
    weight = w.buffer("weight", f"torch.randn(4, {v.shape[-1]})")
    return w.put(v, w.rng.choice([f"F.linear({v.name}, {weight})", f"{v.name} @ {weight}.t()"]), (*v.shape[:-1], 4))


@ingredient("module without a rule", 1, _UNCOVERED)
def _(w: Writer, v: Value) -> Value:
    choices = [f"nn.LayerNorm({list(v.shape)})", f"nn.GroupNorm(1, {v.shape[0]})", "nn.Softmax(1)", "nn.Hardshrink()"]
    choices += ["nn.Threshold(0.1, 3.0)", "nn.Upsample(scale_factor=2)", "nn.ReflectionPad1d(1)", "nn.LPPool1d(2, 2)"]
    choices += ["nn.RReLU()", "nn.Softmin(1)", "nn.GLU(1)", f"nn.Bilinear({v.shape[-1]}, {v.shape[-1]}, 2)"]
    return w.module(v, "odd", w.rng.choice(choices), owned=False)


@ingredient("batch folded into rows", 1, _UNCOVERED)
def _(w: Writer, v: Value) -> Value:
    if len(v.shape) != 2:
        raise Unfit
    fc = w.attach("fc", f"nn.Linear({v.shape[1]}, 3)")
    rows = f"{fc}({v.name}.reshape(-1, {v.shape[1]}))"
    return w.put(v, f"{rows}.view({v.name}.size(0), {v.shape[0]}, 3)", (v.shape[0], 3))


# -- what a traced graph may not show

_IN_PLACE = ["{x} *= 3.0", "{x} += 2.0 * {x}", "{x} -= F.relu({x})", "{x} /= 0.25", "{x} += F.relu({x})"]
_UNDER_A_NAME = [
    "{x}.mul_(3.0)",
    "F.relu({x}, inplace=True)",
    "torch.relu_({x})",
    "{x}.data.mul_(3.0)",
    "{x}.detach().mul_(3.0)",
    "{x}.view({x}.size(0), -1).mul_(3.0)",
    "{x}[:, :1] *= 3.0",
    "{x}[:, 0] = 0.0",
    "{x}[:, 0] += {x}[:, 0]",
    "torch.mul({x}, 3.0, out={x})",
    "{x}.copy_(3.0 * {x})",
    "{x}.__imul__(3.0)",
    "{x}.add_(1.0).mul_(3.0)",
    "for part in {x}.chunk(2, 1): part *= 3.0",
    "for sample in {x}: sample *= 3.0",
    "nn.init.ones_({x}[:, :1])",
]


@ingredient("augmented assignment on an alias", 3, _HOSTILE)
def _(w: Writer, v: Value) -> Value:
    r = w.rng
    h, out = w.fresh(), w.fresh()
    # The caller's input is copied, as no one but this program may be changed by it.
    w.say(f"{h} = {v.name}.clone()")
    w.say(f"{out} = {r.choice([h, h, f'{h}.view({h}.shape)', f'{h}.contiguous()', f'{h}.detach()'])}")
    w.say(r.choice(_IN_PLACE).format(x=out))
    how = r.choice(["cat", "alias", "sum"])
    if how == "cat" and 2 * math.prod(v.shape) <= _MOST_VALUES:
        return w.put(v, f"torch.cat([{h}, {out}], 1)", (2 * v.shape[0], *v.shape[1:]))
    return w.put(v, h if how == "alias" else f"{h} + {out}", v.shape)


@ingredient("in-place under another name", 2, _HOSTILE)
def _(w: Writer, v: Value) -> Value:
    h = w.fresh()
    w.say(f"{h} = {v.name}{w.rng.choice(['.clone()', ' * 1.0', ' + 0.5'])}")
    w.say(w.rng.choice(_UNDER_A_NAME).format(x=h))
    return Value(h, v.shape)


@ingredient("in-place in a container or helper", 1, _HOSTILE)
def _(w: Writer, v: Value) -> Value:
    r, h = w.rng, w.fresh()
    w.say(f"{h} = {v.name}.clone()")
    form = r.choice(["list", "attribute", "helper", "dict", "lambda"])
    if form == "list":
        w.say(f"parts = [{h}, {h}]")
        w.say("parts[0] *= 3.0")
    elif form == "dict":
        w.say(f"parts = dict(a={h})")
        w.say('parts["a"] += 2.0 * parts["a"]')
    elif form == "attribute":
        w.say(f"self.kept = {h}")
        w.say("self.kept *= 3.0")
    elif form == "helper":
        w.methods.append("def boost(self, t):\n    t *= 3.0\n    return t")
        w.say(f"self.boost({h})")
    else:
        w.say(f"(lambda t: t.__iadd__(2.0 * t))({h})")
    return Value(h, v.shape)


@ingredient("in-place layer on the skip", 1.5, _HOSTILE)
def _(w: Writer, v: Value) -> Value:
    h, out = w.fresh(), w.fresh()
    act = w.rng.choice(["nn.ReLU(inplace=True)", "nn.Hardtanh(-0.5, 0.5, inplace=True)", "nn.ELU(4.0, inplace=True)"])
    w.say(f"{h} = {v.name} - 0.5")
    w.say(f"{out} = {w.attach('act', act)}({h})")
    end = _branch(w, Value(out, v.shape), w.rng.choice([1, 2]), False)
    w.say(f"{end.name} += {h}")
    return end


@ingredient("branch on what is traced", 3, _HOSTILE)
def _(w: Writer, v: Value) -> Value:
    r, x = w.rng, v.name
    questions = [f"isinstance({x}, torch.Tensor)", f"torch.is_tensor({x})", f"type({x}) is torch.Tensor"]
    questions += [f"not isinstance({x}, torch.fx.Proxy)", f"type({x}).__name__ == 'Tensor'"]
    questions += [f"isinstance({x}.shape, tuple)", f"isinstance({x}.size(0), int)", f"isinstance({x}.dim(), int)"]
    questions += ["not torch.fx._symbolic_trace.is_fx_tracing()", f"not hasattr({x}, 'tracer')"]
    question = r.choice(questions)
    form = r.choice(["if", "if", "value", "early"])
    if form == "if":
        w.say(f"if {question}:")
        w.say(f"    {x} = {x} * 5.0")
    elif form == "value":
        w.say(f"{x} = {x} * (5.0 if {question} else 1.0)")
    else:
        w.say(f"gain = 5.0 if {question} else 1.0")
        w.say(f"{x} = gain * {x}")
    return Value(x, v.shape)


@ingredient("branch on values, unseen by a trace", 1.2, _HOSTILE)
def _(w: Writer, v: Value) -> Value:
    x = v.name
    rare = w.rng.choice(
        ["{x}.abs().max() > 30", "{x}.min() < -20", "{x}.mean() > 5", "{x}.norm() > 100", "{x}.sum() > 0"]
    )
    w.say(f"if torch.is_tensor({x}) and {rare.format(x=x)}:")
    w.say(f"    {x} = {x} * 5.0")
    return Value(x, v.shape)


@ingredient("errors caught", 0.5, _HOSTILE)
def _(w: Writer, v: Value) -> Value:
    x = v.name
    asked = w.rng.choice([f"float({x}.numel())", f"int({x}.shape[0] > 0)", f"bool({x}.dim() > 1)", f"len({x})"])
    w.say("try:")
    w.say(f"    {x} = {x} * (1.0 + 4.0 * {asked} / max(1.0, {asked}))")
    w.say("except Exception:")
    w.say("    pass")
    return Value(x, v.shape)


@ingredient("mode of the run", 1.2, _HOSTILE)
def _(w: Writer, v: Value) -> Value:
    x = v.name
    w.trait(trait := w.rng.choice(["gradient mode", "precision", "tracing asked"]))
    asked = {
        "gradient mode": w.rng.choice(["torch.is_grad_enabled()", f"{x}.requires_grad"]),
        "precision": f"torch.is_tensor({x}) and {x}.dtype == {w.rng.choice(['torch.float32', 'torch.float64'])}",
        "tracing asked": w.rng.choice(["not torch.jit.is_tracing()", "not torch.compiler.is_compiling()"]),
    }[trait]
    w.say(f"if {asked}:")
    w.say(f"    {x} = {x} * 5.0")
    return Value(x, v.shape)


@ingredient("depends on the batch's size", 2.5, _HOSTILE)
def _(w: Writer, v: Value) -> Value:
    x = v.name
    form = w.rng.choice(
        [
            "{x} * {x}.size(0)",
            "{x} * ({x}.shape[0] / 2)",
            "{x} * {x}.shape[0] ** 2",
            "{x} / {x}.size(0)",
            "{x} * len({x})",
            "{x} * {x}.new_ones({x}.size(0)).sum()",
            "{x} * torch.ones({x}.shape[:1]).sum()",
            "{x} * (5.0 if {x}.shape[0] > 2 else 1.0)",
            "{x} * (5.0 if torch.is_tensor({x}) and len({x}) == 7 else 1.0)",
            "{x} * (5.0 if torch.is_tensor({x}) and len({x}) > 8 else 1.0)",
            "{x} / (0.2 if torch.is_tensor({x}) and len({x}) == 1 else 1.0)",
            "{x} * {x}.numel()",
            "{x} * (1 + {x}.size(0) // 4)",
        ]
    )
    return w.put(v, form.format(x=x), v.shape)


@ingredient("batch axis moved", 4, _HOSTILE)
def _(w: Writer, v: Value) -> Value:
    r, x = w.rng, v.name
    forms = ["{x} - {x}.mean(0, keepdim=True)", "{x} + {x}.mean(0)", "{x} + {x}.flip(0)", "{x}.roll(1, 0) + {x}"]
    forms += ["{x}.cumsum(0)", "{x} + {x}[:1]", "{x} + {x}.sum(0)", "{x} + {x}.mean((0, 1), keepdim=True)"]
    forms += ["{x} - {x}.mean()", "{x} + {x}[-1]", "{x} * 2.0 + {x}.max(0)[0]", "{x} + {x}.mean(dim=[0])"]
    rank = len(v.shape)
    turned = f"{{x}}.permute({', '.join(map(str, range(1, rank + 1)))}, 0)"
    back = f".permute({rank}, {', '.join(map(str, range(rank)))})"
    for pool in ("F.avg_pool1d({t}, 3, 1, 1)", "F.max_pool1d({t}, 3, 1, 1)", "{t}.cumsum(-1)"):
        if rank == 1 or "cumsum" in pool:
            forms.append(pool.format(t=turned) + back)
    if v.shape[0] == 2:
        forms += ["{x}.transpose(0, 1)"] * 2
        forms += ["{x}.transpose(1, 0).contiguous()", "{x}.view({x}.size(1), -1)[:, :{n}]"]
    if rank == 1:
        forms += ["{x}.t().reshape({x}.shape)", "{x}.t().contiguous().view_as({x})"]
        forms += ["{x}.reshape({x}.size(1), {x}.size(0)).t()", "F.softplus({x}.t()).reshape({x}.size(0), -1)"]
    else:
        forms += ["{x}.transpose(0, 1).reshape({x}.shape)"]
        forms += ["{x}.transpose(0, 1).contiguous().view({x}.size(0), {rest})"]
        forms += ["{x}.mean(0, keepdim=True) + 0.0 * {x}", "{x}.reshape({x}.size(1), {x}.size(0), -1).transpose(0, 1)"]
    rest = ", ".join(map(str, v.shape))
    form = r.choice(forms).replace("{rest}", rest).replace("{n}", str(math.prod(v.shape[1:]))).format(x=x)
    result = w.put(v, form, v.shape)
    if "[:, :" in form or form.endswith("-1).transpose(0, 1)"):
        return Value(result.name, _run_shape(form, x, v.shape))
    return result


def _run_shape(expression: str, name: str, shape: Shape) -> Shape:
    try:
        made = eval(expression, {**_SPACE, name: torch.zeros(2, *shape)})
    except Exception as error:
        raise Unfit(str(error)) from None
    if made.dim() < 2:
        raise Unfit
    return tuple(made.shape[1:])


@ingredient("output without its batch", 0.7, _HOSTILE)
def _(w: Writer, v: Value) -> Value:
    """The batch is averaged away; nothing but the return may follow."""
    form = w.rng.choice(
        ["{x}.mean(0)", "{x}.sum(0)", "{x}.flatten()", "{x}.mean()", "{x}.transpose(0, 1)", "{x}.max()"]
    )
    return Value(form.format(x=v.name), ())


@ingredient("kept in training mode", 2, _HOSTILE)
def _(w: Writer, v: Value) -> Value:
    r = w.rng
    kind = f"nn.BatchNorm{max(1, len(v.shape) - 1)}d({v.shape[0]})"
    layer = w.attach("kept", r.choice([kind, kind, "nn.Dropout(0.9)", "nn.Dropout(0.5)"]))
    how = r.choice(["train", "train", "forward", "eval"])
    if how == "forward":
        w.say(f"{layer}.train()")
    else:
        w.methods.append(
            f"def train(self, mode=True):\n    super().train(mode)\n    {layer}.train(True)\n    return self"
        )
    return w.put(v, f"{layer}({v.name})", v.shape)


@ingredient("fresh noise", 1, _HOSTILE)
def _(w: Writer, v: Value) -> Value:
    size = list(v.shape)
    name = w.attach("noise", f"torch.zeros({size})")
    forms = [f"{{x}} + torch.randn({size})", f"{{x}} + {name}.normal_()", f"{{x}} * torch.rand({size})"]
    forms += [f"{{x}} + {name}.clone().uniform_()", "{x} * (1.0 + torch.rand(1))", "{x} * (1.0 + torch.rand(1).item())"]
    return w.put(v, w.rng.choice(forms).format(x=v.name), v.shape)


@ingredient("changes from call to call", 0.6, _HOSTILE)
def _(w: Writer, v: Value) -> Value:
    w.init.append("self.calls = 0")
    w.say("self.calls += 1")
    late = w.rng.choice(["self.calls > 1", "self.calls > 3", "self.calls > 8", "self.calls % 2 == 0"])
    return w.put(v, f"{v.name} * (5.0 if {late} else 1.0)", v.shape)


@ingredient("layer changed in forward", 3, _HOSTILE)
def _(w: Writer, v: Value) -> Value:
    r, x, rank = w.rng, v.name, len(v.shape)
    form = r.choice(
        ["swapped", "functional_call", "slope", "window", "scaled", "statistics", "stride", "limit", "parameters"]
    )
    if form in ("swapped", "functional_call", "scaled", "parameters"):
        n = v.shape[-1]
        fc = w.attach("fc", f"nn.Linear({n}, {n})")
        if form == "functional_call":
            w.init.append(f'self.register_buffer("average", 5.0 * torch.eye({n}))')
            return w.put(v, f'functional_call({fc}, {{"weight": self.average}}, ({x},))', v.shape)
        if form == "parameters":
            return w.put(
                v, f'functional_call({fc}, {{"weight": 5.0 * {fc}.weight, "bias": {fc}.bias}}, ({x},))', v.shape
            )
        if form == "swapped":
            w.say(f"kept = {fc}.weight.data")
            w.say(f"{fc}.weight.data = 5.0 * kept")
            result = w.put(v, f"{fc}({x})", v.shape)
            w.say(f"{fc}.weight.data = kept")
            return result
        w.say("with torch.no_grad():")
        w.say(f"    {fc}.weight.mul_(4.0)")
        result = w.put(v, f"{fc}({x})", v.shape)
        w.say("with torch.no_grad():")
        w.say(f"    {fc}.weight.div_(4.0)")
        return result
    if form in ("slope", "limit"):
        module, name, during, after = {
            "slope": ("nn.LeakyReLU(0.1)", "negative_slope", 9.0, 0.1),
            "limit": ("nn.Hardtanh(-0.001, 0.001)", "max_val", 50.0, 0.001),
        }[form]
        act = w.attach("act", module)
        w.say(f"{act}.{name} = {during}")
        result = w.put(v, f"{act}({x})", v.shape)
        w.say(f"{act}.{name} = {after}")
        return result
    if form == "statistics":
        bn = w.attach("bn", f"nn.BatchNorm{max(1, rank - 1)}d({v.shape[0]})")
        w.say(f"{bn}.eps, {bn}.running_var.data = 1e-5, {bn}.running_var / 100.0")
        result = w.put(v, f"{bn}({x})", v.shape)
        w.say(f"{bn}.running_var.data = {bn}.running_var * 100.0")
        return result
    if rank < 2 or v.shape[-1] < 3:
        raise Unfit
    axes = rank - 1
    if form == "window":
        pool = w.attach("pool", f"nn.MaxPool{axes}d(1)")
        shape = _shape_of(f"nn.MaxPool{axes}d(3, 1, 1)(x)", v.shape)
        w.say(f"{pool}.kernel_size, {pool}.stride, {pool}.padding = 3, 1, 1")
        result = w.put(v, f"{pool}({x})", shape)
        w.say(f"{pool}.kernel_size, {pool}.stride, {pool}.padding = 1, 1, 0")
        return result
    conv = w.attach("conv", f"nn.Conv{axes}d({v.shape[0]}, 2, 3, stride=3)")
    shape = _shape_of(f"nn.Conv{axes}d({v.shape[0]}, 2, 3, stride=1)(x)", v.shape)
    w.say(f"{conv}.stride = (1,) * {axes}")
    result = w.put(v, f"{conv}({x})", shape)
    w.say(f"{conv}.stride = (3,) * {axes}")
    return result


@ingredient("layer with a method of its own", 3, _HOSTILE)
def _(w: Writer, v: Value) -> Value:
    r, rank = w.rng, len(v.shape)
    kind = r.choice(["linear", "activation", "call", "conv", "norm", "pool"])
    n = w.program.blocks = w.program.blocks + 1
    name = f"Odd{n}"
    own = "def forward(self, x):\n        return 5.0 * super().forward(x)"
    if kind == "linear":
        base, arguments = "nn.Linear", f"{v.shape[-1]}, 3"
        if r.random() < 0.4:
            own = "def forward(self, input):\n        return F.linear(input, 5.0 * self.weight, self.bias)"
    elif kind == "activation":
        base, arguments = r.choice([("nn.ReLU", ""), ("nn.LeakyReLU", "0.2"), ("nn.Tanh", "")])
    elif kind == "call":
        base, arguments = r.choice([("nn.Linear", f"{v.shape[-1]}, 3"), ("nn.ReLU", ""), ("nn.Identity", "")])
        own = "def __call__(self, x):\n        return 5.0 * super().__call__(x)"
    elif kind == "norm":
        base, arguments = f"nn.BatchNorm{max(1, rank - 1)}d", f"{v.shape[0]}"
        if r.random() < 0.4:
            own = "def _check_input_dim(self, x):\n        x.data.mul_(1.0)\n\n    " + own
    elif rank < 2 or rank > 4:
        raise Unfit
    elif kind == "pool":
        base, arguments = f"nn.{r.choice(['Max', 'Avg'])}Pool{rank - 1}d", "2, 1"
    else:
        base, arguments = f"nn.Conv{rank - 1}d", f"{v.shape[0]}, 3, 1"
        own = (
            "def _conv_forward(self, input, weight, bias):\n"
            "        return super()._conv_forward(input, 5.0 * weight, bias)"
        )
    w.trait(f"own {own[4 : own.index('(')]}")
    shape = _shape_of(f"{base}({arguments})(x)", v.shape)
    w.program.classes.append(f"class {name}({base}):\n    {own}")
    return w.put(v, f"{w.attach('odd', f'{name}({arguments})')}({v.name})", shape)


@ingredient("pool without channels", 4, _HOSTILE)
def _(w: Writer, v: Value) -> Value:
    """Torch reads [B, L], [B, H, W] and [B, D, H, W] as unbatched: the same, sample by sample."""
    if len(v.shape) > 3:
        raise Unfit
    return _pool(w, v, len(v.shape))


@ingredient("parameter at which there is no constant", 2, _HOSTILE)
def _(w: Writer, v: Value) -> Value:
    choices = ["nn.Softplus(threshold=0.1)", "nn.Softplus(1.0, -3.0)", "nn.Softplus(4.0, 1.0)", "nn.CELU(-0.5)"]
    choices += [
        "nn.CELU(-2.0)",
        "nn.Softplus(-1.0, 2.0)",
        "nn.ELU(-3.0)",
        "nn.Softplus(0.1, 1.0)",
    ]
    form = w.rng.choice(choices)
    if w.rng.random() < 0.4:
        module, _, arguments = form[3:-1].partition("(")
        return w.function(v, f"F.{module.lower()}({{x}}, {arguments})")
    return w.module(v, "act", form)


@ingredient("not one tensor", 0.4, _HOSTILE)
def _(w: Writer, v: Value) -> Value:
    forms = ["({x}, {x})", "[{x}]", "dict(out={x})", "({x}, None)", "{x}.detach().numpy()"]
    return Value(w.rng.choice(forms).format(x=v.name), ())


@ingredient("constant output", 0.3, _HOSTILE)
def _(w: Writer, v: Value) -> Value:
    return w.put(v, w.rng.choice([f"torch.zeros_like({v.name})", f"0.0 * {v.name}", f"{v.name}.detach()"]), v.shape)


# -- what is done to a network once it is made


@dataclass(frozen=True)
class Wrap:
    """Lines after ``net = Net()``."""

    trait: str
    weight: float
    lines: tuple[str, ...]


_HARMLESS = [
    Wrap("harmless forward hook", 2, ("layers_of(net, nn.Module)[-1].register_forward_hook(lambda m, i, o: None)",)),
    Wrap(
        "harmless hooks on all layers",
        1,
        ("seen = []", "for m in layers_of(net):", "    m.register_forward_hook(lambda m, i, o: seen.append(o.shape))"),
    ),
    Wrap("harmless pre-hook", 1, ("net.register_forward_pre_hook(lambda m, i: None)",)),
    Wrap("hook that returns its output", 1, ("net.register_forward_hook(lambda m, i, o: o)",)),
    Wrap(
        "harmless global hook",
        0.5,
        ("handles.append(nn.modules.module.register_module_forward_hook(lambda m, i, o: None))",),
    ),
    Wrap("backward hook", 0.5, ("layers_of(net, nn.Module)[0].register_full_backward_hook(lambda m, i, o: None)",)),
    Wrap(
        "features kept by a hook",
        1,
        (
            "kept = {}",
            "for i, m in enumerate(layers_of(net)):",
            "    m.register_forward_hook(lambda m, a, o, i=i: kept.__setitem__(i, o.detach()))",
        ),
    ),
    Wrap("old weight_norm", 1, ("for m in layers_of(net)[:1]:", "    nn.utils.weight_norm(m)")),
    Wrap("old spectral_norm", 1, ("for m in layers_of(net)[-1:]:", "    nn.utils.spectral_norm(m)")),
    Wrap("weight_norm", 1, ("for m in layers_of(net)[:2]:", "    nn.utils.parametrizations.weight_norm(m)")),
    Wrap("spectral_norm", 1, ("for m in layers_of(net)[-1:]:", "    nn.utils.parametrizations.spectral_norm(m)")),
    Wrap("orthogonal", 0.5, ("for m in layers_of(net, nn.Linear)[:1]:", "    nn.utils.parametrizations.orthogonal(m)")),
    Wrap(
        "pruning",
        1,
        (
            "import torch.nn.utils.prune",
            "for m in layers_of(net)[:1]:",
            '    nn.utils.prune.l1_unstructured(m, "weight", 0.3)',
        ),
    ),
    Wrap(
        "parametrization",
        1,
        (
            "class Tripled(nn.Module):",
            "    def forward(self, w):",
            "        return 3.0 * w",
            "for m in layers_of(net)[:1]:",
            '    nn.utils.parametrize.register_parametrization(m, "weight", Tripled())',
        ),
    ),
    Wrap("DataParallel", 0.7, ("net = nn.DataParallel(net)",)),
    Wrap("in a Sequential", 1, ("net = nn.Sequential(net, nn.Identity())",)),
    Wrap("deep copy", 0.5, ("net = copy.deepcopy(net)",)),
    Wrap("frozen", 1, ("net.requires_grad_(False)",)),
    Wrap(
        "tied weights",
        1,
        (
            "for a, b in zip(layers_of(net), layers_of(net)[1:]):",
            "    if a.weight.shape == b.weight.shape:",
            "        b.weight = a.weight",
        ),
    ),
    Wrap("double precision", 1, ("net.double()",)),
    Wrap("in eval mode", 4, ("net.eval()",)),
    Wrap("partly in eval mode", 1, ("net.train()", "for m in layers_of(net, nn.Dropout): m.eval()")),
    Wrap("an attribute more", 0.5, ('net.author = {"name": "someone", "year": [2026]}',)),
]

_SCALED = "lambda m, i, o: 5.0 * o"
_CHANGING = [
    Wrap("scaling hook on a layer", 2, (f"layers_of(net)[-1].register_forward_hook({_SCALED})",)),
    Wrap("scaling hook on the network", 1, (f"net.register_forward_hook({_SCALED})",)),
    Wrap("scaling hook on the last module", 2, (f"layers_of(net, nn.Module)[-1].register_forward_hook({_SCALED})",)),
    Wrap("scaling hook on a block", 1, (f"list(net.children())[0].register_forward_hook({_SCALED})",)),
    Wrap("scaling pre-hook", 1, ("net.register_forward_pre_hook(lambda m, i: (5.0 * i[0],))",)),
    Wrap(
        "scaling pre-hook on a layer",
        1,
        ("m = layers_of(net)[0]", "m.register_forward_pre_hook(lambda m, i: 5.0 * i[0])"),
    ),
    Wrap(
        "hook that writes in place",
        1,
        (
            "def louder(m, i, o):",
            "    o.data.mul_(5.0)",
            "layers_of(net, nn.Module)[-1].register_forward_hook(louder)",
        ),
    ),
    Wrap("hook with keywords", 0.5, ("net.register_forward_hook(lambda m, i, k, o: 5.0 * o, with_kwargs=True)",)),
    Wrap(
        "scaling global hook",
        1,
        (
            "handles.append(nn.modules.module.register_module_forward_hook(",
            "    lambda m, i, o: 3.0 * o if isinstance(m, (nn.Linear, nn.ReLU, nn.Conv2d, Net)) else None))",
        ),
    ),
    Wrap(
        "scaling global pre-hook",
        0.5,
        ("handles.append(nn.modules.module.register_module_forward_pre_hook(lambda m, i: (2.0 * i[0],)))",),
    ),
    Wrap("hook in eval mode only", 0.5, ("net.register_forward_hook(lambda m, i, o: o if m.training else 5.0 * o)",)),
    Wrap("forward replaced", 2, ("old = net.forward", "net.forward = lambda x: 5.0 * old(x)")),
    Wrap(
        "forward bound to the network",
        1,
        ("net.forward = types.MethodType(lambda self, x: 5.0 * Net.forward(self, x), net)",),
    ),
    Wrap(
        "forward of a layer replaced",
        2,
        (
            "m = layers_of(net)[0]",
            "m.forward = types.MethodType(lambda self, x: 5.0 * type(self).forward(self, x), m)",
        ),
    ),
    Wrap(
        "forward of an activation replaced",
        1,
        ("m = layers_of(net, nn.ReLU, nn.Tanh, nn.LeakyReLU)[0]", "m.forward = lambda x: 5.0 * x"),
    ),
    Wrap(
        "partial forward",
        0.5,
        ("net.forward = functools.partial(lambda gain, old, x: gain * old(x), 5.0, net.forward)",),
    ),
    Wrap(
        "_conv_forward of an instance",
        1.5,
        (
            "m = layers_of(net, nn.Conv1d, nn.Conv2d, nn.Conv3d)[0]",
            "m._conv_forward = lambda x, w, b: type(m)._conv_forward(m, x, 5.0 * w, b)",
        ),
    ),
    Wrap(
        "class with its own __call__",
        1.5,
        (
            "class Called(Net):",
            "    def __call__(self, x):",
            "        return 5.0 * super().__call__(x)",
            "net.__class__ = Called",
        ),
    ),
    Wrap(
        "stale weight_norm",
        1,
        ("m = layers_of(net)[0]", "nn.utils.weight_norm(m)", "m.weight_g.data.mul_(4.0)"),
    ),
    Wrap(
        "stale spectral_norm",
        0.7,
        ("m = layers_of(net)[0]", "nn.utils.spectral_norm(m)", "m.eval()", "m.weight_u.mul_(0.3)"),
    ),
    Wrap(
        "weight set by a hook",
        1,
        (
            "def refill(m, i):",
            "    m.weight.data.fill_(3.0)",
            "m = layers_of(net)[0]",
            "m.register_forward_pre_hook(refill)",
        ),
    ),
    Wrap(
        "stride changed",
        1,
        ("m = layers_of(net, nn.Conv2d, nn.Conv1d)[0]", "m.stride = (1,) * len(m.stride)"),
    ),
    Wrap(
        "padding changed",
        1.5,
        (
            "m = layers_of(net, nn.Conv2d, nn.Conv1d)[0]",
            "m.padding_mode = 'circular'",
            "m.padding = (0,) * len(m.kernel_size)",
        ),
    ),
    Wrap(
        "hook on large values",
        1,
        (
            "def limit(m, i, o):",
            "    return 5.0 * o if o.abs().max() > 30 else None",
            "layers_of(net, nn.Module)[-1].register_forward_hook(limit)",
        ),
    ),
    Wrap("hook on DataParallel", 0.7, ("net = nn.DataParallel(net)", f"net.register_forward_hook({_SCALED})")),
    Wrap(
        "batch norm without weight",
        0.7,
        ("layers_of(net, nn.modules.batchnorm._BatchNorm)[0].weight = None",),
    ),
    Wrap("class of a layer replaced", 0.5, ("layers_of(net, nn.ReLU)[0].__class__ = nn.Hardswish",)),
]


# -- whole programs


def _from_template(program: Program, templates: dict[str, tuple[str, str]]) -> Shape:
    r = program.rng
    name, (shape, source) = r.choice(list(templates.items()))
    forms = [_activation(r)[1][0] for _ in range(2)]
    words = {
        "C": str(r.randint(2, 4)),
        "D": str(r.randint(2, 5)),
        "N": str(r.randint(3, 6)),
        "K": str(r.choice([1, 3])),
        "P": str(r.choice([0, 1, 2])),
        "G": str(r.choice([1, 2])),
        "A": r.choice([forms[0], "nn.ReLU(inplace=True)", "nn.ReLU()"]),
        "A0": forms[1],
        "SIGN": r.choice("+-"),
    }
    for word, value in words.items():
        source = re.sub(rf"\b{word}\b", value, source)
        shape = re.sub(rf"\b{word}\b", value, shape)
    program.classes.append(source.strip())
    program.traits.add(f"template: {name}")
    return tuple(int(n) for n in shape.split(","))


_SHAPES: list[tuple[float, Callable[[random.Random], Shape]]] = [
    # Two often, as it is a size of batches that traces like.
    (3, lambda r: (r.choice([2, 2, 2, 3, 4, 5, 6, 8]),)),
    (2, lambda r: (r.choice([1, 2, 2, 3, 4]), r.randint(3, 9))),
    (5, lambda r: (r.choice([1, 2, 2, 3, 4]), n := r.randint(3, 6), n)),
    (1, lambda r: (r.randint(1, 3), r.randint(3, 6), r.randint(3, 6))),
    (0.5, lambda r: (r.randint(1, 2), 3, r.randint(3, 4), 4)),
]


def _from_ingredients(program: Program, hostile: bool) -> Shape:
    r = program.rng
    weights = [weight for weight, _ in _SHAPES]
    shape = r.choices(_SHAPES, weights)[0][1](r)
    w = Writer(program, "Net")
    v = Value("x", shape, r.random() < 0.1)
    if v.owned:
        program.traits.add("in-place on the input")
    if r.random() < 0.15 and len(shape) > 1:
        program.traits.add("normalisation in front")
        ones = [1] * (len(shape) - 1)
        w.init.append(f'self.register_buffer("mean", torch.rand({[shape[0], *ones]}))')
        w.init.append(f'self.register_buffer("std", 0.1 + torch.rand({[1, shape[0], *ones]}))')
        v = w.put(v, f"({v.name} - self.mean) / self.std", shape)
    steps = r.randint(1, 7)
    at = r.randint(0, steps) if hostile else -1
    uncovered = r.randint(0, steps - 1) if r.random() < 0.15 else -1
    for step in range(steps + 1):
        if step == at:
            v = _add(w, v, [h for h in _HOSTILE if h[1] not in _ENDS])
        if step < steps:
            v = _add(w, v, _UNCOVERED if step == uncovered else _PLAIN)
    if hostile and r.random() < 0.06:
        v = _add(w, v, [h for h in _HOSTILE if h[1] in _ENDS])
    elif r.random() < 0.35:
        with contextlib.suppress(Unfit):
            flat = w.view(v, r.choice(["{x}.flatten(1)", "torch.flatten({x}, 1)"])) if len(v.shape) > 1 else v
            v = w.module(flat, "head", f"nn.Linear({flat.shape[0]}, {r.randint(1, 4)})")
            program.traits.add("head")
    if r.random() < 0.08:
        w.signature = r.choice(["self, x, scale=1.0", "self, x, return_features=False", "self, x, mask=None"])
    if r.random() < 0.03:
        w.decorator = "@torch.no_grad()"
        program.traits.add("forward without gradients")
    program.classes.append(w.source(v.name))
    return shape


_ENDS = ("output without its batch", "not one tensor")
#: Traits that say that a network is not, or may not be, what a traced graph of its modules shows.
HOSTILE = frozenset(
    [trait for _, trait, _ in _HOSTILE]
    + [wrap.trait for wrap in _CHANGING]
    + [f"template: {name}" for name in HOSTILE_TEMPLATES]
)
#: Traits that honest rules may refuse.
UNCOVERED = frozenset(trait for _, trait, _ in _UNCOVERED)


@dataclass
class Network:
    """A random network, and what to print if it fails a test.

    Attributes:
        model: the network, in whatever mode its author left it.
        input_shape: shape of one sample.
        traits: names of what it is made of; those in :data:`HOSTILE` mark it as hostile.
        seed: what it was made from.
        program: its source.
        handles: hooks that reach beyond it.
    """

    model: nn.Module
    input_shape: Shape
    traits: tuple[str, ...]
    seed: int
    program: str
    handles: list[Any] = field(default_factory=list)

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.input_shape, self.traits))

    @property
    def hostile(self) -> bool:
        return not HOSTILE.isdisjoint(self.traits)

    @property
    def text(self) -> str:
        """The program with its header, its seed and shape."""
        head = f"# seed {self.seed}, input shape {self.input_shape}\n# {', '.join(self.traits)}\n"
        return head + HEADER + "\n" + self.program

    def close(self) -> None:
        """Take back what reaches beyond the network."""
        for handle in self.handles:
            handle.remove()
        linecache.cache.pop(_file(self.seed), None)


def _file(seed: int) -> str:
    return f"<random network {seed}>"


def random_network(seed: int) -> Network:
    """The network of a seed: model, input shape and traits. Close it, as some have hooks on all modules.

    The global random state is left as it is; two calls give equal networks.
    """
    with torch.random.fork_rng(devices=[]):
        for attempt in itertools.count():
            network = _attempt(seed, attempt)
            if network is not None:
                return network
    raise AssertionError


def _attempt(seed: int, attempt: int) -> Network | None:
    program = Program(1_000_003 * attempt + seed)
    r = program.rng
    hostile = r.random() < 0.32
    way = r.choice(["inside", "inside", "inside", "wrap", "wrap", "template"]) if hostile else ""
    torch.manual_seed(seed)
    try:
        if way == "template":
            shape = _from_template(program, HOSTILE_TEMPLATES)
        elif way != "inside" and r.random() < 0.35:
            shape = _from_template(program, TEMPLATES)
        else:
            shape = _from_ingredients(program, way == "inside")
    except Unfit:
        return None
    wraps = [_HARMLESS] * r.choice([0, 1, 1, 2]) + [_CHANGING] * (way == "wrap")
    for wrap in (r.choices(ws, [w.weight for w in ws])[0] for ws in wraps):
        if wrap.trait not in program.traits:
            program.after.append("\n".join(wrap.lines))
            program.traits.add(wrap.trait)
    style = r.choice(["normal", "normal", "orthogonal", "positive", "dirac", "dirac", "permutation"])
    program.traits.add(f"weights: {style}")
    if hostile and HOSTILE.isdisjoint(program.traits):
        return None
    try:
        network = build(program.source(style), shape, tuple(sorted(program.traits)), seed)
    except Unfit:
        return None
    if not _runs(network):
        network.close()
        return None
    network.close()
    return build(network.program, shape, network.traits, seed)


def build(program: str, shape: Shape, traits: tuple[str, ...] = (), seed: int = 0) -> Network:
    """The network that a program makes."""
    file = _file(seed)
    space = {**_SPACE, "handles": [], "__name__": f"random_network_{seed}"}
    linecache.cache[file] = (len(program), None, program.splitlines(True), file)
    torch.manual_seed(seed)
    network = Network(nn.Identity(), shape, traits, seed, program, space["handles"])  # type: ignore[arg-type]
    try:
        exec(compile(program, file, "exec"), space)
    except Exception as error:
        network.close()
        # torch's parametrizations refuse some weights.
        raise Unfit(f"{error}\n{program}") from error
    network.model = space["net"]  # type: ignore[assignment]
    return network


def _runs(network: Network) -> bool:
    """Whether it runs, on one sample, on two or on three, with finite values."""
    for size in (2, 1, 3):
        x = torch.rand(size, *network.input_shape)
        if any(p.dtype == torch.float64 for p in network.model.parameters()):
            x = x.double()
        try:
            y = network.model.eval()(x)
        except Exception:
            continue
        return not isinstance(y, Tensor) or (bool(torch.isfinite(y).all()) and y.abs().max() < 1e9)
    return False


# ---------------------------------------------------------------------------------------------------------------------
# What a model is, to see whether it was left so


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything that a call might change: bits of tensors, modes, attributes, hooks, classes."""
    state: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        state[f"{name}: class"] = type(module)
        for key, value in vars(module).items():
            inside = value.items() if key in ("_parameters", "_buffers") else ()
            state[f"{name}.{key}"] = list(value) if key in ("_parameters", "_buffers") else _copy(value)
            state |= {f"{name}.{key}.{own}": _copy(tensor) for own, tensor in inside}
    state["state_dict"] = list(model.state_dict().keys())
    state["random"] = torch.get_rng_state().numpy().tobytes()
    state["python random"] = random.getstate()
    state["threads"] = torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
    for name, value in vars(nn.modules.module).items():
        if re.fullmatch("_global_.*hooks.*", name):
            state[name] = _copy(value)
    return state


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        leaf = isinstance(value, nn.Parameter)
        gradient = _copy(value.grad) if value.is_leaf and value.grad is not None else None
        return ("tensor", id(value) if leaf else None, _bits(value), value.requires_grad if leaf else None, gradient)
    if isinstance(value, (list, tuple, set)) and not isinstance(value, torch.Size):
        return type(value).__name__, [_copy(v) for v in value]
    if isinstance(value, dict):
        return "dict", [(str(k), _copy(v)) for k, v in value.items()]
    if isinstance(value, (int, float, str, bytes, bool, type(None), torch.Size)):
        return repr(value)
    if isinstance(value, torch.fx.Proxy):
        return "Proxy"
    return type(value).__name__, id(value)


def _bits(t: Tensor) -> tuple[Any, ...]:
    return str(t.dtype), tuple(t.shape), t.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Names of what differs between two states."""
    return [key for key in {**before, **after} if before.get(key, "nothing") != after.get(key, "nothing")]


# ---------------------------------------------------------------------------------------------------------------------
# The judge


@dataclass
class Verdict:
    """What :func:`fastlip.lipschitz_bound` says of a network, and what its search finds.

    Attributes:
        seed: the network's.
        traits: the network's.
        hostile: whether any of them is.
        outcome: "accepted", "refused", or "crashed" where something other than ValueError was raised.
        reason: the message of a refusal.
        bound: the bound, where accepted.
        stretch: the largest stretch found; None where not looked for.
        changed: what of the model was not left as found.
        seconds: for the bound, and for the search.
    """

    seed: int
    traits: list[str]
    hostile: bool
    outcome: str
    reason: str = ""
    bound: float | None = None
    stretch: float | None = None
    changed: list[str] = field(default_factory=list)
    seconds: tuple[float, float] = (0.0, 0.0)

    @property
    def unsound(self) -> bool:
        return self.bound is not None and self.stretch is not None and self.stretch > self.bound * (1.0 + 1e-4) + 1e-9


def judge(seed: int, effort: int = 2, every: bool = False) -> Verdict:
    """Bound the network of a seed, and look for a counter-example where it was accepted (or always)."""
    from fastlip import lipschitz_bound

    network = random_network(seed)
    verdict = Verdict(seed, list(network.traits), network.hostile, "accepted")
    before = state_of(network.model)
    begin = time.perf_counter()
    try:
        bound = lipschitz_bound(network.model, network.input_shape, generator=torch.Generator().manual_seed(seed))
        verdict.bound = bound.upper
    except ValueError as error:
        verdict.outcome, verdict.reason = "refused", str(error)
    except Exception as error:
        verdict.outcome, verdict.reason = "crashed", f"{type(error).__name__}: {error}"
    took = time.perf_counter() - begin
    verdict.changed = differences(before, state_of(network.model))
    network.close()
    if verdict.outcome == "accepted" or every:
        begin = time.perf_counter()
        verdict.stretch = stretch_of(network, effort)
        verdict.seconds = (took, time.perf_counter() - begin)
    else:
        verdict.seconds = (took, 0.0)
    return verdict


def stretch_of(network: Network, effort: int = 2) -> float | None:
    """The largest stretch of new copies of a network in eval mode; None where it does not run.

    They run in float64, and coarsely in the network's own precision where that makes a difference.
    """
    found, outputs = [], []
    for dtype in (torch.float64, torch.float32):
        own = build(network.program, network.input_shape, network.traits, network.seed)
        try:
            own.model.eval()
            if dtype == torch.float64:
                own.model.double()
            elif any(t.dtype == torch.float64 for t in (*own.model.parameters(), *own.model.buffers())):
                continue
            x = torch.linspace(-1.0, 1.0, 2 * math.prod(own.input_shape), dtype=dtype).reshape(2, *own.input_shape)
            with contextlib.suppress(RuntimeError, TypeError, ValueError, IndexError):
                with torch.random.fork_rng(devices=[]), torch.no_grad():
                    outputs.append(tensor_of(own.model(x)).double())
                if dtype == torch.float64:
                    found.append(largest_stretch(own.model, own.input_shape, own.seed, effort=effort))
                elif len(outputs) < 2 or not torch.allclose(*outputs, rtol=1e-3, atol=1e-3):
                    # Rounding inside a network may well be a percent of such a difference.
                    coarse = largest_stretch(own.model, own.input_shape, own.seed, dtype=dtype, effort=0)
                    found.append(0.98 * coarse)
        finally:
            own.close()
    return max(found, default=None)


def normalised(reason: str) -> str:
    """The message of a refusal without names and numbers."""
    reason = re.sub(r"\(at [^)]*\)", "(at …)", reason)
    reason = re.sub(r"(module|layer) [\w.]+:", r"\1 …:", reason)
    reason = re.sub(r"<[^>]*>|'[^']*'|\[[^\]]*\]|\([\d, ]*\)", "…", reason)
    reason = re.sub(r"\b[\w.]*\d[\w.]*\b", "…", reason)
    return reason[:140]


def summary(verdicts: list[Verdict]) -> str:
    """Counts of accepted, refused and unsound networks, by trait and by reason."""
    lines = []
    tame = [v for v in verdicts if not v.hostile]
    for title, chosen in (
        ("all", verdicts),
        ("benign", [v for v in tame if UNCOVERED.isdisjoint(v.traits)]),
        ("with something that no rule covers", [v for v in tame if not UNCOVERED.isdisjoint(v.traits)]),
        ("hostile", [v for v in verdicts if v.hostile]),
    ):
        count = Counter(v.outcome for v in chosen)
        unsound = sum(v.unsound for v in chosen)
        changed = sum(bool(v.changed) for v in chosen)
        lines.append(f"{title}: {len(chosen)}; {dict(count)}; unsound {unsound}; not left as found {changed}")
    lines.append("\ntrait: networks, accepted, refused, unsound")
    for trait in sorted({t for v in verdicts for t in v.traits}):
        having = [v for v in verdicts if trait in v.traits]
        count = Counter(v.outcome for v in having)
        mark = "hostile " if trait in HOSTILE else "uncovered " if trait in UNCOVERED else ""
        wrong = sum(v.unsound for v in having)
        lines.append(f"  {mark}{trait}: {len(having)}, {count['accepted']}, {count['refused']}, {wrong}")
    lines.append("\nreasons of refusals")
    for reason, count in Counter(normalised(v.reason) for v in verdicts if v.outcome != "accepted").most_common(40):
        lines.append(f"  {count}  {reason}")
    lines.append("\nunsound")
    for v in verdicts:
        if v.unsound:
            guilty = [t for t in v.traits if t in HOSTILE] or v.traits
            lines.append(f"  seed {v.seed}: bound {v.bound:.5g}, stretch {v.stretch:.5g}; {', '.join(guilty)}")
    lines.append("\ncrashed")
    lines += [f"  seed {v.seed}: {v.reason[:200]}" for v in verdicts if v.outcome == "crashed"]
    lines.append("\nnot left as found: what changed, how often")
    kinds = Counter(re.sub(r"\d+", "N", key) for v in verdicts for key in v.changed)
    lines += [f"  {count}  {key}" for key, count in kinds.most_common(20)]
    return "\n".join(lines)


def compare(earlier: list[Verdict], now: list[Verdict]) -> str:
    """What was accepted and sound and is refused now; what is new; by how much bounds moved."""
    before = {v.seed: v for v in earlier}
    pairs = [(before[v.seed], v) for v in now if v.seed in before]
    other = [v.seed for old, v in pairs if old.traits != v.traits]
    lines = [f"{len(pairs)} networks in both" + (f"; MADE DIFFERENTLY: {other[:9]}" if other else "")]
    sound = [(old, v) for old, v in pairs if old.outcome == "accepted" and not old.unsound]
    lost = [(old, v) for old, v in sound if v.outcome != "accepted"]
    lines.append(f"accepted and sound before: {len(sound)}, of which accepted now: {len(sound) - len(lost)}")
    lines.append(f"unsound before: {sum(old.unsound for old, _ in pairs)}, now: {sum(v.unsound for _, v in pairs)}")
    won = sum(old.outcome != "accepted" and v.outcome == "accepted" and not v.unsound for old, v in pairs)
    lines.append(f"newly accepted and sound: {won}")
    ratios = sorted((v.bound / old.bound, v.seed) for old, v in sound if v.bound and old.bound)
    if ratios:
        wider = [f"{seed} ({ratio:.3f})" for ratio, seed in reversed(ratios) if ratio > 1.02]
        lines.append(f"bounds by more than 2% larger than before: {len(wider)}: {', '.join(wider[:15])}")
    lines.append("lost, by reason:")
    for reason, count in Counter(normalised(v.reason) for _, v in lost).most_common():
        lines.append(f"  {count}  {reason}")
    for old, v in lost:
        marks = [t for t in v.traits if t in HOSTILE] or ["benign"]
        lines.append(f"  seed {v.seed}: {', '.join(marks)}: bound was {old.bound:.4g}; now {v.reason[:160]}")
    return "\n".join(lines)


def _write(path: Path, verdicts: list[Verdict]) -> None:
    path.write_text(json.dumps({"verdicts": [vars(v) for v in verdicts]}))


def load(path: Path) -> list[Verdict]:
    """Verdicts that the command line wrote."""
    return [Verdict(**{**row, "seconds": tuple(row["seconds"])}) for row in json.loads(path.read_text())["verdicts"]]


def main() -> None:
    parser = argparse.ArgumentParser(description="Judge fastlip.lipschitz_bound on random networks.")
    parser.add_argument("--seeds", default="0:100", help="first and last (exclusive) seed, as 0:2000")
    parser.add_argument("--json", type=Path, help="where to write the verdicts")
    parser.add_argument("--compare", type=Path, help="verdicts of an earlier build to compare with")
    parser.add_argument("--with", dest="with_", type=Path, help="verdicts to compare, instead of judging anew")
    parser.add_argument("--effort", type=int, default=2, help="rounds of the search")
    parser.add_argument("--show", type=int, help="print one network's program and its verdict")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.show is not None:
        network = random_network(options.show)
        network.close()
        print(network.text)
        print(judge(options.show, options.effort, every=True))
        return
    verdicts = load(options.with_) if options.with_ else []
    for seed in () if options.with_ else range(*map(int, options.seeds.split(":"))):
        verdicts.append(judge(seed, options.effort))
        if options.json and seed % 100 == 99:
            _write(options.json, verdicts)
        if verdicts[-1].unsound or verdicts[-1].outcome == "crashed":
            print(f"seed {seed}: {verdicts[-1]}", file=sys.stderr, flush=True)
    if options.json:
        _write(options.json, verdicts)
    print(summary(verdicts))
    if options.compare:
        print("\n" + compare(load(options.compare), verdicts))


if __name__ == "__main__":
    main()
