"""Training of one network, from its initial weights to its last.

SGD with Nesterov momentum, learning rates of OneCycleLR, random crops, flips and cutout on the device, and on request
an average of the weights. Several processes (:mod:`fastlip.study.training.process_group`) take equal parts of each
batch; their result is that of one process up to rounding, but for what networks draw themselves. The order of the
images and their augmentation are drawn from generators seeded by (seed, epoch), and dropout and its like from torch's,
seeded at each step. The state is saved as training goes on, so that a run killed at any moment and started again ends
with the same weights, bit for bit, on the same machine.

Measured with torch 2.15 on two cores of an AMD EPYC with AVX512-BF16, ResNet-50 with the ImageNet stem at 32x32,
batches of 64: 141 images/s in float32, 196 in bfloat16.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastlip.study.errors import StudyError
from fastlip.study.settings.training import Schedule
from fastlip.study.training.norm_bound import NormBound
from fastlip.study.training.process_group import ProcessGroup
from fastlip.study.training.unfinished import RESUMING, Average, History, UnfinishedTraining

SINGLE_PROCESS = ProcessGroup()

#: Steps between two checks that the loss is finite; at each of them the host waits for the GPU.
_CHECK_EVERY = 50

#: Difference between the seeds of what a network draws and those of the images' order and augmentation.
_APART = 1 << 61

#: What cutout puts in the place of pixels; uint8.
_GREY = 128


def train(
    model: nn.Module,
    images: Tensor,  # [N, C, H, W] uint8
    labels: Tensor,  # [N] int64
    schedule: Schedule,
    *,
    seed: int,
    precision: torch.dtype,
    state_path: Path,
    save_seconds: float,
    progress: Callable[[int, int, str], None],
    head: nn.Module | None = None,
    parts: Sequence[nn.Module] | None = None,
    keep: Callable[[int], None] | None = None,
    group: ProcessGroup = SINGLE_PROCESS,
    compiled: bool = False,
    norm_bound: float | None = None,
) -> History:
    """Train ``model`` in place on its own device, or continue the run saved at ``state_path``.

    Args:
        model: maps [B, C, H, W] in [0, 1] to logits; it is left in evaluation mode.
        images: uint8, on any device.
        labels: class indices, like ``images``.
        schedule: length, learning rate and augmentation.
        seed: of the order of the images and their augmentation.
        precision: ``torch.bfloat16`` runs convolutions and matrix products in bfloat16 by autocast.
        state_path: where the unfinished run is saved; the caller removes it once the result is stored.
        save_seconds: time between two saves.
        progress: called with the number of steps done, the number of all steps and a short note, which is
            :data:`RESUMING` once where training goes on from a saved state.
        head: the module of ``model`` that gives the logits and has a learning rate of its own; the last ``nn.Linear``
            if None.
        parts: modules of ``model`` that are trained, all of it if None. The rest keeps its weights and BatchNorm
            statistics.
        keep: called by rank 0 after each epoch of ``schedule.snapshots``; ``model`` then holds the snapshot.
        group: the processes that train together; ``schedule.batch_size`` is that of all of them.
        compiled: whether ``torch.compile`` compiles the network; on a GPU its launches are replayed as CUDA graphs,
            unless several processes train together.
        norm_bound: below which the norms of the layers are kept, each with the BatchNorm behind it
            (:class:`~fastlip.study.training.norm_bound.NormBound`); the weights are left plain.

    Raises:
        StudyError: the loss is not finite, the saved state is damaged, or the batch cannot be split over the group.
    """
    device = next(model.parameters()).device
    model.to(memory_format=torch.channels_last)
    images, labels = images.to(device), labels.to(device)
    constraint = None if norm_bound is None else NormBound(model, images.shape[1:], norm_bound, seed)
    # The head sums 2048 features: at the body's learning rate its first steps would overshoot by far.
    if head is None:
        *_, head = (m for m in model.modules() if isinstance(m, nn.Linear))
    own = {id(p) for p in head.parameters()}
    body = [p for p in model.parameters() if id(p) not in own]
    groups = [
        {"params": [p for p in body if p.dim() > 1], "weight_decay": schedule.weight_decay},
        {"params": [p for p in body if p.dim() <= 1], "weight_decay": 0.0},
        {"params": list(head.parameters()), "weight_decay": schedule.weight_decay},
    ]
    peaks = [schedule.max_lr, schedule.max_lr, schedule.max_lr * schedule.head_lr]
    optimiser = torch.optim.SGD(groups, lr=schedule.max_lr, momentum=schedule.momentum, nesterov=True, fused=True)
    size = min(schedule.batch_size, len(images))
    if size % group.size:
        raise StudyError(f"batches of {size} images cannot be split evenly over {group.size} processes", status=2)
    per_epoch = len(images) // size
    steps = schedule.epochs * per_epoch
    # OneCycleLR divides by the number of warm-up steps less one, so a run of few steps needs a longer warm-up.
    warmup = min(max(schedule.warmup, 1.5 / steps), 0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, peaks, total_steps=steps, pct_start=warmup, cycle_momentum=False
    )
    average = Average(model, schedule.averaging) if schedule.averaging else None
    run = UnfinishedTraining(model, optimiser, scheduler, average)
    run.restore(state_path, steps)
    if run.done:
        progress(run.done, steps, RESUMING)

    # SGD leaves parameters without a gradient alone, weight decay included.
    model.eval().requires_grad_(False)
    for part in [model] if parts is None else parts:
        part.train().requires_grad_(True)
    trained = group.trainer(model)
    network: Callable[[Tensor], Tensor] = trained
    if compiled:
        # Collectives between the compiled parts of a group's network are not for capture.
        graphs = device.type == "cuda" and group.size == 1
        network = torch.compile(trained, mode="reduce-overhead" if graphs else "default")
    saved = time.monotonic()
    while run.done < steps:
        epoch, first = divmod(run.done, per_epoch)
        generator = torch.Generator().manual_seed((seed + epoch) % 2**63)
        order = torch.randperm(len(images), generator=generator)
        shifts = torch.randint(-schedule.crop, schedule.crop + 1, (2, len(images)), generator=generator)
        flips = torch.rand(len(images), generator=generator) < (0.5 if schedule.flip else 0.0)
        # Drawn last, so that cutout leaves all other draws as they are.
        holes = torch.stack([torch.randint(side, (len(images),), generator=generator) for side in images.shape[2:]])
        # Copied once an epoch: a copy from the host in each step would leave a GPU idle before the next launch.
        order, shifts, flips, holes = order.to(device), shifts.to(device), flips.to(device), holes.to(device)
        for step in range(first, per_epoch):
            batch = order[step * size : (step + 1) * size][group.rank :: group.size]
            x = _augment(images[batch], shifts[:, batch], flips[batch])
            if schedule.cutout:
                x = _cut_out(x, holes[:, batch], schedule.cutout)
            y = labels[batch]
            if constraint is not None and device.type == "cpu" and not compiled:
                constraint.restart(trained)
            autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == torch.bfloat16)
            with _drawing(device, seed + _APART + run.done * group.size + group.rank), autocast:
                logits = network(x.float().div_(255).contiguous(memory_format=torch.channels_last))
            loss = cross_entropy(logits.float(), y, label_smoothing=schedule.label_smoothing)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            if constraint is not None:
                constraint.project()
            scheduler.step()
            if average is not None:
                average.update(run.done)
            run.done += 1
            summed = torch.stack([loss.detach().double() * len(batch), (logits.argmax(1) == y).sum().double()])
            run.totals += group.sum_(summed)
            if run.done % _CHECK_EVERY == 0 or run.done == steps or step + 1 == per_epoch:
                _require_finite(run.totals, run.done)
            if step + 1 == per_epoch:
                mean_loss, accuracy = (run.totals / (per_epoch * size)).tolist()
                run.history.loss.append(mean_loss)
                run.history.accuracy.append(accuracy)
                run.totals.zero_()
                if keep is not None and group.leads and epoch + 1 in schedule.snapshots:
                    with average.in_place() if average is not None else contextlib.nullcontext():
                        keep(epoch + 1)
            progress(run.done, steps, f"epoch {epoch + 1}/{schedule.epochs}, batch {step + 1}/{per_epoch}")
            if group.leads and run.done < steps and time.monotonic() - saved >= save_seconds:
                run.save(state_path)
                saved = time.monotonic()
    if average is not None:
        average.take_place()
    model.eval()
    if constraint is not None:
        constraint.remove()
    return run.history


@contextlib.contextmanager
def _drawing(device: torch.device, seed: int) -> Iterator[None]:
    """Seed what a network itself draws from within the block, as dropout does: torch's own generators.

    That of the CPU is afterwards as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed % 2**63)
        if device.type == "cuda":
            torch.cuda.default_generators[device.index or 0].manual_seed(seed % 2**63)
        yield


