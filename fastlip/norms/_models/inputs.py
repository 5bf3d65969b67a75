"""Inputs to run a model on, and the error that says on what it does not run."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastlip.norms._models.restore import as_found

_HALF = (torch.float16, torch.bfloat16)


class Refused(ValueError):
    """The model does something else than what would be bounded; raised from within its runs, and passed on as it is."""


def checked_shape(input_shape: Sequence[int]) -> tuple[int, ...]:
    """The shape as a tuple.

    Raises:
        TypeError: ``input_shape`` is a tensor.
        ValueError: ``input_shape`` is not a sequence of positive integers.
    """
    if isinstance(input_shape, Tensor):
        shape_of_one = tuple(input_shape.shape[1:])
        raise TypeError(f"input_shape must be the shape of one input, such as {shape_of_one}, not a tensor of inputs")
    shape = tuple(input_shape) if isinstance(input_shape, Iterable) else ()
    if not shape or any(isinstance(n, bool) or not hasattr(n, "__index__") or n < 1 for n in shape):
        raise ValueError(f"input_shape must be positive integers without the batch axis, got {input_shape!r}")
    return tuple(int(n) for n in shape)


def example_input(model: nn.Module, input_shape: Sequence[int]) -> Tensor:
    """A zero input, [1, *input_shape], in the dtype and on the device of the model's first parameter or buffer.

    It is in float32 where a model in half precision, which is in eval mode, takes that: such a model rounds its input.

    Raises:
        ValueError: ``input_shape`` is not a sequence of positive integers, or the model is on the meta device.
    """
    shape = checked_shape(input_shape)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ValueError(
                f"model is on the meta device, where {name} has no numbers: call to_empty and load its weights before"
            )
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            like = torch.zeros(1, *shape, dtype=tensor.dtype, device=tensor.device)
            wide = like.float()
            return wide if like.dtype in _HALF and _runs_on_one_of(model, wide, torch.cat([wide, wide])) else like
    return torch.zeros(1, *shape)


def _runs_on_one_of(model: nn.Module, *batches: Tensor) -> bool:
    """Whether the model runs on one of these batches."""
    for batch in batches:
        try:
            with torch.no_grad(), as_found(model):
                model(batch)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # a model may raise anything on a dtype that it was not made for
            continue
        return True
    return False


def random_inputs(model: nn.Module, input_shape: Sequence[int], count: int, seed: int = 0) -> Tensor:
    """Random inputs, [count, *input_shape]: uniform in [0, 1] like images, and Gaussian with deviation 2, in turn.

    They show whether two ways of computing agree. The seed may be fixed, since no probability is derived from them.
    """
    like = example_input(model, input_shape)
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, *like.shape[1:], generator=generator, dtype=torch.float64)
    x[1::2] = 2.0 * torch.randn(x[1::2].shape, generator=generator, dtype=torch.float64)
    return x.to(like.device, like.dtype)


@contextmanager
def runs_on(model: nn.Module, input_shape: Sequence[int]) -> Iterator[None]:
    """Turn errors of a forward pass into ValueErrors that say what the model was given."""
    try:
        yield
    except (torch.OutOfMemoryError, Refused):
        raise
    except Exception as error:
        name, why = type(model).__name__, f"{error}" or type(error).__name__
        shape = f"shape {list(input_shape)}, without the batch axis"
        one = example_input(model, input_shape)
        if _runs_on_one_of(model, one) and not _runs_on_one_of(model, torch.cat([one, one])):
            raise ValueError(
                f"{name} runs on one input of {shape}, and not on several at once, which are compared: {why}; "
                "torch.export takes dynamic_shapes for a batch of any size"
            ) from error
        raise ValueError(f"{name} does not run on an input of {shape}: {why}") from error
