"""judge: one program a sample, which reads its logits once; for cross-entropy twice more, out of the cache."""

# mypy: allow-untyped-defs, allow-incomplete-defs
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlip.ops._schemas import Best, takes_fields
from fastlip.ops._triton.elements import given, kernel, nothing, on_device

_DLR, _CE = tl.constexpr(0), tl.constexpr(1)
_KINDS = {"dlr": _DLR.value, "ce": _CE.value}
_MARGIN = 2
_NONE = tl.constexpr(2**31 - 1)  # the class of a place that nothing has taken


@triton.jit
def _largest(value, at):
    """The largest value and its class, the lower one of equals; what is empty is -inf and ``_NONE``."""
    largest = tl.max(value)
    return largest, tl.min(tl.where(value == largest, at, _NONE))


@triton.jit
def _follow(value, at, next_value, next_at, taken):
    """A place of each lane, and the next one's where the lane's first was taken."""
    return tl.where(taken, next_value, value), tl.where(taken, next_at, at)


@triton.jit
def _inserted(value, at, ahead_value, ahead_at, logit, c):
    """What a place holds once a logit has come, given what the place ahead held."""
    moves, here = logit > ahead_value, logit > value
    return (
        tl.where(moves, ahead_value, tl.where(here, logit, value)),
        tl.where(moves, ahead_at, tl.where(here, c, at)),
    )


@kernel
def _judge_kernel(
    logits_ptr,
    labels_ptr,
    targets_ptr,
    toward_ptr,
    kind,
    rounding: tl.float64,
    best_loss_ptr,
    succeeded_ptr,
    unconfirmed_ptr,
    best_doubtful_ptr,
    early_stop,
    loss_ptr,
    grad_ptr,
    adversarial_ptr,
    doubtful_ptr,
    better_ptr,
    classes,
    BLOCK: tl.constexpr,
):
    T: tl.constexpr = logits_ptr.dtype.element_ty
    lowest = float("-inf")
    sample = tl.program_id(0).to(tl.int64)
    logits_ptr += sample * classes
    grad_ptr += sample * classes

    # Each lane's four largest logits: a class that the model excludes, -inf, is not among them.
    v0 = tl.full((BLOCK,), lowest, T)
    i0 = tl.full((BLOCK,), _NONE, tl.int32)
    v1, v2, v3, i1, i2, i3 = v0, v0, v0, i0, i0, i0
    smallest = tl.full((BLOCK,), float("inf"), T)
    nans = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, classes, BLOCK):
        c = start + tl.arange(0, BLOCK)
        z = tl.load(logits_ptr + c, c < classes, other=lowest)
        nans += (z != z).to(tl.int32)
        smallest = tl.where((z > lowest) & (z < smallest), z, smallest)
        z = tl.where(z == z, z, lowest)
        v3, i3 = _inserted(v3, i3, v2, i2, z, c)
        v2, i2 = _inserted(v2, i2, v1, i1, z, c)
        v1, i1 = _inserted(v1, i1, v0, i0, z, c)
        here = z > v0
        v0, i0 = tl.where(here, z, v0), tl.where(here, c, i0)
    # The sample's, from the lanes' first places.
    first, first_at = _largest(v0, i0)
    taken = i0 == first_at
    v0, i0 = _follow(v0, i0, v1, i1, taken)
    v1, i1 = _follow(v1, i1, v2, i2, taken)
    v2, i2 = _follow(v2, i2, v3, i3, taken)
    second, second_at = _largest(v0, i0)
    taken = i0 == second_at
    v0, i0 = _follow(v0, i0, v1, i1, taken)
    v1, i1 = _follow(v1, i1, v2, i2, taken)
    third, third_at = _largest(v0, i0)
    v0, i0 = _follow(v0, i0, v1, i1, i0 == third_at)
    fourth, fourth_at = _largest(v0, i0)
    least = tl.min(smallest).to(tl.float64)
    top, second, third, fourth = (
        first.to(tl.float64),
        second.to(tl.float64),
        third.to(tl.float64),
        fourth.to(tl.float64),
    )

    reach, pull = given(targets_ptr), given(toward_ptr)
    own = tl.load(labels_ptr + sample)
    own = tl.load(targets_ptr + sample, reach, other=own)
    toward = tl.load(toward_ptr + sample, pull, other=0)
    there = tl.sum(nans) == 0
    known = there & (own >= 0) & (own < classes) & (toward >= 0) & (toward < classes)
    own = tl.where(known, own, 0).to(tl.int32)
    toward = tl.where(known, toward, 0).to(tl.int32)
    lost = float("nan")
    if kind == _CE:
        at = tl.where(pull, toward, own)
        sums = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, classes, BLOCK):
            c = start + tl.arange(0, BLOCK)
            z = tl.load(logits_ptr + c, c < classes, other=lowest).to(tl.float64)
            sums += tl.exp(z - top)
        total = tl.sum(sums)
        log_softmax = (tl.load(logits_ptr + at).to(tl.float64) - top) - tl.log(total)
        sign = tl.where(pull | reach, 1.0, -1.0).to(tl.float64)
        value = sign * log_softmax
        for start in range(0, classes, BLOCK):
            c = start + tl.arange(0, BLOCK)
            z = tl.load(logits_ptr + c, c < classes, other=lowest).to(tl.float64)
            grad = sign * (tl.where(c == at, 1.0, 0.0) - tl.exp(z - top) / total)
            tl.store(grad_ptr + c, tl.where(known, grad, lost).to(T), c < classes)
    else:
        other = tl.where(first_at != own, first_at, second_at)
        other = tl.where(other == _NONE, tl.where(own == 0, 1, 0), other)  # the model excludes all other classes
        up = tl.where(pull, toward, tl.where(reach, own, other))
        down = tl.where(reach, other, own)
        value = tl.load(logits_ptr + up).to(tl.float64) - tl.load(logits_ptr + down).to(tl.float64)
        # With targets DLR would also increase by widening the spread while the target stays far from the top.
        last = tl.where(pull, fourth, third)
        width = top - tl.where(pull, (third + fourth) * 0.5, third)
        use = (kind == _DLR) & (reach == 0) & (last > lowest) & (width > 0)
        spread = tl.where(use, width, 1.0)
        value = value / spread
        share = tl.where(use, value, 0.0)
        part = tl.where(pull, 0.5, 1.0).to(tl.float64)
        for start in range(0, classes, BLOCK):
            c = start + tl.arange(0, BLOCK)
            way = tl.where(c == up, 1.0, 0.0).to(tl.float64) - tl.where(c == down, 1.0, 0.0)
            below = (c == third_at) | (pull & (c == fourth_at))
            widening = tl.where(c == first_at, 1.0, tl.where(below, -part, 0.0))
            grad = (way - share * widening) / spread
            tl.store(grad_ptr + c, tl.where(known, grad, lost).to(T), c < classes)
    value = tl.where(known, value, lost).to(T)

    decision = tl.where(first_at == _NONE, 0, first_at)
    adversarial = known & ((decision == own) == reach)
    doubtful = (there == 0) | ((top - second > 2 * rounding * (top - least)) == 0)
    kept = given(best_loss_ptr)
    ranked = tl.where(value == value, value.to(tl.float64), lowest)
    larger = ranked > tl.load(best_loss_ptr + sample, kept, other=lowest)
    succeeded = tl.load(succeeded_ptr + sample, kept, other=0) != 0
    better = tl.where(succeeded, (early_stop == 0) & adversarial & larger, adversarial | larger) & kept
    tl.store(best_loss_ptr + sample, ranked, better)
    tl.store(succeeded_ptr + sample, (succeeded | adversarial).to(tl.uint8), kept)
    tl.store(unconfirmed_ptr + sample, adversarial.to(tl.uint8), better & given(unconfirmed_ptr))
    tl.store(best_doubtful_ptr + sample, doubtful.to(tl.uint8), better & given(best_doubtful_ptr))
    tl.store(loss_ptr + sample, value)
    tl.store(adversarial_ptr + sample, adversarial.to(tl.uint8))
    tl.store(doubtful_ptr + sample, doubtful.to(tl.uint8))
    tl.store(better_ptr + sample, (better | (kept == 0)).to(tl.uint8))