def _augment(x: Tensor, shift: Tensor, flip: Tensor) -> Tensor:
    """Shift each image by ``shift`` [2, B] pixels, reflecting the border; flip it horizontally where ``flip`` [B]."""
    height, width = x.shape[2:]
    rows = _mirrored(torch.arange(height, device=x.device) + shift[0, :, None], height)
    columns = _mirrored(torch.arange(width, device=x.device) + shift[1, :, None], width)
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    sample = torch.arange(len(x), device=x.device)[:, None, None, None]
    channel = torch.arange(x.shape[1], device=x.device)[None, :, None, None]
    return x[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]


def _cut_out(x: Tensor, centre: Tensor, side: int) -> Tensor:
    """Grey out a square of ``side`` pixels around ``centre`` [2, B] in each image, as far as it lies inside."""
    inside = [
        (torch.arange(size, device=x.device) - at[:, None] + side // 2).div(side, rounding_mode="floor") == 0
        for size, at in zip(x.shape[2:], centre, strict=True)
    ]
    return x.masked_fill((inside[0][:, :, None] & inside[1][:, None, :])[:, None], _GREY)


def _mirrored(index: Tensor, size: int) -> Tensor:
    index = index.abs()
    return torch.where(index >= size, 2 * (size - 1) - index, index)


def _require_finite(totals: Tensor, done: int) -> None:
    if not bool(totals.isfinite().all()):
        raise StudyError(f"the training loss is not finite by step {done}; lower max_lr or set precision=float32")
