"""Attention: softmax(s Q K^T + mask) V, and the modules that compute it.

The scores move by s (|dQ| |K| + |Q| |dK|), softmax halves that, and its rows sum up to 1. Adding one vector to all rows
of K changes no softmax, and the rows of a change of the softmax sum up to 0, so that only how far the rows of K and V
are from a common vector counts there.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fastlip.lipschitz import _interval_arithmetic as arithmetic
from fastlip.lipschitz._broadcast import spectral_norm
from fastlip.lipschitz._calls import Call
from fastlip.lipschitz._combinations import Weighted
from fastlip.lipschitz._expansions import Site, expands
from fastlip.lipschitz._intervals import Interval
from fastlip.lipschitz._registry import builds, missing_rule
from fastlip.lipschitz._rules.products import averaged, rows_apart
from fastlip.lipschitz._steps import Step

#: Rounding of a few operations on numbers.
_ROUNDING = 1e-12


@dataclass(frozen=True, eq=False)
class Attention(Weighted):
    """Softmax attention on [..., n, d] queries, keys and values, in this order.

    Attributes:
        scale: what the scores are multiplied by.
        mask: what is added to the scores, or None.
    """

    name: ClassVar[str] = "attention"
    scale: float
    mask: Tensor | None

    def weights(self, magnitudes: Sequence[Interval]) -> Sequence[float]:
        q, k, v = magnitudes
        apart = rows_apart(v)
        factor = 0.5 * abs(self.scale) * apart * (1.0 + _ROUNDING) if apart < math.inf else math.inf
        of_q = spectral_norm(q.magnitude()[0], q.norm.item())
        return [_times(factor, rows_apart(k)), _times(factor, of_q), self._averages(q, k)]

    def _averages(self, q: Interval, k: Interval) -> float:
        """Upper bound on the spectral norm of a head's softmax."""
        shares = torch.ones((*q.shape[:-1], k.shape[-2]), dtype=torch.float64, device=q.lower.device)
        if bool(q.norm.isfinite().all() & k.norm.isfinite().all()):
            shares = attention_shares(q, k, self.scale, self.mask).upper[0]
        return spectral_norm(shares, math.inf, 1.0 + _ROUNDING)


def _times(a: float, b: float) -> float:
    return 0.0 if a == 0.0 or b == 0.0 else a * b * (1.0 + _ROUNDING)


def attention_shares(q: Interval, k: Interval, scale: float, mask: Tensor | None) -> Interval:
    """Bounds of softmax(scale Q K^T + mask)."""
    turned = Interval(k.lower.transpose(-2, -1), k.upper.transpose(-2, -1), k.norm)
    scores = arithmetic.scale(arithmetic.matmul(q, turned), scale)
    if mask is not None:
        scores = arithmetic.shift(scores, mask.double())
    return arithmetic.softmax(scores, -1)