@takes_fields
def judge(
    logits: Tensor,  # [B, C], float32 or float64
    labels: Tensor,  # [B] int64
    targets: Tensor | None,  # [B] int64
    toward: Tensor | None,  # [B] int64
    loss: str,
    rounding: float,
    record: Best,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, classes = logits.shape
    value, grad = torch.empty(batch, dtype=logits.dtype, device=logits.device), torch.empty_like(logits)
    adversarial, doubtful, better = (torch.empty_like(labels, dtype=torch.bool) for _ in range(3))
    if batch == 0:
        return value, grad, adversarial, doubtful, better

    def or_null(t: Tensor | None, dtype: torch.dtype) -> Tensor:
        return nothing(dtype, logits.device) if t is None else t.view(dtype)

    with on_device(logits):
        _judge_kernel[(batch,)](
            logits,
            labels,
            or_null(targets, torch.int64),
            or_null(toward, torch.int64),
            _KINDS.get(loss, _MARGIN),
            rounding,
            or_null(record.best_loss, torch.float64),
            *(or_null(t, torch.uint8) for t in (record.succeeded, record.unconfirmed, record.best_doubtful)),
            int(record.early_stop),
            value,
            grad,
            *(t.view(torch.uint8) for t in (adversarial, doubtful, better)),
            classes,
            BLOCK=1024,
            enable_fp_fusion=False,
        )
    return value, grad, adversarial, doubtful, better
