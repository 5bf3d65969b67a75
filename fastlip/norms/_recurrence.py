"""The bidiagonalisations of many operators, a step at a time."""

import torch
from torch import Tensor

from fastlip.norms._certificate import Array
from fastlip.norms._stack import Stack

#: Steps whose vectors are allocated together.
_BLOCK = 16
#: Below this norm a chain has ended: it has exhausted its Krylov space, and only rounding is left.
_ENDED = 1e-30


class Recurrence:
    """A v_i = b_{i-1} u_{i-1} + a_i u_i and A^T u_i = a_i v_i + b_i v_{i+1} for every chain of a stack."""

    def __init__(self, operators: Stack, starts: Tensor) -> None:
        """Begin at ``starts``, flat, of norm 1 up to rounding."""
        self._stack, self.device = operators, operators.device
        rows = [
            starts[place].unflatten(0, (chains.stop - chains.start, -1))
            for place, chains in zip(operators.domain, operators.chains, strict=True)
        ]
        lengths = [torch.linalg.vector_norm(r, dim=1, dtype=torch.float64) for r in rows]
        self._blocks: list[Tensor] = []  # b_i v_{i+1}, [_BLOCK, flat] each
        self._place(0).copy_(starts)
        self._beta_squares = [torch.cat(lengths).square()]
        self._alpha_squares: list[Tensor] = []
        self._u = [starts.new_empty(operators.range[-1].stop) for _ in range(2)]

    def _place(self, index: int) -> Tensor:
        if index == _BLOCK * len(self._blocks):
            size = self._stack.domain[-1].stop
            self._blocks.append(torch.empty(_BLOCK, size, dtype=self._stack.dtype, device=self._stack.device))
        return self._blocks[index // _BLOCK][index % _BLOCK]

    def basis(self, index: int, count: int) -> list[Tensor]:
        """b_i v_{i+1} for i = 0 ... ``count`` - 1 of one operator, in parts [steps, chains, N]."""
        place, chains = self._stack.domain[index], self._stack.chains[index]
        parts = [block[:, place].unflatten(1, (chains.stop - chains.start, -1)) for block in self._blocks]
        return [part[: count - i * _BLOCK] for i, part in enumerate(parts) if count > i * _BLOCK]

    @property
    def steps(self) -> int:
        """Steps done so far, k."""
        return len(self._alpha_squares)

    def step(self, active: Tensor) -> None:
        """One step more of the active operators; what the others' parts hold from here on means nothing."""
        k = self.steps
        w, beta = self._place(k), self._beta_squares[-1]
        earlier = {"previous": self._u[1 - k % 2], "previous_square": self._alpha_squares[-1]} if k else {}
        u, alpha = self._stack.forward(w, self._u[k % 2], x_square=beta, active=active, **earlier)
        alpha = _ended(alpha)
        earlier = {"previous": w, "previous_square": beta}
        _, beta = self._stack.adjoint(u, self._place(k + 1), x_square=alpha, active=active, **earlier)
        self._beta_squares.append(_ended(beta))
        self._alpha_squares.append(alpha)

    def coefficients(self) -> tuple[Array, Array]:
        """a_1 ... a_k, [chains, k], and b_0 ... b_k, [chains, k + 1]; b_0 is the norm of the start."""
        alpha, beta = (torch.stack(squares, dim=1).sqrt() for squares in (self._alpha_squares, self._beta_squares))
        return alpha.cpu().numpy(), beta.cpu().numpy()


def _ended(square: Tensor) -> Tensor:
    return torch.where(square > _ENDED**2, square, 0.0)
