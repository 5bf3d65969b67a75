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
from torch import Tensor, fx

from fastlip.lipschitz import _interval_arithmetic as arithmetic
from fastlip.lipschitz._broadcast import spectral_norm
from fastlip.lipschitz._calls import Call
from fastlip.lipschitz._combinations import Weighted
from fastlip.lipschitz._intervals import Interval
from fastlip.lipschitz._registry import builds, missing_rule, traced_as
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
    return (_hidden(mask) if mask.dtype == torch.bool else mask.detach()).double()


def _hidden(mask: Tensor) -> Tensor:
    """-inf where a mask is false, and 0 where it is true."""
    return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -math.inf)


@traced_as(F.multi_head_attention_forward)
def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    *,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What ``torch.nn.functional.multi_head_attention_forward`` does, [tokens, B, embed_dim], in terms that have rules.

    Raises:
        NotImplementedError: it has arguments for which there is no rule.
    """
    others = (bias_k, bias_v, key_padding_mask, static_k, static_v)
    masks = attn_mask is not None and attn_mask.dim() != 2
    if any(other is not None for other in others) or add_zero_attn or masks or query.dim() != 3:
        raise NotImplementedError
    if training and dropout_p > 0.0:
        raise NotImplementedError
    d = embed_dim // heads
    joint = None if use_separate_proj_weight else in_proj_weight
    apart = (q_proj_weight, k_proj_weight, v_proj_weight)
    projected = []
    for i, x in enumerate((query, key, value)):
        own = slice(i * embed_dim, (i + 1) * embed_dim)
        weight = apart[i] if joint is None else joint[own]
        assert weight is not None
        y = F.linear(x, weight, None if in_proj_bias is None else in_proj_bias[own])
        projected.append(y.reshape(len(x), -1, heads, d).permute(1, 2, 0, 3))
    q, k, v = projected
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        # This function leaves out what is true, scaled_dot_product_attention what is false.
        attn_mask = torch.logical_not(attn_mask)
    weights = None
    if need_weights:
        scores = (q * d**-0.5) @ k.transpose(-2, -1)
        if attn_mask is not None:
            scores = scores + (_hidden(attn_mask) if attn_mask.dtype == torch.bool else attn_mask)
        shares = scores.softmax(-1)
        out, weights = shares @ v, shares.mean(1) if average_attn_weights else shares
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask)
    joined = out.permute(2, 0, 1, 3).reshape(len(query), -1, embed_dim)
    return F.linear(joined, out_proj_weight, out_proj_bias), weights