@builds(F.scaled_dot_product_attention)
def _attention(call: Call) -> Step | None:
    given = _given(call.args, call.kwargs)
    nodes = [given.pop(name, None) for name in _NAMES[:3]]
    if any(not isinstance(node, fx.Node) or node not in call.steps for node in nodes):
        return None
    shapes = [call.sample_shape(node) for node in nodes]
    mask, scale = given.get("attn_mask"), given.get("scale")
    if any(isinstance(value, fx.Node) for value in given.values()) or given.get("dropout_p", 0.0):
        raise missing_rule(f"{call.name} with dropout, or a mask that depends on the input", call.where)
    if len({shape[:-2] for shape in shapes}) != 1 or len(shapes[0]) < 2:
        raise missing_rule(f"{call.name} with heads that share keys, or without a batch axis", call.where)
    scale = float(shapes[0][-1] ** -0.5 if scale is None else scale)
    added = _added(mask, bool(given.get("is_causal", False)), shapes[0][-2], shapes[1][-2])
    if added is not None and bool((added == -math.inf).all(-1).any()):
        raise ValueError(f"{call.where}: {call.name} has a query that may attend to nothing")

    def operands(args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
        now = _given(args, kwargs)
        return [now[name] for name in _NAMES[:3]]

    def apply(*args: Any, **kwargs: Any) -> Tensor:
        q, k, v = operands(args, kwargs)
        scores = (q * scale) @ k.transpose(-2, -1)
        return (scores if added is None else scores + added.to(scores)).softmax(-1) @ v

    def interval(*args: Any, **kwargs: Any) -> Interval:
        q, k, v = operands(args, kwargs)
        return averaged(attention_shares(q, k, scale, added), v)

    inputs = [call.steps[node] for node in nodes]
    factor = Attention(scale, added)
    return Step(call.where, call.name, inputs, factor, call.shape, apply=apply, interval=interval)


_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


def _given(args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of attention by name."""
    return dict(zip(_NAMES, args, strict=False)) | kwargs


def _added(mask: Tensor | None, causal: bool, queries: int, keys: int) -> Tensor | None:
    """What is added to the scores, float64: 0 and -inf for a mask of truth values, and where keys come later."""
    if causal:
        mask = torch.ones(queries, keys, dtype=torch.bool).tril()
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=torch.float64, device=mask.device).masked_fill(~mask, -math.inf)
    return mask.detach().double()


@expands(nn.MultiheadAttention)
def _multihead(site: Site) -> Any:
    module = site.module
    assert isinstance(module, nn.MultiheadAttention)
    names = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights")
    given = dict(zip(names, site.args, strict=False)) | site.kwargs
    extras = module.bias_k is not None or module.add_zero_attn or given.get("key_padding_mask") is not None
    if extras or given.get("is_causal") or not module.batch_first or (module.training and module.dropout > 0.0):
        return None
    query, key, value = (given[name] for name in names[:3])
    if len(site.sample_shape(query)) != 2:
        return None
    d, heads = module.embed_dim, module.num_heads
    bias: Any = site.parameter("in_proj_bias") if module.in_proj_bias is not None else None
    joint: Any = site.parameter("in_proj_weight") if module.in_proj_weight is not None else None
    projected = []
    for i, (x, name) in enumerate(zip((query, key, value), ("q", "k", "v"), strict=True)):
        own = slice(i * d, (i + 1) * d)
        weight = site.parameter(f"{name}_proj_weight") if joint is None else joint[own]
        y = F.linear(x, weight, None if bias is None else bias[own])
        projected.append(y.reshape(x.size(0), -1, heads, d // heads).transpose(1, 2))
    q, k, v = projected
    mask: Any = given.get("attn_mask")
    if mask is not None:
        held = site.values.constants.get(mask.node) if isinstance(mask, fx.Proxy) else None
        if not isinstance(held, Tensor) or held.dim() != 2:
            return None
        # This module masks what is true, scaled_dot_product_attention what is false.
        mask = torch.logical_not(mask) if held.dtype == torch.bool else mask
    if given.get("need_weights", True):
        scores = (q * (d // heads) ** -0.5) @ k.transpose(-2, -1)
        if mask is not None:
            return None
        shares = torch.softmax(scores, -1)
        out, weights = shares @ v, shares.mean(1) if given.get("average_attn_weights", True) else shares
    else:
        out, weights = F.scaled_dot_product_attention(q, k, v, mask), None
    joined = out.transpose(1, 2).reshape(query.size(0), -1, d)
    last = None if module.out_proj.bias is None else site.parameter("out_proj.bias")
    return F.linear(joined, site.parameter("out_proj.weight"), last), weights


def to_windows(x: Tensor, window: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """Windows of a map that is padded with zeros to whole windows and shifted cyclically.

    Args:
        x: [B, H, W, C].
        window: height and width of a window.
        shift: by how much the map is shifted up and left.

    Returns:
        [B, windows, pixels of a window, C].
    """
    height, width = window
    x = F.pad(x, (0, 0, 0, -x.shape[2] % width, 0, -x.shape[1] % height)).roll((-shift[0], -shift[1]), (1, 2))
    b, rows, columns, c = x.shape
    x = x.view(b, rows // height, height, columns // width, width, c).transpose(2, 3)
    return x.reshape(b, -1, height * width, c)


def from_windows(x: Tensor, size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """The map of which :func:`to_windows` made windows, of a size without its padding, [B, H, W, C]."""
    height, width = window
    rows, columns = -(-size[0] // height), -(-size[1] // width)
    x = x.reshape(len(x), rows, columns, height, width, -1).transpose(2, 3)
    x = x.reshape(len(x), rows * height, columns * width, -1).roll(shift, (1, 2))
    return x[:, : size[0], : size[1]].contiguous()


@builds(to_windows, from_windows)
def _windows(call: Call) -> Step:
    """Each value moves to one place, or is left out with the padding."""
    interval = arithmetic.moved(call.target)
    return Step(call.where, call.name, call.sources, 1.0, call.shape, apply=call.target, interval=interval)


@expands("torchvision.models.swin_transformer.shifted_window_attention")
def _shifted_windows(site: Site) -> Any:
    names = (
        "input", "qkv_weight", "proj_weight", "relative_position_bias", "window_size", "num_heads", "shift_size",
        "attention_dropout", "dropout", "qkv_bias", "proj_bias", "logit_scale", "training",
    )  # fmt: skip
    given = dict(zip(names, site.args, strict=False)) | site.kwargs
    if given.get("training", True) and (given.get("attention_dropout", 0.0) or given.get("dropout", 0.0)):
        return None
    x, heads = given["input"], given["num_heads"]
    rows, columns, channels = site.sample_shape(x)
    window = (int(given["window_size"][0]), int(given["window_size"][1]))
    padded = (rows + -rows % window[0], columns + -columns % window[1])
    # A window as large as the map needs no shift.
    shift = tuple(0 if w >= n else int(s) for w, n, s in zip(window, padded, given["shift_size"], strict=True))
    inside = site.call(to_windows, x, window, shift)
    weight, bias, scale = given["qkv_weight"], given.get("qkv_bias"), given.get("logit_scale")
    projected = []
    for i in range(3):
        part = slice(i * channels, (i + 1) * channels)
        # The second version has no offset for the keys.
        offset = None if bias is None or (i == 1 and scale is not None) else bias[part]
        y = F.linear(inside, weight[part], offset)
        projected.append(y.reshape(x.size(0), y.size(1), y.size(2), heads, channels // heads).transpose(2, 3))
    q, k, v = projected
    factor = None
    if scale is not None:
        q = F.normalize(q, dim=-1) * torch.clamp(scale, max=math.log(100.0)).exp()
        k, factor = F.normalize(k, dim=-1), 1.0
    mask = given["relative_position_bias"]
    if any(shift):
        mask = mask + site.constant(_window_mask(padded, window, shift))
    out = F.scaled_dot_product_attention(q, k, v, mask, scale=factor)
    joined = out.transpose(2, 3).reshape(x.size(0), y.size(1), y.size(2), channels)
    result = F.linear(joined, given["proj_weight"], given.get("proj_bias"))
    return site.call(from_windows, result, (rows, columns), window, shift)


def _window_mask(size: tuple[int, int], window: tuple[int, int], shift: Sequence[int]) -> Tensor:
    """-100 between pixels of a window that a cyclic shift brought together from opposite edges, [windows, 1, n, n]."""
    regions = torch.zeros(1, *size, 1)
    edges = [((0, n - w), (n - w, n - s), (n - s, n)) for n, w, s in zip(size, window, shift, strict=True)]
    for i, (top, bottom) in enumerate(edges[0]):
        for j, (left, right) in enumerate(edges[1]):
            regions[:, top:bottom, left:right] = 3 * i + j
    of = to_windows(regions, window, (0, 0))[0, :, :, 0]
    return torch.where(of[:, None] != of[:, :, None], -100.0, 0.0)[:, None]
