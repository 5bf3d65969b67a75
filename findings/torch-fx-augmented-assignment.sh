#!/bin/sh
# torch 2.14.1, torch.fx.symbolic_trace
#
# Behaviour: an augmented assignment to a tensor (x += y, -=, *=, /=) is traced as x = x + y. In PyTorch it changes the
#   tensor itself, which a view or another name of it sees; in the traced graph they keep the old numbers.
# Expected: operator.iadd in the graph, as x.add_(y) gives a call of add_. A reader would guess that the graph computes
#   what the module does, or that tracing refuses.
# Seen: for `a = 2 x; b = a; a += 1; a * b` the module gives 9 at 1 and the graph 6, without a word; with a view in
#   place of the other name 9 and 6 as well. With a.add_(1) both are right. torch.export gives 9.
# Why it matters: symbolic_trace is the first step of quantization, of folding BatchNorm and of verifiers; a check that
#   compares the two on an input is the only thing that shows it.
# Source: torch.fx.Proxy defines __add__ and the other binary operators and no __iadd__, so that Python falls back on
#   __add__.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check torch==2.14.1 numpy==2.4.6
"$dir/venv/bin/python" - <<'PY'
import sys

import torch
from torch import fx, nn


class Alias(nn.Module):
    def forward(self, x):
        a = 2 * x
        b = a
        a += 1
        return a * b


class View(nn.Module):
    def forward(self, x):
        a = 2 * x
        b = a.view(-1)
        a += 1
        return a * b


class Method(nn.Module):
    def forward(self, x):
        a = 2 * x
        b = a
        a.add_(1)
        return a * b


x = torch.ones(1)
seen = {}
for kind in (Alias, View, Method):
    graph = fx.symbolic_trace(kind())
    called = [getattr(node.target, "__name__", node.target) for node in graph.graph.nodes]
    seen[kind.__name__] = (kind()(x).item(), graph(x).item())
    print(kind.__name__, "module and graph at 1:", *seen[kind.__name__], called)
exported = torch.export.export(Alias(), (x,)).module()(x).item()
print("torch.export:", exported)
want = {"Alias": (9.0, 6.0), "View": (9.0, 6.0), "Method": (9.0, 9.0)}
sys.exit(0 if seen == want and exported == 9.0 else "the behaviour has changed")
PY
