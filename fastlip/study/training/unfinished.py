"""What a training run has reached: its weights, its optimiser and its history, as they are saved while it goes on."""

import contextlib
import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fastlip.study.errors import StudyError
from fastlip.study.storage.files import write_bytes

#: The file of an unfinished training run begins with this and the SHA-256 of all that follows, in hexadecimal digits.
_HEAD = b"fastlip.study, unfinished training, sha256 "
_BODY = len(_HEAD) + 64


@dataclass
class History:
    """Mean loss and accuracy of each finished epoch over its augmented training images."""

    loss: list[float]
    accuracy: list[float]


class Average:
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


#: Note of the progress that is told as training goes on from a saved state.
RESUMING = "resuming"


class UnfinishedTraining:
    """A training run that can be saved and restored.

    Attributes:
        model: the network; ``optimiser``, ``scheduler`` and ``average`` are those of its weights.
        history: the finished epochs.
        totals: sum of the loss and number of correct images of the current epoch, [2] float64.
        done: number of steps done.
    """

    def __init__(self, model: nn.Module, optimiser: Optimizer, scheduler: LRScheduler, average: Average | None) -> None:
        self.model, self.optimiser, self.scheduler, self.average = model, optimiser, scheduler, average
        self.history = History([], [])
        self.totals = torch.zeros(2, dtype=torch.float64, device=next(model.parameters()).device)
        self.done = 0

    def save(self, path: Path) -> None:
        """Write all of it to ``path``, replacing what is there in one step.

        Raises:
            OSError: the file cannot be written.
        """
        state = {
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "rate": self.scheduler.state_dict(),
            "loss": self.history.loss,
            "accuracy": self.history.accuracy,
            "totals": self.totals,
            "done": self.done,
            "average": self.average.averaged if self.average is not None else {},
        }
        # Serialised in memory first, so that a full disk is an OSError and not an error of torch's own writer.
        buffer = io.BytesIO(_HEAD + bytes(64))
        buffer.seek(_BODY)
        torch.save(state, buffer)
        # torch's reader does not check the CRC-32 sums in its archive.
        buffer.getbuffer()[len(_HEAD) : _BODY] = _digest(buffer.getbuffer()[_BODY:])
        write_bytes(path, buffer.getbuffer())

    def restore(self, path: Path, steps: int) -> None:
        """Continue the run of ``steps`` steps that was saved at ``path``, if there is such a file.

        Raises:
            StudyError: the file is damaged.
            PermissionError: it cannot be read.
        """
        if not path.exists():
            return
        try:
            data = memoryview(path.read_bytes())
            if data[: len(_HEAD)] == _HEAD:
                if data[len(_HEAD) : _BODY] != _digest(data[_BODY:]):
                    raise ValueError("it is not what its SHA-256 was taken of")
                data = data[_BODY:]
            # Files of earlier versions have no digest and begin with torch's archive.
            state = torch.load(io.BytesIO(data), map_location=self.totals.device, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.scheduler.load_state_dict(state["rate"])
            self.history = History(list(state["loss"]), list(state["accuracy"]))
            self.totals.copy_(state["totals"])
            if self.average is not None:
                for name, value in self.average.averaged.items():
                    value.copy_(state["average"][name])
            self.done = int(state["done"])
            if not 0 <= self.done <= steps or len(self.history.loss) != len(self.history.accuracy):
                raise ValueError(f"step {self.done} of {steps}")
        except PermissionError:
            raise
        except Exception as error:
            reason = str(error).partition("\n")[0][:200]
            raise StudyError(
                f"{path} is damaged ({reason}); delete it and run the same command again to train this model from its "
                "start"
            ) from None


def _digest(data: memoryview) -> bytes:
    return hashlib.sha256(data).hexdigest().encode()
