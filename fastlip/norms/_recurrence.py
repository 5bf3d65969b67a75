"""The bidiagonalisations of many operators, a chunk of steps at a time."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastlip.norms._certificate import Array
from fastlip.norms._replay import Replayed, Step, worthwhile
from fastlip.norms._stack import Stack

#: Steps whose vectors are allocated together; even, so that a pair of steps has its squares in one block.
_BLOCK = 16
#: Vectors of all operators begin at multiples of so many elements, for kernels that move 16 bytes at a time.
_ALIGNED = 4
#: Below this norm a chain has ended: it has exhausted its Krylov space, and only rounding is left.
_ENDED = 1e-30


class _Block(NamedTuple):
    """Memory of ``_BLOCK`` steps."""

    vectors: Tensor  # b_i v_{i+1}, [_BLOCK, flat]
    squares: Tensor  # of a_{i+1} and b_{i+1}, [_BLOCK, 2, chains]


class Recurrence:
    """A v_i = b_{i-1} u_{i-1} + a_i u_i and A^T u_i = a_i v_i + b_i v_{i+1} for every chain of a stack.

    Steps only launch work: nothing is read on the host but by :meth:`coefficients`, and all state stays where it is in
    memory. On a GPU pairs of steps work in a memory of their own, from a CUDA graph, and are copied to the basis.

    Attributes:
        active: operators that take part in steps, [operators] bool; written in place.
        steps: done so far, k.
        device: of all vectors.
    """

    def __init__(self, operators: Stack, starts: Tensor) -> None:
        """Begin at ``starts``, flat, of norm 1 up to rounding."""
        self._stack, self.device, self.steps = operators, operators.device, 0
        self.active = torch.ones(len(operators.chains), dtype=torch.bool, device=self.device)
        rows = [
            starts[place].unflatten(0, (chains.stop - chains.start, -1))
            for place, chains in zip(operators.domain, operators.chains, strict=True)
        ]
        self._start = torch.cat([torch.linalg.vector_norm(r, dim=1, dtype=torch.float64) for r in rows]).square()
        self._zero = torch.zeros((), dtype=torch.float64, device=self.device)
        self._blocks: list[_Block] = []
        self._reserve(0)
        self._vector(0).copy_(starts)
        self._u = _vectors(2, operators.range[-1].stop, operators).zero_()
        self._pair: _Pair | None = None
        if worthwhile(self.device, operators.domain[-1].stop + operators.range[-1].stop):
            self.work_in_pairs(Replayed)

    def work_in_pairs(self, replayed: Callable[[Step, torch.device], Step]) -> None:
        """Take two steps at a time on fixed memory, by what ``replayed`` makes of them; to be set before any step."""
        self._pair = _Pair(self, replayed)

    def _reserve(self, index: int) -> None:
        """Have memory for the vectors and squares of a step."""
        while index >= _BLOCK * len(self._blocks):
            squares = torch.zeros(_BLOCK, 2, self._start.numel(), dtype=torch.float64, device=self.device)
            self._blocks.append(_Block(_vectors(_BLOCK, self._stack.domain[-1].stop, self._stack), squares))

    def _vector(self, index: int) -> Tensor:
        return self._blocks[index // _BLOCK].vectors[index % _BLOCK]

    def _squares(self, index: int) -> Tensor:
        return self._blocks[index // _BLOCK].squares[index % _BLOCK]

    def basis(self, index: int, count: int) -> list[Tensor]:
        """b_i v_{i+1} for i = 0 ... ``count`` - 1 of one operator, in parts [steps, chains, N]."""
        place, chains = self._stack.domain[index], self._stack.chains[index]
        parts = [block.vectors[:, place].unflatten(1, (chains.stop - chains.start, -1)) for block in self._blocks]
        return [part[: count - i * _BLOCK] for i, part in enumerate(parts) if count > i * _BLOCK]

    def advance(self, count: int) -> None:
        """``count`` steps more of the active operators, or one more than that, without a look at any of them.

        What the others' vectors and squares hold from here on means nothing.
        """
        self._reserve(self.steps + count + 1)
        if self._pair is not None:
            for _ in range(0, count, 2):
                self._pair.step(self)
            return
        for _ in range(count):
            k = self.steps
            w, beta = self._vector(k), self._squares(k - 1)[1] if k else self._start
            u, before = self._u[k % 2], (self._u[1 - k % 2], self._squares(k - 1)[0]) if k else None
            self._step(w, beta, u, self._squares(k), self._vector(k + 1), before)
            self.steps += 1

    def _step(
        self, w: Tensor, beta: Tensor, u: Tensor, squares: Tensor, out: Tensor, before: tuple[Tensor, Tensor] | None
    ) -> None:
        """From w = b_{k-1} v_k and the u of the step before to u, its and the next w's squares, and ``out``."""
        alpha = squares[0]
        earlier = {} if before is None else {"previous": before[0], "previous_square": before[1]}
        self._stack.forward(w, u, alpha, x_square=beta, active=self.active, **earlier)
        self._end(alpha)
        earlier = {"previous": w, "previous_square": beta}
        self._stack.adjoint(u, out, squares[1], x_square=alpha, active=self.active, **earlier)
        self._end(squares[1])

    def _end(self, square: Tensor) -> None:
        torch.where(square > _ENDED**2, square, self._zero, out=square)

    def coefficients(self, count: int) -> tuple[Array, Array]:
        """a_1 ... a_k, [chains, k], and b_0 ... b_k, [chains, k + 1], for k = ``count``; b_0 is the norm of the start.

        One read from the device.
        """
        start = torch.stack([self._zero.expand_as(self._start), self._start])
        squares = torch.cat([start[None], *(block.squares for block in self._blocks)])[: count + 1]
        alpha, beta = squares.permute(1, 2, 0).contiguous().sqrt_().cpu().numpy()
        return alpha[:, 1:], beta


class _Pair:
    """Two steps on fixed memory: the first leaves its w in row 1, the second in row 0, where the next pair begins."""

    def __init__(self, run: Recurrence, replayed: Callable[[Step, torch.device], Step]) -> None:
        self._vectors = _vectors(2, run._stack.domain[-1].stop, run._stack)
        self._vectors[0].copy_(run._vector(0))
        # The first u that is subtracted is 0, and its square says so: the first step is like the others.
        self._squares = torch.zeros(2, 2, run._start.numel(), dtype=torch.float64, device=run.device)
        self._squares[1, 1].copy_(run._start)
        self._run = replayed(lambda: self._both(run), run.device)

    def _both(self, run: Recurrence) -> None:
        for i in range(2):
            before = run._u[1 - i], self._squares[1 - i, 0]
            beta = self._squares[1 - i, 1]
            run._step(self._vectors[i], beta, run._u[i], self._squares[i], self._vectors[1 - i], before)

    def step(self, run: Recurrence) -> None:
        self._run()
        k = run.steps
        run._vector(k + 1).copy_(self._vectors[1])
        run._vector(k + 2).copy_(self._vectors[0])
        run._blocks[k // _BLOCK].squares[k % _BLOCK : k % _BLOCK + 2].copy_(self._squares)
        run.steps += 2


def _vectors(count: int, size: int, stack: Stack) -> Tensor:
    """Uninitialised, [count, size], each aligned."""
    room = -(-size // _ALIGNED) * _ALIGNED
    return torch.empty(count, room, dtype=stack.dtype, device=stack.device)[:, :size]
