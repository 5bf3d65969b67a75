"""A function as a module, which bounds can be asked of."""

from collections.abc import Callable

from torch import Tensor, nn


class Applied(nn.Module):
    """What a function makes of the input."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)
