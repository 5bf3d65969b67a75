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
import hashlib
import io
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fastlip.study.errors import StudyError
from fastlip.study.settings.training import Schedule
from fastlip.study.storage.files import write_bytes
from fastlip.study.training.process_group import ProcessGroup

SINGLE_PROCESS = ProcessGroup()

#: The file of an unfinished training run begins with this and the SHA-256 of all that follows, in hexadecimal digits.
_HEAD = b"fastlip.study, unfinished training, sha256 "
_BODY = len(_HEAD) + 64

#: Steps between two checks that the loss is finite; at each of them the host waits for the GPU.
_CHECK_EVERY = 50

#: Difference between the seeds of what a network draws and those of the images' order and augmentation.
_APART = 1 << 61

#: What cutout puts in the place of pixels; uint8.
_GREY = 128


@dataclass
class History:
    """Mean loss and accuracy of each finished epoch over its augmented training images."""

    loss: list[float]
    accuracy: list[float]


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
        progress: called with the number of steps done, the number of all steps and a short note.
        head: the module of ``model`` that gives the logits and has a learning rate of its own; the last ``nn.Linear``
            if None.
        parts: modules of ``model`` that are trained, all of it if None. The rest keeps its weights and BatchNorm
            statistics.
        keep: called by rank 0 after each epoch of ``schedule.snapshots``; ``model`` then holds the snapshot.
        group: the processes that train together; ``schedule.batch_size`` is that of all of them.
        compiled: whether ``torch.compile`` compiles the network; on a GPU its launches are replayed as CUDA graphs,
            unless several processes train together.

    Raises:
        StudyError: the loss is not finite, the saved state is damaged, or the batch cannot be split over the group.
    """
    device = next(model.parameters()).device
    model.to(memory_format=torch.channels_last)
    images, labels = images.to(device), labels.to(device)
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
    history = History([], [])
    totals = torch.zeros(2, dtype=torch.float64, device=device)  # summed loss, correct images of this epoch
    average = _Average(model, schedule.averaging) if schedule.averaging else None
    done = _restore(state_path, model, optimiser, scheduler, average, history, totals, steps)

    # SGD leaves parameters without a gradient alone, weight decay included.
    model.eval().requires_grad_(False)
    for part in [model] if parts is None else parts:
        part.train().requires_grad_(True)
    network: Callable[[Tensor], Tensor] = group.trainer(model)
    if compiled:
        # Collectives between the compiled parts of a group's network are not for capture.
        graphs = device.type == "cuda" and group.size == 1
        network = torch.compile(network, mode="reduce-overhead" if graphs else "default")
    saved = time.monotonic()
    while done < steps:
        epoch, first = divmod(done, per_epoch)
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
            autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == torch.bfloat16)
            with _drawing(device, seed + _APART + done * group.size + group.rank), autocast:
                logits = network(x.float().div_(255).contiguous(memory_format=torch.channels_last))
            loss = cross_entropy(logits.float(), y, label_smoothing=schedule.label_smoothing)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            scheduler.step()
            if average is not None:
                average.update(done)
            done += 1
            summed = torch.stack([loss.detach().double() * len(batch), (logits.argmax(1) == y).sum().double()])
            totals += group.sum_(summed)
            if done % _CHECK_EVERY == 0 or done == steps or step + 1 == per_epoch:
                _require_finite(totals, done)
            if step + 1 == per_epoch:
                mean_loss, accuracy = (totals / (per_epoch * size)).tolist()
                history.loss.append(mean_loss)
                history.accuracy.append(accuracy)
                totals.zero_()
                if keep is not None and group.leads and epoch + 1 in schedule.snapshots:
                    with average.in_place() if average is not None else contextlib.nullcontext():
                        keep(epoch + 1)
            progress(done, steps, f"epoch {epoch + 1}/{schedule.epochs}, batch {step + 1}/{per_epoch}")
            if group.leads and done < steps and time.monotonic() - saved >= save_seconds:
                _save(state_path, model, optimiser, scheduler, average, history, totals, done)
                saved = time.monotonic()
    if average is not None:
        average.take_place()
    model.eval()
    return history


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


class _Average:
    """The exponential moving average of a model's weights and BatchNorm statistics (Polyak and Juditsky 1992).

    A step with t steps before it has a decay of at most t / (t + 9), so that no short training keeps its first weights.
    The statistics are averaged like the weights: those of the last weights alone would not belong to the average.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.own = {k: v.detach() for k, v in model.state_dict().items() if v.is_floating_point()}
        self.averaged = {k: v.clone() for k, v in self.own.items()}

    def update(self, t: int) -> None:
        """Take in the weights of the step with ``t`` steps before it."""
        update = get_ema_multi_avg_fn(min(self.decay, t / (9 + t)))
        update(list(self.averaged.values()), list(self.own.values()), t)

    def take_place(self) -> None:
        """Make the average the model's weights."""
        for name, value in self.own.items():
            value.copy_(self.averaged[name])

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The model with the average for its weights, within the block."""
        before = {k: v.clone() for k, v in self.own.items()}
        self.take_place()
        try:
            yield
        finally:
            for name, value in self.own.items():
                value.copy_(before[name])


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


def _save(
    path: Path,
    model: nn.Module,
    optimiser: Any,
    scheduler: Any,
    average: _Average | None,
    history: History,
    totals: Tensor,
    done: int,
) -> None:
    state = {
        "model": model.state_dict(),
        "optimiser": optimiser.state_dict(),
        "rate": scheduler.state_dict(),
        "loss": history.loss,
        "accuracy": history.accuracy,
        "totals": totals,
        "done": done,
        "average": average.averaged if average is not None else {},
    }
    # Serialised in memory first, so that a full disk is an OSError and not an error of torch's own writer.
    buffer = io.BytesIO(_HEAD + bytes(64))
    buffer.seek(_BODY)
    torch.save(state, buffer)
    # torch's reader does not check the CRC-32 sums in its archive.
    buffer.getbuffer()[len(_HEAD) : _BODY] = _digest(buffer.getbuffer()[_BODY:])
    write_bytes(path, buffer.getbuffer())


def _restore(
    path: Path,
    model: nn.Module,
    optimiser: Any,
    scheduler: Any,
    average: _Average | None,
    history: History,
    totals: Tensor,
    steps: int,
) -> int:
    """Load the saved state into the arguments; the number of ``steps`` already done."""
    if not path.exists():
        return 0
    try:
        data = memoryview(path.read_bytes())
        if data[: len(_HEAD)] == _HEAD:
            if data[len(_HEAD) : _BODY] != _digest(data[_BODY:]):
                raise ValueError("it is not what its SHA-256 was taken of")
            data = data[_BODY:]
        # Files of earlier versions have no digest and begin with torch's archive.
        state = torch.load(io.BytesIO(data), map_location=totals.device, weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        scheduler.load_state_dict(state["rate"])
        history.loss[:], history.accuracy[:] = state["loss"], state["accuracy"]
        totals.copy_(state["totals"])
        if average is not None:
            for name, value in average.averaged.items():
                value.copy_(state["average"][name])
        done = int(state["done"])
        if not 0 <= done <= steps or len(history.loss) != len(history.accuracy):
            raise ValueError(f"step {done} of {steps}")
    except PermissionError:
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0][:200]
        raise StudyError(
            f"{path} is damaged ({reason}); delete it and run the same command again to train this model from its start"
        ) from None
    return done


def _digest(data: memoryview) -> bytes:
    return hashlib.sha256(data).hexdigest().encode()
